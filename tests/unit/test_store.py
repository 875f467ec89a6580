"""HDF5 files: what is read is what was written, or an error; never other values, never half a file."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import store
from dzhpc.method.estimators import Partial
from dzhpc.method.scores import LPR


def some_lpr(scores=None):
    attrs = {"scores": "zo-grasp", "mu": 5e-3, "q": 192, "seed": 3, "rule": "signed", "sparsity": 0.9}
    return LPR(["conv.weight", "fc.weight"], np.array([100, 20]), np.array([7, 1]), "ab" * 32, attrs, scores)


def some_state(step=12, lpr=True, partial=False):
    weird = torch.tensor([-0.0, float("inf"), 1e-45, float("nan"), 3.0])
    return store.State(
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


def bits(value):
    """Comparable to the bit: NaN, signed zeros, dtypes and the order of tensors included (HDF5 sorts attributes)."""
    if isinstance(value, torch.Tensor):
        return bits(value.detach().contiguous().numpy())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        ordered = any(isinstance(v, (torch.Tensor, dict)) for v in value.values())
        return [(k, bits(v)) for k, v in (value.items() if ordered else sorted(value.items()))]
    if dataclasses.is_dataclass(value):
        return [(f.name, bits(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return type(value).__name__, value if not isinstance(value, list) else tuple(value)


@pytest.mark.parametrize("lpr", [True, False])
@pytest.mark.parametrize("partial", [True, False])
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, lpr, partial):
    state = some_state(lpr=lpr, partial=partial)
    store.save_checkpoint(tmp_path / "c.h5", state)
    assert bits(store.load_checkpoint(tmp_path / "c.h5")) == bits(state)
    assert os.listdir(tmp_path) == ["c.h5"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(bytes of a checkpoint file, what it holds)."""
    path = tmp_path_factory.mktemp("whole") / "c.h5"
    torch.manual_seed(0)
    store.save_checkpoint(path, some_state(partial=True))
    return path.read_bytes(), bits(store.load_checkpoint(path))


@pytest.mark.parametrize("left", [0, 1, 5, 77, 100, 511, 512, 513, 2000, *(k / 12 for k in range(1, 12)), -2, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, checkpoint, left):
    whole, path = checkpoint[0], tmp_path / "c.h5"
    path.write_bytes(whole[: int(left * len(whole))] if isinstance(left, float) else whole[:left])
    with pytest.raises(CheckpointError, match=r"c\.h5: (damaged|not a file written by dzhpc)"):
        store.load_checkpoint(path)


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
            assert bits(store.load_checkpoint(path)) == content
        except CheckpointError:
            refused.append(place)
    assert set(places) - set(refused) <= set(range(77, 512))  # the unused rest of the user block


def test_appended_bytes_are_refused(tmp_path, checkpoint):
    (tmp_path / "c.h5").write_bytes(checkpoint[0] + b"\0")
    with pytest.raises(CheckpointError, match="its SHA-256 does not match"):
        store.load_checkpoint(tmp_path / "c.h5")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "cannot be read"),
        ("text", b"hello", "not a file written by dzhpc"),
        ("empty", b"", "not a file written by"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for load, error in ((store.load_checkpoint, CheckpointError), (store.load_lpr, InputError), (store.describe, InputError)):
        with pytest.raises(error, match=f"{name}: {message}"):
            load(tmp_path / name)


def test_a_file_of_another_kind_is_refused_by_both_names(tmp_path):
    store.save_lpr(tmp_path / "l.h5", some_lpr())
    with pytest.raises(CheckpointError, match="holds dzhpc-lpr, expected dzhpc-checkpoint"):
        store.load_checkpoint(tmp_path / "l.h5")


def test_a_version_from_the_future_is_refused_by_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "VERSION", 9)
    store.save_checkpoint(tmp_path / "c.h5", some_state())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format version 9, this program reads up to 1; update dzhpc"):
        store.load_checkpoint(tmp_path / "c.h5")


WRITE_AT_LIMIT = """
import resource, sys, torch, numpy as np
from pathlib import Path
from dzhpc.files import store
from dzhpc.errors import DzhpcError
folder = Path(sys.argv[1])

def state(step, n):
    weights = {"w": torch.full((n,), float(step))}
    return store.State("a = 1", [], step, 0.0, 0, 0.0, "u", "s", 0, weights, {}, {}, np.arange(3), None)

store.save_checkpoint(folder / "c.h5", state(1, 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
data = {"train": (np.zeros((9, 200, 200, 3), np.uint8), np.zeros(9))}
for write in (lambda: store.save_checkpoint(folder / "c.h5", state(2, 1_000_000)),
              lambda: store.save_packed(folder / "d.h5", data, [0], [1], ["a"])):
    try:
        write()
    except DzhpcError as error:
        print(type(error).__name__, error)
print(sorted(p.name for p in folder.iterdir()), store.load_checkpoint(folder / "c.h5").step)
"""


