"""Standard output and error that cannot be written: a full disk, a closed pipe, a closed descriptor, a narrow encoding."""

import os
import subprocess
import sys

import pytest

LOGS = """
import sys
from dzhpc.job import log
log.open_streams()
log.set_up_log(True)
for k in range(3):
    log.log.info("line σ %d", k)
    log.log.warning("warning %d", k)
print("done", file=open(sys.argv[1], "w"))
log.close_streams()
"""


def run(command, tmp_path, redirection, **environment):
    line = f'exec "$@" {redirection}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, "bash", *command], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=dict(os.environ) | environment,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", ["> /dev/full", "2> /dev/full", "> /dev/full 2>&1", ">&-", ">&- 2>&-", "> >(true)"])
def test_a_run_whose_lines_nobody_takes_goes_on(tmp_path, redirection):
    done = run([sys.executable, "-c", LOGS, tmp_path / "mark"], tmp_path, redirection)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mark").read_text() == "done\n"


def test_characters_that_the_locale_lacks_are_no_error(tmp_path):
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = run([sys.executable, "-c", LOGS, tmp_path / "mark"], tmp_path, "", **latin)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "line \\u03c3 0")


def test_what_was_asked_for_and_cannot_be_written_is_an_error(tmp_path):
    done = run([sys.executable, "-m", "dzhpc.info", "keys"], tmp_path, "> /dev/full")
    assert (done.returncode, done.stderr) == (2, "standard output: cannot be written (No space left on device)\n")


def test_nobody_has_to_read_to_the_end(tmp_path):
    line = f"{sys.executable} -m dzhpc.info keys | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
