"""The package as on a GPU that is not there: its own entry points on CPU tensors, its kernels executed as compiled.

``on_gpu(arch)`` is all that is told: tensors say that they are on a GPU, the device is an sm_80 or sm_90 with a number of
multiprocessors, and a product of 16-bit operands may be asked for in fp32. Every ``kernel[grid](...)`` is compiled for the
architecture and executed by ptx_emulator, with its checks on: bounds, races, missing waits and fences, shared memory and
registers read before they are written. What PyTorch allocates is filled with NaN, so that global memory that is read
before it is written shows in the results.

The emulator is no package of an index: ``HARMONIC_TRITON_PTX_EMULATOR`` names the directory that holds ``ptx_emulator``, or a
directory ``shared/tools`` beside the checkout does. ``python tests/emulate/emulation.py`` says whether it was found.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

VARIABLE = "HARMONIC_TRITON_PTX_EMULATOR"
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90)
PROCESSORS = {80: 108, 90: 132}  # of an A100 and an H200


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
    """Make ``ptx_emulator``, and what corrects it, importable."""
    sys.path[:0] = [str(find()), str(ROOT / "tests" / "tools")]


@contextmanager
def on_gpu(
    arch: int, *, processors: int = 0, edit: Callable[[str, str], str] | None = None, **options: Any
) -> Iterator[Any]:
    """The emulator's session in which the package believes in a GPU of ``arch``; ``options`` are the emulator's.

    Args:
        arch: 80 or 90.
        processors: multiprocessors of the device, by default those of an A100 or an H200.
        edit: (kernel's name, PTX) -> PTX, to plant faults.
    """
    import torch
    from ptx_emulator import Options, emulated
    from ptx_corrections import corrected

    properties = SimpleNamespace(
        name=f"emulated sm_{arch}", major=arch // 10, minor=arch % 10, total_memory=2**36,
        multi_processor_count=processors or PROCESSORS[arch],
    )  # fmt: skip
    told: dict[str, Callable[..., Any]] = {
        "architecture": lambda device: f"sm{arch}",
        "unsupported_reasons": lambda *_, **__: [],
    }
    with ExitStack() as stack:
        for module in _modules():
            for name, answer in told.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, answer))
        cuda = {"device": lambda _: nullcontext(), "get_device_properties": lambda *_: properties}
        cuda["get_device_capability"] = lambda *_: (properties.major, properties.minor)
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("mm", "addmm"):
            stack.enter_context(mock.patch.object(torch, name, _wide(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", property(lambda _: True), create=True))
        stack.enter_context(_poisoned())
        stack.enter_context(corrected())
        yield stack.enter_context(emulated(arch, Options(**{"strict": True, **options}), edit))


def _modules() -> list[Any]:
    """Every module of the package's two halves, the kernels' among them."""
    import harmonic_triton

    prefix = harmonic_triton.__name__ + "."
    names = (found.name for found in pkgutil.walk_packages(harmonic_triton.__path__, prefix))
    wanted = (name for name in names if name.split(".")[1] in ("_common", "fused", "losskernel"))
    return [importlib.import_module(name) for name in wanted]


def _wide(product: Callable[..., Any]) -> Callable[..., Any]:
    """torch.mm and torch.addmm with ``out_dtype``, which PyTorch has on GPUs alone."""

    def computed(*operands: Any, out_dtype: Any = None, out: Any = None, **options: Any) -> Any:
        if out_dtype is None:
            return product(*operands, **options) if out is None else product(*operands, out=out, **options)
        result = product(*(operand.to(out_dtype) for operand in operands), **options)
        return result if out is None else out.copy_(result)

    return computed


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that PyTorch allocates holds NaN."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


if __name__ == "__main__":
    reason = missing()
    print(reason or f"the emulator of compiled kernels is in {find()}")
    sys.exit(reason is not None)
