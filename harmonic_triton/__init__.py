"""Harmonic loss for large vocabularies, fused, and the loss kernel of trained models.

See :func:`linear_harmonic_loss` and :func:`loss_kernel`; ``python -m harmonic_triton doctor`` says what serves here.
"""

from harmonic_triton._moved import register
from harmonic_triton._version import __version__ as __version__
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
from harmonic_triton.losskernel.covariance.differentiable import loss_covariance
from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance
from harmonic_triton.losskernel.covariance.sums import CovarianceResult
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.stability import stability_bound
from harmonic_triton.losskernel.sampling.stream import sample_losses
from harmonic_triton.losskernel.sampling.tuning import tune
from harmonic_triton.losskernel.traces.traces import LossTraces
from harmonic_triton.modules import HarmonicHead, LinearHarmonicLoss
from harmonic_triton.settings import Settings, init_last_norm_, recommend

__all__ = [
    "CovarianceResult",
    "CrossEntropyStats",
    "HarmonicHead",
    "HarmonicStats",
    "LinearHarmonicLoss",
    "LossKernel",
    "LossTraces",
    "SGLDConfig",
    "Settings",
    "StreamingCovariance",
    "harmax",
    "harmonic_logits",
    "harmonic_topk",
    "init_last_norm_",
    "linear_cross_entropy",
    "linear_harmonic_loss",
    "log_harmax",
    "loss_covariance",
    "loss_kernel",
    "recommend",
    "sample_losses",
    "stability_bound",
    "tune",
]

register()
