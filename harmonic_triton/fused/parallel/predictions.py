"""Log-probabilities over classes that are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harmonic_triton.fused.parallel.shard import together


class _Copied(torch.autograd.Function):
    """The same tensors in every process: their gradients add up, in one order everywhere."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        return None, *(
            added(gradient, ctx.group) if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )


class _Added(torch.autograd.Function):
    """The sum over the processes, which each of them uses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        out = tensor.clone(memory_format=torch.contiguous_format)
        with together(group, "add up the classes"):
            dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return added(gradient, ctx.group), None


def copied(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, whose gradients are added up over the group; differentiable any number of times."""
    out: tuple[Tensor, ...] = _Copied.apply(group, *tensors)  # type: ignore[no-untyped-call]
    return out


def added(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the group, as often differentiable."""
    out: Tensor = _Added.apply(tensor, group)  # type: ignore[no-untyped-call]
    return out


def behind(nearest: Tensor, others: Tensor, group: Any) -> Tensor:
    """By how much the log-probability of this process's nearest class is below 0.

    Args:
        nearest: (N, 1) its log-score.
        others: (N, 1) the log-sum-exp of the log-scores of this process's other classes, relative to it.
    """
    exact, rest = nearest.double(), others.double()
    highest = exact.detach().clone()
    with together(group, "find the nearest classes"):
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    own = (exact - highest).exp() * (1 + rest.exp())
    apart = torch.where(exact == -torch.inf, 0.0, highest - exact)  # where this process has no classes
    elsewhere = (added(own, group) - own).clamp_min(0.0) * apart.exp()
    return torch.log1p(rest.exp() + elsewhere).to(nearest.dtype)


def best_of_all(values: Tensor, indices: Tensor, nearest: Tensor, k: int, group: Any) -> tuple[Tensor, Tensor]:
    """The k highest log-probabilities over the group, and their classes; no gradient.

    Args:
        values: (N, at most k) this process's highest log-probabilities among its own classes, highest first.
        indices: (N, at most k) their classes, over all.
        nearest: (N,) fp64 the log-score of the first of them.
    """
    log_sum = nearest - values[:, 0].double() if values.shape[1] else nearest
    highest = log_sum.clone()
    with together(group, "find the nearest classes"):
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    own = (log_sum - highest).exp()
    whole = added(own, group)
    rest = (whole - own).clamp_min(0.0) / whole  # of the other processes
    lower = torch.where(rest < 0.5, -torch.log1p(-rest), whole.log() + highest - log_sum)
    mine = values.new_full((len(values), k), -torch.inf)
    classes = indices.new_zeros(len(values), k)
    mine[:, : values.shape[1]] = values - lower.unsqueeze(1).to(values.dtype)
    classes[:, : values.shape[1]] = indices
    everyones = [[torch.empty_like(part) for _ in range(dist.get_world_size(group))] for part in (mine, classes)]
    for gathered, part in zip(everyones, (mine, classes), strict=True):
        with together(group, "gather the nearest classes"):
            dist.all_gather(gathered, part, group)
    top, at = torch.cat(everyones[0], 1).topk(k)
    return top, torch.cat(everyones[1], 1).gather(1, at)
