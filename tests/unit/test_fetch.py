"""Fetch: what is packed or downloaded is what a run reads; what cannot be had leaves one clear line."""

import functools
import http.server
import io
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dzhpc import config, data, fetch
from dzhpc.data import fetching, images
from dzhpc.errors import InputError
from dzhpc.job.launch import run_verb


def run(*arguments):
    return fetching.fetch(**vars(fetch.parser().parse_args([str(a) for a in arguments])))


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes; one of the images is greyscale, one is not square."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    for part, name, shape in [
        ("train", "cat", (8, 8, 3)),
        ("train", "cat", (8, 8)),
        ("train", "dog", (8, 12, 3)),
        ("val", "cat", (8, 8, 3)),
        ("val", "dog", (8, 8, 3)),
    ]:
        save(folder / part / name / f"{len(shape)}{shape[1]}.png", rng.integers(0, 256, shape, np.uint8))
    return folder


def test_a_packed_image_folder_holds_the_pixels_of_its_files(tmp_path, image_folder):
    path = run("pets", "--from", image_folder, "--size", 8, "--root", tmp_path / "root")
    assert path == tmp_path / "root" / "pets.h5"
    packed = data.load(config.Data(name="packed", path="pets.h5", root=str(path.parent)), 0)
    direct = data.load(config.Data(name="imagefolder", path="pictures", root=str(tmp_path), image_size=8), 0)
    for found in (packed, direct):
        assert (found.classes, found.train.labels.tolist(), found.test.labels.tolist()) == (["cat", "dog"], [0, 0, 1], [0, 1])
        grey, colour = (np.asarray(Image.open(image_folder / "train" / "cat" / f"{n}8.png")) for n in (2, 3))
        assert torch.equal(found.train.images[0], torch.from_numpy(np.stack([grey] * 3)))
        assert torch.equal(found.train.images[1], torch.from_numpy(colour.transpose(2, 0, 1).copy()))
        wide = np.asarray(Image.open(image_folder / "train" / "dog" / "312.png"))[:, 2:10]
        assert torch.equal(found.train.images[2], torch.from_numpy(wide.transpose(2, 0, 1).copy()))
    assert torch.equal(packed.mean, direct.mean)
    assert torch.equal(packed.std, direct.std)


def test_classes_that_differ_between_train_and_val_are_refused(tmp_path, image_folder):
    (image_folder / "val" / "dog").rename(image_folder / "val" / "bird")
    with pytest.raises(InputError, match=r"train/ has the classes \['cat', 'dog'\], val/ has \['bird', 'cat'\]; they must agree"):
        run("pets", "--from", image_folder, "--size", 8, "--root", tmp_path)
    assert not (tmp_path / "pets.h5").exists()


def test_a_damaged_image_is_refused(tmp_path, image_folder):
    (image_folder / "val" / "dog" / "38.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(InputError, match=r"val/dog/38\.png: cannot be read as an image \(cannot identify image file\)"):
        run("pets", "--from", image_folder, "--size", 8, "--root", tmp_path)


def pack(folder, size=8):
    return data.load(config.Data(name="imagefolder", path=folder.name, root=str(folder.parent), image_size=size), 0)


def test_a_greyscale_image_of_16_bits_is_scaled_to_8(image_folder):
    pixels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    save(image_folder / "train" / "cat" / "a.png", pixels)
    save(image_folder / "train" / "cat" / "b.tif", pixels)
    (image_folder / "train" / "cat" / "c.pgm").write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
    expected = torch.from_numpy((pixels / 257).round().astype(np.uint8)).expand(3, 8, 8)
    found = pack(image_folder).train.images
    assert all(torch.equal(image, expected) for image in found[2:5])
    assert len(expected.unique()) == 64


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [("f.tif", np.float32, "floating-point values from 0 to 1"), ("i.tif", np.int32, "32-bit values from 0 to 1")],
)
def test_images_of_wider_values_are_refused_by_name(image_folder, name, dtype, message):
    save(image_folder / "train" / "cat" / name, np.eye(8, dtype=dtype))
    with pytest.raises(InputError, match=rf"train/cat/{name}: cannot be read as an image \({message}; save 8 or 16 bits"):
        pack(image_folder)


