"""What surrounds a call: forward mode, transforms of ``torch.func``, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Run = TypeVar("Run", bound=Callable[..., object])
_WHOLE: list[Callable[..., object]] = []


def forward_mode() -> bool:
    """Whether tensors may carry tangents: inside ``torch.func.jvp`` and the like, or ``forward_ad.dual_level``."""
    return torch.autograd.forward_ad._current_level >= 0


def in_transform() -> bool:
    """Inside vmap, grad or another transform of torch.func, run eagerly."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def requires_grad(tensor: Tensor) -> bool:
    """Whether a gradient can flow, also to a tensor that ``vmap`` has wrapped: the wrapper says no."""
    while not tensor.requires_grad and torch._C._functorch.is_batchedtensor(tensor):
        if torch.compiler.is_compiling():  # dynamo cannot look inside; what turns out not to be wanted is dropped
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def whole(function: Run) -> Run:
    """Marks a function of tensors and constants that is one node in the graph of a compiled transform.

    It calls an autograd Function there: dynamo's own form of one has no rule for ``vmap``, the Function itself has.
    """
    _WHOLE.append(function)
    return function


def compiled_transform() -> bool:
    """Whether dynamo traces the inside of a transform of torch.func."""
    return torch.compiler.is_compiling() and _transform_is_traced()


def _transform_is_traced() -> bool:
    active = torch._C._are_functorch_transforms_active()
    for function in _WHOLE if active else ():  # now, because this imports all of dynamo
        torch.compiler.allow_in_graph(function)
    return active


_transform_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # dynamo opens what it traces
