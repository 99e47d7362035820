"""The largest step size at which the chains are stable, from the curvature at the trained parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from harmonic_triton._common import validate
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.data import Samples, samples
from harmonic_triton.losskernel.sampling.parameters import FlatParameters, Mask, PerSampleLoss
from harmonic_triton.losskernel.sampling.rng import CounterRNG
from harmonic_triton.losskernel.sampling.sharding import flat_parameters


def stability_bound(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    mask: Mask = None,
    num_iterations: int = 12,
) -> float:
    """The step size at which SGLD becomes unstable, 4 / lambda_max(nbeta H + gamma I), H the Hessian of a minibatch's loss.

    Power iterations with Hessian-vector products by central differences of gradients, over the probe's own width
    1/sqrt(lambda) in that direction (so any loss serves, also one without a second derivative). The estimate of
    lambda_max comes from below: keep a margin. For "sgnht" the bound is conservative by 2; for "rmsprop" it is that of
    plain SGLD.

    Args:
        model, per_sample_loss, train_data, config, seed, mask: as for :class:`losskernel.Sampler`.
        num_iterations: of two gradients each.

    Returns:
        The bound, at most 4 / gamma where the curvature is mostly negative; inf where there is no positive curvature and no
        localization, 0 where gradients are not finite.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if not isinstance(config, SGLDConfig):
        raise TypeError(f"config must be an SGLDConfig, got {validate.describe(config)}")
    validate.seed(seed)
    validate.integer("num_iterations", num_iterations, 1)
    parameters = flat_parameters(model, per_sample_loss, mask)
    data = samples("train_data", train_data, parameters.center.device)
    return bound(parameters, data, config, seed, num_iterations)


def bound(parameters: FlatParameters, data: Samples, config: SGLDConfig, seed: int, iterations: int = 12) -> float:
    rng = CounterRNG(seed ^ 0x5DEECE66D)
    n, size = len(data), min(config.batch_size, len(data))
    rows = torch.arange(n) if size == n else rng.minibatch(0, 0, n, size)
    step = config.microbatch_size or size
    center = parameters.center

    def gradient(at: Tensor) -> Tensor:
        values, total = parameters.placed(at), torch.zeros_like(at)
        for start in range(0, size, step):
            picked = rows[start : start + step]
            _, slope = parameters.gradient(values, data.batch(picked), len(picked) / size)
            parameters.add_(total, slope, 1.0)
        return parameters.masked_(total)

    def largest(shift: float) -> float:
        """The eigenvalue of nbeta H + (gamma + shift) I that is largest in magnitude."""
        v = torch.empty_like(center).unsqueeze(0)
        parameters.noise(rng, v, [0], 0)
        v = parameters.masked_(v.squeeze(0))
        v /= parameters.norm(v)
        value, reach = config.localization + shift, 1 + parameters.norm(center)
        for _ in range(iterations):
            width = min(1 / math.sqrt(abs(value)), reach) if value else reach
            product = (gradient(center + width * v) - gradient(center - width * v)).mul_(config.nbeta / (2 * width))
            product.add_(v, alpha=config.localization + shift)
            value, norm = parameters.dot(v, product), parameters.norm(product)
            if not math.isfinite(norm):
                return math.inf
            if norm == 0:
                return 0.0
            v = product / norm
        return value

    with parameters.evaluating():
        top = largest(0.0)
        if top < 0:  # negative curvature is the largest; shifted by it, the positive end is
            # of that end a few iterations may know nothing; directions without curvature have gamma
            top = max(largest(-top) + top, config.localization)
    return 4 / top if top > 0 else math.inf
