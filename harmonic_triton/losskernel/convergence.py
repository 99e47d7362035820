"""Whether chains have converged: R-hat, autocorrelation times and split halves, pure functions of draws.

BDA3 is Gelman et al., *Bayesian Data Analysis* (3rd edition, 2013); Vehtari is Vehtari et al., *Rank-normalization,
folding, and localization: an improved R-hat* (2021). m samples, C chains, T draws a chain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton.losskernel import estimators


def gelman_rubin(draws: Tensor) -> Tensor:
    """Split-chain R̂ (BDA3, Eq. 11.3-11.4): 1 where the halves of all chains agree; above 1.01 they do not (Vehtari).

    Args:
        draws: (C, T, ...) at least 4 draws a chain; of an odd number the middle one is left out.

    Returns:
        (...) fp64; NaN where the draws never vary.

    Raises:
        TypeError, ValueError: not (C, T, ...) with T >= 4.
    """
    halves = split_chains(draws)
    length = halves.shape[1]
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return (((length - 1) / length * within + between) / within.masked_fill(within == 0, math.nan)).sqrt()


def autocorrelation_time(draws: Tensor) -> Tensor:
    """Integrated autocorrelation time τ in draws: C T / τ is the effective number of independent ones.

    τ = 1 + 2 Σ ρ_t with the autocorrelations of all split chains combined (Vehtari, Eq. 10) and the sum cut and made
    monotone by Geyer's initial sequence (Geyer 1992, section 3.3; Vehtari, Eq. 11).

    Args:
        draws: (C, T, ...) at least 4 draws a chain.

    Returns:
        (...) fp64, at least 1/log10(C T); NaN where the draws never vary.

    Raises:
        TypeError, ValueError: not (C, T, ...) with T >= 4.
    """
    halves = split_chains(draws)
    chains, length = halves.shape[:2]
    centered = halves - halves.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centered, n=2 * length, dim=1)
    autocovariance = torch.fft.irfft(spectrum.abs().square(), n=2 * length, dim=1)[:, :length].mean(0) / length
    within = autocovariance[0] * length / (length - 1)
    total = autocovariance[0] + halves.mean(1).var(0)
    rho = 1 - (within - autocovariance) / total.masked_fill(autocovariance[0] == 0, math.nan)
    rho[0] = rho[0] * 0 + 1
    pairs = rho[: length // 2 * 2].unflatten(0, (-1, 2)).sum(1)
    positive = (pairs > 0).long().cumprod(0).bool()
    tau = 2 * pairs.cummin(0).values.masked_fill(~positive, 0.0).sum(0) - 1
    times: Tensor = tau.clamp_min(1 / math.log10(chains * length)) + total * 0 * rho[0]
    return times


def split_chains(draws: Tensor) -> Tensor:
    """(2C, T // 2, ...) fp64 halves of the chains."""
    validate.tensors(draws=draws)
    if draws.dim() < 2 or draws.shape[1] < 4 or len(draws) < 1:
        raise ValueError(f"draws must be (chains, draws, ...) with 4 draws or more, got {validate.describe(draws)}")
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def split_half_cka(draws: Tensor) -> float:
    """CKA between the correlation kernels of two halves of the draws: 1 where Monte-Carlo noise is gone.

    Args:
        draws: (C, T, m) losses. The halves are the even and the odd chains; of one chain, its first and second half.

    Returns:
        The alignment; NaN where a half is one draw, or never varies.

    Raises:
        TypeError, ValueError: not (C, T, m) with two draws or more.
    """
    validate.tensors(draws=draws)
    if draws.dim() != 3 or draws.shape[0] * draws.shape[1] < 2:
        raise ValueError(f"draws must be (chains, draws, m) with two draws or more, got {validate.describe(draws)}")
    half = draws.shape[1] // 2
    parts = (draws[::2], draws[1::2]) if len(draws) > 1 else (draws[:, :half], draws[:, half:])
    return estimators.cka_of_factors(*(estimators.standardized(part.flatten(0, 1)) for part in parts))
