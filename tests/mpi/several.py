"""Runs command lines of dzhpc one after another in one MPI job: ``mpirun -n N python several.py FOLDER PROCESS``.

Batches come as FOLDER/0.json, FOLDER/1.json, ... (see mpi_launch.py), until FOLDER/end is there or PROCESS, the tests, has ended.
The verbs' own ``run_verb`` is called as ``python -m dzhpc.VERB`` calls it. What is saved is the start of MPI and torch for each,
and the plot at the end of each run: only where the verb ``report`` or DRAW in a case's environment asks for it there is one.
SAVE_EVERY there says after how many seconds simulate and certify write down what a kill would cost.
What a process keeps is taken back after each case: a user's modules and kernels, the environment, signals that came.
Of every case each rank leaves ``NAME.code.RANK``, ``NAME.out.RANK`` and ``NAME.err.RANK`` in the batch's folder.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from dzhpc.engines.kernels.find import PROVIDERS
from dzhpc.files import curves
from dzhpc.job import shared_work, stopping
from dzhpc.job.launch import run_verb
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.sol import figures

DRAWN = [(module, name, getattr(module, name)) for module, name in ((curves, "plot"), (certificates, "plot"), (figures, "draw"))]
SHIPPED = {kind: list(providers) for kind, providers in PROVIDERS.items()}
SAVE_EVERY, SEND_EVERY = shared_work.SAVE_EVERY, shared_work.SEND_EVERY


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
    drawing = case["verb"] == "report" or "DRAW" in case["env"]
    for module, function, draw in DRAWN:
        setattr(module, function, draw if drawing else lambda *args: [])
    shared_work.SAVE_EVERY = float(case["env"].get("SAVE_EVERY", SAVE_EVERY))
    shared_work.SEND_EVERY = min(SEND_EVERY, shared_work.SAVE_EVERY)
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
        forget(Path.cwd())
        PROVIDERS.update({kind: list(providers) for kind, providers in SHIPPED.items()})
        stopping.received_signals.clear()
    name("part").write_text(json.dumps(code))
    name("part").rename(name("code"))


def forget(folder: Path) -> None:
    """Modules that lie in a folder are not imported: in the next one others have their names."""
    for key, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{folder}/"):
            del sys.modules[key]
    importlib.invalidate_caches()


def end_with(process: str) -> None:
    """End this rank when the tests have ended, wherever it waits; mpirun then ends the others."""
    while Path("/proc", process).exists():
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def batches(folder: Path):
    """What there is to do, while there may be more."""
    number = 0
    while not (folder / "end").exists():
        if (folder / f"{number}.json").exists():
            yield json.loads((folder / f"{number}.json").read_text())
            number += 1
        time.sleep(0.02)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=sys.argv[2:], daemon=True).start()
    for batch in batches(Path(sys.argv[1])):
        os.chdir(batch["cwd"])
        for each in batch["cases"]:
            run(each, Path(batch["files"]))
