"""Loss kernels of few samples and draws, under other defaults, and what is refused before any work."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harmonic_triton.losskernel import convergence, estimators
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.per_sample_losses import classification_loss, regression_loss
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.sampling.config import METHODS, SGLDConfig
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stability import stability_bound
from harmonic_triton.losskernel.sampling.stream import sample_losses
from harmonic_triton.losskernel.sampling.tuning import tune

KEEPS = ("covariance", "traces")
CONFIG = SGLDConfig(lr=1e-3, nbeta=20, localization=10, batch_size=10, num_chains=4, num_draws=5)


def problem(size=20):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 3, generator=generator), torch.randn(size, generator=generator)
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, x, y


def run(config=CONFIG, samples=12, **options):
    model, x, y = problem()
    options = {"seed": 0, "progress": False, **options}
    return loss_kernel(model, regression_loss, (x, y), (x[:samples], y[:samples]), config, **options)


# --- few samples, few draws --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("keep", KEEPS)
def test_everything_of_one_two_and_three_samples(keep, samples, tmp_path):
    """Both embeddings of both kinds of kernel; the report draws the one or the other."""
    kernel = run(samples=samples, keep=keep, labels=torch.arange(samples) % 2)
    expected = torch.stack(
        [losses for draw in sample_losses(*arguments(samples), seed=0, progress=False) for losses in draw]
    ).double()
    torch.testing.assert_close(kernel.variance, expected.var(0), rtol=1e-5, atol=0)
    assert kernel.correlation.shape == (samples, samples) and (kernel.correlation.diagonal() - 1).abs().max() < 1e-6
    assert all(verdict.words for verdict in kernel.diagnostics.verdicts())
    for method in ("umap", "pca"):
        coordinates = kernel.embed(method)
        assert coordinates.shape == (samples, 2) and coordinates.isfinite().all()
    if samples == 2:  # distances in the principal components are those of the kernel: there is one of them
        apart = (coordinates[0] - coordinates[1]).norm().item()
        assert apart == pytest.approx(math.sqrt(2 * (1 - kernel.correlation[0, 1].item())), rel=1e-3)
    method = {"covariance": "umap", "traces": "pca"}[keep]
    page = kernel.report(tmp_path / "report.html", method=method).read_text(encoding="utf-8")
    assert "Nearest samples" in page
    assert len(kernel.neighbor_table([0], 3)[0].neighbors) == samples - 1
    if samples > 1:
        assert kernel.neighbors(samples - 1)[0].shape == (samples, samples - 1)


def arguments(samples):
    model, x, y = problem()
    return model, regression_loss, (x, y), (x[:samples], y[:samples]), CONFIG


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("chains", [2, 3, 4])
def test_one_draw_of_several_chains(chains, keep, tmp_path):
    kernel = run(SGLDConfig(**{**vars(CONFIG), "num_chains": chains, "num_draws": 1}), keep=keep)
    assert kernel.num_draws == chains and (kernel.variance > 0).all()
    verdicts = {verdict.name: verdict for verdict in kernel.diagnostics.verdicts()}
    assert verdicts["split R̂"].good is None
    if chains < 4:  # a half of one draw says nothing
        assert verdicts["split-half CKA"].value == "–"
    kernel.report(tmp_path / "report.html", method="pca")


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"num_chains": 1, "num_draws": 1}, {}),
        ({"num_chains": 4, "num_draws": 1}, {"within_chain": True}),
        ({"num_chains": 1, "num_draws": 1}, {"keep": "traces"}),
    ],
)
def test_too_few_draws_are_refused_before_any_work(changes, options):
    def never(model, batch):
        raise AssertionError("the model was run")

    model, x, y = problem()
    config = SGLDConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(ValueError, match="num_draws=2 or more"):
        loss_kernel(model, never, (x, y), (x, y), config, seed=0, progress=False, **options)


def test_split_half_cka_needs_two_draws_a_half_and_says_so():
    draws = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    assert 0 <= convergence.split_half_cka(draws) <= 1
    assert math.isnan(convergence.split_half_cka(draws[:2]))
    with pytest.raises(ValueError, match="two draws or more"):
        convergence.split_half_cka(draws[:1])


# --- what surrounds a call -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_run_does_not_see_the_default_dtype(keep, method, tmp_path):
    config = SGLDConfig(**{**vars(CONFIG), "method": method, "num_burnin_steps": 2, "microbatch_size": 4})
    model, x, y = problem()

    def results():
        kernel = loss_kernel(model, regression_loss, (x, y), (x, y), config, seed=0, keep=keep, progress=False,
                             query_data=(x[:2], y[:2]), checkpoint_dir=tmp_path / str(torch.get_default_dtype()))  # fmt: skip
        found = [kernel.mean, kernel.variance, kernel.correlation, kernel.block(torch.tensor([1])), kernel.bif()]
        found += [*kernel.neighbors(3), kernel.embed("pca"), kernel.record.train_loss, kernel.record.probe]
        found += [kernel.diagnostics.r_hat, kernel.diagnostics.autocorrelation_time]
        if method == METHODS[0]:  # it draws what is compared here, however that was sampled
            kernel.report(tmp_path / "report.html", method="umap")
        found += [LossKernel.load(kernel.save(tmp_path / "kernel.safetensors")).covariance]
        return [
            *found,
            torch.tensor(stability_bound(model, regression_loss, (x, y), config, seed=0), dtype=torch.float64),
        ]

    plain = results()
    torch.set_default_dtype(torch.float64)
    try:
        changed = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(plain, changed, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_tuner_does_not_see_the_default_dtype():
    model, x, y = problem(64)
    torch.set_default_dtype(torch.float64)
    try:
        changed = tune(model, regression_loss, (x, y), seed=0, target_excess=0.05, verbose=False, num_chains=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert changed == tune(model, regression_loss, (x, y), seed=0, target_excess=0.05, verbose=False, num_chains=2)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_products_with_the_kernel_do_not_see_autocast(precision):
    kernel = LossKernel.from_losses(2 + 0.1 * torch.randn(4, 50, 40, generator=torch.Generator().manual_seed(0)))
    vector = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    read = lambda: (kernel.product(vector), kernel.principal_components(3).coordinates,
                    estimators.principal_components(kernel.correlation, 3).coordinates)  # fmt: skip
    plain, before = read(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            changed = read()
    finally:
        torch.set_float32_matmul_precision(before)
    for one, other in zip(plain, changed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- parameters that cannot be sampled ---------------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out((x * self.phase).abs())


def test_a_complex_parameter_is_refused_before_its_imaginary_part_is_lost():
    model, x, y = Spectral(), torch.randn(20, 3), torch.arange(20) % 2
    calls = (
        lambda: Sampler(model, classification_loss, (x, y), (x, y), CONFIG, seed=0),
        lambda: loss_kernel(model, classification_loss, (x, y), (x, y), CONFIG, seed=0, progress=False),
        lambda: sample_losses(model, classification_loss, (x, y), (x, y), CONFIG, seed=0, progress=False),
        lambda: stability_bound(model, classification_loss, (x, y), CONFIG, seed=0),
        lambda: tune(model, classification_loss, (x, y), seed=0, verbose=False),
        lambda: Sampler(model, classification_loss, (x, y), (x, y), CONFIG, seed=0, mask="phase"),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"parameter 'phase' must be .*complex64.*view_as_real"):
            call()
    assert model.phase.dtype == torch.complex64
    # beside it the others can be sampled, and it stays as it is
    kernel = loss_kernel(model, classification_loss, (x, y), (x, y), CONFIG, seed=0, progress=False, mask="out.*")
    assert kernel.num_draws == 20 and (model.phase == 1).all()
