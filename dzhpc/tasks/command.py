"""A black box that is a program (``task.command``): a folder for each query, files from templates, an answer from a file."""

import contextlib
import json
import os
import queue
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dzhpc.config import import_object, is_function, paths
from dzhpc.config.names import product
from dzhpc.config.tasks import BlackBoxKeys
from dzhpc.errors import InputError, OutsideError, message_of
from dzhpc.files import h5
from dzhpc.job.program import Keeper, described, sweep
from dzhpc.job.worker import Worker
from dzhpc.method.arrays import to_tensor
from dzhpc.tasks.template import Files, Shape, Text

LONGEST = 3600.0  # seconds of a program without task.timeout
LITTLE = 2**16  # bytes free on a disk that is full
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # colours, and what moves a cursor
EXPONENT = re.compile(r"(?<=[0-9.])(?:[dD](?=[-+0-9])|(?=[-+]\d{3}$))")  # Fortran's 1.5D-3, and 1.5-105 where no letter fits in


def function_of(task: BlackBoxKeys, name: str, key: str, threads: int, makes: bool = False) -> Callable:
    """The user's function ``name``; with ``task.timeout`` in a process of its own. Raises InputError.

    makes: see :func:`dzhpc.config.names.product`.
    """
    if task.timeout is not None:
        return Worker(name, key, task.timeout, threads, makes)
    return (product if makes else import_object)(name, key)


@dataclass(frozen=True)
class Query:
    """What a program is asked: named arrays, the one of a .npy file, the shape of the answer, what fills an infeasible one."""

    values: Mapping[str, np.ndarray]
    array: np.ndarray
    shape: Shape
    infeasible: float = np.nan


class Malformed(ValueError):
    """An answer that is none."""


