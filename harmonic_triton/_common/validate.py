"""Every check of a caller's arguments, and its message: what it was, and the mend."""

from __future__ import annotations

import math
import numbers
import reprlib
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex32, torch.complex64, torch.complex128)


def describe(value: Any) -> str:
    """Shape, dtype and device of a tensor, shape and dtype of another array, or the value itself where it is short."""
    name, shape = type(value).__name__, getattr(value, "shape", None)
    if isinstance(value, Tensor):
        return f"{name} of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(shape, tuple) and shape:
        return f"{name} of shape {tuple(shape)}" + (f", {value.dtype}" if hasattr(value, "dtype") else "")
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the longest
        return f"{name} of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, dict, set)):
        text = reprlib.repr(value)
        return text if len(text) <= 60 else f"{name} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _as_tensor(name: str, value: Any) -> str:
    """How a value that is no tensor becomes one, where that is known."""
    if isinstance(value, nn.Module):
        return f"; pass its parameter, {name}.weight" if isinstance(getattr(value, "weight", None), Tensor) else ""
    return f"; use torch.as_tensor({name})" if isinstance(value, (list, tuple)) or getattr(value, "shape", None) else ""


def tensors(**named: Any) -> None:
    """Each argument is a dense tensor that holds values, and none is a DTensor among plain ones."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}{_as_tensor(name, value)}")
        if value.is_nested:  # whose shape cannot always be asked for
            raise TypeError(f"{name} is a nested tensor; pad it (to_padded_tensor)")
        if value.layout != torch.strided:
            raise TypeError(
                f"{name} must be dense, got layout {value.layout}, {describe(value)}; use {name}.to_dense()"
            )
        if value.is_quantized:
            raise TypeError(f"{name} must not be quantized, got {describe(value)}; use {name}.dequantize()")
    distributed = {name: type(value).__name__ == "DTensor" for name, value in named.items()}
    if any(distributed.values()):
        which = ", ".join(name for name, is_dtensor in distributed.items() if is_dtensor)
        raise TypeError(
            f"{which}: DTensor is not supported; pass the local or the full tensor (.to_local(), .full_tensor())"
        )
    for name, value in named.items():
        if value.is_meta:
            raise ValueError(f"{name} is on meta and holds no values; give it some first (to_empty, then initialise)")


_SWAPPED = "; are input and linear_weight swapped? The order is input, linear_weight, target"


def features(input: Tensor, linear_weight: Tensor, least_rows: int = 1) -> None:
    """input (..., D) and linear_weight (V, D) are floating point, of one dtype, on one device; V is at least ``least_rows``."""
    for name, value in (("input", input), ("linear_weight", linear_weight)):
        if value.dtype not in FLOAT_DTYPES:
            whole = not (value.is_floating_point() or value.is_complex())
            raise TypeError(
                f"{name} must be bfloat16, float16, float32 or float64, got {describe(value)}; cast it first"
                + (" (class indices go into target)" if whole else "")
            )
    if linear_weight.dim() != 2 or linear_weight.shape[0] < least_rows or linear_weight.shape[1] == 0:
        swapped = linear_weight.dim() > 2 and input.dim() == 2 and input.shape[1] == linear_weight.shape[-1]
        sizes = "V, D >= 1" if least_rows else "D >= 1"  # a process may have none of the rows
        raise ValueError(
            f"linear_weight must be (V, D) with {sizes}, got {describe(linear_weight)}{_SWAPPED if swapped else ''}"
        )
    if input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        transposed = input.dim() > 0 and input.shape[-1] == linear_weight.shape[0]
        raise ValueError(
            f"input must be (..., D) with D = {linear_weight.shape[1]} as in linear_weight"
            f" {tuple(linear_weight.shape)}, got {describe(input)}"
            + ("; if linear_weight is (D, V), pass linear_weight.t()" if transposed else "")
        )
    if input.device != linear_weight.device:
        raise ValueError(
            f"input is on {input.device} and linear_weight on {linear_weight.device}; move them to one device"
        )
    if input.dtype != linear_weight.dtype:
        raise TypeError(f"input is {input.dtype} and linear_weight {linear_weight.dtype}; cast one of them")


def offset(shift: Any) -> int:
    """How many tokens further the target is: True is 1, False 0, or the number itself."""
    if isinstance(shift, bool):
        return int(shift)
    if not isinstance(shift, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"shift must be True, False or a number of tokens, got {describe(shift)}")
    integer("shift", shift, 0)
    return cast(int, shift)


def labels(input: Tensor, linear_weight: Tensor, target: Tensor, shift: int) -> None:
    """target (...) holds integer classes, one for each token of input, and at least as many in a row as it is shifted."""
    tokens = input.shape[:-1]
    if target.dtype not in (torch.int64, torch.int32):
        mend = "argmax(-1): probabilities are not served" if target.shape == (*tokens, len(linear_weight)) else "long()"
        raise TypeError(f"target must be int64 (or int32) class indices, got {describe(target)}; use target.{mend}")
    if target.shape != tokens:
        raise ValueError(
            f"target must have the shape of input without its last dimension, {tuple(tokens)},"
            f" got {describe(target)}{_as_labels(input, linear_weight, target)}"
        )
    if target.device != input.device:
        raise ValueError(f"target is on {target.device} and input on {input.device}; move them to one device")
    if shift and (target.dim() == 0 or target.shape[-1] < shift):
        raise ValueError(
            f"shift={describe(shift)} needs a sequence: input (..., T, D) and target (..., T) with T >= shift,"
            f" got {describe(target)}"
        )


def _as_labels(input: Tensor, linear_weight: Tensor, target: Tensor) -> str:
    """How a target of another shape than the tokens' becomes one of theirs."""
    tokens, given = input.shape[:-1], target.shape
    if given == linear_weight.shape[:-1]:
        return _SWAPPED
    if given == (*tokens, len(linear_weight)):
        return "; of one-hot rows pass target.argmax(-1)"
    if target.numel() == tokens.numel():
        return f"; use target.reshape({tuple(tokens)})"
    if len(given) == len(tokens) > 1 and given[:-1] == tokens[:-1] and given[-1] < tokens[-1]:
        return "; for the next-token loss pass all tokens as target, and shift=True"
    return "; it holds one class for each token"


