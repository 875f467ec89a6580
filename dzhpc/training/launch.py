"""One launch of a run: try out, open the run folder, begin or restart, train, leave."""

import contextlib
import datetime
import importlib.metadata
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dzhpc import config as configuration
from dzhpc import tasks
from dzhpc.config import Config
from dzhpc.config.names import looked_in
from dzhpc.config.paths import shown
from dzhpc.engines import selfcheck
from dzhpc.engines.full import Full
from dzhpc.engines.pinned import Pinned, seed
from dzhpc.errors import message_of
from dzhpc.files.checkpoint import State
from dzhpc.files.runfolder import RunFolder, load_state
from dzhpc.files.tensors import check_tensors
from dzhpc.job import device as devices
from dzhpc.job import process
from dzhpc.job.launch import Place, answer_job_script
from dzhpc.job.lock import Lock
from dzhpc.job.log import log_to, say_first
from dzhpc.job.sharing import read_once
from dzhpc.job.stopping import Reason
from dzhpc.job.world import World
from dzhpc.method.estimators import make_estimator
from dzhpc.method.seeds import derive
from dzhpc.tasks import Task
from dzhpc.tasks.agreement import check_losses, check_made, user_code
from dzhpc.tasks.sol.unrolled import Unrolled
from dzhpc.training import gauss_newton
from dzhpc.training.active_set import Pattern, read_lpr
from dzhpc.training.checks import check_restart
from dzhpc.training.compilation import compile_together
from dzhpc.training.trainer import Trainer

log = logging.getLogger("dzhpc")
Report = Callable[[Path], tuple[str, list[Path]]]
LIBRARIES = ("dzhpc", "torch", "numpy", "mpi4py", "h5py")


def restarts(path: Path, restart: str) -> bool:
    """Whether a launch goes on from a checkpoint, so that files which only a first start reads may be gone.

    path, restart: as :func:`run` has them.
    """
    return bool(RunFolder(path).checkpoint_files()) if restart == "auto" else restart != "never"


def task_of(world: World, config: Config, device: torch.device, restarts: bool) -> Task:
    """The task of an input, whose data the root has read. Collective.

    restarts: then model.weights and sparsity.lpr are left alone: the checkpoint has what they held. Raises InputError.
    """
    weights = config.model.weights
    data_set = read_once(world, lambda: tasks.read(config))
    with world.together():
        if restarts:
            config.model.weights = None
        task = tasks.make_task(config, device, data_set)
        task.config.model.weights = weights
    return task


def run(world: World, task: Task, path: Path, restart: str, ranks: list[Place] | None, report: Report, quiet: bool) -> Reason:
    """Start or restart in the run folder ``path`` and train; why it ended. Collective. Meanwhile the root holds its lock.

    restart: "auto", "never", a checkpoint or run folder. ranks: where they run, on the root. report: draws.
    """
    folder = RunFolder(path)
    lock = Lock(folder.path)
    try:
        state, source, stale = world.on_root(lambda: open_folder(folder, lock, restart, task))
        world.crash_folder = folder.path
        trainer = Trainer(world, task, folder, quiet)
        if state is not None:
            trainer.restore(state)
        world.on_root(lambda: log_to(folder.log))
        say_first(
            f"restarting at step {state.step} from {shown(source)}" if state else f"starting afresh in {shown(folder.path)}"
        )
        world.on_root(lambda: begin(folder, trainer, state, stale, ranks))
        world.on_failure = lambda message, code: folder.update_manifest(state="failed", reason=message, exit_code=code)
        if not trainer.budget.reason(trainer.state.step, trainer.state.partial is not None, math.nan):
            trainer.compile_s = compile_together(world, task, folder.path)
            with world.together():
                selfcheck.check_compiled(task.engine, task.config.run.seed)
        reason = trainer.run()
        if world.is_root:
            end(folder, trainer, reason, report)
        return reason
    finally:
        lock.release()


