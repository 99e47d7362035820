"""Per-token arithmetic in fp64: by NumPy on a CPU, whose calls cost a fifth of torch's on few tokens, by torch elsewhere.

Values are (C,) arrays of the one or the other; both have the same operators, and the functions here are those that differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = Any  # (C,) np.ndarray or Tensor: fp64, bool or int64

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def values_of(tensor: Tensor) -> Values:
    """(C,) of a tensor (C,) or (C, 1), floating ones in fp64."""
    if not tensor.is_cpu:
        tensor = tensor if tensor.dim() == 1 else tensor.squeeze(1)
        return tensor.double() if tensor.is_floating_point() else tensor
    array = tensor.numpy()
    array = array if array.ndim == 1 else array[:, 0]
    return array.astype(np.float64) if array.dtype == np.float32 else array


def tensor_of(values: Values, dtype: torch.dtype) -> Tensor:
    """(C,) tensor."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    return torch.from_numpy(values.astype(_NUMPY[dtype]))


def column_of(values: Values, dtype: torch.dtype) -> Tensor:
    """(C, 1) tensor."""
    return tensor_of(values, dtype).unsqueeze(1)


def columns_of(columns: list[Values], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(C, 1) tensors, converted in one go."""
    if isinstance(columns[0], Tensor):
        return torch.stack(columns).to(dtype).unsqueeze(2).unbind(0)
    return torch.from_numpy(np.array(columns, _NUMPY[dtype])).unsqueeze(2).unbind(0)


def table_of(columns: list[Values], dtype: torch.dtype) -> Tensor:
    """(C, columns) tensor."""
    if isinstance(columns[0], Tensor):
        return torch.stack([values.to(torch.float64) for values in columns], 1).to(dtype)
    return torch.from_numpy(np.array(columns, _NUMPY[dtype]).T.copy())


def take(values: Tensor, index: Tensor) -> Values:
    """(C,) of the values at an index, in fp64."""
    if values.is_cpu:
        return values.numpy()[index.numpy()].astype(np.float64)
    return values.index_select(0, index).double()


def empty(count: int, device: torch.device) -> Values:
    """Room for fp64 values."""
    return np.empty(count) if device.type == "cpu" else torch.empty(count, dtype=torch.float64, device=device)


def zeros_like(values: Values) -> Values:
    """Zeros."""
    return np.zeros_like(values) if isinstance(values, np.ndarray) else torch.zeros_like(values)


def any_of(mask: Values) -> bool:
    """Whether there is one; a GPU does not wait for the answer, and does what is needed if there is."""
    return bool(mask.any()) if isinstance(mask, np.ndarray) else True


def where(mask: Values, a: Values, b: Values) -> Values:
    """a where the mask is set, else b."""
    return np.where(mask, a, b) if isinstance(mask, np.ndarray) else torch.where(mask, a, b)


def at_least(values: Values, least: Values) -> Values:
    """The larger of both, NaN of either."""
    return np.maximum(values, least) if isinstance(values, np.ndarray) else torch.clamp_min(values, least)


def at_most(values: Values, most: float) -> Values:
    """The smaller of both, NaN stays."""
    return np.minimum(values, most) if isinstance(values, np.ndarray) else values.clamp_max(most)


def log(values: Values) -> Values:
    """Natural logarithm."""
    return np.log(values) if isinstance(values, np.ndarray) else values.log()


def log1p(values: Values) -> Values:
    """log(1 + value)."""
    return np.log1p(values) if isinstance(values, np.ndarray) else values.log1p()


def exp(values: Values) -> Values:
    """Exponential."""
    return np.exp(values) if isinstance(values, np.ndarray) else values.exp()


def expm1(values: Values) -> Values:
    """exp(value) - 1."""
    return np.expm1(values) if isinstance(values, np.ndarray) else values.expm1()


def tanh(values: Values) -> Values:
    """Hyperbolic tangent."""
    return np.tanh(values) if isinstance(values, np.ndarray) else values.tanh()


def logaddexp(a: Values, b: Values) -> Values:
    """log(exp(a) + exp(b))."""
    return np.logaddexp(a, b) if isinstance(a, np.ndarray) else torch.logaddexp(a, b)


def softplus(values: Values) -> Values:
    """log(1 + exp(value)) with all digits."""
    if isinstance(values, np.ndarray):
        return np.logaddexp(values, 0.0)
    return torch.nn.functional.softplus(values, threshold=50.0)


def isinf(values: Values) -> Values:
    """Where there is an infinity."""
    return np.isinf(values) if isinstance(values, np.ndarray) else values.isinf()
