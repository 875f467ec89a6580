"""A black box that is a program: its files, its answer, its end, and how it fails. The programs are real ones."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dzhpc import config
from dzhpc.engines.blackbox import BlackBox
from dzhpc.errors import BlackBoxError, InputError, OutsideError
from dzhpc.job import keeper, program
from dzhpc.job.failure import keep_traceback
from dzhpc.job.worker import Worker
from dzhpc.tasks import command, make_task
from dzhpc.tasks.command import Program, Query


def keys(command, **more):
    """[task] of an objective with the parameters k and w."""
    more = {"initial": {"k": 2.5, "w": [1.0, -0.5]}, **more}
    table = {"task": {"kind": "objective", "command": command, **more}, "sparsity": {"ratio": 0.0}}
    return config.parse(table, "input")


def asked(command, shape=(), **more):
    """The answer of a program to k = 2.5, w = (1, -0.5)."""
    values = {"k": np.array(2.5), "w": np.array([1.0, -0.5])}
    task = keys(["sh", "-c", command] if isinstance(command, str) else command, **{"input": "in.json", **more}).task
    return Program(task, {"k": (), "w": (2,)}, ["k", "w"])(
        Query(values, np.array([2.5, 1.0, -0.5]), shape, np.nan if shape else np.inf)
    )


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of scratch folders, and an own working directory."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "scratch"


def test_files_are_made_of_templates_and_nothing_is_left(scratch):
    case = Path("case/constant")
    case.mkdir(parents=True)
    (case / "properties").write_text("k {k}; short {k:.2e}; second {w[1]}; all {w}; {other} { k } {{k}}\n")
    (case.parent / "run.sh").write_text("#!/bin/sh\ncat grid/properties $1 latin mesh.bin; test -d time\n")
    (case.parent / "run.sh").chmod(0o755)
    (case.parent / "mesh.bin").write_bytes(b"{k}\0")
    (case.parent / "latin").write_bytes(b"{k} \xb0C")
    (case.parent / "time").mkdir()
    (case.parent / "grid").symlink_to(case.absolute())
    Path("one.txt").write_text("one {k} in {folder}")
    Path("reader.py").write_text(
        "import shutil\ndef words(folder):\n    shutil.copy(folder / 'stdout.txt', 'said')\n    return 1.5\n"
    )
    answer = asked(["{folder}/run.sh", "{folder}/one.txt"], template=["case", "one.txt"], result="reader:words", input=None)
    words, rest = Path("said").read_bytes().decode("latin").split("/call")
    assert float(answer) == 1.5
    assert words.startswith("k 2.5; short 2.50e+00; second -0.5; all 1.0 -0.5; {other} { k } {2.5}\none 2.5 in /")
    assert re.search(rf"in {scratch}/dzhpc-scratch-[^/]+$", words) and rest == "2.5 \xb0C{k}\0"
    assert list(scratch.iterdir()) == []
    del sys.modules["reader"]


def test_what_a_program_is_given_and_what_is_read(scratch):
    read = {"json": "import json; d = json.load(open('x.json')); print(d['k'] + sum(d['w']))",
            "npy": "import numpy; print(numpy.load('x.npy').sum())",
            "h5": "import h5py; f = h5py.File('x.h5'); print(f['k'][()] + f['w'][()].sum())"}  # fmt: skip
    for kind, code in read.items():
        assert asked([sys.executable, "-c", code], input=f"x.{kind}") == 3.0
    assert asked("echo loss 1.0; echo loss 2.5D-3", pattern=r"loss (\S+)") == 2.5e-3
    assert asked("echo u=1 u=2; echo u=inf", (3,), pattern=r"u=(\S+)").tolist() == [1, 2, np.inf]
    assert asked("echo 1.5-105 -2+100 1e-3", (3,)).tolist() == [1.5e-105, -2e100, 1e-3]  # as Fortran writes three digits
    assert asked("echo 1 2; echo 3 4", (2, 2)).tolist() == [[1, 2], [3, 4]]
    assert asked("""echo '{"a/b": [0, {"c": 7}]}' > r.json""", result="r.json", pointer="/a~1b/1/c") == 7
    assert asked("printf '\\357\\273\\277[4.5]' > r.json", (1,), result="r.json").tolist() == [4.5]  # a byte order mark
    assert asked("echo '[[1], [2]]' > r.json", (2, 1), result="r.json").tolist() == [[1], [2]]
    save = [sys.executable, "-c", "import numpy; numpy.save('r.npy', numpy.float32([[5, 6]]))"]
    assert asked(save, (1, 2), result="r.npy").tolist() == [[5, 6]]
    assert asked("exit 3", infeasible=[3, 4]) == np.inf
    assert np.isnan(asked("exit 4", (2, 2), infeasible=[3, 4])).all()


FAILURES = {
    "echo started; echo no license >&2; exit 7": "left with exit code 7; its last words: no license",
    "kill -SEGV $$": "was ended by SIGSEGV; it said nothing",
    "printf '\\033[31mno\\033[0m \\351\\a\\n'; exit 1": "left with exit code 1; its last words: no \ufffd",
    ("mkfifo r", "result", "r"): "r: is no regular file; it said nothing",
    "echo 1 2": "stdout.txt: holds [2] numbers; expected one; its last words: 1 2",
    "true": "stdout.txt: is empty; it said nothing",
    "echo loss: one": "stdout.txt: 'loss:' is no number; its last words: loss: one",
    ("echo 1", "pattern", "loss (.*)"): "stdout.txt: nothing matches task.pattern = 'loss (.*)'; its last words: 1",
    ("echo 1", "result", "out/r.npy"): "left no out/r.npy (No such file or directory); its last words: 1",
    ("echo 1 > r.npy", "result", "r.npy"): "r.npy: ",
    ("head -c 99 /dev/urandom > r.json", "result", "r.json"): "r.json: is no JSON (",
    ("echo '{}' > r.json; echo ok", "pointer", "/loss"): "stdout.txt: is no JSON (",
    ("echo '[1]'", "pointer", "/-1"): "stdout.txt: has nothing at task.pointer = '/-1'; its last words: [1]",
    ("echo '{}'", "pointer", "/loss"): "stdout.txt: has nothing at task.pointer = '/loss'; its last words: {}",
    ("""echo '{"loss": "low"}'""", "pointer", "/loss"): "stdout.txt: holds str; expected numbers; its last words: {",
}


@pytest.mark.parametrize("case", FAILURES, ids=str)
def test_a_failure_is_named_and_its_files_are_kept(scratch, case):
    command, *more = [case] if isinstance(case, str) else case
    box = BlackBox(lambda x: asked(command, **dict([more] if more else [])), name="solver")
    with pytest.raises(BlackBoxError) as caught:
        box(torch.zeros(1, 1))
    error = caught.value
    assert str(error).startswith(f"solver: {FAILURES[case]}") and isinstance(error.__cause__, OutsideError)


def test_the_files_of_the_last_failure_alone_are_kept(scratch, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    task = keys(["sh", "-c", "echo {k} > out; exit 1"], input="in.json").task
    box = Program(task, {"k": (), "w": (2,)}, ["k"])
    for k in (1.0, 2.0):
        with pytest.raises(OutsideError) as caught:
            box(Query({"k": np.array(k), "w": np.zeros(2)}, np.zeros(3), ()))
    assert keep_traceback(caught.value, 3, run) == f" (its files are kept in {run}/failed-rank3)"
    assert (run / "failed-rank3" / "out").read_text() == "2.0\n"
    assert json.loads((run / "failed-rank3" / "in.json").read_text()) == {"k": 2.0, "w": [0.0, 0.0]}
    del box, caught
    assert list(scratch.iterdir()) == []


HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()  # out of the process group
    if os.fork() == 0:  # an orphan
        os.setsid()
        open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
        time.sleep(600)
    os._exit(0)
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""


def running(pids) -> list[int]:
    return [pid for pid in pids if program.process.start_of(pid) is not None]


def test_a_program_that_hangs_ends_with_all_that_it_started(scratch, monkeypatch):
    Path("hangs.py").write_text(HANGS)
    start = time.monotonic()
    with pytest.raises(OutsideError, match=r"^had not ended after 0.5 s \(task.timeout\), and was killed; it said nothing$"):
        asked([sys.executable, "hangs.py", str(Path("pids").absolute())], template="hangs.py", timeout=0.5)
    assert 0.5 < time.monotonic() - start < 0.5 + keeper.GRACE + 5
    pids = list(map(int, Path("pids").read_text().split()))
    assert len(pids) == 2 and running(pids) == []


def test_a_daemon_that_a_program_leaves_behind_is_ended(scratch):
    pids = Path("pids").absolute()
    assert asked(f"setsid sleep 600 & echo $! > {pids}; echo 1") == 1
    assert running([int(pids.read_text())]) == []


OWNER = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from test_command import asked
asked(f"echo $$ > {sys.argv[2]}/pid; sleep 600 & echo $! >> {sys.argv[2]}/pid; wait")
"""


