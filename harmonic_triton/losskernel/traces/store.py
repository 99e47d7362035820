"""Where the draws of :class:`harmonic_triton.LossTraces` are kept: one growing tensor, or a directory of files.

Draws are rows, so that appending is one sequential write, truncation is a smaller count, and a product with a vector
needs one pass; a tile of samples is cut out column-wise, which costs nothing beside its conversion to fp32.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common.claims import Claim, InUseError
from harmonic_triton._common.files import PIECE, SEAL, Blocks
from harmonic_triton.losskernel import checkpoint

KIND = "the state of loss traces, format 2"
MEND = "restore it from a copy, or remove the directory, and a checkpoint that counts on it, to draw again"


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
        with torch.inference_mode(False):  # draws may come from in there, and later ones from outside
            self.rows = torch.empty(capacity, num_samples, dtype=dtype, device=device)

    @torch.inference_mode(False)
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

    def close(self) -> None:
        """Nothing is held."""


class FileStore:
    """Draws in a directory: what counts is what ``state.pt`` says, whatever else a killed process has left.

    ``draws.bin`` holds (count, m) values and perhaps more; ``state.pt``, sealed and replaced at every commit, the sums,
    the chains, whose run it is and the checksums of the draws; ``lock`` is its writer's.
    """

    def __init__(self, path: Path, num_samples: int, dtype: torch.dtype, capacity: int, run: str | None) -> None:
        self.path, self.num_samples, self.dtype, self.capacity = path, num_samples, dtype, capacity
        self.blocks = Blocks(path / "draws.bin", num_samples * dtype.itemsize, MEND)
        self.found = read_state(path)
        self.run = run
        self._claim: Claim | None = None
        if self.found is not None:
            self._check(self.found)
            self.run = self.found["run"]
            self.blocks.load_state_dict(self.found["blocks"])
            self.blocks.check_size()
        self._stamp = stamp(path)

    def _check(self, found: dict[str, Any]) -> None:
        for name, here in (("num_samples", self.num_samples), ("dtype", str(self.dtype))):
            if found[name] != here:
                raise ValueError(
                    f"path={str(self.path)!r} holds traces of {name} {found[name]}, asked for {here};"
                    " name another path, or open it with LossTraces.open(path)"
                )
        if self.run is not None and found["run"] != self.run:
            raise ValueError(
                f"path={str(self.path)!r} holds the draws of another run ({found['run'] or 'without a name'}, this is"
                f" {self.run}), and those of two are not to be mixed: take another directory, or remove this one if its"
                " draws are not needed"
            )

    def state(self, device: torch.device) -> State | None:
        """What the directory held when it was opened, sums on ``device``; None for a new one."""
        if self.found is None:
            return None
        reference = self.found["reference"]
        return State(
            self.found["count"],
            None if reference is None else reference.to(device),
            self.found["sums"].to(device),
            self.found["chains"],
            dict(self.found["dead"]),
        )

    def write(self, start: int, draws: Tensor) -> None:
        """Put draws (k, m) at rows start ... start + k, behind all that count; they count from the next commit on."""
        self._claimed()
        self.blocks.cut(start)  # of an update that could not be committed
        self.blocks.append(draws)
        self.blocks.sync()

    def read(self, count: int) -> Tensor:
        """The first draws, (count, m), memory-mapped, once they have been compared with their checksums."""
        name, size = str(self.blocks.path), count * self.num_samples
        if size == 0:
            return torch.empty(count, self.num_samples, dtype=self.dtype)
        if stamp(self.path) != self._stamp:  # another writer came: it added draws behind these, or began anew
            self.blocks.distrust()
        self.blocks.verify()
        return torch.from_file(name, shared=False, size=size, dtype=self.dtype).view(count, self.num_samples)

    def commit(self, state: State) -> None:
        """Make ``state`` what counts; a process killed in here leaves the previous one."""
        self._claimed()
        self.blocks.cut(state.count)
        found = {
            "num_samples": self.num_samples,
            "dtype": str(self.dtype),
            "run": self.run,
            "blocks": self.blocks.state_dict(),
            "count": state.count,
            "reference": None if state.reference is None else state.reference.cpu(),
            "sums": state.sums.cpu(),
            "chains": state.chains,
            "dead": dict(state.dead),
        }
        checkpoint.save(self.path / "state.pt", found, KIND)
        for old in ("header.json", "header.json.new", "state-0.npz", "state-1.npz"):  # of format 1, read when opened
            (self.path / old).unlink(missing_ok=True)
        self._stamp = stamp(self.path)

    def _claimed(self) -> None:
        """The right to write, and draws.bin with the room that was asked for."""
        if self._claim is not None and self._claim.held:
            return
        self._claim = Claim(self.path / "lock")
        if stamp(self.path) != self._stamp:
            self._claim.release()
            raise InUseError(f"path={str(self.path)!r}: another writer has added draws since; open it again")
        if self.capacity and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.blocks.opened().fileno(), 0, self.capacity * self.blocks.row_bytes)

    def close(self) -> None:
        """Let others write, until the next draw."""
        self.blocks.close()
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def read_state(path: Path) -> dict[str, Any] | None:
    """What a directory of traces says of itself; None where there are none yet.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        return checkpoint.load(path / "state.pt", KIND, MEND)
    except FileNotFoundError:
        return _read_format_1(path)


def stamp(path: Path) -> bytes | None:
    """The checksum of the state that is committed; None without one."""
    try:
        with open(path / "state.pt", "rb") as file:
            file.seek(-SEAL, os.SEEK_END)
            return file.read()
    except FileNotFoundError:
        return None


def _read_format_1(path: Path) -> dict[str, Any] | None:
    """The state of traces from before there were checksums, with those of the draws as they are found."""
    if not (path / "header.json").exists():
        return None
    try:
        header = json.loads((path / "header.json").read_text())
        with np.load(path / header["state"]) as arrays:
            reference, sums, chains = (torch.from_numpy(arrays[name]) for name in ("reference", "sums", "chains"))
        count, samples = header["count"], header["num_samples"]
        row_bytes = samples * getattr(torch, header["dtype"].removeprefix("torch.")).itemsize
        dead = {int(chain): number for chain, number in header["dead"].items()}
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds no traces ({type(error).__name__}: {error}); {MEND}") from error
    if header.get("format") != 1 or len(chains) != count or sums.shape != (2, samples):
        raise ValueError(
            f"{path} is damaged: format {header.get('format')!r}, {count} draws in its header, {len(chains)} in its state;"
            f" {MEND}"
        )
    warnings.warn(
        f"{path} was written before draws had checksums: whether they are as they were cannot be told. The next draw that"
        " is added gives them checksums",
        RuntimeWarning,
        stacklevel=5,
    )
    checksum, left = 0, count * row_bytes
    if left:
        with open(path / "draws.bin", "rb") as file:
            while left and (piece := file.read(min(left, PIECE))):
                checksum, left = zlib.crc32(piece, checksum), left - len(piece)
    return {
        "num_samples": samples,
        "dtype": header["dtype"],
        "run": None,
        "blocks": {
            "ends": torch.tensor([count] if count else [], dtype=torch.int64),
            "checksums": torch.tensor([checksum] if count else [], dtype=torch.int64),
        },
        "count": count,
        "reference": reference if len(reference) else None,
        "sums": sums,
        "chains": chains,
        "dead": dead,
    }
