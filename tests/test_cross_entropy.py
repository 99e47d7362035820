"""linear_cross_entropy is F.cross_entropy of the logits, in all its options and as an operator.

Its precision is checked with the other backends' in test_oracle; what both losses share is checked in test_functional.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import harmonic_triton as ht

TOKENS, WIDTH, CLASSES = 13, 21, 37


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def make(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    w = 0.5 * torch.randn(CLASSES, WIDTH, generator=generator).to(dtype)
    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    target[4::5] = -100
    return x, w, target, 0.3 + torch.rand(TOKENS, generator=generator)


def gradients(x, w, target, upstream=1.7, **options):
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = ht.linear_cross_entropy(x, w, target, **options)
    loss.backward(torch.full_like(loss, upstream) if isinstance(upstream, float) else upstream.to(loss.dtype))
    return loss.detach(), x.grad, w.grad


def dense(x, w, target, upstream=1.7, **options):
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    loss = F.cross_entropy(x @ w.t(), target, **options)
    loss.backward(torch.full_like(loss, upstream) if isinstance(upstream, float) else upstream.to(loss.dtype))
    return loss.detach(), x.grad, w.grad


def close(got, wanted, tolerance=4e-6):
    """Relative in the norm of the whole tensor; 4e-6 is fp32's eps times norms of x and w, 12 here, and a few roundings."""
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_option_is_that_of_cross_entropy(backend, weighted, smoothing, reduction):
    x, w, target, g = make()
    weight = torch.linspace(0.2, 3.0, CLASSES) if weighted else None
    up = g if reduction == "none" else 1.7
    options = {"label_smoothing": smoothing, "reduction": reduction}
    wanted = dense(x, w, target, up, weight=None if weight is None else weight.double(), **options)
    close(gradients(x, w, target, up, class_weight=weight, backend=backend, **options), wanted)
    close(gradients(x, w, target, up, class_weight=weight, backend="reference", **options), wanted)


def test_statistics(backend):
    x, w, target, _ = make()
    w[3] = w[target[0]]  # a tie: the first class is the prediction
    logits = x.double() @ w.double().t()
    log_p = logits.log_softmax(1)
    kept, own = target >= 0, target.clamp_min(0).unsqueeze(1)
    for which in (backend, "reference"):
        _, stats = ht.linear_cross_entropy(x, w, target, return_stats=True, backend=which)
        wanted = (
            torch.where(kept, -(log_p.exp() * log_p).sum(1), 0.0),
            torch.where(kept, logits.argmax(1), -100),
            kept & (logits.argmax(1) == target),
            torch.where(kept, logits.gather(1, own).squeeze(1), 0.0),
            torch.where(kept, log_p.gather(1, own).squeeze(1), 0.0),
        )
        close(stats, wanted, 1e-5)
        assert torch.equal(stats.predicted, wanted[1])
    lse = torch.where(kept, logits.logsumexp(1), 0.0)
    close([stats.target_logit - stats.target_log_prob], [lse])


def test_shift_num_items_and_leading_dimensions(backend):
    x, w, target, _ = make()
    x, target = x[:12].view(2, 6, WIDTH), target[:12].view(2, 6)
    got = gradients(x, w, target, shift=True, num_items=7, backend=backend)
    flat = dense(x[:, :-1].reshape(10, WIDTH), w, target[:, 1:].reshape(10), 1.7 / 7, reduction="sum")
    padded = F.pad(flat[1].view(2, 5, WIDTH), (0, 0, 0, 1))
    close(got, (flat[0] / 7, padded, flat[2]))


def test_all_targets_ignored_gives_zeros_not_nan(backend):
    x, w, target, _ = make()
    x[2, 3] = math.nan
    for value in gradients(x, w, torch.full_like(target, -100), backend=backend):
        assert torch.equal(value, torch.zeros_like(value))


def test_one_class(backend):
    x, w, _, g = make()
    target = torch.zeros(TOKENS, dtype=torch.int64)
    for value in gradients(x, w[:1], target, g, reduction="none", backend=backend):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("budget", [1, 4 * CLASSES * 3, 10**6])
