"""What a model needs to train well with the harmonic loss: its exponent, and hidden states as long as class vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonic_triton._common import validate

PROBES = 64  # random vectors that tell how long a norm makes hidden states
PER_NAT, MOST = 3.5, 28.0  # n over ln V, up to the paper's exponent for GPT-2
RATE = 0.256  # peak learning rate times D: 2e-3 where it was measured, at D = 128
AS_ASKED = 0.25  # relative: bfloat16 holds a gain that is stored as its difference from 1 no better


class Settings(NamedTuple):
    """Where to begin; docs/training.md has the measurements."""

    n: float  # the harmonic exponent
    lr: float  # peak learning rate of AdamW


def recommend(width: int, num_classes: int) -> Settings:
    """An exponent and a learning rate for a language model whose last norm went through :func:`init_last_norm_`.

    n is 3.5 ln V up to 28, and sqrt(D) where that is more. With n = sqrt(D) an untrained head's scores spread by 0.6
    whatever the width: the paper's choice, and right while classes are few. But a class must be V^(1/n) times nearer
    than all others to have half of the probability: with V = 2048 twice as near for n = 11, 1.3 times for n = 28,
    which ended 0.11 nats lower. n = 64 ended higher than either, and 28 is also what the paper took for GPT-2.

    The learning rate is 2e-3 at D = 128, the best of 1e-3, 2e-3 and 4e-3 for a small Llama and 0.01 nats from the best for
    nanoGPT's shape; cross-entropy took 2e-3 and 4e-3. Elsewhere it is in proportion to 1/D, which was not measured. The paper's
    rate of ten times cross-entropy's is for hidden states that begin 50 times as long as class vectors.

    Args:
        width: D.
        num_classes: V.

    Raises:
        TypeError, ValueError: one of them is no positive integer.
    """
    validate.integer("width", width, 1)
    validate.integer("num_classes", num_classes, 1)
    return Settings(n=max(math.sqrt(width), min(PER_NAT * math.log(num_classes), MOST)), lr=RATE / width)


def init_last_norm_(norm: nn.Module, head: nn.Module) -> nn.Module:
    """Scale a model's last norm, in place, so that hidden states start as long as the class vectors of ``head``.

    HarMax does not change when x and all w are scaled together, but it does when x alone is. A norm whose gain is 1 makes hidden
    states 50 times as long as class vectors drawn with GPT-2's standard deviation of 0.02: every class is then equally
    far, and training begins with growing one or shrinking the other: after 400 steps of a small GPT the loss was 2.53 nats
    instead of 2.13 (docs/training.md).

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
    size = _size(vectors)
    if not 0 < size < math.inf:
        raise ValueError(f"the class vectors of head are of size {size}; draw them first (head.reset_parameters())")
    bias = getattr(norm, "bias", None)
    scaled = [gain] if bias is None else [gain, bias.detach()]
    before = [tensor.clone() for tensor in scaled]
    probes = torch.randn(PROBES, gain.shape[0], generator=torch.Generator().manual_seed(0), device="cpu").to(gain)
    with torch.no_grad(), _evaluating(norm):
        was = _output_size(norm, probes)
        if not 0 < was < math.inf:
            raise ValueError(f"the norm's output is of size {was}; initialise its weight first")
        found = {}
        for stored_from in (0.0, 1.0):  # 1.0: the gain is 1 + weight
            after = [
                (old.to(_precise(old)) + start) * (size / was) - start
                for old, start in zip(before, (stored_from, 0.0), strict=False)
            ]
            _copy(scaled, after)
            found[abs(_output_size(norm, probes) - size)] = after
        _copy(scaled, found[min(found)] if min(found) <= AS_ASKED * size else before)
    if min(found) > AS_ASKED * size:
        raise ValueError(
            f"the output of {type(norm).__name__} is not proportional to its weight, so that it cannot be brought from"
            f" {was:.3g} to the class vectors' {size:.3g}; set its gain yourself"
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
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"the weight of {name} is spread over processes; call init_last_norm_ before the model is sharded"
        )
    validate.tensors(**{f"the weight of {name}": weight})
    if weight.dim() != dimensions or not weight.is_floating_point() or not weight.numel():
        wanted = "(D,), the gain of a norm" if dimensions == 1 else "(V, D), the class vectors"
        swapped = "; norm comes first, then head" if weight.dim() == 3 - dimensions else ""
        raise ValueError(f"the weight of {name} must be {wanted}, got {validate.describe(weight)}{swapped}")
    return weight.detach()


def _output_size(norm: nn.Module, probes: Tensor) -> float:
    output = norm(probes)
    if not isinstance(output, Tensor) or output.shape != probes.shape:
        raise TypeError(
            f"norm must map (N, D) to a tensor of that shape, {type(norm).__name__} gave {validate.describe(output)}"
        )
    return _size(output)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, and with running statistics left alone; every part's mode is put back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _size(values: Tensor) -> float:
    """The root of the mean square of the entries, without a copy of them."""
    rows = torch.linalg.vector_norm(values.detach(), dim=-1, dtype=_precise(values))
    return float(rows.square().mean().sqrt()) / math.sqrt(values.shape[-1])


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
