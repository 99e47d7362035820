"""The Triton backend: what is launched, in which order (the kernels are in ``scores``, ``forward`` and ``backward``).

Forward: norms, target geometry, the scores of all tiles and their sums, a second pass over what was beyond fp32 (which ends at once
where there is nothing), the finish of each token. ``forward_backward`` (*one pass*): the scores kernel also keeps its
entries, and two library products consume them as they are, a chunk of tokens at a time; ``finish`` makes gradients of the
products when the upstream gradient is known. ``backward`` (*recompute*): a slice of classes at a time, the scores are
computed again, as coefficients this time. ``harmonic_triton.fused.strategy`` says which of the two serves a call.

Every sum has a fixed order, nothing is atomic, and no product is fused into a sum whose terms lanes of a warp exchange: so
results are bitwise the same on every run, at no price: there is no
faster mode (cuBLAS keeps its order for one stream and one workspace setting). No call waits for the device and no shape
depends on values, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from harmonic_triton._common.precision import full_fp32
from harmonic_triton.fused.center import center_of
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.results import COLUMNS, TokenResults, TokenWeights, Unfinished, Upstream, scaled, upstream_of
from harmonic_triton.fused.strategy import chunk_tokens, one_pass_serves, unfinished_shapes
from harmonic_triton.fused.triton import backward as backward_kernels
from harmonic_triton.fused.triton import forward as forward_kernels
from harmonic_triton.fused.triton.launch import Launch, cdiv, launch_scores, vectors
from harmonic_triton.fused.triton.tile_configs import FEATURE_BLOCK, ROW_BLOCK, ROW_OPTIONS

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for a slice of A and of fp32 dW


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(operands: Operands, problem: Problem) -> TokenResults:
    """Per-token results; O(N + V) memory beside the tiles' sums, for as many tokens at once as the budget has room for."""
    out = _room(operands, problem)
    if len(operands.x):
        with _on_device(operands.x):
            call = Launch(operands, operands.target != problem.ignore_index, problem.eps, problem.softcap).measure()
            _forward_in_chunks(call, out, problem)
    return out


def _forward_in_chunks(call: Launch, out: TokenResults, problem: Problem) -> None:
    each = 4 * (3 + problem.want_scores + (call.smooth_weight is not None))  # bytes of a token's sums in a tile
    most = (problem.budget or DEFAULT_BUDGET) // (each * cdiv(call.classes, call.config.block_v))
    size = _chunk(call.tokens, most, call.config.block_n)
    for start in range(0, call.tokens, size):
        at = slice(start, min(start + size, call.tokens))
        part = call.select(at)
        _forward(part, out if part is call else out.select(at), problem.want_scores)


def _room(operands: Operands, problem: Problem) -> TokenResults:
    like = operands.x.new_empty((), dtype=torch.float32)
    return TokenResults.zeros(len(operands.x), like, problem.want_scores, operands.smoothing)


class Kept:
    """What the forward pass leaves of its entries A~ (N, V) for each token."""

    def __init__(self, a: Tensor, plain: Tensor, by_gap: Tensor) -> None:
        self.a, self.plain, self.by_gap = a, plain, by_gap  # entries, their sums, their sums times the gap
        self.anchor, self.near_score = vectors(a, 2, len(a))


