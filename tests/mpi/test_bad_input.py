"""Bad input: one clear line on standard error, the documented exit code, nothing half-written, and never a hang."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi_launch import Case, Result, attributes, batch, checkpoints, mpirun, run, sets, tensor

from dzhpc.data import DataSet, Split, packed
from dzhpc.files.checkpoint import load_checkpoint

CIFAR = "cifar-10-batches-py"
# name: (input file, further arguments, exit code, what the line must hold)
BEFORE_ANYTHING = {
    "misspelt": ("digits.toml", ["--set", "zo.step_size=1e-3"], 2, ["--set", "zo.step_size", "did you mean zo.mu?"]),
    "misspelt-in-file": ("misspelt.toml", [], 2, ["misspelt.toml", "unknown key optim.learning_rate", "optim.lr"]),
    "unknown-section": ("digits.toml", ["--set", "zoo.mu=1"], 2, ["zoo", "unknown key"]),
    "no-section": ("digits.toml", ["--set", "mu=1"], 2, ["--set mu=1", "SECTION.KEY=VALUE"]),
    "wrong-type": ("digits.toml", ["--set", "data.batch_size=many"], 2, ["--set", "data.batch_size = 'many'", "integer"]),
    "a-float-for-a-count": ("digits.toml", ["--set", "sparsity.q=1.5"], 2, ["sparsity.q = 1.5", "integer"]),
    "not-a-section": ("flat.toml", [], 2, ["flat.toml", "zo"]),
    "out-of-range": ("digits.toml", ["--set", "zo.mu=-1.0"], 2, ["zo.mu = -1.0", "greater than 0"]),
    "infinite": ("digits.toml", ["--set", "zo.mu=inf"], 2, ["zo.mu = inf", "finite"]),
    "keep-one": ("digits.toml", sets(checkpoint__keep=1), 2, ["checkpoint.keep = 1", "greater than or equal to 2"]),
    "everything-pruned": ("digits.toml", sets(sparsity__ratio=1.0), 2, ["sparsity.ratio = 1.0", "less than 1"]),
    "not-together": ("digits.toml", sets(sparsity__target="weights"), 2, ["digits.toml", "sparsity.target", '"static"']),
    "no-such-choice": ("digits.toml", sets(zo__estimator="spsa"), 2, ["zo.estimator = 'spsa'", "cge", "rge"]),
    "no-file": ("nowhere.toml", [], 2, ["nowhere.toml", "No such file"]),
    "a-folder": ("empty", [], 2, ["empty", "Is a directory"]),
    "bad-toml": ("broken.toml", [], 2, ["broken.toml", "not valid TOML", "line 2"]),
    "not-text": ("binary.toml", [], 2, ["binary.toml", "not valid TOML"]),
    "no-data": ("cifar.toml", sets(data__root="empty"), 2, ["empty/cifar10", "python -m dzhpc.fetch cifar10 --root empty"]),
    "truncated-cifar": ("cifar.toml", sets(data__root="cut"), 2, ["cut/cifar10", "dzhpc.fetch cifar10 --root cut"]),
    "damaged-packed": ("cifar.toml", sets(data__root="damaged"), 2, ["damaged/cifar10.h5", "SHA-256"]),
    "labels-beyond": ("cifar.toml", sets(data__root="labels"), 2, ["11", "10 classes"]),
    "no-packed": ("digits.toml", ["--set", "data.name=packed", "--set", "data.path=mine.h5"], 2, ["mine.h5", "No such file"]),
    "no-image-folder": ("digits.toml", sets(data__name="imagefolder", data__image_size=8), 2, ["imagefolder", "train/<class>/"]),
    "unknown-data": ("digits.toml", sets(data__name="mnist"), 2, ['data.name = "mnist"', "digits", "cifar10"]),
    "no-data-function": ("digits.toml", sets(data__name="userland:Nothing"), 2, ['data.name = "userland:Nothing"', "Nothing"]),
    "wrong-data-function": ("digits.toml", sets(data__name="userland:no_pair"), 2, ["userland:no_pair", "expected ()"]),
    "classes": ("digits.toml", sets(model__classes=7), 2, ["model.classes = 7", "digits has 10"]),
    "logits": ("six.toml", [], 2, ["userland:SixLogits", "[2, 6]", "[2, 10]"]),
    "unknown-model": ("digits.toml", sets(model__name="resnet21"), 2, ['model.name = "resnet21"', "resnet20"]),
    "model-key": ("digits.toml", sets(model__heads=8), 2, ["model.heads", "depth", "width"]),
    "model-value": ("digits.toml", sets(model__depth=0), 2, ["model.depth = 0"]),
    "too-deep": ("digits.toml", sets(model__depth=5), 2, ["cnn", "[1, 8, 8]"]),
    "no-module": ("digits.toml", sets(model__name="nomodule:Net"), 2, ['model.name = "nomodule:Net"', "package.module:Name"]),
    "no-weights": ("digits.toml", sets(model__weights="w.pt"), 2, ["model.weights = w.pt", "No such file"]),
    "wrong-weights": ("digits.toml", sets(model__weights="lpr-other.h5"), 2, ["model.weights", "lpr-other.h5"]),
    "batch": ("digits.toml", sets(data__batch_size=2000), 2, ["data.batch_size = 2000", "336"]),
    "no-function": ("objective.toml", sets(task__function="userland:Nothing"), 2, ["task.function", "userland", "Nothing"]),
    "no-objective": ("objective.toml", sets(task__function="userland:stripes"), 2, ["userland:stripes", "initial()"]),
    "memory": ("digits.toml", sets(zo__memory_mb=0.001), 2, ["zo.memory_mb = 0.001", "data.batch_size"]),
    "lpr-missing": ("digits.toml", sets(sparsity__lpr="no.h5"), 2, ["no.h5", "No such file"]),
    "lpr-damaged": ("digits.toml", sets(sparsity__lpr="lpr-cut.h5"), 2, ["lpr-cut.h5", "damaged"]),
    "lpr-other": ("digits.toml", sets(sparsity__lpr="lpr-other.h5"), 2, ["lpr-other.h5", "another model", "dzhpc.prune"]),
    "lpr-ratio": ("digits.toml", sets(sparsity__lpr="lpr.h5", sparsity__ratio=0.7), 2, ["lpr.h5", "0.5", "0.7"]),
    "lpr-is-data": ("digits.toml", sets(sparsity__lpr="labels/cifar10.h5"), 2, ["holds dzhpc-data, expected dzhpc-lpr"]),
    "restart-file": ("digits.toml", ["--restart", "nowhere.h5"], 3, ["nowhere.h5", "No such file"]),
    "below-a-file": ("digits.toml", ["--run-dir", "objective.toml/run"], 2, ["objective.toml/run", "cannot be written"]),
}  # fmt: skip
USAGE = {
    "no-option": ("train", ["digits.toml", "--ratio", "3"], ["unrecognized arguments: --ratio 3"]),
    "prune-without-out": ("prune", ["digits.toml"], ["-o/--out"]),
}
OTHER_VERBS = {
    "prune-nothing": ("prune", ["digits.toml", "-o", "x.h5", *sets(sparsity__ratio=0.0)], 2, ["sparsity.ratio = 0"]),
    "prune-no-folder": ("prune", ["digits.toml", "-o", "nofolder/x.h5"], 2, ["nofolder/x.h5", "does not exist"]),
    "prune-onto-input": (
        "prune",
        ["digits.toml", "-o", "digits.toml"],
        2,
        ["digits.toml", "not a file written", "would be lost"],
    ),
    "prune-onto-folder": ("prune", ["digits.toml", "-o", "empty"], 2, ["empty", "cannot be written"]),
    "info-nothing": ("info", ["nowhere.h5"], 2, ["nowhere.h5", "No such file"]),
    "info-foreign": ("info", ["digits.toml"], 2, ["digits.toml", "not a file written by dzhpc"]),
    "info-cut": ("info", ["lpr-cut.h5"], 2, ["lpr-cut.h5", "damaged"]),
    "report-nothing": ("report", ["nowhere"], 2, ["nowhere", "no metrics.h5"]),
    "fetch-unknown": ("fetch", ["mnist", "--root", "fetched"], 2, ["mnist", "cifar10"]),
    "fetch-cut": ("fetch", ["cifar10", "--root", "fetched", "--from", "cut/cifar10"], 2, ["cut/cifar10"]),
}


@pytest.fixture(scope="module")
def ground(place) -> Path:
    """Input files and data that are wrong in one way each."""
    digits = (place / "digits.toml").read_text()
    (place / "misspelt.toml").write_text(digits.replace("lr = 0.05", "learning_rate = 0.05"))
    (place / "flat.toml").write_text("zo = 3\n")
    (place / "broken.toml").write_text("[zo]\nmu = = 3\n")
    (place / "binary.toml").write_bytes(b"\x89HDF\r\n\xff\xfe")
    (place / "cifar.toml").write_text(digits.replace('"digits"', '"cifar10"'))
    (place / "six.toml").write_text(digits.replace("depth = 2\nwidth = 4\n", "").replace('"cnn"', '"userland:SixLogits"'))
    with open(place / "userland.py", "a") as file:
        file.write("\n\ndef no_pair():\n    return 1, 2, 3\n")
    folder = place / "cut" / "cifar10" / CIFAR
    folder.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"\x80\x04 cut short")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (24, 8, 8, 3), np.uint8)
    for name, labels in (("damaged", np.arange(24) % 10), ("labels", np.arange(24) % 12)):
        (place / name).mkdir()
        part = Split(torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels))
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.2)
        packed.save(place / name / "cifar10.h5", DataSet(part, part, mean, std, list("abcdefghij")))
    cut(place / "damaged" / "cifar10.h5")
    (place / "empty").mkdir()
    return place


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def said(ground) -> dict[str, Result]:
    """All of the above under two ranks."""
    prune = [
        Case("lpr", "prune", ["digits.toml", "-o", "lpr.h5"]),
        Case("lpr-of-another", "prune", ["digits.toml", "-o", "lpr-other.h5", *sets(model__width=5)]),
    ]
    files = batch(1, ground, prune)
    assert [r.code for r in files.values()] == [0, 0]
    shutil.copy(ground / "lpr.h5", ground / "lpr-cut.h5")
    cut(ground / "lpr-cut.h5")
    cases = []
    for name, (file, args, _, _) in BEFORE_ANYTHING.items():
        cases.append(Case(name, "train", [file, "--run-dir", f"runs/{name}", *args]))
    for name, (verb, args, *_) in (USAGE | OTHER_VERBS).items():
        cases.append(Case(name, verb, args))
    cases.append(Case("dry", "train", ["digits.toml", "--dry-run", "--run-dir", "runs/dry", *sets(model__depth=7)]))
    return batch(2, ground, cases)


@pytest.mark.parametrize("name", BEFORE_ANYTHING)
def test_one_line_and_no_run_folder(ground, said, name):
    _, _, code, fragments = BEFORE_ANYTHING[name]
    said[name].error(code, *fragments)
    assert not (ground / "runs" / name).exists()


@pytest.mark.parametrize("name", OTHER_VERBS)
def test_other_verbs(ground, said, name):
    _, _, code, fragments = OTHER_VERBS[name]
    said[name].error(code, *fragments)
    assert not (ground / "x.h5").exists()
    assert not list(ground.rglob("*.tmp"))


@pytest.mark.parametrize("name", USAGE)
def test_usage(said, name):
    verb, _, fragments = USAGE[name]
    assert said[name].code == 2
    assert said[name].err.count(f"usage: dzhpc.{verb}") == 1  # once, not once a rank
    assert said[name].err.count("error:") == 1
    for text in fragments:
        assert text in said[name].err


def test_dry_run_of_bad_input(said):
    said["dry"].error(2, "cnn", "[1, 8, 8]")


def test_what_mpirun_makes_of_it(ground):
    """The exit code and the one line, through mpirun itself."""
    result = mpirun(2, "train", "digits.toml", "--run-dir", "runs/typed", "--set", "zo.step_size=1", cwd=ground)
    line = result.said_once(2, "zo.step_size")
    assert line.startswith("--set: unknown key zo.step_size; did you mean zo.mu?")
    assert not (ground / "runs" / "typed").exists()


def test_tasks_that_are_no_mpi_job(ground):
    command = [sys.executable, "-m", "dzhpc.train", "digits.toml", "--run-dir", "runs/tasks"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "PRTE"))}
    environment |= {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}
    run(command, ground, env=environment).error(4, "SLURM_STEP_NUM_TASKS = 4", "mpirun -n 4", "1 rank")
    assert not (ground / "runs" / "tasks").exists()


@pytest.fixture(scope="module")
def numerical(ground) -> dict[str, Result]:
    """Numbers that are none, and files that cannot be written while the run goes on."""
    objective = lambda name, *args: Case(name, "train", ["objective.toml", "--run-dir", name, *args])  # noqa: E731
    nan = sets(task__function="userland:NotANumber", checkpoint__every_steps=1)
    drifts = sets(model__name="userland:Drifts", zo__engine="full", run__check_every=2)
    cases = [
        objective("nan-coordinate", *nan),
        Case("nan-loss", "train", ["digits.toml", "--run-dir", "nan-loss", *sets(optim__lr=1e30, checkpoint__every_steps=1)]),
        Case("overflow", "train", ["digits.toml", "--run-dir", "overflow", *sets(optim__lr=1e38, checkpoint__every_steps=1)]),
        Case(
            "nan-rge",
            "train",
            ["digits.toml", "--run-dir", "nan-rge", *sets(zo__estimator="rge", zo__q=3, zo__mu=1e38, sparsity__ratio=0)],
        ),
        Case("nan-scores", "train", ["digits.toml", "--run-dir", "nan-scores", *sets(zo__mu=1e38)]),
        objective("direction", *sets(task__function="userland:NoDirection", zo__estimator="rge", zo__q=4)),
        *(objective(name.lower(), *sets(task__function=f"userland:{name}")) for name in ("Disagrees", "Noisy", "Infeasible")),
        Case("drifts", "train", ["own.toml", "--run-dir", "drifts", *drifts]),
        objective("no-start", *sets(task__function="userland:FailsToStart")),
        objective("shape", *sets(task__function="userland:WrongShape")),
        objective("everywhere", *sets(task__function="userland:RaisesEverywhere", eval__every_epochs=100, task__retries=0)),
        objective("at-once", *sets(task__function="userland:RaisesAtOnce", task__retries=0)),
    ]
    return batch(2, ground, cases)


def test_nan_of_one_coordinate(ground, numerical):
    rank = (ground / "nan-rank").read_text()
    line = numerical["nan-coordinate"].error(5, f"step 4, rank {rank}", "theta[1] (coordinate 1)", "(1 of 3 coordinates)")
    assert "the last good checkpoint is nan-coordinate/checkpoints/step-00000003.h5" in line
    newest = checkpoints(ground / "nan-coordinate")[-1]
    assert attributes(newest, "state")["step"] == 3
    assert np.isfinite(tensor(newest, "params/theta")).all()


def test_nan_loss(ground, numerical):
    line = numerical["nan-loss"].error(5, "the loss at theta is nan", "lower optim.lr or zo.mu")
    step = int(re.match(r"step (\d+)", line)[1])
    assert 2 <= step <= 8


@pytest.mark.parametrize("name", ["nan-loss", "overflow"])
def test_the_last_good_checkpoint_is_good(ground, numerical, name):
    """What the message calls good must be: finite numbers, all of them."""
    line = numerical[name].error(5, "step ")
    named = re.search(r"the last good checkpoint is (\S+)", line)
    found = checkpoints(ground / name)
    assert (named[1] if named else None) == (str(found[-1].relative_to(ground)) if found else None)
    for path in found:
        state = load_checkpoint(path)
        bad = [k for k, v in (state.params | state.buffers).items() if not np.isfinite(v.numpy()).all()]
        assert not bad, f"{path.name}: {bad}"


def test_nan_of_a_direction_and_of_scores(numerical):
    numerical["nan-rge"].error(5, "step 1", "nothing was trained yet: lower zo.mu")
    numerical["nan-scores"].error(5, "pruning scores are not finite", "zo.mu")


def test_nan_of_one_direction_names_the_rank_that_met_it(numerical):
    numerical["direction"].error(5, "step 4, rank 1", "direction")


def test_replicas_that_differ(ground, numerical):
    numerical["drifts"].error(5, "step 2: the state of rank 1 differs from rank 0's", "restart from the last checkpoint")


def test_what_user_code_makes_on_one_rank_only_is_named(ground, numerical):
    made = "gives something else on rank 1 than on rank 0; seed what it draws, the same on every rank"
    numerical["disagrees"].error(2, "task.function = userland:Disagrees: initial(): ", made)
    line = numerical["noisy"].error(
        2, "task.function = userland:Noisy: ", "the same theta and the same batch; a loss must draw no"
    )
    assert re.search(r"Noisy: \S+ and then \S+ for", line)
    assert not any((ground / name).exists() for name in ("disagrees", "noisy"))


def test_a_step_of_which_all_is_infeasible_ends_the_run(numerical):
    numerical["infeasible"].said_once(5, "step 1: all 3 perturbed parameters are infeasible, or diverge; lower zo.mu (now ")


def test_a_rank_that_cannot_start(ground, numerical):
    result = numerical["no-start"]
    assert result.code == 2
    said = "rank 1: task.function = userland:FailsToStart: "
    lines = [line for line in result.err.splitlines() if line.startswith("rank")]
    assert [line[: len(said)] for line in lines] == [said] and "ConnectionError: no license left" in lines[0]
    assert not (ground / "no-start").exists()


def test_an_error_of_the_users_code_on_every_rank(ground, numerical):
    line = numerical["everywhere"].error(6, "FloatingPointError: the solver diverged", "userland.py", "in __call__")
    assert line.startswith("task.function = userland:RaisesEverywhere: ") and line.count("solver diverged") == 1
    assert "solver diverged" in (ground / "everywhere" / "crash-rank0.txt").read_text()
    assert "in __call__" in (ground / "everywhere" / "crash-rank1.txt").read_text()


def test_an_error_of_the_users_code_before_the_first_step(ground, numerical):
    """There is no run folder yet that could hold the traceback: it is said at most once, the line exactly once."""
    result = numerical["at-once"]
    assert result.code == 6
    named = "task.function = userland:RaisesAtOnce: FloatingPointError: no license, at "
    assert len([line for line in result.err.splitlines() if line.startswith(named)]) == 1
    assert result.err.count("Traceback") <= 1
    numerical["shape"].error(2, "userland:WrongShape", "gave losses [2]; expected [1]")


def test_an_error_on_one_rank_while_others_wait(ground):
    args = ["objective.toml", "--run-dir", "raises", *sets(task__function="userland:Raises", task__retries=0)]
    result = mpirun(3, "train", *args, cwd=ground, timeout=90)
    line = result.said_once(6, "FloatingPointError: the solver diverged")
    assert line.startswith("rank 1: ")
    assert "(traceback in raises/crash-rank1.txt); the same command continues from raises/checkpoints/step-00000002.h5" in line
    assert "in __call__" in (ground / "raises" / "crash-rank1.txt").read_text()
    assert attributes(checkpoints(ground / "raises")[-1], "state")["step"] == 2


def test_sys_exit_on_one_rank_while_others_wait(ground):
    """SystemExit is no Exception, but the others wait all the same; it is not asked again."""
    args = ["objective.toml", "--run-dir", "leaves", *sets(task__function="userland:Leaves")]
    line = mpirun(2, "train", *args, cwd=ground, timeout=60).said_once(6, "SystemExit: license server not reached")
    assert line.startswith("rank 1: ") and "asking again" not in line


def test_a_checkpoint_that_cannot_be_written(ground):
    """A full disk at step 2: the root alone fails, the job ends with 3, and the older files are whole."""
    args = ["objective.toml", "--run-dir", "full", *sets(task__function="userland:FullDisk", checkpoint__every_steps=1)]
    result = mpirun(2, "train", *args, cwd=ground, timeout=90)
    line = result.said_once(3, "cannot be written")
    assert "full/" in line
    assert not list((ground / "full").rglob("*.tmp"))
    for path in checkpoints(ground / "full"):
        assert load_checkpoint(path).step <= 2
