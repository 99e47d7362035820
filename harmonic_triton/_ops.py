"""Registered operators with their fakes and vmap rules, and the autograd Functions around them.

Imports torch only; a backend is imported when an operator runs on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._dispatch import backend_module
from harmonic_triton._numerics import Rows, compute_dtype, exponent_gradient

_LIBRARY = torch.library.Library("harmonic_triton", "FRAGMENT")

_ROWS = ", ".join(f"Tensor {name}" for name in Rows._fields)

_LIBRARY.define(
    "rows_forward(Tensor x, Tensor w, Tensor target, Tensor? n, Tensor? v, float eps, float alpha, int ignore_index,"
    " bool moments, str backend, int budget)"
    f" -> ({_ROWS})"
)
_LIBRARY.define(
    "rows_backward(Tensor x, Tensor w, Tensor target, Tensor? n, Tensor? v, Tensor g, Tensor? g_smooth,"
    f" {_ROWS}, float eps, float alpha, int ignore_index, bool need_x, bool need_w, str backend, int budget)"
    " -> (Tensor dx, Tensor dw)"
)
_LIBRARY.define(
    "reduced_forward(Tensor x, Tensor w, Tensor target, Tensor? n, Tensor? v, Tensor a, Tensor? b, float eps,"
    " float alpha, int ignore_index, bool need_x, bool need_w, bool need_n, bool moments, str backend, int budget)"
    f" -> (Tensor loss, Tensor dx, Tensor dw, Tensor dn, {_ROWS})"
)
_LIBRARY.define("positive(Tensor value, str what) -> Tensor")


def known(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which targets are classes or to be ignored."""
    return ((target >= 0) & (target < classes)) | (target == ignore_index)


def check_values(target: Tensor, classes: int, ignore_index: int, n: Tensor | None) -> None:
    """The checks that need values: at once on the CPU, by a device-side assert on a GPU."""
    ok = known(target, classes, ignore_index)
    if target.device.type == "cpu":
        if not bool(ok.all()):
            worst = target[~ok][0].item()
            raise ValueError(
                f"target holds {worst}, outside 0 ... {classes - 1} (linear_weight has {classes} rows);"
                f" mark tokens to skip with ignore_index={ignore_index}"
            )
    else:
        torch._assert_async(ok.all(), "harmonic_triton: target out of range")
    if n is not None:
        check_exponent(n)


def check_exponent(n: Tensor) -> None:
    """n > 0 and finite: at once on the CPU, by a device-side assert on a GPU."""
    good = (n > 0) & n.isfinite()
    if n.device.type == "cpu":
        if not bool(good):
            raise ValueError(f"n must be a finite harmonic exponent > 0, got {n.item()}")
    else:
        torch._assert_async(good, "harmonic_triton: n must be finite and > 0")


def _positive(value: Tensor, what: str) -> Tensor:
    good = (value > 0) & value.isfinite()
    if value.device.type != "cpu":
        torch._assert_async(good.all(), f"harmonic_triton: {what}")
    elif not bool(good.all()):
        raise ValueError(f"{what}, got {value[~good].flatten()[0].item()}")
    return value.clone()


def positive(value: Tensor, what: str) -> Tensor:
    """The value, if it is positive and finite: otherwise a ValueError on the CPU, a device-side assert on a GPU.

    It is an operator so that ``vmap`` and ``torch.compile`` check as well. ``what`` names it and says what it must be.
    """
    checked = torch.ops.harmonic_triton.positive(value.detach(), what)
    return torch.where(checked > 0, value, 0)  # the value with its derivatives; no compiler can drop the check


_LIBRARY.impl("positive", _positive, "CompositeExplicitAutograd")
torch.library.register_fake("harmonic_triton::positive", lambda value, what: torch.empty_like(value), lib=_LIBRARY)
torch.library.register_vmap(
    "harmonic_triton::positive",
    lambda info, in_dims, value, what: (torch.ops.harmonic_triton.positive(value, what), in_dims[0]),
    lib=_LIBRARY,
)


