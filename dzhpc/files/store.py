"""HDF5 files: checkpoints, LPR files, metrics, packed data, certificates, trajectories. The only module that imports h5py.

Every file is written under a temporary name, flushed to the disk and renamed, so that a reader never sees half a file. It
starts with a 512-byte user block that holds a SHA-256 of the rest; the sum is verified before HDF5 parses a byte.
"""

import contextlib
import datetime
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dzhpc.errors import CheckpointError, DzhpcError, InputError
from dzhpc.method.estimators import Partial
from dzhpc.method.scores import LPR

VERSION = 1
BLOCK = 512
MAGIC = b"dzhpc sha256 "
log = logging.getLogger("dzhpc")
TRAIN_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "queries", "step_s", "comm_s", "peak_bytes")
EVAL_COLUMNS = ("step", "epoch", "loss", "accuracy")
INTEGERS = ("step", "queries", "peak_bytes")


@dataclass
class State:
    """All that a run is, after a step: what a checkpoint holds."""

    config: str  # TOML
    history: list[str]  # the configs of earlier launches
    step: int
    epoch: float
    queries: int
    wall_time_s: float
    run_uuid: str
    model_sha256: str
    seed: int
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]  # slot -> parameter name -> tensor
    coordinates: np.ndarray  # S, sorted
    lpr: LPR | None
    env: dict[str, str] = field(default_factory=dict)  # for information
    partial: Partial | None = None  # of the next step, if it was left unfinished; S is then that step's


def tensors_sha256(tensors: Mapping[str, Tensor], content: bool = False) -> str:
    """SHA-256 over names, shapes and dtypes, and over the bytes if ``content``."""
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(f"{name}:{tuple(t.shape)}:{t.dtype};".encode())
        if content:
            digest.update(_array(t).tobytes())
    return digest.hexdigest()


def model_sha256(model: torch.nn.Module) -> str:
    """The identity of an architecture: names, shapes and dtypes of parameters and buffers."""
    return tensors_sha256({**dict(model.named_parameters()), **dict(model.named_buffers())})


