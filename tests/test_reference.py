"""The specification itself, against arithmetic of 400 digits and against the formulas of the papers."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

import harmonic_triton as ht
from harmonic_triton import reference

mpmath.mp.dps = 400


def exact(x, w, target, n, eps=0.0, uniform_mix=0.0):
    """The loss of one token, summed naively: 400 digits need no care."""
    x, w = [mpmath.mpf(v) for v in x], [[mpmath.mpf(v) for v in row] for row in w]
    s = [sum((a - b) ** 2 for a, b in zip(x, row, strict=True)) + mpmath.mpf(eps) for row in w]
    p = s[target] ** (-mpmath.mpf(n) / 2) / sum(v ** (-mpmath.mpf(n) / 2) for v in s)
    return -mpmath.log((p + mpmath.mpf(uniform_mix) / len(w)) / (1 + mpmath.mpf(uniform_mix)))


# Distance from the class vector in units of its norm: losses from about 5 down to 1e-60.
@pytest.mark.parametrize("away", [3.0, 0.9, 0.1, 0.01])
@pytest.mark.parametrize("n", [0.5, 2.0, 28.0])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-4}, {"eps": 1e-4, "uniform_mix": 0.01}])
def test_loss_and_gradient_in_high_precision(away, n, options):
    torch.manual_seed(0)
    w = torch.randn(6, 4, dtype=torch.float64)
    x = w[2] + away * torch.randn(4, dtype=torch.float64)
    a, b = x.clone().unsqueeze(0).requires_grad_(), w.clone().requires_grad_()
    exponent = torch.tensor(n, dtype=torch.float64, requires_grad=True)
    loss = reference.linear_harmonic_loss(a, b, torch.tensor([2]), n=exponent, **options)
    loss.backward(torch.tensor(1.7, dtype=torch.float64))
    wanted = exact(x.tolist(), w.tolist(), 2, n, **options)
    # fp64's eps times n/2 + 2 times kappa < 1e3; a mix makes the loss a difference of terms of order one
    tolerance = 1e-11
    assert abs(loss.item() - wanted) <= tolerance * (wanted + (1 if "uniform_mix" in options else 0))

    def derivative(change):
        step = mpmath.mpf(10) ** -60
        return (change(step) - change(-step)) / (2 * step)

    def moved(values, at, h):
        out = [mpmath.mpf(v) for v in values]
        out[at] += h
        return out

    rows = w.tolist()
    for k in range(4):
        slope = derivative(lambda h, k=k: exact(moved(x.tolist(), k, h), rows, 2, n, **options))
        assert abs(a.grad[0, k].item() - 1.7 * slope) <= tolerance * (abs(1.7 * slope) + a.grad.norm().item())
    for j in (0, 2):
        slope = derivative(
            lambda h, j=j: exact(x.tolist(), rows[:j] + [moved(rows[j], 1, h)] + rows[j + 1 :], 2, n, **options)
        )
        assert abs(b.grad[j, 1].item() - 1.7 * slope) <= tolerance * (abs(1.7 * slope) + b.grad[j].norm().item())
    slope = derivative(lambda h: exact(x.tolist(), rows, 2, n + h, **options))
    assert abs(exponent.grad.item() - 1.7 * slope) <= tolerance * abs(1.7 * slope) + 1e-14 * loss.item()


def test_true_losses_down_to_1e_300_are_kept():
    w = torch.eye(3, dtype=torch.float64)
    for power in (20, 100, 300):
        distance = 10.0 ** (-power / 28) * math.sqrt(2)
        x = w[:1] + torch.tensor([[distance, 0, 0]], dtype=torch.float64)
        loss = reference.linear_harmonic_loss(x, w, torch.tensor([0]), n=28.0).item()
        assert abs(loss / float(exact(x[0].tolist(), w.tolist(), 0, 28)) - 1) < 1e-12


def test_direct_and_streamed_distances_agree(monkeypatch):
    x, w = torch.randn(5, 7), torch.randn(9, 7)
    direct = reference.squared_distances(x, w)
    monkeypatch.setattr(reference, "_BROADCAST_LIMIT", 0)
    torch.testing.assert_close(reference.squared_distances(x, w), direct, rtol=1e-13, atol=0)


def test_statistics():
    x, w, target = torch.randn(6, 5), torch.randn(8, 5), torch.tensor([0, 1, 2, -100, 4, 5])
    entropy, predicted, correct, distance, log_prob = reference.statistics(x, w, target, 3.0, 0.0, -100)
    log_p = F.log_softmax(-3 * torch.cdist(x.double(), w.double()).log(), 1)
    kept = target >= 0
    torch.testing.assert_close(entropy[kept].double(), -(log_p.exp() * log_p).sum(1)[kept], rtol=1e-5, atol=0)
    assert torch.equal(predicted[kept], log_p.argmax(1)[kept])
    assert predicted[3] == -100
    assert not correct[3]
    torch.testing.assert_close(distance[kept], (x[kept] - w[target[kept]]).norm(dim=1))
    torch.testing.assert_close(log_prob[kept].double(), log_p[kept, target[kept]], rtol=1e-5, atol=0)


def test_the_papers_ablations():
    """Section 7: softmax over distances, and HarMax over dot products; and ordinary cross-entropy (Eq. 1)."""
    torch.manual_seed(1)
    x, w, target = torch.randn(6, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64), torch.arange(6)
    d, dots = (x.unsqueeze(1) - w).norm(dim=-1), x @ w.t()
    own = torch.arange(6)
    softmax = (-d).exp() / (-d).exp().sum(1, keepdim=True)
    torch.testing.assert_close(reference.distance_softmax_loss(x, w, target), -softmax[own, target].log().mean())
    harmax = dots.abs() ** 3.0 / (dots.abs() ** 3.0).sum(1, keepdim=True)
    inverse = dots.abs() ** -3.0 / (dots.abs() ** -3.0).sum(1, keepdim=True)
    got = reference.dot_product_harmax_loss(x, w, target, 3.0)
    torch.testing.assert_close(got, -inverse[own, target].log().mean())
    assert not torch.isclose(got, -harmax[own, target].log().mean())
    cross_entropy = -(dots.exp() / dots.exp().sum(1, keepdim=True))[own, target].log().mean()
    torch.testing.assert_close(reference.cross_entropy_loss(x, w, target), cross_entropy)


@pytest.mark.parametrize("classes", [1, 6])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(poison, classes):
    """In x[i] it makes that token's loss NaN, in w every token's: never a finite loss."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 4), torch.randn(classes, 4)
    target = torch.arange(5) % classes
    x[1] = w[target[1]]  # an x exactly on its class vector
    for options in ({}, {"uniform_mix": 0.1}, {"label_smoothing": 0.1}):
        bad = x.clone()
        bad[3, 2] = poison
        losses = reference.linear_harmonic_loss(bad, w, target, n=3.0, reduction="none", **options)
        assert losses.isnan().tolist() == [False, False, False, True, False]
        for row in range(classes):
            bad = w.clone()
            bad[row, 2] = poison
            losses = reference.linear_harmonic_loss(x, bad, target, n=3.0, reduction="none", **options)
            assert losses.isnan().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("case", ["ignored", "empty", "shifted"])
