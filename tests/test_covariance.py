"""Streaming and one-shot covariance against float64 NumPy, on the torch and the Triton backend."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import tempfile
import warnings
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from harmonic_triton.losskernel.covariance import triangle
from harmonic_triton.losskernel.covariance.differentiable import loss_covariance
from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance
from harmonic_triton.losskernel.covariance.sums import CovarianceResult
from harmonic_triton.losskernel.covariance.triangle import PACKED, Triangle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
LIMIT = 5e-6  # of a correlation's error: a thousandth of the Monte-Carlo noise of 40,000 draws
SPREADS = (0.05, 0.005, 0.0005)
CHAINS = 30


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(params=["lapack", "panels"])
def library(request, monkeypatch):
    """The CPU's rank-k update with SciPy and as it is without."""
    if request.param == "panels":
        monkeypatch.setattr(triangle, "packed_update", lambda: (None, "for this test"))
    else:
        pytest.importorskip("scipy")


def ar1(draws=3000, samples=41, spread=0.05, mean=2.0, seed=0, dtype=torch.float32):
    """(CHAINS, draws/CHAINS, samples): AR(1) factors (phi = 0.9) shared by all samples, and noise of their own."""
    generator = np.random.default_rng(seed)
    length, factors, phi = draws // CHAINS, 8, 0.9
    z = generator.standard_normal((length, CHAINS, factors))
    for t in range(1, length):
        z[t] = phi * z[t - 1] + math.sqrt(1 - phi**2) * z[t]
    x = z @ (0.5 * generator.standard_normal((factors, samples))) + generator.standard_normal((length, CHAINS, samples))
    return torch.from_numpy((mean + spread / math.sqrt(3) * x).transpose(1, 0, 2)).to(dtype).contiguous()


def accumulate(chains, backend="torch", **options):
    accumulator = StreamingCovariance(chains.shape[-1], backend=backend, device=DEVICE, **options)
    for chain, losses in enumerate(chains):
        accumulator.update(losses.to(DEVICE), chain)
    return accumulator


def truth(chains, correlation=True):
    rows = chains.reshape(-1, chains.shape[-1]).double().cpu().numpy().T
    return torch.from_numpy(np.corrcoef(rows) if correlation else np.cov(rows))


def error(got, wanted):
    return (got.double().cpu() - wanted.cpu()).abs().max().item()


# --- accuracy ------------------------------------------------------------------------------------------------------------


