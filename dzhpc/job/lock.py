"""The lock of a run folder: two jobs that write the same checkpoints would lose both runs."""

import json
import os
import subprocess
import time
from pathlib import Path

from dzhpc.config.paths import shown
from dzhpc.errors import InputError, LaunchError
from dzhpc.job import process

KNOWN_BUT_IDLE = ("", "PENDING")  # what squeue says of a job that is over, or requeued and not running


class Lock:
    """``lock.json`` in a run folder, or another ``file`` for what can be worked on by itself: who is at work there.

    A lock is stale, and taken over, if its process has ended (same host) or Slurm no longer runs its job (any host). The lock
    of another host without Slurm cannot be judged from here: the user deletes the file.
    """

    def __init__(self, folder: Path, file: str = "lock.json", option: str = "--run-dir"):
        self.path, self._option = folder / file, option  # the option of the command line by which the user chooses the folder
        self._held_by = 0  # the process that took it: one that user code has forked must not give it back

    def acquire(self) -> str:
        """Take the lock; whose stale lock was taken over, else "". Raises LaunchError if another job holds it."""
        stale = ""
        while not self._held_by:
            try:
                self._create()
            except FileExistsError:
                found = read(self.path)
                copied = found is not None and is_copy(found, self.path)
                if found is not None and not copied and not is_stale(found):
                    raise LaunchError(
                        f"{shown(self.path.parent)}: in use by {name(found)}; wait for it, or choose another folder with "
                        f"{self._option}. If that job is dead, delete {shown(self.path)}"
                    ) from None
                stale = name(found) if found and not copied else stale
                self._remove(found)
            except OSError as error:
                raise InputError(
                    f"{shown(self.path.parent)}: the run folder cannot be written ({error.strerror}); "
                    f"choose another with {self._option}"
                ) from None
        return stale

    def release(self) -> None:
        """Give the folder free, if this process holds it."""
        if self._held_by == os.getpid():
            self._held_by = 0
            self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        with open(self.path, "x") as file:
            self._held_by = os.getpid()
            try:
                file.write(json.dumps(process.identity() | {"folder": os.path.realpath(self.path.parent)}))
                file.flush()
            except OSError:
                self.release()
                raise

    def _remove(self, judged: dict | None) -> None:
        """Remove a stale lock, unless somebody else was faster: what was moved must be what was judged."""
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if read(aside) != judged and not self.path.exists():
            aside.rename(self.path)
        else:
            aside.unlink()


def read(path: Path) -> dict | None:
    """The owner that a lock names, or None if there is no lock; one without content (a machine that crashed) is nobody's.

    Raises LaunchError for what cannot be read, or is no lock of ours.
    """
    for _ in range(20):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LaunchError(
                f"{shown(path)}: cannot be read as a lock ({error.strerror}); remove it if nobody is at work"
            ) from None
        except ValueError:
            time.sleep(0.05)  # being written just now
            continue
        if isinstance(found, dict) and set(process.identity()) <= set(found) and str(found["pid"]).isdecimal():
            return found
        raise LaunchError(f"{shown(path)}: is no lock that dzhpc wrote; remove it if nobody is at work there")
    return None


def holder(folder: Path) -> dict | None:
    """Who is at work in a run folder, or None."""
    try:
        found = read(folder / "lock.json")
    except LaunchError:
        return None
    at_work = found is not None and not is_stale(found) and not is_copy(found, folder / "lock.json")
    return found if at_work else None


def name(owner: dict) -> str:
    """``process 4711 on host node7 (Slurm job 12)``."""
    job = f" (Slurm job {owner['job_id']})" if owner.get("job_id") else ""
    return f"process {owner['pid']} on host {owner['host']}{job}"


def is_stale(owner: dict) -> bool:
    """Whether the owner of a lock is known to have ended."""
    gone, job = process.is_gone(owner), owner.get("job_id")
    if gone is not None:
        return gone
    if job is None:
        return False
    if job == process.job_id():  # requeued to another node: a job runs once at a time
        return owner["restart_count"] != os.environ.get("SLURM_RESTART_COUNT", "0")
    return not _runs(job)


def is_copy(owner: dict, path: Path) -> bool:
    """Whether the folder was copied while somebody was at work in the original, whose lock is still there.

    By the number of the file alone: one file system may be mounted twice.
    """
    try:
        original = Path(owner["folder"]) / path.name
        return original.stat().st_ino != path.stat().st_ino and read(original) == owner
    except (OSError, KeyError, TypeError, ValueError, LaunchError):
        return False


def _runs(job: str) -> bool:
    """Whether Slurm runs a job; True where Slurm cannot be asked."""
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if done.returncode != 0:
        return "Invalid job id" not in done.stderr
    return done.stdout.strip() not in KNOWN_BUT_IDLE
