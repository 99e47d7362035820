"""What every backend returns for a token, and the arithmetic from there to losses and upstream gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class TokenResults(NamedTuple):
    """Per-token results in the compute dtype, each (N,); one that was not asked for has length 0.

    Tokens whose target is ignored hold zeros. ``z_j`` is the log-score of class j relative to the target's.
    """

    nll: Tensor  # -log p_c
    score_mean: Tensor  # sum_{j != c} p_j z_j; d nll/dn is score_mean/n
    entropy: Tensor  # of p over the classes: nll - score_mean, formed before rounding to the compute dtype
    smooth: Tensor  # sum_j v_j (-log q_j) with q_j = (p_j + alpha/V)/(1 + alpha)
    share_score: Tensor  # sum_j share_j z_j with share_j = v_j p_j/(p_j + alpha/V)
    share_sum: Tensor  # sum_j share_j
    share_rest: Tensor  # sum_{j != c} share_j
    target_ref: Tensor  # ||x - w_c||^2 without eps; with dot products the target's logit
    rival_score: Tensor  # z_r of the rival r, the best class that is not the target; -inf where there is none
    rival: Tensor  # r, int64

    @classmethod
    def zeros(cls, count: int, like: Tensor, want_scores: bool, smoothing: bool) -> TokenResults:
        """Room for ``count`` tokens; ``want_scores`` (means of scores, entropy) and ``smoothing`` say which sums are wanted."""
        lengths = (count, *2 * (count if want_scores else 0,), *4 * (count if smoothing else 0,), count, count)
        return cls._make([*(like.new_zeros(k) for k in lengths), like.new_zeros(count, dtype=torch.int64)])

    def select(self, index: Tensor | slice) -> TokenResults:
        """The same results for some of the tokens."""
        return TokenResults._make(field[index] if len(field) else field for field in self)

    def store(self, index: Tensor | slice, part: TokenResults) -> None:
        """Put the results of some of the tokens in their place."""
        for field, values in zip(self, part, strict=True):
            if len(values):
                field[index] = values


DIFFERENTIABLE = ("nll", "smooth", "target_ref")


class TokenWeights(NamedTuple):
    """What each term of a token's loss counts in the result, (N,) each; None where the term is not there."""

    nll: Tensor  # of the mixed negative log-likelihood
    smooth: Tensor | None  # of the smoothing term
    log_sum: Tensor | None  # of the squared log-sum-exp of the logits (cross-entropy)

    def select(self, index: Tensor | slice) -> TokenWeights:
        """Those of some of the tokens."""
        return TokenWeights._make(None if field is None else field[index] for field in self)


class Upstream(NamedTuple):
    """Gradients of the result for ``TokenResults``, (N,) each; None where nothing depends on the field."""

    nll: Tensor
    smooth: Tensor | None
    target_ref: Tensor | None  # of the target's log-score: with dot products ``target_ref`` itself

    def select(self, index: Tensor | slice) -> Upstream:
        """Those of some of the tokens."""
        return Upstream._make(None if field is None else field[index] for field in self)

    def used(self) -> Tensor:
        """Which tokens have a gradient: the others contribute nothing, not even their NaN."""
        used = self.nll != 0
        for field in (self.smooth, self.target_ref):
            used = used if field is None else used | (field != 0)
        return used


def summed(weights: TokenWeights) -> tuple[str, ...]:
    """The results that a weighted loss is made of."""
    if weights.smooth is None and weights.log_sum is None:
        return ("nll",)
    return DIFFERENTIABLE


COLUMNS = 8  # of the operand that column sums are made with: two in use, the least that a matrix unit takes
TOKEN_FACTORS = 6  # of the torch backend


