"""The sampler against distributions known exactly, and what its draws may and may not depend on."""

import copy
import dataclasses
import math
import os
import sys
import textwrap
import warnings

import fresh
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from harmonic_triton.losskernel.per_sample_losses import classification_loss, regression_loss
from harmonic_triton.losskernel.sampling.config import METHODS, SGLDConfig
from harmonic_triton.losskernel.sampling.parameters import FlatParameters
from harmonic_triton.losskernel.sampling.rng import CounterRNG
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stability import stability_bound
from harmonic_triton.losskernel.sampling.stream import sample_losses

N, FEATURES = 200, 8


class Linear(nn.Module):
    """x @ w, started at the least-squares solution."""

    def __init__(self, x, y):
        super().__init__()
        self.w = nn.Parameter(torch.linalg.lstsq(x, y[:, None]).solution[:, 0])

    def forward(self, x):
        return x @ self.w


def regression(samples=N, features=FEATURES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    y = x @ torch.randn(features, generator=generator) + 0.5 * torch.randn(samples, generator=generator)
    return Linear(x, y), x, y


def settings(**changed):
    base = {"lr": 3e-3, "nbeta": 200.0, "localization": 50.0, "batch_size": 32, "num_chains": 3, "num_draws": 10}
    return SGLDConfig(**{**base, **changed})


def network(seed=0):
    """Batch-norm and dropout, both of which would leak in train() mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))
    model(torch.randn(64, 6))  # running statistics unlike their initial values
    return model


def classes(samples=90):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, generator=generator), torch.randint(4, (samples,), generator=generator)


def draws(model, loss, train, evaluation, config, seed=0, **options):
    """(chains, draws, m) losses, whatever the grouping; no warnings expected."""
    sampler = Sampler(model, loss, train, evaluation, config, seed=seed, **options)
    out = torch.full((config.num_chains, config.num_draws, sampler.num_samples), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in sampler.run():
            out[block.chain, block.draw] = block.losses
    return out


# --- known distributions ---------------------------------------------------------------------------------------------


def oracle(x, y, w, config):
    """K_ij = c_ij^2/2 + a_i a_j c_ij with c = x S x^T, S = A^-1 (1 - lr A/4)^-1, A = nbeta H + gamma."""
    x, a = x.double(), (y - x @ w).double()
    hessian = x.T @ x / len(x)
    A = config.nbeta * hessian + config.localization * torch.eye(x.shape[1]).double()
    S = torch.linalg.inv(A - config.lr * A @ A / 4)
    c = x @ S @ x.T
    return c.square() / 2 + a[:, None] * a * c


def correlation(K):
    return K / (K.diag()[:, None] * K.diag()).sqrt()


def linear_regression_errors(num_draws):
    """(rms error of rho, trace ratio) of 30 chains at half the stable step."""
    model, x, y = regression()
    config = settings(batch_size=N, num_chains=30, num_draws=num_draws, num_burnin_steps=50)
    traces = draws(model, regression_loss, (x, y), (x[:40], y[:40]), config)
    estimate = torch.cov(traces.flatten(0, 1).double().T)
    exact = oracle(x, y, model.w.detach(), config)[:40, :40]
    rms = (correlation(estimate) - correlation(exact)).square().mean().sqrt().item()
    return rms, (estimate.trace() / exact.trace()).item()


def test_linear_regression_small():
    """The error at 8000 draws (0.0044 allowed 0.01, trace 2 %) grows as the square root of fewer draws: here 1/16th."""
    rms, trace = linear_regression_errors(500)
    assert rms <= 0.04 and abs(trace - 1) <= 0.08


@pytest.mark.slow
def test_linear_regression_at_full_length():
    rms, trace = linear_regression_errors(8000)
    print(f"rms error of rho {rms:.4f}, trace ratio {trace:.4f}")
    assert rms <= 0.01 and abs(trace - 1) <= 0.02


@pytest.mark.parametrize(("method", "tolerance"), [("rmsprop", 0.1), ("sgnht", 0.1)])
def test_the_other_methods_have_the_same_stationary_distribution(method, tolerance):
    """Trace of K against the probe's own. Small steps (lr lambda/4 <= 0.05 leaves 5 % of discretisation at most); 30 chains
    of ~100 independent draws estimate a sum of 8 chi-square-like terms to about sqrt(2/3000) = 3 %."""
    model, x, y = regression()
    lr = {"rmsprop": 5e-5, "sgnht": 4e-4}[method]
    config = settings(
        lr=lr,
        batch_size=N,
        num_chains=60,
        num_draws=250,
        num_burnin_steps=200,
        num_steps_bw_draws=3,
        method=method,
        chain_group_size=60,
    )
    traces = draws(model, regression_loss, (x, y), (x, y), config)
    estimate = torch.cov(traces.flatten(0, 1).double().T).trace()
    exact = oracle(x, y, model.w.detach(), dataclasses.replace(config, lr=1e-9, method="sgld")).trace()
    assert abs(estimate / exact - 1) <= tolerance


def test_the_thermostat_takes_out_minibatch_noise_that_sgld_keeps():
    """Minibatch noise makes SGLD hotter than the probe; the thermostat must take most of it out (seen: 1.6 and 1.09)."""
    model, x, y = regression()
    exact = oracle(x, y, model.w.detach(), settings(lr=1e-9)).trace()
    ratio = {}
    for method, burn_in in (("sgld", 50), ("sgnht", 800)):
        config = settings(
            lr=2e-3, batch_size=20, num_chains=60, num_draws=100, num_burnin_steps=burn_in, num_steps_bw_draws=3,
            method=method, chain_group_size=60,
        )  # fmt: skip
        traces = draws(model, regression_loss, (x, y), (x, y), config)
        ratio[method] = (torch.cov(traces.flatten(0, 1).double().T).trace() / exact).item()
    assert ratio["sgld"] > 1.5 and abs(ratio["sgnht"] - 1) < 0.15, ratio


class TwoMechanisms(nn.Module):
    """Samples of one kind use one weight vector, those of the other kind the other (the paper's A.4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        kind = x[:, :1] > 0
        return torch.where(kind, self.first(x[:, 1:]), self.second(x[:, 1:]))


def test_disjoint_parameters_are_uncorrelated():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(4))
    y = torch.randn(60, 1, generator=torch.Generator().manual_seed(5))
    config = settings(lr=8e-3, batch_size=60, num_chains=80, num_draws=250, num_burnin_steps=20, chain_group_size=80)
    traces = draws(TwoMechanisms(), regression_loss, (x, y), (x, y), config).flatten(0, 1)
    rho = torch.corrcoef(traces.double().T)
    kind = x[:, 0] > 0
    across, within = rho[kind][:, ~kind], rho[kind][:, kind]
    # autocorrelation time below 4 leaves 5000 draws: an rms of 1/sqrt(5000) = 0.014, and 5 of those at most for 900 pairs
    assert across.square().mean().sqrt() <= 0.02 and across.abs().max() <= 0.07
    assert within.abs().mean() > 0.3


def test_strong_localization_gives_gradient_inner_products():
    """lr = 2/gamma makes the draws independent N(w*, 2/gamma): K = (2/gamma) grad_i . grad_j, to sqrt((d + 1)/T) = 0.6 %."""
    torch.manual_seed(6)
    model, gamma = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1, bias=False)), 1e6
    x, y = torch.randn(12, 2), torch.randn(12, 1)
    config = settings(
        lr=2 / gamma, localization=gamma, nbeta=1.0, batch_size=12, num_chains=128, num_draws=1000, chain_group_size=128
    )
    traces = draws(model, regression_loss, (x, y), (x, y), config).flatten(0, 1)
    gradients = []
    for i in range(12):
        model.zero_grad()
        regression_loss(model, (x[i : i + 1], y[i : i + 1])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())
    exact = 2 / gamma * torch.stack(gradients) @ torch.stack(gradients).T
    estimate = torch.cov(traces.double().T)
    assert (estimate - exact).norm() <= 0.01 * exact.norm()