def test_a_file_that_cannot_be_decoded_is_named_whatever_the_decoder_raises(image_folder, monkeypatch):
    noise, path = np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8), image_folder / "train" / "dog" / "cut.jpg"
    save(path, noise)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"train/dog/cut\.jpg: cannot be read as an image \(image file is truncated"):
        pack(image_folder)
    save(path, noise)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(InputError, match=r"train/dog/cut\.jpg: cannot be read as an image \(Image size .* decompression bomb"):
        pack(image_folder)


def test_an_image_is_turned_as_its_exif_says(image_folder):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # the upper row, once it is turned the right one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(image_folder / "train" / "dog" / "turned.png", exif=exif)
    turned = pack(image_folder).train.images[3]
    assert (turned[:, :, -1] == 255).all()
    assert not turned[:, :, :-1].any()


def test_files_of_other_kinds_are_left_out_and_counted(image_folder, tmp_path, capsys, monkeypatch):
    save(image_folder / "train" / "cat" / "x.gif", np.zeros((8, 8, 3), np.uint8))
    for name in ("x.heic", "y.HEIC", "notes"):
        (image_folder / "train" / "dog" / name).write_bytes(b"x")
    monkeypatch.setattr("sys.argv", ["fetch", "pets", "--from", str(image_folder), "--size", "8", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as leave:
        run_verb(fetch.parser(), fetch.main, parallel=False)
    out, err = capsys.readouterr()
    assert leave.value.code == 0
    assert out.splitlines()[:2] == [f"{image_folder}/train: 3 images, 2 classes", f"{image_folder}/val: 2 images, 2 classes"]
    assert err == f"{image_folder}/train: 4 files are left out: 1 .gif, 2 .heic, 1 notes\n"


@pytest.mark.parametrize(("link", "to"), [("cat/loop", ".."), ("cat/loop", "."), ("cat/more", "../dog"), ("bird", "dog")])
def test_a_link_that_would_count_images_twice_is_refused(image_folder, link, to):
    (image_folder / "train" / link).symlink_to(to)
    with pytest.raises(InputError, match=r"train/\S+: is the same folder as \S+, so its images would be counted twice"):
        pack(image_folder)


def test_links_to_files_and_to_folders_elsewhere_are_followed(image_folder, tmp_path):
    plain, store = pack(image_folder), tmp_path / "store"
    store.mkdir()
    (image_folder / "train" / "cat").rename(store / "cat")
    (image_folder / "train" / "cat").symlink_to(store / "cat")
    (image_folder / "val" / "dog" / "38.png").rename(store / "blob")
    (image_folder / "val" / "dog" / "38.png").symlink_to(store / "blob")
    linked = pack(image_folder)
    assert torch.equal(plain.train.images, linked.train.images)
    assert torch.equal(plain.test.images, linked.test.images)


def test_one_file_in_two_classes_is_refused_and_one_that_comes_twice_is_said(image_folder, caplog, monkeypatch):
    monkeypatch.setattr(images.log, "propagate", True)
    own, other = (next((image_folder / "train" / name).iterdir()) for name in ("cat", "dog"))
    (image_folder / "train" / "cat" / "again.png").symlink_to(own)
    (image_folder / "val" / "dog" / "again.png").symlink_to(other)
    pack(image_folder)
    assert [text[text.index("train") :] for text in caplog.messages[-2:]] == [
        "train: 1 images are links to others of their class, and count twice",
        "training images, too, so the accuracy is not that on new ones",
    ]
    (image_folder / "train" / "cat" / "other.png").symlink_to(other)
    with pytest.raises(InputError, match=r"is the same file as \S+, of another class; remove the link"):
        pack(image_folder)


def test_a_pipe_among_the_images_is_refused_and_images_of_12_bits_are_said(image_folder, caplog, monkeypatch):
    monkeypatch.setattr(images.log, "propagate", True)
    save(image_folder / "train" / "cat" / "dark.png", np.full((8, 8), 4095, np.uint16))
    pack(image_folder)
    assert "1 greyscale images of 16 bits have no value above 4095, so they become dark (at most 16 of 255)" in caplog.text
    os.mkfifo(image_folder / "train" / "cat" / "pipe.png")
    with pytest.raises(InputError, match=r"train/cat/pipe\.png: is no file"):
        pack(image_folder)


def test_a_class_whose_name_is_no_text_is_refused(image_folder):
    for part in ("train", "val"):
        (image_folder / part / "dog").rename(image_folder / part / "caf\udce9")
    with pytest.raises(InputError, match=r"train/caf\\udce9: the name of a class is no text in UTF-8; rename the folder"):
        pack(image_folder)


def test_an_empty_class_is_named(image_folder):
    (image_folder / "val" / ".ipynb_checkpoints").mkdir()
    with pytest.raises(InputError, match=r"val/\.ipynb_checkpoints: holds no image .*; fill it, or remove it"):
        pack(image_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10", "--from", "here", "--size", "8"], "--size: belongs to an image folder"),
        (["pets"], "pets: only cifar10 can be downloaded; pack an image folder with --from FOLDER --size PIXELS"),
        (["pets", "--from", "here"], "--size: needed to pack here"),
        (["pets", "--from", "here", "--size", "0"], "--size: needed to pack here"),
        (["pets", "--from", "here", "--size", "8"], "expected train/<class>/ and val/<class>/"),
        (["cifar10", "--from", "here"], "cifar-10-batches-py: incomplete or damaged"),
        (["pets", "--from", "here", "--size", "40000"], "--size: needed to pack here, .* from 1 to 32,768"),
        (["a/b", "--from", "here", "--size", "8"], "'a/b': expected a plain name, such as pets"),
        (["cifar10", "--url", "nonsense"], "nonsense: cannot be downloaded .unknown url type"),
    ],
)
def test_a_folder_that_cannot_be_packed_is_refused(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments, "--root", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder, address) of a web server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_downloaded_cifar10_is_packed_to_the_same_images(tmp_path, server, cifar10_folder, cifar10):
    folder, address = server
    with tarfile.open(folder / "c.tar.gz", "w:gz", compresslevel=0) as archive:
        archive.add(cifar10_folder / "cifar-10-batches-py", "cifar-10-batches-py")
    path = run("cifar10", "--root", tmp_path / "root", "--url", f"{address}/c.tar.gz")
    packed = data.load(config.Data(name="cifar10", root=str(path.parent)), 0)
    for part, original in ((packed.train, cifar10.train), (packed.test, cifar10.test)):
        assert torch.equal(part.images, original.images)
        assert torch.equal(part.labels, original.labels)
    assert (packed.classes, packed.mean.tolist(), packed.std.tolist()) == (
        cifar10.classes,
        cifar10.mean.tolist(),
        cifar10.std.tolist(),
    )
    for big in (folder, path.parent):
        shutil.rmtree(big)


def archive_of(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


BROKEN = {
    "a web page": b"<html>not here</html>",
    "cut short": archive_of("cifar-10-batches-py/data_batch_1", np.random.default_rng(0).bytes(200_000))[:90_000],
    "damaged": b"\x1f\x8b\x08\0\0\0\0\0\0\0" + b"\xff" * 1000,
    "empty": b"",
    "of something else": archive_of("readme", b"hello"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_archive_is_refused_with_the_next_step(tmp_path, server, what):
    folder, address = server
    (folder / "c.tar.gz").write_bytes(BROKEN[what])
    with pytest.raises(InputError, match=r"c\.tar\.gz: cannot be .*use --from|incomplete or damaged .*remove .* and fetch again"):
        run("cifar10", "--root", tmp_path / "root", "--url", f"{address}/c.tar.gz")
    assert not (tmp_path / "root" / "cifar10.h5").exists()


def test_a_broken_download_does_not_stand_in_the_way_of_the_next(tmp_path, server):
    folder, address = server
    for content in (BROKEN["a web page"], archive_of("cifar-10-batches-py/data_batch_1", b"the second download")):
        (folder / "c.tar.gz").write_bytes(content)
        with pytest.raises(InputError):
            run("cifar10", "--root", tmp_path, "--url", f"{address}/c.tar.gz")
    assert (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_1").read_bytes() == b"the second download"


@pytest.mark.parametrize("address", ["{server}/absent.tar.gz", "http://127.0.0.1:9/c.tar.gz"])
def test_an_address_that_does_not_answer_is_named_with_the_way_out(tmp_path, server, address):
    url = address.format(server=server[1])
    with pytest.raises(InputError, match=rf"{url}: cannot be downloaded .*copy the files here and use --from"):
        run("cifar10", "--root", tmp_path, "--url", url)
