"""``metrics.h5``: what a run was like, a row a training step and a row an evaluation."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dzhpc.config.paths import shown
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import h5

KIND = "dzhpc-metrics"
TRAIN_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "queries", "step_s", "comm_s", "peak_bytes")
EVAL_COLUMNS = ("step", "epoch", "loss", "accuracy")
INTEGERS = ("step", "queries", "peak_bytes")
log = logging.getLogger("dzhpc")


class Metrics:
    """The rows of ``metrics.h5``: ``train`` (a row a step) and ``eval``. Kept in memory, written whole by :meth:`flush`.

    run: the ``run_uuid`` of the run whose record it is, "" where that is not known.
    """

    def __init__(self, path: Path, run: str = ""):
        self.path, self.run = path, run
        self.train = np.zeros((0, len(TRAIN_COLUMNS)))
        self.eval = np.zeros((0, len(EVAL_COLUMNS)))
        self._new_train: list[tuple] = []
        self._new_eval: list[tuple] = []

    def restore(self, step: int, keep_eval: Callable[[float], bool]) -> bool:
        """Read the file and drop rows after ``step``, and evaluations that an undisturbed run would not have made.

        Whether there is an evaluation of ``step``, kept or not.
        """
        try:
            self.train, self.eval = load_metrics(self.path, self.run)
        except InputError as error:
            kept = self._set_aside("foreign" if isinstance(error, OtherRun) else "damaged")
            log.warning("the record of steps before %d is lost: %s%s", step, error, f"; kept as {kept}" if kept else "")
            return False
        evaluated = bool((self.eval[:, 0] == step).any())
        self.train = self.train[self.train[:, 0] <= step]
        self.eval = self.eval[[row[0] <= step and keep_eval(row[0]) for row in self.eval]]
        return evaluated

    def _set_aside(self, kind: str) -> str:
        """Move what is no record of this run out of the way of the new one; its name then, "" where there was nothing."""
        aside = self.path.with_name(f"metrics-{kind}.h5")
        with contextlib.suppress(OSError):
            self.path.replace(aside)
            return shown(aside)
        return ""

    def add_train(self, *row: float) -> None:
        self._new_train.append(row)

    def add_eval(self, *row: float) -> None:
        self._new_eval.append(row)

    def flush(self) -> None:
        """Write all rows so far."""
        self.train = np.vstack([self.train, np.array(self._new_train).reshape(-1, len(TRAIN_COLUMNS))])
        self.eval = np.vstack([self.eval, np.array(self._new_eval).reshape(-1, len(EVAL_COLUMNS))])
        self._new_train, self._new_eval = [], []

        def fill(file: h5.File) -> None:
            file.attrs["run_uuid"] = self.run
            for table, columns, rows in (("train", TRAIN_COLUMNS, self.train), ("eval", EVAL_COLUMNS, self.eval)):
                group = file.create_group(table)
                for k, name in enumerate(columns):
                    kind = np.int64 if name in INTEGERS else np.float64
                    group.create_dataset(name, data=rows[:, k].astype(kind), maxshape=(None,), chunks=(max(1, len(rows)),))
                group.attrs["rows"] = len(rows)

        h5.write(self.path, KIND, fill, CheckpointError)


class OtherRun(InputError):
    """A record is that of another run."""


def load_metrics(path: str | Path, run: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(train [rows, 9], eval [rows, 4]) in the order of TRAIN_COLUMNS and EVAL_COLUMNS. Raises InputError.

    run: whose record it has to be, where that is known; earlier versions did not write that down.
    """
    with h5.opened(Path(path), KIND, InputError) as file:
        if run and (found := str(file.attrs.get("run_uuid", ""))) and found != run:
            raise OtherRun(f"{shown(path)}: is the record of another run")

        def rows(table: str, columns: tuple[str, ...]) -> np.ndarray:
            n = int(file[table].attrs["rows"])
            return np.stack([file[table][name][:n].astype(np.float64) for name in columns], axis=1)

        return rows("train", TRAIN_COLUMNS), rows("eval", EVAL_COLUMNS)


def load_columns(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(train, eval): name of a column -> [rows]. Raises InputError."""
    train, evaluation = load_metrics(path)
    return dict(zip(TRAIN_COLUMNS, train.T, strict=True)), dict(zip(EVAL_COLUMNS, evaluation.T, strict=True))
