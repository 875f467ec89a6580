"""``changes.cpp``, compiled in seconds for the processor at hand, and its functions of tensors.

Changes of whole values are [P, B, C, H, W] with the batch innermost in memory (:func:`apart`), those of one channel [P, B, H, W]
with the batch innermost, too. Everything is float32, or bfloat16 where changes travel so; sums are double.
"""

import ctypes
import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dzhpc.engines.kernels.build import shared_library
from dzhpc.engines.kernels.compiled import compiler as first_compiler
from dzhpc.engines.windows import Border, Window
from dzhpc.job import processor

SOURCE = Path(__file__).with_name("changes.cpp")
BASE = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl")
PANEL = 8  # outputs of a convolution that are made at once
BATCH = 16  # samples that fill a vector; of a smaller batch most of it would be empty
_KINDS = {torch.float32: "floats", torch.bfloat16: "halves"}  # in names of functions
MANY, BLOCK = 16, 64  # channels from which on whole numbers are worth making; whose products are one sum
LARGEST_WHOLE, LARGEST_SUM = 32767, (2**31 - 2**20) / 2**14 - BLOCK  # of weights; products are with numbers below 2**14
DEEPEST = 8  # pixels on a side of a max pool's window


def _fields(**names: str) -> list[tuple[str, type]]:
    """The fields of a structure: integers, numbers and pointers, in this order."""
    kinds = {"integers": ctypes.c_int64, "numbers": ctypes.c_double, "pointers": ctypes.c_void_p}
    return [(name, kinds[kind]) for kind, several in names.items() for name in several.split()]


class _Convolution(ctypes.Structure):
    """As the structure of that name in the source."""

    _fields_ = _fields(
        integers="coords batch channels height width outputs rows columns tall wide down right dilate_down dilate_right "
        "top left threads",
        pointers="images centred kernels outs sums",
    )


class _Pass(ctypes.Structure):
    """As the structure of that name in the source."""

    _fields_ = _fields(
        integers="coords batch channels height width pool rows columns source row column tall wide down right dilate_down "
        "dilate_right top left plane_height plane_width normalised relu mean residual threads",
        numbers="factor count",
        pointers="offsets channel residual_channel data kernels centred value left_over residuals scale gamma means outs",
    )


@dataclass
class Planes:
    """Changes of one channel for each of P coordinates: ``factor`` times ``data`` at ``offsets[p] + h row + w column + b``.

    channel: [P], which one. columns, window, border: where they pass through a convolution, with weights [P, kh * kw, O] of their
    own, zeros beyond the border, and then live in all of its O channels.
    """

    data: Tensor
    offsets: Tensor
    row: int
    column: int
    height: int
    width: int
    factor: float = 1.0
    channel: Tensor | None = None
    columns: Tensor | None = None
    window: Window | None = None
    border: Border = (0, 0, 0, 0)

    @classmethod
    def of(cls, data: Tensor, channel: Tensor) -> "Planes":
        """Changes [P, B, H, W] of one channel each; copied where the batch is not innermost."""
        data = data.movedim(1, -1).contiguous()
        coords, height, width, batch = data.shape
        offsets = torch.arange(coords) * (height * width * batch)
        return cls(data, offsets, width * batch, batch, height, width, channel=channel)


@dataclass
class Layer:
    """What a convolution makes of changes ``images`` [P, B, C, H, W], not made yet; see :meth:`Library.convolve`."""

    images: Tensor
    kernels: Tensor
    outputs: int
    window: Window
    border: Border
    how: str


@dataclass
class Norm:
    """A BatchNorm in train mode: x less its mean [B, C, H, W], s [C], the layer's factor [C], means [P, C, 2] double or None."""

    centred: Tensor
    scale: Tensor
    gamma: Tensor
    means: Tensor | None


