"""A call of one of the two losses, in four steps: check, prepare, run, reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harmonic_triton import reference
from harmonic_triton._common import validate
from harmonic_triton._common.dispatch import resolve
from harmonic_triton._common.precision import compute_dtype
from harmonic_triton._common.transforms import requires_grad
from harmonic_triton.fused import checks, ops, strategy
from harmonic_triton.fused.options import Options
from harmonic_triton.fused.parallel import vocabulary
from harmonic_triton.fused.parallel.dtensor import localized
from harmonic_triton.fused.parallel.shard import Shard, shard_of
from harmonic_triton.fused.problem import Operands, Problem, Wanted
from harmonic_triton.fused.results import TokenResults, TokenWeights, token_losses
from harmonic_triton.fused.tangents import without_tangents


@dataclass(frozen=True)
class Prepared:
    """A checked call: flat operands, the weights of every token, what is to be computed, and the caller's shape."""

    operands: Operands
    weights: TokenWeights
    problem: Problem
    wanted: Wanted
    backend: str  # with "reference", which takes the options themselves
    options: Options
    shape: torch.Size  # of target
    shift: int
    shard: Shard | None = None  # of the class vectors, where other processes have the rest
    reduce_input: bool = True  # whether dX is added up over them


def loss_and_statistics(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: Options, *, harmonic: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and, where asked for, the fields of its statistics and the log-sum-exp."""
    local = localized(input, linear_weight, target, options.process_group)
    input, linear_weight = _check(local.input, local.linear_weight, local.target, options, local.group is not None)
    shard = None
    if local.group is not None:
        equal = {name: value if isinstance(value, Tensor) else None for name, value in _shared(options).items()}
        facts = _facts(input, local.target, options, harmonic)
        shard = shard_of(local.group, len(linear_weight), input, facts, {"target": local.target, **equal})
        validate.class_weight(options.class_weight, shard.classes, linear_weight.device)
    prepared = _prepare(input, linear_weight, local.target, options, harmonic, shard, local.reduce_input)
    losses, statistics = _run_reference(prepared) if prepared.backend == "reference" else _run_fused(prepared)
    return _reduce(prepared, losses, statistics)


def _facts(input: Tensor, target: Tensor, options: Options, harmonic: bool) -> dict[str, Any]:
    """What every process of a group must have been given, but for the values of tensors."""
    facts: dict[str, Any] = {"function": "linear_harmonic_loss" if harmonic else "linear_cross_entropy"}
    facts |= {"input.shape": tuple(input.shape), "target.shape": tuple(target.shape), "dtype": input.dtype}
    facts["requires_grad of input"] = input.requires_grad and torch.is_grad_enabled()
    for name, value in vars(options).items():
        if name in ("process_group", "memory_budget"):
            continue
        if name == "bias":  # each process has that of its own rows
            value = value is not None
        elif isinstance(value, Tensor):
            value = tuple(value.shape)
        facts[name] = value
    return facts


def _shared(options: Options) -> dict[str, Any]:
    """The options that may be tensors which every process has as a whole."""
    return {"n": options.n, "class_weight": options.class_weight, "num_items": options.num_items}


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: Options, is_part: bool = False
) -> list[Tensor]:
    """Raise for whatever types, shapes and devices of tensors tell; returns the operands as autocast wants them."""
    validate.tensors(input=input, linear_weight=linear_weight, target=target)
    input, linear_weight = autocast(input, linear_weight)
    validate.features(input, linear_weight, least_rows=0 if is_part else 1)
    validate.labels(input, linear_weight, target, validate.offset(options.shift))
    if not is_part:
        validate.class_weight(options.class_weight, linear_weight.shape[0], linear_weight.device)
    validate.bias(options.bias, linear_weight)
    return [input, linear_weight]


def _prepare(
    input: Tensor, linear_weight: Tensor, target: Tensor, options: Options, harmonic: bool, shard: Shard | None,
    reduce_input: bool,
) -> Prepared:  # fmt: skip
    """Flatten, shift, choose the backend, and weigh the tokens."""
    if any(type(value) is not float for value in (options.eps, options.uniform_mix, options.z_loss)) or (
        type(options.label_smoothing) is not float or type(options.softcap) not in (float, type(None))
    ):  # NumPy's numbers as Python's
        options = replace(
            options, eps=float(options.eps), uniform_mix=float(options.uniform_mix), z_loss=float(options.z_loss),
            label_smoothing=float(options.label_smoothing),
            softcap=None if options.softcap is None else float(options.softcap),
        )  # fmt: skip
    mixed = bool(options.uniform_mix and options.label_smoothing)
    backend = resolve(options.backend, input.device, input.dtype, mixed_smoothing=mixed)
    dtype, shift = compute_dtype(input.dtype), validate.offset(options.shift)
    labels = target.long()
    if shift:
        labels = F.pad(labels[..., shift:], (0, shift), value=options.ignore_index)
    if isinstance(options.num_items, Tensor):
        options = replace(options, num_items=checks.positive(options.num_items, validate.NUM_ITEMS))
    n = exponent_tensor(options.n, input.shape[-1], input.device, dtype) if harmonic else None
    x, w, class_weight = input.reshape(-1, input.shape[-1]), linear_weight, options.class_weight
    bias = None if options.bias is None else options.bias.to(dtype)
    if torch.compiler.is_compiling():
        w = w.view_as(w)  # dynamo does not see that torch.func.grad differentiates what is no operation's result
    if backend != "reference":
        x, w, n, class_weight, bias = without_tangents(x, w, n, class_weight, bias)
    smooth_weight = None
    if options.label_smoothing:
        classes = len(w) if shard is None else shard.classes
        smooth_weight = (x.new_ones(classes) if class_weight is None else class_weight).to(dtype) / classes
    operands = Operands(x, w, labels.reshape(-1), n, smooth_weight, bias)
    wanted = Wanted(*(t is not None and torch.is_grad_enabled() and requires_grad(t) for t in (x, w, n, bias)))
    problem = Problem(
        options.eps, options.uniform_mix, options.ignore_index, options.return_stats or wanted.n,
        backend, options.memory_budget or 0, options.softcap or 0.0, options.token_scaling,
    )  # fmt: skip
    weights = _token_weights(operands.target, class_weight, options, dtype)
    return Prepared(operands, weights, problem, wanted, backend, options, target.shape, shift, shard, reduce_input)


def _token_weights(target: Tensor, class_weight: Tensor | None, options: Options, dtype: torch.dtype) -> TokenWeights:
    counted = target != options.ignore_index
    valid = counted.to(dtype)
    token = valid
    if class_weight is not None:  # of an ignored token not even an infinite weight counts
        token = torch.where(counted, class_weight.to(dtype)[target.clamp(0, len(class_weight) - 1)], 0.0)
    divisor: float | Tensor = 1.0
    if options.num_items is not None:
        items = options.num_items
        divisor = items.to(valid.device, dtype) if isinstance(items, Tensor) else items
    elif options.reduction == "mean":
        total = token.sum()
        divisor = total.clamp_min(1.0) if class_weight is None else total + (total == 0)
    smoothing = options.label_smoothing
    smooth = valid * smoothing / divisor if smoothing else None
    log_sum = valid * options.z_loss / divisor if options.z_loss else None
    nll = token * (1 - smoothing) if smoothing else token
    return TokenWeights(nll / divisor, smooth, log_sum)


def _run_fused(call: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss by a backend: gradients in the forward pass where that is possible and pays, else from the results."""
    operands, problem, wanted, options = call.operands, call.problem, call.wanted, call.options
    reduced = options.reduction != "none"
    if call.shard is not None:
        checks.check_values(operands.target, call.shard.classes, problem.ignore_index, operands.n)
        results = vocabulary.forward(
            operands, problem, call.shard, want_rival=options.return_stats, reduce_input=call.reduce_input
        )
        loss = token_losses(results, call.weights, problem.mix, call.shard.classes, problem.token_scaling)
        loss = loss.sum() if reduced else loss
    # what becomes of a log-sum-exp is not known in the forward pass
    elif reduced and any(wanted) and not options.return_lse and strategy.gradients_in_forward(problem, operands):
        loss, results = ops.forward_backward(operands, call.weights, problem, wanted)
    else:
        results = ops.forward(operands, problem, differentiable=any(wanted))
        loss = token_losses(results, call.weights, problem.mix, len(operands.w), problem.token_scaling)
        loss = loss.sum() if reduced else loss
    more = _statistics(results, operands, problem.ignore_index) if options.return_stats else ()
    return loss, (*more, results.nll + results.target_ref) if options.return_lse else more


def _run_reference(call: Prepared) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss by the dense fp64 form."""
    x, w, target, n, _, bias = call.operands
    eps, ignore_index, options = call.problem.eps, call.problem.ignore_index, call.options
    checks.check_values(target, len(w), ignore_index, n)
    target, bad = checks.inside(target, len(w), ignore_index)
    common: dict[str, Any] = {
        "class_weight": options.class_weight, "ignore_index": ignore_index, "reduction": options.reduction,
        "num_items": options.num_items, "label_smoothing": options.label_smoothing,
        "token_scaling": options.token_scaling,
    }  # fmt: skip
    if n is None:
        loss = reference.linear_cross_entropy(
            x, w, target, z_loss=options.z_loss, bias=bias, softcap=options.softcap, **common
        )
    else:
        loss = reference.linear_harmonic_loss(x, w, target, n=n, eps=eps, uniform_mix=options.uniform_mix, **common)
    more: tuple[Tensor, ...] = ()
    if options.return_stats:
        more = reference.statistics(x, w, target, n, eps, ignore_index, bias, options.softcap)
    if options.return_lse:
        lse = reference.log_sum_exp(x, w, target, ignore_index, bias, options.softcap)
        more = (*more, lse.to(compute_dtype(x.dtype)))
    loss = loss.masked_fill(bad if options.reduction == "none" else bad.any(), math.nan)
    return loss.to(compute_dtype(x.dtype)), more


def _reduce(call: Prepared, loss: Tensor, statistics: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What there is for every token in the caller's shape; sums are already sums."""

    def shaped(values: Tensor) -> Tensor:
        values = values.reshape(call.shape)
        return values[..., : -call.shift] if call.shift else values

    return shaped(loss) if call.options.reduction == "none" else loss, tuple(map(shaped, statistics))


def _statistics(results: TokenResults, operands: Operands, ignore_index: int) -> tuple[Tensor, ...]:
    """The fields of ``HarmonicStats`` or ``CrossEntropyStats``."""
    results, labels = TokenResults(*(field.detach() for field in results)), operands.target
    valid = labels != ignore_index
    first = torch.where(results.rival_score == 0, torch.minimum(results.rival, labels), results.rival)
    predicted = torch.where(results.rival_score < 0, labels, first)  # a NaN score predicts the rival
    entropy = torch.where(valid, results.entropy, 0.0)
    shown = torch.where(valid, predicted, ignore_index)
    target_ref = results.target_ref if operands.n is None else results.target_ref.sqrt()
    return entropy, shown, valid & (predicted == labels), target_ref, -results.nll


def exponent_tensor(n: float | Tensor | None, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The harmonic exponent as a 0-d tensor where the kernels read it; a given tensor keeps its gradient and shape."""
    if isinstance(n, Tensor):
        return n.reshape(()).to(device, dtype)
    return torch.full((), math.sqrt(width) if n is None else float(n), device=device, dtype=dtype)


def autocast(*values: Tensor) -> list[Tensor]:
    """Cast as F.linear would inside torch.autocast; float64 is left alone."""
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(values)
    dtype = torch.get_autocast_dtype(device)
    return [v.to(dtype) if v.is_floating_point() and v.dtype != torch.float64 else v for v in values]
