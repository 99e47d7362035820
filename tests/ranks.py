"""Real processes of ``torch.distributed`` over gloo, forked from one that has imported PyTorch."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable

import fresh
import torch
import torch.distributed as dist


def _rank(rank: int, world: int, meeting: str, timeout: float, function: Callable[..., object], args: tuple, said: str):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        function(rank, world, *args)
    except BaseException:
        with open(f"{said}.{rank}", "w") as file:
            traceback.print_exc(file=file)
        os._exit(1)
    dist.destroy_process_group()


def run(
    world: int, function: Callable[..., object], *args: object, timeout: float = 60.0, within: float = 120.0
) -> list:
    """``function(rank, world, *args)`` in ``world`` processes of one group: what each raised, "" where it ended well.

    A process that is still there ``within`` seconds after the start is killed: "hangs".
    """
    with tempfile.TemporaryDirectory() as folder:
        said = os.path.join(folder, "said")
        given = (world, os.path.join(folder, "meeting"), timeout, function, args, said)
        processes = [fresh.CONTEXT.Process(target=_rank, args=(rank, *given)) for rank in range(world)]
        for process in processes:
            process.start()
        end, out = time.monotonic() + within, []
        for rank, process in enumerate(processes):
            process.join(max(0.0, end - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
                out.append("hangs")
            elif os.path.exists(f"{said}.{rank}"):
                with open(f"{said}.{rank}") as file:
                    out.append(file.read())
            else:
                out.append("" if process.exitcode == 0 else f"died with {process.exitcode}")
        return out


def all_well(world: int, function: Callable[..., object], *args: object) -> None:
    """The same, and none raised."""
    said = run(world, function, *args)
    assert not any(said), "\n".join(filter(None, said))
