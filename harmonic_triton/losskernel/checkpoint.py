"""Checkpoints that a kill at any moment leaves whole and damage makes loud, and fingerprints that tell whose they are."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common import files

SEALED = b"\nharmonic_triton, CRC-32 of this file with zeros for it: "  # and the checksum, at the end of a file
WHOLE = 2**20  # entries of a tensor that are hashed one by one; a larger one is sampled and summed


def save(path: str | os.PathLike[str], state: Mapping[str, Any], kind: str = "state") -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them) so that ``path`` is the old file or the new one.

    The bytes go to a file beside it, with a checksum at its end, reach the disk (fsync), and take its name in one rename.

    Args:
        kind: what it is the state of; :func:`load` asks for the same.

    Raises:
        OSError: the directory cannot be written; the old file is untouched.
    """
    with files.replacing(path) as file:
        try:
            torch.save({"kind": kind, "state": dict(state)}, file)
        except RuntimeError as error:  # "unexpected pos" over a full disk or an interruption, the reason
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise
        file.write(SEALED + b"0" * files.SEAL)
        files.seal(file, file.tell() - files.SEAL)


def load(path: str | os.PathLike[str], kind: str = "state", mend: str = "remove it to start over") -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU; no code in the file is run.

    Args:
        mend: what to do where this fails, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this kind, or not as it was written.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - files.SEAL - len(SEALED)))
        if file.read(len(SEALED)) != SEALED:
            file.seek(0)
            what = (
                "has no checksum at its end: it was cut off or damaged, or is of another program or of a version that"
                " kept none (which alone can go on from it)"
                if file.read(2) == b"PK"
                else "is no checkpoint of this package"
            )
            raise ValueError(f"{name} {what}; {mend}")
        if not files.check_seal(file, size - files.SEAL):
            raise ValueError(f"{name} is damaged: its checksum does not match; {mend}")
        file.seek(0)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{name} cannot be read ({error}); {mend}") from error
    if not isinstance(found, dict) or found.get("kind") != kind:
        other = found.get("kind") if isinstance(found, dict) else None
        raise ValueError(f"{name} holds {other or 'something else'}, not {kind}; {mend}")
    state: dict[str, Any] = found["state"]
    return state


class Clock:
    """When the next checkpoint is due: ``seconds`` after the last one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written just now."""
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self.last >= self.seconds


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
        if hasattr(tensor, "full_tensor"):  # a DTensor: every process hashes all of it
            tensor = tensor.full_tensor()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.reshape(-1)
        if flat.numel() > WHOLE:
            total = (
                torch.view_as_real(flat).sum(dtype=torch.float64)
                if flat.is_complex()
                else flat.sum(dtype=torch.float64)
            )
            hasher.update(repr(total.item()).encode())
            flat = flat[:: -(-flat.numel() // WHOLE) | 1]  # odd: not one column of rows of a power of two
        hasher.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
