"""Numbers on a command line, with the bounds that the keys of an input have."""

import argparse
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError


def number(kind: Any) -> Callable[[str], Any]:
    """The ``type`` of an option of argparse. kind: one of the types of :mod:`dzhpc.config.sections`, such as Count."""
    adapter = TypeAdapter(kind)

    def read(text: str) -> Any:
        try:
            return adapter.validate_strings(text)
        except ValidationError as failure:
            expected = failure.errors()[0]["msg"].removeprefix("Input should be ")
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}") from None

    return read
