"""What a model does to the output of its head: measured, since configurations name the same thing differently."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

POWERS = range(-3, 4)  # of which the probes are ninth powers: of the size of logits, and far beyond every cap


class Transform(NamedTuple):
    """v becomes cap tanh(scale v/cap), or scale v where there is no cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def __str__(self) -> str:
        scaled = "v" if self.scale == 1 else f"{self.scale:g} v"
        return scaled if self.cap is None else f"{self.cap:g} tanh({scaled}/{self.cap:g})"


IDENTITY = Transform()


def probes(input: Tensor) -> Tensor:
    """A stand-in for the scores of input (..., D): the same few values for every token, (..., K) in fp32."""
    values = torch.arange(POWERS.start, POWERS.stop, device=input.device, dtype=torch.float32) ** 9
    return values.expand(*input.shape[:-1], len(POWERS)).contiguous()


def version(values: Tensor) -> int:
    """How often a tensor has been written to, as far as it tells."""
    return 0 if torch.compiler.is_compiling() or values.is_inference() else values._version


def measure(before: Tensor, after: Tensor, written: bool = False) -> Transform:
    """What was done to the probes; ``written`` where it was done in place.

    Raises:
        ValueError: something else than a scale and a cap.
    """
    if after is before and not written:
        return IDENTITY
    unknown = ValueError(
        "the model does something to its head's output that is neither a scale nor a soft cap; this loss cannot follow it"
    )
    if after.shape != before.shape or after.numel() == 0:
        raise unknown
    given = [float(power**9) for power in POWERS]
    found: list[float] = after.detach().reshape(-1, len(POWERS))[0].tolist()
    one, most = found[len(POWERS) // 2 + 1], found[-1]
    if math.isclose(found[-2], most, rel_tol=1e-6) and 0 < one < most:
        transform = Transform(_rounded(most * math.atanh(one / most)), most)
    else:
        transform = Transform(_rounded(one))
    rounding = 16 * torch.finfo(after.dtype).eps
    expected = transform(torch.tensor(given, dtype=torch.float64)).tolist()
    if not all(math.isclose(a, b, rel_tol=rounding) for a, b in zip(found, expected, strict=True)):
        raise unknown
    return transform


def _rounded(scale: float) -> float:
    """1 where it was measured as 1."""
    return 1.0 if math.isclose(scale, 1.0, rel_tol=1e-5) else scale
