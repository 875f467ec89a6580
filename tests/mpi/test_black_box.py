"""A black box that fails on one rank: all ranks leave with a checkpoint, and the same command goes on to the same bits."""

import json

import pytest
from mpi_launch import Case, assert_same, attributes, batch, bits, checkpoints, column, contents, sets

RUN = ["objective.toml", *sets(task__function="userland:Outage", zo__mu=1e-3, optim__lr=1e-3, stop__steps=6, task__retries=0)]
KINDS = {
    "cge": [*RUN, *sets(eval__every_epochs=4)],
    "rge": [*RUN, *sets(eval__every_epochs=4, zo__estimator="rge", zo__q=24)],
    "scores": [*RUN, *sets(sparsity__ratio=0.5, sparsity__q=24, sparsity__redraw_epochs=2, sparsity__pattern="regrasp")],
}
DEFENSE = """
[task]
kind = "defense"
classifier = "userland:redder"
[model]
name = "dncnn"
depth = 3
width = 2
[data]
name = "userland:tiles"
batch_size = 10
[zo]
engine = "full"
mu = 1e-3
[sparsity]
ratio = 0.5
q = 3
[optim]
lr = 0.01
[stop]
epochs = 2
steps = 5
"""
# name: (kind, "rank step call" that fails, step of the checkpoint, differences known)
ON_TWO = {
    "chunk": ("cge", "1 2 3", 2, True),  # at a step: bind, then the chunks; before them, on rank 0, a due evaluation
    "chunk-of-root": ("cge", "0 3 1", 3, True),
    "direction": ("rge", "1 2 3", 2, True),
    "bind": ("cge", "1 3 0", 3, None),  # nothing to be known by rank 1, perhaps by rank 0
    "score": ("scores", "1 1 12", 2, False),  # scores are asked for by their number, here 1, after step 2
    "evaluation": ("cge", "0 4 0", 4, False),
    "last-evaluation": ("cge", "0 6 0", 6, False),
    "first-step": ("cge", "1 0 4", 0, True),
}


@pytest.fixture(scope="module")
def failed(place):
    """Runs on two ranks whose box fails once, and how their newest checkpoints looked then; one that is asked again."""
    cases = [Case(name, "train", [*KINDS[kind], "--run-dir", name], {"DOWN": down}) for name, (kind, down, *_) in ON_TWO.items()]
    again = [*KINDS["cge"], "--run-dir", "again", *sets(task__retries=1)]
    (place / "defense.toml").write_text(DEFENSE)
    budget = [*KINDS["cge"], "--run-dir", "budget"]
    cases += [Case(f"budget-{k}", "train", [*budget, *sets(task__max_queries=n)]) for k, n in enumerate((80, 80, 10**6))]
    cases += [Case("no-score", "train", [*KINDS["scores"], "--run-dir", "no-score", *sets(task__max_queries=50)])]
    cases += [Case("defense", "train", ["defense.toml", "--run-dir", "defense"])]
    rounded = sets(task__classifier="userland:redder_by_tenths")
    cases += [Case("rounded", "train", ["defense.toml", "--run-dir", "rounded", *rounded])]
    cases += [Case("prune", "prune", ["defense.toml", "-o", "lpr.h5", *sets(task__max_queries=99)])]
    cases += [Case("again", "train", again, {"DOWN": "1 2 3"})]
    cases += [Case("afresh", "train", [*KINDS["scores"], "--run-dir", "afresh"], {"DOWN": "1 0 2"})]
    cases += [Case("warned", "train", [*KINDS["cge"], "--run-dir", "warned"], {"DOWN": "1 2 3", "WARNED": "1"})]
    results = batch(2, place, cases)
    return results, {name: contents(checkpoints(place / name)[-1]) for name in ON_TWO}


@pytest.fixture(scope="module")
def continued(place, failed):
    """The same commands on one rank, after runs on one rank: one undisturbed of each kind, and one whose box fails."""
    whole = [Case(f"whole-{kind}", "train", [*args, "--run-dir", f"whole-{kind}"]) for kind, args in KINDS.items()]
    alone = ["train", [*KINDS["cge"], "--run-dir", "alone"]]
    cases = [Case(name, "train", [*KINDS[kind], "--run-dir", name]) for name, (kind, *_) in ON_TWO.items()]
    cases += [Case("warned", "train", [*KINDS["cge"], "--run-dir", "warned"])]
    return batch(1, place, [*whole, Case("alone", *alone, {"DOWN": "0 2 3"}), Case("alone-again", *alone), *cases])


