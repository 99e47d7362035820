"""The vector that most class vectors lie around, which neither distances nor softmax depend on: what it costs is digits."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype

ROWS = 256  # class vectors of which the mean is taken: its distance from the true mean is a sixteenth of the spread
USUAL = 4.0  # times the median squared norm: a class vector beyond it is left out of the mean
PAYS = 0.25  # the median squared norm must fall to this share of itself; else there is no common mean worth the name


def center_of(w: Tensor) -> Tensor:
    """A vector (D,) near the mean of the class vectors (V, D) in the compute dtype, or zeros where that is no gain.

    Some rows stand for all, those of unusual norm left out: one huge class vector does not move it, nor does one that is
    not finite. The same on every run, and without waiting for a device.
    """
    rows = w.detach()[:: -(-len(w) // ROWS)].to(compute_dtype(w.dtype))
    squared = rows.square().sum(1)
    median = squared.nanmedian()
    usual = squared <= USUAL * median
    center = torch.where(usual.unsqueeze(1), rows, 0.0).sum(0) / usual.sum()
    return torch.where((rows - center).square().sum(1).nanmedian() < PAYS * median, center, 0.0)
