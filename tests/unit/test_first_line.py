"""What is logged before the line that says how the run began comes after it, or before an error, and is never lost."""

import subprocess
import sys

import pytest

CODE = """
import argparse, logging, pathlib, sys
from dzhpc.job import log as metrics
from dzhpc.job.launch import run_verb
from dzhpc.errors import InputError
log = logging.getLogger("dzhpc")

def main(world, args):
    metrics.set_up_log(True, quiet="quiet" in sys.argv, until_first=True)
    found = ["one"]
    log.info("early: %s", found)
    found.append("two")
    log.warning("careful")
    if "error" in sys.argv:
        raise InputError("bad input")
    if "first" in sys.argv:
        metrics.log_to(pathlib.Path("log.txt"))
        metrics.say_first("begun in %s", "here")
        log.info("later")
        metrics.say_first("begun again")
    return 0

parser = argparse.ArgumentParser()
parser.add_argument("how", nargs="*")
run_verb(parser, main)
"""
AFTER = ["begun in here", "early: ['one']", "careful", "later", "begun again"]


@pytest.mark.parametrize(
    ("how", "code", "out", "err"),
    [
        ("first", 0, [line for line in AFTER if line != "careful"], ["careful"]),
        ("first quiet", 0, [], ["careful"]),
        ("none", 0, ["early: ['one']"], ["careful"]),
        ("error", 2, ["early: ['one']"], ["careful", "bad input"]),
        ("error quiet", 2, [], ["careful", "bad input"]),
    ],
)
def test_nothing_comes_before_the_first_line_and_nothing_is_lost(tmp_path, how, code, out, err):
    command = [sys.executable, "-c", CODE, *how.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines(), done.stderr.splitlines()) == (code, out, err)
    if "first" in how:
        assert [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == AFTER
