"""The commands, files and Python blocks of the documentation run, in one folder and one process, the tutorials first.

What is long is cut short by the keys of SHORT; what cannot be run at all is listed in tests/pages.py.

The inputs of ResNet-20 run with a small network on the digits. Ranks are the subject of other tests: here there is one.
"""

import contextlib
import io
import logging
import os
import subprocess

import pages
import pytest
from mpi_launch import Case, batch

FIRST = ("docs/tutorials/classification.md", "docs/tutorials/defense.md", "docs/tutorials/solver.md")
SMALL = "zo.engine=reuse sparsity.q=2 data.batch_size=32 data.train_limit=320 eval.batch_size=360"
SHORT = {  # input -> keys; engine delta would trace its passes, a second or more for each network
    "inputs/digits.toml": f"{SMALL} sparsity.ratio=0.95",
    "inputs/resnet20.toml": f"{SMALL} sparsity.ratio=0.95 data.name=digits model.name=cnn",
    "inputs/defense-small.toml": "data.batch_size=8 data.train_limit=80 data.test_limit=40",
    "inputs/sol-small.toml": "task.resolution=8 task.warm_up=2 task.frames=20 task.unroll=2 task.train_parameters=[160000.0] "
    "task.valid_parameters=[900000.0] task.test_parameters=[240000.0]",
    "stripes.toml": "zo.engine=reuse",
    "examples/burgers/burgers.toml": "data.batch_size=2 task.unroll=2",
}
STEPS = "3"  # of a run, unless its command says how many: then they are 2
FILLED_IN = {"runs/*/certify/*.h5": "runs/defense-small/certify/defense-small.h5"}  # there is no shell
SHORTER = {"certify": "--images 2 --n 8", "evaluate": "--steps 4 --no-gif"}


def cut(verb, args):
    """The command's arguments, and what makes it short."""
    keys = SHORT.get(args[0] if args else "", "").split()
    if verb == "train" and "--dry-run" not in args:
        keys.append(f"stop.steps={2 if any(arg.startswith('stop.steps=') for arg in args) else STEPS}")
    args = [FILLED_IN.get(arg, arg) for arg in args]
    return [*args, *SHORTER.get(verb, "").split(), *(word for key in keys for word in ("--set", key))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, project):
    """The folder in which all commands of all pages have run, and what became of those of our verbs."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("inputs", "examples", "slurm"):
        (folder / name).symlink_to(project / name)
    for block in pages.blocks(project):
        if block.title:
            (folder / block.title).write_text(block.text)
    (folder / "data").mkdir()
    order = sorted(pages.blocks(project, "bash"), key=lambda block: block.page not in FIRST and 1 + ("recipes" not in block.page))
    words = dict.fromkeys(tuple(w) for block in order for w in pages.commands(block) if not pages.why_not(w))
    ours = dict.fromkeys((verb, tuple(args)) for verb, args in map(pages.verb, filter(pages.verb, words)))
    cases = [Case(named(k, verb, args), verb, cut(verb, args), {"DZHPC_DATA": "data"}) for k, (verb, args) in enumerate(ours)]
    results = batch(1, folder, cases)
    for w in words:
        if not pages.verb(w):
            done = subprocess.run(w, cwd=folder, capture_output=True, text=True, timeout=60)
            results[" ".join(w)] = done
    return folder, results


def named(k, verb, args):
    """A name for a case, and for files."""
    return f"{k} {verb} {' '.join(args)[:60].replace('/', '.')}"


def test_commands_run(place):
    _, results = place
    failed = [f"{name}: {r.code}\n{r.err[-800:]}" for name, r in results.items() if hasattr(r, "code") and r.code != 0]
    failed += [f"{name}: {r.stderr}" for name, r in results.items() if hasattr(r, "returncode") and r.returncode != 0]
    assert not failed, "\n".join(failed)
    assert len(results) > 40


def test_python_blocks_run(place, project, monkeypatch):
    monkeypatch.chdir(place[0])
    monkeypatch.setattr(logging.getLogger("dzhpc"), "handlers", [])  # those of a verb that ran before in this process
    said, spaces = {}, {}
    for block in pages.blocks(project, "python"):
        if not block.title:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block.text, block.page, "exec"), spaces.setdefault(block.page, {"__name__": "page"}))
            said[block.page] = said.get(block.page, "") + out.getvalue()
    assert 0.999 < float(said["docs/recipes/gradient.md"].removeprefix("cosine: ")) < 1.0001
    assert said["docs/recipes/ask-and-tell.md"].startswith("100 1100 ")
    assert os.path.exists("state.h5") and said["docs/recipes/report.md"]
