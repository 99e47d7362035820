"""The variants that the authors published, expressed by our options (their exponent acts on the *squared*
distance, so it is half of ours).

Truth is their formula in fp64 on the same fp32 inputs. A relative error of a squared distance counts n/2 times in its
power, and the expansion of a distance loses (||x||^2 + ||w_j||^2)/s_j; so errors may be n/2 times that many units of
rounding, with 1e-6 (about eight of them) as the least that a chain of sums is granted.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import harmonic_triton as ht
from harmonic_triton import reference

UPSTREAM = 0.7


def layer_inputs(tokens: int, width: int, classes: int, near: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, target) fp32; ``near``: distance from the class vector in units of its norm, None: anywhere."""
    generator = torch.Generator().manual_seed(1)
    w = 0.3 * torch.randn(classes, width, generator=generator)
    target = torch.randint(classes, (tokens,), generator=generator)
    noise = 0.3 * torch.randn(tokens, width, generator=generator)
    return noise if near is None else w[target] + near * noise, w, target


def relative(out: Tensor, ref: Tensor, held: float = 0.0) -> float:
    """Largest ||out - ref||/||ref|| over the rows whose reference is larger than ``held``."""
    out, ref = out.double(), ref.double()
    rows = ref.norm(dim=-1) > held
    assert rows.any()
    return ((out - ref).norm(dim=-1)[rows] / ref.norm(dim=-1)[rows]).max().item()


def leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors]


