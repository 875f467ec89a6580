"""What a BatchNorm does to changes on a GPU, in two passes over memory, in Triton: its sums, then all up to the next convolution.

Changes D [P, B, C, H, W] lie as P images of N = B H W rows and C columns, base values [B, C, H, W] as one. Programs of all P
coordinates work on one piece of the base at a time, so that it is read from memory once and then from the second-level cache.
How rows are shared out follows from N and C alone: the bits of a coordinate depend on nothing but its own numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program has in registers
WIDEST = 64  # columns in a tile
STEPS = 16  # tiles that a program sums up
WARPS = 8


@triton.jit
def sums_kernel(
    d_at, centred_at, out_at, count, rows, columns, parts, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums of D and of D (2 x_c + D) over STEPS tiles of rows: out [P, parts, 2, C]."""
    p, part = tl.program_id(0) % count, tl.program_id(0) // count
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    d_at += p.to(tl.int64) * rows * columns  # beyond 2^31 elements
    first = tl.zeros([ROWS, COLUMNS], tl.float32)
    second = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        n = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (n < rows)[:, None] & (c < columns)[None, :]
        place = n[:, None] * columns + c[None, :]
        d = tl.load(d_at + place, inside, 0.0).to(tl.float32)
        x = tl.load(centred_at + place, inside, 0.0).to(tl.float32)
        first += d
        second += d * (x + x + d)
    out_at += (p * parts + part) * 2 * columns + c
    tl.store(out_at, tl.sum(first, 0), c < columns)
    tl.store(out_at + columns, tl.sum(second, 0), c < columns)


@triton.jit
def carry_kernel(
    d_at, centred_at, residual_at, value_at, coefficients_at, out_at, count, rows, columns,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(D - m) a - x_c b [+ residual], then max(t + min(x, 0), -max(x, 0)) for a ReLU; coefficients m, a, b [P, 3, C]."""
    p = tl.program_id(0) % count
    n = tl.program_id(0) // count * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < rows)[:, None] & (c < columns)[None, :]
    place = n[:, None] * columns + c[None, :]
    own = p.to(tl.int64) * rows * columns
    coefficients_at += p * 3 * columns + c
    mean = tl.load(coefficients_at, c < columns, 0.0)[None, :]
    scale = tl.load(coefficients_at + columns, c < columns, 0.0)[None, :]
    shrink = tl.load(coefficients_at + 2 * columns, c < columns, 0.0)[None, :]
    d = tl.load(d_at + own + place, inside, 0.0).to(tl.float32)
    x = tl.load(centred_at + place, inside, 0.0).to(tl.float32)
    t = (d - mean) * scale - x * shrink
    if RESIDUAL:
        t += tl.load(residual_at + own + place, inside, 0.0).to(tl.float32)
    if RELU:
        value = tl.load(value_at + place, inside, 0.0).to(tl.float32)
        t = tl.maximum(t + tl.minimum(value, 0.0), -tl.maximum(value, 0.0))
    tl.store(out_at + own + place, t.to(out_at.dtype.element_ty), inside)


def tile(columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile for images of so many columns."""
    wide = min(WIDEST, triton.next_power_of_2(columns))
    return TILE // wide, wide


def sums(data: Tensor, centred: Tensor) -> Tensor:
    """Changes [P, N, C] beside x_c [N, C] -> mean(D) and mean(D (2 x_c + D)) over the rows [2, P, C] float32."""
    count, rows, columns = data.shape
    tall, wide = tile(columns)
    parts = triton.cdiv(rows, tall * STEPS)
    out = torch.empty(count, parts, 2, columns, device=data.device)
    grid = (count * parts, triton.cdiv(columns, wide))
    sums_kernel[grid](data, centred, out, count, rows, columns, parts, STEPS, tall, wide, num_warps=WARPS)
    return out.double().sum(1).div(rows).float().movedim(1, 0)


def carry(data: Tensor, centred: Tensor, coefficients: Tensor, residual: Tensor | None, value: Tensor | None) -> Tensor:
    """Changes [P, N, C] through a BatchNorm, a sum with others and a ReLU -> [P, N, C] of the same type.

    centred: x_c [N, C]. coefficients: mean(D), 1/s' and (s' - s)/(s s'), the last two times the layer's factor [P, 3, C] float32.
    residual: the changes beside [P, N, C]; None: no sum. value: what the ReLU takes at theta [N, C]; None: no ReLU.
    """
    count, rows, columns = data.shape
    tall, wide = tile(columns)
    out = torch.empty_like(data)
    grid = (count * triton.cdiv(rows, tall), triton.cdiv(columns, wide))
    given = (data, centred, data if residual is None else residual, centred if value is None else value, coefficients, out)
    carry_kernel[grid](*given, count, rows, columns, residual is not None, value is not None, tall, wide, num_warps=WARPS)
    return out