# --- what a draw depends on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_draws_do_not_depend_on_grouping(method):
    """Bitwise for one grouping; between vmap and a loop to fp32 rounding carried through 20 stable steps."""
    data, model = classes(), network()
    config = settings(lr=1e-4, nbeta=50.0, num_chains=4, num_burnin_steps=10, method=method)
    run = lambda size: draws(model, classification_loss, data, data, dataclasses.replace(config, chain_group_size=size))
    loop = run(1)
    assert torch.equal(loop, run(1))
    for size in (2, 3, 4):
        grouped = run(size)
        assert torch.equal(grouped, run(size))
        assert (grouped - loop).abs().max() <= 2e-5
    assert not torch.equal(loop[0], loop[1])
    other = draws(model, classification_loss, data, data, dataclasses.replace(config, chain_group_size=1), seed=1)
    assert not torch.equal(loop[0], other[0])


def test_chains_of_another_process_are_the_same_bitwise():
    data, model, config = classes(), network(), settings(lr=1e-4, chain_group_size=1, num_chains=5)
    every = draws(model, classification_loss, data, data, config)
    some = draws(model, classification_loss, data, data, config, chains=[3, 1])
    assert torch.equal(some[[1, 3]], every[[1, 3]]) and some[[0, 2, 4]].isnan().all()


