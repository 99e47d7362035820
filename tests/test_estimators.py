"""Estimators against their definitions written out, closed forms, and numbers of other programs."""

import math

import numpy as np
import pytest
import torch

from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.convergence import autocorrelation_time, gelman_rubin, split_half_cka
from harmonic_triton.losskernel.estimators import (
    bif,
    cka,
    cka_of_factors,
    correlation_distance,
    knn_purity,
    llc,
    memorization_auc,
    pc1,
    principal_components,
    roc_auc,
    same_label_confound,
    singular_fluctuation,
    standardized,
    taxonomic_lift,
    unsigned_auc,
)


def traces(draws=200, size=40, seed=0):
    """Correlated losses with mean 2: every sample follows a mixture of three directions and noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(draws, 3, generator=generator, dtype=torch.float64)
    mix = torch.randn(3, size, generator=generator, dtype=torch.float64)
    return 2 + 0.05 * (common @ mix + torch.randn(draws, size, generator=generator, dtype=torch.float64))


def autoregressive(phi, chains, draws, seed=0):
    """AR(1) chains from their stationary distribution; the integrated autocorrelation time is (1 + φ)/(1 - φ)."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((chains, draws))
    out = np.empty((chains, draws))
    out[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for t in range(1, draws):
        out[:, t] = phi * out[:, t - 1] + noise[:, t]
    return torch.from_numpy(out)


# --- kernels -----------------------------------------------------------------------------------------------------------


def test_cka_is_the_centred_alignment(monkeypatch):
    k, other = (x.T @ x + 5 for x in (traces(seed=0), traces(seed=1)))
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    a, b = h @ k @ h, h @ other @ h
    wanted = ((a * b).sum() / (a.norm() * b.norm())).item()
    assert cka(k, other) == pytest.approx(wanted, rel=1e-10)  # fp64 sums of 1,600 terms
    monkeypatch.setattr(estimators, "BLOCK", 90)  # two rows at a time
    assert cka(k, other) == pytest.approx(wanted, rel=1e-10)
    assert cka(k, 3 * k + 7) == pytest.approx(1.0, abs=1e-12)  # scale and a constant are centred away
    assert cka(k.float(), other.float()) == pytest.approx(wanted, rel=1e-4)  # fp32 entries of 200 x a spread of 0.05²
    assert math.isnan(cka(k, torch.ones(40, 40)))


def test_cka_of_factors_is_the_cka_of_their_kernels():
    x, y = standardized(traces(100)), standardized(traces(70, seed=3))
    assert cka_of_factors(x, y) == pytest.approx(cka(x.T @ x, y.T @ y), rel=1e-10)


def test_split_half_cka_grows_with_the_draws_and_compares_chains():
    few, many = (traces(draws * 4).reshape(4, draws, 40) for draws in (20, 2000))
    assert split_half_cka(few) < split_half_cka(many)
    assert split_half_cka(many) > 0.99
    even, odd = (standardized(few[half::2].flatten(0, 1)) for half in (0, 1))
    assert split_half_cka(few) == pytest.approx(cka(even.T @ even, odd.T @ odd), rel=1e-10)


def test_principal_components_are_those_of_the_centred_matrix():
    z = standardized(traces())
    rho = z.T @ z
    h = torch.eye(40, dtype=torch.float64) - 1 / 40
    values, vectors = torch.linalg.eigh(h @ rho @ h)
    found = principal_components(rho, 3)
    for i in range(3):
        cosine = (found.coordinates[:, i] @ vectors[:, -1 - i]).abs() / found.coordinates[:, i].norm()
        assert cosine > 1 - 1e-9
        assert found.coordinates[:, i].square().sum() == pytest.approx(values[-1 - i].item(), rel=1e-6)
    torch.testing.assert_close(found.share, values.flip(0)[:3] / values.sum(), rtol=1e-6, atol=0)
    assert (found.coordinates.pow(3).sum(0) > 0).all()
    trace = (h @ rho @ h).trace().item()
    by_product = principal_components(lambda v: z.T @ (z @ v), 3, trace=trace, size=40)
    torch.testing.assert_close(by_product, found)
    torch.testing.assert_close(pc1(rho), found.coordinates[:, 0])


def test_distances_of_correlations():
    rho = torch.tensor([1.0, 0.5, 0.0, -1.0, 1.0 + 1e-7])
    torch.testing.assert_close(correlation_distance(rho), torch.tensor([0.0, 1.0, 2**0.5, 2.0, 0.0]))
    torch.testing.assert_close(correlation_distance(rho, "linear"), torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]))
    assert rho[1] == 0.5  # the argument is left as it was
    z = standardized(traces())
    euclidean = torch.cdist(z.T.contiguous(), z.T.contiguous())
    # Near 0 the square root makes 1e-16 of rounding in rho 1e-8 of distance.
    torch.testing.assert_close(correlation_distance(z.T @ z), euclidean, rtol=1e-6, atol=1e-7)


