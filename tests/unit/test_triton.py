"""The Triton kernels without a GPU: interpreted, compiled ahead, and what an engine gives them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from pretended import Pretended

from dzhpc.engines import make_engine
from dzhpc.models.resnet import ResNet

pytest.importorskip("triton", reason="triton is not installed; it comes with PyTorch's wheels for CUDA")


@pytest.mark.parametrize(("chosen", "count"), [("20-700", 2), pytest.param("", 8, marks=pytest.mark.long)], ids=["some", "all"])
def test_interpreted_they_agree_with_float64(project, chosen, count):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/unit/interpreted.py", "-k", chosen]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.search(rf"\b{count} passed", done.stdout), done.stdout + done.stderr


def test_an_engine_gives_them_rows_of_channels():
    """On pretended tensors, which see to it that nothing else is given; a compiled program does what they do not know."""
    with Pretended() as gpu:
        network = ResNet([2, 1], [4, 8], False, 10, 3).to("cuda", memory_format=torch.channels_last)
        engine = make_engine("delta", network, "cross_entropy", "bf16")
        engine.bind(torch.randn(8, 3, 8, 8).to("cuda"), torch.randint(0, 10, (8,)).to("cuda"))
        assert engine.environment == {"compiled": "True", "kernels": "triton fp32, bf16"}
        gpu.launches.clear()
        engine.differences([0], 1e-3)
    ours = {name: count for name, count in gpu.launches.items() if not name.startswith("aten")}
    assert ours == {"sums": 4, "carry relu": 3, "carry sum relu": 1}  # not: a sum with one channel, a mean over pixels behind
