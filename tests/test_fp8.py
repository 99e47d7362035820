"""The emulation of fp8 gradient products: its rounding, and that nothing else than the rounding is in its errors."""

import pytest
import torch

from benchmarks import fp8


@pytest.fixture(scope="module")
def case():
    return fp8.make_case(4, 0.75, tokens=24, width=32, classes=40, n=6.0, seed=0)


def test_e4m3_rounds_by_its_unit_under_its_scales():
    """Half a step of 3 bits: 2^-4; rows of very different size each keep it."""
    values = torch.linspace(0.5, 1.5, 999, dtype=torch.float64) * 10.0 ** torch.arange(-8, 12, 4).unsqueeze(1)
    error = (fp8.to_fp8(values, 1) - values).abs() / values
    assert 0.9 * fp8.E4M3_UNIT < error.max() <= fp8.E4M3_UNIT + 1e-6


def test_the_case_has_the_loss_that_was_asked_for(case):
    """Bisected on other tokens' mean than the whole batch's where there are more than 64; here on all."""
    assert case.loss == pytest.approx(0.75, rel=0.02)
    assert not (case.order == case.target.unsqueeze(1)).any()


def test_gradients_are_those_of_the_harmonic_loss(case):
    """Autograd in fp64 through the definition, with fp32 products."""
    x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
    log_p = torch.log_softmax(-6.0 * torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist").log(), 1)
    loss = -log_p.gather(1, case.target.unsqueeze(1)).mean()
    wanted = torch.autograd.grad(loss, (x, w))
    for k in fp8.COMPETITORS:
        for got, want in zip(fp8.gradients(case, k, lambda values, dim: values.float()), wanted, strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_errors_stay_inside_the_bound(case):
    """0.129 sum |A| |w|, and the entries below e4m3's range under the scales; never 0."""
    exact, _ = fp8.gradients(case, 1, lambda values, dim: values.float())
    rounded, _ = fp8.gradients(case, 1, fp8.to_fp8)
    special = torch.cat([case.target.unsqueeze(1), case.order[:, :1]], 1)
    through = case.a.scatter(1, special, 0.0).abs()
    step = 2.0**-9 / 448
    lost = step * (
        through.amax(1, keepdim=True) * case.w.abs().sum(0) + through.sum(1, keepdim=True) * case.w.abs().amax(0)
    )
    bound = ((1 + fp8.E4M3_UNIT) ** 2 - 1) * through @ case.w.abs() + 2 * lost
    assert ((rounded - exact).abs() <= bound + 1e-6 * bound.max()).all()
    assert (rounded - exact).abs().max() > 0.01 * bound.max()


def test_command_writes_its_report(tmp_path, capsys):
    """Every case and k stands in the table, and the decision is part of it."""
    out = tmp_path / "fp8.md"
    assert fp8.main(["--tokens", "8", "--width", "16", "--classes", "48", "--out", str(out)]) == 0
    text = out.read_text()
    assert text == capsys.readouterr().out
    rows = sum(len(losses) for losses in fp8.PLACES.values()) * len(fp8.COMPETITORS)
    assert sum(line.startswith(("| random", "| clusters")) for line in text.splitlines()) == rows
    assert "## Decision: not shipped" in text
