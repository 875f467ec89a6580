"""Which rank has which GPU, and who would compute other bits: both are refused; missing CUDA is said once."""

import subprocess
import sys

import pytest

from dzhpc.errors import LaunchError
from dzhpc.job import device


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in device.GPUS_ASKED_FOR:
        monkeypatch.delenv(name, raising=False)


def ranks(*places):
    return [(rank, host, f"cuda:0 H200 {gpu}" if gpu else "cpu (1 threads)", gpu) for rank, (host, gpu) in enumerate(places)]


def test_a_gpu_that_two_ranks_would_use_is_refused_by_name():
    shared = ranks(("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("a", "GPU-1"))
    with pytest.raises(LaunchError, match=r"ranks 0, 3 on host a would share GPU-1;.*--set run\.share_gpu=true"):
        device.check_binding(shared, share=False)
    assert device.check_binding(shared, share=True) is None


def test_one_gpu_a_rank_and_many_ranks_on_a_cpu_are_fine(caplog):
    device.check_binding(ranks(("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")), share=False)
    device.check_binding(ranks(("a", ""), ("a", "")), share=False)
    assert caplog.text == ""


@pytest.mark.parametrize("name", device.GPUS_ASKED_FOR)
def test_gpus_of_slurm_that_cuda_does_not_see_are_said(caplog, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    device.check_binding(ranks(("a", ""), ("a", "")), share=False)
    assert [r.message for r in caplog.records] == [f"{name} = 2, but CUDA is not available: running on the CPU"]
    caplog.clear()
    device.check_binding(ranks(("a", "GPU-1")), share=False)
    assert caplog.records == []


def test_ranks_that_would_compute_other_bits_are_refused_by_host_and_difference(caplog):
    same = device.environment(device.torch.device("cpu"), {"compiled": "True", "kernels": "none"})
    assert {"device", "torch", "instruction set", "compiled", "kernels"} == set(same)
    assert device.check_environments([("a", same)] * 3, mixed=False) is None
    other = same | {"compiled": "False", "instruction set": "other"}
    ranks = [("a", same), ("a", same), ("b", other), ("c", other)]
    difference = r"rank 2 on host b has instruction set = other, compiled = False; rank 0 on host a has instruction set = .*True"
    with pytest.raises(LaunchError, match=rf"^{difference}.*--set run\.mixed_nodes=true$"):
        device.check_environments(ranks, mixed=False)
    assert caplog.records == []
    device.check_environments(ranks, mixed=True)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "bits may depend on the number of ranks" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_node_local_rank_modulo_the_visible_devices(monkeypatch, count):
    """Four tasks that see one device each (--gpus-per-task=1), or a node's two or four."""
    chosen = []
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(device.torch.cuda, "set_device", lambda d: chosen.append(d.index))
    assert [device.choose(local, 1).index for local in range(4)] == chosen == [local % count for local in range(4)]


def test_the_table_names_rank_host_and_device():
    assert device.table(ranks(("node1", "GPU-1"), ("n2", ""))) == [
        "rank 0: node1, cuda:0 H200 GPU-1",
        "rank 1: n2, cpu (1 threads)",
    ]
    places = [("a", "")] * 3 + [("b", "")] * 2 + [("a", "")]
    assert device.table(ranks(*places)) == ["ranks 0-2,5: a, cpu (1 threads)", "ranks 3-4: b, cpu (1 threads)"]
    assert [(one["ranks"], one["count"]) for one in device.grouped(ranks(*places))] == [("0-2,5", 4), ("3-4", 2)]


PEAKS = """
import torch
from dzhpc.job.device import PeakMemory

for _ in range(3):
    with PeakMemory(torch.device("cpu")) as memory:
        blocks = [torch.zeros(2**22) for _ in range(10)]
    print(memory.bytes / 2**20)
    del blocks
"""


def test_memory_that_was_freed_before_counts_in_a_peak():
    """In a process of its own: what other threads free meanwhile would be taken off. Blocks of 16 MiB are of the heap."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, timeout=120)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([160] * 3, rel=0.1), done.stderr


FAULTS = """
import resource, sys, torch
from dzhpc.job.device import keep_memory

if sys.argv[1] == "kept":
    keep_memory()
for _ in range(int(sys.argv[3])):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(int(sys.argv[2]) << 18) for _ in range(4)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("mib", [40, 100])
def test_memory_of_large_tensors_is_used_again_without_new_pages(mib):
    """Once the heap has settled: glibc's aligned blocks leave gaps, so that it is more than what is needed at once."""
    found = {}
    for how, times in (("kept", "10"), ("returned", "2")):
        done = subprocess.run([sys.executable, "-c", FAULTS, how, str(mib), times], capture_output=True, text=True, timeout=120)
        found[how] = [int(line) for line in done.stdout.split()]
    pages = 4 * mib * 256
    assert sum(found["kept"][-4:]) < pages / 100 < pages / 2 < min(found["returned"]), found