# --- scores ------------------------------------------------------------------------------------------------------------


def test_roc_auc_counts_ordered_pairs():
    scores = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.2, 0.8])
    labels = torch.tensor([0, 1, 0, 1, 0, 0])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1].tolist() for n in scores[labels == 0].tolist()]
    wanted = sum(pairs) / len(pairs)
    assert roc_auc(scores, labels) == pytest.approx(wanted)
    assert roc_auc(-scores, labels) == pytest.approx(1 - wanted)
    assert unsigned_auc(-scores, labels) == unsigned_auc(scores, labels) == pytest.approx(max(wanted, 1 - wanted))
    with pytest.raises(ValueError, match="two values, got 1"):
        roc_auc(scores, torch.zeros(6))


def test_memorisation_auc_comes_with_its_control():
    memorised = torch.tensor([False, False, True, True])
    found = memorization_auc(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0]), memorised)
    assert found == (1.0, 0.75)


def test_same_label_confound_averages_pairs(monkeypatch):
    z = standardized(traces())
    rho, labels, groups = z.T @ z, torch.arange(40) % 7, torch.arange(40) // 20
    same, other = [], []
    for i in range(40):
        for j in range(40):
            if i != j and groups[i] == groups[j]:
                (same if labels[i] == labels[j] else other).append(rho[i, j].item())
    wanted = (np.mean(same), np.mean(other))
    assert same_label_confound(rho, labels, groups) == pytest.approx(wanted, rel=1e-9)
    monkeypatch.setattr(estimators, "BLOCK", 90)
    assert same_label_confound(rho, labels, groups) == pytest.approx(wanted, rel=1e-9)
    assert math.isnan(same_label_confound(rho, torch.arange(40)).same_label)


def test_knn_purity_and_missing_neighbours():
    neighbors = torch.tensor([[1, 2], [0, -1], [0, 3], [2, 0]])
    assert knn_purity(neighbors, torch.tensor([0, 0, 1, 1])) == pytest.approx(4 / 7)


def test_taxonomic_lift_on_a_tree_by_hand():
    # Root 0 with branches 1 and 2; leaves 3, 4 under 1 and 5, 6 under 2; two samples a leaf, and two on branch 2 itself.
    ancestors = torch.tensor([[0, 1, 3]] * 2 + [[0, 1, 4]] * 2 + [[0, 2, 5]] * 2 + [[0, 2, 6]] * 2 + [[0, 2, -1]] * 2)
    labels = torch.tensor([3, 3, 4, 4, 5, 5, 6, 6, 2, 2])
    neighbors = torch.tensor([[2], [4], [0], [1], [6], [8], [4], [5], [4], [0]])
    lift = taxonomic_lift(neighbors, ancestors)
    # Depth 2, d = 1: 7 of 8 neighbours share the branch; 3 of 9 others do for branch 1, 5 of 9 for branch 2.
    assert lift[2, 1] == pytest.approx((7 / 8) / ((4 * 3 / 9 + 4 * 5 / 9) / 8))
    assert lift[1, 1] == pytest.approx((1 / 2) / (5 / 9))
    assert lift[2, 0] == lift[1, 0] == 1.0
    assert lift[2, 2] == 0.0  # no neighbour has the query's own leaf; 1 of 9 others does
    excluded = taxonomic_lift(neighbors, ancestors, labels)
    assert excluded[2, 1] == pytest.approx((7 / 8) / ((4 * 2 / 8 + 4 * 4 / 8) / 8))
    assert excluded[2, 2].isnan() and excluded[0].isnan().all()
    with pytest.raises(ValueError, match="from the root at depth 0 on"):
        taxonomic_lift(neighbors, ancestors.flip(1))


