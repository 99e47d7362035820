"""What once went wrong over several processes without a word: gives the right numbers now, or raises everywhere."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from test_parallel import CROSS_ENTROPY, CUTS, HARMONIC, D, V, call, inputs

import harmonic_triton as ht


def check_ignored_class(rank, world, ignored):
    """An ignore_index that is a class, of one process and as a number within the rows of each."""
    x, w, target, _ = inputs(4, 1.0, CUTS["even"][-1])
    x[0, 3], target[target == -100] = x[1, 1], ignored
    own = slice(18 * rank, 18 * rank + 18)
    for function, options in ((ht.linear_harmonic_loss, HARMONIC[1]), (ht.linear_cross_entropy, CROSS_ENTROPY[1])):
        options = {**options, "ignore_index": ignored}
        one = call(function, options, x.double(), w.double(), target, None, w[:, 0], None)
        got = call(function, options, x.double(), w[own].double(), target, None, w[own, 0], dist.group.WORLD)
        one["dW"] = one["dW"][own]
        for name in ("loss", "dX", "dW", "statistic 1", "statistic 4"):
            assert (got[name] - one[name]).double().norm() <= 1e-9 * one[name].double().norm(), (name, function)


@pytest.mark.parametrize("ignored", [5, 20])
def test_an_ignored_class_is_ignored_and_no_other(ignored):
    ranks.all_well(2, check_ignored_class, ignored)


def check_other_batches(rank, world):
    """FSDP's shards of the weight, outside of its module's forward: every process has tokens of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    head = ht.HarmonicHead(D, V, n=6.0, std=1.0)
    fully_shard(head, mesh=init_device_mesh("cpu", (world,)))
    for dtype in (torch.float32, torch.bfloat16):
        head.to(dtype)
        x = torch.randn(8, D, generator=torch.Generator().manual_seed(rank)).to(dtype)
        x[0] = torch.nan
        for function, more in (
            (ht.linear_harmonic_loss, (torch.arange(8),)),
            (ht.linear_cross_entropy, (torch.arange(8),)),
            (ht.harmonic_logits, ()),
            (ht.harmonic_topk, (2,)),
        ):
            with pytest.raises(ValueError, match="0 and 1 call with different input .*Call the module"):
                function(x, head.weight, *more)
    one = torch.randn(8, D, generator=torch.Generator().manual_seed(9)).bfloat16()
    near = one * (1 + 2.0**-7 * rank)  # what two orders of a sum may differ by is the same input
    assert ht.harmonic_topk(near, head.weight, 1)[0].isfinite().all()
    options = {"class_weight": torch.ones(V)}
    options["class_weight"][rank] = 2.0
    with pytest.raises(ValueError, match="different class_weight"):
        ht.linear_cross_entropy(one, head.weight, torch.arange(8), **options)
    if rank == 0:  # another function altogether: both say so, none waits
        with pytest.raises(ValueError, match="different function; process 0 has 'harmonic_logits'"):
            ht.harmonic_logits(one, head.weight)
    else:
        with pytest.raises(ValueError, match="different function; process 1 has 'linear_cross_entropy'"):
            ht.linear_cross_entropy(one, head.weight, torch.arange(8))
    rows = head.weight.to_local().detach()
    with pytest.raises(ValueError, match="different requires_grad"):
        ht.harmonic_logits(one.requires_grad_(rank == 0), rows, process_group=dist.group.WORLD)


def test_processes_with_other_batches():
    ranks.all_well(2, check_other_batches)


def check_derivatives(rank, world):
    x, w, target, _ = inputs()
    own, group = w[18 * rank : 18 * rank + 18], dist.group.WORLD
    x, target = x.flatten(0, 1)[9:], target.flatten()[9:].clamp_max(35)
    for leaf in ("x", "n"):
        a, n = x.clone().requires_grad_(), torch.tensor(5.0, requires_grad=True)
        loss = ht.linear_harmonic_loss(a, own, target, n=n, process_group=group)
        (slope,) = torch.autograd.grad(loss, a if leaf == "x" else n, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            (loss + slope.square().sum()).backward()
    for function in (
        lambda a: ht.linear_harmonic_loss(a, own, target, process_group=group),
        lambda a: ht.harmonic_logits(a, own, process_group=group).sum(),
        lambda a: ht.harmonic_topk(a, own, 1, process_group=group)[0].sum(),
    ):
        with pytest.raises(NotImplementedError, match="process_group does not go along"):
            torch.func.grad(function)(x)


def test_derivatives_that_there_are_not():
    ranks.all_well(2, check_derivatives)


def check_unsound_token(rank, world, bad):
    """NaN in one token: its loss is NaN everywhere and no hit; whoever drops it has the gradients of the others."""
    x, w, target, _ = inputs()
    x, target = x.flatten(0, 1)[9:], target.flatten()[9:].clamp_max(35)
    x[4, 1], own = bad, slice(18 * rank, 18 * rank + 18)
    kept = torch.arange(len(x)) != 4
    for function, n in ((ht.linear_harmonic_loss, {"n": 6.0}), (ht.linear_cross_entropy, {})):
        found = []
        for rows, group in ((w[:36], None), (w[own], dist.group.WORLD)):
            a, b = x.clone().requires_grad_(), rows.clone().requires_grad_()
            options = {"reduction": "none", "return_stats": True, "process_group": group, **n}
            loss, statistics = function(a, b, target, **options)
            assert loss.isnan().tolist() == (~kept).tolist() and not statistics.correct[4]
            if not n:
                assert statistics.target_logit[4].isnan()
            loss[kept].sum().backward()
            found.append((a.grad, b.grad if group else b.grad[own]))
        for got, wanted in zip(*reversed(found), strict=True):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm(), function


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite(bad):
    ranks.all_well(2, check_unsound_token, bad)