def test_two_gloo_processes_draw_what_one_does(tmp_path):
    script = textwrap.dedent("""
        import sys, torch
        sys.path.insert(0, "tests")
        from test_sgld import classes, network, settings
        from harmonic_triton.losskernel.per_sample_losses import classification_loss
        from harmonic_triton.losskernel.sampling.stream import sample_losses
        torch.set_num_threads(1)
        rank = int(sys.argv[1])
        torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        config = settings(lr=1e-4, chain_group_size=1, num_chains=5)
        data = classes()
        got = list(sample_losses(network(), classification_loss, data, data, config, seed=0, progress=False,
                                 checkpoint_dir=sys.argv[3]))
        torch.save(torch.cat(got), f"{sys.argv[3]}/{rank}.pt")
    """)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [fresh.Started(script, rank, tmp_path / "meet", tmp_path, env=environment) for rank in range(2)]
    ended = [process.wait(timeout=120) for process in processes]
    assert [done.returncode for done in ended] == [0, 0], ended
    data, config = classes(), settings(lr=1e-4, chain_group_size=1, num_chains=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    alone = draws(network(), classification_loss, data, data, config)
    torch.set_num_threads(threads)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone[rank::2].flatten(0, 1))


def test_minibatches_and_noise_are_counted_not_drawn_in_turn():
    one, other = CounterRNG(7), CounterRNG(7)
    one.minibatch(5, 5, 100, 10)
    first, second = torch.empty(2, 1000), torch.empty(1, 1000)
    one.noise(first, [4, 9], 3)
    other.noise(second, [9], 3)
    assert torch.equal(first[1], second[0]) and not torch.equal(first[0], first[1])
    assert torch.equal(one.minibatch(2, 8, 100, 10), other.minibatch(2, 8, 100, 10))
    assert len(one.minibatch(2, 8, 100, 100).unique()) == 100
    assert not torch.equal(one.minibatch(2, 8, 100, 10), CounterRNG(8).minibatch(2, 8, 100, 10))
    picked = torch.cat([one.minibatch(c, s, 10, 3) for c in range(20) for s in range(100)])
    assert (picked.bincount(minlength=10) / len(picked) - 0.1).abs().max() < 0.01  # 6000 picks: 5 sd is 0.02/sqrt(1)


def test_no_two_steps_share_the_bits_that_seed_their_noise():
    streams = CounterRNG(11)
    seeds = {streams.noise_seed(chain, step) & 0xFFFFFFFF for chain in range(50) for step in range(4000)}
    assert len(seeds) == 50 * 4000  # random 32-bit seeds would collide about 5 times
    noise = torch.empty(64, 4096)
    for row in range(64):
        streams.noise(noise[row : row + 1], [row % 8], row)
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.02  # 262,144 values: 5 sd are 0.01 and 0.014
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.09  # 2016 pairs of sd 1/64: 5.7 of them


def test_thinning_takes_every_so_many_of_the_same_steps():
    data, model = classes(), network()
    every = settings(lr=1e-4, num_draws=14, num_burnin_steps=0)
    thinned = settings(lr=1e-4, num_draws=3, num_burnin_steps=2, num_steps_bw_draws=4)
    assert torch.equal(
        draws(model, classification_loss, data, data, thinned),
        draws(model, classification_loss, data, data, every)[:, 5::4],
    )