def check_against_numpy(chains, backend, **options):
    accumulator = accumulate(chains, backend, **options)
    rho, result = accumulator.correlation(), accumulator.compute()
    wanted = truth(chains)
    assert error(rho, wanted) <= LIMIT
    assert error(result.correlation(), wanted) <= LIMIT
    assert torch.equal(rho, rho.T) and torch.equal(result.covariance, result.covariance.T)
    eigenvalues = torch.linalg.eigvalsh(result.covariance.double())
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]
    # relative to sd_i sd_j, as rho is
    sd = truth(chains, correlation=False).diagonal().sqrt()
    assert error(result.covariance.cpu() / sd / sd[:, None], wanted) <= LIMIT
    assert result.count == chains.shape[0] * chains.shape[1]
    torch.testing.assert_close(result.mean.cpu(), chains.double().mean((0, 1)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", SPREADS)
def test_correlations_of_autocorrelated_losses(spread, dtype):
    """An odd and an even number of samples; float64 losses meet the reference before they are rounded."""
    check_against_numpy(ar1(spread=spread, samples=41 if dtype == torch.float32 else 130, dtype=dtype), "torch")


@pytest.mark.triton
@pytest.mark.parametrize(("spread", "dtype"), [(0.05, torch.float32), (0.0005, torch.float32), (0.0005, torch.float64)])
def test_correlations_of_autocorrelated_losses_on_triton(spread, dtype):
    check_against_numpy(ar1(draws=1500, spread=spread, samples=41, dtype=dtype), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
def test_correlations_of_30000_draws(spread, backend):
    """The issue's own sizes; minutes through the interpreter."""
    check_against_numpy(ar1(draws=30000, samples=500, spread=spread), backend)


@pytest.mark.parametrize("samples", [1, 2, 3, 127, 128, 129, 1100])
def test_every_entry_is_where_it_belongs(samples, library):
    """Around the fold, a tile and a panel: against NumPy in float64, to the rounding of fp32 sums of 40 draws."""
    chains = ar1(draws=60, samples=samples, spread=0.5)
    got = accumulate(chains, buffer_size=32).compute().covariance
    wanted = truth(chains, correlation=False).reshape(samples, samples)
    assert error(got, wanted) <= 1e-5 * wanted.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("samples", [1, 127, 129, 300])
def test_every_entry_is_where_it_belongs_in_tiles(samples):
    chains = ar1(draws=60, samples=samples, spread=0.5)
    got = accumulate(chains, "triton", buffer_size=32).compute().covariance
    wanted = truth(chains, correlation=False).reshape(samples, samples)
    assert error(got, wanted) <= 1e-5 * wanted.abs().max()


@pytest.mark.triton
@pytest.mark.parametrize(("precision", "limit"), [("split", 5e-7), ("fast", 1e-5), ("ieee", 5e-7)])
def test_precisions_of_the_triton_products(precision, limit):
    """One update against fp64, relative to |x_i| |x_j|: 24, 16 and 24 bits, and fp32 sums of 64 to 6 * 64 terms."""
    from harmonic_triton.losskernel.covariance.rank_k_triton import GAP, rank_k_

    generator = torch.Generator().manual_seed(0)
    draws = (2.0 + torch.randn(64, 40, generator=generator)).to(DEVICE)
    shift = torch.full((40,), 2.0, device=DEVICE)
    triangle = Triangle(40, gap=GAP, dtype=torch.float32, device=draws.device)
    rank_k_(triangle, draws, shift, precision)
    got = torch.empty(40, 40, device=DEVICE)
    triangle.unfold(got, draws[:0], draws[:0], 1.0, None)
    centred = (draws.double() - 2.0).cpu()
    norms = centred.norm(dim=0)
    found = error(got.cpu().double() / norms / norms[:, None], centred.T @ centred / norms / norms[:, None])
    assert found <= limit
    assert (found > 1e-6) == (precision == "fast")  # it is not the same thing


def test_float64_accumulator():
    chains = ar1(spread=1e-4, dtype=torch.float64)
    got = accumulate(chains, dtype=torch.float64).correlation()
    assert got.dtype == torch.float64
    assert error(got, truth(chains)) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_widened(dtype, backend):
    chains = ar1(draws=300, dtype=dtype)
    assert error(accumulate(chains, backend).correlation(), truth(chains)) <= LIMIT


def test_within_chain_estimate(backend):
    """Chains about means of their own: S_w = S - sum n_c mean_c mean_cᵀ over sum (n_c - 1), here by centring each."""
    chains = ar1(draws=600) + 0.1 * torch.arange(CHAINS, device="cpu")[:, None, None].sin()
    accumulator = accumulate(chains, backend, buffer_size=64)
    centred = (chains.double() - chains.double().mean(1, keepdim=True)).reshape(-1, chains.shape[-1])
    wanted = centred.T @ centred / (len(centred) - CHAINS)
    result = accumulator.compute(within_chain=True)
    scale = wanted.diagonal().max()
    assert error(result.covariance, wanted) <= LIMIT * scale
    assert error(accumulator.variance(within_chain=True), wanted.diagonal()) <= LIMIT * scale
    sd = wanted.diagonal().sqrt()
    assert error(accumulator.correlation(within_chain=True), wanted / sd / sd[:, None]) <= 2 * LIMIT
    assert (result.covariance.cpu() - accumulator.compute().covariance.cpu()).abs().max() > 0.1 * scale


# --- draws as they come --------------------------------------------------------------------------------------------------


def test_one_draw_at_a_time_or_many_with_chains_in_any_form(backend):
    """(m,) and (k, m), an int, a sequence or a tensor: the same bits, for the draws come in the same order."""
    chains = ar1(draws=300)
    want = accumulate(chains, backend, buffer_size=64)
    rows, owners = chains.reshape(-1, 41).to(DEVICE), [c for c in range(CHAINS) for _ in range(10)]
    one = StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE)
    for losses, chain in zip(rows, owners, strict=True):
        one.update(losses, chain)
    together = StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE)
    together.update(rows[:155], owners[:155])
    together.update(rows[155:], torch.tensor(owners[155:]))
    for other in (one, together):
        assert torch.equal(other.correlation(), want.correlation())
        assert other.chain_counts == dict.fromkeys(range(CHAINS), 10)
        for chain in range(CHAINS):
            wanted = chains[chain].double().mean(0)
            torch.testing.assert_close(other.chain_means[chain].cpu(), wanted, rtol=1e-13, atol=0)


def test_reading_again_gives_the_same_and_later_results_differ_by_rounding(backend):
    """compute twice: the same bits; a run that is read all the time ends where one that is not does, to 1e-6."""
    chains = ar1(draws=600)
    want, read = (StreamingCovariance(41, backend=backend, buffer_size=100, device=DEVICE) for _ in range(2))
    for losses in chains.to(DEVICE):
        want.update(losses), read.update(losses)
        first, rho, variance = read.compute(), read.correlation(), read.variance()
        again = read.compute()
        assert torch.equal(first.covariance, again.covariance) and torch.equal(first.mean, again.mean)
        assert torch.equal(rho, read.correlation()) and torch.equal(variance, read.variance())
        torch.testing.assert_close(variance.to(first.covariance.dtype), first.covariance.diagonal())
    assert torch.equal(want.mean(), read.mean())
    assert (want.correlation() - read.correlation()).abs().max() <= 1e-6


def test_means_counts_and_states_leave_the_buffer_alone(backend):
    """Read after every update, bitwise without effect on what follows."""
    chains = ar1(draws=300)
    want, read = (StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE) for _ in range(2))
    for losses in chains.to(DEVICE):
        want.update(losses), read.update(losses)
        read.mean(), read.chain_means, read.chain_counts, read.count, read.dead, read.reference, read.state_dict()
    assert torch.equal(want.correlation(), read.correlation())


def test_out_is_used():
    accumulator = accumulate(ar1(draws=300))
    out = torch.full((41, 41), math.nan, device=DEVICE)
    assert accumulator.compute(out=out).covariance is out
    assert torch.equal(out, accumulator.compute().covariance)
    assert accumulator.correlation(out=out) is out
    assert torch.equal(out, accumulator.correlation())
    with pytest.raises(ValueError, match="out must be"):
        accumulator.compute(out=out[:40])


