"""Cross-entropy's own options as compiled: a bias, a soft cap, both, against fp64 autograd of the logits written out."""

import emulation
import pytest
import torch
import torch.nn.functional as F
from test_emulated_losses import SMOOTHING, WAYS, rounds
from test_oracle import DTYPES, inputs

import harmonic_triton as ht
from harmonic_triton.fused import strategy as strategies
from harmonic_triton.tools import verify

LOGITS = {"bias": (True, None), "cap": (False, 3.0), "bias and cap": (True, 12.0)}


def compare_logits(tokens, width, classes, dtype, biased, cap, strategy):
    """A mean's loss, dX, dW and the bias's gradient under verify's bounds; smoothing where one pass is not taken."""
    x, w, target, _ = inputs(tokens, width, classes, dtype, "near", scale=0.3)
    bias = 2 * torch.randn(classes, generator=torch.Generator().manual_seed(1)) if biased else None
    options = {"z_loss": 0.03, "label_smoothing": SMOOTHING[strategy]}
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, w, bias) if leaf is not None]
    truth = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*truth)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    wanted = F.cross_entropy(logits, target, label_smoothing=options["label_smoothing"])
    wanted = wanted + options["z_loss"] * logits.logsumexp(1)[target >= 0].square().mean()
    upstream = torch.tensor(-64.0)
    with strategies.force(strategy):
        got = ht.linear_cross_entropy(
            *leaves[:2], target, bias=leaves[2] if biased else None, softcap=cap, backend="triton", **options
        )
        gradients = torch.autograd.grad(got, leaves, upstream)
    assert abs(got.item() / wanted.item() - 1) <= verify.LOSS_BOUND
    for gradient, exact in zip(gradients, torch.autograd.grad(wanted, truth, upstream.double()), strict=True):
        assert (gradient.double() - exact).norm() <= verify.GRADIENT_BOUND[dtype] * exact.norm()


@pytest.mark.parametrize(("kind", "errors"), rounds(LOGITS))
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_bias_and_cap(arch, dtype, kind, errors, strategy):
    """Logits reach 6.5, so that a cap of 3 bends the target's."""
    with emulation.on_gpu(arch, processors=2, worst_case=errors):
        compare_logits(37, 72, 301, DTYPES[dtype], *LOGITS[kind], strategy)