def exponent(n: Any) -> None:
    """n is None, a positive finite number, or a floating tensor (its value is checked when it is used) of shape () or (1,)."""
    if isinstance(n, Tensor):
        tensors(n=n)
        if not (n.dim() == 0 or n.shape == (1,)) or not n.is_floating_point():
            mend = "; use n.float()" if n.numel() == 1 and not n.is_floating_point() else ""
            raise ValueError(f"n must be a number or a floating tensor of shape () or (1,), got {describe(n)}{mend}")
    elif n is not None:
        number("n", n)
        if not 0 < n < math.inf:
            raise ValueError(f"n must be a finite harmonic exponent > 0, got {n}; the paper recommends about sqrt(D)")
        in_fp32("n", n)


def in_fp32(name: str, value: Any) -> None:
    """A positive number that fp32 holds with all its digits."""
    if not 2.0**-126 <= _plain(value) <= 2.0**127:
        raise ValueError(f"{name} must be a number that fp32 holds, 1.2e-38 ... 1.7e38, got {describe(value)}")


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number: it would compare in its own precision."""
    known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    return value if known else float(value)


def number(name: str, value: Any) -> None:
    """A plain number (NumPy's and symbolic ones included)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")


def integer(name: str, value: Any, least: float = -(2**63)) -> None:
    """An integer of 64 bits (NumPy's and symbolic ones included), at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {describe(value)}")
    if not value < 2**63:
        raise ValueError(f"{name} must be below 2^63, got {describe(value)}")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def between(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """low <= value <= high and finite."""
    number(name, value)
    if not (low <= _plain(value) <= high and _plain(value) <= sys.float_info.max):
        limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be finite and {limit}, got {describe(value)}")


FP32_LIMIT = 2.0**125  # fp32 can still be added to this


def eps(value: Any) -> None:
    """A squared distance."""
    between("eps", value, 0.0, FP32_LIMIT)


NUM_ITEMS = "num_items must be finite and > 0 (the tokens that count; skip a batch without any)"


def reduction(value: str, num_items: Any) -> None:
    """A known reduction; num_items divides a sum over tokens, so it makes no sense with 'none'."""
    if not isinstance(value, str) or value not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {describe(value)}")
    if num_items is None:
        return
    if value == "none":
        raise ValueError("num_items divides the summed loss; with reduction='none' divide the result yourself")
    if isinstance(num_items, Tensor):
        tensors(num_items=num_items)
        if num_items.dim() != 0 or num_items.requires_grad or num_items.dtype in (torch.bool, *COMPLEX_DTYPES):
            raise ValueError(f"num_items must be a number or a 0-d tensor without gradient, got {describe(num_items)}")
    else:
        number("num_items", num_items)
        if not 0 < num_items < math.inf:
            raise ValueError(f"{NUM_ITEMS}, got {num_items}")
        in_fp32("num_items", num_items)


def class_weight(weight: Any, classes: int | None = None, device: torch.device | None = None) -> None:
    """(V,) floating point, a constant of the loss; V and the device are checked where they are known."""
    if weight is None:
        return
    tensors(class_weight=weight)
    if weight.dim() != 1 or not weight.is_floating_point() or (classes is not None and weight.shape[0] != classes):
        size = "V" if classes is None else classes
        raise ValueError(f"class_weight must be floating and of shape ({size},), got {describe(weight)}")
    if device is not None and weight.device != device:
        raise ValueError(f"class_weight is on {weight.device} and linear_weight on {device}")
    if weight.requires_grad:
        raise ValueError("class_weight is a constant of the loss and gets no gradient; pass class_weight.detach()")


def bias(value: Any, linear_weight: Tensor | None = None) -> None:
    """(V,) floating point; V and the device are checked where they are known."""
    if value is None:
        return
    if isinstance(value, bool):
        raise TypeError(f"bias is the vector (V,) that is added to the logits and no switch, got {value}; leave it out")
    tensors(bias=value)
    classes = None if linear_weight is None else linear_weight.shape[0]
    if value.dim() != 1 or value.dtype not in FLOAT_DTYPES or (classes is not None and value.shape[0] != classes):
        size = "V" if classes is None else classes
        raise ValueError(f"bias must be floating and of shape ({size},), got {describe(value)}")
    if linear_weight is not None and value.device != linear_weight.device:
        raise ValueError(
            f"bias is on {value.device} and linear_weight on {linear_weight.device}; move them to one device"
        )


def softcap(value: Any) -> None:
    """A positive number, or None."""
    if value is None:
        return
    number("softcap", value)
    if not 0 < value < math.inf:
        raise ValueError(f"softcap must be finite and > 0, got {value}; None is no cap")
    in_fp32("softcap", value)


def budget(value: Any) -> None:
    """Bytes, or None."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value is not None and not (whole and 0 < value < 2**63):
        raise ValueError(f"memory_budget must be a positive number of bytes below 2^63, or None, got {describe(value)}")


def process_group(group: Any) -> None:
    """None, or a ProcessGroup of ``torch.distributed`` that this process belongs to."""
    if group is None:
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be None or a torch.distributed.ProcessGroup, got {describe(group)};"
            " torch.distributed.new_group() or DeviceMesh.get_group() make one (of a mesh, or of all: dist.group.WORLD)"
        )


def dimension(dim: Any, tensor: Tensor) -> None:
    """A dimension of the tensor; one without any has a dimension 0 as well."""
    integer("dim", dim)
    rank = max(tensor.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(f"dim must be between {-rank} and {rank - 1} for {describe(tensor)}, got {dim}")


def seed(value: Any) -> None:
    """A seed of SGLD chains."""
    integer("seed", value, 0)
