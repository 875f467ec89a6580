"""How every verb starts: what started this process, the command line, the log, signals, the machines of all ranks."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dzhpc.config import Run, look_in, paths
from dzhpc.errors import DzhpcError, LaunchError
from dzhpc.job import process
from dzhpc.job.failure import say_error
from dzhpc.job.log import close_streams, let_go, log, open_streams, set_up_log
from dzhpc.job.stopping import Reason, ignore_warnings, listen, tell_job_script
from dzhpc.job.world import World

if TYPE_CHECKING:
    import torch

DEFERENCE = 10.0  # seconds that ranks which cannot talk leave to the first one, which may start later, to speak
Loaded = TypeVar("Loaded")
Place = tuple[int, str, str, str]


def run_verb(parser: argparse.ArgumentParser, main: Callable[[World, argparse.Namespace], int], parallel: bool = True) -> None:
    """Run a verb on every rank and leave with its exit code; no rank is left waiting for one that failed.

    parallel: False for a verb that several processes may well run each by itself; it is never refused.
    """
    open_streams()
    try:
        paths.start_here()
        world = World()
        if parallel and not {"-h", "--help"} & set(sys.argv[1:]):
            check_launch(world.size)
    except DzhpcError as error:
        if process.launch_rank():  # the ranks cannot talk: the first one speaks, and its launcher then ends the others
            time.sleep(DEFERENCE)
        say_error(str(error))
        sys.exit(error.exit_code)
    try:
        parsed = world.bcast(_parse(parser) if world.is_root else None)  # argparse speaks once, not once a rank
        code = parsed if isinstance(parsed, int) else main(world, parsed)
    except BaseException as error:  # user code may raise what is no Exception
        let_go()
        code = world.fail(error)
    let_go()
    close_streams()
    ignore_warnings()
    sys.exit(code)


def _parse(parser: argparse.ArgumentParser) -> argparse.Namespace | int:
    try:
        return parser.parse_args()
    except SystemExit as leave:
        return int(leave.code or 0)


def check_launch(size: int) -> None:
    """Raise LaunchError if a launcher started several processes, each of which believes to be alone.

    They would all write one run folder. Plain ``srun`` does so without a PMI that this MPI speaks, and so does the launcher of
    another MPI than mpi4py was built for.
    """
    variable, tasks = process.tasks_started()
    if size > 1:
        return
    if tasks <= 1 and (said := process.unsized_rank()):
        raise LaunchError(
            f"{said[0]} = {said[1]}, but MPI sees 1 rank: mpi4py was built against another MPI than the one whose launcher "
            f"started this; build it again (INSTALL.md, cluster with its own MPI), or start with the mpirun of mpi4py's MPI"
        )
    if tasks <= 1:
        return
    if variable == process.STEP_SIZE:
        raise LaunchError(
            f"{variable} = {tasks}, but MPI sees 1 rank: srun and this MPI do not know each other; "
            f"start with `mpirun -n {tasks} python -m dzhpc...` or `srun --mpi=pmix`"
        )
    raise LaunchError(
        f"{variable} = {tasks}, but MPI sees 1 rank: mpi4py was built against another MPI than the one whose launcher started "
        f"this; build it again (INSTALL.md, cluster with its own MPI), or start with the mpirun of mpi4py's MPI"
    )


def start(
    world: World,
    load: Callable[[], Loaded],
    *inputs: str | Path | None,
    quiet: bool = False,
    stops: bool = True,
    until_first: bool = False,
) -> Loaded:
    """The common start of a parallel verb: signals, the log, the user's modules, and what the root reads. Collective.

    load: on the root, what all ranks get. inputs: input files or run folders. stops: whether the verb ends in good order when a
    signal asks it to; else a signal kills it. until_first: lines of the log wait for the one that says how the work began.
    """
    if stops:
        listen()
    set_up_log(world.is_root, quiet, until_first)
    add_user_modules(*inputs)
    loaded = world.on_root(load)
    if world.is_root:  # after a collective: all ranks listen
        if stops:
            tell_job_script("LISTENING")
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if tasks.isdecimal() and int(tasks) > 1 and not process.launched():
            log.warning("SLURM_NTASKS = %s, but this is one process; start with mpirun to use them all", tasks)
    return loaded


def add_user_modules(*sources: str | Path | None) -> None:
    """The user's own modules may lie beside the input files, the first one first; no longer beside those of an earlier call."""
    if folders := [Path(source).parent for source in sources if source and Path(source).suffix == ".toml"]:
        look_in(*folders)


def survey(world: World, device: "torch.device", run: Run, engine: Mapping[str, str] | None = None) -> list[Place] | None:
    """(rank, host, device, uuid) of all ranks, on the root. Collective.

    engine: ``engine.environment``, where the verb has one. Raises LaunchError where ranks share a GPU, or would compute other
    bits than the root, unless ``run`` allows it.
    """
    from dzhpc.job import device as devices  # needs torch, which verbs without a device do without

    place = (world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device))
    ranks = world.gather((place, devices.environment(device, engine or {})))

    def check() -> None:
        devices.check_binding([place for place, _ in ranks], run.share_gpu)
        devices.check_environments([(place[1], bits) for place, bits in ranks], run.mixed_nodes)

    world.on_root(check)
    return [place for place, _ in ranks] if ranks else None


def answer_job_script(reason: Reason, progressed: bool, unit: str) -> None:
    """Tell the job script, on the root, why the verb ended; not so where the same command would stop there for ever."""
    if reason in (Reason.DEADLINE, Reason.WALLTIME) and not progressed:
        log.warning("no time for a single %s before %s: give the job more, or lower run.deadline_margin", unit, reason.text)
    else:
        tell_job_script(reason.name)


def stopped(world: World, reason: Reason, progressed: bool, unit: str) -> int:
    """Say why a verb stopped whose work goes on where it was left, if it did stop; its exit code."""
    if reason and world.is_root:
        answer_job_script(reason, progressed, unit)
        log.info("stopped: %s; the same command goes on", reason.text)
    return reason.exit_code
