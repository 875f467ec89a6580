"""Our own kernels against torch in float64, for the processor at hand and without AVX-512, and networks that they serve."""

import itertools
import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dzhpc
from dzhpc.engines.delta.differences import LARGE
from dzhpc.engines.kernels import build, compiled, library
from dzhpc.engines.kernels.convolutions import Direct, Winograd
from dzhpc.engines.windows import Window
from dzhpc.job import processor

pytestmark = pytest.mark.compiles
COMPILER = next(filter(shutil.which, compiled.COMPILERS), None)
needs_it = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-3}  # of the outputs' norm: a few roundings
HERE = library._flags()
SETS = {HERE, ("-mavx2", "-mfma")} if "-mfma" in HERE else {HERE}
MU = 0.02


@pytest.fixture(params=sorted(SETS), ids=" ".join)
def kernels(request, monkeypatch):
    """The library, as it is compiled for each instruction set that this processor has."""
    monkeypatch.setattr(library, "_flags", lambda: request.param)
    return library.Library(COMPILER)


def close(found, expected, dtype=torch.float32):
    assert found.shape == expected.shape
    for a, b in zip(found.double(), expected, strict=True):  # coordinates of very different sizes
        assert float((a - b).norm() / b.norm()) < TOLERANCE[dtype]


def scaled(*shape):
    return torch.randn(shape) * torch.logspace(-5, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))


@needs_it
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_convolutions_and_their_means_are_those_of_float64(kernels, dtype):
    plain = Window((3, 3), (1, 1), (1, 1))
    for (batch, c, o, h, w), (window, border) in itertools.product(
        [(37, 5, 7, 9, 6), (16, 16, 18, 8, 8), (130, 3, 1, 4, 11), (65, 33, 4, 1, 5), (17, 150, 9, 5, 6)],
        [(plain, (1, 1, 1, 1)), (plain, (2, 1, 0, 3)), (Window((1, 1), (2, 2), (1, 1)), (0, 0, 0, 0)),
         (Window((5, 3), (2, 1), (1, 2)), (2, 2, 2, 3))],
    ):  # fmt: skip
        images, weight = scaled(3, batch, c, h, w).to(dtype), torch.randn(o, c, *window.kernel)
        if min(window.positions(h + sum(border[2:]), w + sum(border[:2]))) < 1:
            continue
        whole = F.pad(images.double().flatten(0, 1), border)
        out = F.conv2d(whole, weight.double(), None, window.stride, 0, window.dilation).unflatten(0, (3, batch))
        centred = torch.randn(out.shape[1:]).to(dtype)
        means = torch.stack([out.mean((1, 3, 4)), (out * (2 * centred.double() + out)).mean((1, 3, 4))], 2)
        for how in ("winograd", "direct") if window is plain else ("direct",):
            weights = getattr(library, f"{how}_weights")(weight, dtype)
            found, sums = kernels.convolve(images, weights, o, window, border, centred, how)
            assert found.dtype == dtype
            close(found, out, dtype)
            size = torch.stack([out.abs().mean((1, 3, 4)), (out * out + out.abs()).mean((1, 3, 4))], 2)
            rounded = dtype == torch.bfloat16 and library.multiplies_pairs()  # of weights, too
            assert ((sums - means).abs() / size).max() < (4e-3 if rounded else 1e-5)  # made before outputs are rounded
            alone, sum_of_it = kernels.convolve(images[1:2], weights, o, window, border, centred, how)
            assert torch.equal(alone, found[1:2])
            assert torch.equal(sum_of_it, sums[1:2])


def behind(x, d, norm, residual, relu, pool, mean, kind):
    """f(x + d) - f(x) in float64 and in the plainest way: x [B, C, H, W], d [P, B, C, H, W], base and change of the residual."""

    def f(x, r):
        if norm:
            x = F.batch_norm(x, None, None, *norm, training=True)
        x = x + r
        x = x.relu() if relu else x
        x = F.max_pool2d(x, pool) if pool > 1 else x
        return x.mean((2, 3)) if mean else x

    base, change = residual
    return torch.stack([f(x + one, base + r) - f(x, base) for one, r in zip(d, change, strict=True)])


