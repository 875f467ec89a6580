"""Reference simulations on all ranks: one of them as a piece of work, what is kept of it, one file in the end."""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from dzhpc.config import Config
from dzhpc.config.paths import shown
from dzhpc.errors import InputError
from dzhpc.files import h5
from dzhpc.job.lock import Lock
from dzhpc.job.log import duration, say_first
from dzhpc.job.shared_work import share_out
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World
from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.reference import SPLITS
from dzhpc.tasks.sol.solvers import Simulation, Solver

log = logging.getLogger("dzhpc")
KIND = "dzhpc-simulation"


def save_part(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, object]) -> None:
    """Write a simulation, whole or as far as it has come: any arrays; ``about`` becomes attributes. Raises InputError."""

    def fill(file: h5.File) -> None:
        file.create_group("about").attrs.update(about)
        for name, array in arrays.items():
            file[name] = array

    h5.write(path, KIND, fill, InputError)


def load_part(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(arrays, about), as given to :func:`save_part`. Raises InputError."""
    with h5.opened(Path(path), KIND, InputError) as file:
        return {name: item[()] for name, item in file.items() if name != "about"}, h5.attributes(file["about"])


def _check_shapes(shapes: Mapping[float, tuple[int, ...]]) -> None:
    """Raise InputError for simulations (by parameter) of which one has other states than the first."""
    (first, shape), *others = shapes.items()
    for parameter, other in others:
        if other != shape:
            raise InputError(
                f"the reference gives states {list(shape[1:])} for parameter {first:g}, {list(other[1:])} for {parameter:g}; "
                "expected one shape for all: mend task.reference, and delete what is kept beside the output file"
            )


BITS = ("threads", "torch", "device")  # what the last bits may depend on beside the constants


def check(config: Config, out: Path) -> Config:
    """Raise InputError for what could not be simulated or written."""
    if config.task.kind != "sol":
        raise InputError(f'task.kind = "{config.task.kind}", expected "sol"')
    for key in ("train_parameters", "valid_parameters", "test_parameters"):
        values = getattr(config.task, key)
        if not values:
            raise InputError(f"task.{key} = []: expected at least one parameter")
        if not config.task.is_own and min(values) <= 0:
            raise InputError(f"task.{key} = {values}: expected numbers above 0, 1e4 / viscosity each")
    if not out.parent.is_dir():
        raise InputError(f"{shown(out)}: the folder {shown(out.parent)} does not exist")
    return config


class Simulations:
    """All simulations of an input; a piece of work (:class:`dzhpc.job.shared_work.Campaign`) is one of them, by its parameter.

    Each is its rank's own until it is done; ``FILE.parts/`` keeps it, so that a kill costs seconds, and bits depend neither on
    it nor on the number of ranks. A file STOP among the parts ends the job in good order.
    """

    def __init__(self, world: World, config: Config, solver: Solver, out: Path, quiet: bool):
        self.world, self._config, self._solver, self._out, self._quiet = world, config, solver, out, quiet
        self._parts = out.with_name(f"{out.name}.parts")
        self._lists = {split: getattr(config.task, f"{split}_parameters") for split in SPLITS}
        self._parameters = list(dict.fromkeys(p for split in SPLITS for p in self._lists[split]))
        self._total = config.task.warm_up + config.task.frames
        self._lock = Lock(out.parent, f"{out.name}.lock.json", "-o")
        self._about = {
            **solver.about, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }  # fmt: skip
        self._frames: dict[float, int] = {}  # parameter -> states made so far, on the root as far as it knows
        self._current: Simulation | None = None  # of this rank
        self._before, self._start = 0, time.monotonic()

    def run(self) -> Reason:
        """Make what is missing; why that ended, NONE when the file is whole. Collective."""
        requests = Requests(self._config, self._parts if self.world.is_root else None)
        return share_out(self.world, self, self._lock, requests, self._quiet)

    @property
    def progressed(self) -> bool:
        """Whether this launch has made a state. Collective."""
        return self.world.maximum(int(self._current is not None)) > 0

    def open(self) -> dict[float, int] | None:
        """States already made, by parameter; None if the file is whole. Raises InputError or LaunchError."""
        if self._out.exists():
            splits, about = reference.read(self._out)
            given = {f"{split}_parameters": parameters.tolist() for split, (_, parameters) in splits.items()}
            wanted = {f"{split}_parameters": values for split, values in self._lists.items()}
            self._compare(self._out, about | given, self._about | wanted)
            say_first("%s: nothing left to do", shown(self._out))
            return None
        if stale := self._lock.acquire():
            log.info("took over %s from %s, which has ended", shown(self._out), stale)
        try:
            self._parts.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{shown(self._parts)}: cannot be made ({error.strerror}); choose another file with -o") from None
        found = {}
        for p in filter(lambda p: self._path(p).exists(), self._parameters):
            _, about = load_part(self._path(p))
            self._compare(self._path(p), about, self._about)
            found[p] = int(about["made"])
        return found

    def pieces(self, known: dict[float, int]) -> list[float]:
        """The parameters whose simulations are not done."""
        self._frames, self.world.crash_folder = dict(known), self._parts
        self._before, self._start = sum(known.values()), time.monotonic()
        todo = [p for p in self._parameters if known.get(p, 0) < self._total]
        done = f", {len(self._parameters) - len(todo)} done already" if len(todo) < len(self._parameters) else ""
        say_first("%s: %d simulations, %d states each%s", shown(self._out), len(self._parameters), self._total, done)
        return todo

    def _compare(self, path: Path, old: Mapping[str, object], new: Mapping[str, object]) -> None:
        """Raise InputError for the first constant that differs."""
        for key, value in new.items():
            if old.get(key) != value and key not in BITS:
                raise InputError(
                    f"{shown(path)} was made with {key} = {old.get(key)!r}, now {value!r}; "
                    "choose another file with -o, or delete it"
                )
            if old.get(key) != value:
                log.warning("%s was %s, now %s: the last bits may differ from an undisturbed run", key, old.get(key), value)

    def _path(self, parameter: float) -> Path:
        return self._parts / f"{parameter!r}.h5"

    def _load(self, parameter: float) -> Simulation:
        """A simulation as it was left, or a new one."""
        if not self._path(parameter).exists():
            return Simulation(parameter)
        arrays, about = load_part(self._path(parameter))
        return Simulation(parameter, int(about["made"]), arrays["kept"], arrays["now"])

    def work(self, parameter: float) -> Iterator[None]:
        """Make a simulation; it may be left between two steps."""
        self._current = self._load(parameter)
        yield from self._solver.advance(self._current)

    def news(self, parameter: float) -> tuple[float, int]:
        """How many states there are."""
        return parameter, self._current.frames

    def keep(self, parameter: float) -> None:
        """Save this rank's simulation."""
        arrays = {"kept": self._current.kept, "now": self._current.now}
        about = {**self._about, "parameter": parameter, "made": self._current.frames}
        save_part(self._path(parameter), arrays, about)

    def receive(self, news: list[tuple[float, int]]) -> None:
        """Take note of what there is."""
        self._frames |= dict(news)

    def save(self) -> None:
        """Nothing: each rank keeps its own."""

    def close(self) -> bool:
        """Whether all are done; then they become one file, and the parts go."""
        log.info("%s", self.progress())
        if any(self._frames.get(p, 0) < self._total for p in self._parameters):
            return False
        kept = {p: self._load(p).kept for p in self._parameters}
        _check_shapes({p: states.shape for p, states in kept.items()})
        splits = {split: (np.stack([kept[p] for p in ps]), np.array(ps)) for split, ps in self._lists.items()}
        reference.save(self._out, splits, self._about)
        shutil.rmtree(self._parts, ignore_errors=True)
        log.info("written: %s", shown(self._out))
        return True

    def progress(self) -> str:
        """``simulations done 3/12, 4,120 of 18,000 states, 480/s, ETA 0:00:29``."""
        made, whole = sum(self._frames.values()), self._total * len(self._parameters)
        done = sum(frames == self._total for frames in self._frames.values())
        seconds = time.monotonic() - self._start
        rate = (made - self._before) / max(seconds, 1e-9)
        end = f"ETA {duration((whole - made) / rate)}" if rate and made < whole else duration(seconds)
        return f"simulations done {done}/{len(self._parameters)}, {made:,} of {whole:,} states, {rate:,.0f}/s, {end}"
