"""N steps, a restart on another number of ranks, and N more steps give the bits of 2N steps, whatever happened in between.

The halves end at step 5: in the middle of an epoch (7 steps) and of a redraw interval (3 steps).
"""

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import pytest
from mpi_launch import Case, assert_same, attributes, batch, bits, checkpoints, column, contents, sets

from dzhpc.job import processor

CONFIGS = {
    "sgd": ("digits.toml", []),
    "delta": ("digits.toml", sets(zo__engine="delta", zo__memory_mb=4)),  # compiled: test_rank_count
    "delta-bf16": ("digits.toml", sets(zo__engine="delta", zo__precision="bf16", zo__memory_mb=4)),
    "adam": ("digits.toml", sets(optim__name="adam", optim__lr=0.01, zo__estimator="rge", zo__q=7, run__seed=3)),
    "regrasp": ("digits.toml", sets(sparsity__pattern="regrasp", optim__schedule="step", optim__milestones=[0.5, 1.0])),
    "weights": ("digits.toml", sets(sparsity__pattern="static", sparsity__target="weights", checkpoint__every_steps=100)),
    "autograd": ("digits.toml", sets(zo__estimator="autograd", sparsity__ratio=0.0, optim__nesterov=True)),
    "dropout": ("own.toml", sets(model__name="userland:Dropout", zo__engine="full")),
    "objective": ("objective.toml", sets(task__function="userland:Rings", zo__mu=1e-3, optim__lr=1e-3)),
}
if "bf16" not in processor.instruction_set():  # unit/test_delta_precision.py has the same in types that every processor has
    CONFIGS.pop("delta-bf16")
(N, END) = (5, 9)


def train(name: str, file: str, folder: str, *args: object, **keys: object) -> Case:
    return Case(name, "train", [file, "--run-dir", folder, *args, *sets(**keys)])


def rewritten(path: Path, change) -> None:
    """Let ``change(h5py file)`` alter a checkpoint and make its checksum right again: a valid file of other content."""
    with h5py.File(path, "r+", locking=False) as file:
        change(file)
    whole = path.read_bytes()
    head = b"dzhpc sha256 "
    assert whole.startswith(head)
    path.write_bytes(head + hashlib.sha256(whole[512:]).hexdigest().encode() + whole[len(head) + 64 :])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def newer_version(file: h5py.File) -> None:
    file.attrs["format_version"] = 99


def unknown_key(file: h5py.File) -> None:
    text = file["config"].asstr()[()].replace("[zo]\n", "[zo]\nantithetic = true\n")
    del file["config"]
    file["config"] = text


@pytest.fixture(scope="module")
def first(place):
    """Undisturbed runs ``whole/NAME``, and first halves ``half/NAME``, on two ranks."""
    (place / "other.toml").write_text((place / "own.toml").read_text().replace("userland:Net", "changing:Net"))
    (place / "changing.py").write_text("import userland\n\n\nclass Net(userland.Net):\n    pass\n")
    cases = []
    for name, (file, args) in CONFIGS.items():
        cases.append(train(f"whole-{name}", file, f"whole/{name}", *args, stop__steps=END))
        cases.append(train(f"half-{name}", file, f"half/{name}", *args, stop__steps=N))
    cases.append(train("changing", "other.toml", "half/changing", stop__steps=N))
    for result in batch(2, place, cases).values():
        result.succeeded()
    return place


def blank(path: Path) -> None:
    path.write_bytes(b"\0" * 512 + path.read_bytes()[512:])


def newest(*damages):
    """What damages the newest checkpoints of a folder, the newest one last."""

    def happen(folder: Path) -> None:
        for path, damage in zip(checkpoints(folder)[-len(damages) :], damages, strict=True):
            damage(path)

    return happen


def killed_while_writing(folder: Path) -> None:
    newest(flip)(folder)
    (folder / "checkpoints" / "step-00000006.h5.123.tmp").write_text("half a file")


def other_width(folder: Path) -> None:
    (folder.parent / "changing.py").write_text(
        "import userland\n\n\nclass Net(userland.Net):\n"
        "    def __init__(self, classes=10):\n        super().__init__(4, classes)\n"
    )


