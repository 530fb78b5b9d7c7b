"""Triton kernels for images in NHWC, as operators of torch: the one place that uses triton. sd.optimise.kernels asks for it.

torch.compile takes the operators into its graph without a break. No kernel adds atomically, the host is never waited for,
and how an image is cut depends on its size alone: the same input gives the same bits, at any place in any batch, and
the kernels can be recorded in a CUDA graph.

Sources of the methods: the tiles and masks of Triton's tutorials; parallel combination of means and squared deviations
by Chan, Golub and LeVeque (1979); group norm with SiLU in NHWC as one kernel after chengzeyi/stable-fast.
"""

from __future__ import annotations

import os
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import library

if os.environ.get("TRITON_INTERPRET") == "1":

    def wrap_triton(kernel):
        """What is interpreted is launched as it is; torch 2.11 refuses to wrap it."""
        return kernel

else:
    wrap_triton = library.wrap_triton  # by this name, which torch looks for in the operators

# A group whose padded tile has at most so many numbers is one program's, in registers: one launch in place of three.
WHOLE_GROUP = 16384
ROWS, COLUMNS = 32, 64  # a tile of the others; 64 half channels are one line of 128 bytes
PROGRAMS = 512  # that read one image: with guidance's batch of two, several for each of an H100's 132 processors
GATED_ROWS, GATED_COLUMNS = 4, 256


