"""The kernel of real runs and of given losses: estimates against NumPy, deaths, resumption, files, processes."""

import dataclasses
import functools
import math
import signal
import time
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from torch import nn

from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.about import About
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stream import sample_losses

KEEPS = ("covariance", "traces")
# bfloat16 traces round a shifted loss to 2^-9 of itself: 4e-3/sqrt(12) of the spread, averaged over 200 draws.
CLOSE = {"covariance": 5e-6, "traces": 2e-3}


def losses(chains=4, draws=50, size=30, seed=0):
    """Correlated losses with mean 2 and spread about 0.05 that differ a little between the chains."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(chains, draws, 3, generator=generator)
    mix = torch.randn(3, size, generator=generator)
    offset = 0.5 * torch.randn(chains, 1, size, generator=generator)
    return 2 + 0.05 * (common @ mix + torch.randn(chains, draws, size, generator=generator) + offset)


def given(keep="covariance", **options):
    labels = torch.arange(30) % 5
    return LossKernel.from_losses(losses(), keep=keep, labels=labels, initial_losses=torch.full((30,), 1.9), **options)


# --- estimates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
def test_moments_are_those_of_the_draws(keep):
    kernel, flat = given(keep), losses().flatten(0, 1).double().numpy()
    assert kernel.num_draws == 200 and kernel.num_chains == 4 and kernel.num_samples == 30
    np.testing.assert_allclose(kernel.mean, flat.mean(0), rtol=1e-7)
    np.testing.assert_allclose(kernel.correlation, np.corrcoef(flat.T), atol=CLOSE[keep])
    wanted = np.cov(flat.T)
    np.testing.assert_allclose(kernel.covariance, wanted, atol=CLOSE[keep] * wanted.max())
    np.testing.assert_allclose(kernel.variance, wanted.diagonal(), rtol=1e-5)
    rho = np.corrcoef(flat.T)
    np.testing.assert_allclose(kernel.distance("linear"), 1 - rho, atol=CLOSE[keep])
    # d = sqrt(2(1 - rho)): its error is that of rho over d, and the nearest pair here is 0.3 apart.
    np.testing.assert_allclose(kernel.distance(), np.sqrt(2 * np.maximum(1 - rho, 0)), atol=CLOSE[keep] / 0.3)
    rows, columns = torch.tensor([3, 1, 7]), torch.tensor([2, 29])
    np.testing.assert_allclose(kernel.block(rows, columns), rho[[3, 1, 7]][:, [2, 29]], atol=CLOSE[keep])
    np.testing.assert_allclose(
        kernel.block(rows, correlation=False), wanted[[3, 1, 7]], atol=CLOSE[keep] * wanted.max()
    )
    vector = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(kernel.product(vector), rho @ vector.numpy(), atol=CLOSE[keep] * vector.abs().sum())


def test_within_chain_estimate_from_the_same_state():
    kernel = given().estimate(within_chain=True)
    centred = losses().double()
    centred = (centred - centred.mean(1, keepdim=True)).flatten(0, 1)
    np.testing.assert_allclose(kernel.covariance, centred.T @ centred / (200 - 4), rtol=1e-4, atol=1e-8)
    assert not torch.allclose(kernel.covariance, given().covariance, rtol=1e-2)
    torch.testing.assert_close(kernel.estimate(within_chain=False).covariance, given().covariance)
    with pytest.raises(ValueError, match="keep='covariance'"):
        given("traces").estimate(within_chain=True)


@pytest.mark.parametrize("keep", KEEPS)
def test_neighbours_drop_equal_labels_before_k_are_taken(keep, monkeypatch):
    kernel = given(keep)
    rho = torch.from_numpy(np.corrcoef(losses().flatten(0, 1).double().numpy().T))
    for exclude, labels in (
        (None, torch.arange(30)),
        (True, kernel.labels),
        (torch.arange(30) % 2, torch.arange(30) % 2),
    ):
        if keep == "covariance":
            monkeypatch.setattr(estimators, "BLOCK", 100)  # three rows at a time
        indices, distances = kernel.neighbors(4, exclude_same=exclude)
        allowed = (labels[:, None] != labels).fill_diagonal_(False)
        best = rho.masked_fill(~allowed, -2).topk(4).values
        assert allowed.gather(1, indices).all()
        torch.testing.assert_close(rho.gather(1, indices), best, atol=2 * CLOSE[keep], rtol=0)
        torch.testing.assert_close(distances.double(), (2 * (1 - best)).sqrt(), atol=CLOSE[keep] / 0.3, rtol=0)
    few, far = kernel.neighbors(4, exclude_same=torch.zeros(30, dtype=torch.int64))
    assert (few == -1).all() and far.isinf().all()


def test_numbers_and_their_definitions():
    about = About(nbeta=50.0, num_train=90)
    kernel = given(about=about)
    flat = losses().flatten(0, 1).double()
    # V_n for a training set of 90 of which the 30 samples are a third.
    assert kernel.empirical_variance == pytest.approx(3 * flat.var(0).sum().item(), rel=1e-5)
    assert kernel.singular_fluctuation == pytest.approx(50 / 90 / 2 * kernel.empirical_variance)
    assert kernel.llc == pytest.approx(50 * (flat.mean().item() - 1.9), rel=1e-6)
    assert math.isnan(given().llc) and math.isnan(given().singular_fluctuation)
    np.testing.assert_allclose(
        kernel.bif(torch.tensor([4, 2])), -np.cov(flat.T.numpy())[:, [4, 2]], rtol=1e-4, atol=1e-8
    )
    assert kernel.cka(kernel) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="query_data"):
        kernel.bif()


def test_covariance_and_traces_agree_on_everything_read_off():
    dense, factor = given("covariance"), given("traces")
    assert dense.cka(factor) == pytest.approx(1.0, abs=1e-5)
    other = LossKernel.from_losses(losses(seed=5), keep="traces")
    same = LossKernel.from_losses(losses(seed=5), keep="covariance")
    assert factor.cka(other) == pytest.approx(dense.cka(same), abs=CLOSE["traces"])
    one, two = dense.principal_components(2), factor.principal_components(2)
    torch.testing.assert_close(one.share, two.share, atol=CLOSE["traces"], rtol=0)
    torch.testing.assert_close(dense.pc1(), factor.pc1(), atol=10 * CLOSE["traces"], rtol=0)
    assert [row.sample for row in dense.neighbor_table([0, 3])] == [0, 3]
    for a, b in zip(dense.neighbor_table([0, 3], 3), factor.neighbor_table([0, 3], 3), strict=True):
        assert [n[2] for n in a.neighbors] == pytest.approx([n[2] for n in b.neighbors], abs=2 * CLOSE["traces"])


def test_neighbor_table_names_and_exclusion():
    kernel = given()
    names = [f"sample {i}" for i in range(30)]
    (row,) = kernel.neighbor_table([7], 29, names=names, exclude_same=True)
    assert row.sample == 7 and row.name == "sample 7"
    found = [j for j, _, _ in row.neighbors]
    assert sorted(found) == [j for j in range(30) if j % 5 != 2]  # neither itself nor its label
    rho = [r for _, _, r in row.neighbors]
    assert rho == sorted(rho, reverse=True)
    assert [name for _, name, _ in row.neighbors] == [names[j] for j in found]


# --- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
def test_a_chain_that_dies_leaves_the_others_bitwise(keep):
    whole, sick = losses(), losses()
    sick[2, 20:30] *= torch.logspace(0, 14, 10)[:, None]  # on its way
    sick[2, 30:] = math.nan
    sick[1, 7, 3] = math.inf  # a draw of a chain that goes on
    kernel = LossKernel.from_losses(sick, keep=keep)
    assert kernel.record.dead == {2: 30} and kernel.record.skipped == {1: 1} and kernel.num_draws == 149
    healthy = LossKernel.from_losses(whole[[0, 1, 3]], keep=keep)
    healthy_less = torch.cat([whole[0], whole[1, :7], whole[1, 8:], whole[3]])
    np.testing.assert_allclose(kernel.correlation, np.corrcoef(healthy_less.double().numpy().T), atol=CLOSE[keep])
    sick[1, 7, 3] = whole[1, 7, 3]
    again = LossKernel.from_losses(sick, keep=keep, initial_losses=torch.full((30,), 1.9))
    assert torch.equal(again.mean, healthy.mean) and torch.equal(again.covariance, healthy.covariance)
    words = again.diagnostics.verdicts()[0]
    assert words.good is False and "Chain 2 died at draw 30" in words.words and words.value == "3 of 4 alive"
    assert again.diagnostics.excess_loss.isnan().tolist() == [False, False, True, False]
    assert again.diagnostics.split_half_cka > 0


def test_no_living_chain_is_an_error():
    with pytest.raises(ValueError, match=r"died: chain 0 at draw 0, chain 1 at draw 0"):
        LossKernel.from_losses(torch.full((2, 5, 3), math.nan))


def test_diagnostics_see_what_is_wrong():
    apart = LossKernel.from_losses(losses(8, 500)).diagnostics
    assert apart.split_half_cka > 0.9 and apart.r_hat_mean_loss > 1.01  # the chains' offsets
    generator = torch.Generator().manual_seed(0)
    independent = 2 + 0.05 * torch.randn(4, 400, 30, generator=generator)
    fine = LossKernel.from_losses(independent, initial_losses=torch.full((30,), 1.5)).diagnostics
    assert fine.r_hat_mean_loss < 1.01 and fine.autocorrelation_time.median() == pytest.approx(1, abs=0.2)
    # Nothing but noise: the halves of 800 draws share their diagonals.
    assert fine.split_half_cka == pytest.approx(1 / (1 + 29 / 800), abs=0.01)
    assert fine.split_half_noise == pytest.approx(fine.split_half_cka, abs=0.02)
    assert fine.constant_samples == 0 and fine.confound is None
    torch.testing.assert_close(fine.excess_loss, torch.full((4,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)
    walk = 2 + 0.05 * torch.randn(4, 400, 30, generator=generator).cumsum(1)
    slow = LossKernel.from_losses(walk).diagnostics
    assert slow.autocorrelation_time.median() > 20 and slow.effective_draws < 100
    verdicts = {verdict.name: verdict for verdict in slow.verdicts()}
    assert verdicts["split R̂"].good is False
    assert verdicts["autocorrelation time (draws)"].good is False
    labelled = independent + 0.05 * torch.randn(4, 400, 5, generator=generator)[:, :, torch.arange(30) % 5]
    confound = LossKernel.from_losses(labelled, labels=torch.arange(30) % 5).diagnostics
    # The shared noise has the variance of the sample's own: rho 1/2 for one label; 435 pairs over 1600 draws.
    assert confound.confound == pytest.approx((0.5, 0.0), abs=0.03)
    assert {v.name: v.good for v in confound.verdicts()}["same-label confound (mean ρ)"] is False
    constant = independent.clone()
    constant[:, :, 4] = 0.0
    flat = LossKernel.from_losses(constant)
    assert flat.diagnostics.constant_samples == 1
    assert (flat.correlation[4] == 0).all() and flat.correlation.isfinite().all()
    bound = LossKernel.from_losses(independent, about=About(step_size=2.0, stability_bound=1.0)).diagnostics
    assert {v.name: v.good for v in bound.verdicts()}["step size ε"] is False


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", KEEPS)
def test_save_and_load(keep, tmp_path):
    kernel = given(
        keep,
        about=About(
            nbeta=3.0, step_size=0.1, num_train=7, stability_bound=0.2, config={"lr": 0.1}, fingerprint={"model": "x"}
        ),
    )
    path = kernel.save(tmp_path / "kernel.safetensors")
    again = LossKernel.load(path)
    assert torch.equal(again.covariance, kernel.covariance) and torch.equal(again.mean, kernel.mean)
    assert again.about == kernel.about and torch.equal(again.labels, kernel.labels)
    assert again.diagnostics.r_hat_mean_loss == kernel.diagnostics.r_hat_mean_loss
    assert repr(again) == repr(kernel)
    if keep == "covariance":
        within = kernel.estimate(within_chain=True)
        assert torch.equal(LossKernel.load(within.save(path)).covariance, within.covariance)
    assert [file.name for file in tmp_path.iterdir()] == ["kernel.safetensors"]
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, other)
    with pytest.raises(ValueError, match="no loss kernel"):
        LossKernel.load(other)


def test_npz_and_zarr(tmp_path):
    import zarr

    kernel = given()
    with np.load(kernel.to_npz(tmp_path / "kernel.npz")) as arrays:
        np.testing.assert_array_equal(arrays["covariance"], kernel.covariance)
        np.testing.assert_array_equal(arrays["mean"], kernel.mean)
    group = zarr.open_group(str(kernel.to_zarr(tmp_path / "kernel.zarr")), mode="r")
    np.testing.assert_array_equal(group["covariance"][:], kernel.covariance)
    assert "covariance" not in given("traces").arrays()


# --- runs --------------------------------------------------------------------------------------------------------------

CONFIG = SGLDConfig(
    lr=1e-3, nbeta=20.0, localization=100.0, batch_size=16, num_chains=4, num_draws=30, num_burnin_steps=5
)


def problem(size=40, seed=0):
    """A small network on a regression, with its samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    y = torch.tanh(x[:, :2].sum(1, keepdim=True)) + 0.1 * torch.randn(size, 1, generator=generator)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model, (x, y)


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().squeeze(1)


