"""What the fast suite takes of the emulation (``tests/test_emulated.py``): every kernel once, in a minute's fraction."""

import ast
from pathlib import Path

import emulation
import pytest
import torch
from test_emulated_logits import compare_logits
from test_emulated_losses import WAYS, compare
from test_oracle import inputs

import harmonic_triton
from harmonic_triton.losskernel.covariance import rank_k_triton
from harmonic_triton.losskernel.covariance.triangle import Triangle
from harmonic_triton.losskernel.traces import neighbors

_seen: set[str] = set()


def kernels():
    """Names of the package's kernels, from its source alone."""
    jitted = lambda node: isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    for path in Path(harmonic_triton.__file__).parent.rglob("*.py"):
        functions = filter(jitted, ast.walk(ast.parse(path.read_text())))
        yield from (function.name for function in functions if function.name.endswith("_kernel"))


@pytest.mark.parametrize("strategy", [strategy for dtype, strategy in WAYS if dtype == "bf16"])
def test_a_loss(strategy):
    with emulation.on_gpu(90, processors=2) as session:
        compare(*inputs(19, 40, 71, torch.bfloat16, "near")[:3], 7.0, strategy)
    _seen.update(session.summary())


def test_logits_with_a_bias():
    """The gradient of a bias has a kernel of its own."""
    with emulation.on_gpu(90, processors=2) as session:
        compare_logits(19, 40, 71, torch.bfloat16, True, None, "one pass")
    _seen.update(session.summary())


def test_a_rank_k_update():
    draws = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    triangle = Triangle(60, gap=rank_k_triton.GAP, dtype=torch.float32, device=torch.device("cpu"))
    with emulation.on_gpu(90) as session:
        rank_k_triton.rank_k_(triangle, draws, torch.zeros(60), "fast")
    _seen.update(session.summary())
    wanted = (draws.double().t() @ draws.double())[:, 0]  # 16 bits of every number
    assert (triangle.column(0).double() - wanted).abs().max() <= 5 * 2.0**-16 * draws.abs().max() ** 2


def test_nearest_samples():
    traces = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean = traces.double().mean(0)
    searched = neighbors.Search(traces, mean, 1 / (traces.double() - mean).norm(dim=0), None)
    with emulation.on_gpu(90) as session:
        got = neighbors.search(searched, 3, range(40), "triton", None)
    _seen.update(session.summary())
    assert all(map(torch.equal, got, neighbors.search(searched, 3, range(40), "torch", None)))


def test_every_kernel_was_executed(request):
    """By the tests above: a kernel that this harness cannot reach would be checked by nothing."""
    here = [item for item in request.session.items if item.path == request.path]
    if len(here) < 6 or hasattr(request.config, "workerinput"):
        pytest.skip("a part of this file runs in this process; tests/test_emulated.py runs all of it in one")
    assert set(kernels()) == _seen
