"""Harmonic loss for large vocabularies: fused distances, log-domain HarMax and backward pass.

See :func:`linear_harmonic_loss`; ``python -m harmonic_triton doctor`` says what serves on this machine.
"""

from harmonic_triton.functional import (
    CrossEntropyStats,
    HarmonicStats,
    harmax,
    harmonic_logits,
    harmonic_topk,
    linear_cross_entropy,
    linear_harmonic_loss,
    log_harmax,
)
from harmonic_triton.modules import HarmonicHead, LinearHarmonicLoss

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyStats",
    "HarmonicHead",
    "HarmonicStats",
    "LinearHarmonicLoss",
    "harmax",
    "harmonic_logits",
    "harmonic_topk",
    "linear_cross_entropy",
    "linear_harmonic_loss",
    "log_harmax",
]
