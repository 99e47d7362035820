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

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton._common.transforms import in_transform

AGREED = 32  # integers with which a process says what call it makes
PROBES = 4  # of them that stand for the input
SAME_INPUT = 0.05  # of a token's length: rounding in 16 bits is a tenth of that, another batch 30 times as much
READ_AT_ONCE = 2**22  # entries
_NOTHING: Mapping[str, Tensor | None] = {}


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


def shard_of(
    group: Any, rows: int, x: Tensor, facts: Mapping[str, Any], equal: Mapping[str, Tensor | None] = _NOTHING
) -> Shard:
    """This process's shard of the class vectors; one small all-gather, in which all say what call they make.

    Processes with batches of their own, as FSDP's are, would get a number that belongs to none of them.

    Args:
        group: the ProcessGroup that the rows are spread over.
        rows: those of this process, in the order of the ranks.
        x: (..., D) the input, the same everywhere but for rounding.
        facts: what must be the same in every process, by the argument's name. Shown by ``repr``; the first is the call.
        equal: tensors whose values must be the same too, on any device; their shapes are among the facts.

    Raises:
        ValueError: processes differ in one of the facts. Every process raises it.
        NotImplementedError: inside a transform of torch.func.
        RuntimeError: a process of the group does not take part.
    """
    if in_transform():
        raise NotImplementedError("harmonic_triton: process_group does not go along with torch.func's transforms")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    said = [rows, *(_digest(value) for value in facts.values())]
    said += [0] * (AGREED - PROBES - len(equal) - len(said))  # one length for every call: a shorter one would hang
    sums = [_checksum(values, x.device) for values in equal.values()]
    mine = torch.cat([torch.tensor(said, device=x.device), *sums, _sketch(x).view(torch.int64)])
    every = [torch.empty_like(mine) for _ in range(world)]
    with together(group, "agree on a call"):
        dist.all_gather(every, mine, group)
    gathered = torch.stack(every).cpu()
    table, sketches = gathered.tolist(), gathered[:, -PROBES:].view(torch.float64)
    for column, (name, value) in enumerate(facts.items(), 1):
        other = next((k for k in range(world) if table[k][column] != table[0][column]), None)
        if other is not None:
            raise ValueError(
                f"process_group: its processes 0 and {other} call with different {name}; process {rank} has {value!r}"
            )
    apart = (sketches - sketches[0]).abs().amax(1) > SAME_INPUT * max(1, x[..., 0].numel()) ** 0.5
    differing = {
        name: [row[column] != table[0][column] for row in table]
        for column, name in enumerate(equal, AGREED - PROBES - len(equal))
    }
    for name, differs in (*differing.items(), ("input", apart.tolist())):
        if any(differs):
            raise ValueError(
                f"process_group: its processes 0 and {differs.index(True)} call with different {name} (other values); all"
                " must have the same tokens. Is linear_weight FSDP's, outside of its module's forward pass? Call the module"
            )
    counts = [row[0] for row in table]
    return Shard(group, sum(counts[:rank]), sum(counts), rows)


def _digest(value: Any) -> int:
    """A number of 63 bits that stands for a value."""
    text = repr(value).encode()
    return struct.unpack("<q", struct.pack("<II", zlib.crc32(text), zlib.adler32(text) >> 1))[0]  # type: ignore[no-any-return]


def _checksum(values: Tensor | None, device: torch.device) -> Tensor:
    """(1,) int64, exact; on the device, without waiting for it."""
    if values is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    flat = values.detach().flatten().to(device)
    whole = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    return (whole * torch.arange(1, len(whole) + 1, device=device)).sum().reshape(1)


def _sketch(x: Tensor) -> Tensor:
    """(PROBES,) fp64 random sums of the tokens, each of length 1: continuous, so that rounding hardly moves them.

    Tokens of no or no finite length are left out.
    """
    x = x.detach().reshape(-1, x.shape[-1])
    tokens, features = _waves(len(x), x.device), _waves(x.shape[1], x.device)
    total, step = torch.zeros(PROBES, dtype=torch.float64, device=x.device), max(1, READ_AT_ONCE // x.shape[1])
    for start in range(0, len(x), step):
        part = x[start : start + step].to(compute_dtype(x.dtype))
        length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        unit = torch.where((length > 0) & length.isfinite(), part / length, 0.0)
        total += ((unit @ features.to(unit.dtype)) * tokens[start : start + step]).sum(0)
    return total


def _waves(length: int, device: torch.device) -> Tensor:
    """(length, PROBES) fp64 of mean square 1, without a generator: sines of quadratic phases."""
    at = torch.arange(1, length + 1, dtype=torch.float64, device=device).square().unsqueeze(1)
    return (at * torch.arange(2, PROBES + 2, dtype=torch.float64, device=device).sqrt()).sin() * 2**0.5
