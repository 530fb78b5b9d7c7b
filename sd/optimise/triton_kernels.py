"""Triton kernels for NHWC images as operators of torch; imports triton, so sd.optimise.apply imports it only when chosen.

torch.compile includes the operators in its graph without a break. No kernel uses atomics or synchronises with the host,
and tiling depends on the image size alone: an image gives the same bits at any position in any batch, and the kernels
can be recorded in a CUDA graph.

Sources: tiles and masks of Triton's tutorials; parallel combination of means and squared deviations by Chan, Golub and
LeVeque (1979); group norm with SiLU in NHWC as one kernel after chengzeyi/stable-fast.
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
        """Return interpreted kernels unwrapped: torch 2.11 refuses to wrap them."""
        return kernel

else:
    wrap_triton = library.wrap_triton  # torch searches the operators' source for this name

# Largest padded tile of a group, in numbers, that one program holds in registers: one launch instead of three.
WHOLE_GROUP = 16384
ROWS, COLUMNS = 32, 64  # tile of larger groups; 64 half-precision channels fill a cache line of 128 bytes
PROGRAMS = 512  # programs per image: with guidance's batch of two, several for each of an H100's 132 multiprocessors
GATED_ROWS, GATED_COLUMNS = 4, 256


@triton.jit
def _activated(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _offset(conv_bias, add, columns, mask, HAS_CONV_BIAS: tl.constexpr, HAS_ADD: tl.constexpr):
    """The sum of conv_bias and this image's `add`, which the norm's input has at every position of a channel."""
    offset = tl.zeros(columns.shape, tl.float32)
    if HAS_CONV_BIAS:
        offset += tl.load(conv_bias + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        offset += tl.load(add + columns, mask=mask, other=0.0).to(tl.float32)
    return offset


@triton.jit
def whole_group(
    x, weight, bias, conv_bias, add, out, cells, channels, add_stride, eps,
    WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Group norm with one program for each group, grid (groups, batch): mean first, then squared deviations from it."""
    image = tl.program_id(1).to(tl.int64)
    lanes, rows = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_ROWS)
    columns, inside = tl.program_id(0) * WIDTH + lanes, lanes < WIDTH
    mask = (rows < cells)[:, None] & inside[None, :]
    offsets = rows[:, None] * channels + columns[None, :]
    image_start = image * cells * channels
    offset = _offset(conv_bias, add + image * add_stride, columns, inside, HAS_CONV_BIAS, HAS_ADD)
    numbers = tl.load(x + image_start + offsets, mask=mask, other=0.0).to(tl.float32) + offset[None, :]
    count = cells * WIDTH
    mean = tl.sum(tl.where(mask, numbers, 0.0)) / count
    deviations = tl.where(mask, numbers - mean, 0.0)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.sum(deviations * deviations) / count + eps)
    y = deviations * scale[None, :] + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + image_start + offsets, _activated(y, SILU).to(out.dtype.element_ty), mask=mask)