def test_lift_of_random_neighbours_is_one():
    generator = torch.Generator().manual_seed(0)
    branch = torch.randint(5, (4000,), generator=generator)
    ancestors = torch.stack([torch.zeros(4000, dtype=torch.int64), branch], 1)
    neighbors = torch.randint(4000, (4000, 10), generator=generator)
    # 40,000 pairs, a fifth of them hits: a standard error of 1 %.
    assert taxonomic_lift(neighbors, ancestors)[1, 1] == pytest.approx(1.0, abs=0.04)


# --- singular learning theory ------------------------------------------------------------------------------------------


def test_llc_and_singular_fluctuation_of_a_regular_model_are_half_its_parameters():
    # Linear regression of d weights, noise 1, ℓ = r²/2 and β = 1: the posterior is N(ŵ, (XᵀX)⁻¹), where λ = d/2 exactly;
    # ν tends to d/2 as n grows (Watanabe 2009, section 6.4).
    generator = torch.Generator().manual_seed(0)
    n, d, draws = 4000, 6, 20_000
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x @ torch.ones(d, dtype=torch.float64) + torch.randn(n, generator=generator, dtype=torch.float64)
    fitted = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    scale = torch.linalg.cholesky(torch.linalg.inv(x.T @ x))
    weights = fitted + torch.randn(draws, d, generator=generator, dtype=torch.float64) @ scale.T
    mean, second = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    centre = (y - x @ fitted).square() / 2
    for chunk in weights.split(2000):
        shifted = (y - chunk @ x.T).square() / 2 - centre
        mean += shifted.sum(0) / draws
        second += shifted.square().sum(0) / draws
    variance = second - mean**2
    # λ̂ is the mean of χ²_d / 2: a standard error of sqrt(d/2) / sqrt(draws) = 0.012.
    assert llc((centre + mean).mean().item(), centre.mean().item(), n) == pytest.approx(d / 2, abs=0.05)
    # ν̂ differs from d/2 by O(1/sqrt(n)): the residuals' mean square is 1 within 2.2 %.
    assert singular_fluctuation(variance, 1.0) == pytest.approx(d / 2, rel=0.07)
    assert singular_fluctuation(variance[:10], 2.0, n) == pytest.approx(variance[:10].mean().item() * n)


def test_bif_is_the_covariance_and_the_derivative_of_the_reweighted_mean():
    losses = traces(300, 5)
    query = losses[:, 3:5].square() + traces(300, 2, seed=9)
    found = bif(losses, query)
    np.testing.assert_allclose(found, -np.cov(losses.T, query.T)[:5, 5:], rtol=1e-10)
    torch.testing.assert_close(bif(losses, query[:, 0]), found[:, 0])
    # Giving sample i the weight δ more turns each draw's weight into exp(-δ ℓ_i).
    delta = 1e-4
    for i in range(5):
        up, down = (torch.softmax(sign * delta * losses[:, i], 0) @ query[:, 0] for sign in (-1.0, 1.0))
        derivative = (up - down) / (2 * delta) * 300 / 299  # over T, where the covariance is over T - 1
        assert derivative.item() == pytest.approx(found[i, 0].item(), rel=1e-4)


