"""Rank-k update of a folded triangle (``harmonic_triton.losskernel.covariance.triangle``) with Triton: S += (x - shift)ᵀ (x - shift).

One pass over the draws subtracts the shift and splits the fp32 differences into bf16 parts; a second kernel multiplies
the parts. Three parts hold all 24 bits of an fp32 number, and of their nine products the six largest leave out 2^-24:
fp32 accuracy at a sixth of the bf16 rate. (Six bf16 products cost what three tf32 ones do, keep two bits more, and need
no transposed copy for Hopper's matrix instructions; AMD's units have them too.)
"""

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
from harmonic_triton._common.rounding import narrow
from harmonic_triton.losskernel.covariance.triangle import Triangle

GAP = 128  # of the triangles served here: tiles whose sides divide it are wholly on one side of the fold
PARTS = {"split": 3, "fast": 2, "ieee": 1}  # of a number, by precision; six, three and one product
K_MULTIPLE = 64  # draws are padded to it with zeros, so that no load of parts needs a mask
SPLIT_ROWS, SPLIT_COLS, SPLIT_WARPS = 16, 256, 8  # tile of the pass over the draws


@dataclass(frozen=True)
class UpdateConfig:
    """Launch parameters of the rank-k kernel."""

    block: int  # side of a tile of S
    block_k: int  # draws at a time
    num_warps: int
    num_stages: int


# Triton 3.6 puts Blackwell's operands into shared memory twice, and three parts in tiles of 128 compile to a trap there.
OLD = copies.VERSION < (3, 7)

# (architecture, parts) -> configuration
CONFIGS = {
    ("sm80", 3): UpdateConfig(128, 32, 8, 3),
    ("sm80", 2): UpdateConfig(128, 32, 8, 4),
    ("sm80", 1): UpdateConfig(64, 32, 8, 3),
    ("sm90", 3): UpdateConfig(128, 64, 8, 2),
    ("sm90", 2): UpdateConfig(128, 64, 8, 3),
    ("sm90", 1): UpdateConfig(64, 32, 8, 3),
    ("sm100", 3): UpdateConfig(64 if OLD else 128, 64, 8, 2),
    ("sm100", 2): UpdateConfig(128, 64, 8, 2 if OLD else 3),
    ("sm100", 1): UpdateConfig(64, 32, 8, 3),
    ("gfx942", 3): UpdateConfig(128, 32, 8, 2),
    ("gfx942", 2): UpdateConfig(128, 32, 8, 2),
    ("gfx942", 1): UpdateConfig(64, 32, 8, 2),
    ("interpreter", 3): UpdateConfig(128, 64, 4, 1),
    ("interpreter", 2): UpdateConfig(128, 64, 4, 1),
    ("interpreter", 1): UpdateConfig(128, 64, 4, 1),
}