def test_reset_forgets_everything_but_a_given_reference():
    chains = ar1(draws=300)
    accumulator = accumulate(chains + 1.0, reference=torch.full((41,), 2.0, device=DEVICE), buffer_size=64)
    accumulator.update(torch.full((41,), math.nan, device=DEVICE))
    accumulator.reset()
    assert (accumulator.count, accumulator.dead, accumulator.chain_counts) == (0, {}, {})
    for losses in chains.to(DEVICE):
        accumulator.update(losses)
    assert torch.equal(accumulator.reference.cpu(), torch.full((41,), 2.0))
    assert error(accumulator.correlation(), truth(chains)) <= LIMIT


# --- dead draws, constant losses, drift ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e17])
def test_dead_draws_are_quarantined_by_chain(value, backend):
    """One bad loss condemns its draw; the others give the bits they give alone."""
    chains = ar1(draws=300).to(DEVICE)
    want = accumulate(chains, backend, buffer_size=64)
    got = StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE)
    for chain, losses in enumerate(chains):
        rows = torch.cat([losses[:3], losses[:2], losses[3:]])
        rows[3, 7] = rows[4, 40] = value
        got.update(rows if chain in (4, 9) else losses, chain)
    got.update(torch.full((41,), value, device=DEVICE), chain=77)
    assert got.dead == {4: 2, 9: 2, 77: 1}
    assert got.chain_counts == want.chain_counts
    assert torch.equal(got.correlation(), want.correlation())
    assert torch.equal(got.mean(), want.mean())


def test_only_dead_draws():
    accumulator = StreamingCovariance(3)
    accumulator.update(torch.full((4, 3), math.nan), chain=5)
    assert accumulator.count == 0 and accumulator.dead == {5: 4}
    with pytest.raises(ValueError, match="there are 0 and 4 dead ones"):
        accumulator.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("accumulate_in", [torch.float32, torch.float64])
