"""What covariances are made of: rank-k updates of a triangle about a shift, sums in fp64, and what they resolve."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from harmonic_triton._common.dispatch import resolve
from harmonic_triton.losskernel.covariance.triangle import Triangle, fastest_gap

BUFFER = 512  # draws in one rank-k update: enough to be bound by arithmetic on every device, 2 kB a sample
DRIFT = 4.0  # spreads between mean and reference beyond which a warning is due
CONSTANT = 2.0**-40  # spread over mean below which a loss counts as constant: float64 sums resolve no more
_P = ParamSpec("_P")
_T = TypeVar("_T")


def outside_autograd(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Without gradients, but no inference tensors either: state that is made in inference_mode is changed outside."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@dataclass(frozen=True)
class CovarianceResult:
    """Mean and covariance of m losses over ``count`` draws."""

    mean: Tensor  # (m,) float64
    covariance: Tensor  # (m, m) in the accumulator's dtype, symmetric
    count: int

    def correlation(self) -> Tensor:
        """(m, m), a new tensor: K_ij/sqrt(K_ii K_jj) in [-1, 1]; 0 where either variance is 0, on the diagonal too."""
        scale = inverse_sd(self.covariance.diagonal().double()).to(self.covariance.dtype)
        out = self.covariance * scale[:, None]
        out.mul_(scale).clamp_(-1.0, 1.0).diagonal().copy_(scale > 0)
        return out


@dataclass(frozen=True)
class Moments:
    """K = (triangle - centresᵀ centres) / divisor."""

    centers: Tensor  # (1, m), or (chains, m) for the within-chain estimate, float64: sqrt(n) (mean - reference)
    variance: Tensor  # (m,) float64
    divisor: int
    off: Tensor  # (m,) float64: spreads between the means and the reference

    def warn_of_drift(self) -> None:
        far = self.off > DRIFT
        if bool(far.any()):
            worst = int(self.off.argmax())
            warnings.warn(
                f"the mean losses of {int(far.sum())} of {len(far)} samples lie more than {DRIFT:g} spreads from the"
                f" reference (sample {worst}: {float(self.off[worst]):.3g}): correlations lose about 1e-7"
                " (distance/spread)^2. Lengthen the burn-in, or start anew with reference=mean()",
                RuntimeWarning,
                stacklevel=4,
            )


def moments_of(
    diagonal: Tensor,  # (m,) of the second moment about the reference
    reference: Tensor,  # (m,)
    counts: dict[int, int],  # draws by chain
    sums: dict[int, Tensor],  # (m,) float64 by chain
    within_chain: bool,
) -> Moments:
    """What turns a second moment about a reference into a covariance."""
    eps, reference, count = torch.finfo(diagonal.dtype).eps, reference.double(), sum(counts.values())
    divisor = count - (len(counts) if within_chain else 1)
    if within_chain:
        centers = torch.stack([(sums[c] - n * reference) / math.sqrt(n) for c, n in counts.items()])
    else:
        centers = ((total_of(sums) - count * reference) / math.sqrt(count))[None]
    second = diagonal.double() / divisor
    variance = second - centers.square().sum(0) / divisor
    least = (8 * eps * second).maximum((CONSTANT * (total_of(sums) / count)).square())
    variance = torch.where(variance <= least, 0.0, variance)
    visible = second > (torch.finfo(torch.float32).eps * reference).square()
    off = torch.where(visible, (second / variance - 1.0).clamp_min(0.0).sqrt(), 0.0)
    return Moments(centers, variance, divisor, off)


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves; there is no reference among these."""
    if backend == "reference":
        raise ValueError("backend is 'reference'; it must be one of 'auto', 'triton', 'torch'")
    return resolve(backend, device, dtype)


def layout_gap(backend: str, device: torch.device) -> int:
    """How the triangle is laid out for a backend: the gap of :class:`Triangle`."""
    if backend == "torch":
        return fastest_gap(device)
    from harmonic_triton.losskernel.covariance.rank_k_triton import GAP

    return GAP


def rank_k(triangle: Triangle, draws: Tensor, shift: Tensor, scratch: Tensor | None, precision: str) -> None:
    """triangle += (draws - shift)ᵀ (draws - shift) for draws (k, m).

    ``scratch`` (>= k, width), zero beyond m, is for the torch backend and may be where the draws lie; None is Triton.
    """
    if scratch is None:
        from harmonic_triton.losskernel.covariance.rank_k_triton import rank_k_

        rank_k_(triangle, draws, shift, precision)
        return
    if scratch.dtype != triangle.data.dtype:  # a buffer of float64 draws
        scratch = scratch.new_zeros(len(draws), triangle.width, dtype=triangle.data.dtype)
    rows = scratch[: len(draws)]
    torch.sub(draws, shift, out=rows[:, : triangle.num_samples])
    triangle.rank_k_(rows)


def recentering(count: int, total: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """u, v with S about ``new`` = S about ``old`` + u vᵀ + v uᵀ, for ``count`` draws that add up to ``total``."""
    apart = old.double() - new.double()
    return total.to(apart.device) - count * old.double() + 0.5 * count * apart, apart


def sum_of(rows: Tensor) -> Tensor:
    """(m,) float64 sum of (k, m), a few rows at a time: they are widened first."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(16):
        total += part.sum(0, dtype=torch.float64)
    return total


def mean_of(rows: Tensor) -> Tensor:
    """(m,) float64 mean of (k, m)."""
    return sum_of(rows) / len(rows)


def total_of(sums: dict[int, Tensor]) -> Tensor:
    """(m,) sum of the chains' sums."""
    return torch.stack(list(sums.values())).sum(0)


def merged_counts(counts: Iterable[dict[int, int]]) -> dict[int, int]:
    """Counts by chain, added up."""
    total: dict[int, int] = {}
    for some in counts:
        for one, count in some.items():
            total[one] = total.get(one, 0) + count
    return dict(sorted(total.items()))


def inverse_sd(variance: Tensor) -> Tensor:
    """1/sqrt(variance), 0 where that is 0."""
    return torch.where(variance > 0, variance.rsqrt(), 0.0)
