"""The state of all runs of a campaign, from their run folders alone."""

import math
from dataclasses import dataclass
from pathlib import Path

from dzhpc.errors import InputError
from dzhpc.files.drawing import cell
from dzhpc.files.metrics import load_columns
from dzhpc.files.runfolder import RunFolder
from dzhpc.job import lock

STATES = ("finished", "running", "stopped", "failed")


@dataclass
class Member:
    """A run folder, as it is now. Hours count to the end of each launch; of a killed one, to its last checkpoint.

    Those of a run that was here before (--restart never) are none of this one's.
    """

    name: str
    state: str
    reason: str
    step: int
    epoch: float
    accuracy: float  # of the last evaluation, 0..1; NaN without one
    gpu_hours: float
    rank_hours: float


def find(folder: Path) -> list[Path]:
    """All run folders at or below a folder, by name. Raises InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one that holds run folders, such as runs/")
    found = sorted({path.parent for path in folder.rglob("launches") if path.is_dir()})
    if not found:
        raise InputError(f"{folder}: no run folder below; expected folders with launches/, as `python -m dzhpc.train` makes them")
    return found


def member(path: Path, name: str) -> Member:
    """What a run folder says of itself: its newest launch manifest, its lock, its metrics."""
    launches = [manifest for _, manifest in RunFolder(path).manifests()]
    newest = launches[-1] if launches else {}
    state, reason = newest.get("state", "failed"), newest.get("reason", "")
    if holder := lock.holder(path):
        state, reason = "running", lock.name(holder)
    elif state == "running":
        state, reason = "failed", "ended without a word (killed?)"
    elif not launches:
        reason = "never started"
    own = [launch for launch in launches if launch.get("run_uuid") == newest.get("run_uuid")]
    hours = [(_gpus(launch), _ranks(launch), launch.get("seconds", 0.0) / 3600) for launch in own]
    last = {"step": 0, "epoch": 0.0, "accuracy": math.nan}
    try:
        train, evaluation = load_columns(path / "metrics.h5")
        if len(train["step"]):
            last |= {key: values[-1] for key, values in train.items()}
        if len(evaluation["step"]):
            last["accuracy"] = evaluation["accuracy"][-1]
    except InputError as error:
        if (path / "metrics.h5").exists():
            reason = f"{reason}; {error}"
    gpu_hours, rank_hours = sum(g * h for g, _, h in hours), sum(r * h for _, r, h in hours)
    return Member(name, state, reason, int(last["step"]), last["epoch"], last["accuracy"], gpu_hours, rank_hours)


def members(folder: Path) -> list[Member]:
    """All runs at or below a folder. Raises InputError if there are none."""
    return [member(path, str(path.relative_to(folder)) if path != folder else path.resolve().name) for path in find(folder)]


def table(runs: list[Member]) -> str:
    """A Markdown table, a run a row, and how many are in which state."""
    rows = ["| run | state | reason | step | epoch | accuracy | GPU-hours | rank-hours |", "|---" * 8 + "|"]
    for m in runs:
        accuracy = "" if math.isnan(m.accuracy) else f"{100 * m.accuracy:.2f} %"
        reason = " ".join(m.reason.replace("|", "/").split())
        numbers = f"{m.step} | {m.epoch:.2f} | {accuracy} | {m.gpu_hours:.2f} | {m.rank_hours:.2f}"
        rows.append(f"| {cell(m.name)} | {m.state} | {reason} | {numbers} |")
    counts = [f"{sum(m.state == state for m in runs)} {state}" for state in STATES]
    return "\n".join(rows) + f"\n\n{len(runs)} runs: {', '.join(counts)}"


def _gpus(launch: dict) -> int:
    """The GPUs of a launch, each counted once."""
    return len({(rank.get("host"), rank["uuid"]) for rank in launch.get("hosts", []) if rank.get("uuid")})


def _ranks(launch: dict) -> int:
    """The ranks of a launch; an entry without a count is one."""
    return sum(host.get("count", 1) for host in launch.get("hosts", []))
