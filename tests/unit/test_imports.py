"""The rules of import: nothing starts by itself, MPI and HDF5 have one door each, and imports run downwards."""

import ast
import json
import subprocess
import sys
from collections import defaultdict

import pytest

# what a room may import beside itself; the verbs, and the package itself, may import all
ROOMS = {
    "errors": "",
    "config": "errors",
    "method": "config errors",
    "job": "config errors",
    "files": "job method config errors",
    "data": "files method config errors",
    "models": "files method config errors",
    "engines": "job method errors",
    "tasks": "engines models data files job method config errors",
    "training": "tasks engines models data files job method config errors",
}
ONLY = {"mpi4py": {"job.world"}, "h5py": {"files.h5"}, "phi": {"tasks.sol.phiflow"}}


# Imports a tree of modules in forks: each where one of those that it needs was imported, and nothing else of ours.
ALONE = """
import importlib, json, os, sys
tree, needed = json.load(sys.stdin)

def loaded():
    return {name for name in sys.modules if name.split(".")[0] == "dzhpc"}

def visit(name):
    try:
        if name:
            importlib.import_module(name)
            more = loaded() ^ set(needed[name])
            print(*([name, "expected or found beside it:", *more] if more else ["ok"]), flush=True)
        *others, last = tree.get(name, [None])
    except BaseException as error:
        print(name, repr(error), flush=True)
        return
    for child in others:
        if os.fork() == 0:
            visit(child)
            os._exit(0)
        os.wait()
    if last:
        visit(last)

for name in needed:
    importlib.import_module(name)
for name in loaded():
    del sys.modules[name]  # other libraries stay
visit("")
"""


@pytest.fixture(scope="module")
def imports(project):
    """module -> all that it imports, at the top and inside functions; our own without the package's name."""
    root = project / "dzhpc"
    names = {
        path: ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in root.rglob("*.py")
    }
    names[root / "__init__.py"] = ""
    own = {f"dzhpc.{name}" for name in names.values()}
    found = {}
    for path, name in names.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {t if t in own else node.module for t in full}
        found[name] = {t.removeprefix("dzhpc.") if t in own else t for t in targets}
    return found


def test_imports_run_downwards_from_room_to_room(imports):
    room = lambda name: name.split(".")[0]  # noqa: E731
    rooms = {room(name) for name in imports} - {""}
    verbs = {name for name in rooms if name not in ROOMS}
    assert verbs - {"optim"} == {"train", "prune", "certify", "simulate", "evaluate", "fetch", "report", "bench", "info", "new"}
    wrong = [
        (a, b) for a, targets in imports.items() for b in targets
        if b in imports and room(a) in ROOMS and room(b) not in {room(a), *ROOMS[room(a)].split()}
    ]  # fmt: skip
    assert wrong == []
    assert [a for a, targets in imports.items() if "dzhpc" in targets and a] == []  # the package itself is for users


def test_no_module_imports_itself_in_a_circle(imports):
    waiting = {name: {b for b in targets if b in imports and b != name} for name, targets in imports.items()}
    while ready := [name for name, targets in waiting.items() if not targets & set(waiting)]:
        for name in ready:
            del waiting[name]
    assert waiting == {}


def test_tasks_do_not_import_each_other(imports):
    kind = lambda name: name.split(".")[1] if name.count(".") else ""  # noqa: E731
    tasks, common = (
        {name for name in imports if name.split(".")[0] == "tasks"},
        {"", "protocol", "fitting", "agreement", "command", "template"},
    )
    assert {kind(name) for name in tasks} == {"classification", "objective", "defense", "sol", *common}
    assert [(a, b) for a in tasks for b in imports[a] & tasks if kind(b) not in {kind(a), *common}] == []


def test_every_module_can_be_imported_alone(project):
    """With what it needs, and no more: that is known from its first lines, and each fork sees whether it is true."""
    files = {path: path.relative_to(project).with_suffix("").parts for path in (project / "dzhpc").rglob("*.py")}
    names = {path: ".".join(parts).removesuffix(".__init__") for path, parts in files.items()}
    direct = {name: at_import(ast.parse(path.read_text()), set(names.values())) for path, name in names.items()}
    for name, targets in direct.items():
        targets |= {p for t in (name, *targets) for p in packages(t)} - {name}
    needed = {}
    for name in direct:
        needed[name], todo = {name}, [name]
        while todo:
            new = direct[todo.pop()] - needed[name]
            needed[name] |= new
            todo += new
    tree = defaultdict(list)
    for name in direct:
        before = [t for t in direct[name] if name not in needed[t] or t in packages(name)]  # a package is first in any case
        tree[max(before, key=lambda t: len(needed[t]), default="")].append(name)
    command = [sys.executable, "-c", ALONE]
    given = json.dumps([tree, {name: sorted(some) for name, some in needed.items()}])
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, cwd=project)
    said = done.stdout.splitlines()
    assert (done.returncode, done.stderr, [line for line in said if line != "ok"]) == (0, "", [])
    assert len(said) == len(direct)


