"""Samples by index, whatever holds them: tensors, a map-style dataset or an iterable one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from harmonic_triton._common import validate
from harmonic_triton.losskernel import checkpoint

HELD = 2**30  # bytes up to which a map-style dataset is read once and held


class Samples:
    """(n, ...) samples of ``data``; ``batch`` and ``block`` collate them on ``device``.

    Tensors, tuples and dicts of tensors and TensorDatasets are indexed along their first dimension. Another map-style
    dataset is collated once and held if that takes less than 1 GiB (so a random augmentation is drawn once), else read
    at each use. An iterable dataset is read once and held.
    """

    def __init__(self, name: str, data: Any, device: torch.device) -> None:
        self.device = device
        self.dataset: Any = None
        if isinstance(data, TensorDataset):
            data = tuple(data.tensors)
        if isinstance(data, _Held):
            self.columns = data.columns
        elif _is_columns(data):
            self.columns = data
        elif isinstance(data, IterableDataset):
            self.columns = self._read(name, list(data))
        elif isinstance(data, (tuple, dict)) and any(_is_array(leaf) for leaf in _values(data)):
            raise TypeError(f"{name} holds arrays that are no tensors; pass each as torch.as_tensor(...)")
        elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            if len(data) == 0:
                raise ValueError(f"{name} has no samples")
            first = tree_leaves(self._read(name, [data[0]]))
            tensors_only = all(isinstance(leaf, Tensor) for leaf in first)
            if tensors_only and len(data) * sum(leaf.nbytes for leaf in first) <= HELD:
                self.columns = self._read(name, [data[i] for i in range(len(data))])
            else:
                self.dataset, self.columns = data, None
        else:
            raise TypeError(
                f"{name} must be a tensor, a tuple or dict of tensors, or a Dataset, got {type(data).__name__}; an"
                " iterator that runs once can be wrapped in list()"
            )
        if self.dataset is None:
            self._check_columns(name)
            self.columns = tree_map(lambda leaf: leaf.to(device), self.columns)
        self.length = len(self.dataset if self.dataset is not None else tree_leaves(self.columns)[0])

    def _read(self, name: str, samples: list[Any]) -> Any:
        try:
            return default_collate(samples)
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(
                f"{name}: torch's default_collate cannot batch its samples ({error}); give samples of one shape"
            ) from error

    def _check_columns(self, name: str) -> None:
        leaves = tree_leaves(self.columns)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(f"{name} must batch to tensors, got {[type(leaf).__name__ for leaf in leaves]}")
        if any(leaf.dim() == 0 or len(leaf) != len(leaves[0]) for leaf in leaves) or len(leaves[0]) == 0:
            if all(leaf.dim() > 0 and len(leaf) == 0 for leaf in leaves):
                raise ValueError(f"{name} has no samples")
            shapes = [tuple(leaf.shape) for leaf in leaves]
            raise ValueError(f"{name}: every tensor needs the samples along its first dimension, got shapes {shapes}")

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: Tensor) -> Any:
        """The samples at (k,) indices."""
        if self.dataset is None:
            indices = indices.to(self.device)
            return tree_map(lambda leaf: leaf[indices], self.columns)
        return self._collate(indices.tolist())

    def block(self, start: int, stop: int) -> Any:
        """Samples start ... stop - 1, as views where they are held."""
        if self.dataset is None:
            return tree_map(lambda leaf: leaf[start:stop], self.columns)
        return self._collate(range(start, min(stop, len(self))))

    def _collate(self, indices: Any) -> Any:
        batch = default_collate([self.dataset[i] for i in indices])
        return tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, batch)

    def subset(self, indices: Tensor) -> Samples:
        """Some of the samples, held."""
        return Samples("samples", _Held(self.batch(indices)), self.device)

    def fingerprint(self) -> str:
        """Number of samples and a hash of them (of 64 spread over a dataset that is not held)."""
        some = self.columns
        if self.dataset is not None:
            some = self._collate(sorted({round(i * (len(self) - 1) / 63) for i in range(64)}))
        leaves = tree_leaves(some)
        tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        return f"{len(self)} samples {checkpoint.digest(tensors)}"


class _Held(NamedTuple):
    columns: Any


def samples(name: str, data: Any, device: torch.device) -> Samples:
    """``data`` as Samples, which it may be already."""
    return data if isinstance(data, Samples) else Samples(name, data, device)


def _is_columns(data: Any) -> bool:
    if isinstance(data, Tensor):
        validate.tensors(data=data)
        return True
    values = _values(data) if isinstance(data, (dict, tuple)) else ()
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)


def _values(data: Any) -> Any:
    return data.values() if isinstance(data, dict) else data


def _is_array(value: Any) -> bool:
    """An array of samples that is not torch's: a list of such is a dataset of samples, a tuple or dict of them columns."""
    return not isinstance(value, Tensor) and isinstance(getattr(value, "shape", None), tuple) and len(value.shape) > 0
