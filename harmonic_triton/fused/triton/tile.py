"""The only numerics that the Triton kernels share: one tile of relative squared distances and log-scores.

``gap[i, j] = s_ij/s_ref - 1`` where ``s_ij = ||x_i - w_j||^2 + eps`` and s_ref is the token's reference distance, that of
its target c unless other classes must be much nearer (``reference_of``). Log-scores are in base 2 and
relative to the reference: ``z2 = -(n/2) log2(1 + gap)``; ``base_of`` is what they lack to be relative to the target's.
With DOT (cross-entropy) ``gap[i, j] = x_i.w_c - x_i.w_j`` and ``z2 = -gap log2(e)``, relative to the target's;
``shift`` is then x.w_c, and norms and floor are not read.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from harmonic_triton.fused import floors

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEAREST_SHARE = tl.constexpr(floors.NEAREST_SHARE)
NEAREST_SQ = tl.constexpr(floors.NEAREST_SQ)
LEAST_DIVISOR, NEAR_SHARE, LARGEST_SHARE = map(tl.constexpr, floors.divisor_floors(torch.float32))
NOISE_SHARE = tl.constexpr(floors.noise_share(torch.float32))


@triton.jit
def gap_tile(
    x_ptr, w_ptr, norms_ptr,  # (N, D), (V, D), (V,)
    rows, valid,  # (BLOCK_N,) int64 token indices, and which of them count
    cols, V,  # (BLOCK_V,) int32 class indices
    shift, inverse, floor,  # (BLOCK_N,) s_ref - eps - ||x||^2, 1/s_ref, the gap below which the expansion is noise
    D, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) gaps in fp32; the product runs on the operands' own dtype with fp32 accumulation.

    Features are widened before they meet a stride: in a transposed W they may be 2^31 entries apart. A stride of 1 is a
    constant to the compiler, so contiguous operands pay nothing, and nobody pays for a copy.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    step = tl.full((), BLOCK_D, tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xn + features[None, :] * stride_xd
    w_ptrs = w_ptr + cols.to(tl.int64)[None, :] * stride_wv + features[:, None] * stride_wd
    for start in range(0, D, BLOCK_D):
        left = features < D - start
        x = tl.load(x_ptrs, mask=valid[:, None] & left[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(cols < V)[None, :] & left[:, None], other=0.0)
        if UPCAST:  # the interpreter's products of bf16 are wrong
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += step * stride_xd
        w_ptrs += step * stride_wd
    if DOT:
        gap = shift[:, None] - acc
    else:
        norms = tl.load(norms_ptr + cols, mask=cols < V, other=0.0)
        # u_j - u_ref with u_j = ||w_j||^2 - 2 x.w_j: ||x||^2 has dropped out
        gap = ((norms[None, :] - 2.0 * acc) - shift[:, None]) * inverse[:, None]
        gap = tl.maximum(gap, floor[:, None], propagate_nan=tl.PropagateNan.ALL)
    return gap


@triton.jit
def log_scores(gap, half_n, DOT: tl.constexpr, FAST_LOG: tl.constexpr):
    """z2 of a tile of gaps.

    FAST_LOG takes NVIDIA's instruction for two dozen others: off by at most 2^-22, absolutely where 1 + gap is between
    1/2 and 2, else relatively (PTX ISA, lg2.approx.f32). That is half of what ``scale_of`` takes for the products' rounding.
    """
    if DOT:
        score = gap * -LOG2E
    elif FAST_LOG:
        score = -half_n * libdevice.fast_log2f(1.0 + gap)
    else:
        score = -half_n * tl.log2(1.0 + gap)
    return score


@triton.jit
def scores_to_store(score, best, half_n, DOT: tl.constexpr):
    """What is stored of a tile of log-scores: relative to its row's best, in units of n/2 so that 16 bits always hold it.

    16 bits round it by 2^-11 of itself. With t_j = ln(s_best/s_j) <= 0 that puts p_j off by (n/2) |t_j| 2^-11 in relative
    terms and 1/s_j by |t_j| 2^-11, whatever n is: at most 2^-11/e = 1.8e-4 of the tile's largest p/s for any class, less
    than bf16's own rounding of A for all those within e^4 of it. DOT: z itself; beyond 65504 it is -inf and p is 0.
    """
    stored = score - tl.where(best == float("-inf"), 0.0, best)[:, None]
    return stored if DOT else stored * (1.0 / half_n)


@triton.jit
def scores_from_stored(stored, best, half_n, DOT: tl.constexpr):
    """(z2, -log2(1 + gap)) of a stored tile; DOT has no use for the second."""
    anchor = tl.where(best == float("-inf"), 0.0, best)
    if DOT:
        score = stored + anchor[:, None]
        shrink = score
    else:
        shrink = stored + (anchor * (1.0 / half_n))[:, None]
        score = shrink * half_n
    return score, shrink


@triton.jit
def exp2_minus_1(value, BRIEF: tl.constexpr):
    """2^value - 1, right in relative terms near 0: to 5e-7, or with BRIEF to 5e-6, more than 16 stored bits deserve."""
    t = value * LN2
    if BRIEF:
        series = t * (1.0 + t * (1.0 / 2 + t * (1.0 / 6)))
        near = tl.abs(t) < 0.02
    else:
        series = t * (1.0 + t * (1.0 / 2 + t * (1.0 / 6 + t * (1.0 / 24 + t * (1.0 / 120 + t / 720)))))
        near = tl.abs(t) < 0.25
    return tl.where(near, series, tl.exp2(value) - 1.0)


@triton.jit
def target_sq_of(target_ref, eps):
    """s_c, floored so that it can divide."""
    return tl.maximum(target_ref + eps, LEAST_DIVISOR)


@triton.jit
def reference_of(target_ref, target_offset, x_sq, smallest, median, largest, eps):
    """(s_ref, s_ref - eps - ||x||^2) from s_c without eps, u_c, ||x||^2 and three of the ||w_j||^2.

    Relative to a target much farther than other classes their distances would lose digits: some class is within twice
    ``near``. Relative to a target at no distance at all they would leave fp32.
    """
    s_c = target_sq_of(target_ref, eps)
    near = x_sq + smallest + eps
    scale = tl.maximum(tl.where(s_c > 4.0 * near, near, s_c), tl.maximum(near, median) * NEAR_SHARE)
    scale = tl.maximum(scale, tl.maximum(largest * LARGEST_SHARE, LEAST_DIVISOR))
    return scale, tl.where(scale == s_c, target_offset, scale - x_sq - eps)


@triton.jit
def base_of(s_c, scale, half_n):
    """What a base-2 log-score relative to s_ref lacks to be relative to the target's; fp64 in, fp64 out."""
    return tl.where(s_c == scale, 0.0, half_n * tl.log2(s_c / scale))


