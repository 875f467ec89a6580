"""Processes that user code forks inside a rank: they end when they are asked to, and never take the rank's place."""

import subprocess
import sys

import pytest

TERMINATED = """
import multiprocessing, os, signal, time
from dzhpc.job.stopping import listen
def work(k):
    return k * k
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
listen(), os.kill(os.getpid(), signal.SIGHUP)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
listen()
fork = multiprocessing.get_context("fork")
for _ in range(30):  # at once, before the child has run a line
    child = fork.Process(target=time.sleep, args=(1000,))
    child.start(), child.terminate(), child.join(20)
    assert child.exitcode == -signal.SIGTERM, child.exitcode
for _ in range(10):
    with fork.Pool(2) as pool:
        assert pool.map(work, range(3)) == [0, 1, 4]
child = fork.Process(target=time.sleep, args=(0.5,))  # mpirun relays its warnings to children, too
child.start(), time.sleep(0.1), os.kill(child.pid, signal.SIGUSR1), child.join(20)
assert child.exitcode == 0, child.exitcode
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGHUP)  # the rank itself takes note and lives
from dzhpc.job import stopping
assert [number for number, _ in stopping.received_signals] == [signal.SIGTERM, signal.SIGHUP]
signal.signal(signal.SIGTERM, lambda *_: os._exit(9)), signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # a user's own, later
for _ in range(2):
    stopping.listen_again(), os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGUSR1)
assert len(stopping.received_signals) == 6
print("all ended")
"""
COMES_BACK = """
import os, sys
from dzhpc.job.world import World
world = World()
def ask():
    if os.fork() == 0:
        LEAVE
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 1
try:
    with world.together():
        ask()
except BaseException as error:
    sys.exit(world.fail(error))
print("the rank goes on")
"""


OF_A_BOX = """
import os, torch
from dzhpc.engines.blackbox import BlackBox
def ask(x):
    if os.fork() == 0:
        LEAVE
    assert os.waitstatus_to_exitcode(os.wait()[1]) == CODE
    return x
assert len(BlackBox(ask, retries=3)(torch.ones(2))) == 2
print("the rank goes on")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_child_ends_by_sigterm_and_a_pool_too_while_the_rank_only_takes_note():
    done = run(TERMINATED)
    said = sorted(line.partition(", which is replaced")[0] for line in done.stderr.splitlines())
    replaced = ["SIGTERM: user code has set a handler (<lambda>)", "SIGUSR1: user code has set a handler (SIG_DFL)"]
    assert (done.stdout, said) == ("all ended\n", replaced)


@pytest.mark.parametrize("leave", ["return", "sys.exit(0)", "raise ValueError('in the child')"])
def test_a_child_that_comes_back_is_ended_before_it_speaks_for_the_rank(leave):
    done = run(COMES_BACK.replace("LEAVE", leave))
    assert (done.returncode, done.stdout) == (0, "the rank goes on\n")
    assert done.stderr.startswith("a process that user code forked") and done.stderr.endswith("end it with os._exit\n")


@pytest.mark.parametrize(
    ("leave", "code", "said"),
    [("return x", 1, "came back from it"), ("raise ValueError('odd')", 1, "left by"), ("exit(3)", 3, "")],
)
def test_a_child_that_a_black_box_lets_come_back_is_ended_at_once(leave, code, said):
    done = run(OF_A_BOX.replace("LEAVE", leave).replace("CODE", str(code)))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (0, "the rank goes on\n", bool(said))
    assert said in done.stderr
