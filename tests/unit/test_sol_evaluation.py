"""Rollouts, the choice of a checkpoint, and the table of the solver in the loop."""

import torch

from dzhpc.tasks.sol.reference import Trajectories
from dzhpc.tasks.sol.rollout import DIVERGED, rollout

STEPS, SHAPE = 7, (2, 3, 4)
WHERE = torch.ones(SHAPE, dtype=torch.bool)
WHERE[0, :, -1] = WHERE[1, -1] = False


def decay(states, parameters):
    """A solver: every simulation at its own rate."""
    return states * parameters.to(states)[:, None, None, None]


def correct(states, parameters):
    return states + 0.01


def trajectories(rates, frames=STEPS + 1):
    draw = torch.Generator().manual_seed(1)
    states = torch.randn(len(rates), frames, *SHAPE, generator=draw) * WHERE
    return Trajectories(states, torch.tensor(rates, dtype=torch.float64))


def plain_errors(given, s, corrected):
    """Mean |difference| after each step, one simulation and one entry at a time."""
    state, errors = given.states[s, 0].double(), []
    for step in range(1, STEPS + 1):
        state = state * float(given.parameters[s]) + (0.01 if corrected else 0)
        entries = [k for k in range(WHERE.numel()) if WHERE.flatten()[k]]
        difference = (state - given.states[s, step].double()).flatten()
        errors.append(sum(abs(float(difference[k])) for k in entries) / len(entries))
    return errors


def test_errors_are_those_of_a_plain_loop_over_existing_entries():
    given = trajectories([0.9, 1.05, 0.5])
    for correction in (None, correct):
        errors = rollout(decay, correction, given, WHERE, STEPS).errors
        plain = torch.tensor([plain_errors(given, s, correction is not None) for s in range(3)], dtype=torch.float64)
        assert errors.dtype == torch.float64
        torch.testing.assert_close(errors, plain, rtol=1e-6, atol=1e-6)


def test_mae_is_the_mean_over_the_first_steps():
    done = rollout(decay, None, trajectories([0.9, 1.05]), WHERE, STEPS)
    assert done.mae(3).tolist() == [(a + b + c) / 3 for a, b, c in done.errors[:, :3].tolist()]
    assert not torch.equal(done.mae(3), done.mae(STEPS))


def test_a_diverging_simulation_is_flagged_and_leaves_the_others_alone():
    calm = rollout(decay, correct, trajectories([0.9, 0.9, 0.8]), WHERE, STEPS)
    for rate in (2.0, 1e30, torch.nan):
        seen = []

        def watched(states, parameters, seen=seen):
            seen.append(bool(torch.isfinite(states).all()))
            return decay(states, parameters)

        wild = rollout(watched, correct, trajectories([0.9, rate, 0.8]), WHERE, STEPS, keep=(1, STEPS))
        assert torch.equal(wild.errors[[0, 2]], calm.errors[[0, 2]])  # to the bit
        step = int(wild.diverged[1])
        assert wild.diverged.tolist() == [0, step, 0] and step == {2.0: 2}.get(rate, 1)
        assert torch.isfinite(wild.errors[1, : step - 1]).all() and torch.isinf(wild.errors[1, step - 1 :]).all()
        assert torch.isinf(wild.mae(STEPS)[1]) and torch.isfinite(wild.mae(STEPS)[[0, 2]]).all()
        assert torch.isnan(wild.kept[STEPS][1]).all() and torch.isfinite(wild.kept[STEPS][[0, 2]]).all()
        assert all(seen)  # the solver never gets a state that has blown up
    assert calm.diverged.tolist() == [0, 0, 0]


def test_the_capped_mean_is_finite_and_grows_with_an_earlier_divergence():
    late, early = (rollout(decay, None, trajectories([rate]), WHERE, STEPS) for rate in (2.0, 1e9))
    assert 1 == int(early.diverged) < int(late.diverged)
    bound = DIVERGED * float(trajectories([2.0]).states[:, :, WHERE].double().square().mean().sqrt())
    assert float(early.capped(STEPS)) == bound
    before = late.errors[0, : int(late.diverged) - 1]
    expected = (float(before.sum()) + bound * (STEPS - len(before))) / STEPS
    assert abs(float(late.capped(STEPS)) - expected) < 1e-12 and expected < bound


def test_kept_states_are_those_after_the_step():
    given = trajectories([0.5])
    kept = rollout(decay, None, given, WHERE, STEPS, keep=(0, 3)).kept
    assert set(kept) == {0, 3}
    assert torch.equal(kept[3], given.states[:, 0] * 0.125)