@pytest.mark.parametrize("name", ON_TWO)
def test_a_box_that_fails_on_one_rank_ends_the_run_with_a_checkpoint(place, failed, name):
    _, down, step, known = ON_TWO[name]
    rank = down[0]
    file = f"{name}/checkpoints/step-{step:08d}.h5"
    line = failed[0][name].error(6, f"rank {rank}: task.function = userland:Outage: ConnectionError: no license left, at ")
    assert line.endswith(f"(traceback in {name}/crash-rank{rank}.txt); the same command continues from {file}")
    assert "in __call__" in (place / name / f"crash-rank{rank}.txt").read_text()
    launch = json.loads((place / name / "launches" / "001.json").read_text())
    assert (launch["state"], launch["exit_code"], launch["reason"]) == ("failed", 6, line)
    assert attributes(checkpoints(place / name)[-1], "state")["step"] >= step
    if known is not None:
        assert ("partial/done" in failed[1][name]) == known


@pytest.mark.parametrize("name", ON_TWO)
def test_the_same_command_goes_on_to_the_same_bits(place, failed, continued, name):
    kind, _, step, _ = ON_TWO[name]
    assert f"restarting at step {step} from " in continued[name].succeeded().out
    assert_same(bits(place / f"whole-{kind}"), bits(place / name))


def test_on_one_rank(place, continued):
    line = continued["alone"].error(6, "task.function = userland:Outage: ConnectionError: no license left")
    assert line.startswith("task.function")
    assert "completing step 3: 4 of 24 differences are known" in continued["alone-again"].succeeded().out
    assert_same(bits(place / "whole-cge"), bits(place / "alone"))


def test_a_box_that_fails_before_anything_is_known(place, failed):
    """In the first scores' bind: there is nothing to keep."""
    failed[0]["afresh"].error(6, "rank 1: ", "no license left", "the same command starts afresh")
    assert checkpoints(place / "afresh") == []


def test_a_box_that_fails_is_asked_again_before_the_run_ends(place, failed, continued):
    failed[0]["again"].error(0, "userland:Outage: ConnectionError: no license left", "asking again in 1 s")
    assert_same(bits(place / "whole-cge", but=("config",)), bits(place / "again", but=("config",)))
    assert column(place / "again", "eval/step") == [4, 6]


def test_the_run_ends_before_it_asks_more_often_than_it_may(place, failed, continued):
    """25 questions a step and 1 an evaluation, which every end leaves room for."""
    first, second, third = (failed[0][f"budget-{k}"].succeeded().out for k in range(3))
    assert "stopped at step 3: task.max_queries would be exceeded by the next step; 76 queries" in first
    assert "nothing left to do: task.max_queries would be exceeded by the next step at step 3" in second
    assert "restarting at step 3" in third and "stopped at step 6: stop.steps reached" in third
    assert_same(bits(place / "whole-cge", but=("config",)), bits(place / "budget", but=("config",)))
    assert "stopped at step 0: task.max_queries would be exceeded" in failed[0]["no-score"].succeeded().out
    failed[0]["prune"].error(2, "task.max_queries = 99: the scores ask 100 times; raise it, or lower sparsity.q")


def test_queries_are_the_questions_that_a_classifier_is_asked(place, failed):
    """Half of 2 x 54 + 36 weights are active, and all 7 biases; 10 images a batch, 12 in the test set; an epoch has 4 steps."""
    failed[0]["defense"].succeeded()
    step, scores, evaluation = 10 * (2 + 72 + 7), 2 * 10 * (2 + 3), 2 * 12
    assert column(place / "defense", "train/queries") == [scores + k * step + (k > 4) * evaluation for k in range(1, 6)]


def test_a_classifier_that_rounds_its_answers_is_named(place, failed):
    line = failed[0]["rounded"].error(5, "step 1: task.classifier = userland:redder_by_tenths answered the same under all ")
    assert line.endswith("perturbations: quantised answers? raise zo.mu (now 0.001)")


def test_a_box_that_fails_after_a_warning_stops_the_run_as_it_was_asked_to(place, failed, continued):
    line = failed[0]["warned"].error(75, "rank 1: task.function = userland:Outage: ConnectionError: no license left")
    assert line.endswith("that was after the run was asked to stop")
    assert_same(bits(place / "whole-cge"), bits(place / "warned"))
