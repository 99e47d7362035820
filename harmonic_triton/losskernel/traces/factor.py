"""Products with the covariance of stored draws, none of which forms m x m. T draws of m samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.precision import exact_products

CHUNK = 2**24  # values converted at a time
NOISE = 1e-3  # share of a sample's variance that rounding may have before a warning
SMALLEST_SUM = 1e-70  # of squares about a mean: below it a sample is constant, since fp32 cannot hold its scale

Selection = slice | Sequence[int] | Tensor  # some of the draws or samples: a slice, indices or a mask


class Factor(NamedTuple):
    """Z with ZᵀZ = rho: the stored draws less their mean, times a scale."""

    stored: Tensor  # (T, m) bf16 or fp32, perhaps memory-mapped
    mean: Tensor  # (m,) fp64, on the device of the computations
    scale: Tensor  # (m,) fp64, 1/sqrt(sum of squares about the mean), or 0 where constant

    def products(self, rows: Selection, columns: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
        """(rho of rows and columns in fp64, scales of rows, of columns)."""
        stored, mean, scale = self
        row_at = selection("rows", rows, len(mean))
        column_at = row_at if columns is None else selection("columns", columns, len(mean))
        total = torch.zeros(len(mean[row_at]), len(mean[column_at]), dtype=torch.float64, device=mean.device)

        def standardized(chunk: Tensor, at: slice | Tensor) -> Tensor:
            return (chunk[:, at].to(mean.device, torch.float32) - mean[at].float()).mul_(scale[at].float())

        with exact_products(mean.device):
            for chunk in stored.split(1024):  # as many as an fp32 product sums without harm
                left = standardized(chunk, row_at)
                total += left.t() @ (left if columns is None else standardized(chunk, column_at))
        return total, scale[row_at], scale[column_at]

    def matvec(self, v: Tensor, correlation: bool, centered: bool) -> Tensor:
        """K v or rho v, or with H = I - 1/m on both sides, for (m,) or (m, p), in one pass over the draws."""
        stored, mean, scale = self
        draws, samples = stored.shape
        x = v.to(mean.device, torch.float64).reshape(samples, -1)
        factor = scale.unsqueeze(1) if correlation else (draws - 1) ** -0.5
        x = factor * (x - x.mean(0) if centered else x)
        out = torch.zeros_like(x)
        for chunk in stored.split(max(1, CHUNK // samples)):
            values = chunk.to(mean.device, torch.float64)
            out.addmm_(values.t(), values @ x - mean @ x)  # one factor about its mean is enough
        out *= factor
        return (out - out.mean(0) if centered else out).reshape(v.shape)


def moments(stored: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale of a :class:`Factor`, and mean square over variance of the samples that vary, fp64 on ``device``."""
    low = stored[0].to(device, torch.float64)
    high = low.clone()
    total, squares = torch.zeros_like(low), torch.zeros_like(low)
    for draw in stored:  # one by one: what a sample gets depends on its own values alone
        value = draw.to(device, torch.float64)
        total += value
        squares.addcmul_(value, value)
        torch.minimum(low, value, out=low)
        torch.maximum(high, value, out=high)
    about_mean = squares - total.square() / len(stored)
    varies = (low < high) & (about_mean > SMALLEST_SUM)
    return total / len(stored), torch.where(varies, about_mean.rsqrt(), 0.0), squares[varies] / about_mean[varies]


def warn_of_drift(ratio: Tensor, dtype: torch.dtype, num_samples: int) -> None:
    """``ratio``: mean square over variance of stored values; their rounding adds about eps^2/12 of the former."""
    noise = ratio * torch.finfo(dtype).eps ** 2 / 12
    noisy = int((noise > NOISE).sum())
    if noisy:
        warnings.warn(
            f"the losses of {noisy} of {num_samples} samples have drifted from their reference by up to"
            f" {float(ratio.max()) ** 0.5:.3g} standard deviations, and {dtype} rounds away up to"
            f" {float(noise.max()):.1%} of their variance; burn in longer, begin with a larger batch of draws,"
            " or store float32",
            RuntimeWarning,
            stacklevel=5,
        )


def selection(name: str, chosen: Selection, size: int) -> slice | Tensor:
    """A slice, or indices on the CPU, of ``size`` things."""
    if isinstance(chosen, slice):
        if (chosen.step or 1) < 1:
            raise ValueError(f"{name} must go forward, got {chosen}")
        return chosen
    if not isinstance(chosen, (Tensor, Sequence)) and not hasattr(chosen, "__array__"):
        raise TypeError(f"{name} must be a slice, indices or a mask, got {validate.describe(chosen)}")
    index = torch.as_tensor(chosen).cpu()
    if index.dtype == torch.bool and index.shape == (size,):
        return index.nonzero()[:, 0]
    if index.numel() == 0 and index.dim() == 1:
        return index.long()
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool or index.dim() != 1:
        raise TypeError(f"{name} must be a slice, 1-d indices or a mask of {size}, got {validate.describe(index)}")
    if int(index.min()) < -size or int(index.max()) >= size:
        raise ValueError(f"{name} must lie between 0 and {size - 1}, got {int(index.min())} ... {int(index.max())}")
    return index.long() % size
