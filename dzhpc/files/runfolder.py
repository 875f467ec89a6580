"""The run folder: what lies where, which checkpoint to restart from, launch manifests. Used by the root only."""

import contextlib
import json
import logging
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import h5, owned

if TYPE_CHECKING:  # checkpoints need torch, and a report needs none
    from dzhpc.files.checkpoint import State

log = logging.getLogger("dzhpc")
REPORT = "![loss and accuracy]("  # by which a report of ours is known


STALE = re.compile(r"(step-\d+\.h5|metrics\.h5|lock\.json|\d+\.json|input[-\w]*\.toml)\.\d+\.tmp")  # what a killed writer leaves
TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # how each line of the log begins


class RunFolder:
    """``runs/NAME/{input.toml, log.txt, metrics.h5, checkpoints/, launches/, report/}``.

    It may be a folder of the user's own: ``input.toml`` and ``log.txt`` get other names where such a file is there already.
    """

    def __init__(self, path: str | Path):
        self.path = paths.started() / path
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.h5"

    def create(self) -> None:
        """Make the folders and see that they can be written. Raises InputError."""
        try:
            for folder in (self.checkpoints, self.path / "launches"):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            for folder in (self.path, self.checkpoints, self.path / "launches"):
                for stale in filter(lambda path: STALE.fullmatch(path.name), folder.glob("*.tmp")):
                    stale.unlink()
        except OSError as error:
            raise InputError(
                f"{paths.shown(self.path)}: the run folder cannot be written ({error.strerror}); choose another with --run-dir"
            ) from None
        except UnicodeEncodeError as error:  # Python takes such a locale by its word
            raise InputError(
                f"{str(self.path)!a}: the locale is {error.encoding}, which cannot write this name; export LC_ALL=C.UTF-8"
            ) from None

    @property
    def input(self) -> Path:
        """Where the resolved input lies, or may be written."""
        return owned.places(self.path, ["input.toml"], _is_resolved)[0]

    @property
    def log(self) -> Path:
        """Where the log lies, or may begin."""
        return owned.places(self.path, ["log.txt"], _is_log)[0]

    def check_foreign(self) -> None:
        """Raise InputError where a start from nothing would write over a metrics.h5 that is none of ours."""
        if self.metrics.exists() and not (self.metrics.is_file() and h5.is_ours(self.metrics)):
            raise InputError(
                f"{paths.shown(self.metrics)}: was not written by dzhpc and would be lost; move it, or choose another --run-dir"
            )

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.h5"

    def checkpoint_files(self) -> list[Path]:
        """All checkpoints, newest first. Raises InputError for a folder that cannot be looked into."""
        try:
            found = [p for p in self.checkpoints.glob("step-*.h5") if re.fullmatch(r"step-\d+\.h5", p.name)]
        except OSError as error:
            raise InputError(f"{paths.shown(self.path)}: cannot be a run folder ({error.strerror}); choose another") from None
        return sorted(found, key=lambda p: int(p.stem.split("-")[1]), reverse=True)

    def newest_state(self) -> tuple[str, "State | None"]:
        """(file, state) of the newest valid checkpoint, ("", None) where there is none; damaged ones are skipped with a warning.

        Raises CheckpointError where there are checkpoints but none can be read: starting afresh would bury them.
        """
        from dzhpc.files.checkpoint import load_checkpoint

        files = self.checkpoint_files()
        for path in files:
            try:
                return str(path), load_checkpoint(path)
            except CheckpointError as error:
                log.warning("skipped: %s", error)
        if files:
            raise CheckpointError(
                f"{paths.shown(self.checkpoints)}: none of {len(files)} checkpoints can be read; "
                "to start afresh use --restart never"
            )
        return "", None

    def save(self, state: "State", keep: int) -> Path:
        """Write a checkpoint, then drop the oldest beyond ``keep``."""
        from dzhpc.files.checkpoint import save_checkpoint

        path = self.checkpoint_path(state.step)
        save_checkpoint(path, state)
        for old in self.checkpoint_files()[keep:]:
            old.unlink()
        return path

    def set_aside(self, after_step: int = -1) -> None:
        """Move what a run starting at ``after_step`` must not find into ``previous-NNN/``.

        These are newer checkpoints (damaged, or abandoned by --restart FILE); for a run that starts afresh (-1), everything.
        """
        old = [p for p in self.checkpoint_files() if int(p.stem.split("-")[1]) > after_step]
        if after_step < 0:
            old += [path for path in (self.input, self.log, self.metrics) if path.exists()]
            reports = (self.path / "report").glob("report*.md")
            old += [self.path / "report"] if any(owned.holds(path, REPORT) for path in reports) else []
        if not old:
            return
        number = _next_number(self.path.glob("previous-*"))
        target = self.path / f"previous-{number:03d}"
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        log.info("moved %d files of an earlier run to %s", len(old), paths.shown(target))

    def write_input(self, toml: str) -> None:
        """The resolved input. Raises CheckpointError if it cannot be written."""
        _write(self.input, toml)

    def write_manifest(self, manifest: dict) -> None:
        """``launches/001.json``, ...: one a launch. Raises CheckpointError if it cannot be written."""
        number = _next_number((self.path / "launches").glob("*.json"))
        _write(self.path / "launches" / f"{number:03d}.json", json.dumps(manifest, indent=2) + "\n")

    def manifests(self) -> list[tuple[Path, dict]]:
        """(file, content) of every launch, oldest first; a damaged one is left out."""
        found = []
        for path in sorted((self.path / "launches").glob("*.json"), key=lambda p: _next_number([p])):
            with contextlib.suppress(OSError, ValueError):
                found.append((path, json.loads(path.read_text(encoding="utf-8"))))
        return [(path, content) for path, content in found if isinstance(content, dict)]

    def modules(self) -> list[Path]:
        """The folders in which the newest launch looked for the user's modules, as far as they are still there."""
        found = self.manifests()[-1:]
        listed = found[0][1].get("modules") if found else None
        return (
            [Path(each) for each in listed if isinstance(each, str) and Path(each).is_dir()] if isinstance(listed, list) else []
        )

    def update_manifest(self, **news: object) -> None:
        """Write down how the newest launch fares; this is for information, so a full disk is no error here."""
        for path, manifest in self.manifests()[-1:]:
            with contextlib.suppress(CheckpointError):
                _write(path, json.dumps(manifest | news, indent=2) + "\n")