def test_full_batch_gradients_have_no_shuffling_noise():
    """With the noise made negligible, chains at batch_size = n stay together; minibatches pull them apart."""
    model, x, y = regression()
    model.w.data.add_(0.3)
    spread = {}
    for size in (N, N // 2):
        config = settings(lr=1e-12, nbeta=1e9, localization=0.0, batch_size=size, num_draws=20)
        spread[size] = draws(model, regression_loss, (x, y), (x, y), config).std(0).max().item()
    assert spread[N] < 1e-4 < 1e-3 < spread[N // 2]


def test_microbatches_and_the_batch_of_evaluation_change_rounding_only():
    data, model, config = classes(), network(), settings(lr=1e-4, num_burnin_steps=3)
    whole = draws(model, classification_loss, data, data, config)
    for changes in ({"microbatch_size": 7}, {"eval_batch_size": 11}, {"microbatch_size": 32, "eval_batch_size": 90}):
        parts = draws(model, classification_loss, data, data, dataclasses.replace(config, **changes))
        assert (parts - whole).abs().max() <= 2e-5
    full = dataclasses.replace(config, batch_size=90)
    parts = draws(model, classification_loss, data, data, dataclasses.replace(full, microbatch_size=40))
    assert (parts - draws(model, classification_loss, data, data, full)).abs().max() <= 2e-5


def test_train_loss_is_the_mean_over_the_minibatches_since_the_last_draw():
    """At a step that hardly moves it is the batches' mean loss at w*."""
    data, model = classes(), network().eval()
    config = settings(lr=1e-14, num_chains=2, num_draws=2, num_steps_bw_draws=3, num_burnin_steps=1, batch_size=10)
    sampler = Sampler(model, classification_loss, data, data, config, seed=0)
    streams = CounterRNG(0)
    for block in sampler.run():
        for chain, draw, got in zip(block.chain, block.draw, block.train_loss, strict=True):
            steps = range(1 + 3 * int(draw), 4 + 3 * int(draw))
            rows = torch.cat([streams.minibatch(int(chain), step, 90, 10) for step in steps])
            with torch.no_grad():
                wanted = classification_loss(model, (data[0][rows], data[1][rows])).mean()
            assert abs(got - wanted) < 1e-5


# --- the model is only read ------------------------------------------------------------------------------------------


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        {name: module.training for name, module in model.named_modules()},
        {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [id(p) for p in model.parameters()],
    )


def same(a, b):
    return (
        all(torch.equal(a[0][k], b[0][k]) for k in a[0])
        and a[1] == b[1]
        and a[3] == b[3]
        and all(
            (a[2][k] is None) == (b[2][k] is None) and (a[2][k] is None or torch.equal(a[2][k], b[2][k])) for k in a[2]
        )
    )


@pytest.mark.parametrize("size", [1, 3])
def test_the_model_is_as_it_was_at_every_yield_and_after(size):
    data, model = classes(), network()
    model[2].eval()  # a mixed mode is restored as it was
    model(data[0]).sum().backward()
    model[0].bias.grad = None
    before, generator = snapshot(model), torch.get_rng_state()
    config = settings(lr=1e-4, chain_group_size=size)
    for _ in sample_losses(model, classification_loss, data, data, config, seed=0, progress=False):
        assert same(before, snapshot(model))
    abandoned = sample_losses(model, classification_loss, data, data, config, seed=0, progress=False)
    next(abandoned)
    assert same(before, snapshot(model))
    del abandoned
    assert same(before, snapshot(model)) and torch.equal(generator, torch.get_rng_state())


def test_the_model_is_as_it_was_after_an_exception():
    data, model, calls = classes(), network(), [0]
    before = snapshot(model)

    def failing(model, batch):
        calls[0] += 1
        if calls[0] > 40:
            raise RuntimeError("the loss failed")
        return classification_loss(model, batch)

    stream = sample_losses(model, failing, data, data, settings(lr=1e-4, chain_group_size=1), seed=0, progress=False)
    with pytest.raises(RuntimeError, match="the loss failed"):
        list(stream)
    assert same(before, snapshot(model))


def test_batch_norm_and_dropout_do_not_leak():
    """A model in train() mode gives bitwise the draws of the same one in eval() mode, gradients included."""
    data, model = classes(), network()
    assert model.training
    config = settings(lr=1e-4)
    assert torch.equal(
        draws(model, classification_loss, data, data, config),
        draws(copy.deepcopy(model).eval(), classification_loss, data, data, config),
    )


class Counting(nn.Module):
    """Writes to a buffer in eval mode too, and depends on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


def test_buffers_written_by_the_forward_are_put_back():
    data, model = classes(), Counting()
    config = settings(lr=1e-4, chain_group_size=1)
    plain = copy.deepcopy(model.inner)
    got = draws(model, classification_loss, data, data, config)
    assert model.calls == 0
    assert torch.equal(got, draws(plain, classification_loss, data, data, config))


# --- which parameters move -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(12, 5), nn.Linear(5, 12, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.head(self.embed(x) * self.scale)


def untied_reference(tokens, config):
    """The same model with one explicit weight."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            tied = Tied()
            self.scale, self.embed = tied.scale, nn.Parameter(tied.embed.weight.detach())

        def forward(self, x):
            return (self.embed[x] * self.scale) @ self.embed.T

    return draws(One(), classification_loss, tokens, tokens, config)


@pytest.mark.parametrize("size", [1, 3])
def test_tied_parameters_move_together(size):
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.randint(12, (40,), generator=generator), torch.randint(12, (40,), generator=generator))
    config = settings(lr=1e-4, chain_group_size=size)
    reference = untied_reference(tokens, config)
    model = Tied()
    got = draws(model, classification_loss, tokens, tokens, config)
    assert got.shape == reference.shape
    by_alias = draws(model, classification_loss, tokens, tokens, config, mask="head.weight")
    only_embed = draws(model, classification_loss, tokens, tokens, config, mask={"embed.weight": True})
    assert torch.equal(by_alias, only_embed)
    assert torch.allclose(got, reference, atol=1e-5)


def moved(model, mask=None, **changed):
    """Which entries of each parameter differ from w* after a few steps."""
    data = classes()
    sampler = Sampler(
        model, classification_loss, data, data, settings(lr=1e-4, num_chains=2, **changed), seed=0, mask=mask
    )
    next(iter(sampler.run()))
    weights = FlatParameters(model, classification_loss, mask)
    parts = weights.parts(sampler.state_dict()["state"]["displacement"][0] != 0)
    return {names[0][len("model.") :]: part for names, part in zip(weights.aliases, parts, strict=True)}


def test_frozen_parameters_stay_and_masks_choose():
    model = network()
    model[0].weight.requires_grad_(False)
    assert set(moved(model)) == {"0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}
    assert set(moved(model, mask="4.*")) == {"4.weight", "4.bias"}
    assert set(moved(model, mask=["4.bias", "1.*"])) == {"1.weight", "1.bias", "4.bias"}
    entries = torch.zeros(4, 16, dtype=torch.bool)
    entries[1, 3:7] = True
    for method in METHODS:
        part = moved(model, mask={"4.weight": entries, "4.bias": True}, method=method, num_burnin_steps=1)
        assert torch.equal(part["4.weight"], entries) and part["4.bias"].all()


def test_low_precision_weights_are_sampled_in_float32():
    """In bfloat16 a step of 1e-5 on weights of order 1 would be lost; here it accumulates."""
    data = (torch.randn(40, 6).bfloat16(), torch.randint(4, (40,)))
    model = nn.Linear(6, 4).bfloat16()
    config = settings(lr=1e-10, localization=0.0, nbeta=0.0, num_chains=1, num_draws=50)
    sampler = Sampler(model, classification_loss, data, data, config, seed=0)
    stream = sampler.run()
    for _ in range(49):
        next(stream)
    assert abs(sampler.state_dict()["state"]["displacement"].std() / (1e-5 * 7) - 1) < 0.5  # sqrt(lr * 49)
    assert model.weight.dtype == torch.bfloat16


# --- divergence ------------------------------------------------------------------------------------------------------


class Barrier(nn.Module):
    """Quadratic up to |w| = 1, beyond it thrown out; ``walled`` keeps the quadratic."""

    def __init__(self, walled):
        super().__init__()
        self.w, self.walled = nn.Parameter(torch.zeros(3)), walled

    def forward(self, x):
        out = 0.5 * ((self.w - x) ** 2).sum(1)
        return out if self.walled else torch.where(self.w[0] > 1.0, -1e30 * self.w[0] ** 3, out)


def barrier_loss(model, batch):
    return model(batch)


@pytest.mark.parametrize("size", [1, 4])
def test_a_diverging_chain_dies_alone(size):
    x = 0.1 * torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    config = settings(
        lr=0.05, nbeta=4.0, localization=1.0, batch_size=5, num_chains=4, num_draws=40, chain_group_size=size
    )
    walled = draws(Barrier(True), barrier_loss, x, x, config, seed=SEED_OF_ONE_DEATH)
    sampler = Sampler(Barrier(False), barrier_loss, x, x, config, seed=SEED_OF_ONE_DEATH)
    got = torch.empty_like(walled)
    with pytest.warns(UserWarning, match="diverged") as caught:
        blocks = list(sampler.run())
    for block in blocks:
        got[block.chain, block.draw] = block.losses
        assert torch.equal(block.losses.isnan().all(1), block.train_loss.isnan())
    assert len(caught) == 1 == len(sampler.dead)
    dead = next(iter(sampler.dead))
    alive = [chain for chain in range(4) if chain != dead]
    assert torch.equal(got[alive], walled[alive])
    assert got[dead, -1].isnan().all() and got[dead, 0].isfinite().all()


SEED_OF_ONE_DEATH = 0


def test_a_dead_chain_stops_costing_time():
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        return torch.where(model.w.sum() == 0, 0.0, math.inf) * (1 + model.w.sum()) + batch[:, 0]

    config = settings(batch_size=20, num_chains=3, num_draws=500, chain_group_size=1)
    sampler = Sampler(Barrier(True), loss, torch.zeros(20, 3), torch.zeros(20, 3), config, seed=0)
    with pytest.warns(UserWarning, match="diverged"):
        got = torch.cat([block.losses for block in sampler.run()])
    assert len(sampler.dead) == 3 and len(got) == 1500 and calls[0] < 200


# --- data ------------------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, i):
        return self.data[0][i], self.data[1][i]


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return zip(*self.data, strict=True)


def test_every_kind_of_data_gives_the_same_draws(monkeypatch):
    data, model, config = classes(), network(), settings(lr=1e-4)
    expected = draws(model, classification_loss, data, data, config)
    for kind in (Pairs, Stream, lambda data: TensorDataset(*data), lambda data: list(zip(*data, strict=True))):
        assert torch.equal(draws(model, classification_loss, kind(data), kind(data), config), expected)
    as_dict = {"x": data[0], "y": data[1]}
    by_name = lambda model, batch: classification_loss(model, (batch["x"], batch["y"]))
    assert torch.equal(draws(model, by_name, as_dict, as_dict, config), expected)
    monkeypatch.setattr("harmonic_triton.losskernel.sampling.data.HELD", 100)  # too large to hold: read at each use
    assert torch.equal(draws(model, classification_loss, Pairs(data), Pairs(data), config), expected)


def test_several_losses_of_a_sample_are_flattened():
    data, model, config = classes(), network(), settings(lr=1e-4)
    single = draws(model, classification_loss, data, data, config)
    twice = draws(model, lambda m, b: torch.stack([classification_loss(m, b)] * 2, 1), data, data, config)
    assert twice.shape[-1] == 2 * single.shape[-1]
    assert torch.allclose(twice[..., ::2], single, atol=1e-6) and torch.equal(twice[..., ::2], twice[..., 1::2])


# --- stability -------------------------------------------------------------------------------------------------------


def test_stability_bound_of_linear_regression():
    model, x, y = regression()
    config = settings(batch_size=N)
    A = config.nbeta * x.T @ x / N + config.localization * torch.eye(FEATURES)
    exact = 4 / torch.linalg.eigvalsh(A)[-1].item()
    got = stability_bound(model, regression_loss, (x, y), config, seed=0, num_iterations=60)
    assert abs(got / exact - 1) < 0.01
    assert exact * 0.99 <= stability_bound(model, regression_loss, (x, y), config, seed=0) <= exact * 1.25


def test_the_stability_bound_sees_past_stronger_negative_curvature():
    """H has eigenvalues 1 and -9: the bound is 4/(nbeta 1 + gamma), whatever the saddle does."""
    model = nn.Linear(2, 1, bias=False)
    saddle = lambda model, batch: (0.5 * model.weight[0, 0] ** 2 - 4.5 * model.weight[0, 1] ** 2).expand(len(batch))
    config = settings(nbeta=10.0, localization=1.0, batch_size=4)
    assert abs(stability_bound(model, saddle, torch.zeros(4, 1), config, seed=0, num_iterations=40) - 4 / 11) < 0.004


def test_the_bound_is_where_chains_diverge():
    model, x, y = regression()
    config = settings(batch_size=N, num_draws=300, num_chains=2)
    bound = stability_bound(model, regression_loss, (x, y), config, seed=0, num_iterations=60)
    spread = {}
    for factor in (0.9, 1.1):
        sampler = Sampler(
            model, regression_loss, (x, y), (x, y), dataclasses.replace(config, lr=factor * bound), seed=0
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spread[factor] = torch.cat([block.losses for block in sampler.run()])[-2:].mean().item()
        assert any("stability bound" in str(w.message) for w in caught) == (factor > 1)
    assert spread[0.9] < 10 < 1e4 < spread[1.1]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lr": 0.0}, ValueError, "lr must be > 0"),
        ({"lr": "1"}, TypeError, "lr must be a number"),
        ({"lr": math.nan}, ValueError, "lr must be finite"),
        ({"nbeta": -1.0}, ValueError, "nbeta"),
        ({"localization": math.inf}, ValueError, "localization"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"num_chains": 2.0}, TypeError, "num_chains must be an int"),
        ({"num_draws": 0}, ValueError, "num_draws"),
        ({"num_burnin_steps": -1}, ValueError, "num_burnin_steps"),
        ({"method": "adam"}, ValueError, "'sgld', 'rmsprop', 'sgnht'"),
        ({"method": "rmsprop"}, ValueError, "burn-in"),
        ({"rmsprop_decay": 1.5}, ValueError, "rmsprop_decay"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size"),
        ({"num_draws": 2**32}, ValueError, "2^32"),
    ],
)
def test_settings_are_checked(changes, error, words):
    with pytest.raises(error, match=words.replace("^", r"\^")):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module"),
        ({"per_sample_loss": None}, TypeError, "per_sample_loss must be callable"),
        ({"per_sample_loss": lambda m, b: classification_loss(m, b).mean()}, ValueError, "reduction='none'"),
        ({"per_sample_loss": lambda m, b: m(b[0]).argmax(1)}, TypeError, "floating tensor"),
        ({"per_sample_loss": lambda m, b: classification_loss(m, b) / 0}, ValueError, "not finite at the trained"),
        ({"config": None}, TypeError, "SGLDConfig"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"config": settings(batch_size=91)}, ValueError, "exceeds the 90 training samples"),
        ({"train_data": (torch.zeros(3, 6), torch.zeros(4))}, ValueError, "train_data: every tensor"),
        ({"eval_data": ()}, ValueError, "eval_data has no samples"),
        ({"eval_data": 5}, TypeError, "eval_data must be"),
        ({"train_data": [torch.zeros(2), torch.zeros(3)]}, ValueError, "default_collate"),
        ({"mask": "nothing.*"}, ValueError, "match no parameter"),
        ({"mask": {"nothing": True}}, ValueError, "no parameter of the model"),
        ({"mask": {"0.bias": torch.ones(3, dtype=torch.bool)}}, ValueError, "bool tensor of shape"),
        ({"mask": {"0.bias": 1}}, TypeError, "True or False"),
        ({"mask": {}}, ValueError, "no parameter is sampled"),
        ({"chains": [0, 0]}, ValueError, "chains must be distinct"),
        ({"chains": [3]}, ValueError, "between 0 and 2"),
    ],
)
def test_arguments_are_checked(changes, error, words):
    arguments = {
        "model": network(), "per_sample_loss": classification_loss, "train_data": classes(), "eval_data": classes(),
        "config": settings(), "seed": 0, "mask": None, "chains": None, **changes,
    }  # fmt: skip
    positional = [arguments.pop(name) for name in ("model", "per_sample_loss", "train_data", "eval_data", "config")]
    with pytest.raises(error, match=words):
        Sampler(*positional, **arguments)


