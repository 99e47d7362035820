"""The loss kernel's two kernels as compiled: rank-k updates of the covariance, and the search of nearest samples."""

import re

import emulation
import pytest
import torch

import harmonic_triton as ht
from harmonic_triton.losskernel.covariance import rank_k_triton
from harmonic_triton.losskernel.covariance.triangle import Triangle
from harmonic_triton.losskernel.traces import neighbors

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# Differences are held by 24, 16 and 24 bits; a sum of 140 products of them in fp32 adds sqrt(140) roundings of 2^-24.
BOUNDS = {"split": 3e-7, "fast": 3e-5, "ieee": 3e-6}


@pytest.mark.parametrize(("precision", "dtype", "order"), [
    ("split", "fp32", "forward"), ("split", "fp64", "forward"), ("split", "bf16", "forward"), ("split", "fp16", "forward"),
    ("fast", "fp32", "forward"), ("ieee", "fp32", "forward"),
    ("split", "fp32", "random"), ("fast", "fp32", "random"), ("ieee", "fp32", "random"),
])  # fmt: skip
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_rank_k(arch, precision, dtype, order):
    """Two updates of a folded triangle of 200 samples by 70 draws."""
    samples, count = 200, 70
    generator = torch.Generator().manual_seed(0)
    draws = (2 + 0.05 * torch.randn(count, samples, generator=generator)).to(DTYPES[dtype])
    shift = 2 + 0.01 * torch.randn(samples, generator=generator)
    triangle = Triangle(samples, gap=rank_k_triton.GAP, dtype=torch.float32, device=CPU)
    with emulation.on_gpu(arch, order=order):
        for _ in range(2):
            rank_k_triton.rank_k_(triangle, draws, shift, precision)
    apart = draws.double() - shift.double()
    wanted = 2 * apart.t() @ apart
    for column in range(samples):
        error = (triangle.column(column).double() - wanted[column:, column]).abs().max()
        assert error <= BOUNDS[precision] * wanted.abs().max()


@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_streaming_covariance(arch):
    """The accumulator around it, with draws that come in uneven parts."""
    draws = 2 + 0.05 * torch.randn(190, 150, generator=torch.Generator().manual_seed(0))
    with emulation.on_gpu(arch):
        accumulator = ht.StreamingCovariance(150, backend="triton", buffer_size=64)
        for part in draws.split(37):
            accumulator.update(part)
        got = accumulator.compute().covariance
    wanted = torch.cov(draws.double().t())
    assert (got.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(("labelled", "panels", "options"), [
    (False, False, {}), (True, True, {}), (True, False, {"order": "random"}), (False, True, {"worst_case": "random"}),
], ids=["plain", "labels_in_panels", "random_order", "random_errors_in_panels"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_nearest_samples(arch, dtype, labelled, panels, options, monkeypatch):
    """The neighbors that the PyTorch search finds, for all samples and for some of them."""
    samples, draws, k = 133, 45, 5
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    traces = (3 + normal(draws, 9) @ normal(9, samples) + 0.4 * normal(draws, samples)).to(DTYPES[dtype])
    labels = torch.randint(0, 9, (samples,), dtype=torch.int32, generator=generator) if labelled else None
    mean = traces.double().mean(0)
    searched = neighbors.Search(traces, mean, 1 / (traces.double() - mean).norm(dim=0), labels)
    wanted = neighbors.search(searched, k, range(samples), "torch", None)
    if panels:
        monkeypatch.setattr(neighbors, "COLUMN_BYTES", draws * traces.element_size() * 48)
        monkeypatch.setattr(neighbors, "ROW_PANEL", 64)
    with emulation.on_gpu(arch, **options):
        got = neighbors.search(searched, k, range(samples), "triton", None)
        part = neighbors.search(searched, k, range(20, 60), "triton", None)
    for one, other, some in zip(got, wanted, part, strict=True):
        assert torch.equal(one, other) and torch.equal(some, other[20:60])


def test_a_planted_fault_is_seen():
    """Without their barriers kernels race."""
    from ptx_emulator import MemoryFault

    triangle = Triangle(60, gap=rank_k_triton.GAP, dtype=torch.float32, device=CPU)
    parted = lambda name, ptx: re.sub(r"\n\s*bar\.sync[^\n]*", "", ptx)
    with emulation.on_gpu(80, edit=parted), pytest.raises(MemoryFault, match="race: read of what another thread wrote"):
        rank_k_triton.rank_k_(triangle, torch.randn(5, 60), torch.zeros(60), "fast")
