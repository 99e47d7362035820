"""The package as on a GPU that is not there: its own entry points on CPU tensors, its kernels executed as compiled.

Inside of ``on_gpu(arch)`` the package believes in a GPU (``tests/tools/compiled.py`` has all that it is told), and every
``kernel[grid](...)`` is compiled for the architecture and executed by ptx_emulator, with its checks on: bounds, races,
missing waits and fences, shared memory and registers read before they are written. What PyTorch allocates is filled with
NaN, so that global memory that is read before it is written shows in the results.

The emulator is no package of an index: ``HARMONIC_TRITON_PTX_EMULATOR`` names the directory that holds ``ptx_emulator``, or a
directory ``shared/tools`` beside the checkout does. ``python tests/emulate/emulation.py`` says whether it was found.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "HARMONIC_TRITON_PTX_EMULATOR"
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90)


def find() -> Path | None:
    """The directory that holds ``ptx_emulator``, or None."""
    named = os.environ.get(VARIABLE)
    places = [Path(named)] if named else [parent / "shared" / "tools" for parent in (ROOT, *ROOT.parents)]
    return next((place for place in places if (place / "ptx_emulator" / "__init__.py").is_file()), None)


def missing() -> str | None:
    """Why kernels cannot be emulated in this process, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1: the kernels of this process belong to the interpreter (make emulate sets 0)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if find() is None:
        named = os.environ.get(VARIABLE)
        where = f"{VARIABLE}={named}" if named else f"a directory shared/tools beside {ROOT}, {VARIABLE} is not set"
        return f"the emulator of compiled kernels (ptx_emulator) is not there: looked in {where}"
    return None


def load() -> None:
    """Make ``ptx_emulator`` importable."""
    sys.path.insert(0, str(find()))


@contextmanager
def on_gpu(
    arch: int, *, processors: int = 0, edit: Callable[[str, str], str] | None = None, **options: Any
) -> Iterator[Any]:
    """The emulator's session in which the package believes in a GPU of ``arch``; ``options`` are the emulator's.

    Args:
        arch: 80 or 90.
        processors: multiprocessors of the device, by default an A100's or an H200's.
        edit: (kernel's name, PTX) -> PTX, to plant faults.
    """
    from compiled import gpu
    from ptx_corrections import corrected
    from ptx_emulator import Options, emulated

    checked = Options(**{"strict": True, **options})
    with gpu(arch, processors), corrected(), emulated(arch, checked, edit) as session:
        yield session


if __name__ == "__main__":
    reason = missing()
    print(reason or f"the emulator of compiled kernels is in {find()}")
    sys.exit(reason is not None)
