"""Tensors that several processes hold together, in a directory of ``torch.distributed.checkpoint``.

It is written by as many processes as there are, and read by any other number. What it holds counts once a sealed file
names it with the checksum of each of its files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harmonic_triton._common import files


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: Any) -> None:
    """Write (DTensors and what all processes have alike) to a new directory; all of the group call it."""
    from torch.distributed import checkpoint

    writer = checkpoint.FileSystemWriter(folder)  # every file is synced
    checkpoint.save(dict(tensors), storage_writer=writer, process_group=group)


def read(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: Any) -> None:
    """Fill tensors with what :func:`write` wrote of them, whatever processes hold them now; all of the group call it."""
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant, for one process
        checkpoint.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=group is None)


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of each file, by name."""
    return {path.name: files.checksum(path) for path in sorted(folder.iterdir())}


def check(folder: Path, wanted: Mapping[str, str], mend: str) -> None:
    """Whether the files are as they were written.

    Raises:
        ValueError: one is not, or is not there.
    """
    for name, checksum in wanted.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is not there, and the checkpoint beside {folder} needs it; {mend}")
        if files.checksum(path) != checksum:
            raise ValueError(f"{path} is damaged: its checksum does not match; {mend}")
