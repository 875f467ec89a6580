"""Data: sets as they are published, batches as functions of (seed, step), errors that name the way out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bits import bits
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dzhpc import config, data
from dzhpc.data import packed
from dzhpc.errors import InputError


def digits(**keys):
    return data.load(config.Data(name="digits", **keys), seed=0)


def numbered(n, classes=4):
    """A data set whose images are their own numbers."""
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None]
    return data.make_data_set((images, np.arange(n) % classes), (images[:classes], np.arange(classes)))


def test_digits_are_split_1437_to_360_in_equal_shares_and_always_alike():
    first, second = digits(), digits()
    assert (len(first.train), len(first.test), len(first.classes)) == (1437, 360, 10)
    assert (first.train.images.shape[1:], first.train.images.dtype) == ((1, 8, 8), torch.uint8)
    share = first.train.labels.bincount() / (first.train.labels.bincount() + first.test.labels.bincount())
    assert (share - 1437 / 1797).abs().max() < 0.006
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)
    both = torch.cat([first.train.images, first.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797  # no image is in both


def test_digits_are_those_of_scikit_learn_which_is_not_imported_for_them():
    given = load_digits()
    images = (15 * given.images).astype(np.uint8)[:, None]
    expected = train_test_split(images, given.target, test_size=360, stratify=given.target, random_state=0)
    found = digits()
    ours = [found.train.images, found.test.images, found.train.labels, found.test.labels]
    assert all(map(np.array_equal, ours, expected))


def test_measured_normalisation_gives_mean_0_and_deviation_1():
    inputs = digits().normalise(digits().train.images)
    assert inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 1e-5
    assert abs(inputs.std() - 1) < 1e-5


def test_given_mean_and_std_are_used_and_floating_point_images_pass_as_they_are():
    images = digits().train.images[:3]
    expected = (images.float() / 255 - 0.25) / 0.5
    assert torch.allclose(digits(mean=[0.25], std=[0.5]).normalise(images), expected)
    assert torch.equal(numbered(4).normalise(torch.tensor([3.5]).double()), torch.tensor([3.5]))


@pytest.mark.parametrize(("key", "values"), [("mean", [0.1, 0.2]), ("std", [0.1, 0.2]), ("std", [])])
def test_a_normalisation_that_does_not_fit_the_channels_is_refused(key, values):
    with pytest.raises(InputError, match=rf"data\.{key} = .*expected 1 numbers, one a channel"):
        digits(**{key: values})


def test_train_limit_picks_a_fixed_random_subset():
    few = digits(train_limit=100)
    assert (len(few.train), len(few.test)) == (100, 360)
    assert torch.equal(few.train.images, digits(train_limit=100).train.images)
    assert not torch.equal(few.train.images, digits().train.images[:100])
    assert len(digits(train_limit=10_000).train) == 1437


def test_a_batch_is_a_function_of_seed_and_step_in_whatever_order_it_is_asked_for():
    def batches(steps, seed=0):
        source = data.Batches(digits(), 100, seed, augment=True)
        return {k: source.batch(k) for k in steps}

    forward, backward = batches(range(30)), batches([29, 3, 17])
    assert all(torch.equal(forward[k][i], backward[k][i]) for k in backward for i in (0, 1))
    assert not torch.equal(forward[3][0], batches([3], seed=1)[3][0])
    assert not torch.equal(forward[3][0], forward[4][0])


def test_an_epoch_visits_each_image_at_most_once_and_the_next_in_another_order():
    source = data.Batches(numbered(103), 10, 0, augment=False)
    assert source.steps_per_epoch == 10
    epochs = [[int(x) for step in range(10 * e, 10 * e + 10) for x in source.batch(step)[0].flatten()] for e in (0, 1)]
    assert [len(set(epoch)) for epoch in epochs] == [100, 100]
    assert epochs[0] != epochs[1]
    inputs, labels = source.batch(7)
    assert torch.equal(inputs.flatten().long() % 4, labels)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match=r"data\.batch_size = 11: the training set has 10 images; choose a smaller batch"):
        data.Batches(numbered(10), 11, 0, augment=False)


def test_crop_and_flip_equals_one_image_at_a_time():
    images = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8)
    out = data.crop_and_flip(images, torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    shift = torch.randint(0, 9, (2, 50), generator=draw)
    flip = torch.randint(0, 2, (50,), generator=draw)
    for k, image in enumerate(images):
        top, left = shift[:, k]
        expected = F.pad(image, (4, 4, 4, 4))[:, top : top + 9, left : left + 7]
        assert torch.equal(out[k], expected.flip(2) if flip[k] else expected)
    assert 10 < flip.sum() < 40
    assert sorted(shift.unique().tolist()) == list(range(9))


def test_augmentation_changes_inputs_and_leaves_labels():
    plain, augmented = (data.Batches(digits(), 50, 0, augment).batch(3) for augment in (False, True))
    assert torch.equal(plain[1], augmented[1])
    assert not torch.equal(plain[0], augmented[0])


def test_every_step_and_image_is_augmented_in_its_own_way():
    images = torch.arange(64).reshape(1, 1, 8, 8).repeat(20, 1, 1, 1).byte()  # twenty times the same image
    source = data.Batches(data.make_data_set((images, [0] * 20), (images, [0] * 20)), 10, 0, augment=True)
    first, second = source.batch(0)[0], source.batch(1)[0]
    assert not torch.equal(first, second)
    assert len(first.unique(dim=0)) > 5


@pytest.mark.parametrize(("batch_size", "share"), [(40, 10), (43, 10), (2, 1)])
def test_a_balanced_batch_has_equally_many_images_of_each_class(batch_size, share):
    source = data.Batches(numbered(100), batch_size, 0, augment=True)
    inputs, labels = source.balanced(0)
    assert labels.bincount().tolist() == [share] * 4
    assert torch.equal(inputs.flatten().long() % 4, labels)
    assert len(inputs.unique()) == len(inputs)
    assert torch.equal(inputs, source.balanced(0)[0])
    assert not torch.equal(inputs, source.balanced(1)[0])


def test_a_balanced_batch_is_balanced_even_where_a_class_is_rare():
    images = torch.zeros(50, 1, 1, 1)
    labels = np.array([0] * 47 + [1] * 3)
    counts = data.Batches(data.make_data_set((images, labels), (images, labels)), 20, 0, False).balanced(0)[1].bincount()
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((np.zeros((3, 1, 2, 2)), [0, 1]), r"training set has images \[3, 1, 2, 2\], labels \[2\]; not as many of each"),
        ((np.zeros((0, 1, 2, 2)), []), "training set has images"),
        ((np.zeros((2, 1, 2, 2)), [0, 2]), r"labels run .*2, but the data set names 2 classes"),
        ((np.zeros((2, 1, 2, 2)), [-1, 0]), "-1"),
        ((np.zeros((2, 1, 2, 2)), [0, 0.5]), "the training labels hold 0.5; expected whole numbers from 0"),
        ((np.zeros((2, 1, 2, 2)), [0, np.nan]), "the training labels hold nan; expected whole numbers"),
        (
            (np.zeros((2, 1, 2, 2)), np.eye(2)),
            r"the training labels are \[2, 2\]; expected \[N\], .*of one-hot labels their argmax",
        ),
        ((np.zeros((2, 1, 2, 2)), ["a", "b"]), "the training labels are list of text"),
        ((np.zeros((2, 1, 2, 2)) + 1j, [0, 1]), "the training images are complex numbers"),
        ((np.full((2, 1, 2, 2), [[[[0, np.nan]]]]), [0, 1]), "the training images: image 0 holds a number that is not finite"),
        (
            (np.zeros((2, 1, 2, 2), np.uint8), [0, 1]),
            r"training images are uint8 \[1, 2, 2\], the test images float32 \[1, 2, 2\]",
        ),
        ((np.zeros((2, 1, 3, 2)), [0, 1]), r"training images are float32 \[1, 3, 2\], the test images float32 \[1, 2, 2\]"),
        ((np.full((2, 1, 2, 2), 4000, np.int16), [0, 1]), "the training images are int16 from 4000 to 4000; expected uint8"),
        ((np.full((2, 1, 2, 2), -1), [0, 1]), "the training images are int64 from -1 to -1; expected uint8"),
        ((np.zeros((2, 28, 28), np.uint8), [0, 1]), r"the training images are \[2, 28, 28\]; expected \[N, C, H, W\]"),
        ((np.zeros((2, 16, 16, 3)), [0, 1]), r"\[2, 16, 16, 3\], which looks like \[N, H, W, C\]; transpose\(0, 3, 1, 2\) gives"),
        ((np.zeros((2, 12, 16, 3), np.uint8), [0, 1]), r"looks like \[N, H, W, C\]"),
        ((["a", "b"], [0, 1]), "the training images are list of text"),
        ((np.zeros((2, 0, 8, 8), np.uint8), [0, 1]), r"the training images are \[2, 0, 8, 8\]; expected"),
        ((torch.zeros(2, 1, 2, 2, device="meta"), [0, 1]), "the training images are a tensor on the device meta"),
    ],
)
def test_images_and_labels_that_do_not_fit_each_other_are_refused(train, message):
    with pytest.raises(InputError, match=message):
        data.make_data_set(train, (np.zeros((2, 1, 2, 2)), [0, 1]), classes=["a", "b"])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([1, 2, 3], [1, 2], "labels run from 1 to 3; expected them to count classes from 0"),
        ([0, 1, 0], [0, 2], "label 2 is in the test set alone; no training image has it"),
        ([0, 1, 10**12], [0, 1], "labels run to 1000000000000, but there are 3 training images"),
    ],
)
def test_labels_that_do_not_count_classes_are_refused(train, test, message):
    with pytest.raises(InputError, match=message):
        data.make_data_set((np.zeros((3, 1, 2, 2)), train), (np.zeros((2, 1, 2, 2)), test))


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "int64", "uint16", "uint32", "uint64"])
def test_pixels_of_any_integer_are_the_same_pixels(dtype):
    pixels = np.arange(200, 224).reshape(2, 1, 3, 4)
    found = data.make_data_set((pixels.astype(dtype), [[0], [1.0]]), (pixels.astype(dtype), np.array([True, False])))
    assert found.train.images.dtype == torch.uint8
    assert found.train.images.tolist() == pixels.tolist()
    assert (found.train.labels.tolist(), found.test.labels.tolist()) == ([0, 1], [1, 0])


def test_booleans_are_black_and_white_and_other_floats_are_float32():
    mask = np.eye(4, dtype=bool)[None, None].repeat(2, 0)
    assert data.make_data_set((mask, [0, 1]), (mask, [0, 1])).train.images.unique().tolist() == [0, 255]
    for dtype in (np.float16, np.float64, ">f4", np.longdouble):
        found = data.make_data_set((mask.astype(dtype)[:, :, ::-1], [0, 1]), (mask.astype(dtype), [0, 1])).train.images
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(mask).flip(2).float())


def test_mean_and_std_that_are_given_hold_for_floating_point_images_too():
    found = numbered(4)
    found.mean, found.std = torch.tensor([0.5]), torch.tensor([2.0])
    assert found.normalise(found.train.images).flatten().tolist() == [-0.25, 0.25, 0.75, 1.25]


def test_of_mean_and_std_the_one_that_is_given_holds():
    pixels = torch.arange(32, dtype=torch.uint8).view(2, 1, 4, 4)
    both = ((pixels, [0, 1]), (pixels, [0, 1]))
    own = data.make_data_set(*both)
    for key in ("mean", "std"):
        found = data.make_data_set(*both, **{key: [0.25]})
        other = {"mean": "std", "std": "mean"}[key]
        assert float(getattr(found, key)) == 0.25 and torch.equal(getattr(found, other), getattr(own, other))


def test_vectors_are_inputs_but_cannot_be_cropped():
    vectors = data.make_data_set((np.ones((4, 5)), [0, 1, 0, 1]), (np.ones((2, 5)), [0, 1]))
    assert data.Batches(vectors, 2, 0, augment=False).batch(0)[0].shape == (2, 5)
    with pytest.raises(InputError, match=r"data\.augment: crops images \[N, C, H, W\], the data set has \[4, 5\]"):
        data.Batches(vectors, 2, 0, augment=True)


def test_packed_data_come_back(tmp_path):
    draw = torch.Generator().manual_seed(0)
    parts = [
        data.Split(torch.randint(0, 256, (n, 3, 5, 4), dtype=torch.uint8, generator=draw), torch.arange(n) % 2) for n in (6, 2)
    ]
    saved = data.DataSet(*parts, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 0.5, 1]), ["chien", "forêt"])
    packed.save(tmp_path / "d.h5", saved)
    found = packed.load(tmp_path / "d.h5")
    assert bits(found) == bits(saved)


def test_the_users_own_function_gives_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(
        "import numpy as np\n"
        "def rgb():\n    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)\n"
        "    return (images, [0, 1]), (images, [1, 1])\n"
        "def wrong():\n    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = data.load(config.Data(name="own_data:rgb"), 0)
    assert (found.classes, found.train.images.shape, found.train.labels.tolist()) == (["0", "1"], (2, 3, 2, 2), [0, 1])
    for name, message in (
        ("own_data:wrong", r"expected \(\) -> \(\(images, labels\), \(images, labels\)\)"),
        ("own_data:absent", "module own_data has no 'absent'"),
        ("no_such_module:f", 'data.name = "no_such_module:f": cannot import no_such_module'),
        ("mnist", 'data.name = "mnist": expected digits | cifar10'),
    ):
        with pytest.raises(InputError) as refusal:
            data.load(config.Data(name=name), 0)
        assert message.replace("\\", "") in str(refusal.value)


def test_the_root_is_the_key_else_the_environment_else_data(monkeypatch):
    monkeypatch.setenv("DZHPC_DATA", "/from/environment")
    assert str(data.root_of(config.Data(root="/from/key"))) == "/from/key"
    monkeypatch.setenv("SCRATCH", "/fast")
    assert str(data.root_of(config.Data(root="$SCRATCH/key"))) == "/fast/key"
    assert str(data.root_of(config.Data())) == "/from/environment"
    monkeypatch.delenv("DZHPC_DATA")
    assert str(data.root_of(config.Data())) == str(Path.cwd() / "data")


def test_cifar10_has_50000_and_10000_images_of_10_equal_classes(cifar10):
    assert cifar10.train.images.shape == (50_000, 3, 32, 32)
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert (cifar10.train.images.dtype, cifar10.classes[3]) == (torch.uint8, "cat")
    measured = cifar10.train.images.sum((0, 2, 3), dtype=torch.int64) / (255 * 50_000 * 32**2)
    assert (measured - cifar10.mean).abs().max() < 1e-4


def test_missing_cifar10_names_the_fetch_command(tmp_path):
    with pytest.raises(InputError, match=rf"neither .*cifar10\.h5 nor .*python -m dzhpc\.fetch cifar10 --root {tmp_path}"):
        data.load(config.Data(name="cifar10", root=str(tmp_path)), 0)


def test_truncated_cifar10_names_the_fetch_command(tmp_path, cifar10_folder):
    copy, original = tmp_path / "cifar10" / "cifar-10-batches-py", cifar10_folder / "cifar-10-batches-py"
    copy.mkdir(parents=True)
    for file in original.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "data_batch_1").unlink()
    (copy / "data_batch_1").write_bytes((original / "data_batch_1").read_bytes()[:1_000_000])
    with pytest.raises(InputError, match=rf"cifar-10-batches-py: incomplete or damaged .*dzhpc\.fetch cifar10 --root {tmp_path}"):
        data.load(config.Data(name="cifar10", root=str(tmp_path)), 0)
