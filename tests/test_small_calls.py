"""How many tensor operations a small call is made of: on few tokens they, not the arithmetic, are what it costs.

A count and no time, so that it is the same on every machine.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harmonic_triton as ht
from harmonic_triton.fused import ops

SHARED = ("detach.default", "lift_fresh.default", "alias.default")  # a tensor as an array and back: no arithmetic


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__ not in SHARED:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(loss, tokens, width, classes, monkeypatch, **options):
    """Of the loss and its gradients, the bodies of the operators among them."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(classes, width, generator=generator)
    target = torch.arange(tokens) % classes
    x = (w[target] + 0.5 * torch.randn(tokens, width, generator=generator)).requires_grad_()
    w.requires_grad_()
    monkeypatch.setattr(ops, "_nobody_looks_on", lambda *parts: True)
    with Operations() as mode:
        value = loss(x, w, target, **options)
        gradients = torch.autograd.grad(value, (x, w), torch.tensor(1.0))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    return mode.seen


# 161 and 116 before this file was there, the next to add one may look for one to take away.
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize(("loss", "most"), [(ht.linear_harmonic_loss, 98), (ht.linear_cross_entropy, 80)])
def test_a_small_call_is_no_more_operations_than_it_was(loss, most, tokens, monkeypatch):
    seen = operations(loss, tokens, 128, 500, monkeypatch)
    assert seen.total() <= most, seen


def test_counting_sees_the_bodies_of_the_operators(monkeypatch):
    """The three products, the logarithm of the gaps and the norms are among them."""
    seen = operations(ht.linear_harmonic_loss, 64, 128, 500, monkeypatch, n=8.0)
    assert {"mm.out", "addmm_.default", "log1p.out", "aminmax.default"} <= seen.keys()
