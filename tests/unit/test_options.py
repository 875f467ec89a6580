"""Numbers of a command line have bounds, too; more memory than there is is bad input."""

import argparse

import numpy as np
import pytest
import torch

from dzhpc import bench
from dzhpc.errors import InputError, exit_code_of, message_of
from dzhpc.job.failure import keep_traceback
from dzhpc.tasks.defense.methods import check


@pytest.mark.parametrize(
    "option",
    [
        "--batch=0", "--batch=1e3", "--coords=99999999999", "--threads=1000000000000", "--repeats=0", "--mu=inf", "--mu=nan",
        "--ratio=1", "--ratio=-0.1", "--seed=-1", "--memory-mb=0", "--reference=x",
    ],
)  # fmt: skip
def test_bench_refuses_numbers_that_mean_nothing(option, capsys):
    with pytest.raises(SystemExit) as leave:
        bench.parser().parse_args(["gradient", option])
    name, value = option.split("=")
    assert leave.value.code == 2 and f"argument {name}: {value}: expected " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["n", "n0", "batch", "images"])
@pytest.mark.parametrize("value", [0, 2**64])
def test_certify_refuses_numbers_that_no_file_could_hold(name, value):
    options = {"n": 1, "n0": 1, "batch": 1, "images": None, "sigma": None, "grid": 0.25} | {name: value}
    with pytest.raises(InputError, match=f"--{name} {value}: expected at (least|most)"):
        check(argparse.Namespace(**options, alpha=0.1, label=None, sources=[], out=None, no_denoiser=False))


@pytest.mark.parametrize("ask", [lambda: np.zeros(2**58), lambda: torch.zeros(2**58), lambda: bytearray(2**60)])
def test_too_little_memory_is_one_line_and_bad_input(ask, tmp_path, capsys):
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        ask()
    assert exit_code_of(caught.value) == 2
    assert message_of(caught.value).startswith("out of memory: ") and "\n" not in message_of(caught.value)
    assert keep_traceback(caught.value, 0, tmp_path) == "" and capsys.readouterr().err == ""
