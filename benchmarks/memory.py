"""Peak memory of a call: the one place that measures it.

The figure is (peak during the call) - (level just before it) and never below zero. On a CPU the level is the process's
resident set (VmRSS) and the peak its high-water mark (VmHWM), which is set back to the level by writing 5 to
/proc/self/clear_refs; on a GPU both come from the caching allocator (``torch.cuda.memory_allocated`` and
``max_memory_allocated``). Freed memory is handed back to the system before the level is read, so that no call works in
what an earlier one left behind.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class NoMemoryFigureError(RuntimeError):
    """This system cannot measure what was asked; the message says why."""


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise NoMemoryFigureError(f"{STATUS} has no {field}: peak memory on a CPU is measured on Linux")


def _give_back_freed_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library: its freed memory stays in the level
        ctypes.CDLL(None).malloc_trim(0)


def peak_beyond(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which ``call`` raises this process's peak above its level before the call; its result is kept alive."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not STATUS.exists():
            raise NoMemoryFigureError("no /proc here: peak memory on a CPU is measured on Linux")
        _give_back_freed_memory()
        try:
            CLEAR_REFS.write_text("5")
        except OSError as error:
            raise NoMemoryFigureError(
                f"{CLEAR_REFS} cannot be written, so the peak cannot be reset: {error}"
            ) from error
        level = _resident("VmRSS")
        kept = call()
        peak = _resident("VmHWM")
    del kept
    return max(0, peak - level)