@triton.jit
def _activated(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _before(conv_bias, add, columns, mask, HAS_CONV_BIAS: tl.constexpr, HAS_ADD: tl.constexpr):
    """What is added to every cell of a channel before the norm; `add` is of this image."""
    before = tl.zeros(columns.shape, tl.float32)
    if HAS_CONV_BIAS:
        before += tl.load(conv_bias + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        before += tl.load(add + columns, mask=mask, other=0.0).to(tl.float32)
    return before


@triton.jit
def whole_group(
    x, weight, bias, conv_bias, add, out, cells, channels, add_stride, eps,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Norm of a group in one program, grid (groups, batch): its mean first, then the squares of what differs from it."""
    image = tl.program_id(1).to(tl.int64)
    lanes, rows = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_ROWS)
    columns, inside = tl.program_id(0) * WIDTH + lanes, lanes < WIDTH
    mask = (rows < cells)[:, None] & inside[None, :]
    offsets = rows[:, None] * channels + columns[None, :]
    image_start = image * cells * channels
    before = _before(conv_bias, add + image * add_stride, columns, inside, HAS_CONV_BIAS, HAS_ADD)
    numbers = tl.load(x + image_start + offsets, mask=mask, other=0.0).to(tl.float32) + before[None, :]
    count = cells * WIDTH
    mean = tl.sum(tl.where(mask, numbers, 0.0)) / count
    apart = tl.where(mask, numbers - mean, 0.0)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.sum(apart * apart) / count + eps)
    y = apart * scale[None, :] + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + image_start + offsets, _activated(y, SILU).to(out.dtype.element_ty), mask=mask)


@triton.jit
def channel_statistics(
    x, means, squares, cells, channels, rows_of_split, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over each split of the cells, grid (tiles, splits, batch).

    means, squares: [batch, splits, channels]. Deviations are summed from the mean of the split's first rows. Where those
    lie far from the rest, they widen the variance themselves, so that its relative error stays under that of one
    rounding times the number of tiles in a split.
    """
    image, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.arange(0, TILE_ROWS), tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    first = split * rows_of_split
    end = tl.minimum(first + rows_of_split, cells)
    count = end - first
    inside = columns < channels
    offsets = rows[:, None] * channels + columns[None, :]
    start = x + image * cells * channels + first.to(tl.int64) * channels
    mask = (rows < count)[:, None] & inside[None, :]
    numbers = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
    near = tl.sum(numbers, axis=0) / tl.minimum(count, TILE_ROWS)
    apart = tl.where(mask, numbers - near[None, :], 0.0)
    sums, sums_of_squares = apart, apart * apart
    for done in range(TILE_ROWS, count, TILE_ROWS):
        start += TILE_ROWS * channels
        mask = (rows < count - done)[:, None] & inside[None, :]
        numbers = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, numbers - near[None, :], 0.0)
        sums += apart
        sums_of_squares += apart * apart
    total = tl.sum(sums, axis=0)
    at = (image * tl.num_programs(1) + split) * channels + columns
    tl.store(means + at, near + total / count, mask=inside)
    tl.store(squares + at, tl.maximum(tl.sum(sums_of_squares, axis=0) - total * total / count, 0.0), mask=inside)


@triton.jit
def scales_and_shifts(
    means, squares, weight, bias, conv_bias, add, scales, shifts, cells, channels, add_stride, rows_of_split, splits, eps,
    WIDTH: tl.constexpr, TILE_SPLITS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
):  # fmt: skip
    """The norm as a product and a sum for each channel, [batch, channels]; grid (groups, batch).

    What is added before the norm moves the means of channels and leaves their deviations alone, so it is added here, to
    one number a split in place of every cell.
    """
    image = tl.program_id(1).to(tl.int64)
    lanes, split = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_SPLITS)
    columns, inside = tl.program_id(0) * WIDTH + lanes, lanes < WIDTH
    mask = (split < splits)[:, None] & inside[None, :]
    offsets = (image * splits + split)[:, None] * channels + columns[None, :]
    before = _before(conv_bias, add + image * add_stride, columns, inside, HAS_CONV_BIAS, HAS_ADD)
    counts = tl.maximum(tl.minimum(cells - split * rows_of_split, rows_of_split), 0).to(tl.float32)[:, None]
    means_of_channels = tl.load(means + offsets, mask=mask, other=0.0) + before[None, :]
    count = cells * WIDTH
    mean = tl.sum(tl.where(mask, counts * means_of_channels, 0.0)) / count
    apart = tl.where(mask, means_of_channels - mean, 0.0)
    within = tl.load(squares + offsets, mask=mask, other=0.0)
    variance = tl.sum(within + counts * apart * apart) / count
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = (before - mean) * scale + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    at = image * channels + columns
    tl.store(scales + at, scale, mask=inside)
    tl.store(shifts + at, shift, mask=inside)


@triton.jit
def scaled(
    x, scales, shifts, out, cells, channels, tiles,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x * scale + shift of its channel, and SiLU; grid (row tiles * channel tiles, batch), neighbours share rows."""
    image, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = (program // tiles) * TILE_ROWS
    rows, columns = tl.arange(0, TILE_ROWS), (program % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < channels
    mask = (rows < cells - first)[:, None] & inside[None, :]
    at = image * channels + columns
    scale, shift = tl.load(scales + at, mask=inside, other=0.0), tl.load(shifts + at, mask=inside, other=0.0)
    start = image * cells * channels + first.to(tl.int64) * channels
    offsets = rows[:, None] * channels + columns[None, :]
    y = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y = tl.fma(y, scale[None, :], shift[None, :])  # one rounding, whatever the compiler would have made of it
    tl.store(out + start + offsets, _activated(y, SILU).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated(x, out, tokens, inner, tiles, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """x * gelu(gate), of rows [x, gate]; grid (row tiles * column tiles)."""
    program = tl.program_id(0)
    first = (program // tiles).to(tl.int64) * TILE_ROWS
    rows, columns = tl.arange(0, TILE_ROWS), (program % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    mask = (rows < tokens - first)[:, None] & (columns < inner)[None, :]
    offsets = rows[:, None] * inner + columns[None, :]
    halves = x + first * inner * 2 + offsets + rows[:, None] * inner  # a row of x is two of the output
    value = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(halves + inner, mask=mask, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + first * inner + offsets, y.to(out.dtype.element_ty), mask=mask)


def whole_group_tile(cells: int, width: int) -> tuple[int, int] | None:
    """(rows, columns) of the tile that holds a group `width` channels wide; None where it has to be split."""
    tile = triton.next_power_of_2(cells), triton.next_power_of_2(width)
    return tile if tile[0] * tile[1] <= WHOLE_GROUP else None


def warps(numbers: int) -> int:
    """Warps for a tile of so many numbers: 64 a thread at the most, which its registers hold."""
    return max(4, min(16, numbers // (32 * 64)))


def splits_of(cells: int, channels: int) -> tuple[int, int]:
    """(rows of a split, number of splits) of an image whose statistics many programs share."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(channels, COLUMNS))
    rows = triton.cdiv(triton.cdiv(cells, wanted), ROWS) * ROWS
    return rows, triton.cdiv(cells, rows)


@library.triton_op("sd::group_norm", mutates_args={})
def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    conv_bias: Optional[torch.Tensor],  # noqa: UP045 - torch reads the schema from it, and 2.6 knows no other spelling
    add: Optional[torch.Tensor],  # noqa: UP045
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width_of_image = x.shape
    cells, width = height * width_of_image, channels // groups
    out = torch.empty_like(x, memory_format=torch.channels_last)
    has_conv_bias, has_add = conv_bias is not None, add is not None
    # A pointer that is not read stands for what is absent.
    conv_bias = bias if conv_bias is None else conv_bias
    add = bias if add is None else add.contiguous()
    add_stride = channels if has_add and add.shape[0] > 1 else 0
    tile = whole_group_tile(cells, width)
    if tile is not None:
        wrap_triton(whole_group)[groups, batch](
            x, weight, bias, conv_bias, add, out, cells, channels, add_stride, eps,
            WIDTH=width, TILE_ROWS=tile[0], TILE_COLUMNS=tile[1],
            HAS_CONV_BIAS=has_conv_bias, HAS_ADD=has_add, SILU=silu, num_warps=warps(tile[0] * tile[1]),
        )  # fmt: skip
        return out
    rows, splits = splits_of(cells, channels)
    tiles = triton.cdiv(channels, COLUMNS)
    means, squares = torch.empty((2, batch, splits, channels), dtype=torch.float32, device=x.device).unbind()
    scales, shifts = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device).unbind()
    wrap_triton(channel_statistics)[tiles, splits, batch](
        x, means, squares, cells, channels, rows, TILE_ROWS=ROWS, TILE_COLUMNS=COLUMNS
    )
    wrap_triton(scales_and_shifts)[groups, batch](
        means, squares, weight, bias, conv_bias, add, scales, shifts, cells, channels, add_stride, rows, splits, eps,
        WIDTH=width, TILE_SPLITS=triton.next_power_of_2(splits), TILE_COLUMNS=triton.next_power_of_2(width),
        HAS_CONV_BIAS=has_conv_bias, HAS_ADD=has_add,
    )  # fmt: skip
    wrap_triton(scaled)[triton.cdiv(cells, ROWS) * tiles, batch](
        x, scales, shifts, out, cells, channels, tiles, TILE_ROWS=ROWS, TILE_COLUMNS=COLUMNS, SILU=silu
    )
    return out


@library.triton_op("sd::geglu", mutates_args={})
def _geglu(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    inner = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], inner))
    tokens, tiles = out.numel() // inner, triton.cdiv(inner, GATED_COLUMNS)
    wrap_triton(gated)[(triton.cdiv(tokens, GATED_ROWS) * tiles,)](
        x, out, tokens, inner, tiles, TILE_ROWS=GATED_ROWS, TILE_COLUMNS=GATED_COLUMNS
    )
    return out


def group_norm(x, weight, bias, groups: int, eps: float, conv_bias=None, add=None, silu: bool = False):
    """SiLU or not of the group norm of x + conv_bias + add; statistics in fp32, the output rounded once.

    x [B, C, H, W] fp32, fp16 or bf16, in NHWC (other layouts are copied to it) -> the same shape and dtype, NHWC.
    weight, bias, conv_bias [C]; add [B or 1, C, 1, 1]; each of its own dtype. C a multiple of groups.
    """
    return torch.ops.sd.group_norm(x, weight, bias, conv_bias, add, groups, eps, silu)


def geglu(x):
    """x [..., 2 * N] fp32, fp16 or bf16, of which the second half is the gate -> x * gelu(gate) [..., N], exact erf.

    Computed in fp32 and rounded once.
    """
    return torch.ops.sd.geglu(x)
