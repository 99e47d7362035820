"""Checkpoints that a kill at any moment leaves whole, and fingerprints that tell whose they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WHOLE = 2**20  # entries of a tensor that are hashed one by one; a larger one is sampled and summed


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them) so that ``path`` is the old file or the new one.

    The bytes go to a file beside it, reach the disk (fsync), and take its name in one rename.

    Raises:
        OSError: the directory cannot be written; the old file is untouched.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable (POSIX; elsewhere the rename alone has to do)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU; no code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is no checkpoint of this package ({error}); remove it") from error
    if not isinstance(state, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(state).__name__}, not the state of a run; remove it")
    return state


def check_fingerprint(saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Refuse to go on from a checkpoint of something else.

    Raises:
        ValueError: lists every entry that differs, as it was saved and as it is.
    """
    names = dict.fromkeys((*saved, *present))
    differing = [name for name in names if saved.get(name) != present.get(name)]
    if differing:
        lines = (f"{name}: {saved.get(name, 'absent')} there, {present.get(name, 'absent')} here" for name in differing)
        raise ValueError(
            "the checkpoint belongs to another run ("
            + "; ".join(lines)
            + "); restore what differs or take a new directory"
        )


def digest(named: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values; of a tensor beyond 2^20 entries 2^20 of them and the sum of all."""
    hasher = hashlib.blake2b(digest_size=12)
    for name, tensor in named.items():
        tensor = tensor.detach()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > WHOLE:
            total = (
                torch.view_as_real(flat).sum(dtype=torch.float64)
                if flat.is_complex()
                else flat.sum(dtype=torch.float64)
            )
            hasher.update(repr(total.item()).encode())
            flat = flat[:: -(-flat.numel() // WHOLE)]
        hasher.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
