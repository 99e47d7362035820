"""Forward kernels: norms and target geometry, anchors of the tokens whose scores need one, and the per-token finish."""

import triton
import triton.language as tl

from harmonic_triton.fused.triton.scores import NOT_COUNTED
from harmonic_triton.fused.triton.tile import (
    LN2,
    LOG2E,
    NEAREST_SHARE,
    NEAREST_SQ,
    NOISE_SHARE,
    base_of,
    capped_difference,
    difference_sq,
    exp2_of,
    log2_of,
    measured,
    reference_of,
    tanh_exactly,
    target_sq_of,
)

LARGEST_SQ = tl.constexpr(2.0**125)  # squared norms up to here keep u_j - u_c inside fp32
MOST_POWER, LEAST_POWER = tl.constexpr(40.0), tl.constexpr(-32.0)  # log2 of the largest A~ that needs no anchor
TILES = tl.constexpr(32)  # partial sums of a token that are read at once


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
    x_ptr, w_ptr, target_ptr, bias_ptr,  # (N, D), (V, D), (N,), with BIAS (V,); target < 0: the token does not count
    smallest_ptr, median_ptr, largest_ptr,  # () of ||w_j||^2
    target_ref_ptr, scale_ptr, x_sq_ptr,  # out (N,) fp64, fp32
    offset_ptr, inverse_ptr, least_ptr,  # out (N,) what the scores are made with
    N, D, eps, softcap, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s_c = ||x - w_c||^2 without eps, the reference's distance, ||x||^2; 1 + gap_j is at least ``least`` and

        gap_j = (||w_j||^2 - 2 x.w_j) inverse + offset,  or with DOT the nearness -l_j log2(e) + offset.

    With DOT ``target_ref`` is the logit x.w_c + b_c, before its cap. A token that does not count has no class that is near.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    valid = target >= 0
    if DOT:
        apart = measured(
            x_ptr, w_ptr, rows, target, valid, D, stride_xn, stride_xd, stride_wv, stride_wd, DOT, BLOCK_N, BLOCK_D
        )
        if BIAS:
            apart += tl.load(bias_ptr + target, mask=valid, other=0.0).to(tl.float64)
        logit = softcap * tanh_exactly(apart / softcap) if CAP else apart
        tl.store(offset_ptr + rows, (logit * LOG2E).to(tl.float32), mask=rows < N)
    else:
        apart, target_offset, x_sq = difference_sq(
            x_ptr, w_ptr, rows, target, valid, D, stride_xn, stride_xd, stride_wv, stride_wd, BLOCK_N, BLOCK_D
        )
        smallest = tl.load(smallest_ptr).to(tl.float64)
        median = tl.load(median_ptr).to(tl.float64)
        largest = tl.load(largest_ptr).to(tl.float64)
        scale, shift = reference_of(
            apart, target_offset.to(tl.float64), x_sq.to(tl.float64), smallest, median, largest, eps
        )
        # a class vector that is not finite shows in every token
        scale = tl.where(largest == largest, scale, float("nan"))
        scale = tl.where(valid, scale, 1.0).to(tl.float32)
        inverse = 1.0 / scale
        least = tl.maximum(x_sq, scale) * NOISE_SHARE * inverse  # below it the expansion is noise
        tl.store(scale_ptr + rows, scale, mask=rows < N)
        tl.store(x_sq_ptr + rows, x_sq, mask=rows < N)
        tl.store(inverse_ptr + rows, tl.where(valid, inverse, 0.0), mask=rows < N)
        tl.store(offset_ptr + rows, tl.where(valid, -shift.to(tl.float32) * inverse, 0.0), mask=rows < N)
        tl.store(least_ptr + rows, tl.where(valid, least, NOT_COUNTED), mask=rows < N)
    tl.store(target_ref_ptr + rows, apart, mask=rows < N)


