"""Every job script that is shipped, on a real Slurm: shortened, to the end, and through what a cluster does to a job."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi_launch import assert_same, attributes, bits, checkpoints, column, contents, sets

SMALL = sets(  # a campaign's input, made small: the digits instead of CIFAR-10, few coordinates, few steps
    data__name="digits", data__batch_size=32, data__augment=False, zo__engine="reuse", sparsity__prune="all", sparsity__q=4,
    eval__batch_size=400, stop__epochs=1, stop__steps=3, optim__warmup_epochs=0.0,
)  # fmt: skip
TINY = [*SMALL, *sets(model__name="cnn", model__width=4)]
LOSS = """
import os, time
from pathlib import Path
import numpy as np

class Loss:
    def initial(self):
        return np.zeros(3)

    def __call__(self, thetas, step):
        Path("at").write_text(str(step))
        if Path("slow").exists() and step > 1:
            time.sleep(0.1)
        if os.environ.get("SLURM_ARRAY_TASK_ID") == "6" and step == 2:
            raise FloatingPointError("the solver diverged")
        return ((thetas - 1) ** 2).sum(1)
"""
CLASSIFIER = """
import numpy as np


def classify(images):  # brighter rows, larger logits
    return np.repeat(images.sum(3)[:, 0], 2, 1)[:, :10]
"""
OWN = """
[task]
kind = "objective"
function = "loss:Loss"
retries = 0
[sparsity]
ratio = 0.0
[optim]
lr = 0.02
warmup_epochs = 0
schedule = "constant"
[stop]
epochs = 40
"""


@pytest.fixture(scope="module")
def place(clone):
    """The clone, with a user's own loss in it."""
    (clone / "loss.py").write_text(LOSS)
    (clone / "own.toml").write_text(OWN)
    return clone


def output(fields: dict[str, str]) -> str:
    return Path(fields["StdOut"]).read_text()


def completed(cluster, job: str, timeout: float = 120) -> str:
    """What the job printed; asserts that it ended well."""
    fields = cluster.end_of(job, timeout)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), output(fields)[-3000:]
    return output(fields)


def manifest(folder: Path, number: int = -1) -> dict:
    return json.loads(sorted((folder / "launches").glob("*.json"))[number].read_text())


def reached(place: Path, step: int, timeout: float = 150) -> None:
    """Wait until the loss is at a step."""
    end = time.monotonic() + timeout
    while not ((place / "at").exists() and (place / "at").read_text() not in [str(k) for k in ["", *range(step)]]):
        assert time.monotonic() < end, f"step {step} not reached within {timeout} s"
        time.sleep(0.05)


def test_resnet20(cluster, place):
    """Overrides reach the program; the ranks are one job; fake GPUs give one warning."""
    words = ["--ntasks=2", "slurm/resnet20.sh", "--run-dir", "runs/trial", *SMALL, *sets(sparsity__ratio=0.9995, stop__steps=2)]
    said = completed(cluster, job := cluster.submit(*words, cwd=place))
    run = place / "runs" / "trial"
    assert column(run, "train/step") == [1, 2]
    assert attributes(checkpoints(run)[-1], "state")["step"] == 2
    assert b'name = "resnet20"' in contents(checkpoints(run)[-1])["config"]
    assert said.count("CUDA is not available: running on the CPU") == 1
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("rank")] == ["ranks 0-1"]
    found = manifest(run)
    assert (found["slurm_job_id"], found["hosts"][0]["count"], found["state"]) == (job, 2, "finished")
    assert not (run / "lock.json").exists()