@needs_it
def test_passes_are_those_of_float64(kernels):
    draw = torch.Generator().manual_seed(1)
    pick = lambda *options: options[int(torch.randint(len(options), (1,), generator=draw))]  # noqa: E731
    for trial in range(40):
        coords, batch, channels, size = pick(1, 3), pick(16, 17, 40, 130), pick(1, 5, 18), (pick(4, 7, 9), pick(5, 6, 8))
        source, normalised, relu, mean = (
            pick("dense", "planes", "spread"),
            pick(True, False),
            pick(True, False),
            pick(True, False),
        )
        pool, dtype = pick(1, 2, 3), pick(torch.float32, torch.bfloat16)
        beside = "none" if source == "planes" else pick("none", "dense", "single")
        single = torch.float32 if source == "planes" else dtype
        x = torch.randn(batch, channels, *size).to(single).double()
        channel = torch.randint(channels, (coords,))
        own = torch.arange(channels) == channel[:, None]
        spread_own = lambda d: torch.where(own[:, None, :, None, None], d.unsqueeze(2).double(), 0)  # noqa: E731,B023
        if source == "dense":
            given = (MU * scaled(coords, batch, channels, *size)).to(dtype)
            d = given.double()
        else:
            plane = scaled(coords, batch, *size)
            given = library.Planes.of(plane, channel)
            given.factor = MU
            d = MU * spread_own(plane)
        if source == "spread":
            given.columns, given.channel, given.factor = torch.randn(coords, 9, channels), None, 1.0
            given.window, given.border = Window((3, 3), (1, 1), (1, 1)), (1, 1, 1, 1)
            kernel = given.columns.permute(0, 2, 1).reshape(coords, channels, 1, 3, 3).double()
            d = torch.stack([F.conv2d(one[:, None].double(), w, None, 1, 1) for one, w in zip(plane, kernel, strict=True)])
        base, change, residual = torch.zeros_like(x), torch.zeros_like(d), None
        if beside != "none":
            base = torch.randn(x.shape).to(single).double()
            residual = (MU * scaled(coords, batch, channels, *size)).to(dtype)
            change = residual.double()
            if beside == "single":
                residual = MU * scaled(coords, batch, *size), channel
                change = spread_own(residual[0])
        affine = (torch.randn(channels).double(), torch.randn(channels).double()) if normalised else None
        expected = behind(x, d, affine, (base, change), relu, pool, mean, source)
        value = F.batch_norm(x, None, None, *affine, training=True) if normalised else x
        value = value + base
        left = F.max_pool2d(value.relu() if relu else value, pool)
        norm = None
        if normalised:
            centred = x - x.mean((0, 2, 3), keepdim=True)
            scale = ((centred * centred).mean((0, 2, 3)) + 1e-5).sqrt()
            norm = library.Norm(centred.float(), scale.float(), affine[0].float(), None)
        if pool > 1:
            rows, columns = (n * pool for n in left.shape[2:])
            value = value.clone()
            value[..., :rows, :columns] -= left.repeat_interleave(pool, 2).repeat_interleave(pool, 3)
        bent = relu or pool > 1
        arguments = (
            given, x.shape, dtype, norm, residual, relu, pool, mean, value.float() if bent else None,
            left.float() if relu and pool > 1 else None,
        )  # fmt: skip
        found = kernels.carry(*arguments)
        if source == "planes":
            expected = torch.stack([one[:, c] for one, c in zip(expected, channel, strict=True)])
        assert found.shape == expected.shape, trial
        tolerance = 1e-4 if single == torch.float32 else 2e-2
        for a, b in zip(found.double(), expected, strict=True):
            assert float((a - b).norm() / b.norm().clamp_min(1e-12)) < tolerance, (trial, arguments[2:])
        if coords > 1:
            for k in range(coords):
                alone = (
                    library.Planes(**{**vars(given), "offsets": given.offsets[k : k + 1]})
                    if source != "dense"
                    else given[k : k + 1]
                )
                if source == "planes":
                    alone.channel = channel[k : k + 1]
                if source == "spread":
                    alone.columns = given.columns[k : k + 1]
                part = tuple(t[k : k + 1] for t in residual) if beside == "single" else residual
                part = residual[k : k + 1] if beside == "dense" else part
                assert torch.equal(kernels.carry(alone, *arguments[1:4], part, *arguments[5:]), found[k : k + 1])


@needs_it
def test_cross_entropy_of_small_and_large_changes(kernels):
    for batch, classes, size in ((16, 10, 1e-4), (37, 3, 1.0), (130, 100, 3 * LARGE)):
        log_p = (2 * torch.randn(batch, classes)).double().log_softmax(1)
        targets, d = torch.randint(classes, (batch,)), size * torch.randn(4, batch, classes)
        own = d.double().gather(2, targets[None, :, None].expand(4, -1, 1))
        expected, by_class = torch.logsumexp(log_p + d.double() - own, 2).mean(1), log_p.float().t().contiguous()
        rows = d.transpose(1, 2).contiguous()
        found = kernels.cross_entropies(rows, by_class, by_class.exp(), targets)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        rows[1, 1, 3] = torch.nan
        assert kernels.cross_entropies(rows, by_class, by_class.exp(), targets).isnan().tolist() == [False, True, False, False]


