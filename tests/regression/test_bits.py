"""The bits of short runs are those stored in hashes.json, and files that the first version wrote are read and gone on with.

Bits depend on the processor. On one that is not known yet the hashes found are written to $DZHPC_RECORD, or else to a file in
pytest's folder, and the tests of bits skip and say so; the numbers that hold on any processor are compared in any case.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from cases import CASES, RANKS, Case
from footprint import LIMIT, WRITTEN, key, of, runnable, set_up, start, stored, take

COLUMNS = ["epoch", "grad_norm", "loss", "lr", "queries", "step"]  # of metrics.h5, its memory and timings aside
ABSOLUTE = {"accuracy": 0.02}  # a few images of the test set are undecided


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("regression")
    set_up(folder)
    return folder


class Found(dict):
    """Footprints by name. Cases that need a process of their own are run when they are first asked for.

    Those of an unknown processor are written to a file.
    """

    def __init__(self, place: Path):
        self._place, self._runnable = place, runnable()
        super().__init__(self._take({name: case for name, case in self._runnable.items() if not case.alone}))

    def _take(self, cases: dict) -> dict:
        footprints = take(self._place, cases)
        if key() not in stored()["hashes"]:
            known = json.loads(file(self._place).read_text()).get(key(), {}) if file(self._place).exists() else {}
            new = {name: footprint.hashes for name, footprint in footprints.items() if not footprint.failure}
            file(self._place).write_text(json.dumps({key(): known | new}))
        return footprints

    def __contains__(self, name: str) -> bool:
        return name in self._runnable

    def __missing__(self, name: str):
        self.update(self._take({name: self._runnable[name]}))
        return self[name]


@pytest.fixture(scope="module")
def found(place):
    return Found(place)


@pytest.fixture(scope="module")
def more(place):
    """What else is run, in one process: name -> (exit code, output)."""
    files = sorted(path.relative_to(WRITTEN) for path in WRITTEN.rglob("*.h5"))
    cases = {f"info {path}".replace("/", " "): Case("info", [f"written/{path}"], "") for path in files}
    cases["compared"] = Case("report", ["written/digits", "written/sol", "-o", "compared"], "")
    cases["seed"] = Case("train", ["digits.toml", "--run-dir", "seed", "--set", "run.seed=1"], "seed")
    return start(place, cases)


def file(place: Path) -> Path:
    """Where the hashes of an unknown processor go."""
    return Path(os.environ.get("DZHPC_RECORD") or place / "hashes-found.json").resolve()


def of_case(found, name: str):
    """Its footprint; skips where this processor cannot run the case, fails where it did not end well."""
    if name not in found:
        pytest.skip(f"{name}: this processor has no bfloat16 products")
    assert not found[name].failure, f"{name}: {found[name].failure}"
    return found[name]


NAMES = [pytest.param(name, marks=pytest.mark.long) if case.alone else name for name, case in CASES.items()]


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_that_are_stored(place, found, name):
    footprint, known = of_case(found, name), stored()["hashes"].get(key())
    if known is None:
        pytest.skip(
            f"no bits are stored for a processor of this kind, {key()}; those found are in {file(place)}: "
            f"python tests/regression/record.py --merge {file(place)}"
        )
    assert name in known, f"no bits are stored for {name} on {key()}: python tests/regression/record.py --only {name}"
    different = {group for group in footprint.hashes | known[name] if footprint.hashes.get(group) != known[name].get(group)}
    assert not different, f"{name}: {', '.join(sorted(different))} changed ({key()}); values now: {footprint.values}"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_near_those_of_any_processor(found, name):
    footprint, expected = of_case(found, name), stored()["values"][name]
    absolute = ABSOLUTE | {"grad_norm": CASES[name].rounding}
    assert footprint.values.keys() == expected.keys()
    far = {
        k: (v, expected[k])
        for k, v in footprint.values.items()
        if not math.isclose(v, expected[k], rel_tol=0 if k == "queries" else CASES[name].tolerance, abs_tol=absolute.get(k, 0))
    }
    assert not far, f"{name}: now, stored: {far}"


def test_what_is_stored_belongs_to_a_case():
    everything = stored()
    assert set(everything["values"]) == set(CASES)
    assert all(set(known) <= set(CASES) for known in everything["hashes"].values())


def test_two_ranks_give_the_same_bits(place, found):
    cases = {name: CASES[name] for name in RANKS}
    (place / "two").mkdir()
    set_up(place / "two")
    for name, (code, said) in start(place / "two", cases, ranks=2).items():
        assert code == 0, f"{name}: {said}"
        assert "ranks 0-1: " in said
        assert of(place / "two" / name).hashes == of_case(found, name).hashes


def test_a_command_line_gives_the_bits_of_the_batch(place, found):
    """The runs above share a process; here is one as a user types it."""
    command = [sys.executable, "-m", "dzhpc.train", "digits.toml", "--run-dir", "typed"]
    subprocess.run(command, cwd=place, check=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert of(place / "typed").hashes == of_case(found, "reuse").hashes


def test_another_seed_gives_other_bits(place, found, more):
    assert more["seed"][0] == 0
    one, other = of_case(found, "reuse").hashes, of(place / "seed").hashes
    assert one.keys() == other.keys() == {
        "params", "buffers", "optimizer", "coordinates", "lpr", "state", "train", "eval", "memory",
    }  # fmt: skip
    assert {group for group in one if one[group] != other[group]} >= set(one) - {"memory"}


def test_a_difference_of_one_bit_is_seen(tmp_path):
    path = tmp_path / "packed.h5"
    path.write_bytes((WRITTEN / "packed.h5").read_bytes())
    before = of(path).hashes
    with h5py.File(path, "r+") as opened:
        opened["train/images"][0, 0, 0, 0] ^= 1
    after = of(path).hashes
    assert before["test"] == after["test"] and before["train"] != after["train"]


def test_timings_are_no_part_of_a_footprint(place, found):
    of_case(found, "reuse")
    with h5py.File(place / "reuse" / "metrics.h5", "r+") as opened:
        assert sorted(set(opened["train"]) - {"step_s", "comm_s", "peak_bytes"}) == COLUMNS
        opened["train/step_s"][0] += 1.0
    assert of(place / "reuse").hashes == found["reuse"].hashes


@pytest.mark.parametrize(
    ("name", "after"),
    {"digits": "step 4 from", "adam": "step 6 from", "partial": "step 4: 14 of 24", "sol": "step 2 from"}.items(),
)
def test_runs_of_the_first_version_go_on(place, found, name, after):
    """Their rows are kept, and followed by two more."""
    of_case(found, f"restart-{name}")
    assert after in (place / "again" / name / "log.txt").read_text()
    old, new = (h5py.File(folder / name / "metrics.h5") for folder in (WRITTEN, place / "again"))
    with old, new:
        count = len(old["train/loss"])
        assert len(new["train/loss"]) == count + 2
        for column in ("loss", "grad_norm", "queries", "step_s"):
            assert (new[f"train/{column}"][:count] == old[f"train/{column}"][:]).all()


def test_a_step_left_by_the_first_version_is_completed_without_asking_twice(found):
    """78 queries in three steps; then base, 24 differences and an evaluation, twice, of which 14 are known but counted, too."""
    assert of_case(found, "restart-partial").values["queries"] == 78 + 1 + 2 * 25


def test_an_lpr_file_of_the_first_version_is_used(place, found):
    """Instead of the 14 queries that scoring costs."""
    assert of_case(found, "reuse").values["queries"] - of_case(found, "lpr").values["queries"] == 14
    checkpoint, written = h5py.File(max((place / "lpr" / "checkpoints").glob("*.h5"))), h5py.File(WRITTEN / "lpr.h5")
    with checkpoint, written:
        for name in ("layer", "size", "kept", "ratio"):
            assert checkpoint[f"lpr/{name}"][()].tolist() == written[name][()].tolist()


def test_certificates_of_the_first_version_are_gone_on_with(place, found):
    of_case(found, "certify-on")
    assert of(place / "again" / "certificates.h5").hashes == of_case(found, "certify").hashes
    old, new = (h5py.File(folder / "certificates.h5") for folder in (WRITTEN, place / "again"))
    with old, new:
        done = old["images/done"][()].nonzero()[0]
        assert len(done) >= 2
        for k in done:  # not made again: they kept their timings
            row = new["images/idx"][()].tolist().index(old["images/idx"][k])
            assert new["images/seconds"][row] == old["images/seconds"][k]


def test_info_and_report_read_files_of_the_first_version(place, more):
    said = {name: result for name, result in more.items() if name.startswith("info ")}
    assert [code for code, _ in said.values()] == [0] * len(said) and len(said) > 6
    assert all("complete = True\n" in text and "format_version = 1\n" in text for _, text in said.values())
    kinds = {line for _, text in said.values() for line in text.splitlines() if line.startswith("format = ")}
    assert kinds == {f"format = dzhpc-{kind}" for kind in ("checkpoint", "metrics", "lpr", "certificates", "reference", "data")}
    assert more["compared"][0] == 0
    table = (place / "compared" / "report.md").read_text()
    assert "| digits | 4 | 1.00 | 594 | 2.354 | 2.315 | 14.44 % |" in table and "| sol | 2 | 0.67 | 2,334 | 69.67 |" in table
