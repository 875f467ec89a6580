"""Which checkpoint of a run, and how well it does: rollouts over the valid, then over the test simulations.

Ranks share them by ``split`` (:meth:`dzhpc.job.world.World.split`). Every rollout is of one simulation by itself, so its bits
depend neither on the others nor on the number of ranks.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from dzhpc import config as configuration
from dzhpc.config import Config
from dzhpc.config.paths import shown
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.checkpoint import State, config_of, load_checkpoint
from dzhpc.files.runfolder import RunFolder, modules_beside
from dzhpc.models import zoo
from dzhpc.models.weights import assign
from dzhpc.tasks.agreement import user_code
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.correction import Correction
from dzhpc.tasks.sol.reference import Trajectories
from dzhpc.tasks.sol.rollout import Rollout, rollout
from dzhpc.tasks.sol.simulators import make_simulator, try_simulator

log = logging.getLogger("dzhpc")
SHARED = ("data.name", "task.simulator", "task.command", "task.resolution", "task.radius")  # reference, coarse solver
Split = Callable[[int, Callable[[range], np.ndarray]], np.ndarray]


@dataclasses.dataclass
class Run:
    """A run's checkpoints, oldest first: (file, state). An input file has none; it says what is simulated.

    scores: see :func:`choose`, one a checkpoint. chosen: the number of the best.
    """

    name: str
    config: Config
    checkpoints: list[tuple[str, State]]
    scores: list[float] = dataclasses.field(default_factory=list)
    chosen: int = -1

    @property
    def state(self) -> State:
        """Of the checkpoint that was chosen."""
        return self.checkpoints[self.chosen][1]


def read(source: str | Path) -> Run:
    """A run folder with all its checkpoints, a single checkpoint, or an input file. Raises InputError or CheckpointError."""
    path = Path(source)
    if path.suffix == ".toml":
        return Run(path.stem, _checked(configuration.load(path), path), [])
    if not path.is_dir():
        state = load_checkpoint(path)
        whole = path.resolve()
        return Run(f"{whole.parent.parent.name}-{whole.stem}", _config_of(state, path), [(str(path), _light(state))])
    found = []
    for file in reversed(RunFolder(path).checkpoint_files()):
        try:
            found.append((str(file), _light(load_checkpoint(file))))
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    if not found:
        raise CheckpointError(
            f"{shown(path)}: holds no checkpoint; give run folders or checkpoints (step-*.h5), or an input file for SRC"
        )
    return Run(path.resolve().name, _config_of(found[-1][1], path), found)


def _light(state: State) -> State:
    """What inference needs: all ranks get it from the root."""
    return dataclasses.replace(state, optimizer={}, lpr=None, partial=None)


def _config_of(state: State, source: Path) -> Config:
    config = config_of(state, str(source))
    config.model.weights = None
    return _checked(config, source)


def _checked(config: Config, source: Path) -> Config:
    if config.task.kind != "sol":
        raise InputError(f'{shown(source)}: task.kind = "{config.task.kind}", expected "sol"')
    return config


def read_all(sources: Sequence[str | Path], data_root: str | Path | None = None) -> list[Run]:
    """All runs; input files only where there is no run. ``data_root`` replaces the data.root of each.

    Raises InputError where reference or coarse solver differ.
    """
    found = [read(source) for source in sources]
    for run in found:
        _check_modules(run.config, modules_of(sources))
    runs = [run for run in found if run.checkpoints] or found
    for run in runs:
        run.config.data.root = str(data_root) if data_root else run.config.data.root
        for key in SHARED:
            old, new = _value(runs[0].config, key), _value(run.config, key)
            if old != new:
                raise InputError(f"{key} is {new!r} in {run.name}, {old!r} in {runs[0].name}: a table is of one experiment")
    return runs


def modules_of(sources: Sequence[str | Path]) -> list[Path]:
    """Where the user's modules lie: beside input files, and where the runs have found them."""
    return list(dict.fromkeys(folder for source in sources for folder in modules_beside(Path(source))))