class Blocks(nn.Module):
    """All that a block may consist of, of odd sizes, and operations that the library leaves to others between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.one, self.two = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.Conv2d(7, 7, 3, padding=1)
        self.norm2, self.norm3 = nn.BatchNorm2d(7), nn.BatchNorm2d(7)
        self.three, self.norm4 = nn.Conv2d(7, 5, 5, stride=2, padding=2), nn.BatchNorm2d(5)
        self.four, self.fc = nn.Conv2d(5, 6, 3, padding=1), nn.Linear(6, 10)

    def forward(self, x):
        x = F.max_pool2d(self.norm1(self.stem(x)).relu(), 2)
        x = (self.norm3(self.two(self.norm2(self.one(x)).relu())) + x).relu()
        x = F.gelu(self.norm4(self.three(x)))
        return self.fc(self.four(x).relu().mean((2, 3)))


def ways():
    """(way, precision, whether what is left to torch's compiler is compiled, seconds each: one time is enough for every day)."""
    every = ("compiled", "compiler fails", "small batch"), ("fp32", "bf16"), (True, False)
    for way, precision, beside in itertools.product(*every):
        now = beside == ((way, precision) == ("compiled", "fp32"))
        if not beside and not now:
            continue
        name = f"{way} {precision}{' beside programs' if beside else ''}"
        yield pytest.param(way, precision, beside, id=name, marks=() if now else pytest.mark.long)


@needs_it
@pytest.mark.parametrize(("way", "precision", "beside"), list(ways()))
def test_a_network_gets_the_same_numbers_by_it_and_without(way, precision, beside, monkeypatch, caplog):
    if not beside:
        monkeypatch.setattr(compiled.Programs, "compile", lambda self, traced, samples: traced.forward)
    torch.manual_seed(0)
    batch = 5 if way == "small batch" else 18
    model, inputs, labels = Blocks(), torch.randn(batch, 3, 13, 11), torch.arange(batch) % 10
    served, carry = [], library.Library.carry
    monkeypatch.setattr(library.Library, "carry", lambda self, *args: served.append(args[6:8]) or carry(self, *args))
    if way == "compiler fails":
        monkeypatch.setattr(library, "_load", lambda compiler, flags: "fatal error: no such processor")
    with caplog.at_level(logging.INFO, logger="dzhpc"):
        logging.getLogger("dzhpc").propagate = True
        engine = dzhpc.make_engine("delta", model, "cross_entropy", precision, emulate_bf16=True)
        coords = torch.arange(0, engine.index.size, engine.index.size // 60).numpy()
        engine.bind(inputs, labels)
        found = engine.differences(coords, 5e-3)
    for part in (slice(0, None, 2), slice(20, 21)) if served else ():  # torch's own convolutions see who is beside
        assert torch.equal(engine.differences(coords[part], 5e-3), found[part])
    truth = dzhpc.make_engine("full", model.double(), "cross_entropy")
    truth.bind(inputs.double(), labels)
    expected = truth.differences(coords, 5e-3)
    assert float((found.double() - expected).norm() / expected.norm()) < {"fp32": 2e-5, "bf16": 2e-2}[precision]
    assert bool(served) == (way == "compiled")
    words = "kernel changes is not used: fatal error: no such processor"
    assert sum(words in line for line in caplog.messages) == (way == "compiler fails")


@needs_it
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_begin_anywhere(precision, monkeypatch):
    """A pool or a mean that follows a convolution, one channel of it, an operation without a rule, or another pool."""
    monkeypatch.setattr(compiled.Programs, "compile", lambda self, traced, samples: traced.forward)
    served, carry = [], library.Library.carry
    monkeypatch.setattr(library.Library, "carry", lambda self, *args: served.append(args[6:8]) or carry(self, *args))
    torch.manual_seed(0)
    inputs, labels = torch.randn(17, 3, 11, 9), torch.arange(17) % 3
    conv, pool, mean = (lambda: nn.Conv2d(4, 4, 3, padding=1)), nn.MaxPool2d, nn.AdaptiveAvgPool2d(1)
    for behind in (
        [pool(2)], [pool(3), mean], [mean], [conv(), pool(2)], [conv(), mean], [nn.Hardswish(), pool(2), nn.BatchNorm2d(4)],
        [nn.Hardswish(), mean], [conv(), pool(2), nn.BatchNorm2d(4), nn.ReLU(), pool(2), conv(), nn.ReLU(), mean],
    ):  # fmt: skip
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *behind, nn.Flatten(), nn.LazyLinear(3))
        model(inputs)
        engine = dzhpc.make_engine("delta", model, "cross_entropy", precision, emulate_bf16=True)
        coords = list(range(0, engine.index.size, 5))
        engine.bind(inputs, labels)
        found, truth = engine.differences(coords, 5e-3).double(), dzhpc.make_engine("full", model.double(), "cross_entropy")
        truth.bind(inputs.double(), labels)
        expected = truth.differences(coords, 5e-3)
        assert served, behind
        assert float((found - expected).norm() / expected.norm()) < {"fp32": 2e-5, "bf16": 2e-2}[precision], behind
        served.clear()


def test_serves_layers_and_batches_that_fill_it():
    def fits(kind, layer, height=8, width=8, batch=16, dtype=torch.float32):
        return kind.fits(layer, torch.zeros(2, batch, layer.in_channels, height, width, dtype=dtype))

    plain = nn.Conv2d(5, 7, 3, padding=1)
    assert fits(Winograd, plain)
    assert not fits(Winograd, plain, 1, 8)  # tiles mostly beyond the image
    assert not fits(Direct, plain, batch=15)
    assert not fits(Direct, plain, dtype=torch.float64)
    for other in (nn.Conv2d(4, 8, 5), nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(4, 8, (3, 1))):
        assert not fits(Winograd, other)
        assert fits(Direct, other)
    for other in (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")):
        assert not fits(Direct, other)


@needs_it
def test_bits_do_not_depend_on_threads(kernels):
    images, weight = torch.randn(4, 150, 6, 9, 10), library.winograd_weights(torch.randn(5, 6, 3, 3))
    centred, window, before = torch.randn(150, 5, 9, 10), Window((3, 3), (1, 1), (1, 1)), torch.get_num_threads()
    norm = library.Norm(torch.randn(150, 6, 9, 10), torch.ones(6), torch.ones(6), None)

    def all_of_it():
        out, means = kernels.convolve(images, weight, 5, window, (1, 1, 1, 1), centred, "winograd")
        return out, means, kernels.carry(images, images.shape[1:], torch.float32, norm)

    found = all_of_it()
    try:
        torch.set_num_threads(3)
        threaded = all_of_it()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, threaded))


