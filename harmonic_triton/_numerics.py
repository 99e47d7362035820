"""What all backends share: the constants, what they return for every token, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

IDENTICAL = 2.0**-46
"""Floor of every non-target's squared distance, as a share of ||x||^2 + ||w_j||^2: fp32's resolution, squared.
It keeps the loss finite for an x that lies on another class vector. The target has no floor."""

SMALLEST_SQ = 1e-36
"""The same floor in absolute terms, for x and w_j both zero."""


class Rows(NamedTuple):
    """Per-token results in the compute dtype, each (N,); one that was not asked for has length 0.

    Rows whose target is ignored hold zeros. ``z_j`` is the log-score of class j relative to the target's.
    """

    nll: Tensor  # -log p_c
    score_mean: Tensor  # sum_{j != c} p_j z_j; the entropy is nll - score_mean, d nll/dn is score_mean/n
    smooth: Tensor  # sum_j v_j (-log q_j) with q_j = (p_j + alpha/V)/(1 + alpha)
    share_score: Tensor  # sum_j share_j z_j with share_j = v_j p_j/(p_j + alpha/V)
    share_sum: Tensor  # sum_j share_j
    share_rest: Tensor  # sum_{j != c} share_j
    target_sq: Tensor  # ||x - w_c||^2, without eps
    rival_score: Tensor  # z_r of the rival r, the nearest class that is not the target; -inf where there is none
    rival: Tensor  # r, int64

    @classmethod
    def zeros(cls, count: int, like: Tensor, moments: bool, smoothing: bool) -> Rows:
        """Room for ``count`` tokens; ``moments`` and ``smoothing`` say which sums are wanted."""
        lengths = (count, count * moments, *4 * (count * smoothing,), count, count)
        return cls._make([*(like.new_zeros(k) for k in lengths), like.new_zeros(count, dtype=torch.int64)])

    def select(self, index: Tensor | slice) -> Rows:
        """The same results for some of the tokens."""
        return Rows._make(field[index] if len(field) else field for field in self)


def exponent_gradient(rows: Rows, n: Tensor, g: Tensor, g_smooth: Tensor | None) -> Tensor:
    """Gradient for the harmonic exponent, a scalar: sum_ij G_ij z_ij / n. Rows without upstream gradient add nothing."""
    per_row = torch.where(g == 0, 0.0, g * rows.score_mean)
    if g_smooth is not None:
        term = rows.share_sum * rows.score_mean - rows.share_score
        per_row = per_row + torch.where(g_smooth == 0, 0.0, g_smooth * term)
    return per_row.sum() / n


def mixed_nll(nll: Tensor, mix: float) -> Tensor:
    """-log(p + mix) from nll = -log p."""
    return -torch.log(torch.exp(-nll) + mix) if mix else nll


def mixed_slope(nll: Tensor, mix: float) -> Tensor | float:
    """d mixed_nll / d nll."""
    return torch.exp(-nll) / (torch.exp(-nll) + mix) if mix else 1.0


@contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products in fp32 whatever the global setting: TF32 puts s_c off by 26 % near a class vector."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 is computed in fp64, everything else in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