def _forward(call: Launch, out: TokenResults, want_scores: bool, kept: Kept | None = None) -> None:
    """Per-token results into ``out``; A~ and what belongs to it into ``kept``."""
    smoothing, keep = call.smooth_weight is not None, kept is not None
    new, tiles = call.x.new_empty, cdiv(call.classes, call.config.block_v)
    partial = vectors(call.x, 2 + want_scores + smoothing + 2 * keep, tiles * call.tokens)
    index, column = new((tiles, call.tokens), dtype=torch.int32), new(call.tokens, dtype=torch.int32)
    near_, p_sum = partial[:2]
    score_sum = partial[2] if want_scores else None
    v_sum = partial[2 + want_scores] if smoothing else None
    a_sums = new((2, tiles, call.tokens), dtype=torch.float32) if keep else None
    nearest, anchor = vectors(call.x, 2, call.tokens)
    a = None
    if kept is not None:
        a, anchor = kept.a, kept.anchor
    scale, x_sq, *_ = call.vectors

    def scores(largest: Tensor | None) -> None:
        anchors = (None, None) if largest is None else (anchor, largest)
        launch_scores(
            call, a, 0, call.classes, (*anchors, None, None, None, None),
            (near_, index, p_sum, score_sum, v_sum, a_sums),
            KEEP=keep, REPAIR=largest is not None, RECOMPUTE=False, WANT_SCORES=want_scores,
        )  # fmt: skip

    scores(None)
    forward_kernels.anchor_kernel[call.row_grid](
        near_, index, call.target, call.target_ref, scale, call.n, nearest, column, anchor,
        call.tokens, tiles, call.eps, DOT=call.dot, **call.sums, BLOCK_N=ROW_BLOCK, **ROW_OPTIONS,
    )  # fmt: skip
    scores(anchor.abs().amax())
    forward_kernels.finish_kernel[call.row_grid](
        call.x, call.w, call.norms, call.bias, call.target, call.target_ref, scale, x_sq, call.n,
        call.smooth_weight, call.smooth_sum, nearest, column, anchor, p_sum, score_sum, v_sum, a_sums,
        out.nll, out.score_mean, out.entropy, out.smooth, out.share_score, out.share_sum, out.share_rest,
        out.rival_score, out.rival, *((None,) * 3 if kept is None else (kept.near_score, kept.plain, kept.by_gap)),
        call.tokens, call.classes, call.features, call.eps, call.softcap, tiles, *call.strides,
        WANT_SCORES=want_scores, SMOOTHING=smoothing, KEEP=keep, NEAR=call.tile["NEAR"],
        **call.logits, **call.sums, **call.rows,
    )  # fmt: skip
    out.target_ref.copy_(call.capped_logits() if call.softcap else call.target_ref)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b, in fp32: 16-bit operands accumulate and stay in fp32, fp32 ones never use TF32."""
    with full_fp32():
        if a.dtype == torch.float32 or not a.is_cuda:
            out.addmm_(a.float(), b.float(), beta=float(add))
        elif add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)


class TokenFactors:
    """What the backward needs to know of every token, (N,) each, in the storage ``rows`` (8, at least N)."""

    def __init__(self, call: Launch, rows: Tensor) -> None:
        self.a_target, self.a_rival, self.r_part, self.unscale, self.far, self.plain, self.by_gap, self.rounded = (
            rows.unbind(0)
        )
        self.p_coef, self.v_coef, self.log_norm = vectors(call.x, 3, call.tokens)

    def compute(self, call: Launch, results: TokenResults, upstream: Upstream, kept: Kept | None = None) -> None:
        """Fill in, from per-token results and upstream gradients; with ``kept`` the rival's A~ becomes 0."""
        scale, x_sq, *_ = call.vectors
        backward_kernels.coefficient_kernel[(cdiv(call.tokens, 128),)](
            call.target, call.target_ref, scale, x_sq, call.norms, call.n, call.smooth_weight, call.smooth_sum,
            *upstream, results.nll, results.rival, results.rival_score,
            call.logits_of(results.rival) if call.softcap else None,
            *((None,) * 3 if kept is None else (kept.anchor, kept.near_score, kept.a)),
            self.p_coef, self.v_coef, self.a_target, self.a_rival, self.r_part, self.unscale, self.log_norm, self.far,
            call.tokens, call.eps, call.softcap, 0 if kept is None else kept.a.stride(0),
            DOT=call.dot, CAP=call.softcap > 0, SMOOTHING=upstream.smooth is not None, SCORED=upstream.target_ref is not None,
            SCALED=call.x.dtype == torch.float16, KEEP=kept is not None, BLOCK_N=128, **ROW_OPTIONS,
        )  # fmt: skip


