"""Where the draws of :class:`harmonic_triton.LossTraces` are kept: one growing tensor, or a directory of files.

Draws are rows, so that appending is one sequential write, truncation is a smaller count, and a product with a vector
needs one pass; a tile of samples is cut out column-wise, which costs nothing beside its conversion to fp32.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

FORMAT = 1


@dataclass(frozen=True)
class State:
    """All there is to know of a number of draws beside the draws themselves."""

    count: int
    reference: Tensor | None  # (m,) fp64, subtracted from every draw; None before the first
    sums: Tensor  # (2, m) fp64, of the shifted losses and of their squares, both before rounding
    chains: Tensor  # (count,) int64, on the CPU
    dead: dict[int, int]  # chain -> draws that were left out


class MemoryStore:
    """Draws in one tensor on a device; its room doubles when it is full."""

    def __init__(self, num_samples: int, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.rows = torch.empty(capacity, num_samples, dtype=dtype, device=device)

    def write(self, start: int, draws: Tensor) -> None:
        """Put draws (k, m) at rows start ... start + k."""
        stop = start + len(draws)
        if stop > len(self.rows):
            grown = self.rows.new_empty(max(stop, 2 * len(self.rows)), self.rows.shape[1])
            grown[:start] = self.rows[:start]
            self.rows = grown
        self.rows[start:stop] = draws

    def read(self, count: int) -> Tensor:
        """The first draws, (count, m)."""
        return self.rows[:count]

    def commit(self, state: State) -> None:
        """Memory does not outlive the process: nothing to do."""


class FileStore:
    """Draws in a directory: what counts is what ``header.json`` says, whatever else a killed process has left.

    ``draws.bin`` holds (count, m) values and perhaps more, ``state-0.npz`` and ``state-1.npz`` in turn the sums and chains;
    the header names the valid one. It is written last, beside the old one, and takes its place in one step.
    """

    def __init__(self, path: Path, num_samples: int, dtype: torch.dtype, capacity: int) -> None:
        self.path, self.num_samples, self.dtype, self.capacity = path, num_samples, dtype, capacity
        self.header = read_header(path)
        self.file: IO[bytes] | None = None
        if self.header is not None:
            self._check_header(self.header)

    def _check_header(self, header: dict) -> None:
        for name, here in (("num_samples", self.num_samples), ("dtype", str(self.dtype))):
            if header[name] != here:
                raise ValueError(
                    f"path={str(self.path)!r} holds traces of {name} {header[name]}, asked for {here};"
                    " name another path, or open it with LossTraces.open(path)"
                )
        size, wanted = (self.path / "draws.bin").stat().st_size, header["count"] * self._row_bytes
        if size < wanted:
            raise ValueError(f"{self.path / 'draws.bin'} is damaged: {size} bytes, its header counts {wanted}")

    @property
    def _row_bytes(self) -> int:
        return self.num_samples * self.dtype.itemsize

    def state(self, device: torch.device) -> State | None:
        """What the directory held when it was opened, sums on ``device``; None for a new one."""
        if self.header is None:
            return None
        with np.load(self.path / self.header["state"]) as arrays:
            reference, sums, chains = (torch.from_numpy(arrays[name]) for name in ("reference", "sums", "chains"))
        dead = {int(chain): number for chain, number in self.header["dead"].items()}
        return State(
            self.header["count"], reference.to(device) if len(reference) else None, sums.to(device), chains, dead
        )

    def write(self, start: int, draws: Tensor) -> None:
        """Put draws (k, m) at rows start ... start + k; they count from the next commit on."""
        file = self._opened()
        file.seek(start * self._row_bytes)
        file.write(draws.contiguous().cpu().view(torch.uint8).numpy().data)
        _sync(file)

    def read(self, count: int) -> Tensor:
        """The first draws, (count, m), memory-mapped."""
        name, size = str(self.path / "draws.bin"), count * self.num_samples
        if size == 0:
            return torch.empty(count, self.num_samples, dtype=self.dtype)
        return torch.from_file(name, shared=False, size=size, dtype=self.dtype).view(count, self.num_samples)

    def commit(self, state: State) -> None:
        """Make ``state`` what counts; a process killed in here leaves the previous one."""
        self._opened()
        slot = 1 if self.header is not None and self.header["state"] == "state-0.npz" else 0
        name = f"state-{slot}.npz"
        reference = np.empty(0) if state.reference is None else state.reference.cpu().numpy()
        with open(self.path / name, "wb") as file:
            np.savez(file, reference=reference, sums=state.sums.cpu().numpy(), chains=state.chains.numpy())
            _sync(file)
        header = {
            "format": FORMAT, "num_samples": self.num_samples, "dtype": str(self.dtype), "count": state.count,
            "dead": {str(chain): number for chain, number in state.dead.items()}, "state": name,
        }  # fmt: skip
        with open(self.path / "header.json.new", "w") as text:
            json.dump(header, text)
            _sync(text)
        os.replace(self.path / "header.json.new", self.path / "header.json")
        self.header = header

    def _opened(self) -> IO[bytes]:
        """draws.bin, open for writing by this object alone."""
        if self.file is None:
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self.path / "draws.bin", os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            _lock(file, self.path)
            if read_header(self.path) != self.header:
                raise RuntimeError(f"path={str(self.path)!r}: another process has added draws since; open it again")
            if self.capacity and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.capacity * self._row_bytes)
            self.file = file
        return self.file


def read_header(path: Path) -> dict | None:
    """The header of a directory of traces; None where there is none yet."""
    try:
        header = json.loads((path / "header.json").read_text())
    except FileNotFoundError:
        return None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path / 'header.json'} has format {header.get('format')!r}; this version reads {FORMAT}")
    return header


def _sync(file: IO) -> None:
    """On the disk before anything that follows."""
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[bytes], path: Path) -> None:
    """One writer at a time; the lock ends with its process. Systems without fcntl go without."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"path={str(path)!r} is being written by another process (or another LossTraces of this one);"
            " give every writer a path of its own"
        ) from None