def save_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint atomically. Raises CheckpointError if it cannot be written; then the old file, if any, is whole."""

    def fill(file: h5py.File) -> None:
        file["config"] = state.config
        for k, text in enumerate(state.history, 1):
            file[f"config-history/{k}"] = text
        attrs = file.create_group("state").attrs
        for name in ("step", "epoch", "queries", "wall_time_s", "run_uuid", "model_sha256", "seed"):
            attrs[name] = getattr(state, name)
        _put(file.create_group("params"), state.params)
        _put(file.create_group("buffers"), state.buffers)
        optimizer = file.create_group("optimizer")
        for slot, tensors in state.optimizer.items():
            _put(optimizer.create_group(slot), tensors)
        file["coordinates/S"] = state.coordinates.astype(np.int64)
        if state.lpr is not None:
            _put_lpr(file.create_group("lpr"), state.lpr)
        file.create_group("env").attrs.update(state.env)
        if state.partial is not None:
            file["partial/values"], file["partial/done"] = state.partial.values, state.partial.done

    write(path, "dzhpc-checkpoint", fill, CheckpointError)


def load_checkpoint(path: str | Path) -> State:
    """Read a checkpoint (tensors on the CPU). Raises CheckpointError if it is missing, damaged, or of another format."""
    with opened(Path(path), "dzhpc-checkpoint", CheckpointError) as file:
        attrs = file["state"].attrs
        history = file.get("config-history", {})
        return State(
            config=file["config"].asstr()[()],
            history=[history[k].asstr()[()] for k in sorted(history, key=int)],
            **{name: int(attrs[name]) for name in ("step", "queries", "seed")},
            **{name: float(attrs[name]) for name in ("epoch", "wall_time_s")},
            **{name: str(attrs[name]) for name in ("run_uuid", "model_sha256")},
            params=_get(file["params"]),
            buffers=_get(file["buffers"]),
            optimizer={slot: _get(group) for slot, group in file["optimizer"].items()},
            coordinates=file["coordinates/S"][()],
            lpr=_get_lpr(file["lpr"]) if "lpr" in file else None,
            env={k: str(v) for k, v in file["env"].attrs.items()},
            partial=Partial(file["partial/values"][()], file["partial/done"][()]) if "partial" in file else None,
        )


def save_lpr(path: Path, lpr: LPR, index_names: Mapping[str, Tensor] | None = None) -> None:
    """Write an LPR file; ``index_names`` (parameter name -> its scores) adds ``/scores``."""

    def fill(file: h5py.File) -> None:
        _put_lpr(file, lpr)
        _put(file.create_group("scores"), index_names or {})

    write(path, "dzhpc-lpr", fill, InputError)


def load_lpr(path: str | Path) -> tuple[LPR, dict[str, Tensor]]:
    """(ratios, scores by parameter name). Raises InputError if the file is missing, damaged, or no LPR file."""
    with opened(Path(path), "dzhpc-lpr", InputError) as file:
        return _get_lpr(file), _get(file["scores"])


def save_packed(path: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], mean, std, classes: list[str]) -> None:
    """Write a data set: for each split images uint8 [N, H, W, C] and labels [N]."""

    def fill(file: h5py.File) -> None:
        file.attrs.update(mean=np.asarray(mean, float), std=np.asarray(std, float), classes=classes)
        for split, (images, labels) in splits.items():
            file[f"{split}/images"], file[f"{split}/labels"] = images, np.asarray(labels, np.int64)

    write(path, "dzhpc-data", fill, InputError)


def load_packed(path: str | Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray, list[str]]:
    """(splits, mean, std, classes), as given to :func:`save_packed`. Raises InputError."""
    with opened(Path(path), "dzhpc-data", InputError) as file:
        splits = {s: (file[f"{s}/images"][()], file[f"{s}/labels"][()]) for s in ("train", "test")}
        return splits, file.attrs["mean"], file.attrs["std"], [str(c) for c in file.attrs["classes"]]


def save_reference(path: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], about: Mapping[str, object]) -> None:
    """Write trajectories: for train, valid and test states [S, F, ...] and parameters [S]; ``about`` becomes attributes."""

    def fill(file: h5py.File) -> None:
        file.create_group("about").attrs.update(about)
        for split, (states, parameters) in splits.items():
            file[f"{split}/states"] = np.asarray(states, np.float32)
            file[f"{split}/parameters"] = np.asarray(parameters, np.float64)

    write(path, "dzhpc-reference", fill, InputError)


def load_reference(path: str | Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, object]]:
    """(splits, about), as given to :func:`save_reference`. Raises InputError."""
    with opened(Path(path), "dzhpc-reference", InputError) as file:
        splits = {s: (file[f"{s}/states"][()], file[f"{s}/parameters"][()]) for s in ("train", "valid", "test")}
        return splits, about_of(file)


def save_simulation(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, object]) -> None:
    """Write a simulation, whole or as far as it has come: any arrays; ``about`` becomes attributes."""

    def fill(file: h5py.File) -> None:
        file.create_group("about").attrs.update(about)
        for name, array in arrays.items():
            file[name] = array

    write(path, "dzhpc-simulation", fill, InputError)


def load_simulation(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(arrays, about), as given to :func:`save_simulation`. Raises InputError."""
    with opened(Path(path), "dzhpc-simulation", InputError) as file:
        return {name: item[()] for name, item in file.items() if name != "about"}, about_of(file)


class Metrics:
    """The rows of ``metrics.h5``: ``train`` (a row a step) and ``eval``. Kept in memory, written whole by :meth:`flush`."""

    def __init__(self, path: Path):
        self.path = path
        self.train = np.zeros((0, len(TRAIN_COLUMNS)))
        self.eval = np.zeros((0, len(EVAL_COLUMNS)))
        self._new_train: list[tuple] = []
        self._new_eval: list[tuple] = []

    def restore(self, step: int, keep_eval: Callable[[float], bool]) -> bool:
        """Read the file and drop rows after ``step``, and evaluations that an undisturbed run would not have made.

        Whether there is an evaluation of ``step``, kept or not.
        """
        try:
            self.train, self.eval = load_metrics(self.path)
        except InputError as error:
            log.warning("the record of steps before %d is lost: %s", step, error)
            return False
        evaluated = bool((self.eval[:, 0] == step).any())
        self.train = self.train[self.train[:, 0] <= step]
        self.eval = self.eval[[row[0] <= step and keep_eval(row[0]) for row in self.eval]]
        return evaluated

    def add_train(self, *row: float) -> None:
        self._new_train.append(row)

    def add_eval(self, *row: float) -> None:
        self._new_eval.append(row)

    def flush(self) -> None:
        """Write all rows so far."""
        self.train = np.vstack([self.train, np.array(self._new_train).reshape(-1, len(TRAIN_COLUMNS))])
        self.eval = np.vstack([self.eval, np.array(self._new_eval).reshape(-1, len(EVAL_COLUMNS))])
        self._new_train, self._new_eval = [], []

        def fill(file: h5py.File) -> None:
            for table, columns, rows in (("train", TRAIN_COLUMNS, self.train), ("eval", EVAL_COLUMNS, self.eval)):
                group = file.create_group(table)
                for k, name in enumerate(columns):
                    kind = np.int64 if name in INTEGERS else np.float64
                    group.create_dataset(name, data=rows[:, k].astype(kind), maxshape=(None,), chunks=(max(1, len(rows)),))
                group.attrs["rows"] = len(rows)

        write(self.path, "dzhpc-metrics", fill, CheckpointError)


