"""Engines of these tests compile nothing: a compiler takes seconds, and changes no rule. Tests marked ``compiles`` have it."""

import pytest

from dzhpc.engines.kernels import compiled


@pytest.fixture(autouse=True)
def _compiler(request, monkeypatch):
    if "compiles" not in request.keywords:
        monkeypatch.setattr(compiled, "COMPILERS", ())
