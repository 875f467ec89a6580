"""HDF5 files: what is written is whole, and what is damaged, foreign, or of another kind is refused."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from dzhpc.errors import CheckpointError, InputError
from dzhpc.files import h5
from dzhpc.files.checkpoint import load_checkpoint
from dzhpc.files.lpr import load_lpr
from dzhpc.files.tensors import check_tensors, get_tensors, put_tensors
from dzhpc.models.identity import tensors_sha256


def fill(file):
    file["params/z.weight"] = np.zeros((2, 4, 3), np.float32)
    file.create_group("state").attrs.update(step=12, loss=np.float32(0.5), name="größe")


def read(path, kind="dzhpc-test"):
    with h5.opened(path, kind, CheckpointError) as file:
        return h5.attributes(file["state"])


def test_attributes_come_back_as_plain_values(tmp_path):
    h5.write(tmp_path / "f.h5", "dzhpc-test", fill, CheckpointError)
    found = read(tmp_path / "f.h5")
    assert (found, type(found["step"]), type(found["loss"])) == ({"step": 12, "loss": 0.5, "name": "größe"}, int, float)


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
    for load, error in ((load_checkpoint, CheckpointError), (load_lpr, InputError), (h5.describe, InputError)):
        with pytest.raises(error, match=f"{name}: {message}"):
            load(tmp_path / name)


def test_a_file_of_another_kind_is_refused_by_both_names(tmp_path):
    h5.write(tmp_path / "f.h5", "dzhpc-test", fill, CheckpointError)
    with pytest.raises(CheckpointError, match="holds dzhpc-test, expected dzhpc-checkpoint"):
        load_checkpoint(tmp_path / "f.h5")


def test_a_version_from_the_future_is_refused_by_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(h5, "VERSION", 9)
    h5.write(tmp_path / "f.h5", "dzhpc-test", fill, CheckpointError)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format version 9, this program reads up to 1; update dzhpc"):
        read(tmp_path / "f.h5")


WRITE_AT_LIMIT = """
import resource, sys, torch, numpy as np
from pathlib import Path
from dzhpc.data import DataSet, Split, packed
from dzhpc.files.checkpoint import State, load_checkpoint, save_checkpoint
from dzhpc.errors import DzhpcError
folder = Path(sys.argv[1])

def state(step, n):
    weights = {"w": torch.full((n,), float(step))}
    return State("a = 1", [], step, 0.0, 0, 0.0, "u", "s", 0, weights, {}, {}, np.arange(3), None)