def test_constant_losses_correlate_with_nothing(dtype, accumulate_in):
    """0.1 is no binary number, so that float64 means of it are off by an ulp; the diagonal is 0 too, and no warning."""
    chains = ar1(draws=600, dtype=dtype)
    chains[..., [0, 13, 40]] = torch.tensor([0.1, 0.0, 3.3], dtype=dtype)
    accumulator = accumulate(chains, dtype=accumulate_in, buffer_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rho, result = accumulator.correlation(), accumulator.compute()
    varies = torch.ones(41, dtype=torch.bool)
    varies[[0, 13, 40]] = False
    for got in (rho, result.correlation()):
        assert not got[~varies].any() and not got[:, ~varies].any()
        assert (got.diagonal()[varies] == 1).all()
    assert error(rho[varies][:, varies], truth(chains[..., varies])) <= LIMIT
    assert not result.covariance.diagonal()[~varies].any()


@pytest.mark.triton
def test_constant_losses_on_triton():
    chains = ar1(draws=90)
    chains[..., 5] = 0.1
    rho = accumulate(chains, "triton", buffer_size=64).correlation()
    assert not rho[5].any() and not rho[:, 5].any()


def test_correlations_stay_within_one():
    """Copies of a sample: rounding must not push their correlation beyond 1, where sqrt(2 (1 - rho)) is not a number."""
    chains = ar1(draws=600, samples=20).repeat_interleave(3, dim=-1) * torch.tensor([1.0, 0.3, -7.0]).repeat(20)
    accumulator = accumulate(chains, buffer_size=64)
    for rho in (accumulator.correlation(), accumulator.compute().correlation()):
        assert rho.abs().max() <= 1.0


def test_a_mean_far_from_the_reference_is_reported():
    """Four spreads and no less."""
    chains = ar1(draws=3000)
    chains = chains / chains.std((0, 1)) * 0.05
    for off, warned in ((3.9, False), (4.1, True)):
        reference = chains.mean((0, 1)) + off * 0.05 * torch.eye(41)[7]
        accumulator = accumulate(chains, reference=reference.to(DEVICE))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator.correlation()
        assert all("1 of 41 samples" in str(w.message) and "sample 7: 4.1" in str(w.message) for w in caught)
        assert bool(caught) == warned


def test_variances_drowned_by_a_far_reference_are_none():
    """2000 spreads away fp32 sums hold nothing of the variance: 0 and a warning, not a correlation made of rounding."""
    chains = ar1(draws=600)
    reference = torch.full((41,), 2.0, device=DEVICE)
    reference[3] = 102.0
    accumulator = accumulate(chains, reference=reference, buffer_size=64)
    with pytest.warns(RuntimeWarning, match="sample 3: inf"):
        rho = accumulator.correlation()
    assert not rho[3].any()
    others = torch.arange(41) != 3
    assert error(rho[others][:, others], truth(chains[..., others])) <= LIMIT


# --- merging -------------------------------------------------------------------------------------------------------------


def merged(parts, grouping):
    """Merge copies of accumulators in the order and grouping of nested tuples of indices."""
    if isinstance(grouping, int):
        return copy.deepcopy(parts[grouping])
    first, *rest = (merged(parts, one) for one in grouping)
    for other in rest:
        first.merge(other)
    return first


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("spread", SPREADS)
def test_merging_in_any_order_and_grouping(spread, given, backend):
    """Six accumulators, one with no draws and one with few: within 1e-6, whatever their references."""
    chains = ar1(draws=1200 if backend == "torch" else 300, spread=spread)
    reference = chains[0].mean(0).to(DEVICE) if given else None
    options = {"buffer_size": 48, "reference": reference}
    parts = [
        accumulate(chains[s], backend, **options) for s in (slice(0, 9), slice(9, 12), slice(12, 13), slice(13, 30))
    ]
    parts += [
        StreamingCovariance(41, backend=backend, device=DEVICE, **options),
        accumulate(chains[:0], backend, **options),
    ]
    parts[4].update(torch.full((41,), math.nan, device=DEVICE), chain=6)
    groupings = [
        (0, 1, 2, 3, 4, 5),
        (5, 4, 3, 2, 1, 0),
        ((0, 1), (2, 3), (4, 5)),
        (2, (3, (0, (4, 1)), 5)),
        ((4, 2), 5, 0, (1, 3)),
    ]
    before = [part.state_dict() for part in parts]
    wanted = truth(chains)
    for grouping in groupings:
        whole = merged(parts, grouping)
        assert error(whole.correlation(), wanted) <= 1e-6
        assert whole.count == chains.shape[0] * chains.shape[1]
        assert whole.dead == {6: 1}
        torch.testing.assert_close(whole.mean().cpu(), chains.double().mean((0, 1)), rtol=1e-13, atol=0)
    for part, state in zip(parts, before, strict=True):
        assert same(part.state_dict(), state)


def test_merging_leaves_the_other_alone_and_counts_chains_once():
    chains = ar1(draws=600)
    one, other = accumulate(chains, buffer_size=64), accumulate(chains[:4] + 0.01, buffer_size=64)
    state = other.state_dict()
    one.merge(other)
    assert same(other.state_dict(), state)
    assert one.chain_counts == {chain: 40 if chain < 4 else 20 for chain in range(CHAINS)}
    both = torch.cat([chains, chains[:4] + 0.01])
    assert error(one.compute().covariance, truth(both, correlation=False)) <= LIMIT * 0.05**2 * 4
    one.update(chains[0].to(DEVICE))
    assert same(other.state_dict(), state)


def test_merging_what_does_not_fit():
    one = StreamingCovariance(3)
    with pytest.raises(ValueError, match="only accumulators over the same samples merge"):
        one.merge(StreamingCovariance(4))
    with pytest.raises(ValueError, match="only accumulators over the same samples merge"):
        one.merge(StreamingCovariance(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="itself"):
        one.merge(one)
    with pytest.raises(TypeError, match="StreamingCovariance"):
        one.merge(one.state_dict())


@pytest.mark.triton
def test_merging_across_backends():
    chains = ar1(draws=300)
    for here, there in itertools.permutations(["torch", "triton"]):
        one = accumulate(chains[:14], here, buffer_size=64)
        one.merge(accumulate(chains[14:], there, buffer_size=64))
        assert error(one.correlation(), truth(chains)) <= LIMIT


# --- processes -----------------------------------------------------------------------------------------------------------


def rank_of_two(rank, folder, chains):
    """Process 0 gets the first 10 chains, 1 the others, with references of their own; then one has none at all."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case, share in {"both": chains[10 * rank :][: 10 + 10 * rank], "second": chains[: 30 * rank]}.items():
        accumulator = StreamingCovariance(chains.shape[-1], buffer_size=64)
        for chain, losses in enumerate(share):
            accumulator.update(losses, 100 * rank + chain)
        accumulator.update(torch.full((chains.shape[-1],), math.nan), chain=7)
        accumulator.all_reduce()
        torch.save(accumulator.state_dict(), Path(folder) / f"{case}{rank}.pt")
    wrong = StreamingCovariance(3 + rank)
    try:
        wrong.all_reduce()
    except ValueError as refusal:
        (Path(folder) / f"refusal{rank}").write_text(str(refusal))
    empty = StreamingCovariance(3)
    empty.all_reduce()
    assert empty.count == 0
    torch.distributed.destroy_process_group()


def test_all_reduce_between_processes():
    chains = ar1(draws=900, spread=0.005)
    chains[10:] += 0.002  # the references differ
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_of_two, (folder, chains), nprocs=2, start_method=fresh.CONTEXT.get_start_method())
        states = {name: torch.load(Path(folder) / f"{name}.pt") for name in ("both0", "both1", "second0", "second1")}
        refusals = [(Path(folder) / f"refusal{rank}").read_text() for rank in range(2)]
    assert all("one num_samples, dtype, backend" in refusal for refusal in refusals)
    for case in ("both", "second"):
        assert same(states[f"{case}0"], states[f"{case}1"])
        accumulator = StreamingCovariance(41, buffer_size=64)
        accumulator.load_state_dict(states[f"{case}0"])
        assert error(accumulator.correlation(), truth(chains)) <= LIMIT
        assert accumulator.count == 900 and accumulator.dead == {7: 2}
        torch.testing.assert_close(accumulator.mean(), chains.double().mean((0, 1)), rtol=1e-13, atol=0)
    accumulator.load_state_dict(states["both0"])
    assert accumulator.chain_counts == dict.fromkeys([*range(10), *range(100, 120)], 30)


# --- state ---------------------------------------------------------------------------------------------------------------


def same(one, other):
    """Bitwise, through nested dictionaries."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [3, 64, 100])
def test_a_resumed_accumulator_goes_on_bitwise(cut, dtype, backend, tmp_path):
    """Stopped before the first full buffer, at one and inside the second; what happens after the cut stays out of it."""
    rows = ar1(draws=300, dtype=dtype).reshape(-1, 41).to(DEVICE)
    whole = StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE)
    whole.update(rows[:cut], chain=1)
    whole.update(rows[0] / 0, chain=2)
    state = whole.state_dict()
    torch.save(state, tmp_path / "state.pt")
    whole.update(rows[cut:], chain=1)
    ended, rho = whole.state_dict(), whole.correlation()
    resumed = StreamingCovariance(41, backend=backend, buffer_size=64, device=DEVICE)
    resumed.update(rows[:70] + 1)
    for source in (torch.load(tmp_path / "state.pt"), state):
        resumed.load_state_dict(source)
        assert same(resumed.state_dict(), source)
        resumed.update(rows[cut:], chain=1)
        assert same(resumed.state_dict(), ended)
        assert torch.equal(resumed.correlation(), rho)
        assert (resumed.dead, resumed.chain_counts) == (whole.dead, whole.chain_counts)
    assert same(torch.load(tmp_path / "state.pt"), state)  # what was loaded is left as it was


@pytest.mark.triton
def test_a_state_moves_between_backends():
    chains = ar1(draws=300)
    for here, there in itertools.permutations(["torch", "triton"]):
        moved = StreamingCovariance(41, backend=there, buffer_size=64, device=DEVICE)
        moved.load_state_dict(accumulate(chains[:20], here, buffer_size=64).state_dict())
        for chain in range(20, CHAINS):
            moved.update(chains[chain].to(DEVICE), chain)
        assert error(moved.correlation(), truth(chains)) <= LIMIT


def test_states_of_other_accumulators_are_refused():
    state = StreamingCovariance(3).state_dict()
    for other, what in (
        (StreamingCovariance(4), "num_samples 3"),
        (StreamingCovariance(3, dtype=torch.float64), "dtype torch.float32"),
        (StreamingCovariance(3, buffer_size=8), "buffer_size 512"),
    ):
        with pytest.raises(ValueError, match=what):
            other.load_state_dict(state)


# --- bad arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "chain", "kind", "message"),
    [
        ([1.0, 2.0, 3.0], None, TypeError, "losses must be a torch.Tensor"),
        (torch.zeros(3, dtype=torch.int64), None, TypeError, "losses must be floating.*int64"),
        (torch.zeros(2, 4), None, ValueError, r"\(k, 3\).*\(2, 4\)"),
        (torch.zeros(1, 2, 3), None, ValueError, r"\(1, 2, 3\)"),
        (torch.zeros(3, device="meta"), None, ValueError, "meta"),
        (torch.zeros(2, 3), [0], ValueError, "1 chains for 2 draws"),
        (torch.zeros(2, 3), [0, 0.5], TypeError, "0.5"),
        (torch.zeros(2, 3), "ab", TypeError, "'a'"),
        (torch.zeros(2, 3), True, TypeError, "True"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "integers"),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), TypeError, "integers"),
    ],
)
def test_bad_draws(losses, chain, kind, message):
    accumulator = StreamingCovariance(3)
    with pytest.raises(kind, match=message):
        accumulator.update(losses, chain)
    assert accumulator.count == 0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_samples": 2.0}, TypeError, "num_samples"),
        ({"buffer_size": 0}, ValueError, "buffer_size"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype"),
        ({"precision": "tf32"}, ValueError, "precision"),
        ({"backend": "reference"}, ValueError, "backend is 'reference'"),
        ({"backend": "triton", "dtype": torch.float64}, ValueError, "float64 is computed by the torch backend"),
        ({"reference": torch.zeros(4)}, ValueError, r"reference must be.*\(3,\)"),
        ({"reference": torch.full((3,), math.nan)}, ValueError, "reference must be finite"),
    ],
)
def test_bad_accumulators(options, kind, message):
    with pytest.raises(kind, match=message):
        StreamingCovariance(**{"num_samples": 3, "device": "cpu", **options})


