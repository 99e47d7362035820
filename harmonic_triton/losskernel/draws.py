"""What a draw of losses is, to everything that takes one: its form, its chain, and whether it counts."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common import validate

LARGEST = 2.0**52  # a loss below it squares to 2^104, and 2^23 of such squares stay within fp32


def is_usable(losses: Tensor) -> Tensor:
    """(k,) bool: whether every loss of each draw of (k, m) is finite and below 2^52 in magnitude.

    This is the one rule for a diverged draw. It looks at single losses, not at the draw's norm, so that whether a draw
    counts does not depend on how many samples are read beside. NaN passes neither comparison.
    """
    return (losses.amax(1) < LARGEST) & (losses.amin(1) > -LARGEST)


def checked_draws(losses: Any, num_samples: int, device: torch.device | None = None) -> Tensor:
    """(k, m) draws, without gradient, of (m,) or (k, m) losses.

    Raises:
        TypeError, ValueError: they have the wrong type or shape, or are not on ``device``; None takes any.
    """
    validate.tensors(losses=losses)
    if losses.dtype not in validate.FLOAT_DTYPES:
        raise TypeError(f"losses must be floating, got {validate.describe(losses)}; cast them first")
    if losses.dim() not in (1, 2) or losses.shape[-1] != num_samples:
        raise ValueError(
            f"losses must be ({num_samples},) or (k, {num_samples}) for the {num_samples} samples of this"
            f" accumulator, got {validate.describe(losses)}"
        )
    if device is not None and losses.device != device:
        raise ValueError(f"losses are on {losses.device} and the accumulator on {device}; move one of them")
    draws: Tensor = losses.detach().reshape(-1, num_samples)
    return draws


def checked_chains(chain: Any, count: int) -> list[int]:
    """The chain of each of ``count`` draws: one for all, or one for each; None is chain 0.

    Raises:
        TypeError, ValueError: not integers, or not as many as there are draws.
    """
    if isinstance(chain, Tensor):
        if chain.is_floating_point() or chain.is_complex() or chain.dtype == torch.bool or chain.dim() > 1:
            raise TypeError(f"chain must hold integers, one for each draw, got {validate.describe(chain)}")
        chain = chain.tolist()
    if chain is None or not isinstance(chain, Sequence):
        chain = [0 if chain is None else chain] * count
    for one in chain:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise TypeError(f"chain must be an int or one int for each draw, got {validate.describe(one)}")
    if len(chain) != count:
        raise ValueError(f"chain names {len(chain)} chains for {count} draws; give one, or one for each draw")
    return [int(one) for one in chain]


def check_reference(reference: Any, num_samples: int, device: torch.device) -> None:
    """Whether second moments can be taken about a vector: as a draw, (m,), that is usable.

    Raises:
        TypeError, ValueError: it has the wrong type, shape or device, or a loss that is not finite.
    """
    validate.tensors(reference=reference)
    if reference.shape != (num_samples,) or not reference.is_floating_point():
        raise ValueError(
            f"reference must be floating and of shape ({num_samples},), got {validate.describe(reference)}"
        )
    if reference.device != device:
        raise ValueError(f"reference is on {reference.device} and the accumulator on {device}; move one of them")
    if not bool(is_usable(reference[None])):
        raise ValueError("reference must be finite and below 2^52 everywhere")
