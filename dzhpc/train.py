"""Verb: run or restart a campaign. ``mpirun -n 8 python -m dzhpc.train inputs/resnet20.toml``"""

if __name__ == "__main__":  # before torch loads, which takes seconds: a rank may lose its launcher, or be warned, in that time
    from dzhpc.job import process, stopping

    process.die_with_launcher()
    stopping.listen()

import argparse
import datetime
import importlib.metadata
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

from dzhpc import config as configuration
from dzhpc import report
from dzhpc.engines.pinned import Pinned
from dzhpc.errors import DzhpcError
from dzhpc.files import store
from dzhpc.files.runfolder import RunFolder
from dzhpc.job import device as devices
from dzhpc.job import log as metrics
from dzhpc.job.lock import Lock
from dzhpc.job.stopping import Reason, listen, tell_job_script
from dzhpc.job.world import World, run_verb
from dzhpc.tasks import Task, make_task
from dzhpc.training.active_set import read_lpr
from dzhpc.training.forecast import forecast
from dzhpc.training.trainer import Trainer, check_restart

log = logging.getLogger("dzhpc")
LIBRARIES = ("dzhpc", "torch", "numpy", "mpi4py", "h5py")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.train", description="Train by function queries alone; restart where a run was left.")
    p.add_argument("input", nargs="?", help="TOML input file; without one the defaults of inputs/resnet20.toml")
    p.add_argument("--run-dir", help="the run folder (default: run.dir/run.name)")
    p.add_argument("--restart", default="auto", metavar="auto|never|FILE", help="auto: from the newest valid checkpoint, if any")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. zo.mu=1e-3; may be repeated"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="validate, print the resolved input, forecast hours and memory; write nothing"
    )
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    listen()
    metrics.set_up_log(world.is_root, args.quiet)
    config = world.on_root(lambda: configuration.load(args.input, args.set))
    if world.is_root:  # after a collective: all ranks listen
        tell_job_script("LISTENING")
    device = devices.choose(world.local_rank, config.run.threads)
    with world.together():
        if args.input:
            sys.path.insert(0, str(Path(args.input).resolve().parent))  # the user's own modules may lie beside the input
        task = make_task(config, device)
        try_out(task)
    if args.dry_run:
        if world.is_root:
            print(forecast(task))
        return 0
    ranks = world.gather((world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device)))
    world.on_root(lambda: devices.check_binding(ranks, config.run.share_gpu))
    folder = RunFolder(args.run_dir or Path(config.run.dir) / config.run.name)
    lock = Lock(folder.path)
    try:
        return run(world, task, folder, lock, args, ranks).exit_code
    finally:
        lock.release()


def run(world: World, task: Task, folder: RunFolder, lock: Lock, args: argparse.Namespace, ranks: list | None) -> Reason:
    """Start or restart in the run folder and train; why it ended. The root takes the lock."""
    state, source, stale = world.on_root(lambda: open_folder(folder, lock, args.restart, task))
    world.crash_folder = folder.path
    trainer = Trainer(world, task, folder, args.quiet)
    if state is not None:
        trainer.restore(state)
    world.on_root(lambda: begin(folder, trainer, state, source, stale, ranks))
    world.on_failure = lambda message, code: folder.update_manifest(state="failed", reason=message, exit_code=code)
    reason = trainer.run()
    if world.is_root:
        end(folder, trainer, reason)
    return reason


def try_out(task: Task) -> None:
    """Bind a batch once and read the LPR file, so that what cannot work is said before the run folder is made.

    Raises InputError. Buffers are left as they were.
    """
    with Pinned(task.model, task.engine.index.device).unchanged():
        task.bind(0)
    if task.config.sparsity.lpr:
        read_lpr(task)


def open_folder(folder: RunFolder, lock: Lock, restart: str, task: Task) -> tuple[store.State | None, str, str]:
    """(state, its file) to restart from, or (None, ""), and whose stale lock was found.

    The folder is locked first, and else touched only once the restart is known to be right.
    Raises LaunchError, InputError or CheckpointError.
    """
    stale = lock.acquire() if folder.path.is_dir() else ""
    if restart == "auto":
        source, state = folder.newest_state()
    elif restart == "never":
        source, state = "", None
    else:
        source, state = restart, store.load_checkpoint(restart)
    if state is not None:
        check_restart(state, source, task)
    folder.create()
    stale = stale or lock.acquire()
    if state is not None or restart == "never":
        own = bool(source) and Path(source).resolve().parent == folder.checkpoints.resolve()
        folder.set_aside(after_step=state.step if own else -1)  # the record of another run is not continued
    return state, source, stale


def begin(folder: RunFolder, trainer: Trainer, state: store.State | None, source: str, stale: str, ranks: list) -> None:
    """The first lines of the log, the resolved input, the launch manifest."""
    metrics.log_to(folder.path / "log.txt")
    log.info(f"restarting at step {state.step} from {source}" if state else f"starting afresh in {folder.path}")
    if state is not None and state.partial is not None:
        known = state.partial.done
        log.info("completing step %d: %d of %d differences are known", state.step + 1, known.sum(), len(known))
    if stale:
        log.info("took over the run folder from %s, which has ended", stale)
    index = trainer.task.engine.index
    log.info(
        "%s coordinates, %d steps an epoch, until step %d", f"{index.size:,}", trainer.task.steps_per_epoch, trainer.last_step
    )
    for line in devices.table(ranks):
        log.info(line)
    folder.write_input(trainer.config.to_toml())
    folder.write_manifest({
        "command": sys.argv, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "hosts": [{"rank": r, "host": h, "device": d, "uuid": u} for r, h, d, u in ranks], "state": "running",
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]},
        "resumed_from_step": state.step if state else None, "run_uuid": trainer.run_uuid,
    })  # fmt: skip


def end(folder: RunFolder, trainer: Trainer, reason: Reason) -> None:
    """What is left to do when all is saved: the manifest, the job script's question, the report; none of it can fail the run."""
    state = "stopped" if reason >= Reason.STOP_FILE else "finished"
    how = {"state": state, "reason": reason.text, "exit_code": reason.exit_code}
    folder.update_manifest(**how, step=trainer.step, seconds=trainer.seconds)
    if reason in (Reason.DEADLINE, Reason.WALLTIME) and not trainer.progressed:
        log.warning("no time for a single step before %s: give the job more, or lower run.deadline_margin", reason.text)
    else:
        tell_job_script(reason.name)
    if reason.exit_code:  # time is short, and the run goes on: drawing takes seconds
        return
    try:
        report.write([folder.path], folder.path / "report")
        log.info("results: %s", folder.path / "report" / "report.md")
    except DzhpcError as error:
        log.warning("no report: %s", error)


def git_commit() -> str | None:
    """The commit of the program, where it runs from a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    run_verb(parser(), main)