def test_results_do_not_depend_on_the_memory_budget(backend, budget):
    x, w, target, g = make()
    for reduction, up in (("none", g), ("mean", 1.7)):
        got = gradients(x, w, target, up, reduction=reduction, backend=backend, memory_budget=budget)
        close(got, gradients(x, w, target, up, reduction=reduction, backend=backend), 1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", ["x", "w"])
def test_a_frozen_operand_and_a_second_backward(backend, reduction, frozen):
    x, w, target, g = make()
    up = g if reduction == "none" else torch.tensor(1.7)
    _, dx, dw = dense(x, w, target, up, reduction=reduction)
    trained = (w if frozen == "x" else x).clone().requires_grad_()
    operands = (x, trained) if frozen == "x" else (trained, w)
    loss = ht.linear_cross_entropy(*operands, target, reduction=reduction, backend=backend)
    (first,) = torch.autograd.grad(loss, trained, up, retain_graph=True)
    (second,) = torch.autograd.grad(loss, trained, -2 * up)
    close([first, second], [dw, -2 * dw] if frozen == "x" else [dx, -2 * dx])


def test_second_derivatives_are_refused_except_by_the_reference():
    x, w, target, _ = make()
    x.requires_grad_()
    for reduction in ("sum", "none"):
        loss = ht.linear_cross_entropy(x, w, target, reduction=reduction).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again"):
            dx.sum().backward()
    xs = x.detach().double().requires_grad_()
    loss = ht.linear_cross_entropy(xs, w.double(), target, backend="reference")
    assert torch.autograd.gradgradcheck(
        lambda v: ht.linear_cross_entropy(v, w.double(), target, backend="reference"), (xs,)
    )
    assert loss > 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_whole_and_per_sample_gradients(reduction):
    x, w, target, g = make()
    up = g if reduction == "none" else torch.tensor(1.7)
    compiled = torch.compile(
        lambda a, b: ht.linear_cross_entropy(a, b, target, reduction=reduction), fullgraph=True, backend="aot_eager"
    )
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = compiled(a, b)
    loss.backward(up)
    close((loss.detach(), a.grad, b.grad), dense(x, w, target, up, reduction=reduction))

    def one(v, t):
        return ht.linear_cross_entropy(v.unsqueeze(0), w, t.unsqueeze(0), reduction="sum")

    each = torch.func.vmap(torch.func.grad(one))(x, target)
    close([each * g.unsqueeze(1)], [dense(x, w, target, g, reduction="none")[1]])


def test_autocast_casts_as_a_linear_layer_would(backend):
    x, w, target, _ = make()
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        loss = ht.linear_cross_entropy(x, w, target, backend=backend)
    assert loss.dtype == torch.float32
    close([loss], [F.cross_entropy(x.bfloat16().double() @ w.bfloat16().double().t(), target)])


def test_a_bad_token_or_class_shows(backend):
    x, w, target, g = make()
    clean = gradients(x, w, target, g, reduction="none", backend=backend)
    x[1, 3] = math.inf
    loss, dx, _ = gradients(x, w, target, g, reduction="none", backend=backend)
    assert not loss[1].isfinite()
    others = torch.arange(TOKENS) != 1
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(dx[others], clean[1][others])
    x, w, target, g = make()
    x[1, 3], w[:, 3] = math.inf, -1.0
    w[target[1], 3] = 1.0  # the target's logit is infinite, the others' the other way
    assert not gradients(x, w, target, g, reduction="none", backend=backend)[0][1].isfinite()
    x, w, target, g = make()
    w[5, 2] = math.nan
    assert gradients(x, w, target, g, reduction="none", backend=backend)[0][target >= 0].isnan().all()


def test_errors_name_the_argument():
    x, w, target, _ = make()
    for arguments, options, match in (
        ((x, w[:, :5], target), {}, r"input must be \(\.\.\., D\)"),
        ((x, w, target[:3]), {}, "target must have the shape of input"),
        ((x, w, target.float()), {}, "target must be int64"),
        ((x, w, torch.full_like(target, CLASSES)), {}, f"target holds {CLASSES}"),
        ((x, w, target), {"reduction": "average"}, "reduction must be"),
        ((x, w, target), {"label_smoothing": 1.5}, "label_smoothing must be"),
        ((x, w, target), {"class_weight": torch.ones(3)}, "class_weight must be"),
        ((x, w, target), {"process_group": object()}, "process_group"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            ht.linear_cross_entropy(*arguments, **options)
    with pytest.raises(TypeError, match="linear_cross_entropy has no option 'n'"):
        ht.linear_cross_entropy(x, w, target, n=3.0)
