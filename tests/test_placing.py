"""Where tests make their tensors: on the GPU for Triton where there is one, and how a test that forgets is found."""

from __future__ import annotations

import fresh
import pytest
import torch

import harmonic_triton as ht

GPU = torch.cuda.is_available()


def loss(x, w):
    return ht.linear_harmonic_loss(x, w, torch.arange(len(x), device=x.device), backend="triton")


@pytest.mark.triton
def test_what_a_marked_test_creates_is_where_the_kernels_run():
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(3, 5, generator=generator, requires_grad=True)
    again = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), device="cpu")
    assert made.device.type == ("cuda" if GPU else "cpu")
    assert made.is_leaf
    assert made.requires_grad
    assert torch.equal(made.cpu(), again)  # the numbers are those of a machine without one
    assert loss(made, torch.ones(4, 5)).isfinite()


@pytest.mark.triton
@pytest.mark.parametrize("place", ["anywhere"])  # what the fixture was called once, which took it out of such a test
def test_a_parameter_called_place_does_not_keep_them_away(place):
    assert torch.ones(2).device.type == ("cuda" if GPU else "cpu")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_parameter_marks_as_well(backend, request):
    assert (request.node.get_closest_marker("triton") is not None) == (backend == "triton")


@pytest.mark.skipif(GPU, reason="Triton itself refuses tensors of the CPU here")
def test_an_unmarked_test_may_not_launch_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(pytest.fail.Exception, match="not marked triton"):
        loss(torch.ones(3, 5), torch.ones(4, 5))


@pytest.mark.triton
def test_tensors_that_stay_on_the_cpu_are_found_when_a_gpu_is_pretended(request):
    if not request.config.getoption("--pretend-gpu"):
        pytest.skip("the next test runs this")
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.raises(ValueError, match="on cpu and linear_weight on cuda"):
        loss(x.cpu(), w)
    with pytest.raises((pytest.fail.Exception, ValueError), match="tensors are on 'cpu'|Pointer argument"):
        loss(x.cpu(), w.cpu())
    with pytest.raises(RuntimeError, match="same device"):
        x + x.cpu()
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()


@pytest.mark.skipif(GPU, reason="there is one")
def test_as_on_a_gpu():
    """This file where a GPU is pretended; ``pytest --pretend-gpu -m triton`` is the same for all of them."""
    pytest.importorskip("triton")
    words = ["--pretend-gpu", "-q", "-p", "no:cacheprovider", "tests/test_placing.py"]
    run = fresh.run(fresh.module("pytest"), *words)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "5 passed, 2 skipped" in run.stdout
