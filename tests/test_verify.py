"""verify's own truth: its written-out derivative is autograd's, and a subset of tokens is enough for a large shape."""

import pytest
import torch

from harmonic_triton import reference
from harmonic_triton.tools import verify

CPU = torch.device("cpu")


@pytest.mark.parametrize(("inputs", "n"), [("far", None), ("loss 1e-10", None), ("wrong 0.03", None), ("far", 2.0)])
def test_truth_is_the_reference_differentiated(inputs, n):
    case = verify.Case("", "none", torch.float32, (20, 100, 300), n, inputs)
    x, w, target, g = verify.make_inputs(case, CPU)
    exponent = torch.tensor(case.exponent, dtype=torch.float64, requires_grad=True)
    leaves = x.double().requires_grad_(), w.double().requires_grad_(), exponent
    loss = reference.linear_harmonic_loss(*leaves[:2], target, n=exponent, reduction="none")
    want = loss.detach(), *torch.autograd.grad(loss, leaves, g.double())
    torch.testing.assert_close(verify.truth(x, w, target, case.exponent, g)[:4], want, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("inputs", ["far", "loss 1e-10", "wrong 20"])
def test_truth_of_cross_entropy(inputs):
    case = verify.Case("", "none", torch.float64, (20, 100, 300), None, inputs, "entropy")
    x, w, target, g = verify.make_inputs(case, CPU)
    leaves = x.requires_grad_(), w.requires_grad_()
    loss = reference.linear_cross_entropy(*leaves, target, reduction="none")
    want = loss.detach(), *torch.autograd.grad(loss, leaves, g.double())
    torch.testing.assert_close(verify.truth(x.detach(), w.detach(), target, None, g)[:3], want, rtol=1e-9, atol=1e-14)
    if inputs == "loss 1e-10":
        torch.testing.assert_close(
            want[0][g != 0][target[g != 0] >= 0], torch.full((17,), 1e-10).double(), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("inputs", ["far", "loss 1e-20", "wrong 20"])
def test_truth_under_a_bias_and_a_cap(inputs):
    case = verify.Case("", "none", torch.float64, (20, 100, 300), None, inputs, "capped")
    x, w, target, g = verify.make_inputs(case, CPU)
    logits = case.logits(CPU)
    leaves = x.requires_grad_(), w.requires_grad_(), logits["bias"].double().requires_grad_()
    loss = reference.linear_cross_entropy(*leaves[:2], target, bias=leaves[2], softcap=verify.SOFTCAP, reduction="none")
    want = torch.autograd.grad(loss, leaves, g.double())
    found = verify.truth(x.detach(), w.detach(), target, None, g, **logits)
    torch.testing.assert_close((*found[:3], found[5]), (loss.detach(), *want), rtol=1e-9, atol=1e-14)


def test_a_large_shape_is_checked_on_some_tokens(monkeypatch):
    monkeypatch.setattr(verify, "TRUTH_WORK", 4 * 100 * 300)
    case = verify.Case("torch", "none", torch.float32, (200, 100, 300), None, "loss 1e-10")
    assert len(verify.probes(case)) == 4
    assert (verify.make_inputs(case, CPU)[3] != 0).sum() == 4
    assert verify.run_case(case, CPU).passed
    assert all(line.reduction == "none" for line in verify.cases(CPU, ["torch"], [case.shape], [torch.float32]))