class Program:
    """``task.command`` as a function: a :class:`Query` -> its answer. Each call has a folder, and its processes end with it.

    shapes: of the named arrays, () of a number. needed: those of them that have to reach the program.
    An exit code of ``task.infeasible`` is answered by ``query.infeasible``.
    Raises InputError for keys, templates and programs that cannot be used.
    """

    def __init__(self, task: BlackBoxKeys, shapes: Mapping[str, Shape], needed: Sequence[str]):
        self.name = f"task.command = {task.command[0]}"
        self._task, self._base = task, paths.absolute(task.scratch, "task.scratch") if task.scratch else None
        if "folder" in shapes:
            raise InputError("task.initial: {folder} is the folder of the call; call the parameter by another name")
        known = {**shapes, "folder": ()}
        self._files = Files([task.template] if isinstance(task.template, str) else task.template or [], known)
        self._words = [Text(word, known, "task.command") for word in task.command]
        written = self._files.names.union(*(word.names for word in self._words))
        if missing := [name for name in needed if name not in written] if task.input is None else []:
            raise InputError(
                f"task.command: the program never learns {', '.join(missing)}: write {{{missing[0]}}} into task.template or "
                "task.command, or name a file in task.input"
            )
        self._program = None if self._words[0].names else _located(task.command[0])  # None: it lies in the folder
        self._infeasible = getattr(task, "infeasible", [])
        self._own = import_object(task.result, "task.result") if is_function(task.result) else None
        if self._base and not os.access(self._base, os.W_OK | os.X_OK):
            raise InputError(f"task.scratch = {task.scratch}: is no folder that may be written")
        self._keepers: queue.SimpleQueue[Keeper | None] = queue.SimpleQueue()
        for _ in range(task.concurrency):
            self._keepers.put(None)  # started when they are needed
        sweep(self._base)

    def made(self) -> dict[str, dict[str, torch.Tensor]]:
        """See :meth:`dzhpc.tasks.Task.made`: the templates."""
        tensors = {name: torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8) for name, raw in self._files.raw.items()}
        return {f"task.template = {self._task.template}": tensors} if tensors else {}

    @property
    def limit(self) -> int:
        """The most queries that are worth a call."""
        batched = getattr(self._task, "batched", False)
        return self._task.batch_limit if batched else min(self._task.batch_limit, self._task.concurrency)

    def arrays(self, name: str, arrays: np.ndarray, shape: Shape, **beside: np.ndarray) -> np.ndarray:
        """The answers [N, *shape] to arrays [N, ...] that are called ``name``; ``task.batched``: by one call.

        beside: further ones [N, ...], which a .npy file does not have.
        """
        named = {name: arrays, **beside}
        if self._task.batched:
            return self(Query(named, arrays, (len(arrays), *shape)))
        return self.many([Query({key: value[k] for key, value in named.items()}, arrays[k], shape) for k in range(len(arrays))])

    def many(self, queries: Sequence[Query]) -> np.ndarray:
        """The answers [n, ...], ``task.concurrency`` programs at a time. Raises OutsideError."""
        if len(queries) == 1 or self._task.concurrency == 1:
            return np.stack([self(query) for query in queries])
        with ThreadPoolExecutor(self._task.concurrency) as pool:
            return np.stack(list(pool.map(self, queries)))

    def __call__(self, query: Query) -> np.ndarray:
        """The answer in float64. Raises OutsideError, whose ``folder`` has the call's files until the next failure."""
        keeper = self._keepers.get() or Keeper(self._base)
        folder, failed = keeper.folder / "call", keeper.folder / "failed"
        try:
            folder.mkdir()
            return self._call(keeper, folder, query)
        except OutsideError as error:
            if folder.exists():
                shutil.rmtree(failed, ignore_errors=True)
                error.folder = folder.rename(failed)
            raise
        except OSError as error:
            raise OutsideError(f"its folder {folder} cannot be written ({error.strerror or error})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._keepers.put(keeper if keeper.close.alive else None)

    def _call(self, keeper: Keeper, folder: Path, query: Query) -> np.ndarray:
        values = {**query.values, "folder": str(folder)}
        self._files.write(folder, values)
        if self._task.input:
            _write(folder / self._task.input, query)
        words = [self._program or self._words[0].filled(values), *(word.filled(values) for word in self._words[1:])]
        try:
            code = keeper.run(words, folder, self._task.timeout or LONGEST)
        except OutsideError as error:
            raise OutsideError(f"{error}{_last_words(folder)}") from None
        if code in self._infeasible:
            return np.full(query.shape, query.infeasible)
        if code != 0:
            raise OutsideError(described(code) + _last_words(folder))
        try:
            return self._answer(folder, query.shape)
        except OSError as error:
            raise OutsideError(f"left no {self._task.result} ({error.strerror or error}){_last_words(folder)}") from None
        except Exception as error:  # malformed output, or the user's function
            said = str(error) if isinstance(error, Malformed) else message_of(error)
            raise OutsideError(f"{self._task.result}: {said}{_last_words(folder)}") from None

    def _answer(self, folder: Path, shape: Shape) -> np.ndarray:
        """What the program has left, as an array of the shape. Raises Malformed, OSError, or what the user's function does."""
        if self._own is not None:
            return _shaped(self._own(folder), shape)
        path, pattern, pointer = folder / self._task.result, self._task.pattern, self._task.pointer
        if path.exists() and not path.is_file():
            raise Malformed("is no regular file")  # to read a pipe would take for ever
        if path.suffix == ".npy":
            try:
                return _shaped(np.load(path, allow_pickle=False), shape)
            except (ValueError, EOFError) as error:
                raise Malformed(str(error)) from None
        text = path.read_text(encoding="utf-8-sig", errors="replace")  # Windows puts a mark first
        if pointer is not None or (path.suffix == ".json" and pattern is None):
            return _shaped(_pointed(text, pointer or ""), shape)
        found = re.findall(pattern, text, re.M) if pattern is not None else text.split()
        if not found:
            raise Malformed(f"nothing matches task.pattern = {pattern!r}" if pattern is not None else "is empty")
        numbers = np.array([_number(word) for word in (found[-1:] if pattern is not None and not shape else found)])
        return _shaped(numbers.reshape(shape) if numbers.size == np.prod(shape, dtype=int) else numbers, shape)


def _located(name: str) -> str:
    """A program's path: on the PATH, or meant from where this program was started. Raises InputError."""
    word = paths.expanded(name, f"task.command = {name}")
    found = shutil.which(str(paths.started() / word) if "/" in word else word)
    if found is None:
        raise InputError(f"task.command = {name}: there is no such program, or it may not be executed; is it on the PATH?")
    return found


def _write(path: Path, query: Query) -> None:
    """``task.input``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, query.array)
    elif path.suffix == ".json":
        path.write_text(json.dumps({name: value.tolist() for name, value in query.values.items()}), encoding="utf-8")
    else:
        h5.plain(path, query.values)


def _number(word: str) -> float:
    try:
        return float(EXPONENT.sub("e", word))
    except ValueError:
        raise Malformed(f"{word[:60]!r} is no number") from None


def _pointed(text: str, pointer: str) -> object:
    """What a JSON pointer (RFC 6901) names."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Malformed(f"is no JSON ({error})") from None
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key) if isinstance(found, list) and key.isdecimal() else key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise Malformed(f"has nothing at task.pointer = {pointer!r}") from None
    return found


def _shaped(found: object, shape: Shape) -> np.ndarray:
    try:
        tensor = to_tensor(found)
    except ValueError as error:
        raise Malformed(f"holds {error}; expected numbers") from None
    if not shape and tensor.numel() == 1:
        tensor = tensor.reshape(())
    if tuple(tensor.shape) != shape:
        raise Malformed(f"holds {list(tensor.shape)} numbers; expected {list(shape) if shape else 'one'}")
    return tensor.double().numpy()


def _last_words(folder: Path) -> str:
    """The last line that a program has said, without control characters."""
    for name in ("stderr.txt", "stdout.txt"):
        with contextlib.suppress(OSError), open(folder / name, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            text = CONTROL.sub(" ", file.read().decode(errors="replace"))
            if lines := [" ".join(line.split()) for line in text.splitlines() if line.strip()]:
                return f"; its last words: {lines[-1][:200]}"
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < LITTLE:
            return f"; it said nothing, and no space is left in {folder.parent.parent}"
    return "; it said nothing"