def load_metrics(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(train [rows, 9], eval [rows, 4]) in the order of TRAIN_COLUMNS and EVAL_COLUMNS. Raises InputError."""
    with opened(Path(path), "dzhpc-metrics", InputError) as file:

        def rows(table: str, columns: tuple[str, ...]) -> np.ndarray:
            n = int(file[table].attrs["rows"])
            return np.stack([file[table][name][:n].astype(np.float64) for name in columns], axis=1)

        return rows("train", TRAIN_COLUMNS), rows("eval", EVAL_COLUMNS)


def about_of(file: h5py.File) -> dict[str, object]:
    """The attributes of the group ``about``."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in file["about"].attrs.items()}


def describe(path: str | Path) -> str:
    """What a file of ours holds, as text. Raises InputError for anything else."""
    lines = []
    with opened(Path(path), None, InputError) as file:
        lines += [f"{k} = {v}" for k, v in file.attrs.items()]

        def show(name: str, item) -> None:
            what = f"{item.dtype} {list(item.shape)}" if isinstance(item, h5py.Dataset) else ""
            lines.append("  ".join(part for part in (f"/{name}", what, *(f"{k}={v}" for k, v in item.attrs.items())) if part))

        file.visititems(show)
    return "\n".join(lines)


def is_ours(path: str | Path) -> bool:
    """Whether the file begins like one of ours."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().contiguous().numpy()


def _put(group: h5py.Group, tensors: Mapping[str, Tensor]) -> None:
    for name, t in tensors.items():
        group.create_dataset(name, data=_array(t))
    group.attrs["order"] = list(tensors)


def _get(group: h5py.Group) -> dict[str, Tensor]:
    return {str(name): torch.from_numpy(np.asarray(group[str(name)][()])) for name in group.attrs["order"]}


def _put_lpr(group: h5py.Group, lpr: LPR) -> None:
    group["layer"] = lpr.layers
    group["size"], group["kept"], group["ratio"] = lpr.sizes, lpr.kept, lpr.ratios
    group.attrs.update(lpr.attrs, model_sha256=lpr.model_sha256)


def _get_lpr(group: h5py.Group) -> LPR:
    own = ("model_sha256", "format", "format_version", "creator", "created", "complete")
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in group.attrs.items() if k not in own}
    layers = [str(name) for name in group["layer"].asstr()[()]]
    return LPR(layers, group["size"][()], group["kept"][()], str(group.attrs["model_sha256"]), attrs)


def write(path: Path, kind: str, fill: Callable[[h5py.File], None], error: type[DzhpcError]) -> None:
    """Write a file of a kind: ``fill`` puts the content into it. Raises ``error``; then the old file, if any, is whole."""
    image = io.BytesIO()  # HDF5 leaves a disk that is full with a broken file and noise; plain bytes fail cleanly
    with h5py.File(image, "w", userblock_size=BLOCK) as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.attrs.update(format=kind, format_version=VERSION, creator="dzhpc", created=now)
        fill(file)
        file.attrs["complete"] = True
    content = image.getbuffer()[BLOCK:]
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write((MAGIC + hashlib.sha256(content).hexdigest().encode()).ljust(BLOCK, b"\0"))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as failure:
        raise error(f"{path}: cannot be written ({failure.strerror or failure}); free space, or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(BLOCK)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def opened(path: Path, kind: str | None, error: type[DzhpcError]) -> Iterator[h5py.File]:
    """Open a file of ours after its checksum was verified."""
    try:
        with open(path, "rb") as file:
            block = file.read(BLOCK)
        if not block.startswith(MAGIC):
            raise error(f"{path}: not a file written by dzhpc, or its beginning is damaged")
        if _digest(path).encode() != block[len(MAGIC) : len(MAGIC) + 64]:
            raise error(f"{path}: damaged (its SHA-256 does not match): cut short or altered after it was written")
        file = h5py.File(path, "r", locking=False)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure})") from None
    with file:
        found, version = str(file.attrs["format"]), int(file.attrs["format_version"])
        if kind is not None and found != kind:
            raise error(f"{path}: holds {found}, expected {kind}")
        if version > VERSION:
            raise error(f"{path}: format version {version}, this program reads up to {VERSION}; update dzhpc")
        yield file
