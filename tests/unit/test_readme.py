"""README's Python block runs as it stands, and what README names exists."""

import contextlib
import io
import logging
import re

import pytest

from dzhpc import config


@pytest.fixture(scope="module")
def readme(project):
    return (project / "README.md").read_text()


def test_the_gradient_of_your_own_module(readme, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dzhpc"), "handlers", [])  # those of a verb that ran before in this process
    block = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "make_engine" in b)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block, {})
    cosine = float(re.fullmatch(r"cosine: (\S+)\n", printed.getvalue())[1])
    assert 0.999 < cosine < 1.0001


def test_files_that_are_named_exist(project, readme):
    text = readme + (project / "INSTALL.md").read_text()
    named = set(re.findall(r"\b(?:inputs|examples|scripts|slurm)/[\w.-]+\.\w+", text)) | set(re.findall(r"\]\(([\w./]+)\)", text))
    assert len(named) >= 8
    assert [name for name in sorted(named) if not (project / name).exists()] == []


def test_keys_that_are_named_exist(project, readme):
    text = readme + (project / "INSTALL.md").read_text()
    known = {key for key, _, _ in config.known_keys()}
    sections = "|".join(config.Config.model_fields)
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.\w+)\b[^`/]*`", text)) - {"data.h5"}
    assert len(named) >= 10
    assert named <= known


def test_every_verb_is_named(project, readme):
    verbs = {path.stem for path in (project / "dzhpc").glob("*.py") if "run_verb(" in path.read_text()} - {"spmd"}
    assert {verb for verb in verbs if f"| `{verb}" not in readme} == set()
