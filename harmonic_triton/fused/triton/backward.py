"""Backward kernels: what belongs to a token, the right operand of dW's product, and the finish of dX and dW.

The products with A, or with the A~ that the forward pass kept, are the library's; target and rival are outside of them, in fp32.
"""

import triton
import triton.language as tl

from harmonic_triton._common.rounding import narrow
from harmonic_triton.fused.triton.tile import (
    LOG2E,
    NEAREST_SHARE,
    NEAREST_SQ,
    NOISE_SHARE,
    base_of,
    slope_of,
    tanh_exactly,
    target_sq_of,
)

MOST = tl.constexpr(1e38)  # of an operand: a token whose factor is that large has nothing but zeros to multiply
NEVER_ABOVE = tl.constexpr(24.0)  # log2 of p_j at the most: what fp32 sums lose beside the nearest class's noise


@triton.jit
def within_fp32(value):
    """fp64 to fp32 without an infinity; NaN stays. Where a factor is that large, what it multiplies is 0."""
    value = tl.maximum(value, -1e37, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 1e37, propagate_nan=tl.PropagateNan.ALL).to(tl.float32)


@triton.jit
def largest_slope(rival_ref, cap):
    """The most that exp(l_j - l_r) (1 - t_j^2) can be for a class behind the rival, t_j = l_j/cap: it rises up to
    t = cap/(1 + sqrt(1 + cap^2)) and falls beyond."""
    cap = tl.full((), 1.0, tl.float64) * cap
    top = cap / (1.0 + tl.sqrt(1.0 + cap * cap))
    behind = tl.minimum(top - tanh_exactly(rival_ref / cap), 0.0) * cap
    return tl.where(behind < 0.0, tl.exp2(behind * LOG2E) * 2.0 * top / cap, slope_of(rival_ref, cap))


