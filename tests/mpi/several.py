"""Runs several command lines of dzhpc one after another in one MPI job: ``mpirun -n N python several.py JOB.json``.

The verbs' own ``run_verb`` is called as ``python -m dzhpc.VERB`` calls it. What is saved is the start of MPI and torch for each,
and the plot at the end of each run: only the verb ``report`` draws here.
Every rank leaves ``NAME.code.RANK``, ``NAME.out.RANK`` and ``NAME.err.RANK`` beside the job file.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from dzhpc.files import curves
from dzhpc.job.launch import run_verb
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.sol import figures

draw, draw_certified = curves.plot, certificates.plot
figures.draw = lambda *args: []


def run(case: dict, files: Path) -> None:
    """One command line; its output goes to files, at the level of file descriptors."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    name = lambda kind: files / f"{case['name']}.{kind}.{rank}"  # noqa: E731
    saved, path, environment, here = [os.dup(1), os.dup(2)], list(sys.path), dict(os.environ), os.getcwd()
    for number, kind in ((1, "out"), (2, "err")):
        with open(name(kind), "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(case["env"])
    sys.argv = [f"dzhpc.{case['verb']}", *case["args"]]
    drawing = case["verb"] == "report"
    curves.plot = draw if drawing else lambda runs, path: None
    certificates.plot = draw_certified if drawing else lambda records, path: None
    code: object = "no exit"
    try:
        verb = importlib.import_module(f"dzhpc.{case['verb']}")
        run_verb(verb.parser(), verb.main)
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        os.chdir(here)
    name("code").write_text(json.dumps(code))


if __name__ == "__main__":
    job = Path(sys.argv[1])
    for each in json.loads(job.read_text()):
        run(each, job.parent)