@needs_it
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_convolution_with_the_pass_behind_it_has_the_bits_of_both(kernels, dtype):
    window, border, coords, batch = Window((3, 3), (1, 1), (1, 1)), (1, 1, 1, 1), 3, 19
    images, weight = scaled(coords, batch, 5, 9, 6).to(dtype), torch.randn(10, 5, 3, 3)
    base = lambda: torch.randn(batch, 10, 9, 6).to(dtype)  # noqa: E731
    centred, value, single = base(), base(), torch.randn(coords, batch, 9, 6)
    for how, residual, pool, mean, normalised in (
        ("winograd", None, 1, False, True),
        ("direct", scaled(coords, batch, 10, 9, 6).to(dtype), 1, True, True),
        ("winograd", (single, torch.tensor([3, 9, 0])), 2, False, True),
        ("direct", None, 1, False, False),
    ):
        weights = getattr(library, f"{how}_weights")(weight, dtype)
        out, means = kernels.convolve(images, weights, 10, window, border, centred, how)
        norms = [library.Norm(centred, torch.ones(10), torch.ones(10), m) if normalised else None for m in (means, None)]
        rest = residual, pool == 1, pool, mean, value
        layer = library.Layer(images, weights, 10, window, border, how)
        after = kernels.carry(out, out.shape[1:], dtype, norms[0], *rest)
        assert torch.equal(kernels.carry(layer, out.shape[1:], dtype, norms[1], *rest), after)


@needs_it
def test_a_chunk_of_one_comes_first():
    """Programs between a convolution of our own and an operation that the library does not know hold for any number behind it."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 9, 3)
    model = nn.Sequential(*convolutions, nn.BatchNorm2d(9), nn.GELU(), nn.Flatten(), nn.Linear(9 * 64, 4))
    engine = dzhpc.make_engine("delta", model, "cross_entropy")
    engine.bind(torch.randn(17, 3, 12, 12), torch.arange(17) % 4)
    first, several = engine.differences([7], MU), engine.differences([7, 30, 31], MU)
    assert first[0] == several[0] != 0


@needs_it
def test_a_compiler_that_fails_or_hangs_is_an_error_with_its_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    failing = "echo 'In file included from a.h' >&2; echo 'error: no such flag' >&2; exit 1"
    for text, words in ((failing, "no such flag"), ("sleep 60", "did not end")):
        compiler = tmp_path / f"c{len(words)}"
        compiler.write_text(f"#!/bin/sh\n{text}\n")
        compiler.chmod(0o755)
        monkeypatch.setattr(build, "PATIENCE", 5 if "exit" in text else 0.5)
        with pytest.raises(OSError, match=words):
            library.Library(str(compiler))
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made is left


def test_the_instruction_set_that_is_hidden_is_not_compiled_for():
    wide = processor.capabilities().issuperset(library.BASE)
    assert any("avx512" in flag for flag in HERE) == wide