def nothing(folder: Path) -> None:
    pass


def restart(folder: str, step: int) -> list[str]:
    return ["--restart", f"{folder}/checkpoints/step-{step:08d}.h5"]


# folder of a half: what happens to it, further arguments of the command that continues it
HALVES = {
    "truncated": (newest(truncate), []),
    "flipped": (killed_while_writing, []),
    "header": (newest(blank), []),
    "all-damaged": (newest(truncate, flip, flip), []),
    "two-damaged": (newest(flip, flip), sets(checkpoint__keep=2, checkpoint__every_steps=1, stop__steps=3)),
    "never": (nothing, ["--restart", "never"]),
    "file-within": (nothing, restart("file-within", 2)),
    "file-missing": (nothing, restart("file-missing", 99)),
    "file-elsewhere": (shutil.rmtree, restart("half/sgd", 4)),
    "file-damaged": (newest(truncate), restart("file-damaged", N)),
    "version": (newest(lambda path: rewritten(path, newer_version)), restart("version", N)),
    "unknown-key": (newest(lambda path: rewritten(path, unknown_key)), restart("unknown-key", N)),
    "frozen-mu": (nothing, sets(zo__mu=2e-3)),
    "frozen-width": (nothing, sets(model__width=5)),
    "frozen-seed": (nothing, sets(run__seed=1)),
    "frozen-epochs": (nothing, sets(stop__epochs=5)),
    "frozen-data": (nothing, sets(data__train_limit=300)),
    "refused": (nothing, [*restart("refused", 2), *sets(sparsity__ratio=0.6)]),
    "refused-fresh": (shutil.rmtree, ["--restart", "half/sgd", *sets(optim__lr=0.06)]),
    "free": (
        nothing,
        sets(checkpoint__keep=2, checkpoint__every_steps=3, checkpoint__every_minutes=5.0, data__root="/elsewhere"),
    ),
    "threads": (nothing, sets(run__threads=2)),
    "changing": (other_width, []),
    "metrics-missing": (lambda folder: (folder / "metrics.h5").unlink(), []),
    "metrics-damaged": (lambda folder: flip(folder / "metrics.h5"), []),
}


@pytest.fixture(scope="module")
def second(first):
    """All that may happen to a half, one folder each, continued on three ranks to the end: the results by name."""
    halves = {f"rest-{name}": (name, *CONFIGS[name], nothing, []) for name in CONFIGS}
    halves |= {folder: ("sgd", "digits.toml", [], happen, args) for folder, (happen, args) in HALVES.items()}
    halves["changing"] = ("changing", "other.toml", [], *HALVES["changing"])
    cases = []
    for folder, (of, file, own, happen, args) in halves.items():
        shutil.copytree(first / "half" / of, first / folder)
        happen(first / folder)
        cases.append(train(folder, file, folder, *own, *sets(stop__steps=END), *args))
    for name, steps in (("again-1", END), ("again-2", END), ("shorter", 7)):
        cases.append(train(name, "digits.toml", "rest-sgd", stop__steps=steps))
    return batch(3, first, cases)


def assert_undisturbed(place: Path, folder: str, of: str = "sgd") -> None:
    assert_same(bits(place / "whole" / of, but=("config",)), bits(place / folder, but=("config",)))
    steps = list(range(1, END + 1))
    assert column(place / folder, "train/step") == steps


@pytest.mark.parametrize("name", CONFIGS)
def test_restart_gives_the_bits_of_an_undisturbed_run(first, second, name):
    result = second[f"rest-{name}"].succeeded()
    assert result.out.startswith(f"restarting at step {N} from rest-{name}/checkpoints/step-0000000{N}.h5\n")
    assert_undisturbed(first, f"rest-{name}", name)


