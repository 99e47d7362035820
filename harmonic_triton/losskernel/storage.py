"""Loss kernels as safetensors, NumPy archives and Zarr groups."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common import files
from harmonic_triton._common.extras import needs

FORMAT = "2"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
SEAL_KEY = b'"seal":"'  # in a safetensors header; quotes within a string would be escaped

ZARR = "LossKernel.to_zarr of harmonic_triton"
ZARR_ARRAYS = ("mean", "variance", "initial_losses", "mean_loss", "covariance", "labels")


def save(path: Path, state: dict[str, Any]) -> None:
    """A nested state in one sealed safetensors file; what is no tensor goes into its metadata. Old file or new one.

    Written here, for the library's writer puts a file of its own in the place of the one it is given.
    """
    needs("safetensors")  # to read it
    tensors: dict[str, Tensor] = {}
    metadata = {
        "format": FORMAT,
        "loss_kernel": json.dumps(flatten(state, tensors, "state")),
        "seal": "0" * files.SEAL,
    }
    head: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):  # each where it is aligned
        start, stop = stop, stop + tensor.nbytes
        head[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in list(head)[1:]:
            file.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        files.seal(file, header(file).index(SEAL_KEY) + len(SEAL_KEY))


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU.

    Raises:
        ValueError: the file holds something else, or is not as it was written.
    """
    needed = needs("safetensors")
    with open(path, "rb") as stored:
        at = header(stored).find(SEAL_KEY)
        sealed = at >= 0
        if sealed and not files.check_seal(stored, at + len(SEAL_KEY)):
            raise ValueError(
                f"{path} is damaged: its checksum does not match; restore it from a copy or compute it again"
            )
    try:
        with needed.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "loss_kernel" not in metadata or metadata.get("format") != (FORMAT if sealed else "1"):
                raise ValueError(
                    f"{path} is no loss kernel that this version reads (formats 1 and {FORMAT}), or is damaged"
                )
            state: dict[str, Any] = unflatten(json.loads(metadata["loss_kernel"]), file.get_tensor)
    except needed.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or is damaged ({error}); restore it from a copy") from error
    if not sealed:
        warnings.warn(
            f"{path} was written before kernels had checksums: whether it is as it was cannot be told. Saved again it has one",
            RuntimeWarning,
            stacklevel=3,
        )
    return state


def header(file: IO[bytes]) -> bytes:
    """The head of a safetensors file, from its beginning: eight bytes of length, and JSON."""
    file.seek(0)
    length = file.read(8)
    size = os.fstat(file.fileno()).st_size
    return length + file.read(min(int.from_bytes(length, "little"), size))


def save_zarr(path: Path, arrays: Mapping[str, np.ndarray], about: str) -> None:
    """Arrays as a Zarr group, written beside and renamed, in place of nothing or of an earlier one.

    Raises:
        FileExistsError: something else is there.
    """
    zarr = needs("zarr", "to_zarr", install="pip install 'harmonic-triton[zarr]'")
    _refuse_to_replace(path)
    with files.replacing_directory(path, lambda: _refuse_to_replace(path)) as beside:
        group = zarr.open_group(os.fspath(beside), mode="w")
        for name, values in arrays.items():
            group.create_array(name, data=values)
        group.attrs.update({"about": about, "written_by": ZARR})


def _refuse_to_replace(path: Path) -> None:
    """A path that is free, an empty directory, or what :func:`save_zarr` wrote with nothing added."""
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        inside = {entry.name for entry in path.iterdir()}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            written = json.loads((path / "zarr.json").read_text()) if inside else {}
            if not inside or (
                written.get("attributes", {}).get("written_by") == ZARR and inside <= {"zarr.json", *ZARR_ARRAYS}
            ):
                return
    raise FileExistsError(
        f"path={str(path)!r} is there and is not, or not only, what to_zarr wrote; name another path, or remove it yourself"
    )


def flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for nested dicts, sequences and plain values; tensors go into ``tensors`` under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
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
