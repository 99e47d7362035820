"""Forward kernels: norms and target geometry, the online pass over the classes, and the per-token finish."""

import triton
import triton.language as tl

from harmonic_triton.fused.triton.tile import (
    LN2,
    LOG2E,
    NEAREST_SHARE,
    NEAREST_SQ,
    base_of,
    difference_sq,
    dot_product,
    gap_tile,
    log_scores,
    reference_of,
    scores_to_store,
    target_sq_of,
    tile_terms,
)

LARGEST_SQ = tl.constexpr(2.0**125)  # squared norms up to here keep u_j - u_c inside fp32


@triton.jit
def norms_kernel(w_ptr, norms_ptr, V, D, stride_wv, stride_wd, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """norms[j] = ||w_j||^2 in fp32, from the operands that the products use; NaN where fp32 cannot hold what follows."""
    classes = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (classes < V)[:, None] & (features < D - start)[None, :]
        offset = (start + features)[None, :]
        w = tl.load(w_ptr + classes[:, None] * stride_wv + offset * stride_wd, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(w * w, 1)
    total = tl.where(total < LARGEST_SQ, total, float("nan"))  # NaN and infinity too: every token must show it
    tl.store(norms_ptr + classes, total, mask=classes < V)


@triton.jit
def geometry_kernel(
    x_ptr, w_ptr, target_ptr,  # (N, D), (V, D), (N,); target < 0: the token does not count
    smallest_ptr, median_ptr, largest_ptr,  # () of ||w_j||^2
    target_ref_ptr, shift_ptr, scale_ptr, x_sq_ptr,  # out (N,) fp64, fp32
    N, D, eps, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s_c = ||x - w_c||^2 without eps, the reference's offset and distance, ||x||^2. DOT: x.w_c twice, and no more.

    Tokens that do not count have 0, and 1 for a reference distance.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    if DOT:
        apart = dot_product(
            x_ptr, w_ptr, rows, target, target >= 0, D, stride_xn, stride_xd, stride_wv, stride_wd, BLOCK_N, BLOCK_D
        )
        shift = apart
    else:
        apart, target_offset, _, x_sq = difference_sq(
            x_ptr, w_ptr, rows, target, target >= 0, D, stride_xn, stride_xd, stride_wv, stride_wd, BLOCK_N, BLOCK_D
        )
        smallest = tl.load(smallest_ptr).to(tl.float64)
        median = tl.load(median_ptr).to(tl.float64)
        largest = tl.load(largest_ptr).to(tl.float64)
        scale, shift = reference_of(
            apart, target_offset.to(tl.float64), x_sq.to(tl.float64), smallest, median, largest, eps
        )
        tl.store(scale_ptr + rows, tl.where(target >= 0, scale, 1.0).to(tl.float32), mask=rows < N)
        tl.store(x_sq_ptr + rows, x_sq, mask=rows < N)
        shift = tl.where(target >= 0, shift, 0.0)
    tl.store(target_ref_ptr + rows, apart, mask=rows < N)
    tl.store(shift_ptr + rows, shift.to(tl.float32), mask=rows < N)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, norms_ptr, target_ptr, shift_ptr, scale_ptr, x_sq_ptr, n_ptr, smooth_weight_ptr,
    best_ptr, index_ptr, total_ptr, mean_ptr, smooth_ptr,  # out (SPLITS, N)
    stored_ptr, tile_best_ptr,  # with STORE_SCORES out (N, V), (tiles, N)
    N, V, D, classes_per_split, stride_kn,
    stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, WANT_SCORES: tl.constexpr, SMOOTHING: tl.constexpr, STORE_SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, FAST_LOG: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of the non-target log-scores over one share of the classes, and its nearest class.

    Log-scores are relative to the token's reference. STORE_SCORES stores them, each tile relative to its own best of every row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    valid = target >= 0
    shift = tl.load(shift_ptr + rows, mask=valid, other=0.0)
    inverse, floor, half_n = shift, shift, 0.5
    if not DOT:
        inverse, floor = tile_terms(
            tl.load(scale_ptr + rows, mask=valid, other=1.0), tl.load(x_sq_ptr + rows, mask=valid, other=0.0)
        )
        half_n = 0.5 * tl.load(n_ptr).to(tl.float32)
    target_class = target.to(tl.int32)

    best = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    index = tl.zeros((BLOCK_N,), dtype=tl.int32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float32)
    smooth = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = split * classes_per_split
    last = tl.minimum(first + classes_per_split, V)
    for start in range(first, last, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        gap = gap_tile(
            x_ptr, w_ptr, norms_ptr, rows, valid, cols, V, shift, inverse, floor,
            D, stride_xn, stride_xd, stride_wv, stride_wd, DOT, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
        )  # fmt: skip
        counted = (cols < last)[None, :] & (cols[None, :] != target_class[:, None])
        score = tl.where(counted, log_scores(gap, half_n, DOT, FAST_LOG), float("-inf"))
        tile_best = tl.max(score, 1)
        if STORE_SCORES:
            stored = scores_to_store(score, tile_best, half_n, DOT).to(stored_ptr.dtype.element_ty)
            tl.store(stored_ptr + rows[:, None] * stride_kn + cols[None, :], stored,
                     mask=(rows < N)[:, None] & (cols < last)[None, :])  # fmt: skip
            tl.store(tile_best_ptr + start // BLOCK_V * N + rows, tile_best, mask=rows < N)
        nearest = tl.min(tl.where(score == tile_best[:, None], cols[None, :], V), 1)
        index = tl.where(tile_best > best, nearest, index)
        new = tl.maximum(best, tile_best)
        anchor = tl.where(new == float("-inf"), 0.0, new)
        rescale = tl.exp2(best - anchor)
        power = tl.exp2(score - anchor[:, None])
        total = total * rescale + tl.sum(power, 1)
        finite = tl.where(counted, score, 0.0)
        if WANT_SCORES:
            mean = mean * rescale + tl.sum(power * finite, 1)
        if SMOOTHING:
            v = tl.load(smooth_weight_ptr + cols, mask=cols < V, other=0.0)
            smooth += tl.sum(v[None, :] * finite, 1)
        best = new
    out = split.to(tl.int64) * N + rows
    tl.store(best_ptr + out, best, mask=rows < N)
    tl.store(index_ptr + out, index, mask=rows < N)
    tl.store(total_ptr + out, total, mask=rows < N)
    if WANT_SCORES:
        tl.store(mean_ptr + out, mean, mask=rows < N)
    if SMOOTHING:
        tl.store(smooth_ptr + out, smooth, mask=rows < N)


@triton.jit
def log1p_small(y):
    """log(1 + y) for y >= 0, right in relative terms where y is tiny: 2 atanh(y/(2 + y)). fp64."""
    t = y / (2.0 + y)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9 + t2 / 11)))))
    return tl.where(y < 0.25, series, tl.log(1.0 + y))


