"""LossTraces: what is stored survives, what is asked of it agrees with dense fp64, neighbours agree with brute force."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch

from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.traces import neighbors
from harmonic_triton.losskernel.traces.traces import LossTraces

ROOT = Path(__file__).parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.*", "ignore:invalid value:RuntimeWarning:numpy.*"
)


@functools.cache
def autocorrelated(draws: int = 30_000, samples: int = 500, chains: int = 30) -> np.ndarray:
    """(draws, samples) fp32, AR(1) with coefficient 0.9 in every chain, correlated by eight factors."""
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((draws // chains, chains, 8 + samples), dtype=np.float32)
    state = noise[0]
    path = np.empty_like(noise)
    for step, new in enumerate(noise):
        state = 0.9 * state + math.sqrt(1 - 0.9**2) * new
        path[step] = state
    path = path.transpose(1, 0, 2).reshape(draws, -1)
    mixing = generator.standard_normal((8, samples)).astype(np.float32) / 3
    return path[:, 8:] + path[:, :8] @ mixing


def small(draws: int = 40, samples: int = 150, seed: int = 0) -> torch.Tensor:
    """(draws, samples) fp32 losses with correlations of both signs."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(draws, 6, generator=generator) @ torch.randn(6, samples, generator=generator)
    return 2 + 0.01 * (factors + torch.randn(draws, samples, generator=generator))


def filled(losses: torch.Tensor, batch: int = 16, **options) -> LossTraces:
    traces = LossTraces(losses.shape[1], **{"device": losses.device, **options})
    for start in range(0, len(losses), batch):
        traces.update(losses[start : start + batch])
    return traces


def same(one: LossTraces, other: LossTraces) -> bool:
    """Bitwise, in all they hold."""
    return (
        torch.equal(one.draws(), other.draws())
        and torch.equal(one.chains, other.chains)
        and one.dead == other.dead
        and torch.equal(one.reference, other.reference)
        and torch.equal(one.mean(), other.mean())
        and torch.equal(one.variance(), other.variance())
    )


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.05, 0.0005])
def test_correlation_of_autocorrelated_losses(spread):
    """fp32: products summed over at most 1024 draws at 6e-8, a few 1e-7 of the whole; held to 5e-6.

    bf16: a value is off by 2^-8/sqrt(3) at most, 1.6e-3 rms; a correlation by that times sqrt(2 E[x^2 y^2]/T), 2.2e-5,
    five times that at the worst of 125,000 pairs and up to three for a reference some spreads from the mean: 3e-4.
    Mean and variance do not see the storage: fp64 sums of fp32 losses, 1e-12 after a subtraction of (distance/spread)^2.
    """
    losses = torch.from_numpy(2 + spread * autocorrelated())
    exact = losses.double().numpy()
    want = np.corrcoef(exact.T)
    for dtype, bound in (("fp32", 5e-6), ("bf16", 5e-4)):
        traces = filled(losses, 1000, dtype=DTYPES[dtype], capacity=len(losses))
        assert np.abs(traces.correlation(slice(None)).numpy() - want).max() <= bound
        np.testing.assert_allclose(traces.mean().numpy(), exact.mean(0), rtol=1e-12)
        np.testing.assert_allclose(traces.variance().numpy(), exact.var(0, ddof=1), rtol=1e-10)
        covariance = traces.covariance(slice(0, 50), range(100, 200)).double().numpy()
        scale = exact.std(0, ddof=1)
        assert np.abs(covariance / scale[:50, None] / scale[100:200] - want[:50, 100:200]).max() <= bound


def stored_covariance(traces: LossTraces, correlation: bool) -> np.ndarray:
    """Dense, in fp64, from the stored values; 0 where a variance is 0."""
    covariance = np.cov(traces.draws().double().cpu().numpy().T)
    if not correlation:
        return covariance
    scale = np.sqrt(covariance.diagonal())
    return np.divide(
        covariance, np.outer(scale, scale), where=np.outer(scale, scale) > 0, out=np.zeros_like(covariance)
    )


