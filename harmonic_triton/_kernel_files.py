"""Loss kernels as safetensors, NumPy archives and Zarr groups."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonic_triton.covariance import StreamingCovariance
from harmonic_triton.estimators import needs
from harmonic_triton.traces import LossTraces

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """A nested state in one safetensors file, written beside and renamed; what is no tensor goes into its metadata."""
    tensors: dict[str, Tensor] = {}
    metadata = {"format": str(FORMAT), "loss_kernel": json.dumps(flatten(state, tensors, "state"))}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        needs("safetensors.torch").save_file(tensors, beside, metadata=metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU.

    Raises:
        ValueError: the file holds something else.
    """
    with needs("safetensors").safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != str(FORMAT) or "loss_kernel" not in metadata:
            raise ValueError(f"{path} is no loss kernel that this version reads (format {FORMAT})")
        return unflatten(json.loads(metadata["loss_kernel"]), file.get_tensor)


def accumulator_state(accumulator: StreamingCovariance | LossTraces) -> dict[str, Any]:
    """Its state dict, with the draws of traces that lie in a directory."""
    state = accumulator.state_dict()
    if isinstance(accumulator, LossTraces) and state["draws"] is None:
        parts = [slice(start, start + 64) for start in range(0, accumulator.count, 64)]
        state["draws"] = torch.cat([accumulator.draws(part).to(accumulator.dtype) for part in parts])
    return state


def flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for nested dicts, sequences and plain values; tensors go into ``tensors`` under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    return value


def unflatten(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`flatten`; tuples have become lists."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: unflatten(item, tensor) for key, item in content}
    return [unflatten(item, tensor) for item in content]


def accumulator_from(state: dict[str, Any], device: torch.device | str) -> StreamingCovariance | LossTraces:
    """The accumulator of a state."""
    kind: type[StreamingCovariance] | type[LossTraces] = LossTraces if "draws" in state else StreamingCovariance
    dtype = getattr(torch, state["dtype"].removeprefix("torch."))
    accumulator = kind(state["num_samples"], device=device, dtype=dtype)
    accumulator.load_state_dict(state)
    return accumulator