def test_a_group_that_vmap_cannot_run_is_refused_and_the_automatic_one_is_a_loop():
    branching = lambda model, batch: classification_loss(model, batch) * (2 if model[0].weight.sum().item() > 0 else 1)
    data, model = classes(), network()
    with pytest.raises(ValueError, match=r"torch\.func\.vmap"):
        Sampler(model, branching, data, data, settings(chain_group_size=2), seed=0)
    assert Sampler(model, branching, data, data, settings(), seed=0).groups == [[0], [1], [2]]
    assert Sampler(model, classification_loss, data, data, settings(), seed=0).groups == [[0, 1, 2]]
    many = Sampler(model, classification_loss, data, data, settings(num_chains=40), seed=0)
    assert [len(group) for group in many.groups] == [20, 20]
    images = (torch.zeros(40, 1, 8, 8), torch.zeros(40, dtype=torch.int64))
    convolutional = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    assert len(Sampler(convolutional, classification_loss, images, images, settings(), seed=0).groups) == 3


def test_arguments_are_checked_before_the_first_draw_is_asked_for():
    with pytest.raises(TypeError, match="model"):
        sample_losses(None, classification_loss, classes(), classes(), settings(), seed=0)


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_tqdm", [False, True])
def test_progress(without_tqdm, capsys, monkeypatch):
    if without_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    data = classes()
    list(sample_losses(network(), classification_loss, data, data, settings(lr=1e-4), seed=0))
    said = capsys.readouterr()
    assert said.out == ""
    for word in ("30/30", "excess loss", "0 of 3 chains dead"):
        assert word in said.err