def test_too_few_draws():
    accumulator = StreamingCovariance(3)
    for draws in range(2):
        for read in (accumulator.compute, accumulator.correlation, accumulator.variance):
            with pytest.raises(ValueError, match=f"at least 2 draws are needed, there are {draws}"):
                read()
        accumulator.update(torch.rand(3), chain=draws)
    with pytest.raises(ValueError, match="a chain with two draws"):
        accumulator.variance(within_chain=True)
    assert isinstance(accumulator.compute(), CovarianceResult)
    with pytest.raises(ValueError, match="at least 1 draws"):
        StreamingCovariance(3).mean()


# --- the one-shot form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", SPREADS)
def test_loss_covariance_is_that_of_numpy(spread, backend):
    losses = ar1(draws=1200, spread=spread).reshape(-1, 41)
    covariance, rho = (loss_covariance(losses.to(DEVICE), correlation=c, backend=backend) for c in (False, True))
    sd = truth(losses, correlation=False).diagonal().sqrt()
    assert error(covariance.cpu() / sd / sd[:, None], truth(losses)) <= LIMIT
    assert error(rho, truth(losses)) <= LIMIT
    assert torch.equal(covariance, covariance.T)
    assert (rho.diagonal() == 1).all()


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("correlation", [False, True])
def test_gradients_are_exact(correlation, backend):
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()

    def call(x):
        return loss_covariance(x, correlation=correlation, backend=backend)

    assert torch.autograd.gradcheck(call, losses)
    assert torch.autograd.gradgradcheck(call, losses)