def modules_beside(source: Path) -> list[Path]:
    """Where the user's modules of an input file lie, or those of a run folder or of a checkpoint in one."""
    if source.suffix == ".toml":
        return [source.parent]
    return RunFolder(source if source.is_dir() else source.resolve().parent.parent).modules()


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises CheckpointError."""
    path = h5.replaceable(path, CheckpointError)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as failure:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(h5.unwritten(path, failure)) from None


def _is_resolved(path: Path) -> bool:
    """Whether a file is an input as :meth:`RunFolder.write_input` writes it: complete, and without a word of the user's."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        table = tomllib.loads(text)
    except (OSError, ValueError):
        return False
    return set(configuration.Config.model_fields) <= set(table) and tomli_w.dumps(table) == text


def _is_log(path: Path) -> bool:
    """Whether a file is empty, or begins as the log does."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline(100)
    except OSError:
        return False
    return not first or TIME.match(first) is not None


def _next_number(paths: Iterable[Path]) -> int:
    """One more than the largest number at the end of the names."""
    return 1 + max((int(m[0]) for p in paths if (m := re.search(r"\d+$", p.stem))), default=0)


def load_state(path: str | Path) -> tuple[str, "State"]:
    """(file, state) of a checkpoint, or of the newest valid one in a run folder. Raises CheckpointError."""
    from dzhpc.files.checkpoint import load_checkpoint

    path = paths.started() / path
    if not path.is_dir():
        return str(path), load_checkpoint(path)
    file, state = RunFolder(path).newest_state()
    if state is None:
        raise CheckpointError(f"{paths.shown(path)}: holds no checkpoint; give a run folder or a checkpoint (step-*.h5)")
    return file, state
