"""Input files: precedence, strictness, and errors that name file, key, found and expected."""

import json
import logging
import os
import subprocess
import sys
import threading

import pytest

from dzhpc import config
from dzhpc.config import paths
from dzhpc.config.input import parse_written
from dzhpc.errors import InputError


def write(folder, text, name="a.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_equal_inputs_resnet20(project):
    defaults, shipped = config.load(), config.load(project / "inputs" / "resnet20.toml")
    assert shipped.run.name == "resnet20"
    shipped.run.name = defaults.run.name
    assert shipped == defaults
    assert (defaults.zo.mu, defaults.sparsity.q, defaults.stop.epochs, defaults.sparsity.ratio) == (5e-3, 192, 50, 0.9)
    optim = defaults.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.schedule, optim.warmup_epochs) == (0.1, 0.9, 5e-4, "cosine", 3)


def test_every_shipped_input_is_valid(project):
    inputs = [*(project / "inputs").glob("*.toml"), *(project / "examples").glob("*.toml")]
    assert {p.stem for p in inputs} >= {"digits", "cnn", "resnet20"}
    for path in inputs:
        assert config.load(path).run.name == path.stem
        assert config.idle(config.load(path)) == {} and not list(config.unmeant(config.load(path)))


IDLE = {
    "optim.name=sgd": ("optim.trust=1", "optim.lr_vectors=1"), "optim.name=adam": ("optim.momentum=0.5", "optim.adapt=true"),
    "zo.estimator=rge": ("zo.precision=bf16", "zo.compile=on"), "zo.estimator=cge": ("zo.q=3",),
    "zo.engine=full": ("zo.memory_mb=9",),
    "sparsity.pattern=static": ("sparsity.redraw_steps=7", "sparsity.share=0.1"), "sparsity.ratio=0": ("sparsity.q=9",),
    "optim.schedule=cosine": ("optim.milestones=[1]",),
    "task.kind=objective": ("data.batch_size=3", "stop.target_accuracy=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("choice", IDLE)
def test_keys_that_have_no_effect_beside_others_are_named(choice):
    function = ["task.function=m:F"] if "objective" in choice else []
    found = config.idle(config.load(None, [choice, *function, *IDLE[choice]]))
    key, _, value = choice.partition("=")
    reason = f'{key} = "{value}"' if value.isalpha() else f"{key} = {value}"
    assert found == {text.partition("=")[0]: reason for text in IDLE[choice]}
    assert config.lines(found) == [f"{', '.join(found)}: no effect with {reason}"]


ADAM = ("optim.name=adam", "sparsity.ratio=0.9")
OWN = ("task.kind=objective", "task.function=m:F", "sparsity.scores=random")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ((), []), (ADAM[:1], [" never in S "]), (ADAM, [" never in S "]), (("optim.name=adam", "sparsity.ratio=0"), []),
        ((*ADAM, "optim.weight_decay=0"), []), ((*ADAM, "sparsity.target=weights", "sparsity.pattern=static"), []),
        (("stop.epochs=3",), ["the run ends at 3 epochs, before optim.lr is reached"]),
        (("stop.epochs=3", "optim.warmup_epochs=2"), []),
        (OWN, [" pulls theta to 0"]), ((*OWN, *ADAM), [" pulls theta to 0", " never in S "]),
        ((*OWN, "optim.weight_decay=0"), []),
    ],
)  # fmt: skip
def test_what_warm_up_and_weight_decay_do_that_is_seldom_meant_is_said(keys, said):
    found = list(config.unmeant(config.load(None, list(keys))))
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


def test_averages_over_the_steps_of_one_set_need_one():
    keys = ["optim.name=gauss-newton", "optim.average_curvature=0.5", "sparsity.pattern=adaptive"]
    assert config.idle(config.load(None, keys)) == {"optim.average_curvature": "another S at each step"}
    assert config.idle(config.load(None, [*keys, "sparsity.redraw_steps=9"])) == {}


