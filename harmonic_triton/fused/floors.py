"""How small a squared distance may be, and where a difference is rounding noise: each number once, for every backend."""

from __future__ import annotations

import torch

NEAREST_SHARE = 2.0**-46
"""Floor of every non-target's squared distance, as a share of ||x||^2 + ||w_j||^2: fp32's resolution, squared.
It keeps the loss finite for an x that lies on another class vector. The target has no floor."""

NEAREST_SQ = 1e-36
"""The same floor in absolute terms, for x and w_j both zero."""


def divisor_floors(dtype: torch.dtype) -> tuple[float, float]:
    """Floor of a squared distance that is divided by: in absolute terms, and as a share of the largest squared norm."""
    info = torch.finfo(dtype)
    return 100 * info.tiny, info.eps**2 * 1e-6


def noise_share(dtype: torch.dtype) -> float:
    """Below this share of ||x||^2 (or of s_ref) the expansion of a squared distance is rounding noise."""
    return 4 * torch.finfo(dtype).eps
