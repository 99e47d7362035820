"""Host overhead of a call on shapes too small for the arithmetic to matter; by hand, on a quiet machine:

pytest benchmarks/test_overhead.py --benchmark-group-by=param:phase
pytest benchmarks/test_overhead.py --benchmark-save=before        # ... then, after a change:
pytest benchmarks/test_overhead.py --benchmark-compare --benchmark-compare-fail=median:20%
"""

import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import harmonic_triton as ht
from benchmarks.baselines import REGISTRY
from harmonic_triton._common.dispatch import unsupported_reasons

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 128


OURS = ("ours_torch", "ours_triton", "ours_lce_torch", "ours_lce_triton")
PEERS = ("cross_entropy", "torch_chunked")


@pytest.fixture(params=[*OURS, *PEERS])
def step(request: pytest.FixtureRequest, tokens: int, classes: int) -> Iterator[Callable[[bool], Tensor]]:
    baseline = REGISTRY[request.param]
    reason = baseline.unavailable(DEVICE) or ("interpreted" if baseline.interpreted(DEVICE) else None)
    if reason is not None:
        pytest.skip(reason)
    x = torch.randn(tokens, WIDTH, device=DEVICE, requires_grad=True)
    w = torch.randn(classes, WIDTH, device=DEVICE, requires_grad=True)
    target = torch.arange(tokens, device=DEVICE) % classes

    def run(backward: bool) -> Tensor:
        loss = baseline(x, w, target, 8.0)
        if backward:
            torch.autograd.grad(loss, (x, w))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking a thread pool is not what is guarded
    run(True)
    yield run
    torch.set_num_threads(threads)


# The first is all host time; the last two are the tokens and classes whose ratio to cross_entropy is to be at most 1.
@pytest.mark.parametrize(("tokens", "classes"), [(1, 500), (8, 128), (64, 1000), (1, 2048), (1024, 2048)])
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_call_on_a_small_head(benchmark: BenchmarkFixture, step: Callable[[bool], Tensor], phase: str) -> None:
    loss = benchmark(step, phase == "both")
    assert torch.isfinite(loss)


class _Stub:
    """In a kernel's place: what is left of a call is what its launches cost the host before Triton has them."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launch_path_with_stubbed_kernels(
    benchmark: BenchmarkFixture, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are whatever was in memory. Without a GPU it needs TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    if unsupported_reasons("triton", torch.device(DEVICE), dtype):
        pytest.skip("Triton does not serve here (TRITON_INTERPRET=1)")
    for name in ("forward", "backward", "scores"):
        module = importlib.import_module(f"harmonic_triton.fused.triton.{name}")
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, _Stub())
    x = torch.randn(8, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)
    w = torch.randn(512, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.arange(8, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        loss = ht.linear_harmonic_loss(x, w, target, n=8.0, backend="triton")
        return torch.autograd.grad(loss, (x, w))

    gradients = benchmark(run)
    assert [gradient.shape for gradient in gradients] == [x.shape, w.shape]