@triton.jit
def coefficient_kernel(
    target_ptr, target_ref_ptr, scale_ptr, x_sq_ptr, norms_ptr, n_ptr, smooth_weight_ptr, smooth_sum_ptr,
    g_ptr, g_smooth_ptr, g_score_ptr, nll_ptr, rival_ptr, rival_score_ptr,  # in (N,)
    rival_ref_ptr,  # with CAP (N,) the rival's logit before its cap
    anchor_ptr, near_score_ptr, a_ptr,  # with KEEP (N,), (N,), in and out (N, V)
    p_coef_ptr, v_coef_ptr, a_target_ptr, a_rival_ptr, r_part_ptr, unscale_ptr, log_norm_ptr,  # out (N,)
    far_ptr,  # out (N,) 0 or 1
    N, eps, softcap, stride_an,
    DOT: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, SCORED: tl.constexpr, SCALED: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Per-token factors, in fp64: A_j = (p_coef p_j - v_coef v_j)/(1 + gap_j) for the classes in the products.

    log2 p_j is the log-score relative to the reference less ``log_norm``.
    ``a_target`` and ``a_rival`` multiply x - w_c and x - w_r; ``r_part`` is the rival's share of the r-form row sum.
    With SCALED (fp16) a power of two keeps A in range; ``unscale`` undoes it. With KEEP it turns the A~ that are there
    into A, and the rival's becomes 0.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    valid = target >= 0
    rival = tl.load(rival_ptr + rows, mask=valid, other=0)
    rival_score = tl.load(rival_score_ptr + rows, mask=valid, other=float("-inf")).to(tl.float64)
    nll = tl.load(nll_ptr + rows, mask=valid, other=0.0).to(tl.float64)
    g = tl.load(g_ptr + rows, mask=valid, other=0.0).to(tl.float64)
    no_rival = rival_score == float("-inf")
    others = tl.where(nll < 1e-3, nll * (1.0 - nll * (0.5 - nll * (1.0 / 6 - nll / 24))), 1.0 - tl.exp2(-nll * LOG2E))
    rival_p = tl.exp2((rival_score - nll) * LOG2E)
    g_p = g
    g_others = g * others
    g_rival = g * rival_p
    g_v = tl.zeros((BLOCK_N,), dtype=tl.float64)
    log_norm = nll * LOG2E
    if SMOOTHING:
        g_v = tl.load(g_smooth_ptr + rows, mask=valid, other=0.0).to(tl.float64)
        mass = tl.load(smooth_sum_ptr).to(tl.float64)
        v_c = tl.load(smooth_weight_ptr + target, mask=valid, other=0.0).to(tl.float64)
        v_r = tl.load(smooth_weight_ptr + rival, mask=valid, other=0.0).to(tl.float64)
        g_p = g + g_v * mass
        g_others = g_p * others - g_v * (mass - v_c)
        g_rival = g_p * rival_p - g_v * v_r
    g_score = tl.zeros((BLOCK_N,), dtype=tl.float64)
    if SCORED:  # something depends on the target's log-score itself
        g_score = tl.load(g_score_ptr + rows, mask=valid, other=0.0).to(tl.float64)
        g_others -= g_score
    if DOT:  # A = -G: no distance, and x appears in dW alone
        factor = tl.where(valid, 1.0, 0.0).to(tl.float64)
        on_target = factor
        nearer = factor
        if CAP:
            rival_ref = tl.load(rival_ref_ptr + rows, mask=valid, other=0.0)
            g_others *= slope_of(tl.load(target_ref_ptr + rows, mask=valid, other=0.0), softcap)
            g_rival *= slope_of(rival_ref, softcap)
            nearer = largest_slope(rival_ref, softcap)
        a_rival = tl.where(valid & (no_rival == 0), -g_rival, 0.0)
        r_part = 0.0 * factor
        far = valid
    else:
        target_ref = tl.load(target_ref_ptr + rows, mask=valid, other=1.0)
        x_sq = tl.load(x_sq_ptr + rows, mask=valid, other=0.0).to(tl.float64)
        scale = tl.load(scale_ptr + rows, mask=valid, other=1.0)
        n = tl.load(n_ptr).to(tl.float64)
        s_c = target_sq_of(target_ref, eps)
        by_target = scale == s_c.to(tl.float32)
        scale = tl.where(by_target, s_c, scale.to(tl.float64))
        log_norm -= base_of(s_c, scale, 0.5 * n)
        s_r = tl.where(no_rival, s_c, s_c * tl.exp2(tl.where(no_rival, 0.0, rival_score) * (-2.0 * LOG2E) / n))
        # the products know no distance below the noise, where a rival on x is; they do not hold the rival itself
        nearer = tl.maximum(scale / tl.maximum(s_r, NOISE_SHARE * tl.maximum(x_sq, scale)), 1e-30)
        norm_c = tl.load(norms_ptr + target, mask=valid, other=0.0)
        norm_r = tl.load(norms_ptr + rival, mask=valid, other=0.0)
        no_gradient = (target_ref + eps == 0.0) | (valid == 0)
        floored = s_r <= 1.0001 * ((x_sq + norm_r) * NEAREST_SHARE + NEAREST_SQ)
        skip_rival = no_gradient | floored | no_rival
        factor = tl.where(no_gradient, 0.0, n / scale)
        on_target = tl.where(no_gradient, 0.0, n / s_c)
        a_rival = tl.where(skip_rival, 0.0, -n * g_rival / s_r)
        r_part = tl.where(skip_rival, 0.0, n * g_rival * (s_r - s_c) / (s_r * s_c)) - on_target * g_score
        far = (s_c > norm_c) & (s_r > norm_r) & by_target
    unscale = tl.full((BLOCK_N,), 1.0, dtype=tl.float64)
    if SCALED:
        # No class in the products has a larger A than the rival's bound; leave 5 bits of room below fp16's maximum.
        bound = factor * (tl.abs(g_p) * rival_p + tl.abs(g_v)) * nearer
        power = tl.floor(tl.log2(tl.maximum(bound, 1e-300))) - 10.0
        least = tl.log2(tl.maximum(factor * (tl.abs(g_p) + tl.abs(g_v)), 1e-300)) - 110.0  # p_coef must be finite
        power = tl.maximum(tl.maximum(power, tl.floor(least)), -100.0)
        unscale = tl.where(bound > 0.0, tl.exp2(tl.minimum(power, 120.0)), 1.0)
    if KEEP:
        anchor = tl.load(anchor_ptr + rows, mask=inside, other=0.0).to(tl.float64)
        near_score = tl.load(near_score_ptr + rows, mask=inside, other=0.0).to(tl.float64)
        least_norm = tl.maximum(log_norm, near_score - NEVER_ABOVE, propagate_nan=tl.PropagateNan.ALL)
        power = tl.minimum(anchor - least_norm, 1000.0, propagate_nan=tl.PropagateNan.ALL)
        unscale = tl.where(g_p == 0.0, 0.0, factor * g_p * tl.exp2(power))
        at = rows * stride_an + rival
        tl.store(a_ptr + at, tl.zeros((BLOCK_N,), a_ptr.dtype.element_ty), mask=valid & (no_rival == 0))
    tl.store(p_coef_ptr + rows, within_fp32(factor * g_p / unscale), mask=inside)
    tl.store(v_coef_ptr + rows, within_fp32(factor * g_v / unscale), mask=inside)
    tl.store(a_target_ptr + rows, (on_target * g_others).to(tl.float32), mask=inside)
    tl.store(a_rival_ptr + rows, a_rival.to(tl.float32), mask=inside)
    tl.store(r_part_ptr + rows, r_part.to(tl.float32), mask=inside)
    tl.store(unscale_ptr + rows, within_fp32(unscale), mask=inside)
    tl.store(log_norm_ptr + rows, log_norm.to(tl.float32), mask=inside)
    tl.store(far_ptr + rows, far.to(tl.float32), mask=inside)


@triton.jit
def operand_kernel(
    x_ptr, center_ptr, unscale_ptr, used_ptr, product_scale_ptr, column_scale_ptr,  # (N, D), (D,), (N,), (N,) int8, (), ()
    operand_ptr, column_ptr,  # out (N, D), (N, COLUMNS)
    N, D, stride_xn, stride_xd,
    DOT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What A^T is multiplied with: ``unscale`` (x - center) for dW, and ``unscale`` for the column sums.

    That one is in two columns, rounded and what rounding lost; with DOT they are the bias's gradient. A NaN in a token that is not used stays out of the product.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = tl.load(used_ptr + rows, mask=rows < N, other=0) != 0
    unscale = tl.load(unscale_ptr + rows, mask=used, other=0.0)
    inside = used[:, None] & (features < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xn + features[None, :] * stride_xd, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if not DOT:
        center = tl.load(center_ptr + features, mask=features < D, other=0.0)
        x -= tl.where(inside, center[None, :], 0.0)
    out = tl.where(inside, (unscale * tl.load(product_scale_ptr))[:, None] * x, 0.0)
    out = tl.minimum(tl.maximum(out, -MOST, propagate_nan=tl.PropagateNan.ALL), MOST, propagate_nan=tl.PropagateNan.ALL)
    out = narrow(out, operand_ptr.dtype.element_ty, UPCAST)
    tl.store(
        operand_ptr + rows[:, None] * D + features[None, :], out, mask=(rows < N)[:, None] & (features < D)[None, :]
    )
    if BIAS or not DOT:
        if tl.program_id(1) == 0:
            scaled = unscale * tl.load(column_scale_ptr)
            rounded = narrow(scaled, column_ptr.dtype.element_ty, UPCAST)
            lost = narrow(scaled - rounded.to(tl.float32), column_ptr.dtype.element_ty, UPCAST)
            columns = tl.arange(0, COLUMNS)[None, :]
            both = tl.where(columns == 0, rounded[:, None], tl.where(columns == 1, lost[:, None], 0.0))
            tl.store(column_ptr + rows[:, None] * COLUMNS + columns, both.to(column_ptr.dtype.element_ty),
                     mask=(rows < N)[:, None])  # fmt: skip


@triton.jit
def rounded_sums_kernel(
    a_ptr, center_size_ptr, sums_ptr, N, width, stride_an, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Add the sums of A~ as it was rounded, (N,), for a center that is not zero: what roundings leave of it counts."""
    stop = tl.where(tl.load(center_size_ptr) > 0.0, width, 0)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, stop, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        inside = (rows < N)[:, None] & (cols < width)[None, :]
        a = tl.load(a_ptr + rows[:, None] * stride_an + cols[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(tl.float32), 1)
    if stop > 0:
        total += tl.load(sums_ptr + rows, mask=rows < N, other=0.0)
        tl.store(sums_ptr + rows, total, mask=rows < N)


@triton.jit
def finish_x_kernel(
    x_ptr, w_ptr, target_ptr, rival_ptr, a_target_ptr, a_rival_ptr, r_part_ptr, far_ptr, unscale_ptr,  # (N,)
    plain_ptr, by_gap_ptr, rounded_ptr,  # (N,) sums of A: all of it, times the gap, as it was rounded
    center_ptr, g_ptr, product_ptr, dx_ptr,  # (D,), (), (N, D) fp32, out (N, D)
    N, D, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dX = on_x x + (-A) W + the target's and the rival's terms; far from both, sum_j A_j is in its r-form. All times g.

    Where the class vectors have a common mean, what rounding took from the sum of A multiplies it, and is put back.
    DOT: no term in x.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    valid = target >= 0
    rival = tl.load(rival_ptr + rows, mask=valid, other=0)
    inside = valid[:, None] & (features < D)[None, :]
    w_c = tl.load(w_ptr + target[:, None] * stride_wv + features[None, :] * stride_wd, mask=inside, other=0.0)
    w_r = tl.load(w_ptr + rival[:, None] * stride_wv + features[None, :] * stride_wd, mask=inside, other=0.0)
    a_c = tl.load(a_target_ptr + rows, mask=valid, other=0.0)
    a_r = tl.load(a_rival_ptr + rows, mask=valid, other=0.0)
    unscale = tl.load(unscale_ptr + rows, mask=valid, other=1.0)
    plain = tl.load(plain_ptr + rows, mask=valid, other=0.0)
    lost = plain - tl.load(rounded_ptr + rows, mask=valid, other=0.0)
    center = tl.load(center_ptr + features, mask=features < D, other=0.0)
    product = tl.load(product_ptr + rows[:, None] * D + features[None, :], mask=inside, other=0.0)
    product += tl.where(center == 0.0, 0.0, center)[None, :] * lost[:, None]
    dx = product * unscale[:, None]
    near_x = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if not DOT:
        x = tl.load(x_ptr + rows[:, None] * stride_xn + features[None, :] * stride_xd, mask=inside, other=0.0)
        x = x.to(tl.float32)
        far = tl.load(far_ptr + rows, mask=valid, other=0.0) != 0.0
        by_gap = tl.load(by_gap_ptr + rows, mask=valid, other=0.0) * unscale
        on_x = tl.where(far, tl.load(r_part_ptr + rows, mask=valid, other=0.0) + by_gap, -plain * unscale)
        near_x = tl.where(far[:, None], near_x, x)
        dx += on_x[:, None] * x
    dx += a_c[:, None] * (near_x - w_c.to(tl.float32))
    dx += tl.where(a_r == 0.0, 0.0, a_r)[:, None] * (near_x - w_r.to(tl.float32))
    dx *= tl.load(g_ptr)
    all_ = (rows < N)[:, None] & (features < D)[None, :]
    dx = tl.where(inside, dx, 0.0)
    tl.store(dx_ptr + rows[:, None] * D + features[None, :], narrow(dx, dx_ptr.dtype.element_ty, UPCAST), mask=all_)


@triton.jit
def finish_w_kernel(
    x_ptr, w_ptr, product_ptr, columns_ptr,  # (N, D), (V, D), (width, D) fp32, (width, COLUMNS)
    starts_ptr, tokens_ptr, coefficients_ptr,  # (V + 1,), (2N,), (2N,): tokens of each class, in a fixed order
    center_ptr, g_ptr,  # (D,), ()
    dw_ptr,  # out (V, D)
    product_scale_ptr, column_scale_ptr,  # () what the product and the column sums were multiplied by
    D, first, stride_xn, stride_xd, stride_wv, stride_wd,
    DOT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dW_j = (-A)^T (X - center) - (column sum) (w_j - center) - sum of a (x - w_j) over the tokens whose target or rival
    is j, all times g. DOT: no w_j and no center.
    """
    local = tl.program_id(0).to(tl.int64)
    j = first + local
    features = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = features < D
    dw = tl.load(product_ptr + local * D + features, mask=inside, other=0.0) / tl.load(product_scale_ptr)
    w = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if not DOT:
        w = tl.load(w_ptr + j * stride_wv + features * stride_wd, mask=inside, other=0.0).to(tl.float32)
        column = tl.load(columns_ptr + local * COLUMNS) + tl.load(columns_ptr + local * COLUMNS + 1)
        center = tl.load(center_ptr + features, mask=inside, other=0.0)
        dw -= column / tl.load(column_scale_ptr) * (w - center)
    begin = tl.load(starts_ptr + j)
    end = tl.load(starts_ptr + j + 1)
    direct = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        token = tl.load(tokens_ptr + entries, mask=entries < end, other=0)
        a = tl.load(coefficients_ptr + entries, mask=entries < end, other=0.0)
        used = (a != 0.0)[:, None] & inside[None, :]
        x = tl.load(x_ptr + token[:, None] * stride_xn + features[None, :] * stride_xd, mask=used, other=0.0)
        direct += tl.sum(tl.where(used, a[:, None] * (x.to(tl.float32) - w[None, :]), 0.0), 0)
    dw = (dw - direct) * tl.load(g_ptr)
    tl.store(dw_ptr + j * D + features, narrow(dw, dw_ptr.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def finish_bias_kernel(
    columns_ptr, starts_ptr, coefficients_ptr, g_ptr, column_scale_ptr,  # (width, COLUMNS), (V + 1,), (2N,), (), ()
    db_ptr,  # out (V,)
    first,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """db_j = the column sum of -A less the a of the tokens whose target or rival is j, all times g."""
    local = tl.program_id(0).to(tl.int64)
    column = tl.load(columns_ptr + local * COLUMNS) + tl.load(columns_ptr + local * COLUMNS + 1)
    begin = tl.load(starts_ptr + first + local)
    end = tl.load(starts_ptr + first + local + 1)
    direct = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        entries = start + tl.arange(0, BLOCK_N)
        direct += tl.load(coefficients_ptr + entries, mask=entries < end, other=0.0)
    db = (column / tl.load(column_scale_ptr) - tl.sum(direct, 0)) * tl.load(g_ptr)
    tl.store(db_ptr + first + local, db)
