"""One rule says whether a draw counts, and all who take draws follow it."""

import math

import pytest
import torch

import harmonic_triton as ht
from harmonic_triton.losskernel.collector import Collector
from harmonic_triton.losskernel.draws import LARGEST, is_usable
from harmonic_triton.losskernel.sampling.sampler import Draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_rule_is_of_single_losses(dtype):
    rows = torch.ones(7, 5, dtype=dtype)
    rows[1, 2], rows[2, 0], rows[3, 4], rows[4, 1], rows[5, 3] = math.nan, math.inf, -math.inf, LARGEST, -LARGEST
    rows[6] = LARGEST / 2  # whose norm is more than 2^52
    assert is_usable(rows).tolist() == [True, False, False, False, False, False, True]
    assert is_usable(rows[:0]).shape == (0,)


def test_a_million_large_losses_count_for_collector_and_accumulators_alike():
    """Each is 2^43 and their norm 2^53: by the norm the sums would drop what the record counts."""
    losses = torch.full((2, 10**6), 2.0**43)
    sums = ht.StreamingCovariance(10**6, buffer_size=4)  # the triangle of a million samples is not made
    sums.update(losses)
    traces = ht.LossTraces(10**6)
    traces.update(losses)
    assert (sums.count, sums.dead) == (traces.count, traces.dead) == (2, {})
    collector = Collector(1, 2, torch.zeros(10**6), 10**6, "traces", "cpu", "auto", None)
    collector.update(Draws(losses, torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.zeros(2)))
    assert collector.accumulator.count == 2 and collector.record.finite.all() and not collector.record.dead


@pytest.mark.parametrize("keep", ["covariance", "traces"])
@pytest.mark.parametrize(("value", "counts"), [(LARGEST / 2, True), (LARGEST, False), (math.nan, False)])
def test_the_record_and_the_sums_agree(keep, value, counts):
    losses = torch.rand(2, 6, 9, generator=torch.Generator().manual_seed(0))
    losses[0, 3] = value
    kernel = ht.LossKernel.from_losses(losses, keep=keep)
    assert kernel.num_draws == 11 + counts == int(kernel.record.finite.sum())
    assert kernel.record.skipped == ({} if counts else {0: 1})
    assert kernel.variance.isfinite().all()