def test_a_run_stopped_at_three_ranks_continues_on_fewer(first):
    cases = [train(f"three-{ranks}", "digits.toml", f"three-{ranks}", stop__steps=N) for ranks in (1, 2)]
    assert [result.code for result in batch(3, first, cases).values()] == [0, 0]
    for ranks in (1, 2):
        rest = batch(ranks, first, [train("rest", "digits.toml", f"three-{ranks}", stop__steps=END)])["rest"].succeeded()
        assert rest.out.startswith(f"restarting at step {N} ")
        assert_undisturbed(first, f"three-{ranks}")


def test_evaluations_are_those_of_an_undisturbed_run(first, second):
    # the half made a final evaluation at step 5, which the whole run never made
    assert column(first / "half" / "sgd", "eval/step") == [5]
    assert column(first / "rest-sgd", "eval/step") == column(first / "whole" / "sgd", "eval/step") == [7, END]


def test_the_checkpoint_names_its_configs(first, second):
    newest = contents(checkpoints(first / "rest-sgd")[-1])
    assert b"\nsteps = 9\n" in newest["config"]
    assert b"\nsteps = 5\n" in newest["config-history/1"]
    launches = [json.loads(p.read_text()) for p in sorted((first / "rest-sgd" / "launches").glob("*.json"))]
    assert [launch["resumed_from_step"] for launch in launches[:2]] == [None, N]
    assert [sum(host["count"] for host in launch["hosts"]) for launch in launches[:2]] == [2, 3]
    assert launches[0]["run_uuid"] == launches[1]["run_uuid"]


@pytest.mark.parametrize("name", ["again-1", "again-2", "shorter"])
def test_nothing_left_to_do(first, second, name):
    assert "nothing left to do: stop.steps reached at step 9" in second[name].succeeded().out
    assert_undisturbed(first, "rest-sgd")


@pytest.mark.parametrize("name", ["truncated", "flipped", "header"])
def test_damaged_newest_checkpoint_is_skipped(first, second, name):
    line = second[name].error(0, f"skipped: {name}/checkpoints/step-00000005.h5", "damaged")
    assert line.count("step-") == 1
    said = f"restarting at step 4 from {name}/checkpoints/step-00000004.h5"
    assert second[name].out.startswith(f"{said}\n")
    log = [text.split(" ", 2)[2] for text in (first / name / "log.txt").read_text().splitlines()]
    log = [text for text in log if not text.startswith("engine ")]  # the check of the engine at the start
    assert log[log.index(said) + 1] == line  # nothing that comes before the first line is lost
    assert [p.name for p in (first / name / "previous-001").iterdir()] == ["step-00000005.h5"]  # not lost, not in the way
    assert_undisturbed(first, name)
    assert not list((first / name).rglob("*.tmp"))


def test_all_checkpoints_damaged(first, second):
    result = second["all-damaged"]
    lines = result.err.splitlines()
    assert (result.code, len(lines)) == (3, 4), result.err
    for step, line in zip((5, 4, 2), lines, strict=False):
        assert line.startswith(f"skipped: all-damaged/checkpoints/step-0000000{step}.h5: damaged (its SHA-256 does not match)")
    assert lines[3] == "all-damaged/checkpoints: none of 3 checkpoints can be read; to start afresh use --restart never"


def test_damaged_files_do_not_count_among_those_kept(first, second):
    """Step 2 is restored past two damaged files; with keep = 2 steps 2 and 3 are the two newest that can be read."""
    assert second["two-damaged"].code == 0
    names = {p.name for p in checkpoints(first / "two-damaged")}
    assert {"step-00000002.h5", "step-00000003.h5"} <= names


def test_never_sets_the_old_run_aside(first, second):
    lines = ["starting afresh in never", "moved 7 files of an earlier run to never/previous-001"]
    log = [line.split(" ", 2)[2] for line in (first / "never" / "log.txt").read_text().splitlines()]
    for said in (second["never"].succeeded().out.splitlines(), log):  # less the check of the engine at the start
        assert [line for line in said if not line.startswith("engine ")][:2] == lines
    old, aside = first / "half" / "sgd", first / "never" / "previous-001"
    for path in (*checkpoints(old), old / "metrics.h5", old / "log.txt", old / "input.toml"):
        assert (aside / path.name).read_bytes() == path.read_bytes()
    assert (aside / "report" / "report.md").exists()
    assert_undisturbed(first, "never")
    assert attributes(checkpoints(first / "never")[-1], "state")["run_uuid"] != attributes(
        checkpoints(old)[-1], "state")["run_uuid"]  # fmt: skip


