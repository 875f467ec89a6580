"""Runs command lines of dzhpc in one process, as ``python -m dzhpc.VERB ARGS`` would: ``python runner.py JOB.json``.

What is saved is the start of MPI and torch for each; nothing is drawn. Beside the job file every rank leaves NAME.RANK.json,
the exit code and what was said.
"""

import contextlib
import io
import json
import os
import runpy
import sys
from pathlib import Path

from matplotlib.figure import Figure


def run(verb: str, args: list[str]) -> tuple[object, str]:
    """The exit code and all output of a command line."""
    said, path = io.StringIO(), list(sys.path)
    sys.argv = [f"dzhpc.{verb}", *args]
    code: object = "no exit"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(f"dzhpc.{verb}", run_name="__main__")
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.path[:] = path
    return code, said.getvalue()


if __name__ == "__main__":
    Figure.savefig = lambda *args, **options: None
    job = Path(sys.argv[1])
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    for name, verb, args in json.loads(job.read_text()):
        code, said = run(verb, args)
        (job.parent / f"{name}.{rank}.json").write_text(json.dumps([code, said]))
