"""The output embedding of a patched model: still an ``nn.Linear`` of the same weight, that computes the loss itself."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonic_triton.functional import harmonic_logits, linear_cross_entropy, linear_harmonic_loss
from harmonic_triton.integrations.transformers.transform import IDENTITY, Transform, probes, version

CHANGED = (
    "the model turns its head's output v into {}, which makes sense for logits and not for the log-probabilities of the"
    " harmonic loss; switch it off first, in the model's config (for instance config.final_logit_softcapping = None, or"
    " config.logits_scaling = 1.0), or use mode='cross_entropy'"
)


class Call:
    """One forward pass of a model: what its head was given and what it gave.

    A model that was given labels would pass logits to its loss function. The head gives it a stand-in instead and keeps its
    input; the loss function then calls the head again, with the labels that the model has made of its arguments.
    """

    def __init__(self, heads: list[LossHead], wants_loss: bool) -> None:
        self.heads, self.wants_loss = heads, wants_loss
        self.head: LossHead | None = None
        self.input: Tensor | None = None
        self.given: Tensor | None = None  # what the head returned
        self.version = 0
        self.seen: Tensor | None = None  # what the model made of it, as its loss function got it
        self.transform = IDENTITY

    def written(self) -> bool:
        """Whether the model has changed in place what the head gave."""
        return self.given is not None and version(self.given) != self.version


class _Active(threading.local):
    """The forward pass that this thread is in: others may use the same model meanwhile."""

    call: Call | None = None


ACTIVE = _Active()


class LossHead(nn.Linear):
    """An ``nn.Linear`` that has become the head of a loss by a change of its class: parameters and ties stay.

    ``head(x)`` is what the model calls; ``head(x, labels, ...)`` is the loss. The weight is read nowhere else, so that whatever
    gathers it around a module's forward (FSDP, ZeRO-3, offloading) finds the loss inside.
    """

    loss_options: dict[str, Any]
    keeps_dtype = True  # whether scores are of the input's dtype

    def forward(self, input: Tensor, labels: Tensor | None = None, **of_call: Any) -> Tensor:  # type: ignore[override]
        """Scores of every class, or the loss where labels are given."""
        if labels is not None:
            return self.loss(input, labels, **of_call)
        call = ACTIVE.call
        if call is None or not any(head is self for head in call.heads):
            return self.scores(input)
        if call.input is not None:
            raise TypeError("the model calls its output embedding more than once: which call has the loss is unknown")
        call.head, call.input = self, input
        call.given = probes(input) if call.wants_loss else self.scores(input)
        call.version = version(call.given)
        return call.given

    def scores(self, input: Tensor) -> Tensor:
        """What generation uses, (..., V)."""
        raise NotImplementedError

    def loss(
        self, input: Tensor, labels: Tensor, *, transform: Transform, num_items: Any, ignore_index: int, shift: bool
    ) -> Tensor:
        """The mean, or the sum over ``num_items`` where those are given."""
        raise NotImplementedError


class HarmonicLinear(LossHead):
    """Log-probabilities and loss of HarMax. Its state says which n and eps the weight was trained with."""

    n: float
    eps: float
    keeps_dtype = False  # but of fp32 at least

    def scores(self, input: Tensor) -> Tensor:
        return harmonic_logits(input, self.weight, n=self.n, eps=self.eps)

    def loss(
        self, input: Tensor, labels: Tensor, *, transform: Transform, num_items: Any, ignore_index: int, shift: bool
    ) -> Tensor:
        if transform != IDENTITY:
            raise ValueError(CHANGED.format(transform))
        result: Tensor = linear_harmonic_loss(
            input, self.weight, labels, n=self.n, eps=self.eps, num_items=num_items, ignore_index=ignore_index,
            shift=shift, **self.loss_options,
        )  # fmt: skip
        return result

    def get_extra_state(self) -> Tensor:
        """[n, eps] in float64, which no cast of the module changes."""
        return torch.tensor([self.n, self.eps], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: a state of other values is refused."""
        if not isinstance(state, Tensor) or state.is_meta or state.shape != (2,):
            return
        rounding = torch.finfo(state.dtype).eps  # some programs cast whole states to 16 bits
        n, eps = state.tolist()
        if not (math.isclose(n, self.n, rel_tol=rounding) and math.isclose(eps, self.eps, rel_tol=rounding)):
            raise ValueError(
                f"the weights were trained with n = {n:g} and eps = {eps:g}, and this head has n = {self.n:g} and eps ="
                f" {self.eps:g}: its loss would be another; patch the model by apply_harmonic_loss(model, n={n!r}, eps={eps!r})"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n={self.n:g}, eps={self.eps:g}"


class CrossEntropyLinear(LossHead):
    """Logits as ever, and the fused loss: the same function, hence the same state and the same files."""

    def scores(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def loss(
        self, input: Tensor, labels: Tensor, *, transform: Transform, num_items: Any, ignore_index: int, shift: bool
    ) -> Tensor:
        scaled: Tensor = input
        bias: Tensor | None = self.bias
        if transform.scale != 1:
            scaled, bias = input * transform.scale, None if bias is None else bias * transform.scale
        result: Tensor = linear_cross_entropy(
            scaled, self.weight, labels, bias=bias, softcap=transform.cap, num_items=num_items, ignore_index=ignore_index,
            shift=shift, **self.loss_options,
        )  # fmt: skip
        return result