def authors(x: Tensor, w: Tensor, target: Tensor, exponent: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the published layer (eps = 1e-4 on every squared distance)."""
    x, w = leaves(dtype, x, w)
    loss = reference.authors_loss(x, w, target, exponent)
    (UPSTREAM * loss).backward()
    return loss.detach(), x.grad, w.grad


# (tokens, D, V): the MLP on 31 tokens, toy 2, and a wider layer on the 130 tokens of the genealogy.
@pytest.mark.parametrize("shape", [(64, 16, 31), (50, 2, 5), (40, 128, 130)], ids=str)
@pytest.mark.parametrize("near", [None, 0.05, 0.0], ids=["far", "near", "on the class vector"])
def test_algorithmic_layer(shape, near):
    """``HarmonicHead(n=2, eps=1e-4)`` is their layer of exponent 1, as near to its class vector as training gets."""
    x, w, target = layer_inputs(*shape, near)
    head = ht.HarmonicHead(shape[1], shape[2], n=2, eps=1e-4)
    with torch.no_grad():
        head.weight.copy_(w)
    (mine,) = leaves(torch.float32, x)
    loss = head(mine, target=target)
    (UPSTREAM * loss).backward()
    value, dx, dw = authors(x, w, target, 1.0, torch.float64)
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    assert relative(mine.grad, dx) < 1e-6
    assert relative(head.weight.grad, dw) < 1e-6
    log_p = reference.authors_probabilities(x.double(), w.double(), 1.0).log()
    # A logarithm near 0 has an absolute error of a few roundings of the largest one beside it.
    assert relative(head(x), log_p) < 1e-6


@pytest.mark.parametrize("exponent", [1.0, 28.0])
def test_same_as_their_fp32_where_that_is_well_conditioned(exponent):
    """Far from every class vector their own fp32 is good to some roundings; 28 is their exponent for MNIST."""
    x, w, target = layer_inputs(64, 16, 31, None)
    mine = leaves(torch.float32, x, w)
    loss = ht.linear_harmonic_loss(*mine, target, n=2 * exponent, eps=1e-4)
    (UPSTREAM * loss).backward()
    value, dx, dw = authors(x, w, target, exponent, torch.float32)
    distances = torch.cdist(x, w).square()
    expansion = ((x.square().sum(1, keepdim=True) + w.square().sum(1)) / distances).max().item()
    bound = max(1e-6, exponent * 2.0**-24 * expansion)
    assert bound < 2e-5
    assert loss.item() == pytest.approx(value.item(), rel=bound)
    assert relative(mine[0].grad, dx) < bound
    assert relative(mine[1].grad, dw) < bound


GPT2_EXPONENT, GPT2_WIDTH, GPT2_STD, ALPHA = 768.0, 768, 0.0202, 0.01


def gpt2_inputs(kind: str, tokens: int = 24, classes: int = 640) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, target, upstream) fp32 with GPT-2's width and initialisation; kinds as in the test."""
    generator = torch.Generator().manual_seed(1)
    w = GPT2_STD * torch.randn(classes, GPT2_WIDTH, generator=generator)
    target = torch.randint(classes, (tokens,), generator=generator)
    x = torch.randn(tokens, GPT2_WIDTH, generator=generator)
    name, _, spread = kind.partition(" ")
    if name != "init":
        x = w[(target + (name == "wrong")) % classes] + float(spread) * x
    return x, w, target, torch.rand(tokens, generator=generator) + 0.25


@functools.cache
def gpt2_truth(kind: str, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, dX, dW) of :func:`gpt2_dense` in fp64, and that it is the authors' formula."""
    x, w, target, upstream = gpt2_inputs(kind, classes=classes)
    true_x, true_w = leaves(torch.float64, x, w)
    truth = gpt2_dense(true_x, true_w, target)
    truth.backward(upstream.double())
    transcribed = reference.authors_loss(x.double(), w.double(), target, GPT2_EXPONENT, 0.0, ALPHA)
    assert transcribed.item() == pytest.approx(truth.mean().item(), rel=1e-11)
    return truth.detach(), true_x.grad, true_w.grad


def gpt2_dense(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """-log((p + alpha/V)/(1 + alpha)), p ~ (squared distance)^-768 without eps, by direct differences; per token."""
    squared = (x.unsqueeze(1) - w).square().sum(-1)
    p = (squared / squared.amin(1, keepdim=True)) ** -GPT2_EXPONENT
    p = (p / p.sum(1, keepdim=True)).gather(1, target.unsqueeze(1)).squeeze(1)
    return -((p + ALPHA / len(w)) / (1 + ALPHA)).log()


# (dtype, backend, units of rounding): the torch backend sums an fp32 loss in fp64; Triton sums in fp32; and in fp64 the
# truth is rounded as well.
@pytest.mark.parametrize(("dtype", "backend", "units"), [
    (torch.float32, "torch", 1), (torch.float32, "triton", 8), (torch.float64, "torch", 8),
    (torch.float64, "reference", 8)], ids=lambda value: str(value).removeprefix("torch."))  # fmt: skip
@pytest.mark.parametrize("kind", ["init", "near 0.22", "near 0.14", "wrong 0.22", "wrong 0.1"])
def test_gpt2_loss(kind, dtype, backend, units):
    """n = 1536, alpha = 0.01: losses and gradients equal the dense formula, from normalised hidden states as at the
    start ("init") to noise of 0.14 about the class vector (losses of 0.01, the least that the mix allows) and about
    another one ("wrong": p_c down to 1e-26, its gradient with it).
    """
    if backend == "triton":
        pytest.importorskip("triton")
    classes = 24 if backend == "triton" else 640
    x, w, target, upstream = gpt2_inputs(kind, classes=classes)
    truth, true_dx, true_dw = gpt2_truth(kind, classes)
    mine = leaves(dtype, x, w)
    losses = ht.linear_harmonic_loss(
        *mine, target, n=2 * GPT2_EXPONENT, uniform_mix=ALPHA, reduction="none", backend=backend
    )
    losses.backward(upstream.to(losses.dtype))
    # ||x||^2 + ||w||^2 <= 1.11 s here, and s^-768 multiplies the rounding of s by 768
    bound = units * 1.11 * GPT2_EXPONENT * torch.finfo(dtype).eps / 2
    held = 1e-30 if dtype == torch.float32 else 1e-280
    assert relative(losses.unsqueeze(1), truth.unsqueeze(1)) < bound
    assert relative(mine[0].grad, true_dx, held) < bound
    assert relative(mine[1].grad, true_dw, held) < bound


@pytest.mark.parametrize("kind", ["init", "near 0.22", "near 0.14", "wrong 0.22", "wrong 0.1"])
def test_gpt2_loss_as_a_mean(kind):
    """The mean, whose gradients are formed in the forward pass, is their GPT-2 loss as it stands."""
    x, w, target, _ = gpt2_inputs(kind)
    mine, true = leaves(torch.float32, x, w), leaves(torch.float64, x, w)
    loss = ht.linear_harmonic_loss(*mine, target, n=2 * GPT2_EXPONENT, uniform_mix=ALPHA)
    truth = reference.authors_loss(*true, target, GPT2_EXPONENT, 0.0, ALPHA)
    for value in (loss, truth):
        (UPSTREAM * value).backward()
    bound = 1.11 * GPT2_EXPONENT * 2.0**-24
    assert loss.item() == pytest.approx(truth.item(), rel=bound)
    assert all(relative(leaf.grad, ref.grad, 1e-30) < bound for leaf, ref in zip(mine, true, strict=True))


def test_gpt2_loss_beyond_fp32():
    """A gradient below 1e-45 is 0 in fp32 and the loss that of the mix alone; fp64 still follows the formula."""
    x, w, target, upstream = gpt2_inputs("wrong 0.05")
    single, double, true = (leaves(dtype, x, w) for dtype in (torch.float32, torch.float64, torch.float64))
    losses = [ht.linear_harmonic_loss(*inputs, target, n=2 * GPT2_EXPONENT, uniform_mix=ALPHA, reduction="none")
              for inputs in (single, double)]  # fmt: skip
    losses.append(gpt2_dense(*true, target))
    for loss in losses:
        loss.backward(upstream.to(loss.dtype))
    ceiling = -math.log(ALPHA / 640 / (1 + ALPHA))
    for loss in losses:
        assert loss.tolist() == pytest.approx([ceiling] * 24, rel=1e-6)
    assert all(bool((leaf.grad == 0).all()) for leaf in single)
    bound = 8 * 1.5 * GPT2_EXPONENT * torch.finfo(torch.float64).eps / 2  # ||x||^2 + ||w||^2 <= 1.5 s
    assert 0 < true[0].grad.abs().max().item() < 1e-45
    assert all(relative(leaf.grad, ref.grad, 1e-280) < bound for leaf, ref in zip(double, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.7, 2.0])
@pytest.mark.parametrize("n", [2.0, 28.0, None])
def test_temperature(n, temperature, dtype):
    """Sampling at temperature T is the exponent n/T: the logits over T, normalised again (None: sqrt(16) = 4)."""
    x, w, _ = (tensor.to(dtype) for tensor in layer_inputs(20, 16, 50, None))
    exponent = 4.0 if n is None else n
    at_one = ht.harmonic_logits(x, w, n=n, eps=0.01)
    cooled = ht.harmonic_logits(x, w, n=exponent / temperature, eps=0.01)
    wanted = (at_one.double() / temperature).log_softmax(-1)
    assert relative(cooled, wanted) < 8 * torch.finfo(dtype).eps
    scores = ht.harmonic_logits(x, w, n=n, eps=0.01, normalize=False)
    assert relative((scores.double() / temperature).log_softmax(-1), wanted) < 8 * torch.finfo(dtype).eps
    assert relative(cooled, at_one / temperature) > 1e-3  # normalising again is what makes them equal
