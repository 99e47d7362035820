"""A second device without a GPU: tensors that say they lie elsewhere, and operators that refuse to mix them with the CPU's.

Within ``SecondDevice()`` whatever is made on or moved to ``DEVICE`` is a real CPU tensor behind a wrapper. As on a GPU,
an operator that gets tensors of both devices raises, but for numbers (0 dimensions), indices on the CPU and copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # a type of device without drivers that every build of PyTorch knows
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Elsewhere(torch.Tensor):
    """A tensor on ``DEVICE``; its values are held by a CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        new = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )  # fmt: skip
        new.held = held
        return new

    def tolist(self) -> Any:  # PyTorch has none for subclasses
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the values that are held, and its results on the device where they belong."""
    name = func._schema.name
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    checked = tree_leaves((args[:1], args[2:])) if name in INDEXING else given
    away = [isinstance(leaf, Elsewhere) for leaf in checked if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if name not in COPIES and any(away) and not all(away):
        raise RuntimeError(f"{name}: expected all tensors on one device, got {[str(leaf.device) for leaf in given]}")
    if name in INDEXING and not isinstance(args[0], Elsewhere) and any(isinstance(leaf, Elsewhere) for leaf in given):
        raise RuntimeError(
            f"{name}: indices must be on the CPU or on the device of the indexed tensor ({args[0].device})"
        )
    wanted = kwargs.get("device")
    elsewhere = torch.device(wanted).type == DEVICE.type if wanted is not None else any(
        isinstance(leaf, Elsewhere) for leaf in given
    )  # fmt: skip
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda v: v.held if isinstance(v, Elsewhere) else v, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    own = {id(leaf.held if isinstance(leaf, Elsewhere) else leaf): leaf for leaf in given}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in own:  # in place, or out=
            return own[id(value)]
        return Elsewhere(value) if elsewhere else value

    return tree_map(placed, result)