def test_precedence_is_defaults_file_command_line(tmp_path):
    path = write(tmp_path, "[zo]\nmu = 1e-2\nq = 7\n")
    found = config.load(path, ["zo.mu=1e-4", "zo.mu=2e-4"])
    assert (found.zo.mu, found.zo.q, found.zo.difference, found.run.name) == (2e-4, 7, "forward", "a")
    assert config.load().zo.mu == 5e-3  # nothing of it stays behind
    assert config.load(None, ["model.name=cnn"]).run.name == "cnn"
    assert config.load().run.name == "resnet20"


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        (["zo.estimator=cge"], "delta"),
        (["zo.estimator=latent", "task.kind=defense", "task.classifier=a:b", "model.name=ae-ds"], "delta"),
        (["zo.estimator=autograd"], "full"),
        (["zo.estimator=fa", "task.loss=mse"], "full"),
        (["zo.estimator=autograd", "zo.engine=delta"], "delta"),
        (["zo.estimator=autograd", "zo.precision=bf16"], "full"),  # which then has no effect
    ],
)
def test_who_asks_for_no_coordinate_needs_no_engine_for_them(tmp_path, keys, engine):
    found = config.load(None, keys)
    assert found.zo.engine == engine
    assert config.load(write(tmp_path, found.to_toml()), ["run.seed=1"]).zo.engine == engine
    assert parse_written(found.to_toml(), "input.toml").zo.engine == engine


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.dir=/scratch/my runs", "/scratch/my runs"),
        ('run.dir="quoted"', "quoted"),
        ("run.dir = spaced ", "spaced"),
        ("run.dir=a=b", "a=b"),
    ],
)
def test_a_value_on_the_command_line_may_be_a_bare_string(text, expected):
    assert config.load(None, [text]).run.dir == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("2.5", 2.5),
        ("1:30:00", 5400),
        ("01:30:00", 5400),
        ("100:00:05", 360_005),
        ("1:30", 90),
        ("1-02:00:00", 93_600),
        ("2-00:30", 174_600),
    ],
)
def test_times_are_seconds_or_hours_minutes_seconds(text, seconds):
    assert config.load(None, [f"stop.walltime={text}"]).stop.walltime == seconds


def test_a_time_with_days_is_refused_rather_than_cut():
    with pytest.raises(InputError, match=r"stop\.walltime"):
        config.load(None, ["stop.walltime=1:02:00:00"])


def test_an_empty_folder_and_a_section_given_twice_are_named(tmp_path):
    with pytest.raises(InputError, match=r'run\.dir = "": expected a folder'):
        config.load(None, ["run.dir="])
    with pytest.raises(InputError, match=r"a\.toml: data = .*: expected one \[data\]"):
        config.load(write(tmp_path, "[[data]]\nname = 'digits'\n"))


def refusal(*arguments):
    with pytest.raises(InputError) as info:
        config.load(*arguments)
    return str(info.value)