def _check_modules(config: Config, folders: list[Path]) -> None:
    """Raise InputError where two folders hold different modules of a name that ``config`` uses."""
    for name in user_code(config).values():
        file = f"{name.split(':')[0].replace('.', '/')}.py"
        paths = [folder / file for folder in folders if (folder / file).is_file()]
        if len({path.read_bytes() for path in paths}) > 1:
            raise InputError(f"{paths[0]} and {paths[1]} are two modules of one name: a table is of one experiment")


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


class Experiment:
    """Reference and coarse solver. Raises InputError where there is no reference file, or where they do not fit each other.

    So it does for a solver of the user's whose answers depend on what else is in a call: it was trained with others beside it.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.reference = config, reference.find(config.data).to(device)
        self.simulator = make_simulator(config.task, self.reference, device)
        train = self.reference.train
        simulations, frames = train.states.shape[:2]
        some = [divmod(k * simulations * frames // 8, frames) for k in range(8)]
        states, which = torch.stack([train.states[s, f] for s, f in some]), [s for s, _ in some]
        try_simulator(self.simulator, config.task, states, train.parameters[which])
        self._where, self._device = self.reference.where(), device
        self._networks: dict[int, tuple[torch.nn.Module, Correction]] = {}

    @property
    def frames(self) -> int:
        """Of a trajectory, the first one included."""
        return self.reference.test.states.shape[1]

    def roll(self, split: str, number: int, run: Run | None, checkpoint: int, steps: int, keep: Collection[int] = ()) -> Rollout:
        """One simulation, corrected by a checkpoint's network; without a run not at all."""
        whole: Trajectories = getattr(self.reference, split)
        one = Trajectories(whole.states[number : number + 1], whole.parameters[number : number + 1])
        correction = self._correction(run, checkpoint) if run else None
        return rollout(self.simulator, correction, one, self._where, steps, keep)

    def _correction(self, run: Run, checkpoint: int) -> Correction:
        if id(run) not in self._networks:  # runs of two folders may share a name
            model = zoo.build(run.config.model, run.config.run.seed).to(self._device).eval()
            self._networks[id(run)] = model, Correction(model, self.reference)
        model, correction = self._networks[id(run)]
        state = run.checkpoints[checkpoint][1]
        assign(model, state.params, state.buffers)
        return correction


def choose(experiment: Experiment, runs: list[Run], steps: int, split: Split) -> None:
    """Choose each run's checkpoint: the lowest mean of :meth:`Rollout.capped` over the *valid* simulations. Collective."""
    simulations = range(len(experiment.reference.valid.parameters))
    todo = [(run, k, s) for run in runs for k in range(len(run.checkpoints)) for s in simulations]

    def scores(mine: range) -> np.ndarray:
        return np.array(
            [float(experiment.roll("valid", s, run, k, steps).capped(steps)) for run, k, s in (todo[m] for m in mine)]
        )

    found = split(len(todo), scores)
    for run in runs:
        own = [value for value, (of, _, _) in zip(found.tolist(), todo, strict=True) if of is run]
        run.scores = np.array(own).reshape(-1, len(simulations)).mean(1).tolist()
        run.chosen = int(np.argmin(run.scores))


def measure(experiment: Experiment, runs: list[Run | None], steps: int, split: Split) -> list[Rollout]:
    """The rollout of all *test* simulations, for each run with the network that was chosen; None: no correction. Collective."""
    count = len(experiment.reference.test.parameters)
    todo = [(run, s) for run in runs for s in range(count)]

    def rows(mine: range) -> np.ndarray:
        """Bound and errors [1 + steps] each."""
        done = [experiment.roll("test", s, run, run.chosen if run else 0, steps) for run, s in (todo[m] for m in mine)]
        return np.array([torch.cat([one.bounds, one.errors[0]]).numpy() for one in done]).reshape(-1, 1 + steps)

    found = torch.from_numpy(split(len(todo), rows)).view(len(runs), count, 1 + steps)
    return [Rollout(one[:, 1:], one[:, 0]) for one in found]
