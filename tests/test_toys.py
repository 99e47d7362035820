"""The two toy cases of the harmonic loss paper (section 3, Figure 1), trained to their published end.

The paper trains one unembedding layer on fixed points in the plane with Adam; exponent, learning rate and number of
steps are not given. We take Adam at a constant 0.01 for 1500 steps for both losses, so that a norm that stops growing
does so by itself; and, for the default exponent sqrt(2), whose gradient ~ d^0.41 hardly shrinks on the way in, a rate
that decays by 0.5 % a step (at a constant one Adam goes around the points at a distance of the order of its step).

Published: toy 1, harmonic weights on (1, 1) and (-1, -1) with a norm of 2, cross-entropy's norm without end. Toy 2,
harmonic weights on the five points and the loss at machine precision; cross-entropy cannot pick out the point in the
middle, which has the score 0 for every class whatever the weights: its loss stays at log 5 there, log(5)/5 on average.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from harmonic_triton import HarmonicHead

POINTS = {
    "two points": torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
    "five points": torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]),
}
STEPS = 1500


class Trained(NamedTuple):
    weight: torch.Tensor
    losses: list[float]
    norms: list[float]


@functools.cache
def train(toy: str, loss: str, n: float | None = None, decay: float = 1.0) -> Trained:
    """One layer, one class a point."""
    torch.manual_seed(0)
    x = POINTS[toy]
    target = torch.arange(len(x))
    harmonic = loss == "harmonic"
    layer = HarmonicHead(2, len(x), n=n, std=0.5) if harmonic else torch.nn.Linear(2, len(x), bias=False)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01 if decay == 1.0 else 0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, decay)
    losses, norms = [], []
    for _ in range(STEPS):
        optimiser.zero_grad()
        value = layer(x, target=target) if harmonic else F.cross_entropy(layer(x), target)
        value.backward()
        optimiser.step()
        schedule.step()
        losses.append(value.item())
        norms.append(layer.weight.detach().norm().item())
    return Trained(layer.weight.detach(), losses, norms)


def growth(run: Trained) -> float:
    """Relative growth of the weights' norm over the last tenth of the training."""
    return run.norms[-1] / run.norms[-STEPS // 10] - 1


@pytest.mark.parametrize(("n", "decay"), [(2.0, 1.0), (None, 0.995)])
@pytest.mark.parametrize("toy", POINTS)
def test_harmonic_weights_end_on_the_points(toy, n, decay):
    """The weights are the points, the loss is at machine precision, the norm has stopped."""
    run = train(toy, "harmonic", n, decay)
    assert run.losses[0] > 0.1
    assert run.losses[-1] <= 1e-6
    assert (run.weight - POINTS[toy]).norm(dim=1).max().item() <= 1e-3
    assert run.norms[-1] == pytest.approx(2.0, rel=1e-3)
    assert abs(growth(run)) < 1e-5


@pytest.mark.parametrize("toy", POINTS)
def test_cross_entropy_grows_without_end(toy):
    """Its norm still grows at the end of the same training: as log(steps) or faster."""
    run = train(toy, "cross-entropy")
    assert growth(run) > 0.01
    assert run.norms[-1] > 1.5 * train(toy, "cross-entropy").norms[STEPS // 10]


def test_harmonic_loss_falls_faster():
    """Toy 1: the harmonic loss passes 1e-3 in less than half of the steps of cross-entropy."""
    first = {loss: next(step for step, value in enumerate(train("two points", loss, n).losses) if value < 1e-3)
             for loss, n in (("harmonic", 2.0), ("cross-entropy", None))}  # fmt: skip
    assert 2 * first["harmonic"] < first["cross-entropy"]


def test_cross_entropy_cannot_pick_out_the_middle():
    """Toy 2: all five points are right under the harmonic loss; cross-entropy stops at log(5)/5 = 0.32."""
    run, harmonic = train("five points", "cross-entropy"), train("five points", "harmonic", 2.0)
    x, stuck = POINTS["five points"], math.log(5) / 5
    assert stuck - 1e-6 < min(run.losses)
    assert run.losses[-1] == pytest.approx(stuck, abs=0.05)
    assert torch.cdist(x, harmonic.weight).argmin(1).tolist() == [0, 1, 2, 3, 4]
    assert F.cross_entropy(x[4:] @ run.weight.t(), torch.tensor([4])).item() == pytest.approx(math.log(5), rel=1e-6)
