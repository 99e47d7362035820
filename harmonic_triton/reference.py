"""The specification: dense fp64 losses by direct differences, gradients by autograd.

Everything here holds the N x V matrix and is meant for checking, not for training. The fast backends never import it,
and it imports nothing of theirs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FLOOR = 2.0**-46
"""A non-target's squared distance is at least this share of ||x||^2 + ||w_j||^2 (and at least 1e-36)."""

_BROADCAST_LIMIT = 2**24  # N*V*D up to which differences are held whole; that form can be differentiated twice


def squared_distances(x: Tensor, w: Tensor) -> Tensor:
    """||x_i - w_j||^2 by direct differences: (N, D), (V, D) -> (N, V), in fp64."""
    x, w = x.double(), w.double()
    if x.numel() * len(w) <= _BROADCAST_LIMIT:
        return (x.unsqueeze(-2) - w).square().sum(-1)
    return torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist").square()


def log_scores(x: Tensor, w: Tensor, target: Tensor, n: Tensor | float, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """z_j = -(n/2) log(s_j/s_c), relative to the target's, and the target's squared distance s_c (paper, Eq. 2).

    Returns (N, V) and (N,), fp64. The floor applies to every class but the target. Where x lies exactly on its class
    vector every z_j is -inf, or 0 for one other class that lies there as well (p = 1/2 each); no gradient flows then.
    A class vector or an x that is not finite makes its z_j NaN.
    """
    s = squared_distances(x, w)
    is_target = F.one_hot(target, len(w)).bool()
    norms = x.double().square().sum(-1, keepdim=True) + w.double().square().sum(-1)
    s = torch.where(norms.isfinite(), s, math.nan)
    least_sq = (FLOOR * norms + 1e-36).detach()
    s_c = s.gather(1, target.unsqueeze(1)) + eps
    others = torch.maximum(s + eps, least_sq)
    on_target = s_c == 0
    z = -0.5 * n * (torch.where(is_target, 1.0, others).log() - torch.where(on_target, 1.0, s_c).log())
    z = torch.where(is_target, 0.0 * s_c, z)  # 0, or NaN
    if bool(on_target.any()):
        there = ((s + eps <= least_sq) & ~is_target).long()
        double = (there.cumsum(1) == 1) & (there == 1)
        z = torch.where(on_target & ~is_target & ~z.isnan(), torch.where(double, 0.0, -math.inf), z)
    return z, s_c.squeeze(1)


def relative_logits(
    x: Tensor, w: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """z_j = l_j - l_c, the log-scores of cross-entropy (paper, Eq. 1) relative to the target's, and l_c.

    The logit l_j is a_j = x.w_j + b_j, or with a soft cap ``cap tanh(a_j/cap)``. Returns (N, V) and (N,), fp64.
    """
    logits = x.double() @ w.double().t()
    if bias is not None:
        logits = logits + bias.double()
    target_logit = logits.gather(1, target.unsqueeze(1))
    if softcap is None:
        return logits - target_logit, target_logit.squeeze(1)
    whole, rest = tanh(logits / softcap)
    own_whole, own_rest = tanh(target_logit / softcap)
    return softcap * ((whole - own_whole) + (rest - own_rest)), softcap * (own_whole + own_rest).squeeze(1)


def tanh(u: Tensor) -> tuple[Tensor, Tensor]:
    """tanh u as the sum of 0, 1 or -1, and a rest that has all its digits, as its derivative has, however near 1 it is."""
    small, size = u.abs() < 0.5, torch.where(u < 0, -u, u)
    rest = 2 * torch.sigmoid(-2 * size)
    whole = torch.where(small, 0.0, torch.where(u < 0, -1.0, 1.0))
    return whole, torch.where(small, torch.tanh(u), torch.where(u < 0, rest, -rest))


def negative_log_likelihood(z: Tensor, target: Tensor) -> Tensor:
    """-log p of the target from relative log-scores, right also where p is within 1e-300 of 1: (N, V) -> (N,)."""
    if z.shape[1] == 1:
        return z.sum(1) * 0.0
    others = z.scatter(1, target.unsqueeze(1), -math.inf)
    best = others.amax(1, keepdim=True).detach()
    best = torch.where(best.isinf(), 0.0, best)
    total = (others - best).exp().sum(1)
    zero = total == 0
    total = torch.where(zero, 1.0, total)
    return torch.where(zero, 0.0, F.softplus(total.log() + best.squeeze(1), threshold=700.0))


def linear_harmonic_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    n: Tensor | float | None = None,
    eps: float = 0.0,
    uniform_mix: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    token_scaling: bool = False,
) -> Tensor:
    """The harmonic loss as a dense formula. input (N, D), linear_weight (V, D), target (N,); fp64 result."""
    n = math.sqrt(input.shape[-1]) if n is None else n
    n = n.to(input.device, torch.float64) if isinstance(n, Tensor) else n
    valid = target != ignore_index
    z, _ = log_scores(input[valid], linear_weight, target[valid], n, eps)
    return _loss(
        z, target, valid, uniform_mix, class_weight, reduction, num_items, label_smoothing, token_scaling=token_scaling
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of a linear head as a dense formula. input (N, D), linear_weight (V, D), target (N,); fp64 result."""
    valid = target != ignore_index
    z, target_logit = relative_logits(input[valid], linear_weight, target[valid], bias, softcap)
    log_sum = negative_log_likelihood(z, target[valid]) + target_logit
    added = z_loss * log_sum.square() if z_loss else 0.0
    return _loss(z, target, valid, 0.0, class_weight, reduction, num_items, label_smoothing, added, token_scaling)


def log_sum_exp(
    x: Tensor, w: Tensor, target: Tensor, ignore_index: int, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The log-sum-exp of a token's logits, 0 for an ignored one: (N,), fp64."""
    valid = target != ignore_index
    z, target_logit = relative_logits(x[valid], w, target[valid], bias, softcap)
    rows = negative_log_likelihood(z, target[valid]) + target_logit
    return rows.new_zeros(len(target)).index_put((valid.nonzero().squeeze(1),), rows)


def _loss(
    z: Tensor, target: Tensor, valid: Tensor, uniform_mix: float, class_weight: Tensor | None, reduction: str,
    num_items: Tensor | float | None, label_smoothing: float, added: Tensor | float = 0.0, token_scaling: bool = False,
) -> Tensor:  # fmt: skip
    """The reduced loss from the relative log-scores (valid tokens, V); ``added`` to the losses as they are."""
    nll = negative_log_likelihood(z, target[valid])
    rows = row_losses(z - nll.unsqueeze(1), z, target[valid], uniform_mix, class_weight, label_smoothing) + added
    if token_scaling:
        rows = rows * (-nll.detach()).exp()
    losses = rows.new_zeros(len(target)).index_put((valid.nonzero().squeeze(1),), rows)
    weights = valid.double()
    if class_weight is not None:
        weights = class_weight.double()[target.where(valid, 0)].where(valid, 0.0)
    return reduce(losses, weights, reduction, num_items)


def row_losses(
    log_p: Tensor, z: Tensor, target: Tensor, uniform_mix: float, class_weight: Tensor | None, label_smoothing: float
) -> Tensor:
    index, classes = target.unsqueeze(1), log_p.shape[1]
    loss = negative_log_likelihood(z, target)
    if uniform_mix:
        log_p = ((log_p.exp() + uniform_mix / classes) / (1 + uniform_mix)).log()
        loss = -log_p.gather(1, index).squeeze(1)
    weights = log_p.new_ones(classes) if class_weight is None else class_weight.double()
    loss = loss * weights[target]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing / classes * (log_p * weights).sum(1)
    return loss


def reduce(losses: Tensor, weights: Tensor, reduction: str, num_items: Tensor | float | None) -> Tensor:
    """As F.cross_entropy, except that a mean over no token is 0."""
    if reduction == "none":
        return losses
    if reduction == "sum" and num_items is None:
        return losses.sum()
    if num_items is None:
        count = weights.sum()
        num_items = torch.where(count == 0, 1.0, count)
    return losses.sum() / num_items


@torch.no_grad()
def statistics(
    x: Tensor, w: Tensor, target: Tensor, n: Tensor | float | None, eps: float, ignore_index: int,
    bias: Tensor | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(entropy, predicted, correct, target distance, target log-probability) of every token, each (N,).

    With ``n=None``, those of cross-entropy: the target's logit in place of its distance.
    """
    valid = target != ignore_index
    if n is None:
        z, target_ref = relative_logits(x, w, target.where(valid, 0), bias, softcap)
    else:
        z, s_c = log_scores(x, w, target.where(valid, 0), n, eps)
        target_ref = (s_c - eps).clamp_min(0.0).sqrt()
    log_p = z - negative_log_likelihood(z, target.where(valid, 0)).unsqueeze(1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e300)).sum(1)
    nearest = z.argmax(1)
    predicted = nearest.where(valid, ignore_index)
    log_prob = log_p.gather(1, target.where(valid, 0).unsqueeze(1)).squeeze(1)
    entropy, target_ref, log_prob = (value.where(valid, 0.0).float() for value in (entropy, target_ref, log_prob))
    return entropy, predicted, valid & (nearest == target), target_ref, log_prob


def authors_probabilities(x: Tensor, w: Tensor, exponent: float, eps: float = 1e-4) -> Tensor:
    """The published layer: p ~ s^-exponent with s = ||w||^2 + ||x||^2 - 2 w.x + eps, in the input's dtype: (N, V).

    ``exponent`` acts on the squared distance, so it is half of the paper's n.
    """
    s = w.square().sum(-1) + x.square().sum(-1, keepdim=True) - 2 * x @ w.t() + eps
    s = s / s.amin(-1, keepdim=True)
    p = s ** (-exponent)
    return p / p.sum(-1, keepdim=True)


def authors_loss(
    x: Tensor, w: Tensor, target: Tensor, exponent: float, eps: float = 1e-4, uniform_mix: float = 0.0
) -> Tensor:
    """-log((p + alpha/V)/(1 + alpha)), mean over tokens, as in the authors' GPT-2 file (alpha = uniform_mix)."""
    p = authors_probabilities(x, w, exponent, eps).gather(1, target.unsqueeze(1)).squeeze(1)
    return -((p + uniform_mix / len(w)) / (1 + uniform_mix)).log().mean()


def distance_softmax_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The paper's first ablation (section 7): softmax over -||x - w_j||, fp64, mean."""
    s = squared_distances(x, w)
    return F.cross_entropy(-torch.where(s > 0, s, 1.0).sqrt() * (s > 0), target)


def dot_product_harmax_loss(x: Tensor, w: Tensor, target: Tensor, n: float) -> Tensor:
    """The paper's second ablation (section 7): HarMax (Eq. 2) over |w_j . x| in place of the distance, fp64, mean."""
    return F.cross_entropy(-n * (x.double() @ w.double().t()).abs().clamp_min(1e-30).log(), target)


def cross_entropy_loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """The ordinary loss (Eq. 1), fp64, mean."""
    return F.cross_entropy(x.double() @ w.double().t(), target)
