"""The example in examples/http_box/: a classifier behind HTTP gives the same numbers as in the process, and may be restarted."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from mpi_launch import Case, assert_same, batch, bits, checkpoints, column, sets

from dzhpc.config import import_object
from dzhpc.engines.blackbox import BlackBox
from dzhpc.errors import BlackBoxError

CLASSIFIER = sets(zo__estimator="autograd", zo__engine="full", sparsity__ratio=0.0, stop__epochs=8, optim__warmup_epochs=0)
SHORT = sets(zo__engine="reuse", model__trainable=["model.4.*"], data__batch_size=16, stop__steps=12, checkpoint__every_steps=1)


@pytest.fixture(scope="module")
def example(project, tmp_path_factory):
    """A folder with the example, a classifier ``classifier.h5``, and the run ``inside`` that has it in its own process."""
    folder = tmp_path_factory.mktemp("http")
    shutil.copytree(project / "examples" / "http_box", folder, dirs_exist_ok=True)
    shutil.copy(project / "inputs" / "digits.toml", folder)
    inside = sets(task__classifier="digits/checkpoints/step-00000088.h5")
    cases = [
        Case("classifier", "train", ["digits.toml", "--run-dir", "digits", *CLASSIFIER]),
        Case("inside", "train", ["defense.toml", "--run-dir", "inside", *SHORT, *inside]),
    ]
    for result in batch(1, folder, cases).values():
        result.succeeded()
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder, port: int):
    """The server as a process of its own, once it listens."""
    command = [sys.executable, "server.py", "digits/checkpoints/step-00000088.h5", str(port)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().endswith(f"answers at http://127.0.0.1:{port}/\n")
        yield process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def test_a_server_that_is_killed_and_restarted_is_survived_and_changes_no_bit(example):
    port, again = free_port(), []

    def until(condition, what: str) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, what
            time.sleep(0.01)

    with server(example, port) as first:

        def meanwhile(_) -> None:
            until(lambda: len(checkpoints(example / "outside")) > 1, "no step was made")
            first.send_signal(signal.SIGKILL)
            first.wait(10)
            time.sleep(0.5)
            again.append(server(example, port))
            again[0].__enter__()

        try:
            words = ["defense.toml", "--run-dir", "outside", *SHORT]
            case = Case("outside", "train", words, {"BOX_URL": f"http://127.0.0.1:{port}/"})
            outside = batch(2, example, [case], meanwhile=meanwhile)["outside"]
        finally:
            for each in again:
                each.__exit__(None, None, None)
    assert outside.code == 0, outside.err
    assert re.search(r"^task.classifier = box:classify: \w+: .*; asking again in 1 s$", outside.err, re.M)
    assert column(example / "outside", "train/step") == list(range(1, 13))
    beside = ("config", "env/data")  # the weights of a classifier that answers elsewhere are not known
    assert_same(bits(example / "inside", but=beside), bits(example / "outside", but=beside))


def test_without_a_server_the_box_fails_by_its_name(example, monkeypatch):
    monkeypatch.setenv("BOX_URL", f"http://127.0.0.1:{free_port()}/")
    monkeypatch.syspath_prepend(example)
    box = BlackBox(import_object("box:classify", "task.classifier"), numpy=True)
    with pytest.raises(BlackBoxError, match=r"^classify: URLError: <urlopen error \[Errno 111\] Connection refused>, at "):
        box(torch.zeros(2, 1, 8, 8))
