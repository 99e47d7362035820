"""The module paths of version 0.1, importable for one version more, with a warning at the first use of a name."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

WING, SAMPLING = "losskernel", "losskernel.sampling"
PATHS = {  # where the names of an old module are now, the most likely place first
    "covariance": tuple(f"{WING}.covariance.{new}" for new in ("streaming", "differentiable", "sums")),
    "doctor": ("tools.doctor",),
    "estimators": (f"{WING}.estimators", f"{WING}.convergence", f"{WING}.layout", "_common.extras"),
    "kernel_cli": (f"{WING}.cli", f"{WING}.entry_point", f"{WING}.tables"),
    "loss_kernel": (f"{WING}.run", f"{WING}.kernel", f"{WING}.about", f"{WING}.views"),
    "losses": (f"{WING}.per_sample_losses",),
    "sgld": tuple(f"{SAMPLING}.{new}" for new in ("sampler", "config", "stream", "stability")),
    "traces": (f"{WING}.traces.traces", f"{WING}.traces.factor"),
    "tuning": (f"{SAMPLING}.tuning",),
    "verify": ("tools.verify",),
}
RENAMED = {  # names that are called otherwise where they are now
    ("covariance", "LARGEST"): (f"{WING}.draws", "LARGEST"),
    ("traces", "LARGEST_LOSS"): (f"{WING}.draws", "LARGEST"),
    ("estimators", "standardised"): (f"{WING}.estimators", "standardized"),
    ("loss_kernel", "standardised_chunks"): (f"{WING}.views", "standardized_chunks"),
    ("traces", "Samples"): (f"{WING}.traces.factor", "Selection"),
}


class _Moved(types.ModuleType):
    """Stands at an old path; its names come from the new ones."""

    def __init__(self, old: str) -> None:
        super().__init__(f"harmonic_triton.{old}")
        self._old = old

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module, new = find(self._old, name)
        warnings.warn(f"{self.__name__}.{name} is now {module.__name__}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(module, new)


def find(old: str, name: str) -> tuple[types.ModuleType, str]:
    """Where a name of an old module is now, and how it is called there.

    Raises:
        AttributeError: it is nowhere.
    """
    if (old, name) in RENAMED:
        path, new = RENAMED[old, name]
        return importlib.import_module(f"harmonic_triton.{path}"), new
    for path in PATHS[old]:
        module = importlib.import_module(f"harmonic_triton.{path}")
        if hasattr(module, name):
            return module, name
    places = ", ".join(f"harmonic_triton.{path}" for path in PATHS[old])
    raise AttributeError(f"harmonic_triton.{old} had no {name!r}, nor is it in {places}")


def register() -> None:
    """Make the old paths importable. ``harmonic_triton.loss_kernel`` stays the function of that name."""
    package = sys.modules["harmonic_triton"]
    for old in PATHS:
        module = sys.modules.setdefault(f"harmonic_triton.{old}", _Moved(old))
        if not hasattr(package, old):
            setattr(package, old, module)