def test_a_rank_that_is_killed_leaves_no_orphan_and_no_scratch(scratch, tmp_path):
    words = [sys.executable, "-c", OWNER, str(Path(__file__).parent), str(tmp_path)]
    owner = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        until(lambda: (tmp_path / "pid").exists() and len((tmp_path / "pid").read_text().split()) == 2, "no program", 60)
        pids = list(map(int, (tmp_path / "pid").read_text().split()))
        assert running(pids) == pids and len(list(scratch.iterdir())) == 1
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)
    until(lambda: not running(pids), "orphans", 10)
    until(lambda: not list(scratch.iterdir()), "scratch", 10)


def until(condition, what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_scratch_of_ranks_that_are_gone_is_swept(scratch):
    old = scratch / f"{program.PREFIX}{program.socket.gethostname()}-{os.getpid()}-1-abc"
    other = scratch / f"{program.PREFIX}elsewhere-{os.getpid()}-1-abc"
    for folder in (old, other):
        folder.mkdir()
    mine = program.Keeper()
    program.sweep()
    assert sorted(scratch.iterdir()) == sorted([other, mine.folder])
    mine.close()
    assert list(scratch.iterdir()) == [other]


def test_variables_of_the_launcher_do_not_reach_a_program(monkeypatch):
    passes = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_btl": "self",
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/c",
    }
    stays = {"OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3", "OMPI_MCA_num_procs": "4", "PRTE_LAUNCHED": "1", "OPAL_PREFIX": "/x",
             "PMI_FD": "5", "SLURM_PROCID": "3", "SLURM_JOBID": "7", "SLURM_MPI_TYPE": "none", "DZHPC_STATUS": "/s"}  # fmt: skip
    for name in [name for name in os.environ if name.startswith(program.LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in {**passes, **stays}.items():
        monkeypatch.setenv(name, value)
    here = program.environment()
    assert {name: here[name] for name in passes} == passes and not set(stays) & set(here) and here["DZHPC_RANK"] == "3"


def test_an_objective_by_a_program_retries_counts_and_skips(scratch):
    Path("once").touch()
    code = f"test -e {Path('once').absolute()} && rm {Path('once').absolute()} && exit 5; test {{k}} = 3.5 && exit 9; echo {{k}}"
    task = make_task(keys(["sh", "-c", code, "{w}"], infeasible=[9], units={"k": 0.5}, concurrency=3), torch.device("cpu"))
    assert task.bind(0) == 1.25  # the unit of k is 0.5, and the first call is made again
    np.testing.assert_allclose(task.engine.differences([0, 1, 2], 0.1), [0.05, 0, 0])
    assert task.engine.differences([0], 4.5).tolist() == [0] and task.lost == 1
    assert task.engine.queries == 5
    assert list(task.model.state_dict()) == ["k", "w"]


def test_why_a_script_does_not_start_and_why_it_is_silent_on_a_full_disk(scratch, monkeypatch):
    Path("dos.sh").write_text("#!/bin/sh\r\necho 1\r\n")
    Path("dos.sh").chmod(0o755)
    with pytest.raises(OutsideError, match=r"^cannot be started \(No such file or directory; if it is a script, "):
        asked(["./dos.sh"])
    monkeypatch.setattr(command, "LITTLE", 2**80)  # no disk has so much space
    with pytest.raises(OutsideError, match=rf"^left with exit code 1; it said nothing, and no space is left in {scratch}$"):
        asked("exit 1")


def test_a_program_may_give_residuals_of_which_infeasible_ones_count_as_none(scratch):
    code = "test {k} = 4.5 && exit 9; echo {k}; awk 'BEGIN { print 1 + {w[0]} }'; echo 3"
    task = make_task(keys(["sh", "-c", code, "{w}"], infeasible=[9], residuals=3), torch.device("cpu"))
    assert task.bind(0) == pytest.approx((2.5**2 + 2**2 + 3**2) / 3)
    np.testing.assert_allclose(task.engine.responses([0, 1, 2], 0.5), [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0]])
    assert task.engine.responses([0], 2.0).tolist() == [[0, 0, 0]] and task.lost == 1
    with pytest.raises(BlackBoxError, match=r"stdout.txt: holds \[3\] numbers; expected \[4\]"):
        make_task(keys(["sh", "-c", code, "{w}"], residuals=4, retries=0), torch.device("cpu")).bind(0)


WRONG = {
    "template": ({"template": "nowhere.txt"}, "task.template = nowhere.txt: does not exist"),
    "unheard": ({"input": None}, "task.command: the program never learns k, w: write {k} into task.template or"),
    "program": ({"command": ["no-such-solver"]}, "task.command = no-such-solver: there is no such program"),
    "units": ({"units": {"q": 1.0}}, "task.units: task.initial has no q; it has k, w"),
    "initial": ({"initial": {"k": "two"}}, "task.initial gave what is no theta0 (block k is str)"),
    "folder": ({"initial": {"folder": 1.0}}, "task.initial: {folder} is the folder of the call; call the parameter by another"),
    "index": ({"command": ["echo", "{w[2]}"]}, r"task.command: {w[2]} does not fit w [2] ("),
    "format": ({"command": ["echo", "{k:.2q}"]}, r"task.command: {k:.2q} does not fit k [] ("),
    "pattern": ({"pattern": "loss"}, "input: task.pattern = 'loss': expected one group (...)"),
    "regular": ({"pattern": "loss ("}, "input: task.pattern = 'loss (': no regular expression ("),
    "result": ({"result": "../x"}, 'input: task.result = "../x": expected a file in the folder of the call'),
    "suffix": ({"input": "x.dat"}, 'input: task.input = "x.dat": expected a file .npy, .json or .h5'),
    "scratch": ({"scratch": "nowhere"}, "task.scratch = nowhere: is no folder that may be written"),
    "pointer": ({"pointer": "loss"}, 'input: task.pointer = "loss": expected "/loss"'),
    "infeasible": ({"infeasible": [3, 0]}, "input: task.infeasible = 0: expected greater than or equal to 1"),
    "both": ({"function": "a:b"}, 'input: task.kind = "objective": needs task.function = "package.module:Name" or task.command'),
    "alone": ({"command": None, "function": "a:b", "initial": None}, "input: task.input: belongs to task.command"),
    "numbers": ({"initial": "/dev/zero"}, "task.initial = /dev/zero: cannot be read as .npy or .json (it is no regular file)"),
    "theta0": ({"initial": None}, "input: task.command: needs task.initial"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_said_first(scratch, case):
    more, said = WRONG[case]
    with pytest.raises(InputError) as caught:
        make_task(keys(**{"command": ["echo", "1"], "input": "in.json", **more}), torch.device("cpu"))
    assert str(caught.value).startswith(said)


MODULE = """
import os, time, numpy as np

class Loss:
    def initial(self):
        return np.zeros(2)
    def __call__(self, thetas, step):
        if step == 1:
            time.sleep(600)
        if step == 2:
            raise ConnectionError("no license")
        if step == 3:
            os._exit(1)
        print("asked", len(thetas), flush=True)
        return (thetas**2).sum(1) + step

def nothing(images):
    return images
"""


def test_a_python_function_has_a_time_limit_in_a_process_of_its_own(scratch, monkeypatch, capfd):
    Path("limited.py").write_text(MODULE)
    monkeypatch.syspath_prepend(os.getcwd())
    loss = Worker("limited:Loss", "task.function", 1.0, makes=True)
    assert loss.initial().tolist() == [0, 0]
    assert loss(np.ones((3, 2)), 0).tolist() == [2, 2, 2]
    first = loss._keeper._process
    with pytest.raises(OutsideError, match=r"^had not answered after 1 s \(task.timeout\), and was killed$"):
        loss(np.ones((1, 2)), 1)
    assert first.poll() is not None
    with pytest.raises(OutsideError, match=r"^ConnectionError: no license, at .*limited.py:11 in __call__$") as caught:
        loss(np.ones((1, 2)), 2)
    assert "raise ConnectionError" in caught.value.text
    with pytest.raises(OutsideError, match=r"^its process has ended in the middle of a call$"):
        loss(np.ones((1, 2)), 3)
    assert loss(np.ones((1, 2)), 0).tolist() == [2]
    with pytest.raises(InputError, match=r"task.function = limited:nothing: has no initial\(\)"):
        Worker("limited:nothing", "task.function", 1.0).initial()
    with pytest.raises(InputError, match="module limited has no 'More'"):
        Worker("limited:More", "task.function", 1.0).initial()
    assert capfd.readouterr().out.startswith("asked 3\nasked 1\n")
    del loss, caught
    until(lambda: not list(scratch.iterdir()), "scratch", 10)
