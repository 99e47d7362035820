"""What the compiled code says of asynchronous copies, on any Triton and without an emulator.

The matrix units of Hopper and Blackwell read shared memory through a proxy of its own: what cp.async brought there they may
not see without a fence.proxy.async. Triton 3.6 leaves it out.
"""

import re

import pytest
import torch
from compiled import captured

from harmonic_triton import linear_harmonic_loss
from harmonic_triton.losskernel.covariance import rank_k_triton
from harmonic_triton.losskernel.covariance.triangle import Triangle
from harmonic_triton.losskernel.traces import neighbors

COPY = re.compile(r"\scp\.async\.(ca|cg)\.shared")
PRODUCT = re.compile(r"\s(wgmma\.mma_async|tcgen05\.mma)\.")


def unfenced(ptx: str) -> int:
    """Products that follow asynchronous copies, in the order of the text, without a fence between."""
    copied, count = False, 0
    for line in ptx.splitlines():
        if COPY.search(line):
            copied = True
        elif "fence.proxy.async" in line:
            copied = False
        elif PRODUCT.search(line):
            count += copied
    return count


def test_a_missing_fence_is_seen():
    copy, fence, product = (
        "\tcp.async.cg.shared.global [%r1], [%rd1], 16;",
        "\tfence.proxy.async.shared::cta;",
        "\twgmma.mma_async.sync",
    )
    product += ".aligned.m64n64k16.f32.bf16.bf16 {%r2}, %rd2, %rd3, 1, 1, 1, 0, 0;"
    assert unfenced("\n".join([copy, fence, product, copy])) == 0
    assert unfenced("\n".join([copy, product, fence])) == 1


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("precision", ["split", "fast"])
def test_rank_k(arch, precision):
    triangle = Triangle(60, gap=rank_k_triton.GAP, dtype=torch.float32, device=torch.device("cpu"))
    with captured(arch) as found:
        rank_k_triton.rank_k_(triangle, torch.randn(5, 60), torch.zeros(60), precision)
    held(found["rank_k_kernel"])


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_nearest_samples(arch, dtype):
    traces = torch.randn(9, 40).to(dtype)
    mean = traces.double().mean(0)
    problem = neighbors.Problem(traces, mean, 1 / (traces.double() - mean).norm(dim=0), None)
    with captured(arch) as found:
        neighbors.search(problem, 3, range(40), "triton", None)
    held(found["neighbors_kernel"])


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_losses(arch, dtype, layout):
    """Operands whose rows are contiguous, and a transposed W."""
    x, w, target = torch.randn(5, 64).to(dtype).requires_grad_(), torch.randn(70, 64).to(dtype), torch.arange(5)
    if layout == "transposed":
        w = w.t().contiguous().t()
    with captured(arch) as found:
        linear_harmonic_loss(x, w.requires_grad_(), target, reduction="none", backend="triton").sum().backward()
    products = [kernel for every in found.values() for kernel in every if PRODUCT.search(kernel.asm["ptx"])]
    assert products
    held(products)


def held(compiled):
    for kernel in compiled:
        assert PRODUCT.search(kernel.asm["ptx"])
        assert unfenced(kernel.asm["ptx"]) == 0
