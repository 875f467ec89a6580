"""A C++ source of ours as a shared library, compiled once for each compiler, set of flags, and state of the source."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

PATIENCE = 120  # seconds for the compiler, which needs five at most
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")


def shared_library(source: Path, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library; ranks that compile at once do not disturb each other. Raises OSError with the compiler's own words."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # slow to import, and not needed by all

    flags = (*FLAGS, *flags)
    key = hashlib.sha256(source.read_bytes() + " ".join([compiler, *flags]).encode()).hexdigest()[:16]
    home = Path(cache_dir()) / f"dzhpc-{source.stem}-{key}.so"
    if not home.exists():
        number, name = tempfile.mkstemp(suffix=".so", dir=home.parent)
        os.close(number)
        try:
            done = subprocess.run([compiler, *flags, str(source), "-o", name], capture_output=True, text=True, timeout=PATIENCE)
            if done.returncode:
                lines = done.stderr.splitlines()
                raise OSError(next((line for line in lines if "error" in line), lines[0] if lines else "no message"))
            os.replace(name, home)
        except subprocess.TimeoutExpired:
            raise OSError(f"{compiler} did not end within {PATIENCE} s") from None
        finally:
            Path(name).unlink(missing_ok=True)
    return ctypes.CDLL(str(home))