def _plainly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Without autograd, and without autocast, which would round the operands of every product inside.

    Vectors arrive dense and, as numbers do, on a boundary of 16 bytes, whatever their strides were: a kernel reads one
    entry after the other, and is compiled once more for every other alignment.
    """

    @functools.wraps(run)
    def body(x: Tensor, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return run(x, *(_dense(arg) if isinstance(arg, Tensor) and arg.dim() < 2 else arg for arg in args))

    return body


def _dense(vector: Tensor) -> Tensor:
    vector = vector.contiguous()
    return vector.clone() if vector.data_ptr() % 16 else vector


def inside(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets that can index, and which were bad: a device whose assert does nothing (ROCm's) goes on with them."""
    bad = ~known(target, classes, ignore_index)
    return target.masked_fill(bad, 0), bad


@_plainly
def _rows_forward(x, w, target, n, v, eps, alpha, ignore_index, moments, backend, budget):  # type: ignore[no-untyped-def]
    check_values(target, len(w), ignore_index, n)
    target, bad = inside(target, len(w), ignore_index)
    rows = backend_module(backend).rows_forward(x, w, target, n, v, eps, alpha, ignore_index, moments, budget)
    rows.nll.masked_fill_(bad, math.nan)
    return tuple(rows)


@_plainly
def _rows_backward(x, w, target, n, v, g, g_smooth, *rest):  # type: ignore[no-untyped-def]
    *rows, eps, alpha, ignore_index, need_x, need_w, backend, budget = rest
    target, _ = inside(target, len(w), ignore_index)
    run = backend_module(backend).rows_backward
    return run(x, w, target, n, v, g, g_smooth, Rows(*rows), eps, alpha, ignore_index, need_x, need_w, budget)


@_plainly
def _reduced_forward(  # type: ignore[no-untyped-def]
    x, w, target, n, v, a, b, eps, alpha, ignore_index, need_x, need_w, need_n, moments, backend, budget
):
    check_values(target, len(w), ignore_index, n)
    target, bad = inside(target, len(w), ignore_index)
    run = backend_module(backend).reduced_forward
    loss, *gradients, rows = run(
        x, w, target, n, v, a, b, eps, alpha, ignore_index, need_x, need_w, need_n, moments, budget
    )
    rows.nll.masked_fill_(bad, math.nan)
    return loss.masked_fill_(bad.any(), math.nan), *gradients, *rows


def _rows_forward_fake(x, w, target, n, v, eps, alpha, ignore_index, moments, backend, budget):  # type: ignore[no-untyped-def]
    like = x.new_empty((), dtype=compute_dtype(x.dtype))
    return tuple(Rows.zeros(x.shape[0], like, moments, v is not None))


def _rows_backward_fake(x, w, *rest):  # type: ignore[no-untyped-def]
    need_x, need_w = rest[-4:-2]
    return x.new_empty(x.shape if need_x else (0,)), w.new_empty(w.shape if need_w else (0,))


def _reduced_forward_fake(  # type: ignore[no-untyped-def]
    x, w, target, n, v, a, b, eps, alpha, ignore_index, need_x, need_w, need_n, moments, *_
):
    like = x.new_empty((), dtype=compute_dtype(x.dtype))
    dx, dw = like.new_empty(x.shape if need_x else (0,)), like.new_empty(w.shape if need_w else (0,))
    return like, dx, dw, like.new_empty(()), *Rows.zeros(x.shape[0], like, moments, v is not None)


