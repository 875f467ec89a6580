"""Studies: every member of every size is what the program takes; runs become rows of a method, means over seeds, figures."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import tomllib

import pytest
from PIL import Image

from dzhpc import config
from dzhpc.errors import InputError
from dzhpc.files import benched, curves, study
from dzhpc.files.metrics import Metrics

STUDIES = ("fig2", "fig4", "fig5", "fig6", "table1", "table2", "a1", "a2", "a3", "a5", "a6", "open", "standin")
STAGES = {"table2": [1, 2, 4, 6], "fig6": [1, 16, 1]}  # members of each, at the paper's size
SIZES = ("paper", "small", "look")


@pytest.fixture(scope="module")
def listed(project):
    """(study, size) -> words of each member; asked once."""
    jobs = {}
    for name in STUDIES:
        for size in SIZES:
            command = ["bash", f"slurm/studies/{name}.sh", "list"]
            jobs[name, size] = subprocess.Popen(
                command,
                cwd=project,
                env={**os.environ, "SIZE": size},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
    found = {}
    for key, job in jobs.items():
        out = job.communicate(timeout=60)[0]
        assert job.returncode == 0, out
        found[key] = [line.split() for line in out.splitlines()]
    return found


def test_the_studies_are_those_that_are_there(project):
    assert {path.stem for path in (project / "slurm" / "studies").glob("*.sh")} == {"study", *STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_members_are_valid_inputs_with_names_of_their_own(project, listed, name):
    for size in SIZES:
        members = listed[name, size]
        assert len({own for _, own, *_ in members}) == len(members) > 1
        for source, own, *keys in members:
            if source.endswith(".toml"):
                assert config.load(project / source, [*keys, f"run.name={own}"]).run.name == own
            else:  # a verb and its arguments; argparse leaves the process where it does not know one
                importlib.import_module(f"dzhpc.{source}").parser().parse_args(keys)
        if size == "paper":
            last = re.search(r"--array=0-(\d+)", (project / "slurm" / "studies" / f"{name}.sh").read_text())
            assert (int(last[1]) + 1 if last else sum(STAGES[name])) == len(members)


def sourced(project, tmp_path, variable, **env):
    """What slurm/launch.sh makes of a variable in a job, on a node that has nothing but two programs."""
    for name in ("date", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))
    words = [shutil.which("bash"), "-c", f'source slurm/launch.sh; echo "found: ${{{variable}:-}}"']
    env = {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", **env}
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=30)


def test_on_a_node_without_squeue_the_end_of_a_job_is_unknown(project, tmp_path):
    """By `date -d ""` it was the midnight before: the run stopped at once."""
    done = sourced(project, tmp_path, "SLURM_JOB_END_TIME")
    assert done.stdout == "found: \n" and "squeue: command not found" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "cpus", "found"), [("srun --mpi=pmix", "4", "4"), ("srun --mpi=pmix", "1", ""), ("mpirun -n 2", "4", "")]
)
def test_tasks_of_srun_have_the_cores_that_the_job_asked_for(project, tmp_path, launcher, cpus, found):
    env = {"LAUNCHER": launcher, "SLURM_CPUS_PER_TASK": cpus, "SLURM_JOB_END_TIME": "9"}
    done = sourced(project, tmp_path, "SRUN_CPUS_PER_TASK", **env)
    assert (done.stdout, done.stderr) == (f"found: {found}\n", "")


def test_pattern_search_asks_as_often_as_the_run_beside_it(listed):
    """28,220 moves and a base, as DeepZero at 90 % has coordinates; an even number as near as can be in the smaller sizes."""
    for size, moves in (("paper", "28220"), ("small", "4068"), ("look", "730")):
        keys = {name: dict(key.split("=") for key in keys) for _, name, *keys in listed["fig5", size]}
        for name, own in keys.items():
            beside = keys[name.replace("pattern", "deepzero")]
            assert own["data.batch_size"] == beside["data.batch_size"] and own["stop.epochs"] == beside["stop.epochs"]
            assert own.get("zo.q", moves) == moves


def test_published_numbers_belong_to_methods_of_their_study(project, listed):
    for name in ("fig2", "fig4", "a2", "a5", "table1"):
        methods = {own.split("/")[0] for _, own, *_ in listed[name, "paper"]}
        numbers = study.published(project / "slurm" / "studies" / "published.tsv", name)
        assert numbers and {one.method for one in numbers} <= methods


def make(folder, seed, ratio, accuracy, state="finished", steps=20, epochs=2.0, loss=1.0):
    """A run folder; an accuracy of None: never evaluated."""
    (folder / "launches").mkdir(parents=True)
    about = {"time": f"2026-11-2{seed}T10:00:00+00:00", "versions": {"torch": "2.14.1"}, "state": state, "seconds": 1800}
    hosts = [{"rank": 0, "uuid": "", "device": "cpu AMD Zen, avx512+bf16 (1 threads)" if seed else "cpu (1 threads)"}] * 2
    (folder / "launches" / "001.json").write_text(json.dumps(about | {"hosts": hosts}))
    settings = config.load(None, [f"run.seed={seed}", f"sparsity.ratio={ratio}", f"stop.epochs={epochs}"])
    (folder / "input.toml").write_text(settings.to_toml())
    metrics = Metrics(folder / "metrics.h5")
    for step in range(1, steps + 1):
        metrics.add_train(step, step / 10, 2 / step, 0.1, 1.0, 100 * step, 36.0, 0.0, 0)
    if accuracy is not None:
        metrics.add_eval(steps, steps / 10, loss, accuracy)
    metrics.flush()


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.54, 0.58)):
        make(tmp_path / "fig4" / "dense" / f"seed{seed}", seed, 0.0, accuracy)
    make(tmp_path / "fig4" / "dense" / "seed3", 3, 0.0, 0.1, "stopped", 10)  # is in no mean beside finished ones
    make(tmp_path / "fig4" / "dense" / "again", 1, 0.0, 0.5, "stopped", 10)  # no sample of its own
    make(tmp_path / "fig4" / "deepzero" / "a", 0, 0.9, 0.4)
    make(tmp_path / "fig4" / "deepzero" / "b", 0, 0.95, 0.3, "stopped", 10)
    make(tmp_path / "fig4" / "deepzero" / "c", 0, 0.99, None)
    (tmp_path / "published.tsv").write_text(
        "# text\nfig4\tdense\t\t92.85\t\nfig4\tdeepzero\t0.99\t73.37\t1.5\na2\tdense\t\t1\t\n"
    )
    return tmp_path


def test_a_row_is_a_method_at_a_place_and_its_number_the_mean_of_finished_seeds(runs, caplog):
    numbers = study.published(runs / "published.tsv", "fig4")
    text, files = curves.write_study(runs / "fig4", runs / "fig4" / "report", "sparsity.ratio", numbers)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert rows == [
        ["deepzero", "0.9", "", "40", "", "1", "2", "2,000", "1"],
        ["deepzero", "0.95", "", "30", "", "1", "1 of 2, not finished", "1,000", "1"],
        ["dense", "0.0", "92.85", "54", "2.31", "3 of 4", "2", "2,000", "1"],
        ["deepzero", "0.99", "73.37", "not run", "", "", "", "", ""],
    ]
    assert "dense/again: has seed 1, as dense/seed1 has, and is left out" in caplog.text
    assert "deepzero/c: was never evaluated (finished), and is in no row" in caplog.text
    with Image.open(files[1]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").resize((400, 200)).getcolors(10**6)) > 20


def test_losses_are_called_so_and_keep_their_digits(tmp_path):
    for seed, value in ((0, 0.0121), (1, 0.0125)):
        make(tmp_path / "a" / str(seed), seed, 0.5, math.nan, loss=value)
    (group,) = study.groups(tmp_path, "sparsity.ratio")
    text = study.table([group], [], "sparsity.ratio").splitlines()
    assert "| loss here |" in text[0] and "| 0.0123 | 0.0002 | 2 |" in text[2]


def test_what_cannot_be_a_study_is_named(runs, tmp_path):
    for over, message in (("ratio", "expected SECTION.KEY"), ("sparsity.ratio", "no run below has been evaluated")):
        with pytest.raises(InputError, match=message):
            curves.write_study(runs / "fig4" / "deepzero" / "c", tmp_path / "out", over, [])
    with pytest.raises(InputError, match=r"--over sparsity\.ratoi: no run below has such a key"):
        study.groups(runs / "fig4", "sparsity.ratoi")
    (tmp_path / "bad.tsv").write_text("fig4\tdense\n")
    with pytest.raises(InputError, match=r"bad\.tsv: cannot be read as a table of published numbers"):
        study.published(tmp_path / "bad.tsv", "fig4")


def test_benchmarks_become_a_table_and_a_figure(tmp_path):
    machine = {"cpu": "a processor", "torch": "2"}
    parts = {"direction vectors": 1.0, "weight perturbation": 2.0, "model inference": 3.0, "other arithmetic": 0.5}
    rows = [{"estimate": "rge, q = d", "engine": "full", "parts": parts, "seconds": 6.5}]
    rows.append({"estimate": "cge", "engine": "delta", "parts": None, "seconds": 0.25})
    stages = {"options": {"kind": "stages"}, "machine": machine, "parameters": 730, "rows": rows}
    row = {"step_s": 2.0, "step_min": 1.0, "step_max": 3.0, "communication": 0.1}
    rows = [{"ranks": 1, "speedup": 1.0} | row, {"ranks": 2, "speedup": 1.6} | row | {"step_s": 1.25}]
    scaling = {"options": {"kind": "scaling"}, "machine": machine, "rows": rows}
    for name, content in (("stages", stages), ("scaling", scaling), ("gradient", {"options": {"kind": "gradient"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text, files = benched.write([tmp_path / "stages.json"], tmp_path)
    assert "| 730 | rge, q = d | full | 1 | 2 | 3 | 0.5 | 6.5 |" in text and "| 730 | cge | delta |  |  |  |  | 0.25 |" in text
    assert [file.name for file in files] == ["bench.md", "bench.png"] and "a processor, 2" in files[0].read_text()
    text, files = benched.write([tmp_path / "scaling.json"], tmp_path / "out")
    assert "| scaling | 2 | 1.25 (1 to 3) | 2880 | 1.60 | 10.0 % |" in text and files[1].stat().st_size > 5000
    with pytest.raises(InputError, match="scaling and stages; report them one by one"):
        benched.write([tmp_path / "stages.json", tmp_path / "scaling.json"], tmp_path)
    with pytest.raises(InputError, match=r"gradient.json: expected a file of `bench stages or scaling --json`"):
        benched.write([tmp_path / "gradient.json"], tmp_path)


@pytest.fixture(scope="module")
def paper(project):
    """benchmarks/paper.py."""
    spec = importlib.util.spec_from_file_location("paper", project / "benchmarks" / "paper.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_papers_numbers_is_what_its_script_writes(project, paper):
    about = tomllib.loads((project / "benchmarks" / "paper.toml").read_text(encoding="utf-8"))
    kept = json.loads(paper.KEPT.read_text(encoding="utf-8"))
    assert (project / "benchmarks" / "results" / "paper.md").read_text(encoding="utf-8") == paper.page(about, kept)
    assert set(about["study"]) == {*STUDIES, "fig1"}
    numbers = [line.split("\t")[0] for line in paper.PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    assert set(numbers) <= set(about["study"])


def test_runs_are_taken_in_beside_each_number_of_the_paper(runs, paper, monkeypatch):
    """A number that was not run at the paper's size says so, whatever was run at another."""
    (runs / "fig4").rename(runs / "look")
    (runs / "fig4").mkdir()
    (runs / "look").rename(runs / "fig4" / "look")
    entry, kept = {"title": "Fig. 4", "over": "sparsity.ratio"}, {}
    monkeypatch.setattr(paper, "RESULTS", runs)
    paper.take_in(runs, {"study": {"fig4": entry, "a2": entry}}, kept)
    numbers = study.published(runs / "published.tsv", "fig4")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in paper.table(entry, numbers, kept["fig4"]).splitlines()[2:]
    ]
    assert rows == [
        ["dense", "0.0", "92.85", "54", "2.3", "3", "look", "2", "2,000", "1"],
        ["dense", "", "92.85", "not run", "", "", "paper", "", "", ""],
        ["deepzero", "0.99", "73.37", "not run", "", "", "paper", "", "", ""],
        ["deepzero", "0.9", "", "40", "", "1", "look", "2", "2,000", "1"],
        ["deepzero", "0.95", "", "30", "", "1", "look", "1 of 2, not finished", "1,000", "1"],
    ]
    assert kept["fig4"]["look"]["dates"] == "2026-11-20 to 2026-11-23, torch 2.14.1, cpu AMD Zen, avx512+bf16"


