"""All that is to be seen on a machine with a GPU, by one command, within a time that may be short.

    python benchmarks/gpu.py --out runs/gpu --minutes 25
    python benchmarks/gpu.py --out runs/gpu-pretended --pretend      # the same on the CPU, at toy size

What was found so far is in OUT/gpu.json, rewritten after every stage and while the last one trains; what each stage said is in
OUT/STAGE.log. A stage that fails, or that is not over in time, is noted as such, and the next one begins. The training goes on
where OUT/runs/resnet20 was left, so that the same command, or ``--stages train``, continues on another day. Nothing is
downloaded; CIFAR-10 is looked for as ``train`` does ($DZHPC_DATA).
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
POLL = 10  # seconds between two looks at a training
SHARE = 0.3  # of the time that the training gets at least
STOPPED = 75  # exit code of a training whose time was up


class StageError(Exception):
    """Why a stage has nothing more to say."""


@dataclass
class Session:
    """Where results go, until when there is time, and what has been found."""

    out: Path
    deadline: float  # of time.monotonic()
    pretend: bool
    reserve: float = 0.0  # seconds that are kept for the training
    found: dict = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.pretend else "cuda"

    def left(self, stage: str) -> float:
        """Seconds that a stage may take."""
        return self.deadline - time.monotonic() - (0 if stage == "train" else self.reserve)

    def write(self) -> None:
        """All that was found so far, in a file that is whole at any time."""
        draft = self.out / "gpu.json.part"
        draft.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.out / "gpu.json")

    def run(
        self,
        stage: str,
        command: Sequence[object],
        limit: float,
        codes: Sequence[int] = (0,),
        watch: Callable[[], None] = lambda: None,
    ) -> str:
        """What a command said. Raises StageError where it leaves by another exit code, or is not over in time and is ended."""
        limit, words, start = min(limit, self.left(stage)), [str(word) for word in command], time.monotonic()
        self.found["stages"][stage].setdefault("commands", []).append(" ".join(words))
        said = self.out / f"{stage}.log"
        before = said.stat().st_size if said.exists() else 0
        with said.open("ab") as log:
            process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() - start < limit:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(min(POLL, max(0.1, limit - (time.monotonic() - start))))
                    watch()
            finally:
                late = process.poll() is None
                _end(process)
        text = said.read_bytes()[before:].decode(errors="replace")
        if late:
            raise StageError(f"not over after {limit:.0f} s: {' '.join(words)}")
        if process.returncode not in codes:
            raise StageError(f"exit code {process.returncode}: {' '.join(words)}: {text.strip()[-1500:]}")
        return text


def _end(process: subprocess.Popen) -> None:
    """End a process group of ours; mpirun takes its ranks along when it is asked first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(10)


def machine(session: Session) -> dict:
    """Hardware and versions."""
    code = "import json; from dzhpc.training.benchmark import machine; print(json.dumps(machine()))"
    found = json.loads(session.run("machine", [sys.executable, "-c", code], 120).splitlines()[-1])
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,memory.total,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found["nvidia-smi"] = session.run("machine", ["nvidia-smi", query, "--format=csv,noheader"], 30).strip()
    if not session.pretend and found["gpu"] == "none":
        raise StageError("torch finds no GPU here")
    return found


def tests(session: Session) -> dict:
    """Our kernels against float64, compiled for this GPU; engines and tasks on pretended tensors, as anywhere."""
    files = ["interpreted.py"] if session.pretend else ["interpreted.py", "test_triton.py", "test_pretended.py", "test_device.py"]
    chosen = ["-k", "sums and 40"] if session.pretend else []
    kernels = [f"tests/unit/{name}" for name in files]
    words = ["env", "TRITON_INTERPRET=1"] if session.pretend else []
    said = session.run("tests", [*words, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *kernels], 300)
    return {"pytest": said.strip().splitlines()[-1]}


def accuracy(session: Session) -> dict:
    """Relative errors of the engines' differences against float64, on several networks."""
    out = session.out / "accuracy.md"
    few = ["--only", "CNN depth 1", "--coords", 12, "--batch", 4] if session.pretend else []
    session.run("accuracy", [sys.executable, HERE / "accuracy.py", "--out", out, "--device", session.device, *few], 300)
    return {"rows": [line for line in out.read_text().splitlines() if line.startswith("| ")]}


def bench(session: Session) -> dict:
    """A gradient by all engines, side by side: milliseconds a query, memory, errors."""
    out = session.out / "bench.json"
    size = ["--model", "resnet20", "--batch", 512, "--coords", 2048, "--reference", 64, "--repeats", 3]
    if session.pretend:
        size = ["--model", "cnn:1", "--batch", 4, "--coords", 8, "--reference", 4, "--repeats", 1, "--precisions", "fp32"]
    session.run("bench", [sys.executable, "-m", "dzhpc.bench", "gradient", *size, "--device", session.device, "--json", out], 420)
    return json.loads(out.read_text())


def roofline(session: Session) -> dict:
    """FLOPs and bytes a query of each kind of work, against what this device was seen to do in the same minute."""
    found = {}
    for precision in ("fp32",) if session.pretend else ("fp32", "bf16"):
        out = session.out / f"roofline-{precision}.json"
        size = ["--model", "resnet20", "--batch", 512, "--coords", 2048, "--repeats", 2]
        if session.pretend:
            size = ["--model", "cnn:1", "--batch", 4, "--coords", 8, "--repeats", 1]
        words = ["--precision", precision, "--device", session.device, "--json", out]
        session.run("roofline", [sys.executable, HERE / "profile_delta.py", *size, *words], 240)
        found[precision] = json.loads(out.read_text())
    return found


