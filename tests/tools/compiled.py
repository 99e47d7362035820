"""The package's kernels as its own entry points launch them on a GPU that is not there: compiled, and looked at.

``gpu(arch)`` is all that the package is told: tensors say that they are on a GPU, the device is an sm_80, sm_90 or sm_100
with a number of multiprocessors, and a product of 16-bit operands may be asked for in fp32. What a ``kernel[grid](...)`` then
does is another context's business: ``captured`` compiles it and runs nothing, ``tests/emulate`` executes it.

Triton must be imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H200 and a B200


@contextmanager
def gpu(arch: int, processors: int = 0) -> Iterator[None]:
    """The package believes in a GPU; what PyTorch allocates holds NaN.

    Args:
        arch: 80, 90 or 100.
        processors: multiprocessors of the device, by default those of an A100, an H200 or a B200.
    """
    properties = SimpleNamespace(
        name=f"pretended sm_{arch}", major=arch // 10, minor=arch % 10, total_memory=2**36,
        multi_processor_count=processors or PROCESSORS[arch],
    )  # fmt: skip
    told: dict[str, Callable[..., Any]] = {
        "architecture": lambda device: f"sm{arch}",
        "unsupported_reasons": lambda *_, **__: [],
    }
    cuda: dict[str, Callable[..., Any]] = {
        "device": lambda _: nullcontext(),
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
    }
    with ExitStack() as stack:
        change = lambda where, name, value, **how: stack.enter_context(mock.patch.object(where, name, value, **how))
        for module in _modules():
            for name, answer in told.items():
                if hasattr(module, name):
                    change(module, name, answer)
        for name, answer in cuda.items():
            change(torch.cuda, name, answer)
        for name in ("mm", "addmm"):
            change(torch, name, _wide(getattr(torch, name)))
        change(torch.Tensor, "is_cuda", property(lambda _: True), create=True)
        stack.enter_context(_poisoned())
        yield


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
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


class _Driver:
    """Says which GPU is there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"pretended sm_{self.arch}"


@contextmanager
def captured(arch: int) -> Iterator[dict[str, list[Any]]]:
    """Launches compile for ``arch`` as they would on a GPU and do nothing; yields kernels' names -> what was compiled.

    What kernels should have written is NaN.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, list[Any]] = {}
    known: dict[Any, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options["debug"] = bool(options.get("debug", self.debug))
        backend, binder = self.device_caches[f"pretended sm_{arch}"][-2:]
        bound, specialization, kept = binder(*args, **options)
        key = (self, str(specialization), str(kept))
        if key not in known:
            parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, kept)
            source = ASTSource(self, signature, constants, attributes)
            known[key] = compile(source, target=GPUTarget("cuda", arch, 32), options=parsed.__dict__)
            found.setdefault(self.fn.__name__, []).append(known[key])

    config = getattr(driver, "driver", driver)
    before = config._active
    config.set_active(_Driver(arch))
    try:
        with gpu(arch), mock.patch.object(JITFunction, "run", run):
            yield found
    finally:
        config._active = before
