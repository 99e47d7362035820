"""Scores of a forward pass that was asked for the loss: formed when somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from harmonic_triton.integrations.transformers.head import LossHead
from harmonic_triton.integrations.transformers.transform import Transform, version

_ATTRIBUTES = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_meta",
               "is_sparse", "is_nested", "is_quantized")  # fmt: skip
ABOUT = frozenset({
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex,
})  # fmt: skip


class LazyLogits(Tensor):
    """What ``head(input)`` would give. Shape, dtype and device are known; any other use forms it, with its gradient."""

    _head: LossHead
    _input: Tensor
    _transform: Transform
    _weight: tuple[Tensor | None, int]
    _formed: Tensor | None

    @staticmethod
    def of(head: LossHead, input: Tensor, transform: Transform) -> LazyLogits:
        """The scores of input (..., D) as the model would return them."""
        dtype = input.dtype if head.keeps_dtype or input.dtype == torch.float64 else torch.float32
        lazy: LazyLogits = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, (*input.shape[:-1], head.weight.shape[0]), dtype=dtype, device=input.device
        )
        lazy._head, lazy._input, lazy._transform, lazy._formed = head, input, transform, None
        lazy._weight = _state_of(head)
        return lazy

    def form(self) -> Tensor:
        """The N x V matrix; held from then on, unless it was formed without a gradient that it would have."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._formed is not None:
                return self._formed
            (weight, count), (now, count_now) = self._weight, _state_of(self._head)
            if weight is not now or count != count_now:
                raise RuntimeError(
                    "logits beside a loss are formed when they are used, and the class vectors are no longer those of the forward"
                    " pass: use them before the optimizer's step (output.logits.detach().clone() forms them), or call the model"
                    " without labels"
                )
            try:
                formed = self._transform(self._head(self._input)).to(self.dtype)
            except TypeError as error:  # which a binary operator would take for "not my business"
                raise RuntimeError(
                    "logits beside a loss are formed when they are used, and here they cannot be: the weights are sharded"
                    " outside of the forward pass; call the model without labels"
                ) from error
            if torch.is_grad_enabled() or not self._input.requires_grad:
                self._formed = formed
            return formed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.form, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.form, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, device={self.device}): formed when used"


def _state_of(head: LossHead) -> tuple[Tensor | None, int]:
    """The weight that a head has, and how often it was written to; None where it lies elsewhere or is formed in every use."""
    weight = head._parameters.get("weight")
    return (None, 0) if weight is None or weight.is_meta else (weight, version(weight))
