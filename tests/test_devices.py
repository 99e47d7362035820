"""What is read off a loss kernel, with its tensors on a second device and labels wherever the caller has them."""

from __future__ import annotations

import pytest
import torch
from second_device import DEVICE, SecondDevice
from torch import nn

from harmonic_triton.losskernel import convergence, estimators
from harmonic_triton.losskernel.about import About
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.per_sample_losses import regression_loss
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.tables import group_correlation

if torch.cuda.is_available():
    DEVICE = torch.device("cuda")  # the real thing where there is one

LABELS = torch.arange(12) % 3
ANCESTORS = torch.stack([torch.zeros(12, dtype=torch.int64), LABELS // 2, torch.where(LABELS > 1, -1, LABELS)], 1)


@pytest.fixture(autouse=True)
def second_device():
    if DEVICE.type == "cuda":
        yield
    else:
        with SecondDevice():
            yield


def draws(chains=3, length=20, samples=12):
    generator = torch.Generator().manual_seed(0)
    return 2 + 0.1 * torch.randn(chains, length, samples, generator=generator)


def kernels(keep, **options):
    """The same kernel on the CPU and on the other device."""
    options = {"keep": keep, "about": About(nbeta=10.0, num_train=12), **options}
    at_start = torch.full((12,), 1.9)
    here = LossKernel.from_losses(draws(), initial_losses=at_start, **options)
    there = LossKernel.from_losses(draws().to(DEVICE), initial_losses=at_start.to(DEVICE), **options)
    return here, there


def test_the_stand_in_refuses_what_a_gpu_refuses():
    here, there = torch.arange(4), torch.arange(4).to(DEVICE)
    assert there.device.type == DEVICE.type
    for mixed in (lambda: here + there, lambda: torch.where(here > 1, here, there), lambda: here[there],
                  lambda: torch.cat([here, there])):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            mixed()
    assert (there + here.sum()).cpu().tolist() == [6, 7, 8, 9]
    assert there[here].device == there.device


@pytest.mark.parametrize("labels_at", ["cpu", DEVICE])
@pytest.mark.parametrize("keep", ["covariance", "traces"])
def test_everything_a_kernel_tells(keep, labels_at):
    labels = LABELS.to(labels_at)
    here, _ = kernels(keep, labels=LABELS)
    _, there = kernels(keep, labels=labels)

    def same(read, tolerance=1e-5):
        torch.testing.assert_close(
            torch.as_tensor(read(there)).cpu(), torch.as_tensor(read(here)), rtol=tolerance, atol=1e-6
        )

    rows = torch.tensor([3, 7])
    for at in (rows, rows.to(labels_at)):
        same(lambda kernel: kernel.block(at if kernel is there else rows))  # noqa: B023
        same(lambda kernel: kernel.block(at if kernel is there else rows, rows))  # noqa: B023
        same(lambda kernel: kernel.bif(at if kernel is there else rows))  # noqa: B023
    same(lambda kernel: kernel.product(torch.ones(12, dtype=torch.float64)))
    same(lambda kernel: kernel.distance())
    for exclude in (None, True, labels):
        found, expected = (
            there.neighbors(4, exclude_same=exclude),
            here.neighbors(4, exclude_same=None if exclude is None else LABELS),
        )
        assert torch.equal(found[0].cpu(), expected[0])
        torch.testing.assert_close(found[1].cpu(), expected[1])
        table = there.neighbor_table([1, 5], 3, exclude_same=exclude)
        assert table[0].neighbors[0][0] == expected[0][1, 0]
    same(lambda kernel: kernel.principal_components(2).coordinates.abs())
    assert there.cka(here.correlation if keep == "traces" else here) == pytest.approx(1, abs=1e-5)
    assert [v.words for v in there.diagnostics.verdicts()] == [v.words for v in here.diagnostics.verdicts()]
    for name in ("llc", "empirical_variance", "singular_fluctuation"):
        same(lambda kernel: getattr(kernel, name))  # noqa: B023
    groups = torch.arange(12).to(labels_at) // 4
    same(lambda kernel: group_correlation(kernel, groups if kernel is there else groups.cpu()))


@pytest.mark.parametrize("neighbors_at", ["cpu", DEVICE])
@pytest.mark.parametrize("labels_at", ["cpu", DEVICE])
def test_estimators_take_labels_from_any_device(neighbors_at, labels_at):
    kernel, _ = kernels("covariance")
    neighbors, _ = kernel.neighbors(4)
    there = neighbors.to(neighbors_at)
    labels, ancestors = LABELS.to(labels_at), ANCESTORS.to(labels_at)
    assert estimators.knn_purity(there, labels) == estimators.knn_purity(neighbors, LABELS)
    for used in (None, LABELS):
        lift = estimators.taxonomic_lift(there, ancestors, None if used is None else used.to(labels_at))
        torch.testing.assert_close(lift.cpu(), estimators.taxonomic_lift(neighbors, ANCESTORS, used), equal_nan=True)
    rho = kernel.correlation
    assert estimators.same_label_confound(rho.to(neighbors_at), labels, LABELS // 2) == estimators.same_label_confound(
        rho, LABELS, LABELS // 2
    )
    scores = rho[0].to(neighbors_at)
    positive = (LABELS == 1).to(labels_at)
    assert estimators.roc_auc(scores, positive) == estimators.roc_auc(rho[0], LABELS == 1)
    assert estimators.unsigned_auc(scores, positive) == estimators.unsigned_auc(rho[0], LABELS == 1)
    assert estimators.memorization_auc(scores, rho[1].to(labels_at), positive) == estimators.memorization_auc(
        rho[0], rho[1], LABELS == 1
    )
    assert estimators.cka(rho.to(neighbors_at), rho.square().to(labels_at)) == pytest.approx(
        estimators.cka(rho, rho.square())
    )
    x, y = draws()[0], draws()[1]
    assert estimators.cka_of_factors(x.to(neighbors_at), y.to(labels_at)) == pytest.approx(
        estimators.cka_of_factors(x, y)
    )
    torch.testing.assert_close(estimators.bif(x.to(neighbors_at), y.to(labels_at)).cpu(), estimators.bif(x, y))
    assert convergence.split_half_cka(draws().to(neighbors_at)) == pytest.approx(convergence.split_half_cka(draws()))


@pytest.mark.parametrize("keep", ["covariance", "traces"])
def test_a_report_of_labels_on_any_device(keep, tmp_path):
    _, kernel = kernels(keep, labels=LABELS)
    kernel.report(tmp_path / "report.html", method="pca", labels=LABELS.to(DEVICE), label_names=["a", "b", "c"],
                  exclude_same=LABELS.to(DEVICE), samples=torch.tensor([1, 2]).to(DEVICE))  # fmt: skip
    assert (tmp_path / "report.html").stat().st_size > 10_000
    kernel.report(tmp_path / "report.html", method="pca", embedding=torch.randn(12, 2).to(DEVICE))


def test_a_run_with_its_samples_on_another_device():
    """The sampler cannot draw noise on the stand-in; on a GPU it runs whole."""
    if DEVICE.type != "cuda":
        pytest.skip("noise needs a generator of the device: on a GPU only")
    model = nn.Linear(3, 1).to(DEVICE)
    x, y = torch.randn(20, 3).to(DEVICE), torch.randn(20, 1).to(DEVICE)
    config = SGLDConfig(lr=1e-4, nbeta=10, localization=10, batch_size=10, num_chains=2, num_draws=10)
    for keep in ("covariance", "traces"):
        kernel = loss_kernel(model, regression_loss, (x, y), (x, y), config, seed=0, keep=keep, labels=torch.arange(20) % 4,
                             query_data=(x[:3], y[:3]), progress=False)  # fmt: skip
        kernel.diagnostics.verdicts()
        assert kernel.bif().shape == (20, 3)
