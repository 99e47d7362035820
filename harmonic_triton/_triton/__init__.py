"""The Triton backend: launchers with the interface of the PyTorch backend.

Forward: norms, target geometry, online pass over the classes in parallel shares, merge. Backward: the classes are taken
in slices that fit the memory budget; a kernel writes a slice of A, two library products consume it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from harmonic_triton._dispatch import interpreted
from harmonic_triton._numerics import Rows, full_fp32
from harmonic_triton._triton import backward, forward
from harmonic_triton._triton.configs import FEATURE_BLOCK, ROW_BLOCK, ROW_WARPS, tile_config

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for a slice of A and of fp32 dW
GRID_LIMIT = 65535  # programs along the second axis of a grid


class _Call:
    """The operands of one call and what every kernel is told about them."""

    def __init__(self, x: Tensor, w: Tensor, target: Tensor, n: Tensor | None, v: Tensor | None, eps: float) -> None:
        self.x, self.w, self.target, self.n, self.v, self.eps = x, w, target, n, v, eps
        self.dot = n is None
        (self.tokens, self.width), self.classes = x.shape, len(w)
        self.strides = (*x.stride(), *w.stride())
        self.config = config = tile_config(x.device, x.dtype)
        self.tile = {
            "DOT": self.dot, "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d,
            "UPCAST": interpreted(), "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip
        self.rows = {"BLOCK_N": ROW_BLOCK, "BLOCK_D": FEATURE_BLOCK, "num_warps": ROW_WARPS}
        self.row_grid = (triton.cdiv(self.tokens, ROW_BLOCK),)
        self.v_sum = None if v is None else v.sum()
        new = x.new_empty
        self.norms = None
        if not self.dot:
            self.norms = new(self.classes, dtype=torch.float32)
            forward.norms_kernel[(triton.cdiv(self.classes, ROW_BLOCK),)](
                w, self.norms, self.classes, self.width, *w.stride(), **self.rows
            )
        self.target_ref = new(self.tokens, dtype=torch.float64)  # s_c, or x.w_c
        self.own = new(self.tokens, dtype=torch.float32)
        forward.geometry_kernel[self.row_grid](
            x, w, target, self.target_ref, self.own, self.tokens, self.width, *self.strides, DOT=self.dot, **self.rows
        )


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
    smoothing = v is not None
    out = Rows.zeros(len(x), x.new_empty((), dtype=torch.float32), moments, smoothing)
    if not len(x):
        return out
    with _on_device(x):
        call = _Call(x, w, torch.where(target == ignore_index, -1, target), n, v, eps)
        shares, each = _splits(call)
        partial = x.new_empty((3 + smoothing, shares, call.tokens), dtype=torch.float32)
        index = target.new_empty((shares, call.tokens), dtype=torch.int32)
        best, total, mean = partial[:3]
        smooth = partial[3] if smoothing else None
        forward.forward_kernel[(triton.cdiv(call.tokens, call.config.block_n), shares)](
            x, w, call.norms, call.target, call.target_ref, call.own, n, v, best, index, total, mean, smooth,
            call.tokens, call.classes, call.width, eps, each, *call.strides,
            MOMENTS=moments, SMOOTHING=smoothing, **call.tile,
        )  # fmt: skip
        forward.finish_kernel[call.row_grid](
            x, w, call.target, call.target_ref, call.own, n, v, call.v_sum, best, index, total, mean, smooth,
            out.nll, out.score_mean, out.entropy, out.smooth, out.share_score, out.share_sum, out.share_rest,
            out.rival_score, out.rival,
            call.tokens, call.width, eps, shares, *call.strides,
            DOT=call.dot, MOMENTS=moments, SMOOTHING=smoothing, **call.rows,
        )  # fmt: skip
    return out._replace(target_ref=call.target_ref.float())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32: 16-bit operands accumulate and stay in fp32, fp32 operands never go through TF32."""
    if a.dtype == torch.float32:
        with full_fp32():
            return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def rows_backward(
    x: Tensor, w: Tensor, target: Tensor, n: Tensor, v: Tensor | None, g: Tensor, g_smooth: Tensor | None, rows: Rows,
    eps: float, alpha: float, ignore_index: int, need_x: bool, need_w: bool, budget: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dX, dW), distances computed again. Tokens without upstream gradient contribute nothing, not even their NaN."""
    dx, dw = x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0)
    if not len(x):
        return dx, dw.zero_()
    smoothing, scaled = g_smooth is not None, x.dtype == torch.float16
    used = (target != ignore_index) & ((g != 0) if g_smooth is None else (g != 0) | (g_smooth != 0))
    with _on_device(x):
        call = _Call(x, w, torch.where(used, target, -1), n, v, eps)
        token_factors = x.new_empty((6, call.tokens), dtype=torch.float32)
        p_coef, v_coef, a_target, a_rival, r_part, unscale = token_factors
        far = x.new_empty(call.tokens, dtype=torch.int8)
        backward.coefficient_kernel[(triton.cdiv(call.tokens, 128),)](
            call.target, call.target_ref, call.own, call.norms, n, v, call.v_sum, g, g_smooth,
            rows.nll, rows.rival, rows.rival_score, p_coef, v_coef, a_target, a_rival, r_part, unscale, far,
            call.tokens, eps, DOT=call.dot, SMOOTHING=smoothing, SCALED=scaled, BLOCK_N=128, num_warps=ROW_WARPS,
        )  # fmt: skip
        if need_w:
            operand = torch.where(
                used.unsqueeze(1), x, 0
            )  # a NaN in a token that does not count stays out of the product
            unproduct = x.new_ones((), dtype=torch.float32)
            if scaled:
                operand = operand.float() * unscale.unsqueeze(1)
                unproduct = torch.exp2(10 - operand.abs().amax().clamp_min(2.0**-110).log2().ceil())
                operand = (operand * unproduct).to(x.dtype)
            classes = torch.where(used, torch.stack([target, rows.rival]), call.classes).flatten()
            order = classes.argsort(stable=True)
            starts = torch.searchsorted(classes[order], torch.arange(call.classes + 1, device=x.device))
            tokens, coefficients = order % call.tokens, torch.cat([a_target, a_rival])[order]
        product = x.new_zeros(x.shape if need_x else 0, dtype=torch.float32)
        row_sums = partial = columns = column_sums = None  # dot products need none
        if not call.dot:
            row_sums = x.new_zeros((2, call.tokens), dtype=torch.float32)
        block_n, block_v = call.config.block_n, call.config.block_v
        per_class = call.tokens * x.element_size() + 4 * call.width * need_w + 4 * triton.cdiv(call.tokens, block_n)
        width = block_v * min(max(1, (budget or DEFAULT_BUDGET) // per_class // block_v), GRID_LIMIT)
        a = x.new_empty((call.tokens, min(width, triton.cdiv(call.classes, 8) * 8)))
        for first in range(0, call.classes, width):
            here = min(width, call.classes - first)
            tiles, row_tiles = triton.cdiv(here, block_v), triton.cdiv(call.tokens, block_n)
            if row_sums is not None:
                partial = x.new_empty((2, tiles, call.tokens), dtype=torch.float32)
                columns = x.new_empty((row_tiles, here), dtype=torch.float32)
            backward.gradient_kernel[(row_tiles, tiles)](
                x, w, call.norms, call.target, call.target_ref, call.own, n, v, rows.nll, rows.rival,
                p_coef, v_coef, unscale, a, partial, columns,
                call.tokens, call.classes, call.width, eps, first, here, a.stride(0), *call.strides,
                SMOOTHING=smoothing, **call.tile,
            )  # fmt: skip
            if row_sums is not None and partial is not None and columns is not None:
                row_sums += partial.sum(1)
                column_sums = columns.sum(0)
            if need_x:
                product += _product(a[:, :here], w[first : first + here])
            if need_w:
                backward.finish_w_kernel[(here, triton.cdiv(call.width, FEATURE_BLOCK))](
                    x, w, _product(a[:, :here].t(), operand), column_sums, starts, tokens, coefficients, dw,
                    unproduct, call.width, first, *call.strides, DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
                )  # fmt: skip
        if need_x:
            backward.finish_x_kernel[call.row_grid + (triton.cdiv(call.width, FEATURE_BLOCK),)](
                x, w, call.target, rows.rival, a_target, a_rival, r_part, far, unscale, row_sums, product, dx,
                call.tokens, call.width, *call.strides, DOT=call.dot, UPCAST=call.tile["UPCAST"], **call.rows,
            )  # fmt: skip
    return dx, dw
