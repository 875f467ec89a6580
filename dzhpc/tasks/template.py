"""The files and words that a program gets: fields such as {name} replaced by numbers."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dzhpc.config import paths
from dzhpc.errors import InputError

FIELD = re.compile(r"\{([A-Za-z_]\w*)(?:\[([\d, ]+)\])?(?::([^{}\n]*))?\}")  # {name}, {name[3]}, {name[0,2]}, {name:.6e}
ENCODING = ("utf-8", "surrogateescape")  # bytes of other encodings stay as they are
Shape = tuple[int, ...]


class Text:
    """A text with fields, cut up once. Braces that hold no known name, with or without an index and a format, stay as they are.

    shapes: of the arrays that fields may name. Raises InputError for an index or a format that does not fit.
    """

    def __init__(self, text: str, shapes: Mapping[str, Shape], source: str):
        self.names: set[str] = set()
        self._parts: list[str | tuple[str, tuple[int, ...], str]] = []
        position = 0
        for match in FIELD.finditer(text):
            name, index, form = match[1], tuple(int(k) for k in (match[2] or "").replace(" ", "").split(",") if k), match[3] or ""
            if name not in shapes:
                continue
            try:
                self._written(np.zeros(shapes[name]), index, form)
            except (IndexError, ValueError, TypeError) as error:
                raise InputError(f"{source}: {match[0]} does not fit {name} {list(shapes[name])} ({error})") from None
            self.names.add(name)
            self._parts += [text[position : match.start()], (name, index, form)]
            position = match.end()
        self._parts.append(text[position:])

    def filled(self, values: Mapping[str, np.ndarray | str]) -> str:
        """With numbers; an array is written as its entries with spaces between."""
        return "".join(p if isinstance(p, str) else self._written(values[p[0]], *p[1:]) for p in self._parts)

    @staticmethod
    def _written(array: np.ndarray | str, index: tuple[int, ...], form: str) -> str:
        if isinstance(array, str):
            return array
        entries = np.asarray(array[index] if index else array, np.float64).ravel().tolist()
        return " ".join(format(value, form) if form else repr(value) for value in entries)


class Files:
    """The files of ``task.template``, read once; each call gets its own."""

    def __init__(self, names: Sequence[str], shapes: Mapping[str, Shape]):
        self.raw: dict[str, bytes] = {}
        self._modes: dict[str, int] = {}
        self._folders: dict[str, str | None] = {}  # an empty one is needed, too; where a link leads, which stays a link
        for name in names:
            path = paths.absolute(name, f"task.template = {name}")
            if not path.exists():
                raise InputError(f"task.template = {name}: does not exist")
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                place = str(file.relative_to(path)) if path.is_dir() else file.name
                try:
                    if file.is_dir():
                        self._folders[place] = _link(file, path) if file.is_symlink() else None
                        continue
                    if file.exists() and not file.is_file():
                        continue  # a pipe or a socket
                    self.raw[place], self._modes[place] = file.read_bytes(), file.stat().st_mode & 0o777 | 0o600
                except OSError as error:
                    raise InputError(f"task.template = {name}: {file} cannot be read ({error.strerror})") from None
        self._texts = {place: text for place, raw in self.raw.items() if (text := self._text(place, raw, shapes)) and text.names}
        self.names = set().union(*(text.names for text in self._texts.values()))

    @staticmethod
    def _text(place: str, raw: bytes, shapes: Mapping[str, Shape]) -> Text | None:
        """A file in any encoding that has ASCII in it; None for a binary one, which has zero bytes."""
        return None if b"\0" in raw else Text(raw.decode(*ENCODING), shapes, f"task.template: {place}")

    def write(self, folder: Path, values: Mapping[str, np.ndarray | str]) -> None:
        """Put them into a folder."""
        for place, target in self._folders.items():  # sorted: a folder comes before what lies in it
            (folder / place).symlink_to(target) if target else (folder / place).mkdir(exist_ok=True)
        for place, raw in self.raw.items():
            path = folder / place
            path.write_bytes(self._texts[place].filled(values).encode(*ENCODING) if place in self._texts else raw)
            path.chmod(self._modes[place])


def _link(file: Path, root: Path) -> str:
    """Where a link has to lead in a copy of the folder ``root``: into the copy, or out of it to where it led."""
    target = file.resolve()
    return os.path.relpath(target, file.parent.resolve()) if target.is_relative_to(root.resolve()) else str(target)
