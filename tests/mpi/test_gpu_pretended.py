"""benchmarks/gpu.py on the CPU, at toy size: all that a GPU will be asked for."""

import json
import sys

import pytest
from mpi_launch import run


@pytest.mark.long
def test_pretended_all_stages_are_done(project, place):
    result = run([sys.executable, project / "benchmarks" / "gpu.py", "--out", place / "gpu", "--pretend"], place, timeout=400)
    assert result.code == 0, result.out
    found = json.loads((place / "gpu" / "gpu.json").read_text())
    stages = found["stages"]
    assert found["pretended"] and {name: stage["state"] for name, stage in stages.items()} == dict.fromkeys(
        ["machine", "tests", "accuracy", "bench", "roofline", "ranks", "train"], "done"
    )
    assert stages["tests"]["found"]["pytest"].startswith("2 passed")
    assert len(stages["accuracy"]["found"]["rows"]) == 3 and "missed" not in "".join(stages["accuracy"]["found"]["rows"])
    assert [row["engine"] for row in stages["bench"]["found"]["rows"]] == ["full", "reuse", "delta"]
    roofline = stages["roofline"]["found"]["fp32"]
    assert min(roofline["machine"].values()) > 0 and roofline["work"]["passes"]["bytes"] > 0
    assert len(stages["ranks"]["found"]["theta of 1 and 2 ranks"]) == 64
    assert [row[0] for row in stages["train"]["found"]["train"]] == [1, 2]
    assert stages["train"]["found"]["checkpoints"][-1].endswith("step-00000002.h5")