@pytest.mark.parametrize("correlation", [False, True])
def test_fp32_gradients_of_concentrated_losses(correlation, backend):
    """Mean 2, spread 0.0005, a gradient that is not symmetric: against float64 from the same losses."""
    losses = ar1(draws=600, spread=0.0005).reshape(-1, 41).to(DEVICE).requires_grad_()
    upstream = torch.randn(41, 41, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(
        loss_covariance(losses, correlation=correlation, backend=backend), losses, upstream.to(DEVICE)
    )
    x, upstream = losses.detach().cpu().double().requires_grad_(), upstream.cpu().double()
    (wanted,) = torch.autograd.grad((torch.corrcoef if correlation else torch.cov)(x.T), x, upstream)
    assert (got.cpu().double() - wanted).norm() <= 1e-5 * wanted.norm()
    if not correlation:
        centred = x.detach() - x.detach().mean(0)
        assert (centred @ (upstream + upstream.T) / 599 - wanted).norm() <= 1e-12 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_sample_has_no_gradient(dtype):
    losses = ar1(draws=90, dtype=dtype).reshape(-1, 41)
    losses[:, 4] = 0.1
    losses.requires_grad_()
    rho = loss_covariance(losses, correlation=True)
    assert not rho[4].any() and not rho[:, 4].any()
    (gradient,) = torch.autograd.grad(rho.square().sum(), losses)
    assert gradient.isfinite().all() and gradient.any()
    assert not gradient[:, 4].any()


def test_function_transforms():
    """grad, jacrev and vmap over batches of losses, against what autograd gives one by one."""
    batch = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def objective(x):
        return (loss_covariance(x, correlation=True) * torch.arange(36.0, dtype=x.dtype).view(6, 6)).sum()

    wanted = []
    for x in batch:
        x = x.clone().requires_grad_()
        wanted.append(torch.autograd.grad(objective(x), x)[0])
    torch.testing.assert_close(torch.func.grad(objective)(batch[0]), wanted[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(objective))(batch), torch.stack(wanted))
    torch.testing.assert_close(
        torch.func.vmap(loss_covariance, in_dims=1)(batch.transpose(0, 1))[2], loss_covariance(batch[2])
    )
    torch.testing.assert_close(
        torch.func.jacrev(loss_covariance)(batch[0]), torch.func.jacrev(lambda x: torch.cov(x.T))(batch[0])
    )


def test_the_operator_is_registered_as_torch_wants_it():
    losses = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.harmonic_triton.loss_covariance.default, (losses, "torch"))


def test_compiles_without_a_graph_break():
    losses = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def call(x):
        return loss_covariance(x, correlation=True).square().sum()

    (wanted,) = torch.autograd.grad(call(losses), losses)
    (got,) = torch.autograd.grad(torch.compile(call, backend="aot_eager", fullgraph=True)(losses), losses)
    torch.testing.assert_close(got, wanted)


def test_bfloat16_losses_give_fp32_covariance_and_their_own_gradient():
    losses = ar1(draws=90).reshape(-1, 41).bfloat16().requires_grad_()
    covariance = loss_covariance(losses)
    assert covariance.dtype == torch.float32
    assert error(covariance.detach(), truth(losses.detach(), correlation=False)) <= 1e-6
    covariance.sum().backward()
    assert losses.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("losses", "options", "kind", "message"),
    [
        (torch.zeros(3), {}, ValueError, r"\(T, m\).*\(3,\)"),
        (torch.zeros(1, 3), {}, ValueError, "T >= 2"),
        (torch.zeros(2, 3, dtype=torch.int32), {}, TypeError, "floating"),
        (torch.zeros(2, 3), {"correlation": 1}, TypeError, "correlation"),
        (torch.zeros(2, 3), {"backend": "reference"}, ValueError, "'auto', 'triton', 'torch'"),
        (torch.zeros(2, 3, dtype=torch.float64), {"backend": "triton"}, ValueError, "float64"),
    ],
)
def test_bad_calls(losses, options, kind, message):
    with pytest.raises(kind, match=message):
        loss_covariance(losses, **options)


# --- without SciPy, and ahead of time ------------------------------------------------------------------------------------


def test_works_without_scipy():
    """In a process where SciPy cannot be imported: same numbers, and the reason is there to be read."""
    program = """if True:
        import sys, torch
        sys.modules["scipy"] = None
        from harmonic_triton.losskernel.covariance.triangle import cpu_library
        from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance
        x = 2 + 0.05 * torch.randn(700, 33, generator=torch.Generator().manual_seed(0))
        accumulator = StreamingCovariance(33)
        accumulator.update(x)
        assert (accumulator.correlation() - torch.corrcoef(x.double().T)).abs().max() < 1e-6
        print(cpu_library())"""
    run = fresh.run(program)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "harmonic-triton[analysis]" in run.stdout


