"""What all backends share: the constants, what they return for every token, and the arithmetic on it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

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
    score_mean: Tensor  # sum_{j != c} p_j z_j; d nll/dn is score_mean/n
    entropy: Tensor  # of p over the classes: nll - score_mean, formed before rounding to the compute dtype
    smooth: Tensor  # sum_j v_j (-log q_j) with q_j = (p_j + alpha/V)/(1 + alpha)
    share_score: Tensor  # sum_j share_j z_j with share_j = v_j p_j/(p_j + alpha/V)
    share_sum: Tensor  # sum_j share_j
    share_rest: Tensor  # sum_{j != c} share_j
    target_ref: Tensor  # ||x - w_c||^2 without eps; with dot products x.w_c
    rival_score: Tensor  # z_r of the rival r, the best class that is not the target; -inf where there is none
    rival: Tensor  # r, int64

    @classmethod
    def zeros(cls, count: int, like: Tensor, moments: bool, smoothing: bool) -> Rows:
        """Room for ``count`` tokens; ``moments`` and ``smoothing`` say which sums are wanted."""
        lengths = (count, *2 * (count if moments else 0,), *4 * (count if smoothing else 0,), count, count)
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


def mixed_nll(nll: Tensor, alpha: float, classes: int) -> Tensor:
    """-log((p + alpha/V)/(1 + alpha)) from nll = -log p, without cancellation where p is near 1."""
    if not alpha:
        return nll
    p, mix = torch.exp(-nll), alpha / classes
    rest = torch.where(p < 0.5, 1 - p, -torch.expm1(-nll))  # autograd loses p in expm1's derivative where p is small
    return torch.log1p((alpha - mix + rest) / (p + mix))


def mixed_slope(nll: Tensor, alpha: float, classes: int) -> Tensor | float:
    """d mixed_nll / d nll."""
    p = torch.exp(-nll)
    return p / (p + alpha / classes) if alpha else 1.0


_precision_lock = threading.Lock()
_precision_users = 0
_restore_precision: Callable[[], None]


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products accumulate and stay in fp32 whatever the global settings: TF32 puts s_c off by 26 % near a class vector.

    The settings are the process's: the first of several threads changes them and the last one puts them back.
    """
    global _precision_users, _restore_precision
    with _precision_lock:
        if _precision_users == 0:
            _restore_precision = _highest_precision()
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                _restore_precision()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products of tensors on ``device`` in their own dtype, whatever autocast surrounds the call."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor the precision setting reaches the products of fp32 tensors on ``device``."""
    with no_autocast(device), full_fp32():
        yield


def _highest_precision() -> Callable[[], None]:
    """Set full precision through the interface that the user's setting came by (torch refuses a mix); returns the undo."""
    backends: Any = torch.backends
    products = (getattr(backends.cuda, "matmul", None), getattr(backends.mkldnn, "matmul", None))
    halves = backends.cuda.matmul.allow_fp16_accumulation  # with it a product of fp16 in fp32 is refused
    backends.cuda.matmul.allow_fp16_accumulation = False
    places: list[Any] = [place for place in products if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]

    def restore(legacy: str | None) -> None:
        backends.cuda.matmul.allow_fp16_accumulation = halves
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for place, value in zip(places, before, strict=True):
            if place.fp32_precision != value:
                place.fp32_precision = value

    try:
        legacy: str | None = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        legacy = None
        for place in places:
            place.fp32_precision = "ieee"
    return functools.partial(restore, legacy)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 is computed in fp64, everything else in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