@pytest.mark.parametrize("classes", [1, 6])
def test_no_token_at_all_gives_zero_and_zero_gradients(case, reduction, classes):
    x, w, n = torch.full((1, 2, 4), math.nan), torch.randn(classes, 4), torch.tensor(3.0)
    target = torch.full((1, 2), -100)
    if case != "ignored":
        x, target = (x[:0], target[:0]) if case == "empty" else (x[:, :1], torch.zeros(1, 1, dtype=torch.int64))
    leaves = [t.requires_grad_() for t in (x, w, n)]
    loss = ht.linear_harmonic_loss(
        x, w, target, n=n, reduction=reduction, shift=case == "shifted", backend="reference", label_smoothing=0.1
    )
    loss.sum().backward()
    for value in (loss, *(leaf.grad for leaf in leaves)):
        assert torch.equal(value, torch.zeros_like(value))


def test_classes_without_weight_leave_no_gradient():
    x, w, target = torch.randn(5, 4).requires_grad_(), torch.randn(6, 4).requires_grad_(), torch.arange(5)
    loss = reference.linear_harmonic_loss(x, w, target, class_weight=torch.zeros(6))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_ignore_index_beyond_the_classes_may_meet_class_weights(reduction):
    x, w, target, weight = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 9, 5, 9]), torch.rand(6)
    options = {"class_weight": weight, "reduction": reduction}
    got = reference.linear_harmonic_loss(x, w, target, ignore_index=9, **options)
    wanted = reference.linear_harmonic_loss(x, w, torch.where(target == 9, -100, target), **options)
    assert torch.equal(got, wanted)
