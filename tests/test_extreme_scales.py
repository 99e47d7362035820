"""Class vectors, offsets and weights of very different sizes in one call: nobody's size may cost the others their digits."""

from __future__ import annotations

import math

import pytest
import torch

import harmonic_triton as ht
from harmonic_triton.fused import strategy

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of NumPy in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "one pass", "recompute"])
def backend(request):
    """The torch backend, and Triton's with both of its strategies."""
    if request.param == "torch":
        yield "torch"
        return
    with strategy.force(request.param):
        yield "triton"


def dense(x, w, target, n, eps=0.0):
    """Losses of every token in fp64 by direct differences, for tokens that lie on no class vector but their target's."""
    s = (x.unsqueeze(1) - w).square().sum(2) + eps
    others = torch.arange(len(w), device=w.device) != target.unsqueeze(1)
    score = -0.5 * n * (s.log() - s.gather(1, target.unsqueeze(1)).log())
    return torch.nn.functional.softplus(score.masked_fill(~others, -math.inf).logsumexp(1), threshold=700.0)


def run(loss, x, w, n, dtype):
    """(loss, dX, dW, dn) in fp64."""
    leaves = [value.detach().clone().to(dtype).requires_grad_() for value in (x, w)]
    exponent = torch.tensor(n, dtype=torch.promote_types(dtype, torch.float32), device=x.device, requires_grad=True)
    value = loss(*leaves, exponent)
    return [part.detach().double() for part in (value, *torch.autograd.grad(value, (*leaves, exponent)))]


def both(x, w, target, n, backend, dtype=torch.float32, eps=0.0):
    """What a backend gives for the mean loss beside the dense form on the same rounded operands."""
    x, w = x.to(dtype), w.to(dtype)
    got = run(lambda x, w, n: ht.linear_harmonic_loss(x, w, target, n=n, eps=eps, backend=backend), x, w, n, dtype)
    return got, run(lambda x, w, n: dense(x, w, target, n, eps).mean(), x.double(), w.double(), n, torch.float64)


def operands(tokens=5, classes=20, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(tokens, width, generator=generator), torch.randn(classes, width, generator=generator)
    return x.to(DEVICE), w.to(DEVICE), torch.randint(3, classes, (tokens,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("norm", [1e9, 1e12, 1e15])
@pytest.mark.parametrize("as_target", [False, True])
def test_one_huge_class_leaves_the_others_their_digits(backend, norm, as_target):
    """Measured against a share of its square, ordinary distances were nothing but rounding noise."""
    x, w, target = operands()
    w[1] *= norm / w[1].norm()
    if as_target:
        target[2] = 1
    got, want = both(x, w, target, 3.0, backend)
    for mine, truth in zip(got, want, strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("eps", [1e-30, 1e-24, 1e-16])
def test_eps_is_kept_where_x_lies_on_its_class_vector(backend, eps):
    """The target's squared distance is eps then, however small beside ||x||^2."""
    x, w, target = operands()
    x = w[target].clone()
    got, want = both(x, w, target, 0.5, backend, eps=eps)
    for mine, truth in zip(got, want, strict=True):
        assert (mine - truth).norm() <= 1e-5 * truth.norm()


def test_a_loss_of_almost_nothing_has_an_exponents_gradient_of_almost_nothing(backend):
    """x so near its class vector that distances are not relative to the target's; going there costs no rounding."""
    x, w, target = operands()
    target[:] = 4
    w[4] = 0.0
    x = x * 1e-16
    got, want = both(x, w, target, 2.0, backend)
    assert abs(want[3]) < 1e-28
    assert abs(got[3] - want[3]) <= 1e-4 * abs(want[3])


@pytest.mark.parametrize("zero", [False, True])
def test_a_token_on_another_class_leaves_fp16_gradients_of_the_rest(backend, zero):
    """One factor scales the whole product of dW in fp16: a token that adds nothing to it may not choose it. 0: padding."""
    x, w, target = operands(tokens=6)
    w[1] = 0.0 if zero else w[1]
    x[0] = w[1]
    leaves = lambda x: run(
        lambda x, w, n: ht.linear_harmonic_loss(x, w, target[-len(x) :], n=n, reduction="sum", backend=backend),
        x, w, 3.0, torch.float16,
    )  # fmt: skip
    everyone, rest = leaves(x)[2], leaves(x[1:])[2]
    untouched = torch.ones(len(w), dtype=torch.bool, device=w.device)
    untouched[[1, int(target[0])]] = False  # the token's own classes
    assert (everyone - rest)[untouched].norm() <= 2e-3 * rest[untouched].norm()


@pytest.mark.parametrize("which", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_ignored_token_has_not_even_an_infinite_class_weight(which, reduction):
    x, w, target = operands()
    target[1] = -100
    class_weight = torch.ones(len(w), device=DEVICE)
    class_weight[0] = math.inf  # of no target; -100 is clamped to it
    loss = lambda weight: ht.linear_harmonic_loss(
        x, w, target, n=3.0, class_weight=weight, reduction=reduction, backend=which
    )
    assert torch.equal(loss(class_weight), loss(torch.ones(len(w), device=DEVICE)))


@pytest.mark.parametrize("distance", [0.0, 1e-16])
def test_a_single_class_has_no_loss_whatever_the_smoothing(backend, distance):
    """Its log-probability is 0 however near it is; so is the exponent's gradient."""
    w = torch.zeros(1, 8, device=DEVICE)
    w[0, 3] = 1.7
    x = w.repeat(3, 1)
    x[:, 1] = distance
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    smoothed = lambda x, w, n: ht.linear_harmonic_loss(x, w, target, n=n, label_smoothing=0.9, backend=backend)
    for part in run(smoothed, x, w, 2.3, torch.float32):
        assert part.norm() == 0


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e9])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_huge_operands_keeps_finite_gradients(backend, dtype, reduction, scale):
    """One class has all the mass by far. What coefficients of 0 were multiplied by was e^80, beyond fp32 times x: NaN in dW."""
    x, w, target = operands()
    leaves = [(scale * value).to(dtype).requires_grad_() for value in (x, w)]
    loss = ht.linear_cross_entropy(*leaves, target, reduction=reduction, backend=backend).sum()
    got = torch.autograd.grad(-1.5 * loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), target, reduction="sum")
    assert abs(loss - want) <= 1e-6 * want
    for mine, truth in zip(got, torch.autograd.grad(-1.5 * want, exact), strict=True):
        assert (mine - truth).abs().max() <= (1e-6 + torch.finfo(dtype).eps) * truth.abs().max()
