"""The module paths of version 0.1, importable for one version more, with a warning at the first use of a name."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

PATHS = {
    "covariance": "losskernel.covariance.streaming",
    "doctor": "tools.doctor",
    "estimators": "losskernel.estimators",
    "kernel_cli": "losskernel.cli",
    "loss_kernel": "losskernel.kernel",
    "losses": "losskernel.per_sample_losses",
    "sgld": "losskernel.sampling.sampler",
    "traces": "losskernel.traces.traces",
    "tuning": "losskernel.sampling.tuning",
    "verify": "tools.verify",
}


class _Moved(types.ModuleType):
    """Stands at an old path; its names come from the new one."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"harmonic_triton.{old}")
        self._new = f"harmonic_triton.{new}"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(importlib.import_module(self._new), name)
        warnings.warn(f"{self.__name__} is now {self._new}", DeprecationWarning, stacklevel=2)
        return value


def register() -> None:
    """Make the old paths importable. ``harmonic_triton.loss_kernel`` stays the function of that name."""
    package = sys.modules["harmonic_triton"]
    for old, new in PATHS.items():
        module = sys.modules.setdefault(f"harmonic_triton.{old}", _Moved(old, new))
        if not hasattr(package, old):
            setattr(package, old, module)