def run(config=CONFIG, *, seed=1, data=None, model=None, **options):
    default, samples = problem()
    samples = samples if data is None else data
    options = {"progress": False, **options}
    return loss_kernel(model or default, squared_error, samples, samples, config, seed=seed, **options)


def same(one, other):
    """Bitwise the same kernel and records."""
    exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    assert one.num_draws == other.num_draws
    exactly(one.mean, other.mean)
    exactly(one.covariance, other.covariance)
    exactly(one.record.mean_loss, other.record.mean_loss)
    exactly(one.record.probe, other.record.probe)
    assert (one.queries is None) == (other.queries is None)
    if one.queries is not None:
        exactly(one.bif(), other.bif())


@pytest.mark.parametrize("keep", KEEPS)
def test_a_run_is_the_covariance_of_the_sampled_losses(keep):
    model, samples = problem()
    blocks = sample_losses(model, squared_error, samples, samples, CONFIG, seed=1, progress=False)
    draws = torch.cat(list(blocks)).double().numpy()
    kernel = run(keep=keep)
    assert kernel.num_draws == len(draws) == 120
    np.testing.assert_allclose(kernel.correlation, np.corrcoef(draws.T), atol=CLOSE[keep])
    np.testing.assert_allclose(kernel.mean, draws.mean(0), rtol=1e-6)
    torch.testing.assert_close(kernel.initial_losses, squared_error(model, samples).detach())
    assert kernel.excess_loss == pytest.approx(draws.mean() - kernel.initial_losses.mean().item(), rel=1e-4)
    assert kernel.llc == pytest.approx(20 * kernel.excess_loss, rel=1e-12)
    assert kernel.singular_fluctuation == pytest.approx(20 / 40 / 2 * draws.var(0, ddof=1).sum(), rel=1e-4)
    assert kernel.about.stability_bound > CONFIG.lr and kernel.about.num_train == 40
    assert kernel.about.config["lr"] == 1e-3


