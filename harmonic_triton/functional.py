"""The public functions. Their docstrings are the specification of what they compute.

Notation: D features, V classes, N tokens; ``d_j = ||w_j - x||`` and p_j = d_j^-n / sum_k d_k^-n, the HarMax of the
distances (Baek et al., *Harmonic Loss Trains Interpretable AI Models*, Eq. 2).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import _register_namedtuple
from typing_extensions import Unpack

from harmonic_triton._common import validate
from harmonic_triton._common.precision import compute_dtype, full_fp32
from harmonic_triton._common.transforms import forward_mode, in_transform
from harmonic_triton.fused.call import autocast, exponent_tensor, loss_and_statistics
from harmonic_triton.fused.checks import positive
from harmonic_triton.fused.floors import NEAREST_SHARE, NEAREST_SQ
from harmonic_triton.fused.options import (
    CROSS_ENTROPY,
    HARMONIC,
    CrossEntropyOptions,
    HarmonicOptions,
    collect,
    signature,
)
from harmonic_triton.fused.parallel.dtensor import Local, as_given, localized
from harmonic_triton.fused.parallel.predictions import behind, best_of_all, copied
from harmonic_triton.fused.parallel.shard import Shard, shard_of

TOPK_CHUNK = 2**24  # bytes of the part of the N x V matrix held at a time


class HarmonicStats(NamedTuple):
    """What a model predicted, one entry for each token and no gradient. Ignored tokens hold 0, False or ignore_index."""

    entropy: Tensor  # of p over the classes, in nats
    predicted: Tensor  # int64, the nearest class; of equally near ones the first
    correct: Tensor  # bool, predicted == target
    target_distance: Tensor  # ||w_c - x||
    target_log_prob: Tensor  # log p_c, without smoothing and mix


class CrossEntropyStats(NamedTuple):
    """As :class:`HarmonicStats`. The log-sum-exp of the logits is target_logit - target_log_prob."""

    entropy: Tensor
    predicted: Tensor  # int64, the class of the largest logit; of equal ones the first
    correct: Tensor
    target_logit: Tensor  # x.w_c, with its bias and cap
    target_log_prob: Tensor


for _statistics in (
    HarmonicStats,
    CrossEntropyStats,
):  # so that torch.export.save can write a program that returns them
    _register_namedtuple(_statistics, serialized_type_name=f"harmonic_triton.{_statistics.__name__}")


@overload
def linear_harmonic_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[HarmonicOptions],
) -> Tensor: ...
@overload
def linear_harmonic_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    **options: Unpack[HarmonicOptions],
) -> tuple[Tensor, HarmonicStats]: ...
def linear_harmonic_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> Tensor | tuple[Tensor, HarmonicStats]:
    """Harmonic loss of a linear head, -log HarMax(||w - x||)_target, without the N x V matrix (paper, section 3).

    Args:
        input: (..., D) hidden states x; bfloat16, float16, float32 or float64 (float64: torch backend).
        linear_weight: (V, D) class vectors w, same dtype and device. Under ``torch.autocast`` both are cast first.
        target: (...) int64 classes.
        n: harmonic exponent on the *distance* (the paper's n; the authors' code raises the squared distance, so its
            exponent is n/2). ``None`` is sqrt(D). A tensor of shape () or (1,) gets a gradient.
        eps: added to every squared distance, the target's included (the authors use 1e-4).
        uniform_mix: alpha in -log((p + alpha/V)/(1 + alpha)), the authors' GPT-2 loss.
        class_weight: (V,) weight of each class, as in ``F.cross_entropy``.
        ignore_index: tokens with this target give loss 0 and no gradient.
        reduction: "none" (shape of target), "sum", or "mean" over the tokens not ignored (weighted by class_weight).
            The mean over no token at all is 0, with zero gradients.
        num_items: divide the sum by this instead, for gradient accumulation: over micro-batches with one total
            ``num_items`` the gradients add up to those of the whole batch. A number or a 0-d tensor, > 0.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``; with ``uniform_mix`` it smooths the mixed probabilities.
        token_scaling: multiply each token's loss, all its terms, by its target's probability p_c (that of
            ``target_log_prob``), through which no gradient flows; a mean divides as without it.
        shift: True for the next-token loss, input[..., :-1, :] against target[..., 1:], without copying input; a number
            k >= 0 for the token k further, input[..., :-k, :] against target[..., k:]. The sequence must have k tokens
            at least; one of just k has nothing to predict.
        return_stats: return ``(loss, HarmonicStats)``, from the same pass.
        process_group: a ``torch.distributed`` group whose processes each have some of the rows of linear_weight, in the order of
            their ranks; input and target are the same in all, and so is the result. The gradient of input is added up over
            them. A DTensor sharded on its rows says so by itself, and input may then be one too (sequence parallelism). Gradients
            take the recompute strategy; not under torch.func's transforms.
        backend: "auto", "triton", "torch" or "reference". Only "auto" falls back.
        memory_budget: bytes of scratch for the chunk of the N x V matrix that is held at a time; None chooses.

    Returns:
        float32 (float64 for float64 input): a scalar, or the shape of target for "none" (last dimension shorter by
        ``shift``). With ``return_stats`` a pair. The fused backends give bitwise the same results and gradients on
        every run of the same call: sums have a fixed order and there are no atomics.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and the mend. Targets out of
            range raise on the CPU and stop the device on a GPU.

    An x exactly on its class vector has loss 0 and gradient 0; if another class lies there too, p = 1/2. Other classes
    are never nearer than 1.2e-7 of sqrt(||x||^2 + ||w_j||^2), or than 1e-18, so that the loss stays finite. (With label
    smoothing the true loss of such a token is infinite; the fused backends give a large finite one.) A second
    derivative needs ``backend="reference"``; the fused ones raise.

    Accuracy: the target and its nearest rival are measured by direct differences. Every further class j adds a
    relative error of about p_j (n/2) 1e-7 (||x||^2 + ||w_j||^2)/s_j, however far the target is and with norms of
    class vectors up to 1e15 apart: under 1e-5 unless x lies within a hundredth of their norm of three or more class
    vectors at once, which the fp32 backends cannot tell apart (float64 and "reference" can). 16-bit operands are
    taken as they are and losses are as accurate as with float32. Their gradients are rounded to 16 bits; the Triton
    backend also rounds each further class's share A_j of them, so that dX is off by about 2^-9 (bfloat16; float16
    2^-12) of sum_j |A_j| ||w_j||, and dW_j of sum_i |A_ij| ||x_i||. With an offset common to x and W that is up to
    ||x||/||x - w|| times the rounding of the result: 2e-2 at 12 in bfloat16, where the torch backend has 2e-3.
    """
    given = collect("linear_harmonic_loss", options, HARMONIC)
    loss, statistics = loss_and_statistics(input, linear_weight, target, given, harmonic=True)
    return (loss, HarmonicStats(*statistics)) if given.return_stats else loss


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[CrossEntropyOptions],
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    return_lse: Literal[False] = ...,
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Tensor, CrossEntropyStats]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = ...,
    return_lse: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    return_lse: Literal[True],
    **options: Unpack[CrossEntropyOptions],
) -> tuple[Tensor, CrossEntropyStats, Tensor]: ...
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> Tensor | tuple[Tensor, CrossEntropyStats] | tuple[Tensor, Tensor] | tuple[Tensor, CrossEntropyStats, Tensor]:
    """Cross-entropy of a linear head, -log softmax(x W^T + b)_target, without the N x V matrix (paper, Eq. 1).

    The value of ``F.cross_entropy(F.linear(input, linear_weight, bias), target)`` from the machinery of
    :func:`linear_harmonic_loss`: log1p(sum_{j != c} exp(l_j - l_c)) of the logits l, which keeps its digits where the
    target's probability is within 1e-20 of 1 (log-softmax in fp32 reads 0 there), with gradients to match.

    Args:
        input, linear_weight, target, class_weight, ignore_index, reduction, num_items, label_smoothing,
            token_scaling, shift, process_group, backend, memory_budget: as in :func:`linear_harmonic_loss`.
        bias: (V,) b of the logits a_j = x.w_j + b_j, floating of any dtype (it is read in float32), with a gradient.
        softcap: c > 0 of the logits l_j = c tanh(a_j/c) (Gemma 2's ``final_logit_softcapping``); None is l = a.
        z_loss: coefficient of a squared log-sum-exp of the logits added to every token's loss, which keeps their scale from
            drifting; class weights and smoothing leave it alone, the reduction divides it as it does the rest.
        return_stats: return ``(loss, CrossEntropyStats)``, from the same pass.
        return_lse: return ``(loss, lse)`` or ``(loss, stats, lse)``: the log-sum-exp of every token's logits in the shape of
            target, 0 where it is ignored, with a gradient. A mean or sum then forms its products again in backward.

    Returns, Raises:
        As :func:`linear_harmonic_loss`. The mean over no token at all is 0 (``F.cross_entropy``: NaN).

    Accuracy: the target's and its best rival's logits are fp64 sums. A further class j adds a relative error of about
    p_j 1e-7 (||x|| (||w_j|| + ||w_c||) + |b_j| + |b_c|) to a token's loss and gradient, and no more where they are capped.
    With 16-bit operands gradients as in :func:`linear_harmonic_loss`, with p_j in place of A_j; that of the bias is off
    by 2^-9 (float16 2^-12) of sum_i p_ij for the Triton backend.
    """
    given = collect("linear_cross_entropy", options, CROSS_ENTROPY)
    loss, more = loss_and_statistics(input, linear_weight, target, given, harmonic=False)
    if not given.return_stats:
        return (loss, more[0]) if given.return_lse else loss
    statistics = CrossEntropyStats(*more[:5])
    return (loss, statistics, more[5]) if given.return_lse else (loss, statistics)


linear_harmonic_loss.__signature__ = signature(linear_harmonic_loss, HARMONIC)  # type: ignore[attr-defined]
linear_cross_entropy.__signature__ = signature(linear_cross_entropy, CROSS_ENTROPY)  # type: ignore[attr-defined]


def harmonic_logits(
    input: Tensor, linear_weight: Tensor, *, n: float | Tensor | None = None, eps: float = 0.0, normalize: bool = True,
    process_group: Any = None,
) -> Tensor:  # fmt: skip
    """Log-probabilities log HarMax(||w - x||) of every class, (..., V): for sampling and evaluation (paper, Eq. 2).

    Sampling at temperature T is ``n / T`` (the same as dividing the result by T and normalising again). With
    ``normalize=False`` the log-scores -n log d_j less those of the nearest class: the nearest has 0, softmax gives
    the same probabilities. Differentiable any number of times.

    Args:
        input: (..., D).
        linear_weight: (V, D).
        n, eps: as in :func:`linear_harmonic_loss`.
        process_group: of whom each has some rows of the class vectors, as there; each gets the log-probabilities of its own
            rows. (A DTensor of class vectors gives a DTensor of log-probabilities, sharded on the last dimension.)

    Returns:
        (..., V), float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    validate.flag("normalize", normalize)
    local = localized(input, linear_weight, None, process_group)
    if local.group is not None and not normalize:
        raise ValueError(
            "normalize=False is relative to the nearest class of one process; leave it True with process_group"
        )
    x, w, n = _checked_head(local.input, local.linear_weight, n, eps, local.group)
    if local.group is not None:
        _agreed("harmonic_logits", local, x, w, n, {"eps": eps})
    with torch.autocast(x.device.type, enabled=False):  # the operands are cast; their products stay in fp32
        if local.group is not None:
            *given, n = copied(local.group, *(x,) * local.reduce_input, n)
            x = given[0] if given else x
        scores, nearest, highest = _scores_from_nearest(x.to(w.dtype), w, n, eps)
        if normalize:  # log sum_j exp(z_j) as the softplus of the sum over the others, which keeps 1 - p
            others = highest
            if len(w):
                others = scores.scatter(1, nearest, torch.finfo(scores.dtype).min).logsumexp(1, keepdim=True)
            if local.group is None:
                scores = scores - F.softplus(others, threshold=50.0)
            else:
                scores = scores - behind(highest, others, local.group)
    scores = scores.reshape(*local.input.shape[:-1], len(w))
    return scores if local.group is None else as_given(scores, linear_weight)


def harmonic_topk(
    input: Tensor, linear_weight: Tensor, k: int, *, n: float | Tensor | None = None, eps: float = 0.0,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k most probable (nearest) classes of every token, without the N x V matrix and without gradient.

    In a transform of ``torch.func`` or in forward mode it is ``harmonic_logits(...).topk(k)``, derivatives included.

    Args:
        input: (..., D).
        linear_weight: (V, D).
        k: 1 ... V.
        n, eps: as in :func:`linear_harmonic_loss`.
        process_group: of whom each has some rows of the class vectors, as there; each gets the best of all, with indices
            over all.

    Returns:
        log_probs (..., k), float32 (float64 for float64 input), highest first, and indices (..., k) int64. Classes that
        are equally probable come in any order.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    local = localized(input, linear_weight, None, process_group)
    x, w, n = _checked_head(local.input, local.linear_weight, n, eps, local.group)
    shard = None if local.group is None else _agreed("harmonic_topk", local, x, w, n, {"eps": eps, "k": k})
    classes = len(w) if shard is None else shard.classes
    validate.integer("k", k)
    if not 1 <= k <= classes:
        raise ValueError(f"k must be between 1 and V = {classes}, got {k}")
    if in_transform() or forward_mode():  # which allow no shared scratch; nor is a derivative dropped there
        if shard is not None:
            raise NotImplementedError("harmonic_topk with process_group has no transforms and no forward mode")
        values, indices = harmonic_logits(input, linear_weight, n=n, eps=eps).topk(k)
        return values, indices
    with torch.no_grad(), _full_products():  # autocast leaves products with out= alone
        values, indices, highest = _nearest_here(x, w, n, eps, min(k, len(w)))
        if shard is not None:
            values, indices = best_of_all(values, indices + shard.first, highest, k, shard.group)
    return values.reshape(*local.input.shape[:-1], k), indices.reshape(*local.input.shape[:-1], k)


def _agreed(function: str, local: Local, x: Tensor, w: Tensor, n: Tensor, options: dict[str, Any]) -> Shard:
    """This process's shard; all processes have made the same call."""
    facts = {"function": function, "input.shape": tuple(x.shape), "dtype": x.dtype}
    facts["requires_grad"] = torch.is_grad_enabled() and (x.requires_grad, w.requires_grad, n.requires_grad)
    return shard_of(local.group, len(w), x, {**facts, **options}, {"n": n})


def _nearest_here(x: Tensor, w: Tensor, n: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k highest log-probabilities among the classes w and their indices, (N, k), and the highest log-score (N,), fp64."""
    values, indices = w.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device=w.device)
    highest = torch.full((len(x),), -math.inf, dtype=torch.float64, device=w.device)
    if not len(w):
        return values, indices, highest
    norms = torch.linalg.vector_norm(w, dim=1).square_()
    step = max(1, min(len(x), TOPK_CHUNK // (len(w) * w.element_size())))
    scratch = w.new_empty(step, len(w))
    for start in range(0, len(x), step):
        at, chunk = slice(start, start + step), x[start : start + step].to(w.dtype)
        scores = torch.addmm(norms, chunk, w.t(), alpha=-2, out=scratch[: len(chunk)])
        nearest, s = _nearest(scores, chunk, w, norms, eps)
        scores.sub_(scores.gather(1, nearest)).div_(s).log1p_().mul_(-0.5 * n)
        top, indices[at] = scores.topk(k)
        others = scores.scatter_(1, nearest, torch.finfo(w.dtype).min)
        rival = others.amax(1, keepdim=True)
        total = others.sub_(rival).exp_().sum(1, keepdim=True).log_() + rival
        values[at] = top - F.softplus(total, threshold=50.0)
        highest[at] = s.squeeze(1).double().log() * (-0.5 * n.double())
    return values, indices, highest


def harmax(distances: Tensor, n: float | Tensor, dim: int = -1) -> Tensor:
    """HarMax of distances along ``dim``: d_i^-n / sum_j d_j^-n (paper, Eq. 2). See :func:`log_harmax`."""
    return _log_harmax(distances, n, dim).exp().to(distances.dtype)


def log_harmax(distances: Tensor, n: float | Tensor, dim: int = -1) -> Tensor:
    """log HarMax along ``dim``, in the log domain: no distance or exponent overflows.

    Distances of 0 share the probability equally. Invariant to the scale of the distances.

    Args:
        distances: bfloat16, float16, float32 or float64, >= 0 (a negative one gives NaN).
        n: harmonic exponent, a number or a tensor of shape () or (1,).

    Returns:
        Same shape and dtype, rounded from float32 for 16-bit distances.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    return _log_harmax(distances, n, dim).to(distances.dtype)


def _log_harmax(distances: Tensor, n: float | Tensor, dim: int) -> Tensor:
    """log HarMax in the compute dtype."""
    validate.tensors(distances=distances)
    validate.exponent(n)
    if n is None:
        raise TypeError(
            "n must be a number or a tensor of one element; a default needs the width D, which distances do not show"
        )
    if distances.dtype not in validate.FLOAT_DTYPES:
        raise TypeError(
            f"distances must be bfloat16, float16, float32 or float64, got {validate.describe(distances)}; cast them"
        )
    validate.dimension(dim, distances)
    d = distances.to(compute_dtype(distances.dtype))
    exponent = exponent_tensor(_checked_value(n), 0, d.device, d.dtype)
    at_zero = d == 0
    scores = -exponent * torch.where(at_zero, 1.0, d).log()
    collided = at_zero.any(dim, keepdim=True)
    scores = torch.where(collided, torch.where(at_zero, 0.0, -math.inf), scores)
    return scores.log_softmax(dim)


def _checked_head(
    input: Tensor, linear_weight: Tensor, n: float | Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked operands: x (N, D), w (V, D) in the compute dtype, and n () beside them."""
    validate.tensors(input=input, linear_weight=linear_weight)
    input, linear_weight = autocast(input, linear_weight)
    validate.process_group(group)
    validate.features(input, linear_weight, least_rows=1 if group is None else 0)
    validate.exponent(n)
    validate.eps(eps)
    n = _checked_value(n)
    w = linear_weight.to(compute_dtype(input.dtype))
    return input.reshape(-1, input.shape[-1]), w, exponent_tensor(n, input.shape[-1], w.device, w.dtype)


def _checked_value(n: float | Tensor | None) -> float | Tensor | None:
    """The same n; a tensor's value is checked, also inside a traced or transformed function."""
    return positive(n, "n must be a finite harmonic exponent > 0") if isinstance(n, Tensor) else n


def _full_products() -> AbstractContextManager[None]:
    """fp32 products in fp32; a traced function follows the global setting."""
    return nullcontext() if torch.compiler.is_compiling() else full_fp32()


def _nearest(u: Tensor, x: Tensor, w: Tensor, norms: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The nearest classes (N, 1) by u_j = ||w_j||^2 - 2 x.w_j, and their s_j >= floor (N, 1) by direct differences.

    No other u_j is less: u_j - u_nearest needs no floor.
    """
    nearest = u.argmin(1, keepdim=True)
    close = nearest.squeeze(1)
    floor = (NEAREST_SHARE * (x.square().sum(1) + norms[close]) + NEAREST_SQ).detach()
    return nearest, torch.maximum((x - w[close]).square().sum(1) + eps, floor).unsqueeze(1)


def _scores_from_nearest(x: Tensor, w: Tensor, n: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-(n/2) log(s_j/s_nearest) (N, V) by ||w_j||^2 - 2 x.w_j less the nearest's, the nearest classes (N, 1), their log-scores."""
    if not len(w):  # this process has none, but its part in the collectives of backward
        highest = 0 * x.sum(1, keepdim=True) * n - math.inf
        return x @ w.t(), x.new_zeros(len(x), 1, dtype=torch.int64), highest
    norms = w.square().sum(1)
    with _full_products():
        u = torch.addmm(norms, x, w.t(), alpha=-2)
    nearest, s = _nearest(u, x, w, norms, eps)
    scores = -0.5 * n * torch.log1p((u - u.gather(1, nearest)) / s)
    # the 0 as a constant: no gradient of its rounding
    return scores.scatter(1, nearest, 0.0), nearest, -0.5 * n * torch.log(s)