COMPILE = """if True:
    import itertools, json, re, sys
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from benchmarks.static_cost import MATRIX, TARGETS, numbers_in, resource_usage
    from harmonic_triton.losskernel.covariance import rank_k_triton as c

    def compile_one(kernel, constants, pointers, aligned, arch, **options):
        signature, fixed, attributes = {}, {}, {}
        for position, name in enumerate(kernel.arg_names):
            signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
            if name in constants:
                fixed[(position,)] = constants[name]
            elif name in pointers or name in aligned:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, fixed, attributes)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)
        if arch.startswith("gfx"):
            text = compiled.asm["amdgcn"]
            spills = numbers_in(r"\\.vgpr_spill_count:\\s+(\\d+)", text)[0]
        else:
            text = compiled.asm["ptx"]
            spills = resource_usage(compiled.asm["cubin"])[1]
        return spills, compiled.metadata.shared, len(re.findall(MATRIX, text))

    for arch, (precision, parts) in itertools.product(sys.argv[1:], c.PARTS.items()):
        config = c.CONFIGS[arch, parts]
        kind = "*fp32" if parts == 1 else "*bf16"
        constants = {"GAP": c.GAP, "PARTS": parts, "UPCAST": False, "BLOCK": config.block, "BLOCK_K": config.block_k}
        constants["GROUP"] = c.GROUP
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        cost = compile_one(c.rank_k_kernel, constants, {"parts_ptr": kind, "s_ptr": "*fp32"},
                           {"K", "half", "width", "plane"}, arch, **options)
        print(json.dumps([arch, "rank_k", precision, *cost]))
        for dtype in ("bf16", "fp32", "fp64"):
            constants = {"PARTS": parts, "UPCAST": False, "BLOCK_K": c.SPLIT_ROWS, "BLOCK_M": c.SPLIT_COLS, "stride_xm": 1}
            cost = compile_one(c.split_kernel, constants, {"x_ptr": f"*{dtype}", "shift_ptr": "*fp32", "parts_ptr": kind},
                               {"width", "plane"}, arch, num_warps=c.SPLIT_WARPS)
            print(json.dumps([arch, "split", precision, *cost]))
"""