def test_restart_from_a_named_file(first, second):
    result = second["file-within"].succeeded()
    assert "restarting at step 2 from file-within/checkpoints/step-00000002.h5" in result.out
    aside = sorted(p.name for p in (first / "file-within" / "previous-001").iterdir())
    assert aside == ["step-00000004.h5", "step-00000005.h5"]
    assert_undisturbed(first, "file-within")


def test_restart_from_a_file_of_another_folder(first, second):
    second["file-elsewhere"].error(0, "the record of steps before 4 is lost", "file-elsewhere/metrics.h5")
    assert second["file-elsewhere"].out.startswith("restarting at step 4 from half/sgd/checkpoints/step-00000004.h5\n")
    whole, here = (bits(first / f, but=("config", "metrics")) for f in ("whole/sgd", "file-elsewhere"))
    assert_same(whole, here)
    assert column(first / "file-elsewhere", "train/step") == list(range(5, END + 1))


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("file-missing", ["file-missing/checkpoints/step-00000099.h5: cannot be read (No such file"]),
        ("file-damaged", ["file-damaged/checkpoints/step-00000005.h5: damaged"]),
        ("version", ["version/checkpoints/step-00000005.h5", "version 99", "update dzhpc"]),
        ("unknown-key", ["unknown-key/checkpoints/step-00000005.h5", "zo.antithetic"]),
        ("frozen-mu", ["frozen-mu/checkpoints/step-00000005.h5", "zo.mu = 0.001, now 0.002"]),
        ("frozen-width", ["model.width = 4, now 5"]),
        ("frozen-seed", ["run.seed = 0, now 1"]),
        ("frozen-epochs", ["stop.epochs = 4.0, now 5.0"]),
        ("frozen-data", ["data.train_limit = 336, now 300"]),
        ("refused", ["sparsity.ratio = 0.5, now 0.6", "frozen keys cannot change on restart"]),
        ("refused-fresh", [f"half/sgd/checkpoints/step-0000000{N}.h5", "optim.lr = 0.05, now 0.06"]),
        ("changing", ["changing/checkpoints/step-00000005.h5", "another model", "changing:Net"]),
    ],
)
def test_what_cannot_be_continued(second, name, fragments):
    second[name].error(3, *fragments)


@pytest.mark.parametrize("name", ["file-missing", "file-damaged", "frozen-mu", "refused"])
def test_a_refusal_leaves_the_run_folder_as_it_was(first, second, name):
    files = {str(p.relative_to(first / name)) for p in (first / name).rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(first / "half/sgd")) for p in (first / "half" / "sgd").rglob("*") if p.is_file()}


def test_a_refusal_makes_no_run_folder(first, second):
    assert second["refused-fresh"].code == 3
    assert not (first / "refused-fresh").exists()


def test_free_keys_may_change(first, second):
    second["free"].succeeded()
    assert_undisturbed(first, "free")
    assert [p.stem for p in checkpoints(first / "free")] == ["step-00000006", "step-00000009"]


def test_another_thread_count_is_said(second):
    second["threads"].error(0, "run.threads was 1, now 2: bits may differ")


def test_missing_metrics_do_not_hinder(first, second):
    second["metrics-missing"].error(0, "metrics-missing/metrics.h5", "No such file")
    assert_same(bits(first / "whole/sgd", but=("config", "metrics")), bits(first / "metrics-missing", but=("config", "metrics")))
    assert column(first / "metrics-missing", "train/step") == list(range(N + 1, END + 1))


def test_damaged_metrics_do_not_hinder(first, second):
    second["metrics-damaged"].error(0, "metrics-damaged/metrics.h5", "damaged")
    assert_same(bits(first / "whole/sgd", but=("config", "metrics")), bits(first / "metrics-damaged", but=("config", "metrics")))