save_checkpoint(folder / "c.h5", state(1, 1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
part = Split(torch.zeros(9, 3, 200, 200, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
for write in (lambda: save_checkpoint(folder / "c.h5", state(2, 1_000_000)),
              lambda: packed.save(folder / "d.h5", DataSet(part, part, torch.zeros(3), torch.ones(3), ["a"]))):
    try:
        write()
    except DzhpcError as error:
        print(type(error).__name__, error)
print(sorted(p.name for p in folder.iterdir()), load_checkpoint(folder / "c.h5").step)
"""


def test_a_full_disk_gives_an_error_and_leaves_the_old_file_whole_and_no_temporary_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE_AT_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"CheckpointError {tmp_path / 'c.h5'}: cannot be written (")
    assert lines[1].startswith(f"InputError {tmp_path / 'd.h5'}: cannot be written (")
    assert all(line.endswith("free space, or choose another folder") for line in lines[:2])
    assert lines[2:] == ["['c.h5'] 1"]


def test_temporary_names_do_not_end_like_a_checkpoint(tmp_path, monkeypatch):
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.path.basename(a)), replace(a, b)))
    h5.write(tmp_path / "step-00000012.h5", "dzhpc-test", fill, CheckpointError)
    assert len(seen) == 1
    assert not seen[0].endswith(".h5")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"absent/c\.h5: cannot be written \(No such file.*\); make .*/absent, or choose another folder$"
    ):
        h5.write(tmp_path / "absent" / "c.h5", "dzhpc-test", fill, CheckpointError)


def test_describe_names_what_a_file_holds(tmp_path):
    h5.write(tmp_path / "f.h5", "dzhpc-test", fill, CheckpointError)
    text = h5.describe(tmp_path / "f.h5")
    assert "format = dzhpc-test" in text
    assert "/params/z.weight  float32 [2, 4, 3]" in text
    assert "step=12" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_any_dtype_come_back_bit_for_bit(tmp_path, dtype):
    tensors = {"b.w": torch.randn(2, 3).to(dtype), "a": torch.ones((), dtype=dtype), "none": torch.zeros(0, dtype=dtype)}
    check_tensors(tensors)
    h5.write(tmp_path / "t.h5", "dzhpc-test", lambda file: put_tensors(file.create_group("t"), tensors), InputError)
    with h5.opened(tmp_path / "t.h5", "dzhpc-test", InputError) as file:
        found = get_tensors(file["t"])
    assert list(found) == list(tensors)
    for name, t in tensors.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape)
    assert tensors_sha256(found, content=True) == tensors_sha256(tensors, content=True)


@pytest.mark.parametrize("kind", ["sparse", "uninitialised"])
def test_a_tensor_that_no_file_could_hold_is_named(kind):
    tensor = torch.eye(3).to_sparse() if kind == "sparse" else torch.nn.LazyLinear(3).weight
    with pytest.raises(InputError, match=r"the model's fc\.weight is .*: a checkpoint holds dense tensors"):
        check_tensors({"fc.weight": tensor})
    check_tensors({"a/b.weight": torch.ones(1), "a.b": torch.ones(1)})
    for names in (["/"], ["a/../b"], ["a", "a/b"]):
        with pytest.raises(InputError, match="takes the slashes of this name for folders"):
            check_tensors(dict.fromkeys(names, torch.ones(1)))


def test_a_name_that_is_no_text_is_named(tmp_path):
    with pytest.raises(InputError, match=r"t\.h5: cannot hold the name 'caf\\udce9', which is no UTF-8 text"):
        h5.write(tmp_path / "t.h5", "dzhpc-test", lambda file: file.attrs.update(classes=["caf\udce9"]), InputError)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_that_lacks_a_part_and_a_pipe_are_refused(tmp_path):
    h5.write(tmp_path / "a.h5", "dzhpc-lpr", lambda file: file.create_dataset("layer", data=[1.0]), InputError)
    with pytest.raises(InputError, match=r"a\.h5: is whole, but not as dzhpc writes it .*"):
        load_lpr(tmp_path / "a.h5")
    os.mkfifo(tmp_path / "b.h5")
    with pytest.raises(InputError, match=r"b\.h5: not a file written by dzhpc"):
        load_lpr(tmp_path / "b.h5")


def test_a_file_is_whole_while_others_take_its_name(tmp_path):
    """A writer renames new files over it all the time: a reader sees one of them, never parts of two."""
    path = tmp_path / "x.h5"
    write = lambda k: h5.write(path, "kind", lambda file: file.create_dataset("x", data=np.full(1000, k)), CheckpointError)  # noqa: E731
    write(0)
    done = threading.Event()

    def keep_writing():
        for k in range(1, 150):
            write(k)
        done.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    while not done.is_set():
        with h5.opened(path, "kind", CheckpointError) as file:
            found = file["x"][()]
        assert (found == found[0]).all()
    writer.join()


def test_a_device_is_not_replaced_and_a_link_is_followed(tmp_path):
    """Root may rename a file over /dev/null."""
    os.mkfifo(tmp_path / "device")
    (tmp_path / "far").mkdir()
    (tmp_path / "f.h5").symlink_to("far/real.h5")
    for refused in ("device", "far"):
        with pytest.raises(CheckpointError, match=rf"{refused}: cannot be written \(it is no regular file\)"):
            h5.write(tmp_path / refused, "dzhpc-test", fill, CheckpointError)
    h5.write(tmp_path / "f.h5", "dzhpc-test", fill, CheckpointError)
    assert (tmp_path / "f.h5").is_symlink() and read(tmp_path / "far" / "real.h5")["step"] == 12
    assert (tmp_path / "device").is_fifo()