@triton.jit
def split_kernel(
    x_ptr, shift_ptr, parts_ptr,  # in (K, m) of any float, (m,) fp32; out (PARTS, padded K, width)
    K, m, width, plane, stride_xk, stride_xm,
    PARTS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """x - shift as a sum of PARTS numbers, largest first, each the bf16 nearest to what is left; zero outside (K, m)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.full((), 1, tl.int64) * plane  # three planes may hold more than 2^31 numbers
    inside = (rows < K)[:, None] & (cols < m)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xk + cols[None, :] * stride_xm, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + cols, mask=cols < m, other=0.0)[None, :]
    if x.dtype == tl.float64:  # rounded after the subtraction, not before
        rest = (x - shift.to(tl.float64)).to(tl.float32)
    else:
        rest = x.to(tl.float32) - shift
    rest = tl.where(inside, rest, 0.0)
    out_ptrs = parts_ptr + rows[:, None] * width + cols[None, :]
    if PARTS == 1:
        tl.store(out_ptrs, rest)
    else:
        for part in tl.static_range(PARTS):
            value = narrow(rest, tl.bfloat16, UPCAST)
            tl.store(out_ptrs + part * plane, value)
            rest -= value.to(tl.float32)


@triton.jit
def load_part(ptrs, UPCAST: tl.constexpr):
    """One tile of one part; the interpreter's products of bf16 are wrong."""
    value = tl.load(ptrs)
    return value.to(tl.float32) if UPCAST else value


@triton.jit
def rank_k_kernel(
    parts_ptr, s_ptr,  # in (PARTS, K, width); in and out (half, width + GAP)
    K, half, width, plane,
    GAP: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add the products of all draws to one tile of the folded triangle.

    Programs walk through GROUP rows of tiles at a time, so that those that run together share operands in the cache.
    """
    tiles_r = half // BLOCK
    tiles_c = (width + GAP) // BLOCK
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_c) * GROUP
    size = tl.minimum(tiles_r - first, GROUP)
    within = pid % (GROUP * tiles_c)
    row = (first + within % size) * BLOCK
    col = (within // size) * BLOCK
    folded = col // GAP <= row // GAP  # S's columns from half on; else its columns below half, mirrored
    left = row + tl.where(folded, half, 0)
    right = col + tl.where(folded, half, -GAP)

    draws = tl.arange(0, BLOCK_K).to(tl.int64)
    plane = tl.full((), 1, tl.int64) * plane
    lefts = parts_ptr + draws[None, :] * width + (left + tl.arange(0, BLOCK))[:, None]
    rights = parts_ptr + draws[:, None] * width + (right + tl.arange(0, BLOCK))[None, :]
    step = tl.full((), BLOCK_K, tl.int64) * width
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        a0 = load_part(lefts, UPCAST)
        b0 = load_part(rights, UPCAST)
        if PARTS > 1:  # the smaller products first
            a1 = load_part(lefts + plane, UPCAST)
            b1 = load_part(rights + plane, UPCAST)
            if PARTS > 2:
                total = tl.dot(load_part(lefts + 2 * plane, UPCAST), b0, total, input_precision="ieee")
                total = tl.dot(a0, load_part(rights + 2 * plane, UPCAST), total, input_precision="ieee")
                total = tl.dot(a1, b1, total, input_precision="ieee")
            total = tl.dot(a1, b0, total, input_precision="ieee")
            total = tl.dot(a0, b1, total, input_precision="ieee")
        total = tl.dot(a0, b0, total, input_precision="ieee")
        lefts += step
        rights += step
    at = (row + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * (width + GAP) + (col + tl.arange(0, BLOCK))[None, :]
    tl.store(s_ptr + at, tl.load(s_ptr + at) + total)


GROUP = 8  # rows of tiles that are walked through together


def rank_k_(triangle: Triangle, draws: Tensor, shift: Tensor, precision: str) -> None:
    """S += (draws - shift)ᵀ (draws - shift) for draws (k, m) of any floating dtype and shift (m,) fp32.

    ``precision``: "split" (fp32 accuracy), "fast" (two bf16 parts, 16 bits of every difference, half the products) or
    "ieee" (fp32 multiplications, no matrix units on NVIDIA).
    """
    k, m = draws.shape
    parts, width = PARTS[precision], triangle.width
    padded = triton.cdiv(k, K_MULTIPLE) * K_MULTIPLE
    plane = padded * width
    dtype = torch.float32 if parts == 1 else torch.bfloat16
    arch = architecture(draws.device)
    config = CONFIGS[arch, parts]
    with torch.cuda.device(draws.device) if draws.is_cuda else nullcontext():
        planes = torch.empty(parts, padded, width, dtype=dtype, device=draws.device)
        rows = K_MULTIPLE if interpreted() else SPLIT_ROWS  # a program costs the interpreter milliseconds
        split_kernel[(padded // rows, width // SPLIT_COLS)](
            draws, shift.contiguous(), planes, k, m, width, plane, *draws.stride(),
            PARTS=parts, UPCAST=interpreted(), BLOCK_K=rows, BLOCK_M=SPLIT_COLS,
            num_warps=SPLIT_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        tiles = (triangle.half // config.block) * ((width + GAP) // config.block)
        rank_k_kernel[(tiles,)](
            planes, triangle.data, padded, triangle.half, width, plane, GAP=GAP, PARTS=parts, UPCAST=interpreted(),
            BLOCK=config.block, BLOCK_K=config.block_k, GROUP=GROUP,
            num_warps=config.num_warps, num_stages=copies.stages(arch, config.num_stages, dtype.itemsize),
            enable_fp_fusion=False,
        )  # fmt: skip
