"""What travels from a call down to a backend, written once: schemas, packing and gradient slots follow from it."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from harmonic_triton._version import __version__
from harmonic_triton.fused.results import TokenResults, TokenWeights, Unfinished, Upstream


class Operands(NamedTuple):
    """The tensors of a call."""

    x: Tensor  # (N, D)
    w: Tensor  # (V, D)
    target: Tensor  # (N,) int64
    n: Tensor | None  # () harmonic exponent; None: cross-entropy, whose scores are dot products
    smooth_weight: Tensor | None  # (V,) v_j of the smoothing term
    bias: Tensor | None = None  # (V,) of the logits (cross-entropy), compute dtype

    @property
    def smoothing(self) -> bool:
        """Whether there is a smoothing term."""
        return self.smooth_weight is not None


class Problem(NamedTuple):
    """What is to be computed of them."""

    eps: float  # added to every squared distance
    mix: float  # alpha of the mix with a uniform distribution
    ignore_index: int
    want_scores: bool  # the sums behind entropy and the exponent's gradient
    backend: str  # "torch" or "triton"
    budget: int  # bytes of scratch, 0 leaves them to the backend
    softcap: float = 0.0  # c of c tanh(logit/c) (cross-entropy), 0: none
    token_scaling: bool = False  # whether a token's loss counts as often as its target is probable
    version: str = (
        __version__  # not read: so that a compiler's cache on disk takes no graph of another version's operators
    )


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    n: bool
    bias: bool = False


class Finishing(NamedTuple):
    """What gradients formed in the forward pass still need."""

    rival: Tensor  # (N,) of ``TokenResults``
    g: Tensor  # () upstream gradient of the result
    last: bool  # whether nobody needs ``Unfinished`` again: it may be written over and handed out


class Backend(Protocol):
    """A module that computes both losses. It returns per-token results and dX, dW and db, empty where not asked for.

    Target and rival are measured directly and kept out of the products; tokens that are ignored or have no upstream
    gradient contribute nothing. What follows from the results alone (losses, the exponent's gradient) is not its business.
    """

    def forward(self, operands: Operands, problem: Problem) -> TokenResults:
        """Per-token results; O(N + V) memory beside the scratch."""

    def backward(
        self, operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dX and dW in the operands' dtype, db in the compute dtype; the products computed again."""

    def forward_backward(
        self, operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
    ) -> tuple[TokenResults, Unfinished]:
        """Results, and dX, dW and db of the weighted sum of the losses as far as they can be without its upstream gradient."""

    def finish(
        self, operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dX, dW and db, times the upstream gradient: a gradient scaler's factor comes before the
        rounding to 16 bits."""


_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", str: "str",
}  # fmt: skip


def schema(*parts: type) -> str:
    """The arguments of an operator that takes these parts one after the other."""
    return ", ".join(
        f"{_SCHEMA_TYPES[kind]} {part.__name__.lower()}_{name}"
        for part in parts
        for name, kind in typing.get_type_hints(part).items()
    )


def unpack(flat: Sequence[Any], *parts: Any) -> list[Any]:
    """The parts that were laid one after the other into ``flat``."""
    out, at = [], 0
    for part in parts:
        end = at + len(part._fields)
        out.append(part._make(flat[at:end]))
        at = end
    return out