def test_a_misspelt_key_is_named_with_the_right_one(tmp_path):
    path = write(tmp_path, "[zo]\nstep_size = 1e-3\n")
    assert f"{path}: unknown key zo.step_size; did you mean zo.mu?" in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[zo]\nmue = 1e-3", "unknown key zo.mue; did you mean zo.mu?"),
        ("[optim]\nmu = 1e-3", "unknown key optim.mu; did you mean zo.mu?"),
        ("[optim]\nlearning_rate = 0.1", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("[data]\nbatchsize = 3", "unknown key data.batchsize; did you mean data.batch_size?"),
        ("[optimiser]\nlr = 1.0", "unknown key optimiser; did you mean optim?"),
        ("[stop]\nxyzzy = 1", "unknown key stop.xyzzy (`python -m dzhpc.info keys` lists every key)"),
        ("[zo]\nmu = -1.0\nstep_size = 2", "unknown key zo.step_size"),  # the unknown key first
        ("[zo]\nmu = 0.0", "zo.mu = 0.0: expected greater than 0"),
        ("[zo]\nmu = 1e-300", "zo.mu = 1e-300: expected between 1e-38 and 1e38, so that float32 holds it and its inverse"),
        ("[optim]\nlr = 1e300", "optim.lr = 1e+300: expected between 1e-38 and 1e38"),
        ("[zo]\nmu = 'small'", "zo.mu = 'small': expected number"),
        ("[zo]\nmu = inf", "zo.mu = inf: expected a finite number"),
        ("[zo]\nengine = 'delta8'", "zo.engine = 'delta8': expected 'full'"),
        ("[data]\nbatch_size = 0", "data.batch_size = 0: expected greater than or equal to 1"),
        ("[data]\nbatch_size = 8.5", "data.batch_size = 8.5: expected integer"),
        ("[data]\naugment = 1", "data.augment = 1: expected boolean"),
        ("[sparsity]\nratio = 1.0", "sparsity.ratio = 1.0: expected less than 1"),
        ("[checkpoint]\nkeep = 1", "checkpoint.keep = 1: expected greater than or equal to 2"),
        ("[run]\nname = 7", "run.name = 7: expected string"),
        ("zo = 3", "zo = 3: expected"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_file_found_and_expected(tmp_path, text, message):
    path = write(tmp_path, text)
    found = refusal(path)
    assert found.startswith(f"{path}: {message}")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zo.mu=small"], "--set: zo.mu = 'small': expected number"),
        (["zo.step_size=1"], "--set: unknown key zo.step_size; did you mean zo.mu?"),
        (["zoo.mu=1"], "--set: unknown key zoo"),
        (["zo.mu"], "--set zo.mu: expected SECTION.KEY=VALUE"),
        (["mu=1"], "--set mu=1: expected SECTION.KEY=VALUE"),
        (["zo.a.b=1"], "--set zo.a.b=1: expected SECTION.KEY=VALUE"),
    ],
)
def test_a_fault_on_the_command_line_is_said_to_be_there(tmp_path, overrides, message):
    assert refusal(write(tmp_path, "[zo]\nmu = 1e-2\n"), overrides).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read (No such file or directory)"), (b"[zo\n", "not valid TOML"), (b"\xff\xfe", "not valid TOML"),
        (b"a = " + b"1" * 5000, "not valid TOML"), (b"a = " + b"[" * 100_000, "not valid TOML"),
    ],
)  # fmt: skip
def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path, content, message):
    path = tmp_path / "a.toml"
    if content:
        path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity.target=weights"], 'sparsity.pattern = "dynamic": sparsity.target = "weights" needs "static"'),
        (["task.kind=objective", "task.function=a:b", "sparsity.temperature=2"], "sparsity.temperature = 2: divides logits"),
        (["zo.estimator=fzoo", "zo.q=1"], 'zo.q = 1: zo.estimator = "fzoo" divides by a standard deviation'),
        (["sparsity.pattern=regrasp", "sparsity.lpr=a.h5"], 'sparsity.lpr: a fixed file contradicts pattern = "regrasp"'),
        (["optim.name=adam", "optim.nesterov=true"], 'optim.nesterov = true: needs name = "sgd" and a momentum above 0'),
        (["optim.momentum=0.0", "optim.nesterov=true"], "optim.nesterov = true"),
        (["optim.name=muon", "sparsity.target=weights", "sparsity.pattern=static"], 'optim.name = "muon": moves all of a matrix'),
        (["optim.schedule=step"], 'optim.schedule = "step": needs optim.milestones'),
        (["task.kind=objective"], 'task.kind = "objective": needs task.function'),
        (["task.kind=objective", "task.function=a:B", "zo.estimator=autograd"], 'task.kind = "objective": has no autograd'),
        (
            ["task.kind=objective", "task.function=a:B", "model.weights=x.h5"],
            'model.weights: task.kind = "objective" has no model',
        ),
        (["task.kind=objective", "task.function=a:B", "zo.precision=bf16"], 'zo.precision = "bf16": only zo.engine = "delta"'),
        (["task.kind=objective", "task.function=a:B", "sparsity.scores=fo-grasp"], 'task.kind = "objective": has no autograd'),
        (["task.function=a:B"], '--set: task.function: belongs to task.kind = "objective"'),
        (["task.kind=sol", "task.sigma=0.5"], '--set: task.sigma: belongs to task.kind = "defense"'),
        (["task.retries=1"], 'task.retries: belongs to task.kind = "objective", "defense" or "sol"'),
        (["task.max_queries=1"], 'task.max_queries: belongs to task.kind = "objective", "defense" or "sol"; use stop.queries'),
        (
            ["task.sigma=0.5", "task.unroll=3"],
            'task.sigma, task.unroll: belong to other kinds than "classification"; remove them',
        ),
        (["task.kind=magic"], '--set: task.kind = \'magic\': expected one of "classification", "objective", "defense", "sol", '),
        (["task.kind=3"], "--set: task.kind = 3: expected one of"),
        (["task.kind=defense"], 'task.kind = "defense": needs task.classifier'),
        (["task.kind=defense", "task.classifier=a:b", "zo.estimator=autograd"], "a:b: a function has no autograd"),
        (["task.kind=sol", "zo.engine=reuse"], 'task.kind = "sol": needs zo.engine = "delta" or "full"'),
        (["task.kind=sol", "task.simulator=mine"], 'task.simulator = "mine": expected projected, phiflow or'),
        (["zo.estimator=latent"], 'zo.estimator = "latent": needs task.kind = "defense", task.loss = "classifier"'),
        (["task.kind=defense", "task.loss=mse", "zo.estimator=latent"], 'zo.estimator = "latent": needs task.kind = "defense"'),
        (["task.kind=defense", "task.simga=1.0"], "--set: unknown key task.simga; did you mean task.sigma?"),
        (["task.kind=defense", "task.sigma=0.0"], "--set: task.sigma = 0.0: expected greater than 0"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(overrides, message):
    assert message in refusal(None, overrides)


def test_a_kind_on_the_command_line_replaces_that_of_the_file_and_its_keys(tmp_path):
    path = write(tmp_path, '[task]\nkind = "defense"\nclassifier = "a:b"\nsigma = 0.5\nretries = 1\n')
    assert config.load(path, ["task.kind=classification"]).task.model_dump() == {
        "kind": "classification",
        "loss": "cross_entropy",
    }
    sol = config.load(path, ["task.kind=sol", "task.retries=2"]).task
    assert (sol.kind, sol.retries, sol.unroll) == ("sol", 2, 16)
    own = config.load(path, ["task.kind=mine:Task", "task.size=3"]).task
    assert own.fields == {"size": 3}
    assert "task.sigma: belongs to" in refusal(path, ["task.kind=classification", "task.sigma=0.5"])
    path = write(tmp_path, '[task]\nkind = "mine:Task"\nsize = 3\n')
    assert config.load(path).task.fields == {"size": 3}
    assert config.load(path, ["task.kind=classification"]).task.model_dump() == {
        "kind": "classification",
        "loss": "cross_entropy",
    }
    assert refusal(write(tmp_path, "task = 3")).startswith(f"{path}: task = 3: expected")
    assert config.load(None, ["task.kind=mine:Task", "task.max_queries=7"]).task.max_queries == 7
    assert config.load().task.max_queries is None


@pytest.mark.parametrize("kind", ["classification", "sol"])
def test_the_keys_of_all_kinds_that_an_earlier_version_wrote_are_those_of_its_own_kind(tmp_path, kind):
    """0.1 wrote them into checkpoints and input.toml; in an input file those of other kinds must be at their default."""
    tables = [keys().model_dump(exclude_none=True) for _, name, keys in config.tables() if name == "task"]
    everything = {key: value for table in tables for key, value in table.items()} | {"kind": kind}

    def text(**changed):
        return "[run]\nname = 'a'\n[task]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in (everything | changed).items())

    new = config.load(None, ["run.name=a", f"task.kind={kind}"])
    assert config.parse_written(text(sigma=0.5, classifier_model="x"), "step.h5") == config.load(write(tmp_path, text())) == new
    changes = [("task.unroll", 3, 16)] if kind == "sol" else []
    assert config.frozen_changes(config.parse_written(text(unroll=3), "step.h5"), new) == changes
    path = write(tmp_path, text(sigma=0.5, classifier_model="x"))
    assert refusal(path).startswith(
        f'{path}: task.sigma, task.classifier_model: belong to other kinds than "{kind}"; remove them'
    )
    with pytest.raises(InputError, match=r"step\.h5: unknown key task\.xyzzy"):
        config.parse_written(text(xyzzy=1), "step.h5")


def test_a_key_of_an_own_task_may_have_the_name_and_default_of_another_kinds(tmp_path):
    path = write(tmp_path, "[task]\nkind = 'm:T'\nsigma = 0.25\n")
    assert config.load(path).task.fields == {"sigma": 0.25}


def test_a_config_comes_back_from_its_own_toml(tmp_path):
    overrides = [
        "model.name=cnn",
        "model.depth=4",
        "zo.q=9",
        "data.mean=[0.5]",
        "stop.walltime=2:00:00",
        "run.dir=a\"b'c",
        "run.seed=3",
    ]
    first = config.load(None, overrides)
    path = write(tmp_path, first.to_toml(), "input.toml")
    again = config.load(path)
    assert again == first
    assert again.model.fields == {"depth": 4}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("zo.mu=0.1", ("zo.mu", 5e-3, 0.1)),
        ("model.name=cnn", ("model.name", "resnet20", "cnn")),
        ("model.depth=2", ("model.depth", None, 2)),
        ("data.batch_size=3", ("data.batch_size", 512, 3)),
        ("sparsity.ratio=0.5", ("sparsity.ratio", 0.9, 0.5)),
        ("optim.lr=1.0", ("optim.lr", 0.1, 1.0)),
        ("stop.epochs=3.0", ("stop.epochs", 50.0, 3.0)),
        ("run.seed=1", ("run.seed", 0, 1)),
    ],
)
def test_a_changed_frozen_key_is_named_with_both_values(change, expected):
    assert config.frozen_changes(config.load(None, ["run.name=a"]), config.load(None, ["run.name=a", change])) == [expected]