def test_a_full_disk_gives_an_error_and_leaves_the_old_file_whole_and_no_temporary_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE_AT_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"CheckpointError {tmp_path / 'c.h5'}: cannot be written (")
    assert lines[1].startswith(f"InputError {tmp_path / 'd.h5'}: cannot be written (")
    assert lines[2:] == ["['c.h5'] 1"]


def test_temporary_names_do_not_end_like_a_checkpoint(tmp_path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.path.basename(a)), replace(a, b)))
    store.save_checkpoint(tmp_path / "step-00000012.h5", some_state())
    assert len(seen) == 1
    assert not seen[0].endswith(".h5")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent/c\.h5: cannot be written"):
        store.save_checkpoint(tmp_path / "absent" / "c.h5", some_state())


def test_an_lpr_file_comes_back_with_and_without_scores(tmp_path):
    scores = {"conv.weight": torch.randn(4, 25), "fc.weight": torch.randn(20)}
    for given in (scores, None):
        store.save_lpr(tmp_path / "l.h5", some_lpr(), given)
        lpr, found = store.load_lpr(tmp_path / "l.h5")
        assert bits(lpr) == bits(some_lpr())
        assert bits(found) == bits(given or {})
    assert "| conv.weight | 100 | 7 | 0.930 |" in lpr.table()


def test_packed_data_come_back(tmp_path):
    draw = np.random.default_rng(0)
    splits = {s: (draw.integers(0, 256, (n, 5, 4, 3), np.uint8), draw.integers(0, 2, n)) for s, n in (("train", 6), ("test", 2))}
    store.save_packed(tmp_path / "d.h5", splits, [0.1, 0.2, 0.3], [1.0, 1, 1], ["chien", "forêt"])
    found, mean, std, classes = store.load_packed(tmp_path / "d.h5")
    for split, (images, labels) in splits.items():
        assert np.array_equal(found[split][0], images)
        assert np.array_equal(found[split][1], labels)
    assert (mean.tolist(), std.tolist(), classes) == ([0.1, 0.2, 0.3], [1.0, 1, 1], ["chien", "forêt"])


def test_metrics_come_back_and_lose_the_rows_after_a_restored_step(tmp_path):
    metrics = store.Metrics(tmp_path / "metrics.h5")
    for step in range(1, 9):
        metrics.add_train(step, step / 4, 1 / step, 0.1, 0.5, 2**40 + step, 0.01, 0.001, 10**9)
        if step % 2 == 0:
            metrics.add_eval(step, step / 4, 2 / step, step / 10)
        if step == 5:
            metrics.flush()
    metrics.flush()
    train, evaluation = store.load_metrics(tmp_path / "metrics.h5")
    assert train[:, 0].tolist() == list(range(1, 9))
    assert train[-1].tolist() == [8, 2, 0.125, 0.1, 0.5, 2**40 + 8, 0.01, 0.001, 10**9]
    assert evaluation[:, 3].tolist() == [0.2, 0.4, 0.6, 0.8]

    again = store.Metrics(tmp_path / "metrics.h5")
    again.restore(6, keep_eval=lambda step: step % 4 == 0)
    again.add_train(7, *[0.0] * 8)
    again.flush()
    train, evaluation = store.load_metrics(tmp_path / "metrics.h5")
    assert train[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert evaluation[:, 0].tolist() == [4]


def test_the_identity_of_a_model_is_names_shapes_and_dtypes_and_not_values():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert store.model_sha256(a) == store.model_sha256(b)
    others = [torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2).double(), torch.nn.Sequential(a)]
    assert len({store.model_sha256(m) for m in [a, *others]}) == 5
    contents = [store.tensors_sha256(dict(m.named_parameters()), content=True) for m in (a, b, a)]
    assert contents[0] == contents[2] != contents[1]


def test_describe_names_what_a_file_holds(tmp_path):
    store.save_checkpoint(tmp_path / "c.h5", some_state())
    text = store.describe(tmp_path / "c.h5")
    assert "format = dzhpc-checkpoint" in text
    assert "/params/z.weight  float32 [2, 4, 3]" in text
    assert "step=12" in text