@triton.jit
def channel_statistics(
    x, means, squares, cells, channels, rows_of_split, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over each split of the positions, grid (tiles, splits, batch).

    means, squares: [batch, splits, channels]. Deviations are taken from the mean of the split's first rows. If those rows
    differ much from the rest, they also raise the variance, so its relative error stays below one rounding error times
    the number of tiles in a split.
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
    deviations = tl.where(mask, numbers - near[None, :], 0.0)
    sums, sums_of_squares = deviations, deviations * deviations
    for done in range(TILE_ROWS, count, TILE_ROWS):
        start += TILE_ROWS * channels
        mask = (rows < count - done)[:, None] & inside[None, :]
        numbers = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
        deviations = tl.where(mask, numbers - near[None, :], 0.0)
        sums += deviations
        sums_of_squares += deviations * deviations
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
    """The norm as a scale and a shift for each channel, [batch, channels]; grid (groups, batch).

    The offset before the norm moves channel means and not deviations, so it is added here, to one number for each split
    instead of every position.
    """
    image = tl.program_id(1).to(tl.int64)
    lanes, split = tl.arange(0, TILE_COLUMNS), tl.arange(0, TILE_SPLITS)
    columns, inside = tl.program_id(0) * WIDTH + lanes, lanes < WIDTH
    mask = (split < splits)[:, None] & inside[None, :]
    offsets = (image * splits + split)[:, None] * channels + columns[None, :]
    offset = _offset(conv_bias, add + image * add_stride, columns, inside, HAS_CONV_BIAS, HAS_ADD)
    counts = tl.maximum(tl.minimum(cells - split * rows_of_split, rows_of_split), 0).to(tl.float32)[:, None]
    means_of_channels = tl.load(means + offsets, mask=mask, other=0.0) + offset[None, :]
    count = cells * WIDTH
    mean = tl.sum(tl.where(mask, counts * means_of_channels, 0.0)) / count
    deviations = tl.where(mask, means_of_channels - mean, 0.0)
    within = tl.load(squares + offsets, mask=mask, other=0.0)
    variance = tl.sum(within + counts * deviations * deviations) / count
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = (offset - mean) * scale + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    at = image * channels + columns
    tl.store(scales + at, scale, mask=inside)
    tl.store(shifts + at, shift, mask=inside)


@triton.jit
def scaled(
    x, scales, shifts, out, cells, channels, tiles,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x * scale + shift by channel, then SiLU; grid (row tiles * channel tiles, batch), adjacent programs share rows."""
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
    y = tl.fma(y, scale[None, :], shift[None, :])  # an explicit fma has one rounding with every compiler
    tl.store(out + start + offsets, _activated(y, SILU).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated(x, out, tokens, inner, tiles, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """x * gelu(gate) of rows [x, gate]; grid (row tiles * column tiles)."""
    program = tl.program_id(0)
    first = (program // tiles).to(tl.int64) * TILE_ROWS
    rows, columns = tl.arange(0, TILE_ROWS), (program % tiles) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    mask = (rows < tokens - first)[:, None] & (columns < inner)[None, :]
    offsets = rows[:, None] * inner + columns[None, :]
    halves = x + first * inner * 2 + offsets + rows[:, None] * inner  # a row of x is twice as long as one of the output
    value = tl.load(halves, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(halves + inner, mask=mask, other=0.0).to(tl.float32)
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(out + first * inner + offsets, y.to(out.dtype.element_ty), mask=mask)


def whole_group_tile(cells: int, width: int) -> tuple[int, int] | None:
    """(rows, columns) of the tile that holds a group of `width` channels; None if the group must be split."""
    tile = triton.next_power_of_2(cells), triton.next_power_of_2(width)
    return tile if tile[0] * tile[1] <= WHOLE_GROUP else None


def warps(tile_size: int) -> int:
    """Warps for a tile: at most 64 numbers for each thread, which fit in its registers."""
    return max(4, min(16, tile_size // (32 * 64)))


def splits_of(cells: int, channels: int) -> tuple[int, int]:
    """(rows of a split, number of splits) of an image whose statistics several programs compute."""
    target = triton.cdiv(PROGRAMS, triton.cdiv(channels, COLUMNS))
    rows = triton.cdiv(triton.cdiv(cells, target), ROWS) * ROWS
    return rows, triton.cdiv(cells, rows)


@library.triton_op("sd::group_norm", mutates_args={})
def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    conv_bias: Optional[torch.Tensor],  # noqa: UP045 - torch 2.6 infers no schema from X | None
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
    # Absent arguments need a valid pointer, which is not read.
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
    """Group norm of x + conv_bias + add, then SiLU if `silu`; statistics in fp32, the output rounded once.

    x [B, C, H, W] fp32, fp16 or bf16, NHWC (other layouts are copied) -> the same shape and dtype, NHWC. weight, bias,
    conv_bias [C]; add [B or 1, C, 1, 1]; dtypes may differ. C is a multiple of groups.
    """
    return torch.ops.sd.group_norm(x, weight, bias, conv_bias, add, groups, eps, silu)


def geglu(x):
    """Gated GELU (exact erf): x [..., 2 * N] fp32, fp16 or bf16, value then gate -> value * gelu(gate) [..., N].

    Computed in fp32 and rounded once.
    """
    return torch.ops.sd.geglu(x)
