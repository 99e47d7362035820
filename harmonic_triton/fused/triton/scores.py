"""The kernel over the N x V entries: scores of a tile, their sums for each token, and the class coefficients A.

A tile needs nothing of any other tile, so tiles are taken in any order: a program takes one after the other, those of
GROUP token tiles that share a class tile in turn, so that what is in flight at once stays in the L2 cache.
"""

import triton
import triton.language as tl

from harmonic_triton._common.rounding import narrow
from harmonic_triton.fused.triton.tile import LOG2E, exp2_of, log2_of, tanh_of

NOT_COUNTED = tl.constexpr(2.0**127)  # the nearness of target and padding: beyond every 1 + gap, and A~ of it is 0


@triton.jit
def product_tile(
    x_ptr, w_ptr, row, col, N, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) of x w^T from token ``row`` and class ``col`` on; on the operands' own dtype, accumulated in fp32.

    Features are widened before they meet a stride: in a transposed W they may be 2^31 entries apart. A stride of 1 is a
    constant to the compiler, so contiguous operands pay nothing, and nobody pays for a copy.
    """
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if TMA:
        for step in range(0, tl.cdiv(D, BLOCK_D)):
            x = x_ptr.load([row, step * BLOCK_D])
            w = w_ptr.load([col, step * BLOCK_D])
            if UPCAST:  # the interpreter's products of bf16 are wrong
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    else:
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_N)
        cols = col.to(tl.int64) + tl.arange(0, BLOCK_V)
        features = tl.arange(0, BLOCK_D).to(tl.int64)
        advance = tl.full((), BLOCK_D, tl.int64)
        x_ptrs = x_ptr + rows[:, None] * stride_xn + features[None, :] * stride_xd
        w_ptrs = w_ptr + cols[None, :] * stride_wv + features[:, None] * stride_wd
        for start in range(0, D, BLOCK_D):
            left = features < D - start
            x = tl.load(x_ptrs, mask=(rows < N)[:, None] & left[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(cols < V)[None, :] & left[:, None], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, w, acc, input_precision="ieee")
            x_ptrs += advance * stride_xd
            w_ptrs += advance * stride_wd
    return acc


@triton.jit
def place_of(tile, row_tiles, col_tiles, GROUP: tl.constexpr):
    """(token tile, class tile): GROUP token tiles take one class tile after the other."""
    band = tile // (GROUP * col_tiles)
    height = min(row_tiles - band * GROUP, GROUP)
    row_tile = band * GROUP + (tile % (GROUP * col_tiles)) % height
    return row_tile, (tile % (GROUP * col_tiles)) // height


@triton.jit
def halves(block, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Left and right half of a (BLOCK_N, WIDTH) tile, in registers."""
    return tl.split(tl.permute(tl.reshape(block, (BLOCK_N, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def grouped(values, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """(BLOCK_N, WIDTH // GROUPS, GROUPS): every GROUPS-th column belongs together, and to one thread."""
    return tl.reshape(values, (BLOCK_N, WIDTH // GROUPS, GROUPS))


@triton.jit
def scores_kernel(
    x_ptr, w_ptr, a_ptr,  # (N, D), (V, D), out (N, width): with TMA descriptors of them
    norms_ptr, bias_ptr, target_ptr, offset_ptr, inverse_ptr, least_ptr, n_ptr, smooth_weight_ptr,  # norms in whole tiles
    anchor_ptr, largest_anchor_ptr,  # with REPAIR (N,), ()
    rival_ptr, p_coef_ptr, v_coef_ptr, log_norm_ptr,  # with RECOMPUTE (N,)
    near_ptr, index_ptr, p_sum_ptr, score_sum_ptr, smooth_sum_ptr,  # out (class tiles, N), without RECOMPUTE
    a_sums_ptr,  # out (2, class tiles, N), with KEEP or RECOMPUTE
    N, V, D, softcap, first, width, stride_xn, stride_xd, stride_wv, stride_wd, stride_an,  # classes first ... first + width
    DOT: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, KEEP: tl.constexpr, REPAIR: tl.constexpr, RECOMPUTE: tl.constexpr,
    WANT_SCORES: tl.constexpr, SMOOTHING: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, FAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """Sums over each tile of classes but the target; with KEEP also the entries themselves, in the operands' dtype.

    An entry is A~_j = 2^(z_j - anchor)/(1 + gap_j), without what belongs to its token: that is not known before all
    classes have been seen, and multiplies what is made of the entries. ``p_sum`` is the sum of A~ (1 + gap) = 2^(z - anchor),
    ``a_sums`` are those of A~ and of A~ gap, before rounding. ``near`` is the least nearness (1 + gap, or with DOT the
    negative log-score) of the tile, in one of the BLOCK_V/NEAR columns ``index`` + NEAR k.

    The anchor is 0, and sums leave fp32 for tokens to which other classes are much nearer than the target. REPAIR does
    the tiles of those again, with anchors of their own; where there are none it ends at once.
    RECOMPUTE writes -A as it is, by the token's own factors, 0 at the rival too: A = (p_coef p - v_coef v)/(1 + gap).
    With CAP entries also have the slope of their logit's cap (``p_sum`` and ``a_sums`` have not: no center asks for those).
    """
    WIDTH: tl.constexpr = BLOCK_V // PARTS
    SUMS: tl.constexpr = 8  # of every token: a thread adds up what it holds of them, and threads add theirs at the end
    half_n = 0.5
    if not DOT:
        half_n = 0.5 * tl.load(n_ptr).to(tl.float32)
    row_tiles = tl.cdiv(N, BLOCK_N)
    col_tiles = tl.cdiv(width, BLOCK_V)
    tiles = row_tiles * col_tiles
    if REPAIR:
        tiles = tl.where(tl.load(largest_anchor_ptr) > 0.0, tiles, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, row_tiles, col_tiles, GROUP)
        row = row_tile * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        inside = rows < N
        wanted = True
        if REPAIR:
            anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0)
            wanted = tl.max(tl.abs(anchor), 0) > 0.0
        if wanted:
            dot = product_tile(
                x_ptr, w_ptr, row, first + col_tile * BLOCK_V, N, V, D, stride_xn, stride_xd, stride_wv, stride_wd,
                TMA, BLOCK_N, BLOCK_V, BLOCK_D, UPCAST,
            )  # fmt: skip
            target = tl.load(target_ptr + rows, mask=inside, other=-1).to(tl.int32)
            valid = target >= 0
            target -= first
            offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
            if DOT:
                factor = tl.full((BLOCK_N,), -LOG2E, tl.float32)
            else:
                inverse = tl.load(inverse_ptr + rows, mask=inside, other=0.0)
                least = tl.load(least_ptr + rows, mask=inside, other=1.0)
                factor = -2.0 * inverse
            if RECOMPUTE:
                rival = tl.load(rival_ptr + rows, mask=inside, other=-1).to(tl.int32) - first
                p_coef = tl.load(p_coef_ptr + rows, mask=inside, other=0.0)
                log_norm = tl.load(log_norm_ptr + rows, mask=inside, other=0.0)
                if SMOOTHING:
                    v_coef = tl.load(v_coef_ptr + rows, mask=inside, other=0.0)
            near = tl.full((BLOCK_N, NEAR), NOT_COUNTED, tl.float32)
            sum_p = tl.zeros((BLOCK_N, SUMS), tl.float32)
            sum_a = tl.zeros((BLOCK_N, SUMS), tl.float32)
            sum_gap = tl.zeros((BLOCK_N, SUMS), tl.float32)
            sum_score = tl.zeros((BLOCK_N, SUMS), tl.float32)
            sum_smooth = tl.zeros((BLOCK_N, SUMS), tl.float32)
            if PARTS == 4:
                left, right = halves(dot, BLOCK_N, BLOCK_V)
                dot0, dot1 = halves(left, BLOCK_N, BLOCK_V // 2)
                dot2, dot3 = halves(right, BLOCK_N, BLOCK_V // 2)
            elif PARTS == 2:
                dot0, dot1 = halves(dot, BLOCK_N, BLOCK_V)
                dot2, dot3 = dot0, dot1
            else:
                dot0, dot1, dot2, dot3 = dot, dot, dot, dot
            for part in tl.static_range(PARTS):
                part_dot = dot0 if part == 0 else (dot1 if part == 1 else (dot2 if part == 2 else dot3))
                begin = col_tile * BLOCK_V + part * WIDTH  # of the slice
                lanes = tl.arange(0, WIDTH)
                zeros = tl.zeros_like(part_dot)
                if BIAS:
                    inside_v = begin + lanes < width
                    bias = tl.load(bias_ptr + first + begin + lanes, mask=inside_v, other=0.0)[None, :] + zeros
                if CAP:
                    bent, slope = tanh_of((part_dot + bias) * (1.0 / softcap), FAST)
                    nearness = tl.fma(bent, factor[:, None] * softcap + zeros, offset[:, None] + zeros)
                elif DOT:
                    shifted = offset[:, None] + zeros
                    if BIAS:
                        shifted = tl.fma(bias, factor[:, None] + zeros, shifted)
                    nearness = tl.fma(part_dot, factor[:, None] + zeros, shifted)
                else:
                    # u_j - u_ref with u_j = ||w_j||^2 - 2 x.w_j: ||x||^2 has dropped out
                    norms = tl.load(norms_ptr + first + begin + lanes)
                    shifted = tl.fma(norms[None, :] + zeros, inverse[:, None] + zeros, offset[:, None] + zeros)
                    gap = tl.fma(part_dot, factor[:, None] + zeros, shifted)
                    nearness = tl.maximum(1.0 + gap, least[:, None])
                counted = ((target - begin)[:, None] != lanes[None, :]) & (lanes < width - begin)[None, :]
                if DOT or UPCAST:  # a maximum drops NaN, but for the interpreter of Triton 3.6
                    counted = counted & valid[:, None]
                if RECOMPUTE:
                    counted = counted & ((rival - begin)[:, None] != lanes[None, :])
                nearness = tl.where(counted, nearness, NOT_COUNTED)
                if DOT:
                    score = -nearness
                    power = score
                else:
                    score = log2_of(nearness, FAST)
                    power = score * -(half_n + 1.0)
                if SMOOTHING:
                    v = tl.load(smooth_weight_ptr + first + begin + lanes, mask=begin + lanes < width, other=0.0)
                if RECOMPUTE:
                    log_p = (score if DOT else score * -half_n) - log_norm[:, None]
                    log_p = tl.minimum(log_p, 0.0, propagate_nan=tl.PropagateNan.ALL)
                    if SMOOTHING:
                        a = p_coef[:, None] * exp2_of(log_p, FAST) - v_coef[:, None] * v[None, :]
                        if not DOT:
                            a *= exp2_of(-score, FAST)
                    else:
                        a = p_coef[:, None] * exp2_of(log_p if DOT else log_p - score, FAST)
                elif REPAIR:
                    a = exp2_of(power - anchor[:, None], FAST)
                else:
                    a = exp2_of(power, FAST)
                if REPAIR or RECOMPUTE or not FAST:  # else it is below what the instruction can give
                    a = tl.where(nearness == NOT_COUNTED, 0.0, a)
                if not RECOMPUTE:
                    near = tl.minimum(near, tl.min(grouped(nearness, BLOCK_N, WIDTH, NEAR), 1))
                    p = a if DOT else a * nearness
                    sum_p += tl.sum(grouped(p, BLOCK_N, WIDTH, SUMS), 1)
                    if WANT_SCORES:
                        sum_score += tl.sum(grouped(p * score, BLOCK_N, WIDTH, SUMS), 1)
                    if SMOOTHING:
                        term = tl.where(nearness == NOT_COUNTED, 0.0, score * v[None, :])
                        sum_smooth += tl.sum(grouped(term, BLOCK_N, WIDTH, SUMS), 1)
                if CAP:
                    a *= tl.where(counted, slope, 0.0)
                if KEEP or RECOMPUTE:
                    if TMA:
                        rounded = narrow(a, a_ptr.dtype, UPCAST)
                        a_ptr.store([row, begin], rounded)
                    else:
                        rounded = narrow(a, a_ptr.dtype.element_ty, UPCAST)
                        at = rows.to(tl.int64)[:, None] * stride_an + (begin + lanes)[None, :]
                        tl.store(a_ptr + at, rounded, mask=inside[:, None] & (begin + lanes < width)[None, :])
                    if RECOMPUTE or not DOT:
                        sum_a += tl.sum(grouped(a, BLOCK_N, WIDTH, SUMS), 1)
                    if not DOT:
                        sum_gap += tl.sum(grouped(a * gap, BLOCK_N, WIDTH, SUMS), 1)
            at = col_tile.to(tl.int64) * N + rows
            if not RECOMPUTE:
                nearest, index = tl.min(near, 1, return_indices=True)
                tl.store(near_ptr + at, nearest, mask=inside)
                tl.store(index_ptr + at, index, mask=inside)
                total = tl.sum(sum_p, 1)
                tl.store(p_sum_ptr + at, total, mask=inside)
                if WANT_SCORES:
                    tl.store(score_sum_ptr + at, tl.sum(sum_score, 1), mask=inside)
                if SMOOTHING:
                    tl.store(smooth_sum_ptr + at, tl.sum(sum_smooth, 1), mask=inside)
            if KEEP or RECOMPUTE:
                if RECOMPUTE or not DOT:
                    tl.store(a_sums_ptr + at, tl.sum(sum_a, 1), mask=inside)
                else:
                    tl.store(a_sums_ptr + at, tl.sum(sum_p, 1), mask=inside)
                if not DOT:
                    tl.store(
                        a_sums_ptr + tl.full((), 1, tl.int64) * col_tiles * N + at, tl.sum(sum_gap, 1), mask=inside
                    )
