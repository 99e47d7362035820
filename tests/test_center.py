"""The vector about which class vectors are measured."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import oracle

import harmonic_triton as ht
from harmonic_triton.fused.center import ROWS, center_of


def class_vectors(mean, classes=1000, width=24, dtype=torch.float32):
    """Class vectors of spread 1 a feature about a common mean of ``mean`` times that."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(width, generator=generator).sign()
    return (mean * direction + torch.randn(classes, width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [3.0, 100.0])
def test_it_is_near_the_mean(mean, dtype):
    w = class_vectors(mean, dtype=dtype)
    center = center_of(w)
    assert center.shape == (24,)
    assert center.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the mean of R rows is 1/sqrt(R) off a feature, of which 24 are added; 16-bit rows are rounded, and not all alike
    assert (center - w.double().mean(0)).norm() < 2 * math.sqrt(24 / ROWS) + 24 * mean * torch.finfo(dtype).eps


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_it_is_zero_without_a_common_mean(mean):
    assert torch.equal(center_of(class_vectors(mean)), torch.zeros(24))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e15, 1e30])
def test_a_class_vector_that_is_not_usual_does_not_move_it(value):
    w = class_vectors(10.0)
    w[::40] = value  # every tenth of those that are taken
    others = torch.arange(len(w)) % 40 != 0
    assert (center_of(w) - w[others].mean(0)).norm() < 2 * math.sqrt(24 / ROWS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_is_zero_where_most_are_not_finite(value):
    w = class_vectors(10.0)
    w[: 9 * len(w) // 10, 3] = math.inf
    w[3 * len(w) // 10 :, 5] = value
    assert torch.equal(center_of(w), torch.zeros(24))


@pytest.mark.parametrize("classes", [1, 2, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 1])
def test_any_number_of_classes_and_any_strides(classes):
    w = class_vectors(50.0, classes)
    center = center_of(w)
    assert (center - w.mean(0)).norm() < 2 * math.sqrt(24 / min(classes, ROWS))
    # sums may take another order
    torch.testing.assert_close(center_of(w.t().contiguous().t()), center, rtol=1e-5, atol=1e-4)


def test_it_needs_no_gradient():
    assert not center_of(class_vectors(10.0).requires_grad_()).requires_grad


# Class vectors far from the origin beside their distances, x among them (beside its target, or beside the mean): the
# expansion's error would be mean^2/distance^2 roundings of every log-score. Few tokens, and several chunks of them.
@pytest.mark.parametrize("budget", [None, 4 * 301 * 5])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
@pytest.mark.parametrize(("mean", "dtype"), [(10.0, torch.bfloat16), (100.0, torch.float32), (1000.0, torch.float32)])
def test_a_common_mean_costs_no_digits(mean, dtype, function, reduction, budget):
    w = class_vectors(mean, 301, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(301, (17,), generator=generator)
    noise = torch.randn(17, 24, generator=generator)
    harmonic = function is ht.linear_harmonic_loss
    x = w[target].float() + 0.5 * noise if harmonic else 0.3 * noise
    if harmonic:
        x[::2] = class_vectors(mean, 301).mean(0) + noise[::2]
    x, target = x.to(dtype), target.index_fill(0, torch.tensor([6]), -100)
    g = torch.linspace(-1.0, 2.0, 17, dtype=torch.float64) if reduction == "none" else torch.full((17,), 1.7).double()
    n = 28.0 if harmonic else None
    truth = oracle(x, w, target, g, n=n, center=center_of(w))
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
    options = {"n": n} if harmonic else {}
    loss = function(*leaves, target, reduction=reduction, backend="torch", memory_budget=budget, **options)
    loss.backward(g.to(loss.dtype) if reduction == "none" else loss.new_tensor(1.7))
    if reduction == "none":
        truth.check(loss.detach(), *(leaf.grad for leaf in leaves))
    else:
        assert abs(loss.double() - truth.loss.sum()) <= truth.loss_bound.sum()
        truth.check_rows("dX", leaves[0].grad, truth.dx, truth.dx_bound)
        truth.check_rows("dW", leaves[1].grad, truth.dw, truth.dw_bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_below_the_floor_beside_a_common_mean(dtype):
    """The floor is of the norms as they are, whatever was taken from the vectors: every class keeps it, not the rival alone."""
    generator = torch.Generator().manual_seed(0)
    offset = 1e6 * torch.randn(2, generator=generator, dtype=torch.float64)
    w, x = (
        (scale * torch.randn(count, 2, generator=generator, dtype=torch.float64) + offset).to(dtype)
        for scale, count in ((1.0, 300), (0.5, 50))
    )
    target = torch.randint(300, (50,), generator=generator)
    found, wanted = (
        ht.linear_harmonic_loss(x, w, target, reduction="none", backend=backend).double()
        for backend in ("torch", "reference")
    )
    assert ((found - wanted).abs() <= 1e-6 * wanted).all()
