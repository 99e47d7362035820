"""The Triton backend: launchers of the kernels in ``forward``, ``backward`` and ``tile``.

Forward: norms, target geometry, online pass over the classes in parallel shares, merge. ``backward``: the classes are taken
in slices that fit the memory budget; a kernel computes the products again and writes a slice of A, two library products
consume it. ``forward_backward``: the tokens are taken in chunks; the forward pass stores their log-scores, an element-wise
kernel turns them into A in place. ``harmonic_triton.fused.strategy`` says which of the two serves a call.

Every sum has a fixed order and nothing is atomic, so results are bitwise the same on every run, at no price: there is no
faster mode (cuBLAS keeps its order for one stream and one workspace setting). No call waits for the device and no shape
depends on values, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from harmonic_triton._common.dispatch import interpreted
from harmonic_triton._common.precision import full_fp32
from harmonic_triton.fused.floors import NormRange
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.results import TokenResults, TokenWeights, Unfinished, Upstream, scaled, upstream_of
from harmonic_triton.fused.strategy import chunk_tokens
from harmonic_triton.fused.triton import backward as backward_kernels
from harmonic_triton.fused.triton import forward as forward_kernels
from harmonic_triton.fused.triton.tile_configs import FEATURE_BLOCK, ROW_BLOCK, ROW_WARPS, stored_tile, tile_config

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for a slice of A and of fp32 dW
GRID_LIMIT = 65535  # programs along the second axis of a grid
ALIGNED = 16  # entries: rows that start on multiples are copied asynchronously and keep the kernels in registers


class Launch:
    """The operands of one call and what every kernel is told about them."""

    def __init__(self, operands: Operands, valid: Tensor, eps: float) -> None:
        (self.tokens, self.width), self.classes = operands.x.shape, len(operands.w)
        self.x, self.w = x, w = _aligned(operands.x), _aligned(operands.w)
        self.target = target = torch.where(valid, operands.target, -1)  # of tokens that count
        self.n, self.smooth_weight, self.eps = operands.n, operands.smooth_weight, eps
        self.dot = operands.n is None
        self.features = x.shape[1]  # with the padding, which adds nothing
        self.strides = (*x.stride(), *w.stride())
        self.config = config = tile_config(x.device, x.dtype, self.width)
        self.tile = {
            "DOT": self.dot, "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d,
            "UPCAST": interpreted(), "FAST_LOG": x.is_cuda and not interpreted() and not torch.version.hip,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip
        self.rows = {"BLOCK_N": ROW_BLOCK, "BLOCK_D": FEATURE_BLOCK, "num_warps": ROW_WARPS}
        self.row_grid = (triton.cdiv(self.tokens, ROW_BLOCK),)
        self.smooth_sum = None if self.smooth_weight is None else self.smooth_weight.sum()
        new = x.new_empty
        self.norms = None
        norm_range: tuple[Tensor | None, ...] = (None, None, None)
        if not self.dot:
            self.norms = new(self.classes, dtype=torch.float32)
            forward_kernels.norms_kernel[(triton.cdiv(self.classes, ROW_BLOCK),)](
                w, self.norms, self.classes, self.features, *w.stride(), **self.rows
            )
            norm_range = NormRange.of(self.norms)
        self.target_ref = new(self.tokens, dtype=torch.float64)  # s_c, or x.w_c
        self.shift, self.scale, self.x_sq = (new(self.tokens, dtype=torch.float32) for _ in range(3))
        forward_kernels.geometry_kernel[self.row_grid](
            x, w, target, *norm_range, self.target_ref, self.shift, self.scale, self.x_sq,
            self.tokens, self.features, eps, *self.strides, DOT=self.dot, **self.rows,
        )  # fmt: skip

    def select(self, at: slice) -> Launch:
        """The same call for some of the tokens."""
        part = copy.copy(self)
        part.x, part.target = self.x[at], self.target[at]
        part.target_ref = self.target_ref[at]
        part.shift, part.scale, part.x_sq = self.shift[at], self.scale[at], self.x_sq[at]
        part.tokens = len(part.x)
        part.row_grid = (triton.cdiv(part.tokens, ROW_BLOCK),)
        return part


def _aligned(operand: Tensor) -> Tensor:
    """(M, D) itself, or a copy padded with zero features where its rows are not ALIGNED.

    A transposed operand stays as it is, however far apart its features are: its rows are next to each other.
    """
    rows, width = operand.shape
    by_rows = operand.stride(1) == 1 and operand.stride(0) % ALIGNED == 0
    if (by_rows or operand.stride(0) == 1) and width % ALIGNED == 0 and operand.data_ptr() % 16 == 0:
        return operand
    padded = operand.new_zeros(rows, triton.cdiv(width, ALIGNED) * ALIGNED)
    padded[:, :width] = operand
    return padded


def _vectors(like: Tensor, count: int, length: int) -> Tensor:
    """Room for fp32 vectors (count, length), each of which starts on a boundary of 16 bytes."""
    return like.new_empty((count, triton.cdiv(length, 4) * 4), dtype=torch.float32)[:, :length]


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _splits(call: Launch) -> tuple[int, int]:
    """(shares of the classes, classes in a share): enough programs for four waves, whole tiles each."""
    tiles, block = triton.cdiv(call.classes, call.config.block_v), call.config.block_v
    processors = torch.cuda.get_device_properties(call.x.device).multi_processor_count if call.x.is_cuda else 1
    wanted = max(1, 4 * processors // triton.cdiv(call.tokens, call.config.block_n))
    each = triton.cdiv(tiles, min(tiles, wanted))
    return triton.cdiv(tiles, each), each * block


def forward(operands: Operands, problem: Problem) -> TokenResults:
    """Per-token results; O(N + V) memory."""
    out = _room(operands, problem)
    if len(operands.x):
        with _on_device(operands.x):
            _forward(Launch(operands, operands.target != problem.ignore_index, problem.eps), out, problem.want_scores)
    return out


def _room(operands: Operands, problem: Problem) -> TokenResults:
    like = operands.x.new_empty((), dtype=torch.float32)
    return TokenResults.zeros(len(operands.x), like, problem.want_scores, operands.smoothing)


def _forward(
    call: Launch, out: TokenResults, want_scores: bool, stored: Tensor | None = None, tile_best: Tensor | None = None
) -> None:
    """Per-token results into ``out``; with ``stored`` (N, V) and ``tile_best`` (tiles, N) the log-scores into those."""
    smoothing = call.smooth_weight is not None
    shares, each = _splits(call)
    partial = _vectors(call.x, 3 + smoothing, shares * call.tokens)
    index = call.x.new_empty((shares, call.tokens), dtype=torch.int32)
    best, total, mean = partial[:3]
    smooth = partial[3] if smoothing else None
    forward_kernels.forward_kernel[(triton.cdiv(call.tokens, call.config.block_n), shares)](
        call.x, call.w, call.norms, call.target, call.shift, call.scale, call.x_sq, call.n, call.smooth_weight,
        best, index, total, mean, smooth, stored, tile_best,
        call.tokens, call.classes, call.features, each, 0 if stored is None else stored.stride(0), *call.strides,
        WANT_SCORES=want_scores, SMOOTHING=smoothing, STORE_SCORES=stored is not None, **call.tile,
    )  # fmt: skip
    forward_kernels.finish_kernel[call.row_grid](
        call.x, call.w, call.target, call.target_ref, call.scale, call.x_sq, call.n, call.smooth_weight, call.smooth_sum,
        best, index, total, mean, smooth,
        out.nll, out.score_mean, out.entropy, out.smooth, out.share_score, out.share_sum, out.share_rest,
        out.rival_score, out.rival,
        call.tokens, call.features, call.eps, shares, *call.strides,
        DOT=call.dot, WANT_SCORES=want_scores, SMOOTHING=smoothing, **call.rows,
    )  # fmt: skip
    out.target_ref.copy_(call.target_ref)


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
    """What the backward needs to know of every token, (N,) each, and dW's terms of target and rival."""

    def __init__(self, tokens: int, like: Tensor) -> None:
        self.values = _vectors(like, 7, tokens)
        self.far = like.new_empty(tokens, dtype=torch.int8)

    def select(self, at: slice) -> TokenFactors:
        """The same storage for some of the tokens."""
        part = copy.copy(self)
        part.values, part.far = self.values[:, at], self.far[at]
        return part

    def compute(self, call: Launch, results: TokenResults, upstream: Upstream) -> None:
        """Fill in, from per-token results and upstream gradients."""
        backward_kernels.coefficient_kernel[(triton.cdiv(call.tokens, 128),)](
            call.target, call.target_ref, call.scale, call.x_sq, call.norms, call.n, call.smooth_weight, call.smooth_sum,
            *upstream, results.nll, results.rival, results.rival_score, *self.values, self.far,
            call.tokens, call.eps, DOT=call.dot, SMOOTHING=upstream.smooth is not None,
            SCORED=upstream.target_ref is not None, SCALED=call.x.dtype == torch.float16,
            BLOCK_N=128, num_warps=ROW_WARPS,
        )  # fmt: skip

    def operand(self, x: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """What A^T is multiplied with, and the number that this multiplied the product by.

        A NaN in a token that does not count stays out of the product.
        """
        operand, product_scale = torch.where(used.unsqueeze(1), x, 0), x.new_ones((), dtype=torch.float32)
        if x.dtype == torch.float16:
            operand = operand.float() * self.values[5].unsqueeze(1)
            product_scale = torch.exp2(10 - operand.abs().amax().clamp_min(2.0**-110).log2().ceil())
            operand = (operand * product_scale).to(x.dtype)
        return operand, product_scale

    def by_class(self, target: Tensor, rival: Tensor, used: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """(starts (V + 1,), tokens (2N,), coefficients (2N,)): whose target or rival a class is, in a fixed order."""
        classes_of = torch.where(used, torch.stack([target, rival]), classes).flatten()
        order = classes_of.argsort(stable=True)
        starts = torch.searchsorted(classes_of[order], torch.arange(classes + 1, device=order.device))
        return starts, order % len(target), torch.cat([self.values[2], self.values[3]])[order]

    def finish_x(self, call: Launch, rival: Tensor, row_sums: Tensor | None, product: Tensor, dx: Tensor) -> None:
        """dX from its product, which may be the same tensor."""
        _, _, a_target, a_rival, r_part, unscale, _ = self.values
        backward_kernels.finish_x_kernel[call.row_grid + (triton.cdiv(call.width, FEATURE_BLOCK),)](
            call.x, call.w, call.target, rival, a_target, a_rival, r_part, self.far, unscale, row_sums, product, dx,
            call.tokens, call.width, *call.strides, DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
        )  # fmt: skip


def _coefficients(
    call: Launch, factors: TokenFactors, rival: Tensor, a: Tensor, first: int,
    stored: Tensor | None = None, tile_best: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """-A of the classes from ``first`` on into a (N, width), from the stored log-scores if given.

    Returns its row sums (2, N), plain and times the gap, and column sums (width,); None for dot products.
    """
    p_coef, v_coef, _, _, _, unscale, log_norm = factors.values
    tile = call.tile if stored is None else call.tile | stored_tile(call.config)
    width, block_n, block_v = a.shape[1], tile["BLOCK_N"], tile["BLOCK_V"]
    tiles, row_tiles = triton.cdiv(width, block_v), triton.cdiv(call.tokens, block_n)
    partial = columns = None
    if not call.dot:
        partial = a.new_empty((2, tiles, call.tokens), dtype=torch.float32)
        columns = a.new_empty((row_tiles, width), dtype=torch.float32)
    backward_kernels.gradient_kernel[(row_tiles, tiles)](
        call.x, call.w, call.norms, call.target, call.shift, call.scale, call.x_sq, call.n,
        call.smooth_weight, rival, p_coef, v_coef, unscale, log_norm, stored, tile_best, a, partial, columns,
        call.tokens, call.classes, call.features, first, width, a.stride(0), *call.strides,
        SMOOTHING=call.smooth_weight is not None, STORED=stored is not None, **tile,
    )  # fmt: skip
    if partial is None or columns is None:
        return None, None
    return partial.sum(1), columns.sum(0)


def _finish_w(
    call: Launch, by_class: tuple[Tensor, Tensor, Tensor], product: Tensor, columns: Tensor | None, product_scale: Tensor,
    first: int, dw: Tensor,
) -> None:  # fmt: skip
    """dW of the classes from ``first`` on from their product (width, D), which may be dw itself."""
    backward_kernels.finish_w_kernel[(len(product), triton.cdiv(call.width, FEATURE_BLOCK))](
        call.x, call.w, product, columns, *by_class, dw, product_scale, call.width, first, *call.strides,
        DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
    )  # fmt: skip


def backward(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """(dX, dW), distances computed again."""
    x, w = operands.x, operands.w
    dx, dw = x.new_empty(x.shape if wanted.x else 0), w.new_empty(w.shape if wanted.w else 0)
    if not len(x):
        return dx, dw.zero_()
    used = (operands.target != problem.ignore_index) & upstream.used()
    with _on_device(x):
        call = Launch(operands, used, problem.eps)
        factors = TokenFactors(call.tokens, x)
        factors.compute(call, results, upstream)
        if wanted.w:
            operand, product_scale = factors.operand(x, used)
            by_class = factors.by_class(operands.target, results.rival, used, call.classes)
        product = x.new_empty(x.shape if wanted.x else 0, dtype=torch.float32)
        row_sums = None
        block_n, block_v = call.config.block_n, call.config.block_v
        per_class = call.tokens * x.element_size() + 4 * call.width * wanted.w + 4 * triton.cdiv(call.tokens, block_n)
        width = block_v * min(max(1, (problem.budget or DEFAULT_BUDGET) // per_class // block_v), GRID_LIMIT)
        slice_ = x.new_empty((call.tokens, min(width, triton.cdiv(call.classes, 64) * 64)))
        for first in range(0, call.classes, width):
            a = slice_[:, : min(width, call.classes - first)]
            sums, columns = _coefficients(call, factors, results.rival, a, first)
            if sums is not None:
                row_sums = sums if row_sums is None else row_sums.add_(sums)
            if wanted.x:
                _product(a, w[first : first + width], product, add=first > 0)
            if wanted.w:
                slice_w = product.new_empty((a.shape[1], call.width))
                _product(a.t(), operand, slice_w, add=False)
                _finish_w(call, by_class, slice_w, columns, product_scale, first, dw)
        if wanted.x:
            factors.finish_x(call, results.rival, row_sums, product, dx)
    return dx, dw


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[TokenResults, Unfinished]:
    """Results, and dX and dW of the weighted sum of the losses: one pass, three products instead of four."""
    x, w = operands.x, operands.w
    tokens, classes = len(x), len(w)
    out = _room(operands, problem)
    dx = x.new_empty(x.shape if wanted.x else 0, dtype=torch.float32)
    dw = w.new_zeros(w.shape if wanted.w else 0, dtype=torch.float32)
    if not tokens:
        return out, Unfinished(dx, dw, *(dx.new_empty(0) for _ in range(3)))
    used = operands.target != problem.ignore_index
    with _on_device(x):
        whole = Launch(operands, used, problem.eps)
        if not (wanted.x or wanted.w):
            _forward(whole, out, problem.want_scores)
            return out, Unfinished(dx, dw, *(dx.new_empty(0) for _ in range(3)))
        factors, columns = TokenFactors(tokens, x), None
        block_n, block_v = whole.config.block_n, whole.config.block_v
        size = _chunk(tokens, chunk_tokens(tokens, classes, x.element_size(), problem.budget, x.device), block_n)
        score_dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
        store = x.new_empty((min(size, tokens), triton.cdiv(classes, 64) * 64), dtype=score_dtype)[:, :classes]
        for start in range(0, tokens, size):
            at = slice(start, start + size)
            call, results, mine = whole.select(at), out.select(at), factors.select(at)
            stored = store[: call.tokens]
            tile_best = x.new_empty((triton.cdiv(classes, block_v), call.tokens), dtype=torch.float32)
            _forward(call, results, problem.want_scores, stored, tile_best)
            mine.compute(call, results, upstream_of(results, weights.select(at), problem.mix, classes))
            coefficients = stored.view(x.dtype)  # in place of the log-scores
            row_sums, here = _coefficients(call, mine, results.rival, coefficients, 0, stored, tile_best)
            if wanted.x:
                _product(coefficients, w, dx[at], add=False)
                mine.finish_x(call, results.rival, row_sums, dx[at], dx[at])
            if wanted.w:
                columns = here if columns is None or here is None else columns.add_(here)
                operand, product_scale = mine.operand(x[at], used[at])
                if x.dtype == torch.float16:  # every chunk by its own power of two
                    part = torch.empty_like(dw)
                    _product(coefficients.t(), operand, part, add=False)
                    dw.addcdiv_(part, product_scale)
                else:
                    _product(coefficients.t(), operand, dw, add=start > 0)
        if wanted.w:
            by_class = factors.by_class(operands.target, out.rival, used, classes)
            _finish_w(whole, by_class, dw, columns, dw.new_ones(1), 0, dw)
    return out, Unfinished(dx, dw, *(dx.new_empty(0) for _ in range(3)))


def finish(
    operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """(dX, dW) times the upstream gradient."""
    dx, dw = scaled(unfinished[:2], finishing.g, finishing.last)
    return dx.to(operands.x.dtype), dw.to(operands.w.dtype)


def _chunk(tokens: int, most: int, block: int) -> int:
    """Size of equal chunks of at most ``most`` tokens, in whole tiles; at least one tile."""
    most = max(most // block, 1) * block
    return int(triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, most)), block) * block)