@triton.jit
def finish_kernel(
    x_ptr, w_ptr, target_ptr, target_ref_ptr, scale_ptr, x_sq_ptr, n_ptr, smooth_weight_ptr, smooth_sum_ptr,
    best_ptr, index_ptr, total_ptr, mean_ptr, smooth_ptr,  # in (SPLITS, N)
    nll_ptr, score_mean_ptr, entropy_ptr, out_smooth_ptr, share_score_ptr, share_sum_ptr, share_rest_ptr,  # out (N,)
    rival_score_ptr, rival_ptr,  # out (N,)
    N, D, eps, SPLITS, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, WANT_SCORES: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the splits, measure the rival directly, and turn the sums into per-token results, in fp64."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    valid = target >= 0
    best = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    rival = tl.zeros((BLOCK_N,), dtype=tl.int64)
    at = rows
    for _ in range(SPLITS):
        here = tl.load(best_ptr + at, mask=valid, other=float("-inf"))
        rival = tl.where(here > best, tl.load(index_ptr + at, mask=valid, other=0), rival)
        best = tl.maximum(best, here)
        at += N
    no_rival = best == float("-inf")  # no class beside the target
    anchor = tl.where(no_rival, 0.0, best)
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    mean = tl.zeros((BLOCK_N,), dtype=tl.float64)
    smooth = tl.zeros((BLOCK_N,), dtype=tl.float64)
    at = rows
    for _ in range(SPLITS):
        here = tl.load(best_ptr + at, mask=valid, other=float("-inf"))
        weight = tl.exp2((here - anchor).to(tl.float64))
        total += tl.load(total_ptr + at, mask=valid, other=0.0).to(tl.float64) * weight
        if WANT_SCORES:
            mean += tl.load(mean_ptr + at, mask=valid, other=0.0).to(tl.float64) * weight
        if SMOOTHING:
            smooth += tl.load(smooth_ptr + at, mask=valid, other=0.0).to(tl.float64)
        at += N

    target_ref = tl.load(target_ref_ptr + rows, mask=valid, other=0.0)
    lacking = tl.zeros((BLOCK_N,), dtype=tl.float64)  # to be relative to the target's
    if DOT:
        rival_dot = dot_product(
            x_ptr, w_ptr, rows, rival, valid, D, stride_xn, stride_xd, stride_wv, stride_wd, BLOCK_N, BLOCK_D
        )
        rival_score = (rival_dot - target_ref) * LOG2E
        on_target = valid & False
        identical = on_target
        sound = tl.abs(target_ref) < float("inf")
    else:
        rival_sq, _, rival_norm, _ = difference_sq(
            x_ptr, w_ptr, rows, rival, valid, D, stride_xn, stride_xd, stride_wv, stride_wd, BLOCK_N, BLOCK_D
        )
        half_n = 0.5 * tl.load(n_ptr).to(tl.float64)
        x_sq = tl.load(x_sq_ptr + rows, mask=valid, other=0.0).to(tl.float64)
        s_c = target_sq_of(target_ref, eps)
        scale = tl.load(scale_ptr + rows, mask=valid, other=1.0)
        lacking = tl.where(scale == s_c.to(tl.float32), 0.0, base_of(s_c, scale.to(tl.float64), half_n))
        least = (x_sq + rival_norm) * NEAREST_SHARE + NEAREST_SQ
        s_r = tl.maximum(rival_sq + eps, least)
        rival_score = -half_n * tl.log2(s_r / s_c)
        on_target = target_ref + eps == 0.0
        identical = (s_r <= least) & (no_rival == 0)
        sound = (x_sq < LARGEST_SQ) & (s_c < 3e38)
    rival_score = tl.where(no_rival, float("-inf"), rival_score)

    # The rival's own term in the sums is exactly 1 (relative to itself): what is left belongs to the others.
    base = anchor.to(tl.float64) + lacking
    rest = tl.where(no_rival, 0.0, tl.maximum(total - 1.0, 0.0))
    top = tl.where(no_rival, 0.0, tl.where(rest > 0.0, tl.maximum(base, rival_score), rival_score))
    sum_ = tl.exp2(rival_score - top) + rest * tl.exp2(tl.minimum(base - top, 0.0))
    # nll = log(1 + y) with y = 2^top * sum; from above where y is large
    y = tl.exp2(-tl.abs(top)) * tl.where(top > 0, 1.0 / sum_, sum_)
    nll = log1p_small(y) + tl.where(top > 0, top * LN2 + tl.log(sum_), 0.0)
    nll = tl.where(on_target, tl.where(identical, LN2, 0.0), nll)
    # A NaN or an infinity in x; s_c beyond fp32; a NaN in w, which best and rest have dropped and total has not.
    nll = tl.where(sound & (total == total), nll, float("nan"))
    nll = tl.where(valid, nll, 0.0)
    inside = rows < N
    tl.store(nll_ptr + rows, nll.to(tl.float32), mask=inside)
    tl.store(rival_ptr + rows, rival, mask=inside)
    shown = tl.where(on_target, tl.where(identical, 0.0, float("-inf")), rival_score * LN2)
    tl.store(rival_score_ptr + rows, tl.where(valid, shown, 0.0).to(tl.float32), mask=inside)
    finite_score = tl.where(no_rival, 0.0, rival_score)
    if WANT_SCORES:
        others = mean - anchor.to(tl.float64) + lacking * rest
        others = tl.where(no_rival, 0.0, others) * tl.exp2(tl.minimum(base - nll * LOG2E, 1e3))
        moment = (others + finite_score * tl.exp2(rival_score - nll * LOG2E)) * LN2
        moment = tl.where(valid & (on_target == 0), moment, 0.0)
        tl.store(score_mean_ptr + rows, moment.to(tl.float32), mask=inside)
        tl.store(entropy_ptr + rows, (nll - moment).to(tl.float32), mask=inside)
    if SMOOTHING:
        v_r = tl.load(smooth_weight_ptr + rival, mask=valid, other=0.0).to(tl.float64)
        smooth_sum = tl.load(smooth_sum_ptr).to(tl.float64)
        others_v = smooth_sum - tl.load(smooth_weight_ptr + target, mask=valid, other=0.0).to(tl.float64)
        score = (smooth + lacking * others_v + v_r * tl.where(no_rival, 0.0, rival_score - base)) * LN2
        tl.store(out_smooth_ptr + rows, tl.where(valid, smooth_sum * nll - score, 0.0).to(tl.float32), mask=inside)
        tl.store(share_score_ptr + rows, tl.where(valid, score, 0.0).to(tl.float32), mask=inside)
        tl.store(share_sum_ptr + rows, tl.where(valid, smooth_sum, 0.0).to(tl.float32), mask=inside)
        tl.store(share_rest_ptr + rows, tl.where(valid, others_v, 0.0).to(tl.float32), mask=inside)
