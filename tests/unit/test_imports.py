"""The rules of import: nothing starts by itself, MPI and HDF5 have one door each, and imports run downwards."""

import ast
import subprocess
import sys

import pytest

# from the bottom up: a module imports only from lower rows
LAYERS = """
processor
engines.winograd
errors seeds metrics process models.resnet models.dncnn models.frozen engines.changes engines.differences engines.programs
config coordinates device graph lock smoothing spmd models.cnn models.vit models.corrector baselines baselines.ae_ds
engines.rules tasks.sol.wake
engines.full engines.blackbox engines.rankone engines.seeds estimators optimizers stopping
engines.reuse engines.propagation pruning
engines.delta store
engines runfolder
models data sparsity distribution parts
classifier
tasks.sol.phiflow tasks.sol.reference
tasks.sol.projected
tasks.sol.simulators tasks.sol.correction
tasks.sol.unrolled tasks.sol.rollout tasks.sol.solvers
forecast tasks.classification tasks.objective tasks.defense tasks.sol.task tasks.sol.evaluation tasks.sol
tasks tasks.sol.results
trainer campaign certificates tasks.sol.figures
certification simulation
report fetch prune info bench
train certify simulate evaluate
"""
ONLY = {"mpi4py": {"spmd"}, "h5py": {"store"}, "phi": {"tasks.sol.phiflow"}}
NUMERICAL = {
    "coordinates",
    "processor",
    "graph",
    "engines",
    "engines.full",
    "engines.rankone",
    "engines.reuse",
    "engines.delta",
    "engines.rules",
    "engines.seeds",
    "engines.blackbox",
    "engines.changes",
    "engines.differences",
    "engines.programs",
    "engines.propagation",
    "engines.winograd",
    "estimators",
    "pruning",
    "parts",
    "classifier",
    "baselines.ae_ds",
    "models",
    "data",
    "seeds",
    "smoothing",
}


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


def test_imports_run_downwards_without_cycles(imports):
    layer = {name: k for k, row in enumerate(LAYERS.strip().splitlines()) for name in row.split()}
    unknown = set(imports) - set(layer) - {""}
    assert not unknown, f"say in LAYERS where these belong: {sorted(unknown)}"
    upwards = [(a, b) for a, targets in imports.items() if a for b in targets if b in layer and layer[b] >= layer[a]]
    assert upwards == []
    assert [a for a, targets in imports.items() if "dzhpc" in targets and a] == []  # the package itself is for users


@pytest.mark.parametrize("library", ONLY)
def test_mpi4py_and_h5py_are_imported_in_one_module_each(imports, library):
    users = {name for name, targets in imports.items() if any(t.split(".")[0] == library for t in targets)}
    assert users == ONLY[library]


def test_numerical_modules_never_see_mpi(imports):
    reached, todo = set(), [*NUMERICAL, ""]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imports.get(name, ())
    assert reached & {"spmd", "trainer", "distribution"} == set()
    assert {"coordinates", "errors"} <= reached  # the walk walks


def test_mpi_code_never_sees_models(imports):
    assert {t for t in imports["spmd"] if t in imports} == {"errors", "process"}
    assert imports["distribution"] & {"models", "data", "tasks"} == set()


def test_importing_the_package_starts_neither_mpi_nor_cuda():
    code = "import sys, dzhpc, torch; print('mpi4py.MPI' in sys.modules, torch.cuda.is_initialized(), sorted(dzhpc.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False False ['autograd', 'cge', 'load_model', 'make_engine', 'rge']"