def ranks(session: Session) -> dict:
    """Two ranks that share the card end with the bits of one."""
    states = {}
    mpirun = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    for count in (1, 2):
        name = f"digits-{count}"
        shutil.rmtree(session.out / "runs" / name, ignore_errors=True)
        if count > 1 and mpirun is None:
            raise StageError("there is no mpirun here")
        keys = ["run.share_gpu=true", "stop.steps=2", "checkpoint.every_steps=1", "sparsity.scores=random"]
        words = [sys.executable, "-m", "dzhpc.train", "inputs/digits.toml", "--run-dir", session.out / "runs" / name, *_set(keys)]
        session.run("ranks", [*([mpirun, "-n", count] if count > 1 else []), *words], 180)
        code = (
            "import sys; from dzhpc.files.runfolder import load_state; from dzhpc.models.identity import tensors_sha256; "
            "_, state = load_state(sys.argv[1]); print(tensors_sha256({**state.params, **state.buffers}, content=True))"
        )
        states[count] = session.run("ranks", [sys.executable, "-c", code, session.out / "runs" / name], 60).splitlines()[-1]
    if states[1] != states[2]:
        raise StageError(f"two ranks end with other bits than one: {states}")
    return {"theta of 1 and 2 ranks": states[1]}


def train(session: Session) -> dict:
    """As much of ResNet-20 on CIFAR-10 as there is time for; it goes on where it was left."""
    folder, entry = session.out / "runs" / ("digits" if session.pretend else "resnet20"), session.found["stages"]["train"]
    limit = session.left("train") - (5 if session.pretend else 60)
    if limit < 5:
        raise StageError("no time is left")
    keys = ["run.share_gpu=true", f"stop.walltime={limit - (5 if session.pretend else 45):.0f}",
            "checkpoint.every_minutes=1"]  # fmt: skip
    source = "inputs/digits.toml" if session.pretend else "inputs/resnet20.toml"
    keys += ["stop.steps=2", "sparsity.scores=random"] if session.pretend else ["zo.precision=bf16"]

    def watch() -> None:
        with contextlib.suppress(OSError):
            entry["so far"] = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
            session.write()

    words = [sys.executable, "-m", "dzhpc.train", source, "--run-dir", folder, *_set(keys)]
    session.run("train", words, limit, (0, STOPPED), watch)
    watch()
    checkpoints = sorted(str(path.relative_to(session.out)) for path in folder.glob("checkpoints/*.h5"))
    code = (
        "import json, sys; from pathlib import Path; from dzhpc.files.metrics import load_metrics; "
        "t, e = load_metrics(Path(sys.argv[1])); print(json.dumps({'train': t.tolist(), 'evaluations': e.tolist()}))"
    )
    rows = json.loads(session.run("train", [sys.executable, "-c", code, folder / "metrics.h5"], 60).splitlines()[-1])
    return {"checkpoints": checkpoints, **rows}


def _set(keys: Sequence[str]) -> list[str]:
    return [word for key in keys for word in ("--set", key)]


STAGES = {f.__name__: f for f in (machine, tests, accuracy, bench, roofline, ranks, train)}


def carry_out(session: Session, chosen: Sequence[str]) -> int:
    """All stages in order; how many failed. Whatever one of them dies of, what was found is written and the next one begins."""
    failed = 0
    for name in chosen:
        entry = session.found["stages"][name] = {"state": "running", "began": time.strftime("%Y-%m-%dT%H:%M:%S")}
        session.write()
        start = time.monotonic()
        try:
            if session.left(name) < 5:
                raise StageError("no time is left")
            entry["found"] = STAGES[name](session)
            entry["state"] = "done"
        except Exception as error:
            entry["state"], entry["why"] = "failed", f"{type(error).__name__}: {error}"
            failed += 1
        entry["seconds"] = round(time.monotonic() - start, 1)
        session.write()
        print(
            f"{name}: {entry['state']} after {entry['seconds']:.0f} s{'; ' + entry['why'] if 'why' in entry else ''}", flush=True
        )
    return failed


def main() -> int:
    """The exit code: 0 where all stages are done, 1 where one is not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder for results; those of earlier calls are kept")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it; the training gets what the others leave")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"which, in this order: {', '.join(STAGES)}")
    parser.add_argument("--pretend", action="store_true", help="on the CPU, at toy size")
    args = parser.parse_args()
    chosen = args.stages.split(",")
    if unknown := [name for name in chosen if name not in STAGES]:
        parser.error(f"--stages {unknown[0]}: expected some of {', '.join(STAGES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    reserve = SHARE * 60 * args.minutes if "train" in chosen else 0.0
    session = Session(args.out.resolve(), time.monotonic() + 60 * args.minutes, args.pretend, reserve)
    with contextlib.suppress(OSError, ValueError):
        session.found = json.loads((session.out / "gpu.json").read_text())
    session.found.setdefault("stages", {})
    session.found["pretended"] = args.pretend
    return min(1, carry_out(session, chosen))


if __name__ == "__main__":
    sys.exit(main())
