"""The Triton backend: launchers with the interface of the PyTorch backend.

Forward: norms, target geometry, online pass over the classes in parallel shares, merge. Backward of ``rows_*``: the
classes are taken in slices that fit the memory budget; a kernel computes the products again and writes a slice of A, two
library products consume it. ``reduced_forward``: the tokens are taken in chunks; the forward pass stores their log-scores,
an element-wise kernel turns them into A in place. ``harmonic_triton._strategy`` says which of the two serves a call.

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

from harmonic_triton._dispatch import interpreted
from harmonic_triton._numerics import Rows, exponent_gradient, full_fp32, mixed_nll, mixed_slope
from harmonic_triton._strategy import chunk_tokens
from harmonic_triton._triton import backward, forward
from harmonic_triton._triton.configs import FEATURE_BLOCK, ROW_BLOCK, ROW_WARPS, kept_tile, tile_config

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for a slice of A and of fp32 dW
GRID_LIMIT = 65535  # programs along the second axis of a grid
ALIGNED = 16  # entries: rows that start on multiples are copied asynchronously and keep the products' kernels in registers


class _Call:
    """The operands of one call and what every kernel is told about them."""

    def __init__(self, x: Tensor, w: Tensor, target: Tensor, n: Tensor | None, v: Tensor | None, eps: float) -> None:
        (self.tokens, self.width), self.classes = x.shape, len(w)
        self.x, self.w = x, w = _aligned(x), _aligned(w)
        self.target, self.n, self.v, self.eps = target, n, v, eps
        self.dot = n is None
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
        self.v_sum = None if v is None else v.sum()
        new = x.new_empty
        self.norms, smallest, largest = None, None, None
        if not self.dot:
            self.norms = new(self.classes, dtype=torch.float32)
            forward.norms_kernel[(triton.cdiv(self.classes, ROW_BLOCK),)](
                w, self.norms, self.classes, self.features, *w.stride(), **self.rows
            )
            smallest, largest = torch.aminmax(self.norms)
        self.target_ref = new(self.tokens, dtype=torch.float64)  # s_c, or x.w_c
        self.shift, self.scale, self.x_sq = (new(self.tokens, dtype=torch.float32) for _ in range(3))
        forward.geometry_kernel[self.row_grid](
            x, w, target, smallest, largest, self.target_ref, self.shift, self.scale, self.x_sq,
            self.tokens, self.features, eps, *self.strides, DOT=self.dot, **self.rows,
        )  # fmt: skip

    def select(self, at: slice) -> _Call:
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


def _splits(call: _Call) -> tuple[int, int]:
    """(shares of the classes, classes in a share): enough programs for four waves, whole tiles each."""
    tiles, block = triton.cdiv(call.classes, call.config.block_v), call.config.block_v
    processors = torch.cuda.get_device_properties(call.x.device).multi_processor_count if call.x.is_cuda else 1
    wanted = max(1, 4 * processors // triton.cdiv(call.tokens, call.config.block_n))
    each = triton.cdiv(tiles, min(tiles, wanted))
    return triton.cdiv(tiles, each), each * block


def rows_forward(
    x: Tensor, w: Tensor, target: Tensor, n: Tensor | None, v: Tensor | None, eps: float, alpha: float, ignore_index: int,
    moments: bool, budget: int,
) -> Rows:  # fmt: skip
    """Per-token results; O(N + V) memory."""
    out = Rows.zeros(len(x), x.new_empty((), dtype=torch.float32), moments, v is not None)
    if len(x):
        with _on_device(x):
            _forward(_Call(x, w, torch.where(target == ignore_index, -1, target), n, v, eps), out, moments)
    return out


def _forward(
    call: _Call, out: Rows, moments: bool, kept: Tensor | None = None, tile_best: Tensor | None = None
) -> None:
    """Per-token results into ``out``; with ``kept`` (N, V) and ``tile_best`` (tiles, N) the log-scores into those."""
    x, w, n, v = call.x, call.w, call.n, call.v
    smoothing = v is not None
    shares, each = _splits(call)
    partial = _vectors(x, 3 + smoothing, shares * call.tokens)
    index = x.new_empty((shares, call.tokens), dtype=torch.int32)
    best, total, mean = partial[:3]
    smooth = partial[3] if smoothing else None
    forward.forward_kernel[(triton.cdiv(call.tokens, call.config.block_n), shares)](
        x, w, call.norms, call.target, call.shift, call.scale, call.x_sq, n, v,
        best, index, total, mean, smooth, kept, tile_best,
        call.tokens, call.classes, call.features, each, 0 if kept is None else kept.stride(0), *call.strides,
        MOMENTS=moments, SMOOTHING=smoothing, KEEP=kept is not None, **call.tile,
    )  # fmt: skip
    forward.finish_kernel[call.row_grid](
        x, w, call.target, call.target_ref, call.scale, call.x_sq, n, v, call.v_sum, best, index, total, mean, smooth,
        out.nll, out.score_mean, out.entropy, out.smooth, out.share_score, out.share_sum, out.share_rest,
        out.rival_score, out.rival,
        call.tokens, call.features, call.eps, shares, *call.strides,
        DOT=call.dot, MOMENTS=moments, SMOOTHING=smoothing, **call.rows,
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


class _Factors:
    """What the backward needs to know of every token, (N,) each, and dW's terms of target and rival."""

    def __init__(self, tokens: int, like: Tensor) -> None:
        self.values = _vectors(like, 7, tokens)
        self.far = like.new_empty(tokens, dtype=torch.int8)

    def select(self, at: slice) -> _Factors:
        """The same storage for some of the tokens."""
        part = copy.copy(self)
        part.values, part.far = self.values[:, at], self.far[at]
        return part

    def compute(self, call: _Call, rows: Rows, g: Tensor, g_smooth: Tensor | None) -> None:
        """Fill in, from per-token results and upstream gradients."""
        backward.coefficient_kernel[(triton.cdiv(call.tokens, 128),)](
            call.target, call.target_ref, call.scale, call.x_sq, call.norms, call.n, call.v, call.v_sum, g, g_smooth,
            rows.nll, rows.rival, rows.rival_score, *self.values, self.far,
            call.tokens, call.eps, DOT=call.dot, SMOOTHING=g_smooth is not None, SCALED=call.x.dtype == torch.float16,
            BLOCK_N=128, num_warps=ROW_WARPS,
        )  # fmt: skip

    def operand(self, x: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """What A^T is multiplied with, and the number that this multiplied the product by.

        A NaN in a token that does not count stays out of the product.
        """
        operand, unproduct = torch.where(used.unsqueeze(1), x, 0), x.new_ones((), dtype=torch.float32)
        if x.dtype == torch.float16:
            operand = operand.float() * self.values[5].unsqueeze(1)
            unproduct = torch.exp2(10 - operand.abs().amax().clamp_min(2.0**-110).log2().ceil())
            operand = (operand * unproduct).to(x.dtype)
        return operand, unproduct

    def by_class(self, target: Tensor, rival: Tensor, used: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """(starts (V + 1,), tokens (2N,), coefficients (2N,)): whose target or rival a class is, in a fixed order."""
        special = torch.where(used, torch.stack([target, rival]), classes).flatten()
        order = special.argsort(stable=True)
        starts = torch.searchsorted(special[order], torch.arange(classes + 1, device=order.device))
        return starts, order % len(target), torch.cat([self.values[2], self.values[3]])[order]

    def finish_x(self, call: _Call, rival: Tensor, row_sums: Tensor | None, product: Tensor, dx: Tensor) -> None:
        """dX from its product, which may be the same tensor."""
        _, _, a_target, a_rival, r_part, unscale, _ = self.values
        backward.finish_x_kernel[call.row_grid + (triton.cdiv(call.width, FEATURE_BLOCK),)](
            call.x, call.w, call.target, rival, a_target, a_rival, r_part, self.far, unscale, row_sums, product, dx,
            call.tokens, call.width, *call.strides, DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
        )  # fmt: skip


def _coefficients(
    call: _Call, factors: _Factors, rows: Rows, a: Tensor, first: int, smoothing: bool,
    kept: Tensor | None = None, tile_best: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """-A of the classes from ``first`` on into a (N, width), from the stored log-scores if given.

    Returns its row sums (2, N), plain and times the ratio, and column sums (width,); None for dot products.
    """
    p_coef, v_coef, _, _, _, unscale, log_norm = factors.values
    tile = call.tile if kept is None else call.tile | kept_tile(call.config)
    width, block_n, block_v = a.shape[1], tile["BLOCK_N"], tile["BLOCK_V"]
    tiles, row_tiles = triton.cdiv(width, block_v), triton.cdiv(call.tokens, block_n)
    partial = columns = None
    if not call.dot:
        partial = a.new_empty((2, tiles, call.tokens), dtype=torch.float32)
        columns = a.new_empty((row_tiles, width), dtype=torch.float32)
    backward.gradient_kernel[(row_tiles, tiles)](
        call.x, call.w, call.norms, call.target, call.shift, call.scale, call.x_sq, call.n, call.v, rows.rival,
        p_coef, v_coef, unscale, log_norm, kept, tile_best, a, partial, columns,
        call.tokens, call.classes, call.features, first, width, a.stride(0), *call.strides,
        SMOOTHING=smoothing, KEPT=kept is not None, **tile,
    )  # fmt: skip
    if partial is None or columns is None:
        return None, None
    return partial.sum(1), columns.sum(0)


def _finish_w(
    call: _Call, by_class: tuple[Tensor, Tensor, Tensor], product: Tensor, columns: Tensor | None, unproduct: Tensor,
    first: int, dw: Tensor,
) -> None:  # fmt: skip
    """dW of the classes from ``first`` on from their product (width, D), which may be dw itself."""
    backward.finish_w_kernel[(len(product), triton.cdiv(call.width, FEATURE_BLOCK))](
        call.x, call.w, product, columns, *by_class, dw, unproduct, call.width, first, *call.strides,
        DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
    )  # fmt: skip


def rows_backward(
    x: Tensor, w: Tensor, target: Tensor, n: Tensor | None, v: Tensor | None, g: Tensor, g_smooth: Tensor | None,
    rows: Rows, eps: float, alpha: float, ignore_index: int, need_x: bool, need_w: bool, budget: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dX, dW), distances computed again. Tokens without upstream gradient contribute nothing, not even their NaN."""
    dx, dw = x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0)
    if not len(x):
        return dx, dw.zero_()
    used = (target != ignore_index) & ((g != 0) if g_smooth is None else (g != 0) | (g_smooth != 0))
    with _on_device(x):
        call = _Call(x, w, torch.where(used, target, -1), n, v, eps)
        factors = _Factors(call.tokens, x)
        factors.compute(call, rows, g, g_smooth)
        if need_w:
            operand, unproduct = factors.operand(x, used)
            by_class = factors.by_class(target, rows.rival, used, call.classes)
        product = x.new_empty(x.shape if need_x else 0, dtype=torch.float32)
        row_sums = None
        block_n, block_v = call.config.block_n, call.config.block_v
        per_class = call.tokens * x.element_size() + 4 * call.width * need_w + 4 * triton.cdiv(call.tokens, block_n)
        width = block_v * min(max(1, (budget or DEFAULT_BUDGET) // per_class // block_v), GRID_LIMIT)
        slice_ = x.new_empty((call.tokens, min(width, triton.cdiv(call.classes, 64) * 64)))
        for first in range(0, call.classes, width):
            a = slice_[:, : min(width, call.classes - first)]
            sums, columns = _coefficients(call, factors, rows, a, first, g_smooth is not None)
            if sums is not None:
                row_sums = sums if row_sums is None else row_sums.add_(sums)
            if need_x:
                _product(a, w[first : first + width], product, add=first > 0)
            if need_w:
                slice_w = product.new_empty((a.shape[1], call.width))
                _product(a.t(), operand, slice_w, add=False)
                _finish_w(call, by_class, slice_w, columns, unproduct, first, dw)
        if need_x:
            factors.finish_x(call, rows.rival, row_sums, product, dx)
    return dx, dw


def reduced_forward(
    x: Tensor, w: Tensor, target: Tensor, n: Tensor | None, v: Tensor | None, a: Tensor, b: Tensor | None, eps: float,
    alpha: float, ignore_index: int, need_x: bool, need_w: bool, need_n: bool, moments: bool, budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:  # fmt: skip
    """(sum_i a_i mixed_nll_i + b_i smooth_i, dX, dW, dn, rows): one pass, three products instead of four.

    dX and dW are in fp32: a gradient scaler's factor comes before the rounding to 16 bits.
    """
    tokens, classes, scaled = len(x), len(w), x.dtype == torch.float16
    out = Rows.zeros(tokens, x.new_empty((), dtype=torch.float32), moments, v is not None)
    dx = x.new_empty(x.shape if need_x else 0, dtype=torch.float32)
    dw = w.new_zeros(w.shape if need_w else 0, dtype=torch.float32)
    up = x.new_empty(tokens, dtype=torch.float32)
    used = target != ignore_index
    if tokens:
        with _on_device(x):
            whole = _Call(x, w, torch.where(used, target, -1), n, v, eps)
            factors, columns = _Factors(tokens, x), None
            block_n, block_v = whole.config.block_n, whole.config.block_v
            size = _chunk(tokens, chunk_tokens(tokens, classes, x.element_size(), budget, x.device), block_n)
            kept = tile_best = None
            if need_x or need_w:
                stored = torch.float32 if x.dtype == torch.float32 else torch.float16
                store = x.new_empty((min(size, tokens), triton.cdiv(classes, 64) * 64), dtype=stored)[:, :classes]
            for start in range(0, tokens, size):
                at = slice(start, start + size)
                call, rows, mine = whole.select(at), out.select(at), factors.select(at)
                if need_x or need_w:
                    kept = store[: call.tokens]
                    tile_best = x.new_empty((triton.cdiv(classes, block_v), call.tokens), dtype=torch.float32)
                _forward(call, rows, moments, kept, tile_best)
                torch.mul(a[at], mixed_slope(rows.nll, alpha, classes), out=up[at])
                if kept is None:
                    continue
                mine.compute(call, rows, up[at], None if b is None else b[at])
                coefficients = kept.view(x.dtype)  # in place of the log-scores
                row_sums, here = _coefficients(call, mine, rows, coefficients, 0, b is not None, kept, tile_best)
                if need_x:
                    _product(coefficients, w, dx[at], add=False)
                    mine.finish_x(call, rows.rival, row_sums, dx[at], dx[at])
                if need_w:
                    columns = here if columns is None or here is None else columns.add_(here)
                    operand, unproduct = mine.operand(x[at], used[at])
                    if scaled:  # every chunk by its own power of two
                        part = torch.empty_like(dw)
                        _product(coefficients.t(), operand, part, add=False)
                        dw.addcdiv_(part, unproduct)
                    else:
                        _product(coefficients.t(), operand, dw, add=start > 0)
            if need_w:
                by_class = factors.by_class(target, out.rival, used, classes)
                _finish_w(whole, by_class, dw, columns, torch.ones_like(up[:1]), 0, dw)
    loss = (a.double() * mixed_nll(out.nll.double(), alpha, classes)).sum()
    if b is not None:
        loss += (b.double() * out.smooth.double()).sum()
    dn = exponent_gradient(out, n, up, b) if n is not None and need_n else up.new_zeros(())
    return loss.float(), dx, dw, dn, out


def _chunk(tokens: int, most: int, block: int) -> int:
    """Size of equal chunks of at most ``most`` tokens, in whole tiles; at least one tile."""
    most = max(most // block, 1) * block
    return triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, most)), block) * block