@triton.jit
def anchor_kernel(
    near_ptr, index_ptr, target_ptr, target_ref_ptr, scale_ptr, n_ptr,  # in (tiles, N), (N,)
    nearest_ptr, column_ptr, anchor_ptr,  # out (N,)
    N, COL_TILES, eps,
    DOT: tl.constexpr, FAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The nearest class's tile and nearness, and an anchor where its A~ is too large to sum, or too small and yet counts.

    Small ones count where the reference is not the target: that one is much farther then.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    nearest = tl.full((BLOCK_N,), NOT_COUNTED, tl.float32)
    column = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, COL_TILES, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < COL_TILES)[:, None] & (rows < N)[None, :]
        at = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        near = tl.load(near_ptr + at, mask=inside, other=NOT_COUNTED)
        columns = tiles[:, None] * BLOCK_V + tl.load(index_ptr + at, mask=inside, other=0)
        best = tl.min(near, 0)
        first = tl.min(tl.where(near == best[None, :], columns, 2147483647), 0)
        column = tl.where(best < nearest, first, column)
        nearest = tl.minimum(nearest, best)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    if DOT:
        power = -nearest
        unlikely = power < float("-inf")
    else:
        half_n = 0.5 * tl.load(n_ptr).to(tl.float32)
        power = log2_of(nearest, FAST) * -(half_n + 1.0)
        s_c = target_sq_of(tl.load(target_ref_ptr + rows, mask=rows < N, other=1.0), eps)
        unlikely = (power < LEAST_POWER) & (s_c > 2.0 * tl.load(scale_ptr + rows, mask=rows < N, other=1.0))
    flagged = ((power > MOST_POWER) | unlikely) & (target >= 0) & (nearest < NOT_COUNTED)
    tl.store(nearest_ptr + rows, nearest, mask=rows < N)
    tl.store(column_ptr + rows, column, mask=rows < N)
    tl.store(anchor_ptr + rows, tl.where(flagged, power, 0.0), mask=rows < N)


@triton.jit
def log1p_small(y):
    """log(1 + y) for y >= 0, right in relative terms where y is tiny: 2 atanh(y/(2 + y)). fp64."""
    t = y / (2.0 + y)
    t2 = t * t
    series = 2.0 * t * (1.0 + t2 * (1.0 / 3 + t2 * (1.0 / 5 + t2 * (1.0 / 7 + t2 * (1.0 / 9 + t2 / 11)))))
    return tl.where(y < 0.25, series, tl.log(1.0 + y))


@triton.jit
def partial_sums(ptr, rows, N, COL_TILES, BLOCK_N: tl.constexpr):
    """Sums (BLOCK_N,) in fp64 over the tiles of (tiles, N) fp32, in a fixed order."""
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for start in range(0, COL_TILES, TILES):
        tiles = start + tl.arange(0, TILES)
        inside = (tiles < COL_TILES)[:, None] & (rows < N)[None, :]
        at = tiles.to(tl.int64)[:, None] * N + rows[None, :]
        total += tl.sum(tl.load(ptr + at, mask=inside, other=0.0).to(tl.float64), 0)
    return total


