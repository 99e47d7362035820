"""``python -m harmonic_triton doctor``: versions, device, which backend serves and why the others do not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from harmonic_triton import __version__
from harmonic_triton._common.dispatch import interpreted, resolve, unsupported_reasons


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def version_line(device: torch.device) -> str:
    """Package, torch, triton, Python and device on one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return (f"harmonic_triton {__version__}, torch {torch.__version__}, triton {_version('triton')},"
            f" Python {platform.python_version()}, {name}, {torch.get_num_threads()} threads")  # fmt: skip


def backend_lines(device: torch.device) -> list[str]:
    """One line for each backend: it serves, or why not."""
    lines = []
    for backend in ("reference", "torch", "triton"):
        reasons = unsupported_reasons(backend, device)
        how = " through the interpreter, for checks on small shapes" if backend == "triton" and interpreted() else ""
        lines.append(f"  {backend:9} " + (f"does not serve: {'; '.join(reasons)}" if reasons else f"serves{how}"))
    return lines


def main() -> int:
    """Print what a bug report needs."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        print(version_line(device))
        print(*backend_lines(device), sep="\n")
        print(f"  backend='auto' takes {resolve('auto', device, torch.float32)!r} here")
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            print(f"  memory {free / 2**30:.1f} GiB free of {total / 2**30:.1f}, capability "
                  f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}")  # fmt: skip
    if len(devices) == 1:
        print("No GPU: `verify` checks the Triton kernels through the interpreter, on small shapes.")
    extras = (
        "numpy",
        "matplotlib",
        "tokenizers",
        "tqdm",
        "scipy",
        "scikit-learn",
        "umap-learn",
        "safetensors",
        "zarr",
        "transformers",
        "liger-kernel",
        "cut-cross-entropy",
        "pykeops",
    )
    print("extras: " + ", ".join(f"{name} {_version(name)}" for name in extras))
    print("environment: " + ", ".join(f"{name}={os.environ.get(name, '(unset)')}" for name in (
        "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")))  # fmt: skip
    return 0
