"""Which process of a distributed run this one is."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distributed() -> bool:
    """Whether ``torch.distributed`` was started, be it with one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) of ``torch.distributed``; (0, 1) where it was not started."""
    if distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_first_process() -> bool:
    """Whether this process is the one that writes and prints for all."""
    return rank_and_world()[0] == 0


def wait_for_all() -> None:
    """Go on when every process has come here: what the first one did to files before is then done for all."""
    if distributed():
        torch.distributed.barrier()


def share(things: Sequence[int]) -> list[int]:
    """Every world-th of some things, from number rank on: all of them where there is one process."""
    rank, world = rank_and_world()
    return list(things[rank::world])