@triton.jit
def tile_terms(scale, x_sq):
    """(1/s_ref, the gap below which the expansion is noise) in fp32."""
    inverse = 1.0 / scale
    return inverse, (tl.maximum(x_sq, scale) * NOISE_SHARE - scale) * inverse


@triton.jit
def difference_sq(
    x_ptr, w_ptr, rows, index, valid, D, stride_xn, stride_xd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(||x - w_index||^2 in fp64, ||w_index||^2 - 2 x.w_index, ||w_index||^2, ||x||^2), each summed by itself, (BLOCK_N,).

    fp64 because far from all classes the rival's and the target's distances differ by less than fp32 resolves.
    """
    apart = tl.zeros((BLOCK_N,), dtype=tl.float64)
    expanded = tl.zeros((BLOCK_N,), dtype=tl.float32)
    w_sq = tl.zeros((BLOCK_N,), dtype=tl.float32)
    x_sq = tl.zeros((BLOCK_N,), dtype=tl.float32)
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        inside = valid[:, None] & (features < D - start)[None, :]
        offset = (start + features)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + offset * stride_xd, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + index[:, None] * stride_wv + offset * stride_wd, mask=inside, other=0.0).to(tl.float32)
        diff = x.to(tl.float64) - w.to(tl.float64)
        apart += tl.sum(diff * diff, 1)
        expanded += tl.sum(w * (w - 2.0 * x), 1)
        w_sq += tl.sum(w * w, 1)
        x_sq += tl.sum(x * x, 1)
    return apart, expanded, w_sq, x_sq


@triton.jit
def dot_product(
    x_ptr, w_ptr, rows, index, valid, D, stride_xn, stride_xd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x.w_index (BLOCK_N,) in fp64: of two large logits the difference counts."""
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        inside = valid[:, None] & (features < D - start)[None, :]
        offset = (start + features)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + offset * stride_xd, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(w_ptr + index[:, None] * stride_wv + offset * stride_wd, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(x * w, 1)
    return total
