"""Which process of a distributed run this one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


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


def led(work: Callable[[], Result], group: Any) -> Result:
    """What ``work`` returns, or raises, in the first process of a group, in all of them; it runs in that one alone.

    Without a group (None) it just runs.
    """
    if group is None:
        return work()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank(group) == 0:
        try:
            outcome = [work(), None]
        except BaseException as error:
            outcome = [None, error]
    torch.distributed.broadcast_object_list(outcome, torch.distributed.get_global_rank(group, 0), group=group)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result