@pytest.mark.parametrize(("key", "old", "new"), [("batch_limit", 1024, 3), ("size", None, 2), ("kind", "m:T", "m:S")])
def test_a_changed_frozen_key_of_a_kind_is_named(key, old, new):
    assert config.frozen_changes(config.load(), config.load(None, ["task.kind=sol"]))[0] == ("task.kind", "classification", "sol")
    kind = ["task.kind=m:T"] if old != 1024 else ["task.kind=objective", "task.function=a:B"]
    change = [*kind, f"task.{key}={new}"]
    assert config.frozen_changes(config.load(None, kind), config.load(None, change)) == [(f"task.{key}", old, new)]
    for free in ("task.retries=7", "task.max_queries=7"):
        assert config.frozen_changes(config.load(None, kind), config.load(None, [*kind, free])) == []


FREE = (
    "data.root=/x", "run.name=b", "run.threads=2", "stop.steps=5", "stop.queries=5", "stop.target_accuracy=0.5",
    "stop.walltime=5", "checkpoint.keep=9", "eval.batch_size=7", "run.dir=x", "run.check_every=1",
)  # fmt: skip


@pytest.mark.parametrize("change", FREE)
def test_any_other_key_is_free_to_change_on_restart(change):
    assert config.frozen_changes(config.load(), config.load(None, [change])) == []


