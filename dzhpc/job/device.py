"""The device of a rank, its threads, and the switches that make results reproducible."""

import contextlib
import ctypes
import gc
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dzhpc.errors import LaunchError
from dzhpc.job import processor

log = logging.getLogger("dzhpc")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
GPUS_ASKED_FOR = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_TASK")


def choose(local_rank: int, threads: int) -> torch.device:
    """The node's GPU number ``local_rank`` modulo the visible ones, else the CPU; sets threads and determinism."""
    cpu(threads)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def cpu(threads: int) -> torch.device:
    """The CPU; sets threads and the switches that make results reproducible on any device."""
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with a fixed workspace
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # autotuning would pick kernels by chance
    torch.backends.cudnn.deterministic = True
    return torch.device("cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, as far as this process may use it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any("bf16" in name for name in processor.capabilities())


def describe(device: torch.device) -> str:
    """A CPU's name, instructions in use and threads; a GPU's name and UUID."""
    if device.type == "cpu":
        return f"cpu {processor.name()}, {processor.instruction_set()} ({torch.get_num_threads()} threads)"
    return f"{device} {torch.cuda.get_device_properties(device).name} {uuid(device)}"


def uuid(device: torch.device) -> str:
    """What tells a GPU from all others; "" for a CPU."""
    return "" if device.type == "cpu" else f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def environment(device: torch.device, engine: Mapping[str, str]) -> dict[str, str]:
    """What a rank's bits depend on beside the input. engine: what its engine adds (``engine.environment``)."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_properties(device).name
    return {"device": name, "torch": str(torch.__version__), "instruction set": processor.instruction_set(), **engine}


def check_environments(ranks: Sequence[tuple[str, Mapping[str, str]]], mixed: bool) -> None:
    """Look at all ranks' (host, :func:`environment`) together, the root's first.

    Raises LaunchError if a rank would compute other bits than the root, unless nodes may be ``mixed``, which is a warning.
    """
    (home, root), *others = ranks
    for rank, (host, found) in enumerate(others, 1):
        if not (names := [name for name in root if found[name] != root[name]]):
            continue
        theirs, ours = (", ".join(f"{name} = {values[name]}" for name in names) for values in (found, root))
        difference = f"rank {rank} on host {host} has {theirs}; rank 0 on host {home} has {ours}"
        if not mixed:
            raise LaunchError(
                f"{difference}: bits would depend on the number of ranks; use nodes of one kind, or allow it with "
                f"--set run.mixed_nodes=true"
            )
        log.warning("%s: bits may depend on the number of ranks", difference)
        return


def check_binding(ranks: Sequence[tuple[int, str, str, str]], share: bool) -> None:
    """Look at all ranks' (rank, host, device, uuid) together.

    Raises LaunchError if two ranks have one GPU, unless they may share it; warns where Slurm gave GPUs that CUDA does not see.
    """
    users: dict[tuple[str, str], list[int]] = {}
    for rank, host, _, gpu in ranks:
        if gpu:
            users.setdefault((host, gpu), []).append(rank)
    for (host, gpu), several in users.items():
        if len(several) > 1 and not share:
            raise LaunchError(
                f"ranks {', '.join(map(str, several))} on host {host} would share {gpu}; start one rank a GPU, "
                f"or allow it with --set run.share_gpu=true"
            )
    asked = next((name for name in GPUS_ASKED_FOR if os.environ.get(name) not in (None, "", "0")), None)
    if asked and not users:
        log.warning("%s = %s, but CUDA is not available: running on the CPU", asked, os.environ[asked])


def grouped(ranks: Sequence[tuple[int, str, str, str]]) -> list[dict[str, object]]:
    """All ranks' (rank, host, device, uuid), those of one host and device together: ranks ("0-63,128"), count, and where."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for rank, *place in ranks:
        found.setdefault(tuple(place), []).append(rank)
    names = ("host", "device", "uuid")
    return [{"ranks": _runs(own), "count": len(own), **dict(zip(names, place, strict=True))} for place, own in found.items()]


def _runs(numbers: Sequence[int]) -> str:
    """Sorted numbers as ``0-3,7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def table(ranks: Sequence[tuple[int, str, str, str]]) -> list[str]:
    """Ranks, host and device, a line for each device."""
    lines = [(f"rank{'s' if one['count'] > 1 else ''} {one['ranks']}", one) for one in grouped(ranks)]
    return [f"{name}: {one['host']}, {one['device']}" for name, one in lines]


def peak_bytes(device: torch.device, engine_bytes: int) -> int:
    """Peak device memory; on a CPU what the engine keeps, which unlike the process's size does not depend on chance."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else engine_bytes


class Stopwatch:
    """``with Stopwatch(device) as watch``: afterwards ``watch.seconds`` is what it took.

    On a GPU that is the device's own time, for which nobody waits meanwhile: ask once the work is known to be done.
    """

    def __init__(self, device: torch.device):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._from = self._until = 0.0

    def __enter__(self) -> "Stopwatch":
        if self._events:
            self._events[0].record()
        self._from = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self._until = time.perf_counter()
        if self._events:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Between beginning and end."""
        if self._events:
            self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._until - self._from


def keep_memory() -> None:
    """Let what is freed stay with this process (glibc): tensors come and go by the megabyte, and fresh pages take their time.

    No threshold keeps those of more than 32 MiB, hence no mappings at all. A process then holds what it once needed, and the gaps
    that aligned blocks leave: up to 1.6 times as much as it would.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class PeakMemory:
    """``with PeakMemory(device) as memory``: afterwards ``memory.bytes`` is what was used at most beyond what was there before.

    On a CPU it is resident memory, reset and read through /proc; 0 where that is not to be had.
    """

    def __init__(self, device: torch.device):
        self._device, self.bytes = device, 0

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            gc.collect()
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)  # what was freed before and is used again counts, too
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error) -> None:
        cuda = self._device.type == "cuda"
        self.bytes = (torch.cuda.max_memory_allocated(self._device) if cuda else _resident("VmHWM")) - self._before


def _resident(name: str) -> int:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError):
        return 0


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
