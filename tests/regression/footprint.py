"""Starts the runs of cases.py and takes their footprints: a SHA-256 for each group of numbers, and a few numbers in clear."""

import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from cases import CASES, INPUTS, Case

HERE = Path(__file__).parent
WRITTEN = HERE / "written_by_0.1"
STORED = HERE / "hashes.json"
LEFT_OUT = {"train/step_s", "train/comm_s", "images/seconds", "config"}  # timings; text
COUNTS = ("step", "queries", "seed", "model_sha256")  # of a state's attributes
LIMIT = 900  # seconds for one process, which may have to share its core


@dataclass
class Footprint:
    """What a run leaves: group -> SHA-256, name -> number; or the words with which it failed."""

    hashes: dict[str, str]
    values: dict[str, float]
    failure: str = ""


@functools.cache
def instructions() -> str:
    """The vector instructions that torch uses: "avx2", "avx512+bf16"; features hidden by ATEN_CPU_CAPABILITY are not named."""
    used = torch.backends.cpu.get_cpu_capability().lower()
    known = torch.cpu.get_capabilities() if used == "avx512" else {}
    return "+".join([used, *(short for name, short in (("avx512_bf16", "bf16"), ("amx_bf16", "amx")) if known.get(name))])


@functools.cache
def key() -> str:
    """What bits depend on beside the input: processor, instructions in use, versions of torch and of the C++ compiler."""
    words = [platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*:\s*(.+)$", info.read_text(), re.M))
        words = [fields.get(name, "") for name in ("vendor_id", "cpu family", "model")] if fields else words
    compiler = os.environ.get("CXX", "g++")
    version = "none"
    if shutil.which(compiler):
        version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, timeout=60).stdout.strip()
    return f"{'-'.join(words)} {instructions()} torch-{torch.__version__.split('+')[0]} {Path(compiler).name}-{version}"


def runnable() -> dict[str, Case]:
    """The cases that this processor runs without emulating what it lacks."""
    return {name: case for name, case in CASES.items() if not case.bf16 or "bf16" in instructions()}


def set_up(place: Path) -> None:
    """Input files, the user's module, and what the first version wrote, into a folder."""
    for name, text in INPUTS.items():
        (place / name).write_text(text)
    shutil.copy(HERE / "own.py", place)
    for copy in ("written", "again"):  # to be read, and to be gone on with
        shutil.copytree(WRITTEN, place / copy)
    for name in ("wake.h5", "ring.h5"):
        shutil.copy(WRITTEN / name, place)
    subprocess.run(
        [sys.executable, "-c", "import own, pathlib; own.save_judge(pathlib.Path())"], cwd=place, check=True, timeout=LIMIT
    )


def start(place: Path, cases: Mapping[str, Case], more: Iterable[str] = (), ranks: int = 1) -> dict[str, tuple]:
    """Run command lines in one process (or one MPI job) in a folder: name -> (exit code, output) of rank 0."""
    files = Path(tempfile.mkdtemp(dir=place, prefix="job-"))
    (files / "job.json").write_text(json.dumps([[name, case.verb, [*case.args, *more]] for name, case in cases.items()]))
    command = [sys.executable, str(HERE / "runner.py"), str(files / "job.json")]
    if ranks > 1:
        beside = Path(sys.executable).parent / "mpirun"
        command = [str(beside if beside.exists() else "mpirun"), "-n", str(ranks), *command]
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    results = {}
    for name in cases:
        file = files / f"{name}.0.json"
        results[name] = tuple(json.loads(file.read_text())) if file.exists() else (done.returncode, done.stderr[-3000:])
    return results


def take(place: Path, cases: Mapping[str, Case]) -> dict[str, Footprint]:
    """Run the cases, those that are ``alone`` in a process each, and take their footprints."""
    together = {name: case for name, case in cases.items() if not case.alone}
    results = start(place, together) if together else {}
    for name, case in cases.items():
        if case.alone:
            results |= start(place, {name: case})
    found = {}
    for name, (code, said) in results.items():
        found[name] = of(place / cases[name].file) if code == 0 else Footprint({}, {}, f"exit code {code}:\n{said[-3000:]}")
    return found


def of(path: Path) -> Footprint:
    """The footprint of a run folder, an .h5 file, or a table."""
    if path.is_dir():
        newest = max((path / "checkpoints").glob("step-*.h5"))
        groups = {**contents(newest), **contents(path / "metrics.h5")}
        values = numbers(groups)
    elif path.suffix == ".h5":
        groups = contents(path)
        values = sums(groups)
    else:
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        groups = {"table": {"text": np.array(path.read_text())}}
        values = {f"row {k}": float(row[6]) for k, row in enumerate(rows) if k}
    return Footprint({group: sha256(arrays) for group, arrays in groups.items() if arrays}, values)


def contents(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a file by the first part of their names; timings left out, and memory apart, which may change alone."""
    groups: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with h5py.File(path, "r") as file:

        def visit(name: str, item) -> None:
            group, _, rest = name.partition("/")
            if isinstance(item, h5py.Dataset) and name not in LEFT_OUT:
                groups["memory" if rest == "peak_bytes" else group if rest else "arrays"][rest or name] = np.asarray(item[()])
            if name == "state":
                groups["state"] = {key: np.asarray(item.attrs[key]) for key in COUNTS}

        file.visititems(visit)
    groups.pop("config-history", None)
    return groups


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        raw = repr(array.tolist()).encode() if array.dtype.kind in "OSU" else array.tobytes()
        digest.update(
            f"{name}:{array.dtype.kind}{array.dtype.itemsize * (array.dtype.kind not in 'OSU')}:{array.shape};".encode()
        )
        digest.update(raw)
    return digest.hexdigest()


def numbers(groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Of a run: the last loss, |ghat|, number of queries, and the last evaluation."""
    last = lambda table, name: float(groups[table][name][-1])  # noqa: E731
    found = {"loss": last("train", "loss"), "grad_norm": last("train", "grad_norm"), "queries": last("train", "queries")}
    if len(groups["eval"]["loss"]):
        found |= {"eval loss": last("eval", "loss"), "accuracy": last("eval", "accuracy")}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def sums(groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Of a file: the sum of absolute values of each array of numbers, undefined ones aside."""
    return {
        f"{group}/{name}": float(np.nansum(np.abs(array.astype(np.float64))))
        for group, arrays in groups.items() for name, array in arrays.items() if array.dtype.kind in "fiub"
    }  # fmt: skip


def stored() -> dict:
    """hashes.json: "values" by case; "hashes" by key and case."""
    return json.loads(STORED.read_text())
