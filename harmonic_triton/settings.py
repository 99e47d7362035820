"""What a model needs to train well with the harmonic loss: its exponent, and hidden states as long as class vectors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonic_triton._common import validate

PROBES = 64  # random vectors that tell how long a norm makes hidden states
PER_NAT = 3.5  # n over ln V, as measured with 96 and 2048 classes
GPT2_RATE = 6e-4, 768  # GPT-2's peak learning rate and its width
AS_ASKED = 0.25  # relative: bfloat16 holds a gain that is stored as its difference from 1 no better


class Settings(NamedTuple):
    """Where to begin; docs/training.md has the measurements."""

    n: float  # the harmonic exponent
    lr: float  # peak learning rate of AdamW


def recommend(width: int, num_classes: int) -> Settings:
    """An exponent and a learning rate for a language model whose last norm went through :func:`init_last_norm_`.

    n is the larger of sqrt(D) and 3.5 ln V. With n = sqrt(D) an untrained head's scores spread by 0.6 whatever the
    width: the paper's choice, and right while classes are few. But a class must be V^(1/n) times nearer than all
    others to have half of the probability: 2 times with n = 11 and V = 2048, 1.3 times with n = 28.

    The learning rate is GPT-2's 6e-4 at a width of 768, times 768/D: that of cross-entropy in the same model. The paper's
    ten times higher one is for hidden states that begin 50 times as long as class vectors.

    Args:
        width: D.
        num_classes: V.

    Raises:
        TypeError, ValueError: one of them is no positive integer.
    """
    validate.integer("width", width, 1)
    validate.integer("num_classes", num_classes, 1)
    rate, at = GPT2_RATE
    return Settings(n=max(math.sqrt(width), PER_NAT * math.log(num_classes)), lr=rate * at / width)


def init_last_norm_(norm: nn.Module, head: nn.Module) -> nn.Module:
    """Scale a model's last norm, in place, so that hidden states start as long as the class vectors of ``head``.

    HarMax does not change when x and all w are scaled together, but it does when x alone is. A norm whose gain is 1 makes hidden
    states 50 times as long as class vectors drawn with GPT-2's standard deviation of 0.02: every class is then equally
    far, and training spends its first thousand steps on growing one or shrinking the other. docs/training.md has the curves.

    Call it once the weights are drawn, before the model is compiled, sharded or wrapped. Calling it again changes
    nothing. A norm that has been trained keeps the pattern of its gain: all of it is scaled, its bias too. Gains that
    are stored as their difference from 1 (Gemma's) are recognised.

    Args:
        norm: the module between the last block and the head, with a ``weight`` of shape (D,): ``nn.LayerNorm``,
            ``nn.RMSNorm``, or any other that multiplies its output by it.
        head: the module whose ``weight`` (V, D) holds the class vectors: a :class:`HarmonicHead`, the output embedding of a
            patched model, an embedding to which the head is tied.

    Returns:
        The norm.

    Raises:
        TypeError, ValueError: one of them is no such module, or holds no values yet. A norm without a weight cannot be
            scaled: draw the class vectors at the size of its output instead, ``HarmonicHead(..., std=1.0)``.
    """
    gain, vectors = _weight("norm", norm, 1), _weight("head", head, 2)
    if vectors.shape[1] != gain.shape[0]:
        raise ValueError(
            f"norm has {gain.shape[0]} features and head {vectors.shape[1]}; give the norm that the head's input comes from"
        )
    size = _rms(vectors)
    if not 0 < size < float("inf"):
        raise ValueError(f"the class vectors of head are of size {size}; draw them first (head.reset_parameters())")
    bias = getattr(norm, "bias", None)
    probes = torch.randn(PROBES, gain.shape[0], generator=torch.Generator().manual_seed(0)).to(gain)
    before = gain.clone(), None if bias is None else bias.detach().clone()
    with torch.no_grad():
        was = _rms(norm(probes))
        if not 0 < was < float("inf"):
            raise ValueError(f"the norm's output is of size {was}; initialise its weight first")
        sizes = {}
        for stored_from in (0.0, 1.0):
            _set(gain, bias, before, size / was, stored_from)
            sizes[stored_from] = _rms(norm(probes))
        best = min(sizes, key=lambda stored_from: abs(sizes[stored_from] - size))
        found = abs(sizes[best] - size) <= AS_ASKED * size
        _set(gain, bias, before, size / was if found else 1.0, best)
    if not found:
        raise ValueError(
            f"the output of {type(norm).__name__} is not proportional to its weight: it stayed at {sizes[best]:.3g} where"
            f" class vectors are of size {size:.3g}; set its gain to that yourself"
        )
    return norm


def _weight(name: str, module: Any, dimensions: int) -> Tensor:
    """The detached weight of a module, (D,) or (V, D)."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a module, got {validate.describe(module)}")
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None:
        mend = "draw class vectors at the size of its output instead: HarmonicHead(..., std=1.0)"
        raise TypeError(f"{name} must have a weight, and {type(module).__name__} has none; {mend}")
    validate.tensors(**{f"the weight of {name}": weight})
    if weight.dim() != dimensions or not weight.is_floating_point() or not weight.numel():
        wanted = "(D,), the gain of a norm" if dimensions == 1 else "(V, D), the class vectors"
        swapped = "; norm comes first, then head" if weight.dim() == 3 - dimensions else ""
        raise ValueError(f"the weight of {name} must be {wanted}, got {validate.describe(weight)}{swapped}")
    return weight.detach()


def _rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


def _set(
    gain: Tensor, bias: Tensor | None, before: tuple[Tensor, Tensor | None], by: float, stored_from: float
) -> None:
    """The gain and the bias of ``before``, times ``by``; a gain is stored as its difference from ``stored_from``."""
    old, old_bias = before
    gain.copy_((old.double() + stored_from) * by - stored_from)
    if bias is not None and old_bias is not None:
        bias.detach().copy_(old_bias.double() * by)
