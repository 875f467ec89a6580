"""Checkpoints and LPR files: what is read is what was written, or an error; never other values."""

import os

import numpy as np
import pytest
import torch
from bits import bits

from dzhpc import config
from dzhpc.errors import CheckpointError
from dzhpc.files.checkpoint import State, config_of, load_checkpoint, save_checkpoint
from dzhpc.files.lpr import load_lpr, save_lpr
from dzhpc.method.estimators import Partial
from dzhpc.method.scores import LPR


def some_lpr(scores=None):
    attrs = {"scores": "zo-grasp", "mu": 5e-3, "q": 192, "seed": 3, "rule": "signed", "sparsity": 0.9}
    return LPR(["conv.weight", "fc.weight"], np.array([100, 20]), np.array([7, 1]), "ab" * 32, attrs, scores)


def some_state(step=12, lpr=True, partial=False):
    weird = torch.tensor([-0.0, float("inf"), 1e-45, float("nan"), 3.0])
    return State(
        config='[run]\nname = "größe"\n',
        history=[f"[run]\nseed = {k}\n" for k in range(11)],  # "10" must not come before "2"
        step=step,
        epoch=0.1 + 0.2,
        queries=2**40 + 1,
        wall_time_s=1e5 / 3,
        run_uuid="0123-uuid",
        model_sha256="cd" * 32,
        seed=7,
        params={"z.weight": torch.randn(4, 3, 2).permute(2, 0, 1), "a.bias": weird, "gain": torch.tensor(2.5).double()},
        buffers={"bn.num_batches_tracked": torch.tensor(9), "bn.mask": torch.tensor([True, False])},
        optimizer={"momentum_buffer": {"z.weight": torch.randn(2, 4, 3)}, "step": {"gain": torch.tensor(5.0)}},
        coordinates=np.array([0, 3, 2**33]),
        lpr=some_lpr() if lpr else None,
        env={"torch": "2.9", "device": "cpu"},
        partial=Partial(np.array([-0.0, 0.0, 1e-40], np.float32), np.array([True, False, True])) if partial else None,
    )


@pytest.mark.parametrize("lpr", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, lpr, partial):
    state = some_state(lpr=lpr, partial=partial)
    save_checkpoint(tmp_path / "c.h5", state)
    assert bits(load_checkpoint(tmp_path / "c.h5")) == bits(state)
    assert os.listdir(tmp_path) == ["c.h5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(bytes of a checkpoint file, what it holds)."""
    path = tmp_path_factory.mktemp("whole") / "c.h5"
    torch.manual_seed(0)
    save_checkpoint(path, some_state(partial=True))
    return path.read_bytes(), bits(load_checkpoint(path))


@pytest.mark.parametrize("left", [0, 1, 5, 77, 100, 511, 512, 513, 2000, *(k / 12 for k in range(1, 12)), -2, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, checkpoint, left):
    whole, path = checkpoint[0], tmp_path / "c.h5"
    path.write_bytes(whole[: int(left * len(whole))] if isinstance(left, float) else whole[:left])
    with pytest.raises(CheckpointError, match=r"c\.h5: (damaged|not a file written by dzhpc)"):
        load_checkpoint(path)


def test_one_flipped_byte_anywhere_gives_an_error_or_the_right_values(tmp_path, checkpoint):
    (whole, content), path = checkpoint, tmp_path / "c.h5"
    draw = np.random.default_rng(0)
    places = [*range(0, 90, 7), 12, 13, 76, 77, 500, *draw.integers(512, len(whole), 200), len(whole) - 1]
    refused = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        try:
            assert bits(load_checkpoint(path)) == content
        except CheckpointError:
            refused.append(place)
    assert set(places) - set(refused) <= set(range(77, 512))  # the unused rest of the user block


def test_appended_bytes_are_refused(tmp_path, checkpoint):
    (tmp_path / "c.h5").write_bytes(checkpoint[0] + b"\0")
    with pytest.raises(CheckpointError, match="its SHA-256 does not match"):
        load_checkpoint(tmp_path / "c.h5")


def test_an_lpr_file_comes_back_with_and_without_scores(tmp_path):
    scores = {"conv.weight": torch.randn(4, 25), "fc.weight": torch.randn(20)}
    for given in (scores, None):
        save_lpr(tmp_path / "l.h5", some_lpr(), given)
        lpr, found = load_lpr(tmp_path / "l.h5")
        assert bits(lpr) == bits(some_lpr())
        assert bits(found) == bits(given or {})
    assert "| conv.weight | 100 | 7 | 0.930 |" in lpr.table()


def test_the_input_of_a_checkpoint_is_understood_or_the_file_is_named():
    toml = config.load(None, ["model.name=cnn", "zo.mu=0.25"]).to_toml()
    assert config_of(State(**vars(some_state()) | {"config": toml}), "c.h5").zo.mu == 0.25
    for text in ("[zoo]\nmu = 1\n", "no TOML"):
        with pytest.raises(CheckpointError, match="it was written by another version of dzhpc"):
            config_of(State(**vars(some_state()) | {"config": text}), "c.h5")