def test_rows_whose_runs_are_gone_are_kept_beside_those_found_again(runs, paper, monkeypatch):
    kept = {"fig4": {"look": {"rows": [paper.row("dense", "0.0", 50.0), paper.row("other", "0.5", 60.0)], "dates": "then"}}}
    (runs / "fig4").rename(runs / "look")
    (runs / "fig4").mkdir()
    (runs / "look").rename(runs / "fig4" / "look")
    monkeypatch.setattr(paper, "RESULTS", runs)
    for _ in range(2):  # the second time nothing is new
        paper.take_in(runs, {"study": {"fig4": {"title": "", "over": "sparsity.ratio"}}}, kept)
        found = {(one["method"], one["place"]): round(one["value"], 6) for one in kept["fig4"]["look"]["rows"]}
        assert found == {("other", "0.5"): 60, ("dense", "0.0"): 54, ("deepzero", "0.9"): 40, ("deepzero", "0.95"): 30}
        assert kept["fig4"]["look"]["dates"].split("; ") == ["then", paper.dates(runs / "fig4" / "look")]


def test_a_simulation_that_diverged_is_in_no_mean_and_counted(tmp_path, paper):
    for seed, name in enumerate(("NON", "NON-1")):
        make(tmp_path / name, seed, 0.9, None)
    (tmp_path / "evaluation").mkdir()
    head = "method\trun\tseed\tstep\tparameter\tsteps\tmae\tdiverged_at"
    own = [
        ("SRC", "", "", 0.3, 0),
        ("NON", "NON", 0, 0.1, 0),
        ("NON", "NON", 0, 0.2, 0),
        ("NON", "NON-1", 1, "inf", 9),
        ("NON", "NON-1", 1, 0.25, 0),
    ]
    lines = [f"{method}\t{run}\t{seed}\t1\t1.0\t500\t{mae}\t{at}" for method, run, seed, mae, at in own]
    (tmp_path / "evaluation" / "evaluation.tsv").write_text("\n".join([head, *lines]))
    src, non = paper.evaluated(tmp_path, "steps")
    assert (src["value"], src["error"], src["seeds"], src["queries"], src["hours"], src["epochs"]) == (
        0.3,
        None,
        1,
        None,
        None,
        "",
    )
    assert (non["value"], non["error"], non["seeds"]) == pytest.approx((0.2, 0.05, 2))
    assert (non["queries"], non["hours"], non["epochs"]) == (2000, 1.0, "2, 1 of 4 diverged")
