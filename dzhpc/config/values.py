"""What an input file is made of: sections, and the kinds of values that their keys have, numbers and their bounds, times."""

import datetime
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", re.ASCII)


def _seconds(value: Any) -> Any:
    """Seconds from a number, "MM:SS", "H:MM:SS" or "D-HH:MM[:SS]" as Slurm has them, or a TOML local time."""
    if isinstance(value, datetime.time):
        return value.hour * 3600.0 + value.minute * 60 + value.second
    if isinstance(value, str) and (found := TIME.fullmatch(value)):
        days, *parts = (int(part or 0) for part in found.groups())
        hours, minutes, seconds = parts if found[1] or found[4] else [0, *parts[:2]]
        value = days * 86400 + hours * 3600 + minutes * 60 + seconds
    try:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    except OverflowError:
        return float("inf")


def _moderate(value: float) -> float:
    if value == 0 or 1e-38 <= value <= 1e38:
        return value
    raise PydanticCustomError("moderate", "Input should be between 1e-38 and 1e38, so that float32 holds it and its inverse")


LARGEST = 2**31 - 1  # of what is counted at once: more fits no array
MANY = 2**53  # of what is counted over a run: metrics.h5 holds it exactly
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kept = Annotated[float, Field(ge=0, lt=1)]  # of an exponential average
Epochs = Annotated[float, Field(ge=0, le=1e9)]  # a step number has to be counted up to
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Total = Annotated[int, Field(ge=1, le=MANY)]
Directions = Annotated[int, Field(ge=1, le=10**8)]  # every rank holds a number of each
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Ratio = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=1, le=2**15)]  # of a side
Moderate = Annotated[Positive, AfterValidator(_moderate)]
Decay = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_moderate)]


class Section(BaseModel):
    """A table of the input file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def conflicts(self, config) -> Iterator[str]:
        """Keys that are each valid, but not together, or not with another section of the Config ``config``: a line each."""
        return iter(())