# --- chains ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_autoregressive_chains(phi):
    wanted = (1 + phi) / (1 - phi)
    found = autocorrelation_time(autoregressive(phi, 8, 20_000))
    # Standard error about sqrt(2 (2 W + 1) / CT) with a window W of 6 τ (Sokal 1997): 4 % at φ = 0.9, less below.
    assert found.item() == pytest.approx(wanted, rel=0.1)


def test_negative_autocorrelation_gives_a_time_below_one():
    assert autocorrelation_time(autoregressive(-0.5, 8, 5000)).item() == pytest.approx(1 / 3, rel=0.15)


def test_constant_and_batched_draws():
    draws = torch.stack([autoregressive(0.5, 4, 101), torch.full((4, 101), 3.0), autoregressive(0.9, 4, 101)], 2)
    for estimator in (gelman_rubin, autocorrelation_time):
        found = estimator(draws)
        assert found[1].isnan() and found[[0, 2]].isfinite().all()
        for i in (0, 2):
            torch.testing.assert_close(found[i], estimator(draws[:, :, i]))


def test_gelman_rubin_sees_chains_apart_and_drift():
    draws = autoregressive(0.3, 4, 1000)
    assert gelman_rubin(draws) < 1.01
    apart = draws.clone()
    apart[2] += 3
    assert gelman_rubin(apart) > 1.3
    drift = draws + torch.linspace(0, 4, 1000)  # the same in every chain: only the split shows it
    assert gelman_rubin(drift) > 1.3


@pytest.mark.parametrize(
    ("phi", "r_hat", "tau"),
    [
        (-0.5, 1.0030268813741003, 0.4599115392262674),
        (0.0, 1.005334773726882, 1.0731396777096487),
        (0.5, 1.0068988550724223, 3.052986776530137),
        (0.9, 1.037838022699976, 23.53985188200998),
    ],
)
def test_against_arviz(phi, r_hat, tau):
    """Values of arviz 0.23.4 on these chains: ``rhat(method="split")`` and CT / ``ess(method="mean")``."""
    draws = autoregressive(phi, 4, 500) + torch.tensor([0, 0.2, 0, -0.1], dtype=torch.float64)[:, None]
    assert gelman_rubin(draws).item() == pytest.approx(r_hat, rel=1e-12)
    # arviz adds the first odd term after the cut, at most the last pair of the sum.
    assert autocorrelation_time(draws).item() == pytest.approx(tau, rel=0.02)


def test_bad_arguments_are_named():
    for call, error, words in (
        (lambda: cka(torch.ones(3, 4), torch.ones(3, 4)), ValueError, r"first must be a floating \(m, m\).*\(3, 4\)"),
        (lambda: cka(torch.ones(3, 3), torch.ones(4, 4)), ValueError, r"\(3, 3\) and second \(4, 4\)"),
        (lambda: cka([1], torch.ones(4, 4)), TypeError, "first must be a torch.Tensor"),
        (lambda: cka_of_factors(torch.ones(3, 4), torch.ones(3, 5)), ValueError, "4 samples and second 5"),
        (lambda: principal_components(torch.eye(4), 4), ValueError, "less than m = 4"),
        (lambda: correlation_distance(torch.ones(2), "cosine"), ValueError, "'cosine'"),
        (lambda: gelman_rubin(torch.ones(4, 3)), ValueError, "4 draws or more"),
        (lambda: split_half_cka(torch.ones(4, 3)), ValueError, r"\(chains, draws, m\)"),
        (lambda: knn_purity(torch.ones(4, 3), torch.ones(4)), ValueError, r"\(m, k\) int64"),
        (lambda: same_label_confound(torch.eye(4), torch.ones(3).long()), ValueError, r"shape \(4,\)"),
        (lambda: bif(torch.ones(4, 3), torch.ones(3)), ValueError, "same T >= 2"),
        (lambda: taxonomic_lift(torch.ones(4, 1).long(), torch.zeros(3, 1).long()), ValueError, "m = 4"),
    ):
        with pytest.raises(error, match=words):
            call()