def test_kernels_compile_within_limits():
    """Every architecture and precision: no spills, shared memory as there is, matrix instructions for split products.

    fp32 products stay in fp32: NVIDIA's matrix units would round the operands to tf32, AMD's have fp32 ones.
    """
    from benchmarks.static_cost import SHARED_LIMIT, TARGETS

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(COMPILE, *TARGETS, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    costs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(costs) == len(TARGETS) * 3 * 4
    for arch, kernel, precision, spills, shared, matrix in costs:
        assert spills == 0
        assert shared <= SHARED_LIMIT[arch]
        if kernel == "rank_k":
            assert (matrix > 0) == (precision != "ieee" or arch.startswith("gfx"))


def test_packed_layout_is_lapacks():
    """Every entry of a packed triangle where LAPACK's trttf puts it."""
    lapack = pytest.importorskip("scipy.linalg.lapack")
    for m in (2, 6, 10):
        triangle = Triangle(m, gap=PACKED, dtype=torch.float32, device=torch.device("cpu"))
        full = np.arange(1.0, m * m + 1, dtype=np.float32).reshape(m, m)
        for j in range(m):
            triangle.column(j).copy_(torch.from_numpy(full[j:, j].copy()))
        packed, _ = lapack.strttf(full, transr="N", uplo="L")
        assert np.array_equal(triangle.data.flatten().numpy(), packed)


# --- memory, indices and settings that are not the plain ones -----------------------------------------------------------


def strided(vector, how):
    """The same values with another stride, amid values that would be seen."""
    if how == "column":
        return torch.stack([vector, torch.full_like(vector, 1e3)], 1)[:, 0]
    if how == "reversed columns":
        return torch.full((len(vector), 3), 1e3, dtype=vector.dtype).copy_(vector[:, None])[:, 2]
    return vector.mean().expand(len(vector))


@pytest.mark.parametrize("how", ["column", "reversed columns", "expanded"])
def test_a_reference_of_any_stride(how, backend):
    losses = ar1(600)
    flat = losses.flatten(0, 1)
    reference = strided(flat[:20].mean(0).to(DEVICE), how)
    assert reference.stride() != (1,)
    accumulator = accumulate(losses, backend, reference=reference)
    assert (accumulator.correlation().cpu() - numpy_correlation(flat)).abs().max() < LIMIT


def test_a_reference_is_not_the_callers_memory(backend):
    losses = ar1(600)
    reference = losses[0].mean(0).to(DEVICE)
    accumulator = StreamingCovariance(losses.shape[-1], backend=backend, device=DEVICE, reference=reference)
    accumulator.update(losses.flatten(0, 1).to(DEVICE))
    reference.fill_(7.0)
    assert (accumulator.correlation().cpu() - numpy_correlation(losses.flatten(0, 1))).abs().max() < LIMIT
    state = accumulator.state_dict()
    other = StreamingCovariance(losses.shape[-1], backend=backend, device=DEVICE)
    other.load_state_dict(state)
    state["reference"].fill_(7.0)
    assert torch.equal(accumulator.correlation(), other.correlation())


@pytest.mark.parametrize(
    "how", ["transposed", "every second", "backwards in memory", "expanded draws", "expanded samples"]
)
def test_losses_of_any_stride(how, backend):
    flat = ar1(600).flatten(0, 1)
    draws, samples = flat.shape
    given = {
        "transposed": lambda: flat.T.contiguous().T,
        "every second": lambda: torch.stack([flat, torch.full_like(flat, 1e3)], 2).flatten(1)[:, ::2],
        "backwards in memory": lambda: torch.full((3, samples, draws), 1e3).copy_(flat.T)[2].T,
        "expanded draws": lambda: flat[:1].expand(draws, samples),
        "expanded samples": lambda: flat[:, :1].expand(draws, samples),
    }[how]()
    expected = numpy_correlation(given)
    accumulator = StreamingCovariance(samples, backend=backend, device=DEVICE, buffer_size=draws)
    accumulator.update(given.to(DEVICE))
    assert (accumulator.correlation().cpu() - expected).abs().max() < LIMIT
    assert (loss_covariance(given.to(DEVICE), correlation=True, backend=backend).cpu() - expected).abs().max() < LIMIT


def numpy_correlation(losses):
    """fp64; 0 where a loss never varies."""
    with np.errstate(invalid="ignore"):
        rho = torch.from_numpy(np.corrcoef(losses.double().numpy().T))
    constant = losses.double().std(0) < 1e-12
    rho[constant], rho[:, constant] = 0.0, 0.0
    return rho


# The library is the CPU's: Triton asks none.
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize(("library", "backend"), [("lapack", "torch"), ("panels", "torch"), ("lapack", "triton")],
                         indirect=True)  # fmt: skip
def test_neither_autocast_nor_the_precision_setting_reaches_the_sums(autocast, precision, library, backend):
    losses = ar1(600)
    expected = numpy_correlation(losses.flatten(0, 1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            accumulator = accumulate(losses, backend)
            rho = accumulator.correlation()
            covariance = accumulator.compute().covariance
            flat = losses.flatten(0, 1).to(DEVICE).requires_grad_()
            direct = loss_covariance(flat, correlation=True, backend=backend)
            pull = torch.randn(direct.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
            (gradient,) = torch.autograd.grad(direct, flat, pull)
        assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision("highest")
        (exact,) = torch.autograd.grad(loss_covariance(flat, correlation=True, backend=backend), flat, pull)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (rho.cpu() - expected).abs().max() < LIMIT
    assert (direct.detach().cpu() - expected).abs().max() < LIMIT
    scale = covariance.diagonal().rsqrt()
    assert (covariance * scale * scale[:, None] - rho).abs().max() < LIMIT
    assert covariance.dtype == rho.dtype == direct.dtype == torch.float32
    if precision == "highest":  # the backward pass follows that setting, as documented, but not autocast
        assert (gradient - exact).norm() <= 1e-5 * exact.norm()


def test_the_default_dtype_changes_nothing(backend):
    """Double as the default is common in physics; every tensor made without a dtype would follow it."""
    losses = ar1(600).flatten(0, 1)

    def results():
        accumulator = StreamingCovariance(losses.shape[1], backend=backend, device=DEVICE, buffer_size=64)
        accumulator.update(losses.to(DEVICE))
        found = [accumulator.compute().covariance, accumulator.correlation(), accumulator.variance()]
        return [*found, loss_covariance(losses.to(DEVICE), correlation=True, backend=backend)]

    plain = results()
    torch.set_default_dtype(torch.float64)
    try:
        changed = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(plain, changed, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


WIDE = """if True:
    import json, re
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from harmonic_triton.losskernel.covariance import rank_k_triton as c
    from harmonic_triton.losskernel.traces import neighbors_triton as n

    def products(kernel, constants, pointers):
        signature, fixed = {}, {}
        for position, name in enumerate(kernel.arg_names):
            signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
            if name in constants:
                fixed[(position,)] = constants[name]
        source = ASTSource(kernel, signature, fixed, {})
        text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ttir"]
        wide = []
        for line in text.splitlines():
            if re.search(r"arith\\.muli .* : (tensor<[0-9x]*)?i32>?", line):
                wide.append(re.findall(r"%([a-z]\\w*)", line.partition("=")[2].partition(" loc(")[0]))
        return wide

    tile = {"UPCAST": False, "BLOCK_K": 32}
    for parts in (1, 2, 3):
        kind = "*fp32" if parts == 1 else "*bf16"
        print(json.dumps(["split", products(c.split_kernel, {"PARTS": parts, "BLOCK_M": 256, **tile},
              {"x_ptr": "*fp32", "shift_ptr": "*fp32", "parts_ptr": kind})]))
        constants = {"GAP": c.GAP, "PARTS": parts, "BLOCK": 64, "GROUP": 8, **tile}
        print(json.dumps(["rank_k", products(c.rank_k_kernel, constants, {"parts_ptr": kind, "s_ptr": "*fp32"})]))
    constants = {"LABELS": True, "WIDTH": 8, "BLOCK_P": 32, "BLOCK_Q": 32, "BLOCK_T": 32, "UPCAST": False}
    pointers = {name: "*i32" if "label" in name else "*fp32" for name in n.neighbors_kernel.arg_names if name.endswith("_ptr")}
    pointers["keys_ptr"] = "*i64"
    print(json.dumps(["neighbors", products(n.neighbors_kernel, constants, pointers)]))
"""


def test_no_product_of_sizes_is_formed_in_32_bits():
    """Compiled for sizes that fit 32 bits each: what is multiplied in 32 bits is a program's or a tile's number, by a constant.

    A plane of the parts holds 2^30 numbers at m = 65536 with 16384 draws at a time, and there are three of them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(WIDE, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel for kernel, _ in found} == {"split", "rank_k", "neighbors"}
    sizes = {"plane", "K", "m", "width", "half", "stride_xk", "stride_xm", "P", "Q", "T", "row_room", "col_room",
             "first_row", "first_col", "stride_rt", "stride_ct"}  # fmt: skip
    for kernel, operands in found:
        for names in operands:
            assert not sizes & set(names), (kernel, names)