def test_cnn_array_with_a_failing_member(cluster, place):
    """Depth and seed follow from the member; one member fails, the others finish, and the report says so."""
    job = cluster.submit("--array=0,6", "--ntasks=2", "slurm/cnn.sh", cwd=place, env={"INPUT": "own.toml"})
    fields = {member: cluster.end_of(f"{job}_{member}") for member in (0, 6)}
    assert (fields[0]["JobState"], fields[0]["ExitCode"]) == ("COMPLETED", "0:0"), output(fields[0])[-2000:]
    assert (fields[6]["JobState"], fields[6]["ExitCode"]) == ("FAILED", "6:0"), output(fields[6])[-2000:]
    good, bad = (place / "runs" / "cnn" / name for name in ("depth-1-seed-0", "depth-2-seed-1"))
    assert attributes(checkpoints(good)[-1], "state")["step"] == 40
    assert attributes(checkpoints(good)[-1], "state")["seed"] == 0
    assert (manifest(bad)["state"], manifest(bad)["exit_code"]) == ("failed", 6)
    assert "the solver diverged" in manifest(bad)["reason"]
    said = completed(cluster, cluster.submit("--array=5", "--ntasks=1", "slurm/cnn.sh", *TINY, cwd=place) + "_5")
    third = place / "runs" / "cnn" / "depth-1-seed-1"
    assert "stopped at step 3: stop.steps reached" in said
    config = contents(checkpoints(third)[-1])["config"]
    assert b"\ndepth = 1\n" in config and b"\nseed = 1\n" in config
    command = [sys.executable, "-m", "dzhpc.report", "--campaign", "runs/cnn"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if "-seed-" in line}
    assert "| finished |" in rows["depth-1-seed-0"] and "| finished |" in rows["depth-1-seed-1"]
    assert "| failed |" in rows["depth-2-seed-1"] and "the solver diverged" in rows["depth-2-seed-1"]
    assert (place / "runs" / "cnn" / "report" / "curves.png").stat().st_size > 1000


@pytest.mark.long
def test_sparsity_array(cluster, place):
    completed(cluster, cluster.submit("--array=7", "--ntasks=2", "slurm/sparsity.sh", *TINY, cwd=place) + "_7")
    run = place / "runs" / "sparsity" / "ratio-0.99-seed-1"
    config = contents(checkpoints(run)[-1])["config"]
    assert b"\nratio = 0.99\n" in config and b"\nseed = 1\n" in config
    assert column(run, "train/step") == [1, 2, 3]


def test_prune_then_train(cluster, place):
    """The chain of prune.sh's header; and a training whose scores failed never starts."""
    prune = cluster.submit("--ntasks=2", "slurm/prune.sh", "-o", "runs/lpr.h5", *TINY, cwd=place)
    words = ["--ntasks=2", "slurm/resnet20.sh", "--run-dir", "runs/chained", *TINY, "--set", "sparsity.lpr=runs/lpr.h5"]
    train = cluster.submit(f"--dependency=afterok:{prune}", *words, cwd=place)
    completed(cluster, prune)
    assert "scoring weights" not in completed(cluster, train)
    assert contents(place / "runs" / "lpr.h5")["kept"] == contents(checkpoints(place / "runs" / "chained")[-1])["lpr/kept"]
    failed = cluster.submit("--ntasks=1", "slurm/prune.sh", "-o", "nowhere/lpr.h5", *TINY, cwd=place)
    after = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{failed}", "--ntasks=1", "slurm/resnet20.sh", *TINY]
    never = cluster.submit(*after, cwd=place)
    assert cluster.end_of(failed)["ExitCode"] == "2:0"
    assert cluster.end_of(never)["JobState"] == "CANCELLED"


def test_missing_data_and_inputs(cluster, place):
    """Said at once, with the command that helps; and no requeue."""
    cases = {
        "python -m dzhpc.fetch cifar10 --root nowhere": ["slurm/resnet20.sh", "--set", "data.root=nowhere"],
        "--set model.weights=FILE": ["slurm/resnet20.sh", *TINY, "--set", "model.weights=gone.h5"],
    }
    for said, words in cases.items():
        fields = cluster.end_of(cluster.submit(*words, cwd=place))
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
        assert said in output(fields)
        assert len(output(fields).splitlines()) == 1
        assert fields["RunTime"] < "00:00:40"  # said before any rank is started
    fields = cluster.end_of(cluster.submit("slurm/cnn.sh", "--array=0", cwd=place, env={"INPUT": "absent.toml"}))
    assert "absent.toml: no such input file" in output(fields)


@pytest.fixture(scope="module")
def undisturbed(cluster, place):
    completed(cluster, cluster.submit("--ntasks=2", "slurm/resnet20.sh", "--run-dir", "runs/whole", cwd=place, env=OWN_INPUT))
    return place / "runs" / "whole"


OWN_INPUT = {"INPUT": "own.toml"}


@pytest.fixture()
def slow(place):
    (place / "at").unlink(missing_ok=True)
    (place / "slow").touch()
    yield
    (place / "slow").unlink(missing_ok=True)


