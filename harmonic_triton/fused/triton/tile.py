"""The numerics that the Triton kernels share: powers, the reference distance, direct measurements.

``gap[i, j] = s_ij/s_ref - 1`` where ``s_ij = ||x_i - w_j||^2 + eps`` and s_ref is the token's reference distance, that of
its target c unless other classes must be much nearer (``reference_of``). Log-scores are in base 2 and
relative to the reference: ``z2 = -(n/2) log2(1 + gap)``; ``base_of`` is what they lack to be relative to the target's.
With DOT (cross-entropy) ``z2 = (l_ij - l_ic) log2(e)``, relative to the target's, of logits ``l = a = x.w + b``, with a soft cap
``l = cap tanh(a/cap)``.
What is least for the best class, 1 + gap or -z2, is called its nearness.
"""

import torch
import triton
import triton.language as tl

from harmonic_triton.fused import floors

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEAREST_SHARE = tl.constexpr(floors.NEAREST_SHARE)
NEAREST_SQ = tl.constexpr(floors.NEAREST_SQ)
LEAST_DIVISOR, NEAR_SHARE, LARGEST_SHARE = map(tl.constexpr, floors.divisor_floors(torch.float32))
NOISE_SHARE = tl.constexpr(floors.noise_share(torch.float32))


@triton.jit
def exp2_of(value, FAST: tl.constexpr):
    """2^value in fp32. FAST is NVIDIA's instruction alone, where results below fp32's normal range are 0."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(value)


@triton.jit
def log2_of(value, FAST: tl.constexpr):
    """log2(value) in fp32. FAST takes NVIDIA's instruction for two dozen others: off by at most 2^-22, absolutely where
    the value is between 1/2 and 2, else relatively (PTX ISA, lg2.approx.f32). That is half of what ``reference_of``
    takes for the products' rounding.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(value)


@triton.jit
def inverse_of(value, FAST: tl.constexpr):
    """1/value in fp32. FAST is NVIDIA's instruction alone, off by one unit in the last place at most (PTX ISA, rcp.approx)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / value


@triton.jit
def tanh_of(u, FAST: tl.constexpr):
    """(tanh u, 1 - tanh^2 u) in fp32, both with their digits: off by 2^-22, the second by (1 + 2|u|) 2^-22, relatively.

    With e = exp(-2|u|) they are (1 - e)/(1 + e) and 4 e/(1 + e)^2; where 1 - e cancels, a polynomial stands for the first.
    """
    size = tl.abs(u)
    e = exp2_of(size * (-2.0 * LOG2E), FAST)
    inverse = inverse_of(1.0 + e, FAST)
    large = (1.0 - e) * inverse
    square = u * u
    series = tl.fma(square, 0.016232913 + 0.0 * u, -0.052565116 + 0.0 * u)
    series = tl.fma(series, square, 0.1331908 + 0.0 * u)
    series = tl.fma(series, square, -0.33332875 + 0.0 * u)
    small = tl.fma(series * square, u, u)
    return tl.where(size < 0.5625, small, tl.where(u < 0.0, -large, large)), 4.0 * e * inverse * inverse


@triton.jit
def tanh_exactly(u):
    """tanh u in fp64."""
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    square = u * u
    small = u * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315 - square * (62.0 / 2835)))))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.05, small, tl.where(u < 0.0, -large, large))


@triton.jit
def capped_difference(a, b, cap):
    """cap tanh(a/cap) - cap tanh(b/cap) in fp64, as cap sinh(u - v)/(cosh u cosh v): right also where both are at the cap."""
    u = tl.abs(a / cap)
    v = tl.abs(b / cap)
    apart = tl.abs((a - b) / cap)
    ends = (1.0 + tl.exp2(u * (-2.0 * LOG2E))) * (1.0 + tl.exp2(v * (-2.0 * LOG2E)))
    # (u + v - apart)/2, which huge ones of different signs would round
    lost = tl.where((a < 0.0) == (b < 0.0), tl.minimum(u, v), 0.0)
    grown = tanh_exactly(apart) * (1.0 + tl.exp2(apart * (-2.0 * LOG2E))) * tl.exp2(lost * (-2.0 * LOG2E)) * 2.0 / ends
    return cap * tl.where(a < b, -grown, grown)


@triton.jit
def slope_of(a, cap):
    """1 - tanh^2(a/cap), the derivative of the capped logit, in fp64."""
    e = tl.exp2(tl.abs(a / cap) * (-2.0 * LOG2E))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


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
def difference_sq(
    x_ptr, w_ptr, rows, index, valid, D, stride_xn, stride_xd, stride_wv, stride_wd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(||x - w_index||^2 in fp64, ||w_index||^2 - 2 x.w_index, ||x||^2), each summed by itself, (BLOCK_N,).

    fp64 because far from all classes the rival's and the target's distances differ by less than fp32 resolves.
    """
    apart = tl.zeros((BLOCK_N,), dtype=tl.float64)
    expanded = tl.zeros((BLOCK_N,), dtype=tl.float32)
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
        x_sq += tl.sum(x * x, 1)
    return apart, expanded, x_sq


@triton.jit
def measured(
    x_ptr, w_ptr, rows, index, valid, D, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """||x - w_index||^2, or with DOT x.w_index, (BLOCK_N,) in fp64: of two large ones the difference counts."""
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    for start in range(0, D, BLOCK_D):
        inside = valid[:, None] & (features < D - start)[None, :]
        offset = (start + features)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xn + offset * stride_xd, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(w_ptr + index[:, None] * stride_wv + offset * stride_wd, mask=inside, other=0.0).to(tl.float64)
        term = x * w if DOT else (x - w) * (x - w)
        total += tl.sum(term, 1)
    return total