def try_out(world: World, task: Task, restarts: bool) -> None:
    """What cannot work is said before the run folder is made.

    Compares over the ranks what each has made, binds a batch, looks whether the engine is right about it, reads the LPR file of a
    first start, sees that a checkpoint can hold all tensors.

    Where the loss ends in user code it is bound twice, which tells noise: with other random numbers, since nothing but a network
    under engine ``full`` may draw any. Raises InputError. Buffers and random numbers are left as they were. Collective.
    """
    said = [*configuration.lines(configuration.idle(task.config)), *configuration.unmeant(task.config)]
    for line in said if world.is_root else ():
        log.info(line)
    check_made(world, task.made())
    losses, may_draw = [], isinstance(task.engine, (Full, Unrolled))
    with world.together():
        check_tensors({**dict(task.model.named_parameters()), **dict(task.model.named_buffers())})
        with Pinned(task.model, task.engine.index.device).unchanged():
            task.try_box()
        for k in range(2 if user_code(task.config) else 1):
            with Pinned(task.model, task.engine.index.device).unchanged():
                seed(derive(task.config.run.seed, "model", 0 if may_draw else k))
                losses.append(task.bind(0))
                if len(losses) == 1 and (said := selfcheck.check(task.engine, task.config.run.seed)):
                    log.info(said)
                if len(losses) == 1 and task.config.optim.name == "gauss-newton":
                    log.info(gauss_newton.check(task, Pattern(task, None).ahead(0)[1]))
                if len(losses) == 1:
                    make_estimator(task.config.zo, task.config.run.seed).check(task.engine)
        if not restarts and task.config.sparsity.lpr:
            read_lpr(task)
    check_losses(world, task.config, losses)


def open_folder(folder: RunFolder, lock: Lock, restart: str, task: Task) -> tuple[State | None, str, str]:
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
        source, state = load_state(restart)
    if state is not None:
        check_restart(state, source, task)
    if state is None:
        folder.check_foreign()
    folder.create()
    stale = stale or lock.acquire()
    if state is not None or restart == "never" or folder.metrics.exists():
        own = bool(source) and Path(source).resolve().parent == folder.checkpoints.resolve()
        folder.set_aside(after_step=state.step if own else -1)  # the record of another run is not continued
    return state, source, stale


def begin(folder: RunFolder, trainer: Trainer, state: State | None, stale: str, ranks: list) -> None:
    """What follows the first line of the log, the resolved input, the launch manifest."""
    if state is not None and state.partial is not None:
        known = state.partial.done
        log.info("completing step %d: %d of %d differences are known", state.step + 1, known.sum(), len(known))
    if stale:
        log.info("took over the run folder from %s, which has ended", stale)
    index = trainer.task.engine.index
    log.info(
        "%s coordinates, %d steps an epoch, until step %d",
        f"{index.size:,}",
        trainer.task.steps_per_epoch,
        trainer.budget.last_step,
    )
    if (bits := trainer.task.engine.environment)["compiled"] == "True":
        log.info("compiled (zo.compile = %s), kernels of our own: %s", trainer.config.zo.compile, bits["kernels"])
    for line in devices.table(ranks):
        log.info(line)
    folder.write_input(trainer.config.to_toml())
    folder.write_manifest({
        "command": sys.argv, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modules": looked_in(), "git_commit": git_commit(),
        "slurm_job_id": process.job_id(),
        "hosts": devices.grouped(ranks), "state": "running",
        "versions": versions() | {"python": sys.version.split()[0]},
        "resumed_from_step": state.step if state else None, "run_uuid": trainer.state.run_uuid,
    })  # fmt: skip


def end(folder: RunFolder, trainer: Trainer, reason: Reason, report: Report) -> None:
    """What is left to do when all is saved: the manifest, the job script's question, the report; none of it can fail the run."""
    state = "stopped" if reason >= Reason.STOP_FILE else "finished"
    how = {"state": state, "reason": reason.text, "exit_code": reason.exit_code}
    folder.update_manifest(**how, step=trainer.state.step, seconds=trainer.state.seconds)
    answer_job_script(reason, trainer.progressed, "step")
    if reason.exit_code:  # time is short, and the run goes on: drawing takes seconds
        return
    try:
        _, files = report(folder.path)
        log.info("results: %s", shown(files[0]))
    except Exception as error:  # a drawing library may raise anything; the run is done and saved
        log.warning("no report: %s", message_of(error))


def versions() -> dict[str, str]:
    """Of the libraries that bits may depend on; one may be missing, since one process needs no MPI."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """The commit of the program, where it runs from a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
