"""Calls with so few entries that every class is measured directly: fp64 by NumPy, without products, chunks or floors of theirs.

Of such a call the time is that of its calls into torch. The formulas are the reference's, with their derivatives: scores
z_j relative to the target's, ``nll = softplus(logsumexp_{j != c} z_j)``, G_j = g p_j and G_c = -g (1 - p_c).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.floors import NEAREST_SHARE, NEAREST_SQ
from harmonic_triton.fused.problem import Operands, Problem, Wanted
from harmonic_triton.fused.pytorch.per_token import tensor_of, values_of
from harmonic_triton.fused.results import TokenResults, TokenWeights, upstream_of

Array = Any  # np.ndarray: (C,), (C, V) or (C, V, D), fp64
SAFE = 64 * NEAREST_SHARE  # share of ||x||^2: no class farther than this is below its floor, which has ||w_j||^2 too


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[TokenResults, Tensor, Tensor]:
    """Results of the tokens (none may be ignored), dX and dW of the weighted sum of their losses, in the compute dtype."""
    dtype = compute_dtype(operands.x.dtype)
    target, every = operands.target.numpy(), np.arange(len(operands.x))
    measure = _logits if operands.n is None else _distances
    z, target_ref, apart, factor = measure(operands, problem.eps, target, every)
    z[every, target] = -math.inf
    rival = z.argmax(1)
    rival_score = z[every, rival]
    best = np.where(rival_score == -math.inf, 0.0, rival_score)
    others = np.exp(z - best[:, None])
    nll = np.logaddexp(best + np.log(others.sum(1)), 0.0)
    rival = np.where(rival_score == -math.inf, target, rival)
    to_prob = np.exp(best - nll)[:, None]
    sums = [operands.x.new_empty(0, dtype=dtype) for _ in range(4 if problem.want_scores else 6)]
    if problem.want_scores:
        p = others * to_prob
        mean = np.where(p == 0, 0.0, p * z).sum(1)
        sums = [tensor_of(mean, dtype), tensor_of(nll - mean, dtype), *sums]
    results = TokenResults._make(
        [tensor_of(nll, dtype), *sums, tensor_of(target_ref, dtype), tensor_of(rival_score, dtype),
         torch.from_numpy(rival)]
    )  # fmt: skip
    upstream = upstream_of(results, weights, problem.mix, z.shape[1])
    g = values_of(upstream.nll)
    coefficients = others * (g[:, None] * to_prob)
    coefficients[every, target] = g * np.expm1(-nll)
    if upstream.target_ref is not None:
        coefficients[every, target] += values_of(upstream.target_ref)
    coefficients *= factor
    dx, dw = _products(operands, torch.from_numpy(coefficients), apart, wanted)
    return results, dx, dw


def _distances(operands: Operands, eps: float, target: Array, every: Array) -> tuple[Array, Array, Tensor, Array]:
    """(z, ||x - w_c||^2, x - w_j (C, V, D), and what a gradient for z_j is for x - w_j)."""
    assert operands.n is not None
    n = float(operands.n.item())
    x, w = operands.x.double(), operands.w
    apart = x.unsqueeze(1) - w
    s = torch.linalg.vector_norm(apart, dim=2).square_().numpy()
    target_ref = s[every, target]
    if eps:
        s += eps
    target_sq = s[every, target]
    on_target = target_sq == 0
    s[every, target] = 1.0
    x_sq = np.square(x.numpy()).sum(1)
    at_floor = None
    if not bool((s.min(1) > SAFE * x_sq + NEAREST_SQ).all()):  # nor where there is a NaN
        floor = NEAREST_SHARE * (x_sq[:, None] + torch.linalg.vecdot(w.double(), w.double()).numpy()) + NEAREST_SQ
        at_floor = s <= floor
        at_floor[every, target] = False
        s = np.where(at_floor, floor, s)
    if not s.max() < math.inf:
        s[np.isinf(s)] = math.nan  # a vector that is not finite is at no distance
    factor = -n / s
    z = np.log(s / np.where(on_target, 1.0, target_sq)[:, None]) * (-0.5 * n)
    factor[every, target] = -n / target_sq
    if at_floor is not None:
        factor[at_floor] = 0.0
    if on_target.any():  # nobody else has a share there, or a class at the same place has half
        z[on_target] = np.where(np.isnan(z[on_target]), math.nan, -math.inf)
        factor[on_target] = 0.0
        if at_floor is not None:
            twin = on_target & at_floor.any(1)
            z[twin, at_floor.argmax(1)[twin]] = 0.0
    return z, target_ref, apart, factor


def _logits(operands: Operands, eps: float, target: Array, every: Array) -> tuple[Array, Array, Tensor, Array]:
    """(z, x.w_c, w_j (1, V, D), 1)."""
    w = operands.w.double()
    logits = torch.mm(operands.x.double(), w.t()).numpy()
    target_ref = logits[every, target]
    target_ref = np.where(np.isinf(target_ref), math.nan, target_ref)  # as log-softmax has it
    return logits - target_ref[:, None], target_ref, w.unsqueeze(0), np.ones(())


def _products(operands: Operands, a: Tensor, apart: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """dX_i = sum_j a_ij (x_i - w_j) and dW_j = -sum_i a_ij (x_i - w_j); sum_j a_ij w_j and sum_i a_ij x_i of dot products."""
    dtype = compute_dtype(operands.w.dtype)
    dx, dw = a.new_empty(0, dtype=dtype), operands.w.new_empty(operands.w.shape if wanted.w else 0, dtype=dtype)
    if wanted.x:
        dx = (torch.mm(a, apart[0]) if len(apart) == 1 else torch.bmm(a.unsqueeze(1), apart).squeeze(1)).to(dtype)
    if wanted.w and operands.n is None:
        dw.copy_(a.t() @ operands.x.double())
    elif wanted.w and len(a) == 1:  # each difference rounded once: as good, and half the memory
        torch.sub(operands.w.to(dtype), operands.x.to(dtype), out=dw).mul_(a.t().to(dtype))
    elif wanted.w:
        dw.copy_(torch.linalg.vecdot(-a.unsqueeze(2), apart, dim=0))
    return dx, dw