class Library:
    """The compiled functions. Raises OSError, with the compiler's first words, where it fails.

    compiler: a C++ compiler's command (None: the first that is found). Its result is kept where torch keeps compiled code.
    """

    name = "changes"

    def __init__(self, compiler: str | None = None):
        found = _load(compiler or first_compiler(), _flags())
        if isinstance(found, str):
            raise OSError(found)
        self._functions = found

    def convolve(
        self, images: Tensor, kernels: Tensor, outputs: int, window: Window, border: Border, centred: Tensor | None, how: str
    ) -> tuple[Tensor, Tensor | None]:
        """Changes D [P, B, C, H, W] -> those of the outputs [P, B, O, H', W'], and mean(D), mean(D (2 x_c + D)) [P, O, 2].

        kernels: of :func:`winograd_weights` or :func:`direct_weights`, as ``how``, "winograd" or "direct", says. centred: x_c
        [B, O, H', W']; None: no means. border: zeros on the left, right, top and bottom.
        """
        layer = Layer(apart(images), kernels, outputs, window, border, how)
        beside = None if centred is None else apart(centred.to(images.dtype))
        s, out = self._convolution(layer, len(images), beside)
        name, sums = f"{how}_{_KINDS[images.dtype]}", None
        if centred is not None:
            slices = getattr(self._functions, f"{name}_slices")(ctypes.byref(s))
            sums = torch.empty(len(images), outputs, slices, 2, dtype=torch.float64)
            s.sums = sums.data_ptr()
        getattr(self._functions, name)(ctypes.byref(s))
        means = None if sums is None else sums.sum(2).div_(beside.numel() // outputs)
        return out.movedim(-1, 1), means

    def _convolution(self, layer: Layer, places: int, centred: Tensor | None) -> tuple[_Convolution, Tensor]:
        """The structure, and memory for the outputs of so many coordinates [places, O, H', W', B]."""
        coords, batch, channels, height, width = layer.images.shape
        left, right, top, bottom = layer.border
        rows, columns = layer.window.positions(height + top + bottom, width + left + right)
        out = layer.images.new_empty(places, layer.outputs, rows, columns, batch)
        window = (*layer.window.kernel, *layer.window.stride, *layer.window.dilation)
        pointers = layer.images.data_ptr(), _pointer(centred), layer.kernels.data_ptr(), out.data_ptr()
        sizes = coords, batch, channels, height, width, layer.outputs, rows, columns
        return _Convolution(*sizes, *window, top, left, torch.get_num_threads(), *pointers), out

    def carry(
        self,
        source: Tensor | Planes | Layer,
        shape: torch.Size,
        dtype: torch.dtype,
        norm: Norm | None = None,
        residual: Tensor | tuple[Tensor, Tensor] | None = None,
        relu: bool = False,
        pool: int = 1,
        mean: bool = False,
        value: Tensor | None = None,
        left_over: Tensor | None = None,
    ) -> Tensor:
        """Changes behind [BatchNorm] [+ residual] [ReLU] [max pool] [mean over pixels], in this order.

        source: changes before, dense [P, B, C, H, W], of planes, or of a convolution. shape: [B, C, H, W] of the values that
        change. dtype: of dense changes. residual: of changes, or (changes [P, B, H, W] of one channel each, channels [P]).
        value: base values before ReLU and pool [B, C, H, W], with a pool less what it leaves of them; left_over: what ReLU and
        pool leave at theta [B, C, H', W']. -> [P, B, C, H', W'] ([P, B, C] with ``mean``, float32), without C for planes that no
        convolution spreads.
        """
        batch, channels, height, width = shape
        rows, columns = height // pool, width // pool
        planes = source if isinstance(source, Planes) else None
        single = planes is not None and planes.columns is None
        layer = replace(source, images=apart(source.images)) if isinstance(source, Layer) else None
        data = planes.data if planes else layer.images if layer else apart(source)
        coords = len(planes.offsets if planes else data)
        kind = torch.float32 if single else dtype  # of base values and of what leaves
        base = {name: None if t is None else apart(t.to(kind)) for name, t in
                (("centred", norm and norm.centred), ("value", value), ("left_over", left_over))}  # fmt: skip
        where = () if single else (channels,)
        out = torch.zeros(coords, *where, batch) if mean else torch.empty((coords, *where, rows, columns, batch), dtype=kind)
        s = _Pass(coords, batch, channels, height, width, pool, rows, columns, factor=1.0, count=batch * height * width,
                  normalised=norm is not None, relu=relu, mean=mean, threads=torch.get_num_threads(), data=data.data_ptr(),
                  outs=out.data_ptr(), **{name: _pointer(t) for name, t in base.items()})  # fmt: skip
        held: list[Tensor | None] = []  # until the call is over
        if planes:
            held += [planes.offsets, planes.channel]
            s.source, s.row, s.column, s.factor = 1 if single else 2, planes.row, planes.column, planes.factor
            s.offsets, s.channel = map(_pointer, held)
            if not single:
                held.append(planes.columns.transpose(1, 2).contiguous().float())  # [P, O, kh kw]
                s.kernels, s.plane_height, s.plane_width = held[-1].data_ptr(), planes.height, planes.width
                (s.tall, s.wide), (s.down, s.right) = planes.window.kernel, planes.window.stride
                (s.dilate_down, s.dilate_right), s.left, s.top = planes.window.dilation, planes.border[0], planes.border[2]
        if norm:
            s.scale, s.gamma, s.means = norm.scale.data_ptr(), norm.gamma.data_ptr(), _pointer(norm.means)
        if isinstance(residual, tuple):
            held += [residual[0].movedim(1, -1).contiguous(), residual[1]]
            s.residual, s.residuals, s.residual_channel = 2, held[-2].data_ptr(), held[-1].data_ptr()
        elif residual is not None:
            held.append(apart(residual))
            s.residual, s.residuals = 1, held[-1].data_ptr()
        if layer:
            c, between = self._convolution(layer, min(coords, s.threads), base["centred"])
            held.append(between)
            getattr(self._functions, f"{layer.how}_{_KINDS[kind]}_and")(ctypes.byref(c), ctypes.byref(s))
        else:
            name = "rounding" if planes and kind != torch.float32 else _KINDS[kind]
            getattr(self._functions, f"pass_{name}")(ctypes.byref(s))
        return out.movedim(-1, 1)

    def cross_entropies(self, changes: Tensor, log_p: Tensor, p: Tensor, targets: Tensor) -> Tensor:
        """Changes of logits [P, K, B] -> those of the mean cross entropy [P]; log p and p [K, B] at theta, targets [B]."""
        coords, classes, batch = changes.shape
        out = torch.empty(coords)
        pointers = [t.data_ptr() for t in (changes, log_p, p, targets, out)]
        sizes = map(ctypes.c_int64, (coords, batch, classes, torch.get_num_threads()))
        self._functions.cross_entropies(*map(ctypes.c_void_p, pointers), *sizes)
        return out


def apart(x: Tensor) -> Tensor:
    """The same values [..., B, C, H, W], contiguous as [..., C, H, W, B]."""
    moved = x.movedim(-4, -1)
    return x if moved.is_contiguous() else moved.contiguous().movedim(-1, -4)


def winograd_weights(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """G g G' of a layer's weights [O, C, 3, 3] -> [O / 8, 36, C, 8], zeros beyond O, for changes of a type.

    bfloat16 of MANY channels, where there are products of pairs: [O / 8, 36 C / 2 + 36, 8], pairs of whole numbers of 16 bits,
    so large that no sum of BLOCK channels leaves 32 bits, and behind them [36, 8], for each output, what one of them means.
    """
    rows = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
    g = torch.tensor(rows, dtype=torch.float64) / 24
    panels = _in_panels(g @ weight.double() @ g.T)  # [O / 8, 8, C, 6, 6]
    panels = panels.permute(0, 3, 4, 2, 1).flatten(1, 2)
    if dtype != torch.bfloat16 or not multiplies_pairs() or weight.shape[1] < MANY:
        return panels.float().contiguous()
    total = torch.stack([block.abs().sum(2, keepdim=True) for block in panels.split(BLOCK, 2)]).amax(0)
    unit = torch.maximum(panels.abs().amax(2, keepdim=True) / LARGEST_WHOLE, total / LARGEST_SUM).clamp(min=1e-30).float()
    whole = _in_pairs((panels / unit.double()).round().to(torch.int16), 2)
    return torch.cat([whole.flatten(1, 2), unit.flatten(1, 2)], 1).contiguous()


def direct_weights(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A layer's weights [O, C, kh, kw] -> [O / 8, kh, kw, C, 8], zeros beyond O, for changes of a type.

    bfloat16, where there are products of pairs: [O / 8, kh, kw, C / 2, 8], rounded to pairs of bfloat16.
    """
    panels = _in_panels(weight).permute(0, 3, 4, 2, 1)
    if dtype != torch.bfloat16 or not multiplies_pairs():
        return panels.float().contiguous()
    return _in_pairs(panels.bfloat16().view(torch.int16), 3).contiguous()


def multiplies_pairs() -> bool:
    """Whether the library multiplies numbers of 16 bits in pairs, for changes in bfloat16."""
    return "-mavx512bf16" in _flags()


def _in_pairs(values: Tensor, axis: int) -> Tensor:
    """Neighbours along an axis of int16 as the bits of one float each; a zero behind an odd one."""
    values = values.movedim(axis, -1)
    values = torch.cat([values, values.new_zeros(*values.shape[:-1], values.shape[-1] % 2)], -1)
    return values.contiguous().view(torch.float32).movedim(-1, axis)


def _in_panels(weight: Tensor) -> Tensor:
    filled = torch.cat([weight, weight.new_zeros(-len(weight) % PANEL, *weight.shape[1:])])
    return filled.unflatten(0, (-1, PANEL))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _flags() -> tuple[str, ...]:
    """For the instructions that this process may use."""
    have = processor.capabilities()
    if have.issuperset(BASE):
        wide = ["-mfma", *("-m" + name.replace("_", "") for name in BASE)]
        return (*wide, "-mavx512bf16", "-mavx512vnni") if {"avx512_bf16", "avx512_vnni"} <= have else tuple(wide)
    return ("-mavx2", "-mfma") if {"avx2", "fma3"} <= have or {"avx2", "fma"} <= have else ()


@functools.cache
def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    """The compiled source, or why there is none: asked for once."""
    try:
        library = shared_library(SOURCE, compiler, ("-ffp-contract=fast", "-Wno-psabi", *flags))
    except OSError as error:
        return str(error)
    for name in ("winograd_floats", "winograd_halves", "direct_floats", "direct_halves"):
        getattr(library, f"{name}_slices").restype = ctypes.c_int64
    return library
