"""Reference trajectories over ranks: the same bits for any number, after a stop and after a kill; nothing is made twice."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_launch import Case, Result, assert_same, batch, contents, sets

from dzhpc.tasks.sol import reference
from dzhpc.tasks.sol.simulation import load_part

WAKE = """
[task]
kind = "sol"
resolution = 16
factor = 2
warm_up = 6
frames = 5
train_parameters = [2e5, 3e5, 4e5]
valid_parameters = [3e5]
test_parameters = [5e5, 2.5e5]
[run]
deadline_margin = 0.6
"""
OWN = """
[task]
kind = "sol"
simulator = "springs:step"
reference = "springs:trajectory"
warm_up = 2
frames = 3
retries = 0
train_parameters = [1.0, 2.0, 4.0, 5.0]
valid_parameters = [3.0]
test_parameters = [-1.0]
"""
SPRINGS = '''
"""A decay, solved exactly. Writes down what it is asked, and may break or answer nonsense."""
import os
from pathlib import Path
import numpy as np
def step(states, parameters):
    return states * (1 - 0.1 * parameters[:, None])
def trajectory(parameter):
    with open(Path(__file__).parent / f"asked-{os.environ.get('ASKED')}", "a") as file:
        print(parameter, file=file)
    if parameter == float(os.environ.get("BROKEN", "nan")):
        raise RuntimeError("out of order")
    frames = 4 if "SHORT" in os.environ else 5
    states = np.exp(-0.1 * parameter * np.arange(frames))[:, None] * np.arange(1.0, 4.0)
    if "LOST" in os.environ:
        states[3] = np.nan
    return states
'''
LONG = sets(task__warm_up=300, task__frames=100)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two input files and the user's module."""
    folder = tmp_path_factory.mktemp("simulate")
    (folder / "wake.toml").write_text(WAKE)
    (folder / "own.toml").write_text(OWN)
    (folder / "springs.py").write_text(SPRINGS)
    return folder


def made(place: Path, name: str) -> dict[float, int]:
    """States of each simulation in the parts of a file."""
    abouts = [load_part(path)[1] for path in (place / f"{name}.h5.parts").glob("*.h5")]
    return {about["parameter"]: about["made"] for about in abouts}


@pytest.fixture(scope="module")
def disturbed(place):
    """Jobs of three ranks of which one gets a signal in the middle: name -> (result, states made by then)."""

    def disturb(name: str, number: int) -> tuple[Result, dict[float, int]]:
        def meanwhile(job) -> None:
            end = time.monotonic() + 60
            while not any(0 < count < 400 for count in made(place, name).values()):
                assert time.monotonic() < end
                time.sleep(0.01)
            os.kill(job.processes()[1], number)

        case = Case(name, "simulate", ["wake.toml", "-o", f"{name}.h5", *LONG], {"SAVE_EVERY": "0.1"})
        return batch(3, place, [case], meanwhile=meanwhile)[name], made(place, name)

    return {"stopped": disturb("stopped", signal.SIGUSR1), "killed": disturb("killed", signal.SIGKILL)}


@pytest.fixture(scope="module")
def done(place, disturbed):
    """Several command lines on one rank and on three; results by name."""
    (place / "stop.h5.parts").mkdir()
    (place / "stop.h5.parts" / "STOP").touch()

    def case(name: str, source: str, *args: str, out: str | None = None, **env: str) -> Case:
        return Case(name, "simulate", [f"{source}.toml", "-o", f"{out or name}.h5", *args], {"ASKED": name, **env})

    three = batch(3, place, [
        case("three", "wake"), case("again", "wake", out="three"), case("killed-rest", "wake", *LONG, out="killed"),
        case("broken", "own", BROKEN="5.0"), case("rest", "own", out="broken"), case("stop", "wake"),
        case("unstable", "wake", *sets(task__test_parameters=[1e-36])),
    ])  # fmt: skip
    one = batch(1, place, [
        case("one", "wake"), case("long", "wake", *LONG), case("stopped-rest", "wake", *LONG, out="stopped"),
        case("own", "own"), case("short", "own", SHORT="1"), case("lost", "own", LOST="1"),
        case("phiflow", "wake", *sets(task__simulator="phiflow")),
        case("other-constant", "wake", *sets(task__radius=11.0), out="three"),
        case("other-list", "wake", *sets(task__test_parameters=[5e5]), out="three"),
        case("no-folder", "wake", out="nowhere/file"), case("kind", "wake", *sets(task__kind="classification")),
        case("no-reference", "wake", *sets(task__simulator="springs:step")),
        case("not-own", "wake", *sets(task__reference="springs:trajectory")),
        case("empty", "wake", *sets(task__valid_parameters=[])),
        case("negative", "wake", *sets(task__test_parameters=[-1.0])),
    ])  # fmt: skip
    return one | three