def test_every_key_is_known_with_its_default_and_documented():
    keys = {key: (default, meaning) for key, default, meaning in config.known_keys()}
    assert keys["zo.mu"] == (5e-3, "smoothing parameter: the length of a perturbation; pattern: the first radius")
    assert {key.split(".")[0] for key in keys} == set(config.Config.model_fields)
    assert [key for key, (_, meaning) in keys.items() if not meaning] == []


@pytest.mark.parametrize(
    "change",
    [
        "run.seed=18446744073709551616", "run.seed=9223372036854775808", "run.threads=1000000000000", "run.threads=4097",
        "run.deadline_margin=inf", "run.check_every=2147483648", "data.batch_size=1000000000000", "data.std=[inf]",
        "data.std=[0.0]", "data.mean=[nan]", "data.image_size=1000000", "zo.q=2000000000", "zo.memory_mb=1e300",
        "sparsity.q=2000000000", "sparsity.redraw_epochs=10000000000", "sparsity.redraw_steps=10000000000", "optim.lr=inf",
        "optim.weight_decay=inf", "optim.weight_decay=nan", "optim.warmup_epochs=inf", "optim.milestones=[nan]",
        "optim.milestones=[-1.0]", "optim.gamma=inf", "stop.epochs=1e308", "stop.steps=18446744073709551616",
        "stop.queries=18446744073709551616", "stop.walltime=inf", "checkpoint.every_steps=18446744073709551616",
        f"stop.walltime=1{400 * '0'}", f"stop.walltime=1{400 * '0'}:00:00", "checkpoint.every_minutes=inf",
        "checkpoint.keep=18446744073709551616", "eval.every_epochs=18446744073709551616",
        "eval.batch_size=18446744073709551616",
    ],
)  # fmt: skip
def test_a_number_that_no_file_or_array_could_hold_is_refused(change):
    assert refusal(None, [change]).startswith(f"--set: {change.split('=')[0]} = ")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("defense", "sigma=inf"), ("defense", "classifier_std=[0.0]"), ("defense", "classifier_mean=[inf]"),
        ("defense", "batch_limit=18446744073709551616"), ("defense", "retries=18446744073709551616"),
        ("defense", "max_queries=18446744073709551616"), ("sol", "frames=18446744073709551616"), ("sol", "resolution=1000000"),
        ("sol", "warm_up=18446744073709551616"), ("sol", "train_parameters=[inf]"), ("sol", "radius=inf"),
    ],
)  # fmt: skip
def test_nor_is_such_a_number_of_a_kind(kind, change):
    given = [f"task.kind={kind}", *(["task.classifier=a:b"] if kind == "defense" else []), f"task.{change}"]
    assert refusal(None, given).startswith(f"--set: task.{change.split('=')[0]} = ")


