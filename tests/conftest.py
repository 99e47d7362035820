"""Shared set-up: where the tests of the Triton backend run.

A test marked ``triton`` launches Triton kernels; one that has "triton" among its parameters is marked by that. Without a
GPU the kernels run in the interpreter, which must be chosen before their import. With one the tensors that such a test
makes are on it: made on the CPU, so that the numbers are the same everywhere, then moved. A test that is not marked may
not launch a kernel: on a GPU its tensors would be on the CPU.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def exchange_the_language_once_a_launch() -> None:
    """Triton's interpreter with half of its time saved: what it does to its language, it does once a launch.

    It exchanges the functions of ``triton.language`` for its own at every launch, and again at every call of a function
    from a kernel, where they are exchanged already. They are found by looking through whole modules; here the names
    are remembered. What a kernel computes is untouched.
    """
    language, exchange = interpreter.tl, interpreter._patch_lang
    exchanged: set[str] = set()  # modules, in the launch under way

    @functools.cache
    def builtins(owner: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(owner) if language.core.is_builtin(member)]

    @functools.cache
    def modules(function: Callable[..., Any]) -> set[str]:
        everything = function.__globals__.values()
        return {module.__name__ for module in (language, language.core) if any(value is module for value in everything)}

    def exchange_builtins(owner: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins(owner):
            interpreter._patch_attr(owner, name, member, builder, scope)

    def exchange_once(function: Callable[..., Any]) -> Any:
        wanted, launched = modules(function), not exchanged
        if wanted <= exchanged:
            return None  # the caller drops it: a scope is restored where the launch ends
        scope = exchange(function)
        exchanged.update(wanted)
        if launched:
            restore = scope.restore
            scope.restore = lambda: (restore(), exchanged.clear())
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = exchange_builtins, exchange_once
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_dtype(kind: Any) -> Any:
        """Its table of types is built anew in each of thousands of calls."""
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype


if interpreter is not None and hasattr(interpreter, "_patch_attr"):  # how it is written in Triton 3.6 to 3.9
    exchange_the_language_once_a_launch()


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


def pytest_configure(config: pytest.Config) -> None:
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
