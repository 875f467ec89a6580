"""What it takes to start: seconds, modules, files and memory of a rank.

    python benchmarks/startup.py verbs                                      # of each verb, before its first collective
    mpirun -n 16 python benchmarks/startup.py ranks inputs/cnn.toml --set stop.steps=1      # of train, before its first step

Files are those that strace sees opened (the package strace). Memory: PSS counts a page that k processes share as 1/k of it in
each, so that the sum over ranks is what a node needs; RSS counts it k times.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

VERBS = ("train", "prune", "certify", "simulate", "evaluate", "fetch", "report", "bench", "info", "new")
MODULES = (
    "import sys, runpy\ntry: runpy.run_module('dzhpc.{}', run_name='__main__')\nfinally: print(len(sys.modules), file=sys.stderr)"
)
FEW = {"info": ["keys"]}  # the other verbs are asked for --help: it is said after the first collective


def verbs() -> None:
    """A table of the verbs; seconds are the least of three starts."""
    print("| verb | s | CPU s | modules | files opened | failed lookups |", "|---" * 6 + "|", sep="\n")
    for verb in VERBS:
        words = FEW.get(verb, ["--help"])
        command = [sys.executable, "-m", f"dzhpc.{verb}", *words]
        found = []
        for _ in range(3):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            found.append((time.perf_counter() - start, cpu))
        code = [sys.executable, "-c", MODULES.format(verb), *words]
        modules = subprocess.run(code, capture_output=True, text=True, check=False).stderr.strip().splitlines()[-1]
        opened = failed = "?"
        if shutil.which("strace"):
            trace = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", "/dev/stderr", *command]
            lines = subprocess.run(trace, capture_output=True, text=True, check=True).stderr.splitlines()
            opened = sum("open" in line and "ENOENT" not in line for line in lines)
            failed = sum("ENOENT" in line for line in lines)
        print(
            f"| {verb} | {min(f[0] for f in found):.2f} | {min(f[1] for f in found):.2f} | {modules} | {opened} | {failed} |",
            flush=True,
        )


def ranks() -> None:
    """Start as train does, and measure instead of training: a line of the root."""
    from dzhpc import train
    from dzhpc.job.launch import run_verb
    from dzhpc.training.trainer import Reason, Trainer

    def measure(trainer: Trainer) -> Reason:
        used, world = resource.getrusage(resource.RUSAGE_SELF), trainer.world
        lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        own = [int(lines[name].split()[0]) / 1024 for name in ("Pss", "Rss", "Private_Dirty")]
        found = world.gather((*own, used.ru_utime + used.ru_stime, len(sys.modules), used.ru_maxrss / 1024))
        if found:
            pss, rss, private, cpu, modules, peak = (list(column) for column in zip(*found, strict=True))
            others = lambda values: sum(values[1:]) / max(1, world.size - 1)  # noqa: E731
            print(
                f"{world.size} ranks: PSS {sum(pss):.0f} MiB in all, RSS {sum(rss):.0f} MiB in all", "the root, others:", sep="\n"
            )
            for name, column in (("PSS, MiB", pss), ("private, MiB", private), ("peak RSS, MiB", peak), ("CPU, s", cpu)):
                print(f"{name}: {column[0]:.1f}, {others(column):.1f}")
            print(f"modules: {modules[0]}, {modules[-1]}", flush=True)
        return Reason.STOP_FILE

    Trainer.run = measure
    run_verb(train.parser(), train.main)


if __name__ == "__main__":
    {"verbs": verbs, "ranks": ranks}[sys.argv.pop(1)]()
