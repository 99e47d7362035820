"""Every check of a caller's arguments, and its message: what it was, and the mend."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(value: Any) -> str:
    """Shape, dtype and device of a tensor, or the value itself."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return repr(value)


def tensors(**named: Any) -> None:
    """Each argument is a tensor that holds values, and none is a DTensor among plain ones."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    distributed = {name: type(value).__name__ == "DTensor" for name, value in named.items()}
    if any(distributed.values()):
        which = ", ".join(name for name, is_dtensor in distributed.items() if is_dtensor)
        raise TypeError(
            f"{which}: DTensor is not supported; pass the local or the full tensor (.to_local(), .full_tensor())"
        )
    for name, value in named.items():
        if value.is_meta:
            raise ValueError(f"{name} is on meta and holds no values; give it some first (to_empty, then initialise)")


def features(input: Tensor, linear_weight: Tensor) -> None:
    """input (..., D) and linear_weight (V, D) are floating point, of one dtype, on one device."""
    for name, value in (("input", input), ("linear_weight", linear_weight)):
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be bfloat16, float16, float32 or float64, got {describe(value)}; cast it first"
            )
    if linear_weight.dim() != 2 or linear_weight.shape[0] == 0 or linear_weight.shape[1] == 0:
        raise ValueError(f"linear_weight must be (V, D) with V, D >= 1, got {describe(linear_weight)}")
    if input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input must be (..., D) with D = {linear_weight.shape[1]} as in linear_weight"
            f" {tuple(linear_weight.shape)}, got {describe(input)}"
        )
    if input.device != linear_weight.device:
        raise ValueError(
            f"input is on {input.device} and linear_weight on {linear_weight.device}; move them to one device"
        )
    if input.dtype != linear_weight.dtype:
        raise TypeError(f"input is {input.dtype} and linear_weight {linear_weight.dtype}; cast one of them")


def labels(input: Tensor, target: Tensor, shift: bool) -> None:
    """target (...) holds integer classes, one for each token of input."""
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must be int64 (or int32) class indices, got {describe(target)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target must have the shape of input without its last dimension, {tuple(input.shape[:-1])},"
            f" got {describe(target)}; flatten or reshape it"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} and input on {input.device}; move them to one device")
    if shift and (target.dim() == 0 or target.shape[-1] == 0):
        raise ValueError(
            f"shift=True needs a sequence: input (..., T, D) and target (..., T) with T >= 1, got {describe(target)}"
        )


def exponent(n: Any) -> None:
    """n is None, a positive finite number, or a floating tensor of shape () or (1,), whose value its use checks."""
    if isinstance(n, Tensor):
        if n.shape not in ((), (1,)) or not n.is_floating_point():
            raise ValueError(f"n must be a number or a floating tensor of shape () or (1,), got {describe(n)}")
    elif n is not None:
        number("n", n)
        if not 0 < n < math.inf:
            raise ValueError(f"n must be a finite harmonic exponent > 0, got {n}")


def number(name: str, value: Any) -> None:
    """A plain number (NumPy's and symbolic ones included)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")


def integer(name: str, value: Any, least: float = -math.inf) -> None:
    """An integer (NumPy's and symbolic ones included), at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def flag(name: str, value: Any) -> None:
    """True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True, False or None, got {describe(value)}")


def options(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Every option given is known."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{owner} has no option {', '.join(map(repr, unknown))}; it takes {', '.join(sorted(known))}")


def between(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """low <= value <= high and finite."""
    number(name, value)
    if not (low <= value <= high and value < math.inf):
        limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be finite and {limit}, got {value}")


def eps(value: Any) -> None:
    """A squared distance that fp32 can still be added to."""
    between("eps", value, 0.0, 2.0**125)


def reduction(value: str, num_items: Any) -> None:
    """A known reduction; num_items divides a sum over tokens, so it makes no sense with 'none'."""
    if value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {value!r}")
    if num_items is None:
        return
    if value == "none":
        raise ValueError("num_items divides the summed loss; with reduction='none' divide the result yourself")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0 or num_items.requires_grad:
            raise ValueError(f"num_items must be a number or a 0-d tensor without gradient, got {describe(num_items)}")
    else:
        number("num_items", num_items)
        if not 0 < num_items < math.inf:
            raise ValueError(f"num_items must be finite and > 0, got {num_items}")


def class_weight(weight: Any, linear_weight: Tensor) -> None:
    """(V,) floating point, a constant of the loss."""
    if weight is None:
        return
    tensors(class_weight=weight)
    if weight.shape != linear_weight.shape[:1] or not weight.is_floating_point():
        raise ValueError(
            f"class_weight must be floating and of shape ({linear_weight.shape[0]},), got {describe(weight)}"
        )
    if weight.device != linear_weight.device:
        raise ValueError(f"class_weight is on {weight.device} and linear_weight on {linear_weight.device}")
    if weight.requires_grad:
        raise ValueError("class_weight is a constant of the loss and gets no gradient; pass class_weight.detach()")


def budget(value: Any) -> None:
    """Bytes, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral) or value <= 0):
        raise ValueError(f"memory_budget must be a positive number of bytes or None, got {describe(value)}")


def seed(value: Any) -> None:
    """A seed of SGLD chains."""
    integer("seed", value, 0)
    if value >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {value}")
