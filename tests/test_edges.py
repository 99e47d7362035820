"""What a single line of a backend guards: each of these fails when that line is gone."""

from __future__ import annotations

import math

import pytest
import torch

import harmonic_triton as ht


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def gradients(x, w, target, g, **options):
    """(losses, dX, dW, dn) under the upstream gradient g (N,)."""
    leaves = [x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()]
    n = torch.as_tensor(options.pop("n")).detach().clone().to(x.device).requires_grad_()
    loss = ht.linear_harmonic_loss(*leaves, target, n=n, reduction="none", **options)
    return loss.detach(), *torch.autograd.grad(loss, (*leaves, n), g.to(loss.dtype))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_rival_at_its_floor_has_no_gradient(backend, reduction):
    """x one rounding away from another class vector: that distance is below what fp32 resolves and counts as constant.

    Divided by the floor's square, 2^-46, its difference of 2^-23 would enter dX and that class's dW with n 2^22.
    """
    generator = torch.Generator().manual_seed(0)
    w = 1.25 + 0.5 * torch.rand(9, 6, generator=generator)  # 1 ... 2, where a rounding is 2^-23
    target, other = torch.tensor([0, 3, 5, 7]), torch.tensor([1, 8, 2, 4])
    x = w[other].clone()
    x[:, 2] += 2.0**-23
    assert ((x - w[other]).norm(dim=1) == 2.0**-23).all()
    g = torch.tensor([0.3, -1.2, 0.7, 2.0])
    found = []
    for which in (backend, "reference"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, w)]
        if reduction == "none":
            loss = ht.linear_harmonic_loss(*leaves, target, n=3.0, reduction="none", backend=which)
            found.append(torch.autograd.grad(loss, leaves, g.to(loss.dtype)))
        else:
            loss = ht.linear_harmonic_loss(*leaves, target, n=3.0, reduction="sum", backend=which)
            found.append(torch.autograd.grad(loss, leaves, g[3].to(loss.dtype)))
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_token_without_upstream_gradient_adds_nothing_to_the_exponents(backend, label_smoothing):
    """Not even its NaN, which 0 times would keep."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    target, g = torch.tensor([0, 3, 5, 7, 9]), torch.tensor([0.3, 0.0, -1.2, 0.7, 0.0])
    options = {"n": 3.0, "label_smoothing": label_smoothing, "backend": backend}
    counted = g != 0
    want = gradients(x[counted], w, target[counted], g[counted], **options)[3]
    x[1, 2], x[4, 0] = math.nan, math.inf
    loss, *_, dn = gradients(x, w, target, g, **options)
    assert not loss[~counted].isfinite().any()
    assert abs(dn - want) <= 1e-5 * abs(want)


# 2085 classes: eight blocks of 256, the least number that is searched by blocks, and 37 more.
@pytest.mark.parametrize("nearest", [0, 255, 256, 2047, 2048, 2084])
def test_the_rival_is_found_in_every_block_of_classes(nearest):
    """The torch backend's search. Within 1/1000 of x it must be measured directly: by the products its distance is rounding alone."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8 * 256 + 37, 12, generator=generator)
    x = w[[nearest] * 3] + 1e-3 * torch.randn(3, 12, generator=generator)
    target, g = torch.tensor([7, 300, 2060]), torch.tensor([0.3, -1.2, 0.7])
    got, want = (gradients(x, w, target, g, n=4.0, backend=which) for which in ("torch", "reference"))
    for mine, truth in zip(got, want, strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


def test_probabilities_of_the_backward_stay_below_1(backend):
    """Losses of n whose fp32 rounding is 8: p formed from them again could be thousands.

    Every class has a twin, so that one of two with p = 1/2 goes through the products; |dX| <= n |g| (1/d_c + 2/d_r).
    """
    n, generator = 1e8, torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 16, generator=generator), torch.randn(20, 16, generator=generator).repeat_interleave(2, 0)
    distances = torch.cdist(x.double(), w.double(), compute_mode="donot_use_mm_for_euclid_dist")
    target = distances.argmax(1)
    g = torch.linspace(-1.0, 2.0, 64)
    loss, dx, dw, dn = gradients(x, w, target, g, n=n, backend=backend)
    assert loss.isfinite().all()
    assert dn.isfinite()
    bound = n * g.abs() * (1 / distances.amax(1) + 2 / distances.amin(1))
    assert (dx.norm(dim=1) <= 1.001 * bound).all()
    assert dw.norm(dim=1).max() <= 1.001 * bound.sum()


@pytest.mark.parametrize("options", [{}, {"uniform_mix": 0.1}, {"label_smoothing": 0.1}, {"z_loss": 0.03}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_token_that_is_masked_out_stays_out(backend, options):
    """``where(mask, losses, 0)``: its upstream gradient is 0, and so is what it adds to everybody's gradients."""
    function = ht.linear_cross_entropy if "z_loss" in options else ht.linear_harmonic_loss
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 8, generator=generator), torch.randn(9, 8, generator=generator)
    target, counts = torch.arange(6), torch.tensor([True, True, False, True, True, True])
    gradients = []
    for value in (1.0, math.nan):
        bad = x.clone()
        bad[2] *= value
        leaves = bad.requires_grad_(), w.clone().requires_grad_()
        losses = function(*leaves, target, reduction="none", backend=backend, **options)
        assert losses[2].isnan() == math.isnan(value)
        loss = (torch.where(counts, losses, 0.0) * torch.linspace(0.3, 1.2, 6)).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)