class RightOperand:
    """What A^T is multiplied with, (N, D) and (N, COLUMNS), and the numbers that this multiplied the products by."""

    def __init__(self, call: Launch, unscale: Tensor, used: Tensor, center: Tensor, wanted: Wanted) -> None:
        one = call.x.new_ones((), dtype=torch.float32)
        self.product_scale = self.column_scale = one
        if call.x.dtype == torch.float16:  # products and sums of powers of two, all in fp16's range
            scaled = torch.where(used, unscale, 0.0)
            x = call.x[:, : call.width].float()
            largest = (x if call.dot else x - center).abs().amax(1)
            self.product_scale = _into_fp16(torch.where(used, largest, 0.0) * scaled)
            self.column_scale = _into_fp16(scaled)
        self.values = call.x.new_empty((call.tokens, call.width))
        self.columns = call.x.new_empty((call.tokens, COLUMNS)) if wanted.bias or not call.dot else None
        backward_kernels.operand_kernel[call.row_grid + (cdiv(call.width, FEATURE_BLOCK),)](
            call.x, center, unscale, used, self.product_scale, self.column_scale, self.values, self.columns,
            call.tokens, call.width, *call.x.stride(), DOT=call.dot, BIAS=wanted.bias, COLUMNS=COLUMNS, UPCAST=call.upcast, **call.rows,
        )  # fmt: skip

    def multiply(self, a: Tensor, product: Tensor, columns: Tensor, add: bool) -> None:
        """A^T times both, into ``product`` and ``columns``, or added to them: those of them that there is room for."""
        if len(product):
            _product(a.t(), self.values, product, add)
        if len(columns) and self.columns is not None:
            _product(a.t(), self.columns, columns, add)


def _into_fp16(values: Tensor) -> Tensor:
    """The power of two that puts the largest magnitude at about 2^10."""
    return torch.exp2(10 - values.abs().amax().clamp_min(2.0**-110).log2().ceil())


def _by_class(target: Tensor, rival: Tensor, used: Tensor, factors: TokenFactors, classes: int) -> tuple[Tensor, ...]:
    """(starts (V + 1,), tokens (2N,), coefficients (2N,)): whose target or rival a class is, in a fixed order."""
    classes_of = torch.where(used, torch.stack([target, rival]), classes).flatten()
    order = classes_of.argsort(stable=True)
    starts = torch.searchsorted(classes_of[order], torch.arange(classes + 1, device=order.device))
    return starts, order % len(target), torch.cat([factors.a_target, factors.a_rival])[order]


def _add_rounded_sums(call: Launch, a: Tensor, center: Tensor, rounded: Tensor) -> None:
    backward_kernels.rounded_sums_kernel[call.row_grid](
        a, center.abs().amax(), rounded, call.tokens, a.shape[1], a.stride(0),
        BLOCK_N=ROW_BLOCK, BLOCK_V=4 * FEATURE_BLOCK, **ROW_OPTIONS,
    )  # fmt: skip


def _finish_x(
    call: Launch, factors: TokenFactors, rival: Tensor, center: Tensor, g: Tensor, product: Tensor, dx: Tensor
) -> None:
    """dX from its product."""
    backward_kernels.finish_x_kernel[call.row_grid + (cdiv(call.width, FEATURE_BLOCK),)](
        call.x, call.w, call.target, rival, factors.a_target, factors.a_rival, factors.r_part, factors.far,
        factors.unscale, factors.plain, factors.by_gap, factors.rounded, center, g, product, dx,
        call.tokens, call.width, *call.strides, DOT=call.dot, UPCAST=call.upcast, **call.rows,
    )  # fmt: skip


def _finish_w(
    call: Launch, by_class: tuple[Tensor, ...], center: Tensor, g: Tensor, product: Tensor, columns: Tensor,
    scales: tuple[Tensor, Tensor], first: int, dw: Tensor, db: Tensor,
) -> None:  # fmt: skip
    """dW and db of the classes from ``first`` on from their product (width, D) and column sums, where there are such."""
    if len(product):
        backward_kernels.finish_w_kernel[(len(product), cdiv(call.width, FEATURE_BLOCK))](
            call.x, call.w, product, None if call.dot else columns, *by_class, center, g, dw, *scales,
            call.width, first, *call.strides, DOT=call.dot, COLUMNS=COLUMNS, UPCAST=call.upcast, **call.rows,
        )  # fmt: skip
    if len(db):
        starts, _, coefficients = by_class
        backward_kernels.finish_bias_kernel[(len(columns),)](
            columns, starts, coefficients, g, scales[1], db, first,
            COLUMNS=COLUMNS, BLOCK_N=FEATURE_BLOCK, **ROW_OPTIONS,
        )  # fmt: skip


