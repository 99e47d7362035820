"""Which backend serves a call, and why another cannot."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

BACKENDS = ("triton", "torch", "reference")
_INSTALLED = importlib.util.find_spec("triton") is not None  # known before a function is traced, which cannot ask


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1 before they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _capability(device: torch.device) -> int:
    """Ten times the compute capability of an NVIDIA GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
# As torch.compiler.assume_constant_result sets it, without importing dynamo: tracing has no answer from a device.


def unsupported_reasons(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32, *, mixed_smoothing: bool = False
) -> list[str]:
    """Why ``backend`` cannot serve tensors of this device and dtype; an empty list where it can."""
    if backend != "triton":
        return []
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed (pip install triton, on Linux)")
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        reasons.append(
            f"tensors are on {device.type!r}; Triton kernels need a GPU (or TRITON_INTERPRET=1 set before the first"
            " call, for checks on small shapes)"
        )
    elif device.type == "cuda" and torch.version.cuda and _capability(device) < 80:
        major, minor = divmod(_capability(device), 10)
        reasons.append(f"compute capability {major}.{minor} is below 8.0")
    if dtype == torch.float64:
        reasons.append("float64 is computed by the torch backend only")
    if mixed_smoothing:
        reasons.append("label_smoothing together with uniform_mix is computed by the torch backend only")
    return reasons


def check_name(backend: Any) -> None:
    """Raise a ValueError for a backend that there is not."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of 'auto', {', '.join(map(repr, BACKENDS))}")


def resolve(backend: str, device: torch.device, dtype: torch.dtype, *, mixed_smoothing: bool = False) -> str:
    """The backend that serves; only ``"auto"`` may fall back.

    Raises:
        ValueError: ``backend`` is unknown, or was asked for by name and cannot serve (with the reasons).
    """
    check_name(backend)
    if backend == "auto":
        if device.type == "cpu":
            return "torch"
        return "torch" if unsupported_reasons("triton", device, dtype, mixed_smoothing=mixed_smoothing) else "triton"
    reasons = unsupported_reasons(backend, device, dtype, mixed_smoothing=mixed_smoothing)
    if reasons:
        raise ValueError(f"backend={backend!r} cannot serve this call: {'; '.join(reasons)}. backend='auto' falls back")
    return backend
