"""How small a squared distance may be, and where a difference is rounding noise: each number once, for every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEAREST_SHARE = 2.0**-46
"""Floor of every non-target's squared distance, as a share of ||x||^2 + ||w_j||^2: fp32's resolution, squared.
It keeps the loss finite for an x that lies on another class vector. The target has no floor."""

NEAREST_SQ = 1e-36
"""The same floor in absolute terms, for x and w_j both zero."""


class DivisorFloors(NamedTuple):
    """How small the squared distance may be that every other one is divided by. The target's own has the absolute floor only."""

    least: float  # in absolute terms
    near_share: float  # of ||x||^2 and of the median ||w_j||^2: a factor of 1e20 either way keeps its digits
    largest_share: float  # of the largest ||w_j||^2: quotients and their inverses stay inside the dtype


def divisor_floors(dtype: torch.dtype) -> DivisorFloors:
    """The floors for a compute dtype."""
    info = torch.finfo(dtype)
    return DivisorFloors(100 * info.tiny, info.eps**2 * 1e-6, info.tiny**0.8)


class NormRange(NamedTuple):
    """What the floors want to know of the squared norms of the class vectors, () each."""

    smallest: Tensor
    median: Tensor  # what is usual, whatever a few zero or huge vectors are
    largest: Tensor

    @classmethod
    def of(cls, norms: Tensor) -> NormRange:
        """That of norms (V,); a NaN among them is the largest."""
        smallest, largest = torch.aminmax(norms)
        return cls(smallest, norms.median(), largest)


def noise_share(dtype: torch.dtype) -> float:
    """Below this share of ||x||^2 (or of s_ref) the expansion of a squared distance is rounding noise."""
    return 4 * torch.finfo(dtype).eps
