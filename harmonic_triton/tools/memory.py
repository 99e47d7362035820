"""Peak memory of a call or of this process: the one place that measures it.

The figure is (peak since a moment) - (level at that moment) and never below zero. On a CPU the level is the process's
resident set (VmRSS) and the peak its high-water mark (VmHWM), which is set back to the level by writing 5 to
/proc/self/clear_refs; on a GPU both come from the caching allocator (``torch.cuda.memory_allocated`` and
``max_memory_allocated``). Freed memory is handed back to the system before the level is read, so that no call works in
what an earlier one left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class NoMemoryFigureError(RuntimeError):
    """This system cannot measure what was asked; the message says why."""


class Peak:
    """Peak memory from the moment it is made.

    Args:
        device: whose memory.

    Attributes:
        method: where the figure comes from: "torch.cuda.max_memory_allocated"; "VmHWM"; or "the largest
            resident set so far" where it cannot be set back: what stays below an earlier peak is missed then.
        reason: why it cannot be set back, else empty.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.reason = torch.device(device), ""
        if self.device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.level = torch.cuda.memory_allocated(self.device)
            return
        _give_back_freed_memory()
        try:
            CLEAR_REFS.write_text("5")
            self.method, self.level = "VmHWM", _resident("VmRSS")
        except OSError as error:
            self.reason = f"{CLEAR_REFS} cannot be written, so the peak on a CPU cannot be set back: {error}"
            self.method, self.level = "the largest resident set so far", so_far()

    def beyond(self) -> int:
        """Bytes of the peak since then above the level of then."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return max(0, torch.cuda.max_memory_allocated(self.device) - self.level)
        return max(0, so_far() - self.level)


def peak_beyond(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes by which ``call`` raises this process's peak above its level before the call; its result is kept alive.

    Raises:
        NoMemoryFigureError: the peak cannot be set back here.
    """
    peak = Peak(device)
    if peak.reason:
        raise NoMemoryFigureError(peak.reason)
    kept = call()
    found = peak.beyond()
    del kept
    return found


def so_far() -> int:
    """Bytes of this process's largest resident set since it began or since a :class:`Peak` was made."""
    return _resident("VmHWM") if STATUS.exists() else _largest_resident()


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def _largest_resident() -> int:
    """By getrusage, which on Linux begins with the parent's, and on macOS counts bytes."""
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _give_back_freed_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library: its freed memory stays in the level
        ctypes.CDLL(None).malloc_trim(0)
