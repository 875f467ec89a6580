"""benchmarks/gpu.py: whatever a stage dies of, the others are carried out, and what was found is on the disk at any time."""

import importlib.util
import json
import sys
import time

import pytest


@pytest.fixture
def script(project, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_script", project / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    spec.loader.exec_module(module)
    return module


def test_a_stage_that_fails_or_hangs_leaves_the_others_alone(script, monkeypatch, tmp_path):
    python = [sys.executable, "-S", "-c"]
    stages = {
        "raises": lambda session: 1 / 0,
        "hangs": lambda session: session.run("hangs", [*python, "import time; time.sleep(100)"], 0.3),
        "leaves": lambda session: session.run("leaves", [*python, "print('a word'); raise SystemExit(3)"], 20),
        "works": lambda session: [
            session.run("works", [*python, "print(6 * 7)"], 20),
            json.loads((tmp_path / "gpu.json").read_text()),
        ],
        "late": lambda session: "never",
    }
    monkeypatch.setattr(script, "STAGES", stages)
    session = script.Session(tmp_path, time.monotonic() + 100, True, found={"stages": {"machine": {"state": "done"}}})
    assert script.carry_out(session, ["raises", "hangs", "leaves", "works"]) == 3
    session.deadline = time.monotonic() + 4
    assert script.carry_out(session, ["late"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {name: stage["state"] for name, stage in found.items()} == {
        "machine": "done", "raises": "failed", "hangs": "failed", "leaves": "failed", "works": "done", "late": "failed",
    }  # fmt: skip
    assert found["raises"]["why"] == "ZeroDivisionError: division by zero"
    assert found["hangs"]["why"].startswith("StageError: not over after 0 s: ")
    assert found["leaves"]["why"].startswith("StageError: exit code 3: ") and found["leaves"]["why"].endswith("a word")
    assert found["late"]["why"] == "StageError: no time is left"
    said, meanwhile = found["works"]["found"]
    assert said == "42\n" and meanwhile["stages"]["works"]["state"] == "running"
    assert (tmp_path / "leaves.log").read_text() == "a word\n"