def _center(call: Launch, w: Tensor) -> Tensor:
    """What is subtracted from both operands where A is rounded; fp32's own digits need none.

    Nor has it a use under a soft cap, where the A of a token do not add up to 0.
    """
    return center_of(w) if w.element_size() == 2 and not call.softcap else w.new_zeros(w.shape[1], dtype=torch.float32)


def backward(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db), distances computed again."""
    return _recompute(operands, results, upstream, problem, wanted, operands.x.dtype)


def _recompute(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, w = operands.x, operands.w
    dx, dw = x.new_empty(x.shape if wanted.x else 0, dtype=dtype), w.new_empty(w.shape if wanted.w else 0, dtype=dtype)
    db = w.new_empty(len(w) if wanted.bias else 0, dtype=torch.float32)
    if not len(x):
        return dx, dw.zero_(), db.zero_()
    by_classes, with_columns = wanted.w or wanted.bias, wanted.bias or (wanted.w and operands.n is not None)
    used = (operands.target != problem.ignore_index) & upstream.used()
    with _on_device(x):
        call = Launch(operands, used, problem.eps, problem.softcap).measure()
        factors, center, one = (
            TokenFactors(call, vectors(x, 8, call.tokens).zero_()),
            _center(call, w),
            x.new_ones((), dtype=torch.float32),
        )
        factors.compute(call, results, upstream)
        if by_classes:
            right = RightOperand(call, factors.unscale, used, center, wanted)
            by_class = _by_class(operands.target, results.rival, used, factors, call.classes)
        product = x.new_empty(x.shape if wanted.x else 0, dtype=torch.float32)
        block = call.config.block_v
        per_class = (
            call.tokens * x.element_size()
            + 4 * (call.width * wanted.w + COLUMNS * by_classes)
            + cdiv(8 * call.tokens, block)
        )
        width = min(block * max(1, (problem.budget or DEFAULT_BUDGET) // per_class // block), call.classes)
        slice_ = x.new_empty((call.tokens, cdiv(width, 64) * 64))
        partial = x.new_empty(2 * cdiv(width, block) * call.tokens, dtype=torch.float32)
        room_w = partial.new_empty((width, call.width) if wanted.w else 0)
        room_columns = partial.new_empty((width, COLUMNS) if with_columns else 0)
        for first in range(0, call.classes, width):
            a = slice_[:, : min(width, call.classes - first)]
            tiles = cdiv(a.shape[1], block)
            sums = partial[: 2 * tiles * call.tokens].view(2, tiles, call.tokens)
            launch_scores(
                call, a, first, a.shape[1], (None, None, results.rival, factors.p_coef, factors.v_coef, factors.log_norm),
                (None, None, None, None, None, sums),
                KEEP=False, REPAIR=False, RECOMPUTE=True, WANT_SCORES=False,
            )  # fmt: skip
            if wanted.x:
                factors.plain.add_(sums[0].sum(0))
                if not call.dot:
                    factors.by_gap.add_(sums[1].sum(0))
                _add_rounded_sums(call, a, center, factors.rounded)
                _product(a, w[first : first + width], product, add=first > 0)
            if by_classes:
                if x.dtype == torch.float16:  # one scale for all tokens: those whose A is 0 may not choose it
                    right = RightOperand(call, factors.unscale, used & a.any(1), center, wanted)
                slice_w, columns = room_w[: a.shape[1]], room_columns[: a.shape[1]]
                right.multiply(a, slice_w, columns, add=False)
                scales = right.product_scale, right.column_scale
                _finish_w(call, by_class, center, one, slice_w, columns, scales, first, dw, db)
        if wanted.x:
            _finish_x(call, factors, results.rival, center, one, product, dx)
    return dx, dw, db


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[TokenResults, Unfinished]:
    """Results of the tokens, and the two gradient products of the weighted sum of their losses: three products in all."""
    x, w = operands.x, operands.w
    tokens, classes = len(x), len(w)
    out = _room(operands, problem)
    unfinished = Unfinished(
        *(x.new_zeros(shape, dtype=torch.float32) for shape in unfinished_shapes(problem, operands, wanted))
    )
    used = operands.target != problem.ignore_index
    if not tokens:
        return out, unfinished
    with _on_device(x):
        whole = Launch(operands, used, problem.eps, problem.softcap).measure()
        if not (wanted.x or wanted.w or wanted.bias):
            _forward_in_chunks(whole, out, problem)
            return out, unfinished
        if not one_pass_serves(operands):  # nobody asks for it but who calls the operator himself
            _forward_in_chunks(whole, out, problem)
            upstream = upstream_of(out, weights, problem.mix, classes, problem.token_scaling)
            dx, dw, db = _recompute(operands, out, upstream, problem, wanted, torch.float32)
            return out, unfinished._replace(x=dx, w=dw, bias=db)
        center = unfinished.center.copy_(_center(whole, w))
        size = _chunk(tokens, chunk_tokens(tokens, classes, problem.budget, x.device), whole.config.block_n)
        entries = x.new_empty((min(size, tokens), cdiv(classes, 64) * 64))[:, :classes]
        for start in range(0, tokens, size):
            at = slice(start, min(start + size, tokens))
            call = whole.select(at)
            results = out if call is whole else out.select(at)
            factors = TokenFactors(call, unfinished.tokens[:, at])
            kept = Kept(entries[: call.tokens], factors.plain, factors.by_gap)
            _forward(call, results, problem.want_scores, kept)
            upstream = upstream_of(results, weights.select(at), problem.mix, classes, problem.token_scaling)
            factors.compute(call, results, upstream, kept)
            if wanted.x:
                _add_rounded_sums(call, kept.a, center, factors.rounded)
                _product(kept.a, w, unfinished.x[at], add=False)
            if wanted.w or wanted.bias:
                right = RightOperand(call, factors.unscale, used[at] & upstream.used(), center, wanted)
                right.multiply(kept.a, unfinished.w, unfinished.columns, add=start > 0)
    return out, unfinished


def finish(
    operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW) in the operands' dtype from the products of ``forward_backward`` and the upstream gradient (): rounded once; db."""
    x, w = operands.x, operands.w
    if not one_pass_serves(operands):
        dx, dw, db = scaled((unfinished.x, unfinished.w, unfinished.bias), finishing.g, finishing.last)
        return dx.to(x.dtype), dw.to(w.dtype), db
    dx, dw = x.new_empty(x.shape if wanted.x else 0), w.new_empty(w.shape if wanted.w else 0)
    db = w.new_empty(len(w) if wanted.bias else 0, dtype=torch.float32)
    if not len(x):
        return dx, dw.zero_(), db.zero_()
    used = operands.target != problem.ignore_index
    with _on_device(x):
        call = Launch(operands, used, problem.eps, problem.softcap)
        factors, one = TokenFactors(call, unfinished.tokens[:, : call.tokens]), x.new_ones((), dtype=torch.float32)
        if wanted.x:
            _finish_x(call, factors, finishing.rival, unfinished.center, finishing.g, unfinished.x, dx)
        if wanted.w or wanted.bias:
            by_class = _by_class(operands.target, finishing.rival, used, factors, call.classes)
            products = unfinished.w if wanted.w else unfinished.w[:0]
            _finish_w(
                call, by_class, unfinished.center, finishing.g, products, unfinished.columns, (one, one), 0, dw, db
            )
    return dx, dw, db


def _chunk(tokens: int, most: int, block: int) -> int:
    """Size of equal chunks of at most ``most`` tokens, in whole tiles; at least one tile."""
    most = max(most // block, 1) * block
    return cdiv(cdiv(tokens, cdiv(tokens, most)), block) * block