def test_usr1_then_requeue(cluster, place, undisturbed, slow):
    """Warned in mid-run: a checkpoint, back into the queue, and on to the end with the bits of an undisturbed run."""
    job = cluster.submit("--ntasks=2", "slurm/resnet20.sh", "--run-dir", "runs/warned", cwd=place, env=OWN_INPUT)
    reached(place, 5)
    cluster.command("scancel", "--signal=USR1", "--batch", job)
    cluster.when(job, lambda fields: fields["Restarts"] == "1")
    (place / "slow").unlink()
    fields = cluster.end_of(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), output(fields)
    said, run = output(fields), place / "runs" / "warned"
    stop = manifest(run, 0)["step"]
    assert 5 <= stop < 40
    assert said.index(f"stopped at step {stop}: signal received") < said.index(f"restarting at step {stop} from")
    assert (run / "log.txt").read_text().count("stopped at step") == 2
    assert manifest(run, 0)["slurm_job_id"] == manifest(run, 1)["slurm_job_id"] == job
    assert_same(bits(undisturbed), bits(run))


@pytest.mark.long
def test_deadline_then_requeue(cluster, place, undisturbed, slow):
    early = ["--time=1", "--signal=B:USR1@1", "--ntasks=1"]  # the script's own @120 would come first
    words = [*early, "slurm/resnet20.sh", "--run-dir", "runs/deadline", *sets(run__deadline_margin=40.0)]
    job = cluster.submit(*words, cwd=place, env=OWN_INPUT)
    cluster.when(job, lambda fields: fields["Restarts"] == "1")
    (place / "slow").unlink()
    fields = cluster.end_of(job)
    assert fields["JobState"] == "COMPLETED" and int(fields["Restarts"]) >= 1, output(fields)
    assert "the job's time limit is near" in output(fields)
    assert_same(bits(undisturbed, but=("config",)), bits(place / "runs" / "deadline", but=("config",)))


def test_term_and_cancel_do_not_come_back(cluster, place, undisturbed, slow):
    """TERM to the script (preemption): a checkpoint, and the queue is left to Slurm; scancel: gone. The command continues."""
    words = ["--ntasks=2", "slurm/resnet20.sh", "--run-dir", "runs/term"]
    job = cluster.submit(*words, cwd=place, env=OWN_INPUT)
    reached(place, 5)
    cluster.command("scancel", "--signal=TERM", "--batch", job)
    fields = cluster.end_of(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "0"), output(fields)
    stopped = manifest(place / "runs" / "term")["step"]
    assert stopped >= 5
    (place / "at").unlink()
    job = cluster.submit(*words, cwd=place, env=OWN_INPUT)
    reached(place, stopped + 3)
    cluster.command("scancel", job)
    assert cluster.end_of(job)["JobState"] == "CANCELLED"
    time.sleep(2)
    fields = cluster.show(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    (place / "slow").unlink()
    completed(cluster, cluster.submit(*words, cwd=place, env=OWN_INPUT))
    assert_same(bits(undisturbed), bits(place / "runs" / "term"))


@pytest.mark.long
def test_defense_chain(cluster, place):
    """One command submits three dependent jobs: a classifier of digits is hardened by queries, and certified."""
    (place / "classifier.py").write_text(CLASSIFIER)
    words = sets(task__classifier="classifier:classify", model__width=4, stop__steps=2, data__train_limit=256)
    env = ["INPUT=inputs/defense-small.toml", "SBATCH=sbatch --ntasks=2 --gpus-per-task=0", "PRETRAIN=--set optim.lr=1e-3"]
    command = ["env", "-C", place, *env, "CERTIFY=--images 3 --n0 10 --n 20", "bash", "slurm/defense.sh", *words]
    jobs = re.findall(r"\d+", cluster.command(*command))
    assert len(jobs) == 3
    for job in jobs:
        completed(cluster, job)
    runs = [place / "runs" / name for name in ("defense-small-pretrained", "defense-small")]
    before, after = (contents(checkpoints(run)[-1]) for run in runs)
    assert before["params/model.0.weight"] == after["params/model.0.weight"]
    assert before["params/model.8.weight"] != after["params/model.8.weight"]
    assert b'loss = "mse"' in before["config"] and b'weights = "runs/defense-small-pretrained"' in after["config"]
    assert list((runs[1] / "certify").glob("*.h5"))
    fields = cluster.end_of(cluster.submit("--ntasks=1", "slurm/defense.sh", "harden", cwd=place))
    assert fields["ExitCode"] == "2:0" and "expected pretrain, finetune or certify" in output(fields)


@pytest.mark.long
def test_sol_chain(cluster, place):
    """One command submits three dependent jobs: reference simulations on a tiny grid, a training by queries, the evaluation."""
    words = sets(
        task__resolution=16, task__factor=2, task__frames=8, task__warm_up=3, task__unroll=2, model__widths=[1],
        task__train_parameters=[2e5, 3e5], task__valid_parameters=[2.5e5], task__test_parameters=[2.2e5, 2.8e5],
        run__name="tiny", stop__epochs=1, stop__steps=2, checkpoint__every_steps=1,
    )  # fmt: skip
    env = ["INPUT=inputs/sol-small.toml", "SBATCH=sbatch --ntasks=2 --gpus-per-task=0", "EVALUATE=--no-gif"]
    jobs = re.findall(r"\d+", cluster.command("env", "-C", place, *env, "bash", "slurm/sol.sh", *words))
    assert len(jobs) == 3
    reference, _, table = (completed(cluster, job) for job in jobs)
    assert "simulations done 5/5" in reference
    found = contents(place / "data" / "wake.h5")
    assert (found["about/resolution"], found["about/frames"]) == ("16", "8")
    run = place / "runs" / "tiny"
    assert column(run, "train/step") == [1, 2] and len(checkpoints(run)) == 2
    assert "choosing among 2 checkpoints by the valid simulations" in table and "| tiny | 1 |" in table
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        "evaluation.md", "evaluation.tsv", "errors.png", "states.png"
    }  # fmt: skip
    fields = cluster.end_of(cluster.submit("--ntasks=1", "slurm/sol.sh", "correct", cwd=place))
    assert fields["ExitCode"] == "2:0" and "expected simulate, train or evaluate" in output(fields)