def packages(name: str) -> set[str]:
    """The packages that a module lies in, which are imported before it."""
    return {name.rsplit(".", k)[0] for k in range(1, name.count(".") + 1)}


def at_import(node: ast.AST, own: set[str]) -> set[str]:
    """Those of our modules that a module imports when it is imported: not in functions, for types, or as the program."""
    found = set()
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names} & own
        elif isinstance(part, ast.ImportFrom):
            found |= ({f"{part.module}.{alias.name}" for alias in part.names} | {part.module}) & own
        elif not isinstance(part, ast.FunctionDef | ast.If):
            found |= at_import(part, own)
    return found


@pytest.mark.parametrize("library", ONLY)
def test_mpi4py_and_h5py_are_imported_in_one_module_each(imports, library):
    users = {name for name, targets in imports.items() if any(t.split(".")[0] == library for t in targets)}
    assert users == ONLY[library]


def test_numerical_modules_never_see_mpi(imports):
    numerical = [name for name in imports if name.split(".")[0] in ("method", "engines", "models", "data", "files")]
    reached, todo = set(), [*numerical, "tasks.defense.smoothing", "tasks.defense.classifier", ""]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports.get(name, ())
    assert "job.world" not in reached and not any(name.startswith("training") for name in reached)
    assert {"method.coordinates", "errors"} <= reached  # the walk walks


def test_mpi_code_never_sees_models(imports):
    assert {t for t in imports["job.world"] if t in imports} == {"errors", "job.alone", "job.failure", "job.process"}
    assert {t.split(".")[0] for t in imports["training.distribution"]} & {"models", "data", "tasks"} == set()


LIGHT = """
import sys, dzhpc, torch
print('mpi4py.MPI' in sys.modules, torch.cuda.is_initialized(), sorted(dzhpc.__all__))
from dzhpc import config, data
from dzhpc.method import optimizers
data.load(config.Data(name="digits"), seed=0)
theta = torch.nn.Parameter(torch.ones(2, 2))
theta.grad = torch.ones(2, 2)
for name in ("sgd", "adam", "muon"):
    optimizer = optimizers.make_optimizer(config.Optim(name=name), {"theta": theta})
    schedule = optimizers.make_schedule(optimizer, config.Optim(), 1.0, 10, 0)
    optimizer.step(), schedule.step()
print(sorted({"sklearn", "scipy", "torch._dynamo", "torch._inductor", "matplotlib"} & set(sys.modules)))
"""


def test_the_package_starts_neither_mpi_nor_cuda_and_a_run_imports_nothing_slow_that_it_does_not_need():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "False False ['Loop', 'autograd', 'cge', 'load_model', 'make_engine', 'rge']", "[]",
    ], done.stderr  # fmt: skip


def test_verbs_import_only_what_they_need(project):
    """A thousand ranks read what they import from one file system; some verbs need no torch at all, no rank needs it twice."""
    code = "import sys\nfor verb in sys.argv[1:]: __import__(f'dzhpc.{verb}')\nprint(*sys.modules)"
    imported = lambda *verbs: set(  # noqa: E731
        subprocess.run([sys.executable, "-c", code, *verbs], capture_output=True, text=True, timeout=120, cwd=project, check=True)
        .stdout.split()
    )  # fmt: skip
    assert not imported("report", "info", "new") & {"torch", "mpi4py", "matplotlib"}
    late = {"torch._dynamo", "torch._inductor", "sympy", "torchvision", "sklearn", "scipy", "matplotlib", "phi", "mpi4py", "PIL"}
    assert not imported("train", "prune", "certify", "simulate", "evaluate") & late


def test_no_module_is_long_and_no_class_does_everything(project):
    modules = {path: path.read_text() for path in (project / "dzhpc").rglob("*.py")}
    assert {str(path): n for path, text in modules.items() if (n := text.count("\n")) > 300} == {}
    classes = [node for text in modules.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    assert {c.name: n for c in classes if (n := sum(isinstance(m, ast.FunctionDef) for m in c.body)) > 25} == {}
