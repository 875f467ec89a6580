"""Files of ours in a folder that is the user's: what somebody else has written there is never written over."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path


def places(folder: Path, names: Sequence[str], ours: Callable[[Path], bool]) -> list[Path]:
    """Where files that belong together may be written: under their names, unless a foreign file has one of them.

    Then ``-dzhpc`` is put before each ending, and a number behind it where that is taken, too. ours: whether the first of them,
    which exists, was written by this program, and the others with it.
    """
    for k in itertools.count():
        suffix = ("", "-dzhpc")[k] if k < 2 else f"-dzhpc-{k}"
        found = [folder / f"{Path(name).stem}{suffix}{Path(name).suffix}" for name in names]
        if ours(found[0]) if found[0].exists() else not any(path.exists() for path in found):
            return found


def holds(path: Path, mark: str) -> bool:
    """Whether a file is text in which ``mark`` stands."""
    try:
        return path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
