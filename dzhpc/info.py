"""Verb: ranks, hosts, devices, libraries (under mpirun); what an .h5 file of ours holds; every key of an input file."""

import argparse
import importlib.metadata
import os
import platform
import socket

import torch

from dzhpc import config as configuration
from dzhpc.files import store
from dzhpc.job import device as devices
from dzhpc.job.world import World, run_verb

LIBRARIES = ("dzhpc", "torch", "torchvision", "numpy", "mpi4py", "h5py", "pydantic")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.info", description="What this job, a file, or an input key is.")
    p.add_argument(
        "what", nargs="?", metavar="FILE|keys", help="an .h5 file written by dzhpc, or the word keys; nothing: this job"
    )
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    if args.what is None:
        return _job(world)
    print_on_root = print if world.is_root else lambda text: None
    print_on_root(world.on_root(keys if args.what == "keys" else lambda: store.describe(args.what)))
    return 0


def _job(world: World) -> int:
    device = devices.choose(world.local_rank, 1)
    rows = world.gather((world.rank, socket.gethostname(), world.local_rank, devices.describe(device), os.getpid()))
    if world.is_root:
        print(f"{world.size} ranks, MPI: {world.library}, Python {platform.python_version()}, {platform.platform()}")
        for name in LIBRARIES:
            print(f"  {name} {importlib.metadata.version(name)}")
        print(f"  CUDA {torch.version.cuda if torch.cuda.is_available() else 'not available'}, {os.cpu_count()} CPU cores")
        for rank, host, local_rank, device, pid in rows:
            print(f"rank {rank}: host {host}, local rank {local_rank}, {device}, process {pid}")
    return 0


def keys() -> str:
    """Every key with default and meaning, as a Markdown table a section; [task] has one for each kind."""
    lines = []
    for heading, _, section in configuration.tables():
        lines += ["", f"## {heading}", section.__doc__, "", "| key | default | meaning |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            default = "unset" if field.default is None else repr(field.default)
            lines.append(f"| {name} | {default} | {field.description} |".replace(" | | ", " | "))
    return "\n".join(lines[1:])


if __name__ == "__main__":
    run_verb(parser(), main)
