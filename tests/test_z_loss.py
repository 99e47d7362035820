"""``linear_cross_entropy(z_loss=...)`` against the dense form written out in fp64."""

import pytest
import torch
import torch.nn.functional as F

import harmonic_triton as ht

pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of NumPy in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Z = 0.03


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(37, 24, generator=generator), torch.randn(70, 24, generator=generator)
    target = torch.randint(70, (37,), generator=generator)
    target[4::6] = -100
    g = torch.randn(37, generator=generator) * 10.0 ** torch.randint(-2, 2, (37,), generator=generator)
    return x.to(DEVICE, dtype), w.to(DEVICE, dtype), target.to(DEVICE), g.to(DEVICE)


def dense(x, w, target, z, class_weight=None, label_smoothing=0.0):
    """(losses, the divisor of their mean): F.cross_entropy's, and z log-sum-exp squared for every token that counts."""
    logits = x.double() @ w.double().t()
    weight = None if class_weight is None else class_weight.double()
    losses = F.cross_entropy(logits, target, weight, reduction="none", label_smoothing=label_smoothing)
    valid = target >= 0
    each = torch.ones_like(losses) if weight is None else weight[target.clamp_min(0)]
    return losses + z * logits.logsumexp(1).square() * valid, (each * valid).sum()


def gradients(function, x, w, upstream):
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = function(x, w)
    return loss.detach(), *torch.autograd.grad(loss, (x, w), upstream.to(loss.dtype))


def close(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= bound * b.norm()


# One pass with stored scores, products computed again, and the dense form; gradients in fp32 keep 1e-5 of their norm.
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "num_items"])
@pytest.mark.parametrize(("weighted", "label_smoothing"), [(False, 0.0), (True, 0.0), (True, 0.2)])
def test_value_and_gradients(backend, reduction, weighted, label_smoothing):
    x, w, target, g = make()
    weight = torch.linspace(0.2, 1.9, 70, device=DEVICE) if weighted else None
    upstream = g if reduction == "none" else torch.tensor(1.7, device=DEVICE)
    options = {"class_weight": weight, "label_smoothing": label_smoothing}
    kind = {"reduction": "sum", "num_items": 5} if reduction == "num_items" else {"reduction": reduction}

    def wanted(x, w):
        losses, count = dense(x, w, target, Z, **options)
        return losses if reduction == "none" else losses.sum() / {"sum": 1, "mean": count, "num_items": 5}[reduction]

    def given(x, w):
        return ht.linear_cross_entropy(x, w, target, z_loss=Z, backend=backend, **kind, **options)

    close(gradients(given, x, w, upstream), gradients(wanted, x, w, upstream), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 is the torch backend's")
    x, w, target, _ = make(dtype)
    wanted = lambda x, w: dense(x, w, target, Z)[0].sum() / 8
    given = lambda x, w: ht.linear_cross_entropy(x, w, target, z_loss=Z, reduction="sum", num_items=8, backend=backend)
    want = gradients(wanted, x.double(), w.double(), torch.tensor(0.6))
    close(
        gradients(given, x, w, torch.tensor(0.6)), want, 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_certain_token_still_feels_it(backend):
    """The loss of 1e-20 has no gradient left, its log-sum-exp has: along w_c."""
    x, w, target, _ = make()
    target = target.clamp_min(0)
    x = 80 * w[target] / w[target].square().sum(1, keepdim=True) + 0 * x
    wanted = lambda x, w: dense(x, w, target, Z)[0].sum()
    given = lambda x, w: ht.linear_cross_entropy(x, w, target, z_loss=Z, reduction="sum", backend=backend)
    close(gradients(given, x, w, torch.tensor(0.3)), gradients(wanted, x, w, torch.tensor(0.3)), 1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_is_off_and_ignored_tokens_have_none(backend):
    x, w, target, g = make()
    run = lambda z, t: gradients(
        lambda x, w: ht.linear_cross_entropy(x, w, t, z_loss=z, reduction="none", backend=backend), x, w, g
    )
    assert all(map(torch.equal, run(0.0, target), gradients(
        lambda x, w: ht.linear_cross_entropy(x, w, target, reduction="none", backend=backend), x, w, g)))  # fmt: skip
    nothing = run(Z, torch.full_like(target, -100))
    assert not any(part.any() for part in nothing)
    assert not run(Z, target)[0][target < 0].any()


def test_what_is_wrong_is_refused():
    x, w, target, _ = make()
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="z_loss must be finite and between 0"):
            ht.linear_cross_entropy(x, w, target, z_loss=bad)
    with pytest.raises(TypeError, match="z_loss must be a number"):
        ht.linear_cross_entropy(x, w, target, z_loss="1e-4")
