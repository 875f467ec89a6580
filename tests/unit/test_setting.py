"""What job scripts ask the program about an input, instead of reading TOML themselves."""

import subprocess
import sys

import pytest

from dzhpc.config.setting import setting
from dzhpc.errors import InputError

WAKE = '[run]\n  name = "wake-a"\n[task]\n  kind = "sol"\n[data]\n  name = "mywake"\n  root = "scratch" # not data/\n'


@pytest.fixture
def wake(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(WAKE)
    return str(path)


def test_the_values_are_those_that_a_run_would_see(wake, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/fast")
    words = [
        "train",
        "--set",
        "run.dir=$SCRATCH/runs",
        "--quiet",
        "--set=task.unroll=3",
        "-o",
        "x.h5",
        "--set",
        "run.name=2024-05-01",
    ]
    keys = "data.name,data.root,run.dir,run.name,task.unroll,model.weights,task.classifier,zo.q"
    assert setting([wake, keys, "--", *words]).split("\n") == ["mywake", "scratch", "/fast/runs", "2024-05-01", "3", "", "", ""]
    assert setting([wake, "run.name"]) == "wake-a"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected python -m dzhpc.info setting INPUT"),
        (["w.toml"], "expected python -m dzhpc.info setting INPUT"),
        (["w.toml", "data.nome"], "unknown key data.nome"),
        (["absent.toml", "data.name"], "absent.toml: cannot be read"),
        (["w.toml", "data.name", "--", "--set", "zo.step=1"], "--set: unknown key zo.step"),
    ],
)
def test_a_bad_question_is_one_line(wake, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        setting(words)


def test_the_verb_answers_without_loading_torch(wake):
    code = (
        "import runpy, sys; sys.argv = ['info', 'setting', *sys.argv[1:]]\n"
        "try: runpy.run_module('dzhpc.info', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )

    def ask(*words):
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)

    done = ask(wake, "data.name,data.path", "--", "x")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mywake\n\n", "")
    done = ask(wake, "data.nome")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
