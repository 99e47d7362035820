"""Forward mode, which the fused losses have no derivative in: an error instead of a dropped tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common.transforms import forward_mode

NO_TANGENT = (
    "harmonic_triton: a fused loss has no derivative in forward mode (jvp, jacfwd, hessian, linearize, dual tensors);"
    ' use jacrev or grad, or backend="reference" (dense, fp64), which has one'
)


class _NoTangent(torch.autograd.Function):
    """Passes its tensor through; a tangent that it carries is an error instead of being dropped."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:  # type: ignore[override]
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], tensor: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return _NoTangent.apply(tensor), in_dims[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        raise NotImplementedError(NO_TANGENT)


def without_tangents(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The same tensors; in forward mode an error for one with a tangent, which the operators would not see."""
    if not forward_mode():
        return tensors
    if torch.compiler.is_compiling():  # dynamo would drop the check; without fullgraph it goes back to eager from here
        raise NotImplementedError(NO_TANGENT)
    return tuple(None if tensor is None else _NoTangent.apply(tensor) for tensor in tensors)