def test_the_kernel_does_not_depend_on_the_grouping_of_chains():
    one, all_at_once = (run(dataclasses.replace(CONFIG, chain_group_size=size)) for size in (1, 4))
    # vmapped products round otherwise than single ones: 1e-7 a step, which 35 contracting steps do not amplify.
    torch.testing.assert_close(one.correlation, all_at_once.correlation, atol=1e-4, rtol=0)


def test_queries_are_read_with_the_samples_and_stay_out_of_the_kernel():
    _, (x, y) = problem()
    query = (x[:3] + 0.1, y[:3])
    kernel, plain = run(query_data=query), run()
    same(LossKernel(kernel.accumulator, kernel.record), plain)
    model, samples = problem()
    both = (torch.cat([x, query[0]]), torch.cat([y, query[1]]))
    draws = torch.cat(list(sample_losses(model, squared_error, samples, both, CONFIG, seed=1, progress=False)))
    wanted = estimators.bif(draws[:, :40], draws[:, 40:])
    torch.testing.assert_close(kernel.bif(), wanted, rtol=1e-6, atol=1e-12)
    dataset = torch.utils.data.TensorDataset
    with pytest.raises(TypeError, match="query_data must have the form of eval_data"):
        run(query_data=dataset(*query))
    traces = run(query_data=query, keep="traces")
    torch.testing.assert_close(traces.bif(), kernel.bif())


