"""The loss kernel of a trained model: chains around its weights, their losses, the covariance and what is read from it.

``sampling`` moves the chains, ``collector`` takes their draws, ``draws`` says which count, ``covariance`` and ``traces``
accumulate them, ``run`` is the whole way, ``kernel`` the result and ``views`` its two forms, ``estimators``, ``convergence``
and ``diagnostics`` what is computed from it, ``figures``, ``report``, ``tables`` and ``cli`` what a person sees. Those
losses of single samples that ``loss_kernel`` and its relatives take, and their ``Sampler``, can be imported from here.
"""

from harmonic_triton.losskernel.per_sample_losses import (
    classification_loss,
    harmonic_head_loss,
    per_sample_cross_entropy,
    regression_loss,
    sequence_loss,
    token_loss,
)
from harmonic_triton.losskernel.sampling.sampler import Sampler

__all__ = [
    "Sampler",
    "classification_loss",
    "harmonic_head_loss",
    "per_sample_cross_entropy",
    "regression_loss",
    "sequence_loss",
    "token_loss",
]
