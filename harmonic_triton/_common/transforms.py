"""What surrounds a call: forward mode, transforms of ``torch.func``, tracing."""

from __future__ import annotations

import torch
from torch import Tensor


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
