"""The run folder: what lies where, which checkpoint to restart from, launch manifests. Used by the root only."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.checkpoint import State, load_checkpoint, save_checkpoint

log = logging.getLogger("dzhpc")


class RunFolder:
    """``runs/NAME/{input.toml, log.txt, metrics.h5, checkpoints/, launches/, report/}``."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
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
            for stale in self.path.rglob("*.tmp"):
                stale.unlink()
        except OSError as error:
            raise InputError(
                f"{self.path}: the run folder cannot be written ({error.strerror}); choose another with --run-dir"
            ) from None

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.h5"

    def checkpoint_files(self) -> list[Path]:
        """All checkpoints, newest first."""
        found = [p for p in self.checkpoints.glob("step-*.h5") if re.fullmatch(r"step-\d+\.h5", p.name)]
        return sorted(found, key=lambda p: int(p.stem.split("-")[1]), reverse=True)

    def newest_state(self) -> tuple[str, State | None]:
        """(file, state) of the newest valid checkpoint, ("", None) where there is none; damaged ones are skipped with a warning.

        Raises CheckpointError where there are checkpoints but none can be read: starting afresh would bury them.
        """
        files = self.checkpoint_files()
        for path in files:
            try:
                return str(path), load_checkpoint(path)
            except CheckpointError as error:
                log.warning("skipped: %s", error)
        if files:
            raise CheckpointError(
                f"{self.checkpoints}: none of {len(files)} checkpoints can be read; to start afresh use --restart never"
            )
        return "", None

    def save(self, state: State, keep: int) -> Path:
        """Write a checkpoint, then drop the oldest beyond ``keep``."""
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
            names = ("metrics.h5", "input.toml", "log.txt", "report")
            old += [self.path / name for name in names if (self.path / name).exists()]
        if not old:
            return
        number = _next_number(self.path.glob("previous-*"))
        target = self.path / f"previous-{number:03d}"
        target.mkdir()
        for path in old:
            path.rename(target / path.name)
        log.info("moved %d files of an earlier run to %s", len(old), target)

    def write_input(self, toml: str) -> None:
        """The resolved input. Raises CheckpointError if it cannot be written."""
        _write(self.path / "input.toml", toml)

    def write_manifest(self, manifest: dict) -> None:
        """``launches/001.json``, ...: one a launch. Raises CheckpointError if it cannot be written."""
        number = _next_number((self.path / "launches").glob("*.json"))
        _write(self.path / "launches" / f"{number:03d}.json", json.dumps(manifest, indent=2) + "\n")

    def manifests(self) -> list[tuple[Path, dict]]:
        """(file, content) of every launch, oldest first; a damaged one is left out."""
        found = []
        for path in sorted((self.path / "launches").glob("*.json"), key=lambda p: _next_number([p])):
            with contextlib.suppress(OSError, ValueError):
                found.append((path, json.loads(path.read_text())))
        return found

    def update_manifest(self, **news: object) -> None:
        """Write down how the newest launch fares; this is for information, so a full disk is no error here."""
        for path, manifest in self.manifests()[-1:]:
            with contextlib.suppress(CheckpointError):
                _write(path, json.dumps(manifest | news, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises CheckpointError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as failure:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({failure.strerror}); free space, or choose another folder") from None


def _next_number(paths: Iterable[Path]) -> int:
    """One more than the largest number at the end of the names."""
    return 1 + max((int(m[0]) for p in paths if (m := re.search(r"\d+$", p.stem))), default=0)


def load_state(path: str | Path) -> tuple[str, State]:
    """(file, state) of a checkpoint, or of the newest valid one in a run folder. Raises CheckpointError."""
    if not Path(path).is_dir():
        return str(path), load_checkpoint(path)
    file, state = RunFolder(path).newest_state()
    if state is None:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run folder or a checkpoint (step-*.h5)")
    return file, state
