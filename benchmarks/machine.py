"""What a run was measured on: hardware, versions, commit."""

import importlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def _version(module: str) -> str | None:
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except Exception:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def free_memory() -> int | None:
    """Bytes of main memory that can be had without swapping; None where this system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


class OtherWork:
    """How many cores other processes (and other guests of the host) kept busy since this was made.

    Processes that this one has started count as its own once they have ended and been waited for.
    """

    def __init__(self) -> None:
        self._start = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        """Seconds: everybody's on the CPUs, this process's and its children's, the wall's."""
        try:
            words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        mine = os.times()
        return busy, time.process_time() + mine.children_user + mine.children_system, time.perf_counter()

    def cores(self) -> float | None:
        now = self._clocks()
        if self._start is None or now is None:
            return None
        busy, own, wall = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, round((busy - own) / wall, 3))


def describe(device: str) -> dict[str, Any]:
    """Everything a reader needs to place a figure; ``dirty`` leaves out the results themselves."""
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "harmonic_triton": _version("harmonic_triton"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = gpu.name
        facts["gpu_capability"] = f"sm_{gpu.major}{gpu.minor}"
        facts["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        facts["cuda"] = torch.version.cuda or torch.version.hip
    return facts