@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_products_with_vectors(correlation, centered):
    """fp64 throughout, with a sample of no variance among them."""
    losses = small()
    losses[:, 3] = 1.7
    traces = filled(losses)
    dense = stored_covariance(traces, correlation)
    if centered:
        dense = dense - dense.mean(0) - dense.mean(0)[:, None] + dense.mean()
    v = torch.randn(150, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = traces.matvec(v, correlation=correlation, centered=centered)
    np.testing.assert_allclose(got.numpy(), dense @ v.numpy(), atol=1e-12 * np.abs(dense).sum(0).max() * 4)
    assert got.dtype == torch.float64
    torch.testing.assert_close(traces.matvec(v[:, 0].float(), correlation=correlation, centered=centered),
                               traces.matvec(v[:, :1].float(), correlation=correlation, centered=centered)[:, 0],
                               rtol=0.0, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("correlation", [False, True])
def test_eigenvectors_by_an_iterative_solver(correlation):
    """Eigenvalues to solver precision, vectors to that over the gaps (about 0.1 of the largest here)."""
    linalg = pytest.importorskip("scipy.sparse.linalg")
    traces = filled(small())
    operator = traces.linear_operator(correlation=correlation, centered=True)
    values, vectors = linalg.eigsh(operator, k=3, which="LA")
    dense = stored_covariance(traces, correlation)
    dense = dense - dense.mean(0) - dense.mean(0)[:, None] + dense.mean()
    want_values, want_vectors = np.linalg.eigh(dense)
    np.testing.assert_allclose(values, want_values[-3:], rtol=1e-10)
    overlaps = np.abs(np.sum(vectors * want_vectors[:, -3:], 0))
    np.testing.assert_allclose(overlaps, 1.0, atol=1e-10)


def test_blocks_by_slice_index_and_mask():
    """One matrix, whatever the way its entries are named; fp32 results of products that are the same."""
    losses = small()
    losses[:, 3] = 1.7
    traces = filled(losses)
    dense = torch.from_numpy(stored_covariance(traces, True)).float()
    mask = torch.arange(150) % 7 == 3
    index = [5, 3, -1, 5]
    torch.testing.assert_close(traces.correlation(mask), dense[mask][:, mask], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(traces.correlation(slice(2, 9), index), dense[2:9][:, index], rtol=0.0, atol=1e-6)
    torch.testing.assert_close(traces.correlation(np.array(index), mask), dense[index][:, mask], rtol=0.0, atol=1e-6)
    assert (traces.correlation([3], slice(None)) == 0).all()
    assert traces.correlation([]).shape == (0, 0)
    covariance = traces.covariance(slice(None)).double().numpy()
    assert np.linalg.eigvalsh(covariance).min() >= -1e-6 * np.linalg.eigvalsh(covariance).max()
    assert np.array_equal(covariance, covariance.T)


def test_drift_is_warned_of_and_spares_mean_and_variance():
    """A reference 60 spreads away: bf16 keeps steps of 2^-8 * 60 = 0.25 spreads, some 4e-3 of the variance."""
    losses = small(draws=2000)
    losses[1:, :70] += 60 * losses[1:, :70].std(0)
    traces = filled(losses, 1)
    with pytest.warns(RuntimeWarning, match="the losses of 70 of 150 samples have drifted"):
        traces.correlation(slice(None))
    np.testing.assert_allclose(traces.variance().numpy(), losses.double().var(0).numpy(), rtol=1e-9)
    np.testing.assert_allclose(traces.mean().numpy(), losses.double().mean(0).numpy(), rtol=1e-12)


# --- neighbours ------------------------------------------------------------------------------------------------------


def brute_force(traces: LossTraces, k: int, labels: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(indices, distances) from the dense fp64 correlation; values nearer than 1e-12 are ties, to the lower index."""
    rho = stored_covariance(traces, True)
    squares = np.round(2 * (1 - rho), 12)
    np.fill_diagonal(squares, np.inf)
    if labels is not None:
        labels = labels.cpu().numpy()
        squares[labels[:, None] == labels] = np.inf
    width = max(k, len(rho))
    squares = np.pad(squares, ((0, 0), (0, width - len(rho))), constant_values=np.inf)
    indices = np.argsort(squares, 1, kind="stable")[:, :k]
    distances = np.sqrt(np.maximum(np.take_along_axis(squares, indices, 1), 0))
    return np.where(np.isinf(distances), -1, indices), distances


def check_neighbors(traces: LossTraces, k: int, labels: torch.Tensor | None = None, **options) -> None:
    """The same indices; distances to fp32 rounding and the 1e-6 that brute force itself has near 0 (sqrt of 1e-12)."""
    indices, distances = traces.neighbors(k, labels, **options)
    want_indices, want_distances = brute_force(traces, k, labels)
    assert indices.dtype == torch.int64 and distances.dtype == torch.float32
    np.testing.assert_array_equal(indices.cpu().numpy(), want_indices)
    np.testing.assert_allclose(distances.cpu().numpy(), want_distances, rtol=2e-7, atol=2e-6)


def test_keys_order_as_scores_do_and_equal_scores_by_index():
    """Whatever the sign; a zero has none."""
    scores = torch.tensor([1.0, 0.5, 0.5, 1e-40, -0.0, 0.0, -1e-40, -0.5, -1.0, -math.inf])
    indices = torch.tensor([9, 2, 3, 1, 0, 2**31 - 1, 0, 7, 1, 0])
    keys = neighbors.pack(scores, indices)
    assert torch.equal(keys, keys.sort(descending=True).values) and len(keys.unique()) == len(keys)
    assert torch.equal(neighbors.unpack_score(keys), scores) and torch.equal(neighbors.unpack_index(keys), indices)


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Both, over several tiles: m = 150 is a multiple of none."""
    monkeypatch.setitem(neighbors.PANEL, "cpu", 32)
    monkeypatch.setattr(neighbors, "ROW_PANEL", 64)
    monkeypatch.setattr(neighbors, "FINISH", 40)
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labelled", [False, True])
def test_neighbors_are_those_of_brute_force(backend, dtype, labelled):
    """With duplicates of a sample in several tiles, samples of no variance, and T that is no multiple either."""
    losses = small(draws=37)
    losses[:, [9, 60, 61, 149]] = losses[:, [40]]
    losses[:, [5, 100]] = 0.25
    labels = torch.arange(150) % 4 if labelled else None
    traces = filled(losses, dtype=DTYPES[dtype], backend=backend)
    check_neighbors(traces, 7, labels)
    assert traces.neighbors(1).distances[[9, 40, 60, 61, 149]].tolist() == [[0.0]] * 5
    assert traces.neighbors(3).indices[[5, 100]].tolist() == [[0, 1, 2]] * 2  # all equally far


def test_neighbors_over_whole_tiles():
    """The tiles as they are: three along a side, each larger than the sample that gives its first threshold."""
    traces, labels = filled(small(samples=2500)), torch.arange(2500) % 4
    check_neighbors(traces, 7, labels)
    check_neighbors(traces, 7)


def test_many_duplicates_give_the_lowest_indices(backend):
    """More than the candidates can hold: ties are decided while tiles are taken, not only at the end."""
    losses = small()
    losses[:, 20:120] = losses[:, [20]]
    check_neighbors(filled(losses, backend=backend), 5)
    check_neighbors(filled(torch.full((5, 150), 2.0), backend=backend), 6)


def test_fewer_partners_than_k(backend):
    """Everybody of one label but three; k beyond m; a row without any partner."""
    labels = torch.zeros(150, dtype=torch.int64)
    labels[[4, 80, 81]] = torch.tensor([-7, 2**40, 2**40])
    traces = filled(small(), backend=backend)
    check_neighbors(traces, 5, labels)
    assert traces.neighbors(5, labels).indices[10, 3:].tolist() == [-1, -1]
    check_neighbors(filled(small(samples=9), backend=backend), 12)
    assert filled(small(samples=1), backend=backend).neighbors(2).indices.tolist() == [[-1, -1]]
    nobody = traces.neighbors(2, torch.ones(150, dtype=torch.int32))
    assert (nobody.indices == -1).all() and nobody.distances.isinf().all()


def test_rows_are_what_they_are_among_all(backend, monkeypatch):
    """Bitwise, whatever the range and the tiles: the work can be shared out and done again."""
    losses = small()
    losses[:, 60:90] = losses[:, [60]]
    traces, labels = filled(losses, backend=backend), torch.arange(150) % 3
    whole = traces.neighbors(6, labels)
    for rows in (range(0, 50), slice(50, 51), range(51, 150), range(70, 70)):
        part = traces.neighbors(6, labels, rows=rows)
        assert torch.equal(part.indices, whole.indices[rows.start : rows.stop])
        assert torch.equal(part.distances, whole.distances[rows.start : rows.stop])
    monkeypatch.setitem(neighbors.PANEL, "cpu", 1024)
    monkeypatch.setattr(neighbors, "ROW_PANEL", 2**15)
    assert all(map(torch.equal, traces.neighbors(6, labels), whole))


def test_backends_agree_bitwise_on_mapped_and_drifted_traces(backend, tmp_path, monkeypatch):
    """Tiles only propose: the distances are the same fp64 differences. A column panel at a time where it is mapped."""
    monkeypatch.setattr(neighbors, "COLUMN_BYTES", 40 * 2 * 40)
    losses = small()
    losses[1:] += 5 * losses.std(0)
    want = filled(losses, 1, backend="torch").neighbors(5)
    mapped = filled(losses, 1, backend=backend, path=tmp_path / "traces")
    assert all(map(torch.equal, mapped.neighbors(5), want))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_losses_are_samples_like_others(backend, dtype):
    """Leave-one-out losses of a confident model: 1e-30 beside 1. Powers of two: nothing but the exponents changes."""
    losses = small()
    traces = filled(losses, dtype=DTYPES[dtype])
    losses[:, ::3] *= 2.0**-100
    tiny = filled(losses, dtype=DTYPES[dtype], backend=backend)
    assert all(map(torch.equal, tiny.neighbors(5), traces.neighbors(5)))
    torch.testing.assert_close(tiny.correlation(slice(None)), traces.correlation(slice(None)), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(tiny.covariance([1]), traces.covariance([1]))
    losses[:, ::3] *= 2.0**-20  # a spread below 1e-35: as good as constant, and no NaN
    none = filled(losses, dtype=DTYPES[dtype], backend=backend)
    assert none.neighbors(3).indices[::3].tolist() == [[1, 2, 3], *[[0, 1, 2]] * 49]
    assert (none.correlation(slice(0, None, 3), slice(None)) == 0).all()


def test_labels_of_any_integers_and_arrays():
    traces, labels = filled(small()), torch.randint(5, (150,), generator=torch.Generator().manual_seed(0))
    want = traces.neighbors(4, labels).indices
    for given in (labels.tolist(), labels.numpy().astype(np.int8), (labels - 3) * 10**12, labels.to(torch.uint8)):
        assert torch.equal(traces.neighbors(4, given).indices, want)


def test_progress_is_reported(backend, capsys):
    """To a function, tile by tile; as a bar."""
    seen = []
    traces = filled(small(), backend=backend)
    traces.neighbors(3, progress=lambda done, total: seen.append((done, total)))
    total = seen[0][1]
    assert total > 1 and seen == [(done, total) for done in range(1, total + 1)]
    pytest.importorskip("tqdm")
    traces.neighbors(3, progress=True)
    assert f"{total}/{total}" in capsys.readouterr().err


@pytest.mark.slow  # umap compiles itself first
def test_umap_takes_the_neighbors():
    """Two groups that share a factor each: the embedding of the graph separates them."""
    umap = pytest.importorskip("umap")
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(400) % 2
    losses = torch.randn(200, 2, generator=generator)[:, group] + torch.randn(200, 400, generator=generator)
    indices, distances = filled(losses).neighbors(10)
    assert (group[indices] == group[:, None]).float().mean() > 0.99
    reducer = umap.UMAP(n_neighbors=10, precomputed_knn=(indices.numpy(), distances.numpy(), None), random_state=0)
    with pytest.warns(UserWarning, match="transform"):  # new samples cannot be
        embedding = reducer.fit_transform(np.zeros((400, 1), np.float32))
    inside = np.linalg.norm(embedding[:, None] - embedding[None], axis=2)
    nearest = np.argsort(inside + 1e9 * np.eye(400), 1)[:, 0]
    assert (group.numpy()[nearest] == group.numpy()).mean() > 0.95


MEMORY = """if True:
    import json, sys, time, torch
    from harmonic_triton.losskernel.traces.traces import LossTraces
    from harmonic_triton.tools.memory import so_far
    samples, draws, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    generator = torch.Generator().manual_seed(0)
    traces = LossTraces(samples, path=path)
    mixing = torch.randn(20, samples, generator=generator)
    for _ in range(0, draws, 20):
        factors = torch.randn(20, 20, generator=generator) @ mixing
        traces.update(2 + 0.001 * (factors + torch.randn(20, samples, generator=generator)))
    before, start = so_far(), time.perf_counter()
    found = traces.neighbors(15, torch.arange(samples) // 10)
    assert found.indices.shape == (samples, 15) and found.distances.isfinite().all()
    print(json.dumps([before, so_far(), time.perf_counter() - start]))
"""


def peak_memory(samples: int, draws: int, path: Path) -> tuple[int, int, float]:
    """(peak resident bytes before the search, after it, its seconds), in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    run = subprocess.run([sys.executable, "-c", MEMORY, str(samples), str(draws), str(path)], cwd=ROOT,
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return tuple(json.loads(run.stdout))


def test_no_matrix_is_formed(tmp_path):
    """m = 16,000: the matrix has 1 GiB in fp32; tiles of 1024 x 1024, keys and the finish take under 150 MiB."""
    before, after, _ = peak_memory(16_000, 40, tmp_path)
    assert after - before < 150 * 2**20


@pytest.mark.slow
def test_a_hundred_thousand_samples_within_a_gibibyte(tmp_path):
    """m = 100,000, T = 200: the matrix has 37 GiB. Printed: seconds and the peak of the whole process."""
    _, after, seconds = peak_memory(100_000, 200, tmp_path)
    print(f"m = 100,000, T = 200: {seconds:.0f} s, peak resident memory {after / 2**30:.2f} GiB")
    assert after < 2**30


# --- draws in and out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mapped", [False, True])
def test_draws_come_back(mapped, dtype, tmp_path):
    """Rounded once, in order, with their chains; room grows past what was asked for."""
    losses = small()
    traces = LossTraces(150, path=tmp_path / "new" / "traces" if mapped else None, capacity=3, dtype=DTYPES[dtype])
    traces.update(losses[0], chain=4)
    traces.update(losses[1:3], chain=torch.tensor([1, 2]))
    traces.update(losses[3:40], chain=[7] * 37)
    traces.update(losses[:0], chain=[])
    assert traces.count == 40
    assert traces.chains.tolist() == [4, 1, 2, *[7] * 37]
    assert traces.chain_counts == {1: 1, 2: 1, 4: 1, 7: 37}
    assert torch.equal(traces.reference, losses[0].double())
    shifted = (losses.double() - losses[0]).to(DTYPES[dtype]).float()
    assert torch.equal(traces.draws(), shifted)
    traces.draws().zero_()  # a copy, whatever the dtype
    assert torch.equal(traces.draws(traces.chains == 2), shifted[2:3])
    assert torch.equal(traces.draws(slice(20, None), [3, 1]), shifted[20:, [3, 1]])
    mean = losses[0].double() + shifted[3:].double().mean(0)
    torch.testing.assert_close(traces.chain_means[7], mean, rtol=1e-12, atol=0.0)
    assert torch.equal(traces.chain_means[4], losses[0].double())


def test_neighbors_of_mapped_traces_are_those_of_resident_ones(tmp_path):
    losses = small()
    mapped, resident = filled(losses, path=tmp_path), filled(losses)
    assert same(mapped, resident)
    assert all(map(torch.equal, mapped.neighbors(5), resident.neighbors(5)))


def test_mean_and_variance_do_not_depend_on_the_batches():
    """Bitwise, from one first batch on: the sums take one draw after the other."""
    losses = small()
    one, other = LossTraces(150), LossTraces(150)
    for traces, batch in ((one, 1), (other, 5)):
        traces.update(losses[:10])
        for start in range(10, 40, batch):
            traces.update(losses[start : start + batch])
    assert same(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_dead_draws_are_counted_and_left_out(bad):
    """In the first batch too, whose mean is the reference; the others are as if there had been none."""
    losses, chains = small(), torch.arange(40) % 3
    damaged = losses.clone()
    damaged[[1, 4, 25], [0, 70, 149]] = bad
    traces, clean = LossTraces(150), LossTraces(150)
    alive = torch.ones(40, dtype=torch.bool)
    alive[[1, 4, 25]] = False
    traces.update(damaged[1], chain=1)
    for part in (slice(0, 1), slice(2, 20), slice(20, 40)):
        traces.update(damaged[part], chains[part])
        clean.update(losses[part][alive[part]], chains[part][alive[part]])
    assert traces.dead == {1: 3} and clean.dead == {}
    assert torch.equal(traces.mean(), clean.mean()) and torch.equal(traces.draws(), clean.draws())
    assert torch.equal(traces.chains, clean.chains)


def test_a_constant_has_no_variance():
    """Also where its fp64 mean over six draws is not the constant itself."""
    losses = torch.linspace(0.1, 9.0, 200, dtype=torch.float64).repeat(11, 1)
    losses[6:, 7] += 1.0
    traces = filled(losses, 6, dtype=torch.float32)
    assert (traces.draws()[0] != 0).any()
    assert traces.variance().nonzero().tolist() == [[7]]
    assert traces.correlation(slice(None)).nonzero().tolist() == [[7, 7]]


def test_answers_follow_the_draws():
    """Asked in between, the traces answer for what they hold by then."""
    losses = small()
    traces = LossTraces(150)
    for part in (slice(0, 15), slice(15, 40)):
        traces.update(losses[part])
        fresh = LossTraces(150)
        fresh.update(losses[:15])
        fresh.update(losses[15 : part.stop])
        assert torch.equal(traces.correlation(slice(None)), fresh.correlation(slice(None)))
        assert all(map(torch.equal, traces.neighbors(5), fresh.neighbors(5)))


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("after", [0, 12])
def test_a_checkpoint_drops_what_came_later(mapped, after, tmp_path):
    """From a file as torch.save writes it; then the rest is done again and the numbers are those of one run."""
    losses, path = small(), tmp_path / "traces" if mapped else None
    losses[14, 3] = math.nan
    want = filled(losses, 4)
    traces = LossTraces(150, path=path)
    for start in range(0, after, 4):
        traces.update(losses[start : start + 4])
    torch.save(traces.state_dict(), tmp_path / "checkpoint")
    for start in range(after, 28, 4):
        traces.update(losses[start : start + 4], chain=9)
    del traces
    resumed = LossTraces(150, path=path)
    assert resumed.count == (27 if mapped else 0)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint"))
    assert resumed.count == after and resumed.dead == {}
    if mapped:
        assert LossTraces.open(path).count == after
    for start in range(after, 40, 4):
        resumed.update(losses[start : start + 4])
    assert same(resumed, want) and resumed.dead == {0: 1}
    if mapped:
        del resumed
        assert same(LossTraces.open(path), want)


def step(batch: int) -> torch.Tensor:
    """(3, 20000) draws; some of them dead."""
    losses = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(batch))
    if batch % 5 == 0:
        losses[1, batch] = math.nan
    return losses


def work(path: Path, batches: int) -> None:
    """What a run does: open, see how far it came, go on."""
    torch.set_num_threads(1)
    traces = LossTraces(20_000, path=path)
    for batch in range((traces.count + sum(traces.dead.values())) // 3, batches):
        traces.update(step(batch), chain=[batch, 1, 2])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked, to start soon")
def test_killed_at_any_moment(tmp_path):
    """SIGKILL after a random time, most of which passes in updates; what is resumed ends bitwise as if undisturbed."""
    batches, dice, processes = 60, random.Random(0), multiprocessing.get_context("fork")
    work(tmp_path / "whole", batches)
    kills = counts = 0
    while True:
        process = processes.Process(target=work, args=(tmp_path / "killed", batches))
        process.start()
        process.join(dice.uniform(0.0, 0.004) * (kills + 1))  # longer and longer: it gets to its end
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert kills < 300
        if (tmp_path / "killed" / "state.pt").exists():
            counts = LossTraces.open(tmp_path / "killed").count
    assert kills >= 3 and counts > 0
    assert same(LossTraces.open(tmp_path / "killed"), LossTraces.open(tmp_path / "whole"))


def test_what_a_killed_process_leaves_does_not_count(tmp_path):
    """Draws that no state counts, half a state beside the last: the last complete update is what there is."""
    losses = small()
    want = filled(losses, 8)
    filled(losses[:24], 8, path=tmp_path)
    with open(tmp_path / "draws.bin", "ab") as file:
        file.write(b"\xff" * 12_345)
    (tmp_path / ".state.pt.0123456789abcdef.tmp").write_bytes(b"PK half")
    traces = LossTraces.open(tmp_path)
    assert traces.count == 24
    for start in range(24, 40, 8):
        traces.update(losses[start : start + 8])
    del traces
    assert same(LossTraces.open(tmp_path), want)


def test_one_writer_at_a_time(tmp_path):
    """Readers see the draws of their opening; another writer is refused, and so is one whose view is out of date."""
    losses = small()
    first, reader = filled(losses[:16], path=tmp_path), LossTraces.open(tmp_path)
    with pytest.raises(RuntimeError, match="written by another object or thread of this process"):
        reader.update(losses[16])
    first.update(losses[16:32])
    assert reader.count == 16 and torch.equal(reader.draws(), first.draws(slice(16)))
    first.close()
    with pytest.raises(RuntimeError, match="open it again"):
        reader.update(losses[16])
    again = LossTraces.open(tmp_path)
    again.update(losses[32:])
    with pytest.raises(RuntimeError, match="another object"):
        first.update(losses[16])
    assert first.count == 32 and torch.equal(first.draws(), again.draws(slice(32)))
    assert same(again, filled(losses, path=tmp_path / "whole"))


# --- refusals --------------------------------------------------------------------------------------------------------

BAD_CONSTRUCTION = {
    "num_samples": ({"num_samples": 0}, ValueError, "at least 1"),
    "float samples": ({"num_samples": 2.0}, TypeError, "num_samples must be an int"),
    "fp16": ({"dtype": torch.float16}, ValueError, "heavy-tailed"),
    "fp64": ({"dtype": torch.float64}, ValueError, "bfloat16 or torch.float32"),
    "backend": ({"backend": "reference"}, ValueError, "'auto', 'triton' or 'torch'"),
    "capacity": ({"capacity": -1}, ValueError, "capacity"),
}


@pytest.mark.parametrize("case", BAD_CONSTRUCTION)
def test_bad_construction(case):
    options, error, message = BAD_CONSTRUCTION[case]
    with pytest.raises(error, match=message):
        LossTraces(**{"num_samples": 3, **options})


BAD_CALLS = {
    "no tensor": (lambda t: t.update([1.0, 2.0, 3.0]), TypeError, "losses must be a torch.Tensor"),
    "ints": (lambda t: t.update(torch.ones(3, dtype=torch.int64)), TypeError, "losses must be floating"),
    "samples": (
        lambda t: t.update(torch.ones(2, 4)),
        ValueError,
        r"the 3 samples of this accumulator, got Tensor of shape \(2, 4\)",
    ),
    "rank": (lambda t: t.update(torch.ones(1, 1, 3)), ValueError, "losses must be"),
    "chain": (lambda t: t.update(torch.ones(2, 3), chain=[1]), ValueError, "names 1 chains for 2 draws"),
    "chain dtype": (lambda t: t.update(torch.ones(2, 3), chain=torch.ones(2)), TypeError, "chain must hold integers"),
    "chain kind": (lambda t: t.update(torch.ones(2, 3), chain=1.0), TypeError, "chain must be an int"),
    "k": (lambda t: t.neighbors(0), ValueError, "k must be at least 1"),
    "labels": (lambda t: t.neighbors(1, [1, 2]), ValueError, "m = 3 samples"),
    "float labels": (lambda t: t.neighbors(1, torch.ones(3)), TypeError, "integer labels"),
    "rows": (lambda t: t.neighbors(1, rows=range(0, 4)), ValueError, "consecutive samples"),
    "row step": (lambda t: t.neighbors(1, rows=slice(0, 3, 2)), ValueError, "consecutive samples"),
    "row list": (lambda t: t.neighbors(1, rows=[0]), TypeError, "a range or a slice"),
    "index": (lambda t: t.covariance([3]), ValueError, "rows must lie between 0 and 2"),
    "float index": (lambda t: t.covariance([0.5]), TypeError, "rows must be"),
    "mask": (lambda t: t.draws(torch.ones(5, dtype=torch.bool)), TypeError, "a mask of 4"),
    "vector": (lambda t: t.matvec(torch.ones(4)), ValueError, "v must be floating"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, error, message = BAD_CALLS[case]
    traces = LossTraces(3)
    traces.update(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    before = traces.state_dict()
    with pytest.raises(error, match=message):
        call(traces)
    assert traces.count == before["count"]


def test_too_few_draws():
    traces = LossTraces(3)
    for call in (traces.mean, lambda: traces.neighbors(1), lambda: traces.reference):
        with pytest.raises(ValueError, match="call update first"):
            call()
    traces.update(torch.ones(3))
    with pytest.raises(ValueError, match="2 draws at least, there are 1"):
        traces.variance()


def test_too_many_neighbors_for_triton(backend):
    """Asked for by name it says so; otherwise PyTorch serves."""
    traces = filled(small(), backend=backend)
    if backend == "triton":
        with pytest.raises(ValueError, match="keeps at most k = 60"):
            traces.neighbors(61)
    check_neighbors(traces, 60 if backend == "triton" else 61)


def test_directories_of_others_are_refused(tmp_path):
    losses = small()
    filled(losses, path=tmp_path / "a")
    with pytest.raises(ValueError, match="num_samples 150, asked for 149"):
        LossTraces(149, path=tmp_path / "a")
    with pytest.raises(ValueError, match=r"dtype torch\.bfloat16"):
        LossTraces(150, path=tmp_path / "a", dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match="holds no traces"):
        LossTraces.open(tmp_path / "b")
    os.truncate(tmp_path / "a" / "draws.bin", 1000)
    with pytest.raises(ValueError, match="is damaged"):
        LossTraces.open(tmp_path / "a")
    checkpoint.save(tmp_path / "a" / "state.pt", {}, "the state of loss traces, format 99")
    with pytest.raises(ValueError, match="format 99, not the state of loss traces, format 2"):
        LossTraces.open(tmp_path / "a")


def test_states_of_others_are_refused(tmp_path):
    losses = small()
    mapped, resident = filled(losses, path=tmp_path / "a"), filled(losses)
    with pytest.raises(ValueError, match="taken without path"):
        mapped.load_state_dict(resident.state_dict())
    with pytest.raises(ValueError, match="give LossTraces that path"):
        resident.load_state_dict(mapped.state_dict())
    with pytest.raises(ValueError, match="holds 16 draws, the state counts 40"):
        filled(losses[:16], path=tmp_path / "b").load_state_dict(mapped.state_dict())
    with pytest.raises(ValueError, match="another run"):
        filled(losses + 1, path=tmp_path / "c").load_state_dict(mapped.state_dict())
    with pytest.raises(ValueError, match="num_samples 150, these have 9"):
        LossTraces(9).load_state_dict(resident.state_dict())
    assert mapped.count == 40 and same(mapped, resident)


# --- the kernel, compiled --------------------------------------------------------------------------------------------

COMPILE = """if True:
    import itertools, json, re, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from benchmarks.static_cost import MATRIX, TARGETS, numbers_in, resource_usage
    from harmonic_triton.losskernel.traces.neighbors_triton import CONFIGS, neighbors_kernel as kernel
    kinds = {"row_ptr": None, "col_ptr": None, "keys_ptr": "i64", "row_label_ptr": "i32", "col_label_ptr": "i32"}
    for arch, (dtype, size), (labels, width) in itertools.product(TARGETS, {"bf16": 2, "fp32": 4}.items(), ((0, 8), (1, 64))):
        config = CONFIGS[arch, size]
        fixed = {"LABELS": bool(labels), "WIDTH": width, "UPCAST": False}
        fixed |= {"BLOCK_P": config.block_p, "BLOCK_Q": config.block_q, "BLOCK_T": config.block_t}
        fixed |= {} if labels else {"row_label_ptr": None, "col_label_ptr": None}
        signature, constants, attributes = {}, {}, {}
        for at, name in enumerate(kernel.arg_names):
            if name in fixed:
                signature[name], constants[at,] = "constexpr", fixed[name]
                continue
            pointer = name.endswith("_ptr")
            signature[name] = "*" + (kinds.get(name, "fp32") or dtype) if pointer else "i32"
            if pointer or name.startswith("stride") or name.endswith("room"):
                attributes[at,] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)
        if arch.startswith("gfx"):
            text = compiled.asm["amdgcn"]
            spills = numbers_in(r"\\.vgpr_spill_count:\\s+(\\d+)", text)[0]
        else:
            text = compiled.asm["ptx"]
            spills = resource_usage(compiled.asm["cubin"])[1]
        products = len(re.findall(MATRIX, text))
        print(json.dumps([arch, dtype, labels, width, compiled.metadata.shared, spills, products]))
"""


def test_the_kernel_compiles_for_every_architecture():
    """No spills, shared memory within limits, bf16 products on matrix units; fp32 ones not (tf32) on NVIDIA's."""
    pytest.importorskip("triton")
    static_cost = pytest.importorskip("benchmarks.static_cost")
    from harmonic_triton.losskernel.traces import neighbors_triton

    assert {arch for arch, _ in neighbors_triton.CONFIGS} == {*static_cost.TARGETS, "interpreter"}
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(COMPILE, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    costs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(costs) == len(static_cost.TARGETS) * 2 * 2
    for arch, dtype, labels, width, shared, spills, products in costs:
        where = (arch, dtype, labels, width)
        assert spills == 0, where
        assert shared <= static_cost.SHARED_LIMIT[arch], where
        assert (products > 0) == (dtype == "bf16" or arch.startswith("gfx")), where


# --- what rounding costs, and what surrounds a call ----------------------------------------------------------------------


@pytest.mark.parametrize("draws", [200, 2000])
@pytest.mark.parametrize("sigma", [None, 1.0, 2.0, 3.0])
def test_what_the_dtypes_cost_a_correlation(sigma, draws):
    """The documented bounds, on bell-shaped losses (sigma None) and on log-normal ones, whose variance few draws hold.

    Rounding multiplies every stored value by 1 + d with |d| <= u = 2^-9. By Cauchy and Schwarz a sum of products is off by
    2u of the norms at most and a norm by u, so that no correlation moves by more than 4u = 2^-7 (to first order).
    """
    generator = np.random.default_rng(draws)
    z = generator.standard_normal((draws, 8)) @ generator.standard_normal((8, 100)) / 3
    z = (z + generator.standard_normal((draws, 100))) / 1.4
    losses = torch.from_numpy(2 + 0.05 * z if sigma is None else np.exp(sigma * z))
    exact = torch.from_numpy(np.corrcoef(losses.numpy().T))
    off = {}
    for dtype in DTYPES.values():
        traces = LossTraces(100, dtype=dtype)
        traces.update(losses[:100])
        traces.update(losses[100:])
        off[dtype] = (traces.correlation(slice(None)).double() - exact).abs()
    assert off[torch.float32].max() <= 5e-6
    assert off[torch.bfloat16].max() <= (2.0**-7 if sigma else 12e-3 / math.sqrt(draws))  # five times the rms of 4,950
    assert off[torch.bfloat16].square().mean().sqrt() <= 2 * 2.4e-3 / math.sqrt(draws)
    if sigma and sigma >= 2:
        assert off[torch.bfloat16].max() > 5e-4  # a few 1e-4 would be said too soon


def test_the_kernel_of_traces_takes_float32():
    losses = small().reshape(2, 20, 150)
    narrow, wide = (
        LossKernel.from_losses(losses, keep="traces", **options) for options in ({}, {"trace_dtype": torch.float32})
    )
    assert (narrow.accumulator.dtype, wide.accumulator.dtype) == (torch.bfloat16, torch.float32)
    exact = torch.from_numpy(np.corrcoef(small().double().numpy().T))
    assert (wide.correlation - exact).abs().max() < 5e-6 < (narrow.correlation - exact).abs().max()


def test_constants_far_apart_have_no_variance():
    """Their mean over 5,000 equal draws is dozens of last places off; the squares of those are still exact."""
    losses = torch.cat(
        [
            torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5,
            torch.tensor([1e-30, 3e10]),
        ]
    )
    traces = LossTraces(42, dtype=torch.float32)
    traces.update(losses.expand(5000, 42))
    traces.update(losses.expand(777, 42))
    assert int((traces.reference != losses).sum()) > 20
    assert not traces.variance().any()


def everything(losses, backend):
    """What traces answer, and the keys that its search begins from."""
    found = []
    for dtype in DTYPES.values():
        traces = filled(losses, dtype=dtype, backend=backend)
        found += [
            traces.correlation(slice(None)),
            traces.covariance(slice(0, 9)),
            traces.matvec(losses[0]),
            traces.mean(),
        ]
        found += [traces.variance(), *traces.neighbors(5), *traces.neighbors(3, exclude_same=torch.arange(150) % 4)]
        searched = neighbors.Search(*traces.factor(), None)
        if backend == "torch":
            found.append(neighbors.torch_keys(searched, 9, range(150), None))
    return found


@pytest.mark.parametrize("surrounding", ["autocast", "medium", "float64"])
def test_what_surrounds_a_call_changes_nothing(surrounding, backend):
    losses = small()
    plain, before = everything(losses, backend), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if surrounding == "medium" else before)
        torch.set_default_dtype(torch.float64 if surrounding == "float64" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=surrounding == "autocast"):
            changed = everything(losses, backend)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(before)
    for one, other in zip(plain, changed, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.triton
@pytest.mark.parametrize("how", ["column-major", "every second", "sliced", "expanded"])
def test_the_triton_search_takes_traces_of_any_stride(how):
    """Samples apart in memory, or rows that end before the memory does: what is not there must not be read."""
    from harmonic_triton.losskernel.traces import neighbors_triton

    base = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    given = {
        "column-major": lambda: base.T.contiguous().T,
        "every second": lambda: torch.stack([base, torch.full_like(base, math.nan)], 2).flatten(1)[:, ::2],
        "sliced": lambda: torch.cat([torch.full((40, 5), math.nan), base], 1)[:, 5:],
        "expanded": lambda: base[0].expand(40, 64),
    }[how]()
    values = given.contiguous()
    centred = values.double() - values.double().mean(0)
    norm = centred.norm(dim=0)
    scale = torch.where(norm > 1e-3, norm.reciprocal(), 0.0)  # 0 for a constant, as the search has it
    scores = (values.double() * scale).T @ (values.double() * scale)
    mean = values.double().mean(0) * scale * math.sqrt(40)
    scores = (scores - torch.outer(mean, mean)).fill_diagonal_(-math.inf)
    apart = lambda vector: torch.stack([vector, torch.full_like(vector, 7)], 1)[:, 0]
    keys = neighbors.empty_keys(64, neighbors_triton.width_of(9), given.device)
    labels = apart(torch.arange(64, dtype=torch.int32) // 2)
    neighbors_triton.take(keys, given, given, 0, 0, apart(scale.float()), apart(mean.float()), labels)
    forbidden = labels[:, None] == labels
    found = neighbors.unpack_score(keys).sort(1, descending=True).values[:, :5]
    expected = scores.masked_fill(forbidden, -math.inf).topk(5).values.float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