@triton.jit
def nearest_of(
    x_ptr, w_ptr, bias_ptr, rows, column, target, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """(class, squared distance or logit) of the best of the classes ``column`` + NEAR k of a tile, in fp64.

    The column itself where there is none.
    """
    tile = column // BLOCK_V * BLOCK_V
    best = tl.full((BLOCK_N,), float("-inf") if DOT else float("inf"), tl.float64)
    rival = tl.minimum(column, V - 1).to(tl.int64)
    for k in range(BLOCK_V // NEAR):
        candidate = (tile + (column - tile) % NEAR + NEAR * k).to(tl.int64)
        counted = (candidate < V) & (candidate != target) & (target >= 0)
        here = measured(
            x_ptr, w_ptr, rows, candidate, counted, D, stride_xn, stride_xd, stride_wv, stride_wd, DOT, BLOCK_N, BLOCK_D
        )
        if BIAS:
            here += tl.load(bias_ptr + candidate, mask=counted, other=0.0).to(tl.float64)
        better = counted & ((here > best) if DOT else (here < best))
        rival = tl.where(better, candidate, rival)
        best = tl.where(better, here, best)
    return rival, best


@triton.jit
def finish_kernel(
    x_ptr, w_ptr, norms_ptr, bias_ptr, target_ptr, target_ref_ptr, scale_ptr, x_sq_ptr, n_ptr,
    smooth_weight_ptr, smooth_sum_ptr, nearest_ptr, column_ptr, anchor_ptr,  # in (N,)
    p_sum_ptr, score_sum_ptr, v_sum_ptr, a_sums_ptr,  # in (tiles, N), the last with KEEP (2, tiles, N)
    nll_ptr, score_mean_ptr, entropy_ptr, out_smooth_ptr, share_score_ptr, share_sum_ptr, share_rest_ptr,  # out (N,)
    rival_score_ptr, rival_ptr,  # out (N,)
    near_score_ptr, plain_ptr, by_gap_ptr,  # out with KEEP (N,): sums of A~ and of A~ gap without the rival's
    N, V, D, eps, softcap, COL_TILES, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, WANT_SCORES: tl.constexpr, SMOOTHING: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Add the tiles up, measure the rival directly in place of its score, and turn the sums into results, in fp64."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    valid = target >= 0
    nearest = tl.load(nearest_ptr + rows, mask=rows < N, other=NOT_COUNTED)
    column = tl.load(column_ptr + rows, mask=rows < N, other=0)
    anchor = tl.load(anchor_ptr + rows, mask=rows < N, other=0.0)
    no_rival = nearest >= NOT_COUNTED  # no class beside the target
    half_n = 0.5
    if not DOT:
        half_n = 0.5 * tl.load(n_ptr).to(tl.float32)
    # what the rival added to the sums, as it was added
    score = -nearest if DOT else log2_of(nearest, FAST)
    power = score if DOT else score * -(half_n + 1.0)
    rival_a = tl.where(no_rival, 0.0, exp2_of(power - anchor, FAST))
    rival_p = rival_a if DOT else rival_a * nearest
    total = partial_sums(p_sum_ptr, rows, N, COL_TILES, BLOCK_N)
    rest = tl.where(no_rival, 0.0, tl.maximum(total - rival_p.to(tl.float64), 0.0))
    unit = 1.0 if DOT else -half_n.to(tl.float64)  # of the scores in the sums
    near_score = score.to(tl.float64) * unit  # relative to the reference

    target_ref = tl.load(target_ref_ptr + rows, mask=valid, other=0.0)
    lacking = tl.zeros((BLOCK_N,), dtype=tl.float64)  # to be relative to the target's
    rival, measured = nearest_of(
        x_ptr, w_ptr, bias_ptr, rows, column, target, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
        DOT, BIAS, BLOCK_N, BLOCK_D, BLOCK_V, NEAR,
    )  # fmt: skip
    if DOT:
        apart = capped_difference(measured, target_ref, softcap) if CAP else measured - target_ref
        rival_score = apart * LOG2E
        on_target = valid & False
        identical = on_target
        sound = tl.abs(target_ref) < float("inf")
    else:
        x_sq = tl.load(x_sq_ptr + rows, mask=valid, other=0.0).to(tl.float64)
        s_c = target_sq_of(target_ref, eps)
        scale = tl.load(scale_ptr + rows, mask=valid, other=1.0)
        lacking = tl.where(scale == s_c.to(tl.float32), 0.0, base_of(s_c, scale.to(tl.float64), half_n.to(tl.float64)))
        rival_norm = tl.load(norms_ptr + rival, mask=valid, other=0.0)
        least = (x_sq + rival_norm) * NEAREST_SHARE + NEAREST_SQ
        s_r = tl.maximum(measured + eps, least)
        rival_score = unit * tl.log2(s_r / s_c)
        on_target = target_ref + eps == 0.0
        identical = (s_r <= least) & (no_rival == 0)
        sound = (x_sq < LARGEST_SQ) & (s_c < 3e38) & (scale == scale)
    rival_score = tl.where(no_rival, float("-inf"), rival_score)

    base = anchor.to(tl.float64) + lacking
    others = tl.where(rest > 0.0, tl.log2(tl.where(rest > 0.0, rest, 1.0)) + base, float("-inf"))  # without the rival
    top = tl.where(no_rival, 0.0, tl.maximum(others, rival_score))
    sum_ = tl.exp2(rival_score - top) + tl.exp2(others - top)
    # nll = log(1 + y) with y = 2^top * sum; from above where y is large
    y = tl.exp2(-tl.abs(top)) * tl.where(top > 0, 1.0 / sum_, sum_)
    nll = log1p_small(y) + tl.where(top > 0, top * LN2 + tl.log(sum_), 0.0)
    nll = tl.where(on_target, tl.where(identical, LN2, 0.0), nll)
    # A NaN or an infinity in x; s_c beyond fp32; a NaN in w, which other sums may have dropped and total has not.
    nll = tl.where(sound & (total == total), nll, float("nan"))
    nll = tl.where(valid, nll, 0.0)
    inside = rows < N
    tl.store(nll_ptr + rows, nll.to(tl.float32), mask=inside)
    tl.store(rival_ptr + rows, rival, mask=inside)
    shown = tl.where(on_target, tl.where(identical, 0.0, float("-inf")), rival_score * LN2)
    tl.store(rival_score_ptr + rows, tl.where(valid, shown, 0.0).to(tl.float32), mask=inside)
    finite_score = tl.where(no_rival, 0.0, rival_score)
    if WANT_SCORES:
        others_score = partial_sums(score_sum_ptr, rows, N, COL_TILES, BLOCK_N)
        others_score = unit * (others_score - (rival_p * score).to(tl.float64)) + lacking * rest
        others_score = tl.where(no_rival, 0.0, others_score) * tl.exp2(tl.minimum(base - nll * LOG2E, 1e3))
        moment = (others_score + finite_score * tl.exp2(rival_score - nll * LOG2E)) * LN2
        moment = tl.where(valid & (on_target == 0), moment, 0.0)
        tl.store(score_mean_ptr + rows, moment.to(tl.float32), mask=inside)
        tl.store(entropy_ptr + rows, (nll - moment).to(tl.float32), mask=inside)
    if SMOOTHING:
        v_sum = unit * partial_sums(v_sum_ptr, rows, N, COL_TILES, BLOCK_N)
        v_r = tl.load(smooth_weight_ptr + rival, mask=valid, other=0.0).to(tl.float64)
        smooth_sum = tl.load(smooth_sum_ptr).to(tl.float64)
        others_v = smooth_sum - tl.load(smooth_weight_ptr + target, mask=valid, other=0.0).to(tl.float64)
        v_score = v_sum + lacking * others_v + v_r * tl.where(no_rival, 0.0, rival_score - (near_score + lacking))
        v_score *= LN2
        tl.store(out_smooth_ptr + rows, tl.where(valid, smooth_sum * nll - v_score, 0.0).to(tl.float32), mask=inside)
        tl.store(share_score_ptr + rows, tl.where(valid, v_score, 0.0).to(tl.float32), mask=inside)
        tl.store(share_sum_ptr + rows, tl.where(valid, smooth_sum, 0.0).to(tl.float32), mask=inside)
        tl.store(share_rest_ptr + rows, tl.where(valid, others_v, 0.0).to(tl.float32), mask=inside)
    if KEEP:
        tl.store(near_score_ptr + rows, near_score.to(tl.float32), mask=inside)
        plain = total
        if not DOT:
            plain = partial_sums(a_sums_ptr, rows, N, COL_TILES, BLOCK_N)
            by_gap = partial_sums(a_sums_ptr + tl.full((), 1, tl.int64) * COL_TILES * N, rows, N, COL_TILES, BLOCK_N)
            gap = (s_r - s_c) / s_c  # nearest - 1 has lost the digits of a small one, which matter far from all classes
            by_gap -= rival_a.to(tl.float64) * tl.where(tl.abs(gap) < 0.5, gap, (nearest - 1.0).to(tl.float64))
            tl.store(by_gap_ptr + rows, tl.where(no_rival, 0.0, by_gap).to(tl.float32), mask=inside)
        plain = tl.where(no_rival, 0.0, plain - rival_a.to(tl.float64))
        tl.store(plain_ptr + rows, plain.to(tl.float32), mask=inside)
