"""Engines side by side, and ranks side by side: what the verb prints is what it writes."""

import json
import os
import shutil
import sys

import pytest
from mpi_launch import Case, batch, run, sets

from dzhpc.job import processor


def bench(place, *args):
    return run([sys.executable, "-m", "dzhpc.bench", *args, "--json", "out.json"], place)


def test_gradient(place):
    """Without a compiler, which is not found where PATH leads nowhere."""
    model = ["--model", "cnn:1", "--batch", 4, "--coords", 24, "--reference", 24, "--repeats", 2, "--mu", 1e-3]
    precisions = ["fp32", "bf16"] if "bf16" in processor.instruction_set() else ["fp32"]
    words = ["gradient", *model, "--precisions", ",".join(precisions), "--json", "out.json"]
    result = batch(1, place, [Case("gradient", "bench", words, {"PATH": str(place)})])["gradient"]
    assert result.code == 0, result.err
    rows = json.loads((place / "out.json").read_text())["rows"]
    assert [(r["engine"], r["precision"]) for r in rows] == [
        ("full", "fp32"), ("reuse", "fp32"), *(("delta", precision) for precision in precisions),
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms_per_query"] <= row["ms_max"]
        assert f"| {row['engine']} | {row['precision']} | {row['ms_per_query']:.3g} (" in result.out
    full, reuse, exact, *rounded = (r["relative_error"] for r in rows)
    assert exact < 1e-3 and exact < reuse == full
    assert all(exact < error < 2e-2 for error in rounded)
    assert rows[1]["times_reuse"] == 1
    cge, rge, limit = json.loads((place / "out.json").read_text())["estimators"]
    assert (cge["queries"], rge["queries"], limit["queries"]) == (24, 16, 16)
    assert cge["relative_error"] < 0.05 and cge["cosine"] > 0.99
    assert rge["relative_error"] == pytest.approx(limit["relative_error"], rel=0.05)  # the same directions
    assert limit["relative_error"] == pytest.approx(limit["theory"], rel=0.5)


def test_stages(place):
    """CGE draws no directions; forward passes are as dear for both. How long each takes: benchmarks/results."""
    args = ["stages", "--model", "cnn:1", "--batch", 4, "--queries", 24, "--repeats", 2, "--json", "stages.json"]
    said = batch(1, place, [Case("stages", "bench", args, {"PATH": str(place)})])["stages"]  # no compiler there
    assert said.code == 0, said.err
    found = json.loads((place / "stages.json").read_text())
    rge, cge, delta = found["rows"]
    assert (found["parameters"], found["options"]["kind"]) == (730, "stages")
    assert rge["parts"]["direction vectors"] > 0 == cge["parts"]["direction vectors"]
    assert rge["parts"]["model inference"] == cge["parts"]["model inference"] > 0
    assert delta["seconds"] > 0 and f"| cge | delta |  |  |  |  | {delta['seconds']:.3g} |" in said.out


@pytest.mark.long
def test_scaling(place):
    (place / "sub").mkdir()
    (place / "sub" / "own.toml").write_text((place / "own.toml").read_text().replace("userland:", "beside:"))
    shutil.copy(place / "userland.py", place / "sub" / "beside.py")  # a user's module may lie beside the input
    result = bench(place, "scaling", "sub/own.toml", "--ranks", "1,2", "--steps", 3, *sets(sparsity__scores="random"))
    assert result.code == 0, result.err
    rows = json.loads((place / "out.json").read_text())["rows"]
    assert [r["ranks"] for r in rows] == [1, 2]
    for row in rows:
        assert 0 < row["forecast_s"] < 50 * row["step_s"]  # benchmarks/results/scaling.md: how close, on a quiet machine
        assert 0 < row["step_min"] <= row["step_s"] <= row["step_max"]
        assert 0 <= row["communication"] < 1
    assert rows[1]["speedup"] == pytest.approx(rows[0]["step_s"] / rows[1]["step_s"])


def test_what_cannot_be_measured_is_said_in_one_line(place):
    os.mkfifo(place / "pipe")
    scaling = ["scaling", "digits.toml", "--ranks"]
    cases = {
        "model": (["gradient", "--model", "resnet21"], "resnet21"),
        "no number": (["gradient", "--model", "cnn:deep"], "--model cnn:deep: expected NAME or NAME:DEPTH"),
        "too deep": (["gradient", "--model", "cnn:999", "--batch", 2], "model cnn:999 cannot take inputs [3, 32, 32]"),
        "weights": (["gradient", "--model", "cnn:1", "--weights", "digits.toml"], "digits.toml: is no file of torch.save"),
        "json": (["gradient", "--model", "cnn:1", "--json", "pipe"], "pipe: cannot be written"),
        "ranks": ([*scaling, "one"], "--ranks"),
        "none": ([*scaling, "1,0"], "--ranks"),
        "plot": ([*scaling, 1, "--plot", "a.docx"], "--plot a.docx: expected a name that ends in .png, .pdf, .svg"),
        "input": (["scaling", "nowhere.toml"], "nowhere.toml: cannot be read"),
    }
    done = batch(1, place, [Case(name, "bench", args) for name, (args, _) in cases.items()])
    for name, (_, line) in cases.items():
        done[name].error(2, line)