class Unfinished(NamedTuple):
    """What the forward pass leaves of the gradients of a mean or sum, in the backend's own form; empty where not needed.

    Linear in the upstream gradient of the result, which ``Backend.finish`` multiplies in.
    """

    x: Tensor  # (N, D) compute dtype
    w: Tensor  # (V, D) compute dtype
    tokens: Tensor  # what belongs to a token: (N, TOKEN_FACTORS) (torch, few tokens), (8, N rounded up to a multiple of 4) (Triton)
    scores: Tensor  # (N, V and more) coefficients of both products (torch, few tokens)
    columns: Tensor  # (V, COLUMNS) column sums (Triton)
    bias: Tensor  # (V,) compute dtype, where it is not made of the column sums
    center: Tensor  # (D,) of the class vectors, or what was subtracted from both operands


def token_losses(
    results: TokenResults, weights: TokenWeights, mix: float, classes: int, scaling: bool = False
) -> Tensor:
    """(N,) weighted losses; differentiable. With ``scaling`` each counts as often as its target is probable."""
    weights = _by_probability(results, weights) if scaling else weights
    losses = weights.nll * (_of_numbers(results.nll, lambda nll: mixed_nll(nll, mix, classes)) if mix else results.nll)
    if weights.smooth is not None:
        losses = losses + weights.smooth * results.smooth
    if weights.log_sum is not None:
        losses = losses + weights.log_sum * _of_numbers(results.nll + results.target_ref, torch.square)
    return losses


def _of_numbers(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function where there is a number; NaN stays, and a gradient of 0 there is 0 and not 0 times NaN."""
    bad = values.isnan()
    return torch.where(bad, values, function(values.masked_fill(bad, 0.0)))


def _by_probability(results: TokenResults, weights: TokenWeights) -> TokenWeights:
    """The weights times p_c, a constant; a NaN stays in the loss alone, so that what masks it out masks it."""
    nll = results.nll.detach()
    p = torch.exp(-nll.masked_fill(nll.isnan(), 0.0))
    return TokenWeights._make(None if field is None else field * p for field in weights)


def upstream_of(
    results: TokenResults, weights: TokenWeights, mix: float, classes: int, scaling: bool = False
) -> Upstream:
    """The derivatives of the sum of ``token_losses``."""
    weights = _by_probability(results, weights) if scaling else weights
    nll = weights.nll * mixed_slope(results.nll, mix, classes) if mix else weights.nll
    if weights.log_sum is None:
        return Upstream(nll, weights.smooth, None)
    log_sum = 2 * weights.log_sum * (results.nll + results.target_ref)
    return Upstream(nll + log_sum, weights.smooth, log_sum)


def exponent_gradient(results: TokenResults, n: Tensor, upstream: Upstream) -> Tensor:
    """Gradient for the harmonic exponent, a scalar: sum_ij G_ij z_ij / n. Tokens without upstream gradient add nothing."""
    g, g_smooth = upstream.nll, upstream.smooth
    per_token = torch.where(g == 0, 0.0, g * results.score_mean)
    if g_smooth is not None:
        term = results.share_sum * results.score_mean - results.share_score
        per_token = per_token + torch.where(g_smooth == 0, 0.0, g_smooth * term)
    return per_token.sum() / n


def mixed_nll(nll: Tensor, mix: float, classes: int) -> Tensor:
    """-log((p + alpha/V)/(1 + alpha)) from nll = -log p, without cancellation where p is near 1; alpha is ``mix``."""
    if not mix:
        return nll
    p, share = torch.exp(-nll), mix / classes
    rest = torch.where(p < 0.5, 1 - p, -torch.expm1(-nll))  # autograd loses p in expm1's derivative where p is small
    return torch.log1p((mix - share + rest) / (p + share))


def mixed_slope(nll: Tensor, mix: float, classes: int) -> Tensor:
    """d mixed_nll / d nll."""
    p = torch.exp(-nll)
    return p / (p + mix / classes)


def scaled(values: Iterable[Tensor], g: Tensor, last: bool) -> list[Tensor]:
    """Each times the scalar ``g``: in place where nobody needs the values again."""
    if not last:
        return [value * g for value in values]
    if g.device.type != "cpu" or g.item() != 1:
        for value in values:
            value.mul_(g)
    return list(values)
