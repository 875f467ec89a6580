"""Kills runs at random and restarts them until they finish: ``python tests/mpi/chaos.py --runs 30 --seed 1``.

Each run is a small CNN on the digits. Up to five times it is killed at a random moment: SIGKILL to a random rank, SIGTERM to
mpirun, SIGKILL to mpirun alone, or a power cut (SIGKILL to mpirun and all ranks at once). It is restarted by the same command
line on a random number of ranks, until it finishes. Every run must end with the bits of the undisturbed one, within a time
limit, must not leave processes or shared memory behind, and no checkpoint that it leaves at any moment may be damaged.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # input_texts
from input_texts import DIGITS, text
from mpi_launch import SHARED_MEMORY, Case, Job, assert_same, batch, bits, checkpoints, mpirun

from dzhpc.files.checkpoint import load_checkpoint

INPUT = text(
    DIGITS, model={"width": 6}, data={"batch_size": 64}, sparsity={"ratio": 0.3}, stop={"epochs": 10, "steps": 48},
    checkpoint={"every_steps": 2},
)  # fmt: skip
KINDS = ("rank", "term", "launcher", "power")
MOST = 5  # kills a run
LIMIT = 120.0  # seconds for one launch: longer is a hang
START, TRAINING = 4.0, 3.0  # seconds after the launch, or after the first line of its log, from which a moment is drawn


@dataclass
class Story:
    """What happened to one run."""

    number: int
    kills: list[str] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)  # ranks of each
    restarts: int = 0  # of the launches those that began at a checkpoint
    seconds: float = 0.0
    checked: int = 0  # checkpoints found and loaded after a kill

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.launches))
        kills = ", ".join(self.kills)
        return f"run {self.number}: {len(self.kills)} kills ({kills}), ranks {ranks}, {self.seconds:.0f} s: same bits"


def ranks_of(folder: Path) -> list[int]:
    """The living Python processes of a run folder's job."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(folder).encode() in words and b"python" in words[0] and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return sorted(found)


def strike(kind: str, process: subprocess.Popen, folder: Path, draw: random.Random) -> None:
    """Kill in one of the ways."""
    ranks = ranks_of(folder)
    victims = {"rank": [draw.choice(ranks)] if ranks else [process.pid], "power": [process.pid, *ranks]}.get(kind, [process.pid])
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)


def torment(number: int, place: Path, draw: random.Random, after_first: bool, most: int) -> Story:
    """One run, killed and restarted until it finishes. Raises AssertionError where anything is not as promised."""
    folder, story, start = place / f"run-{number}", Story(number), time.monotonic()
    kills = draw.randint(1, most)
    while True:
        ranks, kind = draw.randint(1, 3), draw.choice(KINDS)
        training = after_first or draw.random() < 0.7
        moment = draw.uniform(0, TRAINING if training else START)
        logged = (folder / "log.txt").stat().st_size if (folder / "log.txt").exists() else 0

        def begun(logged: int = logged) -> bool:
            log = folder / "log.txt"
            return log.exists() and log.stat().st_size > logged and (not after_first or bool(checkpoints(folder)))

        def meanwhile(process: subprocess.Popen, kind=kind, training=training, moment=moment, begun=begun) -> None:
            while training and not begun() and process.poll() is None:
                time.sleep(0.01)
            end = time.monotonic() + moment
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is None:
                strike(kind, process, folder, draw)
                story.kills.append(f"{kind} {moment:.1f} s into the {'training' if training else 'launch'}")

        before = len(story.kills)
        words = ["job.toml", "--run-dir", folder]
        if before == kills:  # nobody disturbs it: in the job that is there
            result = batch(ranks, place, [Case("rest", "train", words)], LIMIT)["rest"]
        else:
            result = mpirun(ranks, "train", *words, cwd=place, timeout=LIMIT, meanwhile=meanwhile)
        story.launches.append(ranks)
        end = time.monotonic() + 10
        while ranks_of(folder):
            assert time.monotonic() < end, f"run {number}: processes {ranks_of(folder)} live on after {story.kills[-1:]}"
            time.sleep(0.02)
        for path in checkpoints(folder):
            load_checkpoint(path)  # none is damaged, at whatever moment its writer was killed
            story.checked += 1
        assert "Traceback" not in result.err and "skipped" not in result.err, result.err
        if result.code == 0:
            break
        assert len(story.kills) > before, f"run {number}: exit code {result.code} without a kill\n{result.err}"
    assert_same(bits(place / "whole"), bits(folder))
    assert not (folder / "lock.json").exists() and not list(folder.rglob("*.tmp"))
    story.restarts = (folder / "log.txt").read_text().count("restarting at step")
    story.seconds = time.monotonic() - start
    return story


def chaos(runs: int, seed: int, place: Path, after_first: bool = False, most: int = MOST, say=print) -> list[Story]:
    """Torment ``runs`` runs in the folder ``place``; after_first: no kill before a run's first checkpoint."""
    (place / "job.toml").write_text(INPUT)
    (place / "shm").mkdir()
    os.environ[SHARED_MEMORY] = str(place / "shm")  # not /dev/shm, where other jobs come and go
    batch(2, place, [Case("whole", "train", ["job.toml", "--run-dir", place / "whole"])], LIMIT)["whole"].succeeded()
    stories = []
    for number in range(runs):
        stories.append(torment(number, place, random.Random(f"{seed}-{number}"), after_first, most))
        say(stories[-1])
    del os.environ[SHARED_MEMORY]
    left = list((place / "shm").iterdir())  # a kill in the moment between the making of a file and its removal leaves it
    assert len(left) <= 4 * (sum(len(story.kills) for story in stories) // 10), f"shared memory left behind: {left}"
    return stories


def main() -> int:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--after-first-checkpoint", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        start = time.monotonic()
        say = lambda story: print(story, flush=True)  # noqa: E731
        stories = chaos(args.runs, args.seed, Path(place), args.after_first_checkpoint, say=say)
        Job.close_all()
    kills = [kind.split()[0] for story in stories for kind in story.kills]
    print(
        f"{len(stories)} runs, {len(kills)} kills ({', '.join(f'{kills.count(kind)} {kind}' for kind in KINDS)}), "
        f"{sum(len(s.launches) for s in stories)} launches, {sum(s.restarts for s in stories)} restarts from a checkpoint, "
        f"{sum(s.checked for s in stories)} checkpoints found whole; all ended with the bits of the undisturbed run; "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
