"""Certificates over ranks: the same for any number of them, after a stop and after a kill; nothing is asked twice."""

import os
import signal
import time
from pathlib import Path

import pytest
from input_texts import CERTIFY, text
from mpi_launch import Case, Result, assert_same, batch, contents, sets

from dzhpc.tasks.defense import certificates

INPUT = text(
    CERTIFY, task={"classifier": "prototypes:nearest", "batch_limit": 40}, zo={"engine": "full"}, run={"deadline_margin": 0.6}
)
BOX = '''
"""Nearest prototypes of the ten digits: logits. Writes down how much it is asked, and may linger or break."""
import os, time
from pathlib import Path
import numpy as np
from sklearn.datasets import load_digits
HERE, RANK = Path(__file__).parent, os.environ.get("OMPI_COMM_WORLD_RANK", "0")
digits = load_digits()
MEANS = np.stack([digits.images[digits.target == k].mean(0).ravel() for k in range(10)]) * 15 / 255
def nearest(images):
    if name := os.environ.get("ASKED"):
        with open(HERE / f"asked-{name}.{RANK}", "a") as file:
            print(len(images), os.getpid(), file=file)
    if "SLOW" in os.environ:
        time.sleep(0.02)
    if "BROKEN" in os.environ and RANK == "1" and len(images) > 8:
        raise RuntimeError("out of order")
    return -((images.reshape(len(images), 1, -1) - MEANS) ** 2).sum(-1)
def together(images):
    return nearest(images - images.mean(0))
'''
PLAN = ["--images", "13", "--n0", "30", "--n", "500", "--batch", "40", "--sigma", "0.4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an input file and the user's classifier."""
    folder = tmp_path_factory.mktemp("certify")
    (folder / "defense.toml").write_text(INPUT)
    (folder / "company.toml").write_text(INPUT.replace(":nearest", ":together"))
    (folder / "prototypes.py").write_text(BOX)
    return folder


def record(path: Path) -> dict:
    """All of a record but its timings."""
    return {place: value for place, value in contents(path).items() if place not in ("images/seconds", "about/source")}


def asked(place: Path, name: str) -> tuple[int, set[int]]:
    """(images that the classifier was asked about under a name, by all ranks; the ranks' processes).

    Without those that each launch asks to see whether answers depend on company, eight at once at most.
    """
    lines = [line.split() for file in place.glob(f"asked-{name}.*") for line in file.read_text().splitlines()]
    return sum(int(count) for count, _ in lines if int(count) > 8), {int(process) for _, process in lines}


def until(condition, what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def disturbed(place):
    """Runs on three ranks of which one gets a signal once five images are on record: name -> (result, rows on record then)."""

    def disturb(name: str, which, number: int) -> tuple[Result, list]:
        file = place / name / "defense.h5"
        rows = lambda: certificates.load(file)[0] if file.exists() else []  # noqa: E731

        def meanwhile(_) -> None:
            until(lambda: sum(row.done for row in rows()) >= 5, "five images")
            os.kill(which(asked(place, name)[1]), number)

        case = Case(name, "certify", ["defense.toml", *PLAN, "-o", name], {"ASKED": name, "SLOW": "1", "SAVE_EVERY": "0.1"})
        return batch(3, place, [case], meanwhile=meanwhile)[name], rows()

    return {"stopped": disturb("stopped", min, signal.SIGUSR1), "killed": disturb("killed", max, signal.SIGKILL)}


@pytest.fixture(scope="module")
def done(place, disturbed):
    """Several command lines on one rank and on three; results by name."""
    (place / "told").mkdir()
    (place / "told" / "STOP").touch()

    def case(name: str, *args: str, **env: str) -> Case:
        return Case(name, "certify", ["defense.toml", *PLAN, "-o", name.removesuffix("-rest"), *args], env)

    train = ["defense.toml", "--run-dir", "run", *sets(task__loss="mse", zo__estimator="autograd", stop__steps=3, optim__lr=0.5)]
    step = "run/checkpoints/step-00000003.h5"
    cases = [
        case("one"), case("one-adaptive", "--adaptive"), case("one-bare", "--no-denoiser"),
        case("other-n", "--n", "600", "-o", "one"), case("again", "-o", "one"), case("more", "--images", "26", "-o", "one"),
        case("stopped-rest", ASKED="stopped"),
        case("zero", "--alpha", "0"), case("many", "--images", "9999"),
        Case("two-names", "certify", ["defense.toml", "run", "--label", "x"]),
        Case("company", "certify", ["company.toml", *PLAN, "-o", "company"]),
        Case("company-prune", "prune", ["company.toml", "-o", "company.h5", *sets(sparsity__ratio=0.5, sparsity__q=2)]),
        Case("missing", "certify", ["nowhere.toml"]), Case("train", "train", train), Case("of-a-run", "certify", ["run", *PLAN]),
        Case("of-a-file", "certify", [step, *PLAN, "--images", "2", "--n", "100", "-o", "run/certify/file.h5"]),
        Case("both", "certify", ["run", "defense.toml", *PLAN, "--images", "2", "-o", "both"]),
        Case("drawn", "report", ["one-adaptive/defense.h5", "one-bare/defense-no-denoiser.h5", "-o", "drawn"]),
    ]  # fmt: skip
    one = batch(1, place, cases)
    cases = [
        case("three"), case("three-adaptive", "--adaptive"), case("three-bare", "--no-denoiser"),
        case("killed-rest", ASKED="killed-rest"), case("told"), case("broken", BROKEN="1"),
    ]  # fmt: skip
    return one | batch(3, place, cases)


def test_counts_and_radii_do_not_depend_on_the_number_of_ranks(place, done):
    for one, three, file in (
        ("one-adaptive", "three-adaptive", "defense.h5"),
        ("one-bare", "three-bare", "defense-no-denoiser.h5"),
    ):
        done[one].succeeded(), done[three].succeeded()
        assert_same(record(place / one / file), record(place / three / file))
        tables = [(place / folder / file).with_suffix(".tsv").read_text().splitlines() for folder in (one, three)]
        assert [line.split("\t")[:-1] for line in tables[0]] == [line.split("\t")[:-1] for line in tables[1]]
    bare, guarded = (
        certificates.read(place / "three-bare" / "defense-no-denoiser.h5"),
        certificates.read(place / "three" / "defense.h5"),
    )
    assert [row.idx for row in bare.rows] == [k * 360 // 13 for k in range(13)]
    assert 0 < bare.certified(0.25) <= bare.certified(0.0) < 13
    assert [row.n_a for row in bare.rows] == [row.n_a for row in guarded.rows]  # an untrained denoiser is the identity
    assert {row.n for row in guarded.rows} == {500}


def test_what_is_done_is_not_done_again(place, done):
    assert "13 images, n0 = 30, n = 500, sigma 0.4, 13 done already" in done["again"].succeeded().out
    assert "26 images, n0 = 30, n = 500, sigma 0.4, 13 done already" in done["more"].succeeded().out
    more = certificates.read(place / "one" / "defense.h5")
    assert len(more.rows) == 26
    three = certificates.read(place / "three" / "defense.h5")
    shared = {row.idx: (row.n_a, row.radius) for row in three.rows}
    assert {row.idx: (row.n_a, row.radius) for row in more.rows if row.idx in shared} == shared


def test_other_parameters_are_refused_with_both_values(done):
    done["other-n"].error(3, "one/defense.h5 was written with n = 500, now 600", "--label or -o")


def test_options_without_meaning(done):
    done["zero"].error(2, "--alpha 0: expected a probability")
    done["many"].error(2, "--images 9999: the test set has 360")
    done["two-names"].error(2, "several sources are given")
    done["missing"].error(2, "nowhere.toml: cannot be read")


def test_a_classifier_whose_answers_depend_on_company_is_refused(place, done):
    for name in ("company", "company-prune"):
        done[name].error(2, "task.classifier = prototypes:together: answers change", "with what else is in the call")
    assert not (place / "company.h5").exists() and not list((place / "company").glob("*.tsv"))


def test_a_run_folder_and_a_checkpoint_are_certified(place, done):
    done["of-a-run"].succeeded(), done["of-a-file"].succeeded()
    run, file = (certificates.read(place / "run" / "certify" / name) for name in ("run.h5", "file.h5"))
    untrained = certificates.read(place / "three" / "defense.h5")
    assert run.about["denoiser"] == file.about["denoiser"] != untrained.about["denoiser"]
    assert [(row.idx, row.n) for row in file.rows] == [(0, 100), (180, 100)]
    assert [row.n_a for row in run.rows] != [row.n_a for row in untrained.rows]
    assert "| file | 0.4 | 2 | 100 |" in (place / "run" / "certify" / "certified.md").read_text()


def test_several_sources_in_turn(place, done):
    lines = [line.split(" | ")[:4] for line in done["both"].succeeded().out.splitlines() if line.startswith("| ")]
    assert lines[1:] == [["| defense", "0.4", "2", "500"], ["| run", "0.4", "2", "500"]]


def test_the_report_overlays_methods(place, done):
    text = done["drawn"].succeeded().out
    assert "| defense | 0.4 | 13 |" in text
    assert "| defense-no-denoiser | 0.4 | 13 | 500 |" in text
    assert (place / "drawn" / "certified.png").stat().st_size > 10_000


def test_a_signal_stops_it_and_nothing_is_asked_twice(place, disturbed, done):
    """USR1 to one rank only: all leave between two batches, and the counts of images at hand are kept."""
    result, rows = disturbed["stopped"]
    assert result.code == 75, result.err
    assert "stopped: signal received; the same command goes on" in result.out
    partial = [row for row in rows if not row.done]
    assert partial
    assert all(row.radius is None and row.n % 40 in (0, 20) for row in partial)
    done["stopped-rest"].succeeded()
    assert asked(place, "stopped")[0] == 13 * 530
    assert_same(record(place / "stopped" / "defense.h5"), record(place / "three" / "defense.h5"))


def test_a_kill_half_way_costs_little(place, disturbed, done):
    result, before = disturbed["killed"]
    assert result.code not in (0, 75)
    lines = done["killed-rest"].succeeded().out.splitlines()
    assert lines[0].startswith("defense: 13 images, n0 = 30, n = 500, sigma 0.4, ")  # what comes before it waits for it
    assert lines[1].startswith("took over killed/defense.h5 from ")
    assert_same(record(place / "killed" / "defense.h5"), record(place / "three" / "defense.h5"))
    known = sum(row.n + (30 if row.selected >= 0 else 0) for row in before)
    assert asked(place, "killed-rest")[0] == 13 * 530 - known  # what the record knew was not asked again
    assert asked(place, "killed")[0] < 2 * known
    after = {row.idx: row.seconds for row in certificates.read(place / "killed" / "defense.h5").rows}
    assert [after[row.idx] for row in before if row.done] == [row.seconds for row in before if row.done]


def test_a_broken_classifier_ends_it_on_all_ranks_and_what_is_known_is_kept(place, done):
    done["broken"].error(6, "rank 1: task.classifier = prototypes:nearest: RuntimeError: out of order")
    assert [row.idx for row in certificates.load(place / "broken" / "defense.h5")[0]] != []


def test_the_file_stop_ends_it_in_good_order(place, done):
    assert "stopped: STOP file found; the same command goes on" in done["told"].succeeded().out
    assert not (place / "told" / "STOP").exists()
