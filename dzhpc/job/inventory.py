"""What a job runs on: ranks, hosts, devices, libraries."""

import importlib.metadata
import os
import platform
import socket

import torch

from dzhpc.job import device as devices
from dzhpc.job.world import World

LIBRARIES = ("dzhpc", "torch", "torchvision", "numpy", "mpi4py", "h5py", "pydantic")


def inventory(world: World) -> str:
    """The job as text, a line a rank. Collective; "" on other ranks than the root."""
    device = devices.choose(world.local_rank, 1)
    rows = world.gather((world.rank, socket.gethostname(), world.local_rank, devices.describe(device), os.getpid()))
    if not world.is_root:
        return ""
    lines = [f"{world.size} ranks, MPI: {world.library}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    lines.append(f"  CUDA {torch.version.cuda if torch.cuda.is_available() else 'not available'}, {os.cpu_count()} CPU cores")
    for rank, host, local_rank, device, pid in rows:
        lines.append(f"rank {rank}: host {host}, local rank {local_rank}, {device}, process {pid}")
    return "\n".join(lines)