def test_every_number_of_an_input_has_an_upper_bound():
    """A new key cannot be forgotten: no field lets infinity pass, nor a whole number beyond what HDF5 holds."""
    unbounded = []
    for _, section, keys in config.tables():
        for name in keys.model_fields:
            for given in (float("inf"), 2**64, [float("inf")], [2**64]):
                try:
                    found = getattr(keys.model_validate({name: given}), name)
                except ValueError:
                    continue
                if found not in ([2.0**64], 2.0**64) or isinstance(found, int):
                    unbounded.append((section, name, found))
    assert unbounded == []


@pytest.mark.parametrize("text", ["2024-05-01", "42", "1e3", "true", "inf", "[a]", "07:30:00"])
def test_a_name_may_look_like_something_else(text):
    assert config.load(None, [f"run.name={text}"]).run.name == text
    assert config.load(None, [f'run.name="{text}"']).run.name == text
    assert config.load(None, ["run.name=a", "model.tag=42"]).model.fields == {"tag": 42}


def test_in_a_file_such_a_name_needs_quotes_and_the_error_says_so(tmp_path):
    assert 'expected string; put it into quotes: "2024-05-01"' in refusal(write(tmp_path, "[run]\nname = 2024-05-01\n"))


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/..", "/tmp/a", "a\0b"])
def test_a_run_has_a_name_of_its_own_below_the_folder_of_runs(name):
    assert "expected the name of a folder below run.dir" in refusal(None, [f"run.name={name}"])