class Fragile(nn.Module):
    """A regression that breaks where its extra weight has wandered off: the others' chains never see it."""

    def __init__(self, limit):
        super().__init__()
        self.net, _ = problem()
        self.limit = limit
        self.probe = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        broken = torch.where(self.probe.abs() > self.limit, torch.nan, 0.0)
        return self.net(x) + broken


@functools.cache
def fragile(config):
    """A model of which the furthest chain dies, and no other."""
    for limit in np.arange(0.3, 0.1, -0.02):
        model = Fragile(float(limit))
        if run(config, model=model).record.dead:
            return model
    raise AssertionError("no chain moves")


@pytest.mark.filterwarnings("ignore:chain .* diverged")
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("keep", KEEPS)
def test_a_diverging_chain_harms_no_other(keep, group):
    config = dataclasses.replace(CONFIG, chain_group_size=group)
    sick = run(config, model=fragile(config), keep=keep)
    ((chain, death),) = sick.record.dead.items()
    assert 0 < death < 30 and sick.num_draws == 90
    healthy = run(config, model=Fragile(math.inf), keep=keep)
    others = [c for c in range(4) if c != chain]
    assert healthy.record.dead == {}
    assert torch.equal(sick.record.mean_loss[others], healthy.record.mean_loss[others])
    # The same kernel as of the other chains' losses entered alone, bitwise.
    _, samples = problem()
    parts = {c: [] for c in range(4)}
    for draws in Sampler(Fragile(math.inf), squared_error, samples, samples, config, seed=1).run():
        for c, row in zip(draws.chain.tolist(), draws.losses, strict=True):
            parts[c].append(row.clone())
    alone = LossKernel.from_losses(torch.stack([torch.stack(parts[c]) for c in others]), keep=keep)
    assert torch.equal(sick.covariance, alone.covariance) and torch.equal(sick.mean, alone.mean)
    assert f"Chain {chain} died at draw {death}" in sick.diagnostics.verdicts()[0].words