def _one_at_a_time(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule: run the operator for each member of the batch and stack what it returns."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            operator(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        out = tuple(torch.stack(results) for results in zip(*calls, strict=True))
        return out, (0,) * len(out)

    return rule


for _name, _run, _fake in (
    ("rows_forward", _rows_forward, _rows_forward_fake),
    ("rows_backward", _rows_backward, _rows_backward_fake),
    ("reduced_forward", _reduced_forward, _reduced_forward_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"harmonic_triton::{_name}", _fake, lib=_LIBRARY)
    _operator = getattr(torch.ops.harmonic_triton, _name).default
    torch.library.register_vmap(f"harmonic_triton::{_name}", _one_at_a_time(_operator), lib=_LIBRARY)


def requires_grad(tensor: Tensor) -> bool:
    """Whether a gradient can flow, also to a tensor that ``vmap`` has wrapped: the wrapper says no."""
    if not torch.compiler.is_compiling():
        while not tensor.requires_grad and torch._C._functorch.is_batchedtensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def forward_mode() -> bool:
    """Whether tensors may carry tangents: inside ``torch.func.jvp`` and the like, or ``forward_ad.dual_level``."""
    return torch.autograd.forward_ad._current_level >= 0


NO_TANGENT = (
    "harmonic_triton: a fused loss has no derivative in forward mode (jvp, jacfwd, hessian, linearize, dual tensors);"
    ' use jacrev or grad, or backend="reference" (dense, fp64), which has one'
)


class _NoTangent(torch.autograd.Function):
    """Passes its tensor through; a tangent that it carries is an error instead of being dropped."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:  # type: ignore[override]
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], tensor: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return _NoTangent.apply(tensor), in_dims[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError(NO_TANGENT)


def without_tangents(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors; in forward mode an error for one with a tangent, which the operators would not see."""
    if not forward_mode():
        return tensors
    if torch.compiler.is_compiling():  # dynamo would drop the check; without fullgraph it goes back to eager from here
        raise NotImplementedError(NO_TANGENT)
    return tuple(None if tensor is None else _NoTangent.apply(tensor) for tensor in tensors)


class _FirstOrderOnly(torch.autograd.Function):
    """Passes gradients through; differentiating them again is an error instead of a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dx, dw, dn, x, w, n, g, g_smooth):  # type: ignore[no-untyped-def]  # no *args: dynamo counts parameters
        return dx.view_as(dx), dw.view_as(dw), dn.view_as(dn)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            "harmonic_triton: the gradient of a fused loss cannot be differentiated again;"
            ' use backend="reference" (dense, fp64) for second derivatives'
        )


class RowsFunction(torch.autograd.Function):
    """Per-token losses (nll, smooth) and the sums beside them; the distances are computed again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, n, v, target, *options):  # type: ignore[no-untyped-def]
        return torch.ops.harmonic_triton.rows_forward(x, w, target, n, v, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, w, n, v, target, *ctx.options = inputs
        ctx.mark_non_differentiable(*(field for name, field in zip(Rows._fields, output, strict=True)
                                      if name not in ("nll", "smooth")))  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w, n, v, target, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _mean: Any, _entropy: Any, g_smooth: Tensor | None, *_: Any):  # type: ignore[no-untyped-def, override]
        x, w, n, v, target, *fields = ctx.saved_tensors
        eps, alpha, ignore_index, _, backend, budget = ctx.options
        rows = Rows(*fields)
        need_x, need_w, need_n = ctx.needs_input_grad[:3]
        g = torch.zeros_like(rows.nll) if g is None else g
        if v is None:
            g_smooth = None
        elif g_smooth is None:
            g_smooth = torch.zeros_like(rows.nll)
        dx, dw = x.new_zeros(0), w.new_zeros(0)
        if need_x or need_w:
            dx, dw = torch.ops.harmonic_triton.rows_backward(
                x, w, target, n, v, g, g_smooth, *rows, eps, alpha, ignore_index, need_x, need_w, backend, budget
            )
        dn = exponent_gradient(rows, n, g, g_smooth).to(n.dtype) if need_n else rows.nll.new_zeros(())
        dx, dw, dn = _FirstOrderOnly.apply(dx, dw, dn, x, w, n, g, g_smooth)
        return dx if need_x else None, dw if need_w else None, dn if need_n else None, *(None,) * 8


class ReducedFunction(torch.autograd.Function):
    """A weighted sum of token losses whose gradients are formed in the forward pass: three products, not four."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, n, v, target, a, b, *options):  # type: ignore[no-untyped-def]
        return torch.ops.harmonic_triton.reduced_forward(x, w, target, n, v, a, b, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros the size of dW for the outputs without gradient
        ctx.save_for_backward(*inputs[:3], *output[1:4])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any):  # type: ignore[no-untyped-def, override]
        if g is None:
            return (None,) * 16
        x, w, n, *saved = ctx.saved_tensors
        needed = zip(ctx.needs_input_grad[:2], saved, (x, w), strict=False)
        if any(need and d.shape != like.shape for need, d, like in needed):
            raise RuntimeError("harmonic_triton: a gradient is asked for that the forward pass was not told of")
        dx, dw, dn = (d * g for d in saved)
        dx, dw = dx.to(x.dtype), dw.to(w.dtype)
        dx, dw, dn = _FirstOrderOnly.apply(dx, dw, dn, x, w, n, g, None)
        need_x, need_w, need_n = ctx.needs_input_grad[:3]
        return dx if need_x else None, dw if need_w else None, dn if need_n else None, *(None,) * 13