@pytest.mark.long
def test_the_member_of_an_array_that_bears_its_id_comes_back_alone(cluster, place, slow):
    """Slurm gives one member of an array the array's own id: requeued by that, all members would be killed and start afresh."""
    array = cluster.submit("--array=0,5,10", "--ntasks=1", "slurm/cnn.sh", *sets(run__dir="runs/three"), cwd=place, env=OWN_INPUT)
    members = [f"{array}_{k}" for k in (0, 5, 10)]
    for member in members:
        cluster.when(member, lambda fields: fields["JobState"] == "RUNNING")
    own = next(member for member in members if cluster.show(member)["JobId"] == array)
    reached(place, 3)
    cluster.command("scancel", "--signal=USR1", "--batch", own)
    cluster.when(own, lambda fields: fields["Restarts"] == "1")
    (place / "slow").unlink()
    ended = {member: cluster.end_of(member) for member in members}
    assert {member: (fields["JobState"], fields["Restarts"]) for member, fields in ended.items()} == {
        member: ("COMPLETED", "1" if member == own else "0") for member in members
    }
    folders = [place / "runs" / "three" / f"depth-1-seed-{seed}" for seed in range(3)]
    assert sorted(len(list((folder / "launches").glob("*.json"))) for folder in folders) == [1, 1, 2]


def test_a_study_is_an_array_for_each_stage_that_waits_for_the_one_before(cluster, place):
    """Two members of a study on the digits, each a task of one array; the stages of another, held, with their dependencies."""
    env = ["env", "-C", place, "SIZE=look"]
    words = [*TINY, *sets(stop__steps=2, model__depth=1)]
    only = "ONLY=^(cge|first-order)/depth1-seed0"
    said = cluster.command(*env, only, "SBATCH=sbatch --ntasks=1", "bash", "slurm/studies/fig2.sh", "submit", *words)
    array = said.removeprefix("jobs ")
    for task in (0, 1):
        completed(cluster, f"{array}_{task}")
    study = place / "runs" / "studies" / "fig2" / "look"
    queries = [column(study / method / "depth1-seed0", "train/queries")[-1] for method in ("cge", "first-order")]
    assert queries == [2 * (1 + 4 * 9 + 4 + 8 + 40 + 10), 2]
    said = cluster.command(*env, "bash", "slurm/studies/fig2.sh", "report")
    assert "| cge | 1 | 41.65 | " in said and "| rge | 1 | 37.53 | not run |" in said
    assert {path.name for path in (study / "report").iterdir()} == {"report.md", "curves.png"}

    said = cluster.command(*env, "SBATCH=sbatch --hold", "bash", "slurm/studies/table2.sh", "submit")
    stages = said.removeprefix("jobs ").split(", ")
    fields = [cluster.show(job) for job in stages]
    assert [one["ArrayTaskId"] for one in fields] == ["0%8", "1-2%8", "3-6%8", "7-12%8"]
    assert "afterok" not in fields[0].get("Dependency", "")
    for before, one in zip(stages, fields[1:], strict=False):
        assert re.match(rf"afterok:{before}\D", one["Dependency"])
    cluster.command("scancel", *stages)