# --- resumption --------------------------------------------------------------------------------------------------------

STORED = dataclasses.replace(CONFIG, num_draws=15, chain_group_size=2)


def stored_run(directory, keep, *, steps=1, **options):
    """A run with a checkpoint at every draw."""
    config = dataclasses.replace(STORED, num_steps_bw_draws=steps)
    return run(config, keep=keep, checkpoint_dir=directory, checkpoint_seconds=0, **options)


def in_child(directory, keep, steps):
    torch.set_num_threads(1)
    _, (x, y) = problem()
    stored_run(directory, keep, steps=steps, query_data=(x[:2], y[:2])).save(Path(directory) / "kernel.safetensors")


@pytest.fixture
def processes():
    """Starts processes that have torch imported already."""
    return lambda target, *arguments: fresh.CONTEXT.Process(target=target, args=arguments)


def finished(processes, directory, keep, steps):
    process = processes(in_child, directory, keep, steps)
    process.start()
    process.join(900)  # the disk may be busy
    assert process.exitcode == 0
    return LossKernel.load(directory / "kernel.safetensors")


def kill_after(process, checkpoint, saves, delay):
    """Wait for a number of saves of the checkpoint and a moment more, then kill; True if that was before the end."""
    process.start()
    stamp = None
    while saves and process.is_alive():
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        saves, stamp = (saves - 1, now) if now != stamp else (saves, stamp)
        time.sleep(1e-4)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_and_resume(processes, folder, count, keep, steps):
    """Kill ``count`` runs at random moments, resume each and compare with one that was left alone; how many were killed."""
    whole = finished(processes, folder, keep, steps)
    chance, killed = np.random.default_rng(0), 0
    for number in range(count):
        directory = folder / f"run{number}"
        directory.mkdir()
        process = processes(in_child, directory, keep, steps)
        # 30 saves a run; up to 20 ms later, so also while a file is being written
        killed += kill_after(process, directory / "kernel-0.pt", chance.integers(1, 29), chance.uniform(0, 0.02))
        same(finished(processes, directory, keep, steps), whole)
    return killed


