"""Packages that are asked for only where they are used, and the message where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import import_module
from typing import Any

ANALYSIS = "pip install 'harmonic-triton[analysis]'"


def needs(module: str, what: str | None = None, *, install: str = ANALYSIS) -> Any:
    """A module that an extra installs.

    Args:
        module: its name, with dots where it lies within a package.
        what: what asks for it, for the message; None names the module alone.
        install: the command that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        wanted = f"{module} is needed here" if what is None else f"{what} needs {package}"
        raise ImportError(f"{wanted}: {install}") from error


def missing(modules: Iterable[str]) -> list[str]:
    """Those of some modules that are not installed; none is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]
