"""Shared set-up: where the tests of the Triton backend run.

A test marked ``triton`` launches Triton kernels; one that has "triton" among its parameters is marked by that. Without a
GPU the kernels run in the interpreter, which must be chosen before their import. With one the tensors that such a test
makes are on it: made on the CPU, so that the numbers are the same everywhere, then moved. A test that is not marked may
not launch a kernel: on a GPU its tensors would be on the CPU.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores among themselves

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None

TESTS = str(Path(__file__).parent)

if hasattr(interpreter, "_patch_attr") and not torch.cuda.is_available():
    import quick_interpreter

    quick_interpreter.install()


class OnGPU(TorchFunctionMode):
    """Moves to the GPU what the files of this folder create without saying where; the package's own tensors are its own."""

    CREATE = frozenset({
        torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
        torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
    })  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in self.CREATE or "device" in kwargs or not sys._getframe(1).f_code.co_filename.startswith(TESTS):
            return func(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).cuda().requires_grad_(wanted)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pretend-gpu", action="store_true", help="which tensors would be where on a GPU: see pretend_gpu.py"
    )


def sources() -> str:
    """A hash of the package: what Inductor keeps of a compiled graph knows an operator's name and not what it returns."""
    files = sorted((Path(TESTS).parent / "harmonic_triton" / "fused").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def pytest_configure(config: pytest.Config) -> None:
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ and (cache := getattr(config, "cache", None)) is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache.mkdir("inductor-" + sources()))
    if config.getoption("--pretend-gpu"):
        import pretend_gpu

        pretend_gpu.install()


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.config.getoption("--pretend-gpu"):
        import pretend_gpu

        if reason := pretend_gpu.CANNOT.get(getattr(item, "originalname", item.name)):
            item.add_marker(pytest.mark.skip(reason))
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if any(isinstance(value, str) and value == "triton" for value in parameters.values()):
        item.add_marker("triton")


@pytest.fixture(autouse=True)
def tensors_where_kernels_run(request, monkeypatch):
    """A marked test's tensors on the GPU; no kernel in a test that is not marked.

    Its name is long because a test with a parameter of the same name would do without it.
    """
    marked = request.node.get_closest_marker("triton") is not None
    if marked and torch.cuda.is_available():
        with OnGPU():
            yield
        return
    if not marked and interpreter is not None:

        def refuse(kernel, *_, **__):
            pytest.fail(f"{kernel.fn.__name__} is launched by a test that is not marked triton: see conftest.py")

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", refuse)
    yield
