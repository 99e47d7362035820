"""Registered operators with their fakes and vmap rules, and the autograd Functions around them.

Imports torch only; a backend is imported when an operator runs on it. Their arguments are the parts of
``fused.problem``, laid one after the other.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton._common.transforms import compiled_transform, whole
from harmonic_triton.fused import checks, strategy
from harmonic_triton.fused.problem import Backend, Finishing, Operands, Problem, Wanted, schema, unpack
from harmonic_triton.fused.results import (
    DIFFERENTIABLE,
    TokenResults,
    TokenWeights,
    Unfinished,
    Upstream,
    exponent_gradient,
    summed,
    token_losses,
    upstream_of,
)

_LIBRARY = torch.library.Library("harmonic_triton", "FRAGMENT")
_RESULTS = ", ".join(f"Tensor {name}" for name in TokenResults._fields)

_BACKENDS = {"torch": "harmonic_triton.fused.pytorch.backend", "triton": "harmonic_triton.fused.triton.backend"}


@functools.cache
def backend_module(name: str) -> Backend:
    """The module behind a fast backend; Triton is imported here and nowhere else."""
    return cast(Backend, importlib.import_module(_BACKENDS[name]))


def _plainly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Without autograd, and without autocast, which would round the operands of every product inside."""

    @functools.wraps(run)
    def body(operands: Operands, *parts: Any) -> Any:
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(operands.x.device.type):
            return run(operands, *parts)
        with torch.no_grad(), torch.autocast(operands.x.device.type, enabled=False):
            return run(operands, *parts)

    return body


def _dense(*parts: Any) -> list[Any]:
    """Vectors dense and, as numbers are, on a boundary of 16 bytes, whatever their strides were: a kernel reads one entry
    after the other, and is compiled once more for every other alignment."""
    return [part._make(map(_dense_vector, part)) if any(map(_is_strange, part)) else part for part in parts]


