"""Nearest samples by correlation: tiles of a product of traces, and a best k kept in registers as its epilogue."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from harmonic_triton._common import copies
from harmonic_triton._common.device import architecture
from harmonic_triton._common.dispatch import interpreted


@dataclass(frozen=True)
class SearchConfig:
    """Launch parameters of the search."""

    block_p: int  # rows, whose keys a program owns
    block_q: int  # columns of a tile
    block_t: int  # draws of a product
    num_warps: int
    num_stages: int


# (architecture, bytes of a stored value) -> configuration
CONFIGS = {
    ("sm80", 2): SearchConfig(64, 128, 32, 8, 3),
    ("sm90", 2): SearchConfig(128, 64, 64, 8, 3),
    ("sm100", 2): SearchConfig(128, 64, 64, 8, 3),
    ("gfx942", 2): SearchConfig(128, 64, 32, 8, 2),
    ("sm80", 4): SearchConfig(32, 64, 16, 8, 1),
    ("sm90", 4): SearchConfig(32, 64, 16, 8, 1),
    ("sm100", 4): SearchConfig(32, 64, 16, 8, 1),
    ("gfx942", 4): SearchConfig(64, 64, 32, 8, 2),
    ("interpreter", 2): SearchConfig(64, 64, 64, 4, 1),
    ("interpreter", 4): SearchConfig(64, 64, 64, 4, 1),
}


@triton.jit
def neighbors_kernel(
    row_ptr, col_ptr,  # (T, P), (T, Q) traces as stored
    row_scale_ptr, row_mean_ptr, row_label_ptr, col_scale_ptr, col_mean_ptr, col_label_ptr,  # (P,), (Q,)
    keys_ptr,  # (P, WIDTH) in and out, in no order
    P, Q, T, row_room, col_room, first_row, first_col, stride_rt, stride_ct,  # room: readable columns
    LABELS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Enter into the keys of BLOCK_P rows what of the columns is better; see ``harmonic_triton.losskernel.traces.neighbors.pack``.

    score = scale_i scale_j sum_t c_ti c_tj - mean_i mean_j with the means in units of the spread over sqrt(T).
    The row's best column enters, again and again while any row has one that beats the worst of its keys: after the
    first tiles that happens k/j times for column j.
    """
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    slots = rows.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    keys = tl.load(keys_ptr + slots, mask=(rows < P)[:, None], other=0)
    worst = tl.min(keys, 1)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < P, other=0.0)
    row_mean = tl.load(row_mean_ptr + rows, mask=rows < P, other=0.0)
    draws = tl.arange(0, BLOCK_T)
    for start in range(0, Q, BLOCK_Q):
        cols = start + tl.arange(0, BLOCK_Q)
        products = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
        for first in range(0, T, BLOCK_T):
            at = first + draws
            along = at.to(tl.int64)[:, None]
            r_inside = (at < T)[:, None] & (rows < row_room)[None, :]
            c_inside = (at < T)[:, None] & (cols < col_room)[None, :]
            r = tl.load(row_ptr + along * stride_rt + rows[None, :], mask=r_inside, other=0.0)
            c = tl.load(col_ptr + along * stride_ct + cols[None, :], mask=c_inside, other=0.0)
            if UPCAST:  # the interpreter's products of bf16 are wrong
                r = r.to(tl.float32)
                c = c.to(tl.float32)
            products = tl.dot(tl.trans(r), c, products, input_precision="ieee")
        col_scale = tl.load(col_scale_ptr + cols, mask=cols < Q, other=0.0)
        col_mean = tl.load(col_mean_ptr + cols, mask=cols < Q, other=0.0)
        score = products * row_scale[:, None] * col_scale[None, :] - row_mean[:, None] * col_mean[None, :]
        partner = (rows < P)[:, None] & (cols < Q)[None, :]
        partner &= (first_row + rows)[:, None] != (first_col + cols)[None, :]
        if LABELS:
            row_label = tl.load(row_label_ptr + rows, mask=rows < P, other=0)
            col_label = tl.load(col_label_ptr + cols, mask=cols < Q, other=0)
            partner &= row_label[:, None] != col_label[None, :]
        score = tl.where(partner, score, float("-inf"))
        best = tl.max(score, 1)
        limit = score_of(worst)
        while tl.max((best > limit).to(tl.int32), 0) > 0:
            col = tl.min(tl.where(score == best[:, None], cols[None, :], Q), 1)
            entering = (best > limit)[:, None] & (keys == worst[:, None])
            keys = tl.where(entering, key_of(best, first_col + col)[:, None], keys)
            score = tl.where(cols[None, :] == col[:, None], float("-inf"), score)
            worst = tl.min(keys, 1)
            limit = score_of(worst)
            best = tl.max(score, 1)
    tl.store(keys_ptr + slots, keys, mask=(rows < P)[:, None])


@triton.jit
def key_of(score, index):
    """The int64 key of an fp32 score and an int32 index."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # no negative zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def score_of(key):
    """The score of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def width_of(candidates: int) -> int:
    """Keys that the kernel keeps for a row: a power of two, 8 at least."""
    return max(8, triton.next_power_of_2(candidates))


def take(
    keys: Tensor, rows: Tensor, columns: Tensor, first_row: int, first_column: int,
    scale: Tensor, mean: Tensor, labels: Tensor | None,
) -> None:  # fmt: skip
    """Enter into ``keys`` (P, width) what of the traces ``columns`` (T, Q) is nearer to ``rows`` (T, P).

    The traces are samples first_row ... and first_column ... of those that ``scale``, ``mean`` and ``labels`` (m,) tell of.
    Rows of memory are padded, to a multiple of 16 values where loads are to be wide, and the padding is read.
    """
    rows, columns = _readable(rows), _readable(columns)
    scale, mean = scale.contiguous(), mean.contiguous()
    labels = None if labels is None else labels.contiguous()
    (draws, row_count), column_count = rows.shape, columns.shape[1]
    arch, size = architecture(rows.device), rows.element_size()
    config = CONFIGS[arch, size]
    row_at, column_at = slice(first_row, first_row + row_count), slice(first_column, first_column + column_count)
    row_labels, column_labels = (None, None) if labels is None else (labels[row_at], labels[column_at])
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        neighbors_kernel[(triton.cdiv(row_count, config.block_p),)](
            rows, columns, scale[row_at], mean[row_at], row_labels, scale[column_at], mean[column_at], column_labels,
            keys, row_count, column_count, draws, rows.stride(0), columns.stride(0), first_row, first_column,
            rows.stride(0), columns.stride(0),
            LABELS=labels is not None, WIDTH=keys.shape[1], BLOCK_P=config.block_p, BLOCK_Q=config.block_q,
            BLOCK_T=config.block_t, UPCAST=interpreted(), num_warps=config.num_warps,
            num_stages=copies.stages(arch, config.num_stages, size), enable_fp_fusion=False,
        )  # fmt: skip


def _readable(traces: Tensor) -> Tensor:
    """The traces (T, P), copied unless samples lie side by side and every row of memory can be read to its end."""
    rows, samples = traces.shape
    stop = traces.storage_offset() + rows * traces.stride(0)
    whole = stop * traces.element_size() <= traces.untyped_storage().nbytes()
    if traces.stride(1) == 1 and traces.stride(0) >= samples and whole:
        return traces
    return traces.clone(memory_format=torch.contiguous_format)
