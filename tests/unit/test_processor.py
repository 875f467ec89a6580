"""One place says which instructions are used, and torch's own switch hides them from all that is ours and from the compiler."""

import os
import subprocess
import sys

import pytest
import torch

from dzhpc.job import device, processor

CODE = """
import torch
from torch import nn
from dzhpc.job import device
from dzhpc.job import processor
from dzhpc.engines import make_engine
from dzhpc.errors import InputError
from dzhpc.engines.kernels import compiled as programs
from dzhpc.engines.kernels import library
from torch._inductor.cpu_vec_isa import pick_vec_isa
print(processor.instruction_set())
print(*sorted(processor.capabilities()))
print(device.has_fast_bf16(torch.device("cpu")), any("avx512" in flag for flag in library._flags()), pick_vec_isa())
print(programs.half_filled([torch.zeros(2, 16, dtype=torch.bfloat16)]))
make_engine("delta", nn.Linear(3, 2), "cross_entropy", "bf16", emulate_bf16=True)
try:
    make_engine("delta", nn.Linear(3, 2), "cross_entropy", "bf16")
except InputError as error:
    print(error)
"""
COMPILED = """
import sys, torch
from dzhpc.engines.kernels.compiled import Programs
from torch._inductor.cpu_vec_isa import pick_vec_isa
torch.manual_seed(0)
x = torch.randn(70, 2**12 - 3, dtype=torch.float32)
function = lambda a: [torch.tanh(a * 2 + 1).mean(1), a.sigmoid()]
found = Programs(torch.device("cpu"), torch.float32, sys.exit).build(function, [x], [None])(lambda k: x)
print(max(float((f.double() - e).abs().max()) for f, e in zip(found, function(x.double()))))
print(pick_vec_isa())
"""


def python(code, **env):
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "1", **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_what_torch_uses_is_named():
    level = torch.backends.cpu.get_cpu_capability()
    assert processor.instruction_set().split("+")[0] in ("neon", level.lower().replace(" ", ""))
    every = {name for name, present in torch.cpu.get_capabilities().items() if present is True}
    assert processor.capabilities() <= every
    if level == "AVX512":
        assert processor.capabilities() == every
        assert ("+bf16" in processor.instruction_set()) == ("avx512_bf16" in every)
    assert device.has_fast_bf16(torch.device("cpu")) == ("bf16" in processor.instruction_set())
    assert processor.name()
    described = f"cpu {processor.name()}, {processor.instruction_set()} ({torch.get_num_threads()} threads)"
    assert device.describe(torch.device("cpu")) == described


@pytest.mark.skipif(torch.cpu.get_capabilities()["architecture"] != "x86_64", reason="the switch is for x86's vectors")
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_the_switch_hides_wider_vectors_and_their_products(level):
    lines, _ = python(CODE, ATEN_CPU_CAPABILITY=level)
    have = set(lines[1].split())
    assert lines[0] == level
    assert not any(name.startswith(("avx512", "avx10", "amx")) or "bf16" in name for name in have)
    assert ("avx2" in have) == (level == "avx2" and torch.cpu.get_capabilities()["avx2"])
    assert lines[2] == f"False False {'avx2' if level == 'avx2' else 'INVALID_VEC_ISA'}"
    assert lines[3] == "False"
    assert lines[4].startswith('zo.precision = "bf16": this hardware has no bfloat16 products')
    assert 'use "fp32" (or force it by zo.emulate_bf16 = true)' in lines[4]


@pytest.mark.long
@pytest.mark.skipif("avx512_f" not in processor.capabilities(), reason="has no wider vectors than the narrower ones")
def test_code_compiled_for_wider_vectors_is_not_taken_for_narrower_ones():
    """One cache, filled by a process that uses all there is, then read by one that may not."""
    for level, used in (("avx512", "avx512"), ("avx2", "avx2")):
        lines, _ = python(COMPILED, ATEN_CPU_CAPABILITY=level)
        assert lines[1].split()[0] == used
        assert float(lines[0]) < 1e-5
