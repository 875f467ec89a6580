"""What slides over images: the geometry of convolutions and pooling."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Border = tuple[int, int, int, int]  # pixels on the left, right, top and bottom


@dataclass(frozen=True)
class Window:
    """What slides over an image, each as (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """(H', W'): how many windows fit into an image that is padded already."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1


def window_of(conv: nn.Conv2d) -> Window:
    """The window of a convolution."""
    return Window(conv.kernel_size, conv.stride, conv.dilation)


def borders(conv: nn.Conv2d) -> Border:
    """The padding of a convolution."""
    if isinstance(conv.padding, str):
        reach = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in reach)
        return left, right, top, bottom
    return (conv.padding[1], conv.padding[1], conv.padding[0], conv.padding[0])


def padded(data: Tensor, border: Border, mode: str) -> Tensor:
    """Images [..., H, W] with a border as ``padding_mode`` says: linear in the data, whatever it says."""
    if not any(border):
        return data
    if mode == "zeros":
        return F.pad(data, border)
    out = F.pad(data.flatten(0, -3)[None], border, mode)[0]  # these modes take three or four axes only
    return out.unflatten(0, data.shape[:-2])


def shifts(padded: Tensor, window: Window) -> list[Tensor]:
    """For each kernel position (row-major) what it sees of the padded input [..., H, W]: [..., H', W']."""
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    height, width = window.positions(*padded.shape[-2:])
    return [
        padded[..., a * dh : a * dh + (height - 1) * sh + 1 : sh, b * dw : b * dw + (width - 1) * sw + 1 : sw]
        for a in range(kh)
        for b in range(kw)
    ]


def seen(padded: Tensor, window: Window) -> Tensor:
    """As :func:`shifts`, as one view that copies nothing: [N, B, H, W] -> [N, *kernel, B, H', W']."""
    outer, batch, rows, columns = padded.stride()
    (sh, sw), (dh, dw) = window.stride, window.dilation
    return padded.as_strided(
        (padded.shape[0], *window.kernel, padded.shape[1], *window.positions(*padded.shape[-2:])),
        (outer, dh * rows, dw * columns, batch, sh * rows, sw * columns),
    )