@pytest.mark.parametrize("keep", ["traces", pytest.param("covariance", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_an_uninterrupted_one(keep, tmp_path, processes):
    assert kill_and_resume(processes, tmp_path, 2, keep, 3) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
def test_fifty_kills(keep, tmp_path, processes):
    assert kill_and_resume(processes, tmp_path, 50, keep, 10) >= 45


@pytest.mark.parametrize("keep", KEEPS)
def test_checkpoints_change_nothing_and_a_finished_run_returns_at_once(keep, tmp_path):
    plain, stored = run(STORED, keep=keep), stored_run(tmp_path, keep)
    same(stored, plain)
    started = (tmp_path / "kernel-0.pt").stat().st_mtime_ns
    again = stored_run(tmp_path, keep)  # as a notebook's cell run twice: what the first gave is still there
    same(again, plain)
    same(stored, plain)
    assert (tmp_path / "kernel-0.pt").stat().st_mtime_ns == started


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    stored_run(tmp_path, "covariance")
    model, (x, y) = problem()
    with torch.no_grad():
        model[0].bias[0] += 1e-3
    other = (x.clone().index_fill_(0, torch.tensor([5]), 0.0), y)
    for options, words in (
        ({"seed": 2}, "seed: 1 there, 2 here"),
        ({"model": model}, "model: "),
        ({"data": other}, "train data: .*evaluation data: "),
        ({"keep": "traces"}, "keep: covariance there, traces in bfloat16 here"),
        ({"config": dataclasses.replace(STORED, lr=2e-3)}, "lr: 0.001 there, 0.002 here"),
    ):
        arguments = {"config": STORED, "keep": "covariance", **options}
        with pytest.raises(ValueError, match=words):
            run(arguments.pop("config"), checkpoint_dir=tmp_path, **arguments)


# --- processes ---------------------------------------------------------------------------------------------------------

SHARED = dataclasses.replace(CONFIG, num_chains=5, chain_group_size=1)


def rank_of_two(rank, folder, keep, model):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store-{keep}", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    _, (x, y) = problem()
    directory = None if keep == "covariance" else folder
    kernel = run(SHARED, keep=keep, model=model, query_data=(x[:3], y[:3]), checkpoint_dir=directory)
    kernel.save(f"{folder}/rank{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:chain .* diverged")
@pytest.mark.parametrize("keep", KEEPS)
def test_two_processes_share_the_chains(keep, tmp_path, processes):
    model = fragile(SHARED)
    ranks = [processes(rank_of_two, rank, str(tmp_path), keep, model) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    first, second = (LossKernel.load(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    same(first, second)
    _, (x, y) = problem()
    alone = run(SHARED, keep=keep, model=model, query_data=(x[:3], y[:3]))
    assert first.record.dead == alone.record.dead and len(alone.record.dead) == 1
    torch.testing.assert_close(first.record.mean_loss, alone.record.mean_loss, rtol=0, atol=0, equal_nan=True)
    assert first.num_draws == alone.num_draws == 120
    # Traces travel as float32 differences from a reference: 6e-8 of a spread below a tenth of the mean.
    torch.testing.assert_close(
        first.mean, alone.mean, rtol=1e-12 if keep == "covariance" else 1e-7, atol=0
    )  # traces: fp32
    # Sums in another order; traces are rounded to bfloat16 once in either case, from float32 differences here.
    torch.testing.assert_close(first.correlation, alone.correlation, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.bif(), alone.bif(), rtol=1e-9, atol=1e-15)