def test_bits_do_not_depend_on_the_number_of_ranks(place, done):
    done["one"].succeeded(), done["three"].succeeded()
    assert_same(contents(place / "one.h5"), contents(place / "three.h5"))
    splits, about = reference.read(place / "three.h5")
    assert {split: (states.shape, list(ps)) for split, (states, ps) in splits.items()} == {
        "train": ((3, 5, 2, 17, 33), [2e5, 3e5, 4e5]),
        "valid": ((1, 5, 2, 17, 33), [3e5]),
        "test": ((2, 5, 2, 17, 33), [5e5, 2.5e5]),
    }
    assert np.array_equal(splits["valid"][0][0], splits["train"][0][1])
    assert np.abs(np.diff(splits["train"][0], axis=1)).max((2, 3, 4)).min() > 1e-4
    expected = {"resolution": 16, "factor": 2, "radius": 10.0, "warm_up": 6, "frames": 5, "simulator": "projected", "dt": 1.0}
    assert {key: about[key] for key in expected} == expected
    assert not (place / "three.h5.parts").exists()


def test_phiflow_makes_the_same_reference(place, done):
    done["phiflow"].succeeded()
    fast, slow = (reference.read(place / f"{name}.h5")[0] for name in ("one", "phiflow"))
    assert 0 < np.abs(fast["test"][0] - slow["test"][0]).max() < 1e-4


def test_a_file_that_is_whole_is_left_alone(place, done):
    assert "three.h5: nothing left to do" in done["again"].succeeded().out
    done["other-constant"].error(2, "three.h5 was made with radius = 10.0, now 11.0; choose another file with -o")
    done["other-list"].error(2, "three.h5 was made with test_parameters = [500000.0, 250000.0], now [500000.0]")


def test_a_signal_stops_it_in_the_middle_of_a_simulation(place, disturbed, done):
    result, before = disturbed["stopped"]
    assert result.code == 75, result.err
    assert "stopped: signal received; the same command goes on" in result.out
    assert any(0 < count < 400 for count in before.values())
    done["stopped-rest"].succeeded(), done["long"].succeeded()
    line = next(x for x in done["stopped-rest"].out.splitlines() if x.startswith("simulations done"))
    assert int(line.split(", ")[1].split(" ")[0].replace(",", "")) >= sum(before.values())  # it went on from there
    assert_same(contents(place / "stopped.h5"), contents(place / "long.h5"))


def test_a_kill_costs_little(place, disturbed, done):
    result, before = disturbed["killed"]
    assert result.code not in (0, 75)
    assert sum(before.values()) > 0
    lines = done["killed-rest"].succeeded().out.splitlines()
    assert lines[0].startswith("killed.h5: ")  # what comes before it waits for it
    assert lines[1].startswith("took over killed.h5 from ")
    line = next(x for x in lines if x.startswith("simulations done"))
    assert int(line.split(", ")[1].split(" ")[0].replace(",", "")) >= sum(before.values())
    assert_same(contents(place / "killed.h5"), contents(place / "long.h5"))


def test_the_users_reference_is_asked_once_a_parameter(place, done):
    done["own"].succeeded()
    splits, about = reference.read(place / "own.h5")
    states, parameters = splits["train"]
    expected = np.exp(-0.1 * parameters[:, None] * np.arange(2, 5))[..., None] * np.arange(1.0, 4.0)
    np.testing.assert_allclose(states, expected, rtol=1e-6)
    assert (about["staggered"], about["reference"]) == (False, "springs:trajectory")
    assert sorted((place / "asked-own").read_text().split()) == ["-1.0", "1.0", "2.0", "3.0", "4.0", "5.0"]


def test_what_is_done_when_one_breaks_is_not_done_again(place, done):
    done["broken"].error(6, "task.reference = springs:trajectory: RuntimeError: out of order")
    done["rest"].succeeded()
    asked = [(place / f"asked-{name}").read_text().split() for name in ("broken", "rest")]
    assert set(asked[0]) | set(asked[1]) == {"-1.0", "1.0", "2.0", "3.0", "4.0", "5.0"}
    assert set(asked[0]) & set(asked[1]) == {"5.0"}
    assert_same(contents(place / "broken.h5"), contents(place / "own.h5"))


def test_the_file_stop_ends_it_in_good_order(place, done):
    assert "stopped: STOP file found; the same command goes on" in done["stop"].succeeded().out
    assert not (place / "stop.h5").exists()
    assert not (place / "stop.h5.parts" / "STOP").exists()


def test_bad_input_and_bad_numbers_are_named(done):
    done["no-folder"].error(2, "nowhere/file.h5: the folder nowhere does not exist")
    done["kind"].error(2, 'task.kind = "classification", expected "sol"')
    done["no-reference"].error(2, "task.reference: needed for task.simulator = springs:step")
    done["not-own"].error(2, "task.reference = springs:trajectory: belongs to a task.simulator of your own")
    done["empty"].error(2, "task.valid_parameters = []: expected at least one")
    done["negative"].error(2, "task.test_parameters = [-1.0]: expected numbers above 0")
    done["short"].error(2, "task.reference = springs:trajectory gave [4, 3]; expected [5, ...]")
    done["lost"].error(5, "the reference simulation of parameter 1 is not finite at frame 3")
    done["unstable"].error(5, "the reference simulation of parameter 1e-36 is not finite at frame 1")
