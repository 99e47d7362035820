"""Which rows of the class vectors a process has, and that all processes mean the same call."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This process's rows, ``first`` and on, of V class vectors."""

    group: Any  # a ProcessGroup
    first: int
    classes: int  # V
    own: int  # rows here, 0 where there are more processes than rows

    def all_reduce(self, values: Tensor, op: Any, what: str) -> Tensor:
        """The values reduced over the group, in place."""
        with together(self.group, what):
            dist.all_reduce(values, op, self.group)
        return values


@contextmanager
def together(group: Any, what: str) -> Iterator[None]:
    """A collective; where it fails, an error that says what that means."""
    try:
        yield
    except RuntimeError as error:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"harmonic_triton: process {rank} of the {world} of process_group could not {what}. Another one has died, hangs,"
            " or is in another collective: its own first error says why. (A process that hangs is waited for until the"
            f" group's timeout, see torch.distributed.init_process_group(timeout=...).) {error}"
        ) from error


def shard_of(group: Any, rows: int, device: torch.device, facts: Mapping[str, Any]) -> Shard:
    """This process's shard of the class vectors; one small all-gather, in which all say what call they make.

    Args:
        group: the ProcessGroup that the rows are spread over.
        rows: those of this process, in the order of the ranks.
        device: of the operands.
        facts: what must be the same in every process, by the argument's name. Shown by ``repr``.

    Raises:
        ValueError: processes differ in one of the facts. Every process raises it.
        RuntimeError: a process of the group does not take part.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.tensor([rows, *(_digest(value) for value in facts.values())], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(world)]
    with together(group, "agree on a call"):
        dist.all_gather(every, mine, group)
    table = torch.stack(every).tolist()
    for column, (name, value) in enumerate(facts.items(), 1):
        other = next((k for k in range(world) if table[k][column] != table[0][column]), None)
        if other is not None:
            raise ValueError(
                f"process_group: its processes 0 and {other} call with different {name}; process {rank} has {value!r}"
            )
    counts = [row[0] for row in table]
    return Shard(group, sum(counts[:rank]), sum(counts), rows)


def _digest(value: Any) -> int:
    """A number of 63 bits that stands for a value."""
    text = repr(value).encode()
    return struct.unpack("<q", struct.pack("<II", zlib.crc32(text), zlib.adler32(text) >> 1))[0]  # type: ignore[no-any-return]
