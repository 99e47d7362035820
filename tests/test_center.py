"""The vector about which class vectors are measured."""

from __future__ import annotations

import math

import pytest
import torch

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