def _is_strange(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() > 1:
        return False
    return not value.is_contiguous() or value.data_ptr() % 16 != 0


def _dense_vector(value: Any) -> Any:
    if not _is_strange(value):
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _checked(operands: Operands, ignore_index: int) -> tuple[Operands, Tensor | None]:
    """Operands whose targets and exponent were checked, and the bad targets where there may be some: not on a CPU."""
    given = operands.target
    operands, bad = _indexable(operands, ignore_index)
    if bad is not None:
        checks.check_targets(given, ~bad, operands.w.shape[0], ignore_index)
    if operands.n is not None:
        checks.check_exponent(operands.n)
    return operands, bad


def _indexable(operands: Operands, ignore_index: int) -> tuple[Operands, Tensor | None]:
    """Operands whose targets can index or are ignored, and which were neither, where there may be some."""
    if checks.all_known(operands.target, operands.w.shape[0], ignore_index):
        return operands, None
    ok = checks.known(operands.target, operands.w.shape[0], ignore_index)
    return operands._replace(target=operands.target.masked_fill(~ok, 0)), ~ok


_FORWARD = (Operands, Problem)
_BACKWARD = (Operands, TokenResults, Upstream, Problem, Wanted)
_FORWARD_BACKWARD = (Operands, TokenWeights, Problem, Wanted)
_FINISH = (Operands, Unfinished, Finishing, Problem, Wanted)
_UNFINISHED = ", ".join(f"Tensor unfinished_{name}" for name in Unfinished._fields)
_RETURNS = {
    "forward": (_FORWARD, _RESULTS),
    "backward": (_BACKWARD, "Tensor dx, Tensor dw, Tensor db"),
    "forward_backward": (_FORWARD_BACKWARD, f"Tensor loss, Tensor dn, {_UNFINISHED}, {_RESULTS}"),
    "finish": (_FINISH, "Tensor dx, Tensor dw, Tensor db"),
}


@_plainly
def _forward(operands: Operands, problem: Problem) -> TokenResults:
    (operands,) = _dense(operands)
    operands, bad = _checked(operands, problem.ignore_index)
    results = backend_module(problem.backend).forward(operands, problem)
    if bad is not None:
        results.nll.masked_fill_(bad, math.nan)
    return results


@_plainly
def _backward(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    operands, results, upstream = _dense(operands, results, upstream)
    operands, _ = _indexable(operands, problem.ignore_index)
    return backend_module(problem.backend).backward(operands, results, upstream, problem, wanted)


@_plainly
def _forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Unfinished, TokenResults]:
    operands, weights = _dense(operands, weights)
    operands, bad = _checked(operands, problem.ignore_index)
    results, unfinished = backend_module(problem.backend).forward_backward(operands, weights, problem, wanted)
    if bad is not None:
        results.nll.masked_fill_(bad, math.nan)
    dtype, classes = results.nll.dtype, operands.w.shape[0]
    exact = results._replace(**{name: getattr(results, name).double() for name in summed(weights)})
    exact_weights = TokenWeights._make(w if w is None else w.double() for w in weights)
    loss = token_losses(exact, exact_weights, problem.mix, classes, problem.token_scaling)
    dn = results.nll.new_zeros(())
    if wanted.n and operands.n is not None:
        upstream = upstream_of(exact, exact_weights, problem.mix, classes, problem.token_scaling)
        dn = exponent_gradient(exact, operands.n, upstream).to(dtype)
    return loss.sum().to(dtype), dn, unfinished, results


@_plainly
def _finish(
    operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    operands, unfinished, finishing = _dense(operands, unfinished, finishing)
    operands, _ = _indexable(operands, problem.ignore_index)
    return backend_module(problem.backend).finish(operands, unfinished, finishing, problem, wanted)


def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, problem = unpack(flat, *_FORWARD)
    like = operands.x.new_empty((), dtype=compute_dtype(operands.x.dtype))
    return tuple(TokenResults.zeros(operands.x.shape[0], like, problem.want_scores, operands.smoothing))


def _gradients_fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    (operands,), wanted = unpack(flat, Operands), Wanted._make(flat[-len(Wanted._fields) :])
    x, w = operands.x, operands.w
    db = w.new_empty(w.shape[:1] if wanted.bias else (0,), dtype=compute_dtype(w.dtype))
    return x.new_empty(x.shape if wanted.x else (0,)), w.new_empty(w.shape if wanted.w else (0,)), db


def _forward_backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    operands, _, problem, wanted = unpack(flat, *_FORWARD_BACKWARD)
    results = _forward_fake(*operands, *problem)
    new = results[0].new_empty
    return new(()), new(()), *map(new, strategy.unfinished_shapes(problem, operands, wanted)), *results


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


def _separate(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors one after the other; what is empty shares no memory with another, as an operator's results must not."""
    for value in values:
        if not isinstance(value, Tensor):
            yield from _separate(value)
        else:
            yield value if value.numel() else value.new_empty(value.shape)


def _operator(run: Callable[..., Any], parts: tuple[Any, ...]) -> Callable[..., Any]:
    """The same function of the flat arguments that an operator has."""

    def body(*flat: Any) -> tuple[Tensor, ...]:
        return tuple(_separate(run(*unpack(flat, *parts))))

    return body


_BODIES = {"forward": _forward, "backward": _backward, "forward_backward": _forward_backward, "finish": _finish}

for _name, _fake in (
    ("forward", _forward_fake),
    ("backward", _gradients_fake),
    ("forward_backward", _forward_backward_fake),
    ("finish", _gradients_fake),
):
    _parts, _returned = _RETURNS[_name]
    _LIBRARY.define(f"{_name}({schema(*_parts)}) -> ({_returned})")
    _LIBRARY.impl(_name, _operator(_BODIES[_name], _parts), "CompositeExplicitAutograd")
    torch.library.register_fake(f"harmonic_triton::{_name}", _fake, lib=_LIBRARY)
    _called = getattr(torch.ops.harmonic_triton, _name).default
    torch.library.register_vmap(f"harmonic_triton::{_name}", _one_at_a_time(_called), lib=_LIBRARY)


_SEEN_THROUGH = frozenset({Tensor, torch.nn.Parameter})
_LEGACY_BATCHED: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # of ``is_grads_batched``


def _nobody_looks_on(*parts: tuple[Any, ...]) -> bool:
    """No compiler, transform, mode, profiler or subclass of Tensor, which all see operators."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return False
    for part in parts:
        for value in part:
            if isinstance(value, Tensor) and (type(value) not in _SEEN_THROUGH or _LEGACY_BATCHED(value)):
                return False
    return True


def perform(name: str, *parts: tuple[Any, ...]) -> Any:
    """What the operator does; without the operator where nobody would see it, which is a tenth of a small call's time."""
    if _nobody_looks_on(*parts):
        return _BODIES[name](*parts)
    return getattr(torch.ops.harmonic_triton, name)(*chain.from_iterable(parts))


class _FirstOrderOnly(torch.autograd.Function):
    """Passes gradients through; differentiating them again is an error instead of a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dx, dw, dn, db, x, w, n, b, g, g_smooth, g_ref):  # type: ignore[no-untyped-def]  # no *args: dynamo counts parameters
        return dx.view_as(dx), dw.view_as(dw), dn.view_as(dn), db.view_as(db)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # type: ignore[override]
        raise RuntimeError(
            "harmonic_triton: the gradient of a fused loss cannot be differentiated again;"
            ' use backend="reference" (dense, fp64) for second derivatives'
        )


def first_order_only(
    dx: Tensor, dw: Tensor, dn: Tensor, db: Tensor, operands: Operands, *upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same gradients; an error where they are differentiated again."""
    if not torch.is_grad_enabled():  # no graph of this backward pass is made
        return dx, dw, dn, db
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _FirstOrderOnly.apply(
        dx, dw, dn, db, operands.x, operands.w, operands.n, operands.bias, *upstream
    )
    return gradients


def slots(count: int, dx: Tensor, dw: Tensor, dn: Tensor, db: Tensor, need: Wanted) -> tuple[Tensor | None, ...]:
    """What ``backward`` of a Function returns whose ``count`` arguments begin with the operands."""
    given = Operands(
        x=dx if need.x else None, w=dw if need.w else None, target=None,  # type: ignore[arg-type]
        n=dn if need.n else None, smooth_weight=None, bias=db if need.bias else None,
    )  # fmt: skip
    return *given, *(None,) * (count - len(given))


def _needed(ctx: Any) -> Wanted:
    needs = Operands(*ctx.needs_input_grad[: len(Operands._fields)])
    return Wanted(needs.x, needs.w, needs.n, needs.bias)  # type: ignore[arg-type]


class ForwardFunction(torch.autograd.Function):
    """Per-token results of which ``DIFFERENTIABLE`` have gradients; the distances are computed again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat):  # type: ignore[no-untyped-def]
        return tuple(_separate(perform("forward", *unpack(flat, *_FORWARD))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operands, ctx.problem = unpack(inputs, *_FORWARD)
        ctx.mark_non_differentiable(
            *(field for name, field in zip(TokenResults._fields, output, strict=True) if name not in DIFFERENTIABLE)
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[no-untyped-def, override]
        operands, results = unpack(ctx.saved_tensors, Operands, TokenResults)
        (given,), (x, w), need = unpack(gradients, TokenResults), operands[:2], _needed(ctx)
        nll = torch.zeros_like(results.nll) if given.nll is None else given.nll
        smooth = None
        if operands.smoothing:
            smooth = torch.zeros_like(nll) if given.smooth is None else given.smooth
        upstream = Upstream(nll, smooth, given.target_ref)
        dx, dw, db = x.new_zeros(0), w.new_zeros(0), results.nll.new_zeros(0)
        if need.x or need.w or need.bias:
            dx, dw, db = perform("backward", operands, results, upstream, ctx.problem, need)
        dn = results.nll.new_zeros(())
        if need.n:
            dn = exponent_gradient(results, operands.n, upstream).to(operands.n.dtype)
        dx, dw, dn, db = first_order_only(dx, dw, dn, db, operands, *upstream)
        return slots(len(Operands._fields) + len(Problem._fields), dx, dw, dn, db, need)


_IN_BATCHES = "Batched"  # the dispatch key of tensors that ``is_grads_batched`` hands in: not torch.func's


def _last_backward(g: Tensor) -> bool:
    """Whether the graph is not kept and nothing traces, transforms or repeats this backward pass: nobody comes after it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._dispatch_keys(g).has(_IN_BATCHES):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()


class ForwardBackwardFunction(torch.autograd.Function):
    """A weighted sum of token losses whose gradients are formed in the forward pass, as far as that can be done there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat):  # type: ignore[no-untyped-def]
        return tuple(_separate(perform("forward_backward", *unpack(flat, *_FORWARD_BACKWARD))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros the size of dW for the outputs without gradient
        operands, _, ctx.problem, ctx.wanted = unpack(inputs, *_FORWARD_BACKWARD)
        _, dn, *rest = output
        unfinished, results = unpack(tuple(rest), Unfinished, TokenResults)
        ctx.arguments = len(inputs)
        ctx.save_for_backward(*operands, *unfinished, results.rival, dn)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any):  # type: ignore[no-untyped-def, override]
        if g is None:
            return (None,) * ctx.arguments
        dx, dw, dn, db, need = _finished(ctx, _needed(ctx), g)
        return slots(ctx.arguments, dx, dw, dn, db, need)


class _PlainForwardBackward(torch.autograd.Function):
    """The same where nobody looks on, with one output: autograd's work of twenty is a tenth of a small call's time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, n: Tensor | None, bias: Tensor | None, parts: tuple[Any, ...],
        found: list[TokenResults],
    ) -> Tensor:  # fmt: skip
        loss, dn, unfinished, results = _forward_backward(*parts)
        operands, _, ctx.problem, ctx.wanted = parts
        found.append(results)
        ctx.save_for_backward(*operands, *unfinished, results.rival, dn)
        return cast(Tensor, loss)

    @staticmethod
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def, override]
        dx, dw, dn, db, need = _finished(ctx, Wanted(*ctx.needs_input_grad[:4]), g)
        given = (gradient if asked else None for gradient, asked in zip((dx, dw, dn, db), need, strict=True))
        return *given, None, None


def _finished(ctx: Any, need: Wanted, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Wanted]:
    """The gradients of a weighted sum, those of them that were known when they were formed."""
    *saved, rival, dn = ctx.saved_tensors
    operands, unfinished = unpack(saved, Operands, Unfinished)
    if any(asked and not known for asked, known in zip(need, ctx.wanted, strict=True)):
        raise RuntimeError("harmonic_triton: a gradient is asked for that the forward pass was not told of")
    finishing = Finishing(rival, g, _last_backward(g))
    dx, dw, db = perform("finish", operands, unfinished, finishing, ctx.problem, need)
    return *first_order_only(dx, dw, dn * g if need.n else dn, db, operands, g, None, None), need


for _name, _function in (("forward", ForwardFunction), ("forward_backward", ForwardBackwardFunction)):
    torch.library.register_autograd(  # for exported graphs, which hold operators alone
        f"harmonic_triton::{_name}", _function.backward, setup_context=_function.setup_context, lib=_LIBRARY
    )


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, in eager mode without its look at the signature, a sixth of a small call's time."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply(*arguments)


@whole
def _whole(name: str, *flat: Any) -> tuple[Tensor, ...]:
    return tuple({"forward": ForwardFunction, "forward_backward": ForwardBackwardFunction}[name].apply(*flat))


def forward(operands: Operands, problem: Problem, *, differentiable: bool = False) -> TokenResults:
    """Per-token results, with gradients or without."""
    if not differentiable:
        return TokenResults._make(perform("forward", operands, problem))
    flat = (*operands, *problem)
    return TokenResults._make(_whole("forward", *flat) if compiled_transform() else _applied(ForwardFunction, *flat))


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[Tensor, TokenResults]:
    """The weighted sum of the losses, with gradients, and the results that it is made of, without."""
    parts = (operands, weights, problem, wanted)
    if _nobody_looks_on(operands, weights):
        found: list[TokenResults] = []
        loss = _applied(_PlainForwardBackward, operands.x, operands.w, operands.n, operands.bias, parts, found)
        return loss, found[0]
    flat = tuple(chain.from_iterable(parts))
    transform = compiled_transform()
    loss, *rest = _whole("forward_backward", *flat) if transform else _applied(ForwardBackwardFunction, *flat)
    return loss, TokenResults._make(rest[-len(TokenResults._fields) :])