def test_an_input_may_begin_with_the_mark_of_utf_8_whatever_the_locale(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf" + '[run]\nname = "größe-σ"\n'.encode())
    assert config.load(path).run.name == "größe-σ"
    code = "import sys; from dzhpc import config; print(config.load(sys.argv[1]).run.name.encode())"
    environment = dict(os.environ) | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == repr("größe-σ".encode()), done.stderr


def test_text_that_is_no_utf_8_is_refused_and_a_file_of_such_a_name_gets_another(tmp_path):
    assert "model.tag = 'caf\\udce9': is no UTF-8 text" in refusal(None, ["model.tag=caf\udce9"])
    assert config.load(write(tmp_path, "", "caf\udce9.toml")).run.name == "caf\\udce9"


def test_paths_are_expanded_as_a_shell_does_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/fast")
    monkeypatch.chdir(tmp_path)
    given = ["~/runs", "$SCRATCH/x", "${SCRATCH}y", "a/~b", "cost$", "$SCRATCH/$5", "a"]
    expected = ["/home/me/runs", "/fast/x", "/fasty", f"{tmp_path}/a/~b", f"{tmp_path}/cost$", "/fast/$5", f"{tmp_path}/a"]
    assert [str(config.path_of(config.load(None, [f"run.dir={path}"]), "run.dir")) for path in given] == expected
    loaded = config.load(None, ["run.dir=$SCRATCH/x"])
    assert 'dir = "$SCRATCH/x"' in loaded.to_toml()  # it may be another folder on the next machine


@pytest.mark.parametrize("key", ["run.dir", "data.root", "data.path", "model.weights", "sparsity.lpr", "task.classifier"])
def test_a_variable_that_is_not_set_is_named_with_the_key(monkeypatch, key):
    monkeypatch.delenv("NOWHERE", raising=False)
    kind = ["task.kind=defense"] if key.startswith("task") else []
    assert refusal(None, [*kind, f"{key}=$NOWHERE/x"]) == f'{key} = "$NOWHERE/x": the variable NOWHERE is not set'
    assert "no home folder is known for ~nobody-here" in refusal(None, [*kind, f"{key}=~nobody-here/x"])


def test_relative_paths_are_meant_from_where_a_verb_was_started(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "_started", None)
    monkeypatch.chdir(tmp_path)
    paths.start_here()
    monkeypatch.chdir("/")
    assert paths.absolute("runs/a") == tmp_path / "runs" / "a"
    assert paths.shown(tmp_path / "runs" / "a") == "runs/a" == paths.shown("runs/a")
    assert (paths.shown("/etc/a"), paths.shown(tmp_path)) == ("/etc/a", ".")


def test_two_inputs_have_modules_of_one_name_each_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in "ab":
        (tmp_path / name / "own_pair").mkdir(parents=True)
        (tmp_path / name / "own_single.py").write_text(f"from own_pair.inner import WHO\nOWN = {name!r}\n")
        (tmp_path / name / "own_pair" / "inner.py").write_text(f"WHO = {name!r}\n")
    (tmp_path / "a" / "only_a.py").write_text("X = 1\n")
    before = list(sys.path)
    for name in "aba":
        config.look_in(tmp_path / name)
        assert [config.import_object(f"own_single:{k}", "k") for k in ("OWN", "WHO")] == [name, name]
        assert sys.path[0] == str(tmp_path / name) and sys.path[1:] == before
        kept = sys.modules["own_single"]
        config.look_in(tmp_path / name)  # the same again forgets nothing
        assert sys.modules["own_single"] is kept
    assert config.import_object("only_a:X", "k") == 1
    config.look_in(tmp_path / "b")
    with pytest.raises(InputError, match="cannot import only_a"):
        config.import_object("only_a:X", "k")
    config.look_in()
    assert sys.path == before
    assert "own_single" not in sys.modules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", r"cannot import own_broken: SyntaxError: .*own_broken\.py, line 1"),
        ("raise SystemExit('no')", r"SystemExit: no, at .*own_broken\.py:1"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_broken.py").write_text(text)
    config.look_in(tmp_path)
    with pytest.raises(InputError, match=message):
        config.import_object("own_broken:f", "task.function")
    config.look_in()


def test_an_input_may_be_a_pipe_and_what_never_begins_or_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NO_WRITER", 0.1)
    path = tmp_path / "p.toml"
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"p\.toml: is a pipe to which nobody writes"):
        config.load(path)
    writer = threading.Thread(target=lambda: path.write_text("[zo]\r\nq = 7\r[run]\nname = 'a'\n"))
    writer.start()
    monkeypatch.setattr(paths, "NO_WRITER", 5.0)
    found = config.load(path)
    writer.join()
    assert (found.zo.q, found.run.name) == (7, "a")
    with pytest.raises(InputError, match=r"/dev/zero: more than 16 MiB, so it is no input file"):
        config.load("/dev/zero")
    with pytest.raises(InputError, match=r"b\.h5: is a file that dzhpc wrote .*, no TOML input file"):
        config.load(write(tmp_path, "dzhpc sha256 0123", "b.h5"))
    with pytest.raises(InputError, match=r'an empty name or "\." is no file; give the path of a TOML input file'):
        config.load("")  # $INPUT, unset


def test_a_module_that_sets_up_logging_does_not_silence_ours(tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text("import logging.config\nlogging.config.dictConfig({'version': 1})\nF = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert config.import_object("noisy:F", "task.function") == 3
    assert not logging.getLogger("dzhpc").disabled
