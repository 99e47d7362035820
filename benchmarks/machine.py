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