def test_numpy_is_not_touched():
    """The global generators are left alone."""
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    data = classes()
    draws(network(), classification_loss, data, data, settings(lr=1e-4))
    assert (before == np.random.get_state()[1]).all()


def test_a_state_loaded_into_a_running_sampler_is_where_it_goes_on():
    data = classes()
    config = settings(lr=1e-4, num_chains=2, num_draws=6)
    sampler = Sampler(network(), classification_loss, data, data, config, seed=0)
    stream = sampler.run()
    next(stream)
    state = sampler.state_dict()
    first = [next(stream).losses.clone() for _ in range(2)]
    sampler.load_state_dict(state)
    again = [next(stream).losses.clone() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_weight_that_is_not_finite_ends_its_chain(value):
    """One that the model does not even read, so that it makes no other one infinite."""
    data, model = classes(), network()
    model.register_parameter("spare", nn.Parameter(torch.zeros(3)))  # the first of the sampled ones
    config = settings(lr=1e-4, localization=0.0, num_chains=2, chain_group_size=2, num_draws=5)
    sampler = Sampler(model, classification_loss, data, data, config, seed=0)
    stream = sampler.run()
    next(stream)
    state = sampler.state_dict()
    state["state"]["displacement"][1, 1] = value
    sampler.load_state_dict(state)
    with pytest.warns(UserWarning, match="chain 1 diverged by step"):
        losses = next(stream).losses
    assert list(sampler.dead) == [1] and losses.isfinite().all(1).tolist() == [True, False]


@pytest.mark.parametrize("localization", [0.0, 3.0])
def test_the_bound_of_a_concave_loss_is_that_of_the_localization(localization):
    """All curvature is negative: nothing but gamma holds the chain, whatever a few iterations make of the other end."""
    model = nn.Linear(3, 1, bias=False)
    data = (torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(40))
    concave = lambda model, batch: -model(batch[0]).squeeze(1).square()
    config = SGLDConfig(lr=1e-3, nbeta=50, localization=localization, batch_size=40, num_chains=1, num_draws=2)
    bound = stability_bound(model, concave, data, config, seed=0)
    assert bound == pytest.approx(4 / localization) if localization else bound == math.inf
