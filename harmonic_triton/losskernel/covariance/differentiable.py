"""The covariance of losses in one differentiable call, :func:`loss_covariance`, and its operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.precision import no_autocast
from harmonic_triton._common.transforms import forward_mode
from harmonic_triton.losskernel.covariance.sums import BUFFER, CONSTANT, layout_gap, rank_k, resolve_backend, sum_of
from harmonic_triton.losskernel.covariance.triangle import Triangle


def loss_covariance(losses: Tensor, *, correlation: bool = False, backend: str = "auto") -> Tensor:
    """Covariance of m losses over T draws, (m, m), differentiable: for training against a kernel.

    The gradient of the covariance for upstream G is (G + Gᵀ)(l - mean)/(T - 1), exact, as is the correlation's. Runs the
    rank-k update of :class:`StreamingCovariance` about the mean; works under ``torch.func``, ``vmap`` and
    ``torch.compile``, and can be differentiated again. Matrix products of the backward pass follow torch's own
    precision settings.

    Args:
        losses: (T, m) with T >= 2, floating. bfloat16 and float16 are computed in float32.
        correlation: K_ij/sqrt(K_ii K_jj) instead: 1 on the diagonal. A sample whose variance is 0 has 0 in its row and
            column, the diagonal too, and gets no gradient.
        backend: "auto", "triton" or "torch" (float64: torch). Only "auto" falls back.

    Returns:
        (m, m) float32 (float64 for float64 losses), symmetric.

    Raises:
        TypeError, ValueError: an argument is wrong, or a backend asked for by name cannot serve.
    """
    validate.tensors(losses=losses)
    if losses.dtype not in validate.FLOAT_DTYPES:
        raise TypeError(f"losses must be floating, got {validate.describe(losses)}; cast them first")
    if losses.dim() != 2 or losses.shape[0] < 2 or losses.shape[1] < 1:
        raise ValueError(f"losses must be (T, m) with T >= 2 draws of m >= 1 samples, got {validate.describe(losses)}")
    validate.flag("correlation", correlation)
    rows = losses.to(torch.promote_types(losses.dtype, torch.float32))
    backend = resolve_backend(backend, rows.device, rows.dtype)
    covariance = _plain_covariance(rows) if forward_mode() else _LossCovariance.apply(rows, backend)
    if not correlation:
        return covariance
    variance = covariance.diagonal()
    constant = variance <= 0
    inverse_sd = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())
    rho = covariance * inverse_sd[:, None] * inverse_sd
    return torch.diagonal_scatter(rho, torch.where(constant, 0.0, 1.0).to(rho.dtype))


def _plain_covariance(losses: Tensor) -> Tensor:
    """The same of torch's own operations, in fp64: for forward mode, which the operator does not know."""
    mean = losses.double().mean(0)
    centered = losses.double() - mean
    noise = (len(losses) - 1) * (CONSTANT * mean).square()
    centered = (
        centered - torch.where(centered.square().sum(0) <= noise, centered, 0.0).detach()
    )  # a constant sample's: 0
    return (centered.T @ centered / (len(losses) - 1)).to(losses.dtype)


_LIBRARY = torch.library.Library("harmonic_triton", "FRAGMENT")
_LIBRARY.define("loss_covariance(Tensor losses, str backend) -> Tensor")


def _loss_covariance(losses: Tensor, backend: str) -> Tensor:
    """The operator: (T, m) fp32 or fp64 -> (m, m)."""
    draws, m = losses.shape
    with torch.no_grad():
        losses = losses.detach().contiguous()
        total = sum_of(losses)
        shift = (total / draws).to(losses.dtype)
        triangle = Triangle(m, gap=layout_gap(backend, losses.device), dtype=losses.dtype, device=losses.device)
        scratch = losses.new_zeros(min(draws, BUFFER), triangle.width) if backend == "torch" else None
        for rows in losses.split(BUFFER):
            rank_k(triangle, rows, shift, scratch, "split")
        center = ((total - draws * shift.double()) / math.sqrt(draws)).to(losses.dtype)[None]
        out = losses.new_empty(m, m)
        triangle.unfold(out, -center, center, 1.0 / (draws - 1), None)
        variance = out.diagonal()
        variance[variance <= (CONSTANT * shift).square()] = 0.0
        return out


_LIBRARY.impl("loss_covariance", _loss_covariance, "CompositeExplicitAutograd")
torch.library.register_fake(
    "harmonic_triton::loss_covariance",
    lambda losses, backend: losses.new_empty(losses.shape[1], losses.shape[1]),
    lib=_LIBRARY,
)


class _LossCovariance(torch.autograd.Function):
    """loss_covariance's operator and its gradient, which is made of differentiable operations."""

    @staticmethod
    def forward(losses: Tensor, backend: str) -> Tensor:
        covariance: Tensor = torch.ops.harmonic_triton.loss_covariance(losses, backend)
        return covariance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (losses,) = ctx.saved_tensors
        centered = losses - losses.mean(0)
        centered = centered - centered.mean(0)  # what rounding left of a mean much larger than the spread
        with no_autocast(losses.device):
            return centered @ (upstream + upstream.T) / (len(losses) - 1), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], losses: Tensor, backend: str) -> tuple[Tensor, int]:
        return torch.stack([_LossCovariance.apply(one, backend) for one in losses.unbind(in_dims[0])]), 0
