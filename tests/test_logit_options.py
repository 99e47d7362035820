"""``bias``, ``softcap``, ``return_lse`` and ``token_scaling`` against forms written out in fp64, as their users know them."""

import math

import pytest
import torch
import torch.nn.functional as F

import harmonic_triton as ht
from harmonic_triton.fused import strategy as strategies

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED = ["torch", "triton"]
LOGITS = [("bias", None), (None, 3.0), ("bias", 30.0)]  # (bias, softcap)


def make(dtype=torch.float32, tokens=21, classes=70, width=24):
    """(x, w, bias, target, g): logits of about 5, a token in six ignored, an upstream gradient of every size and sign."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(tokens, width, generator=generator), torch.randn(classes, width, generator=generator)
    bias = 2 * torch.randn(classes, generator=generator)
    target = torch.randint(classes, (tokens,), generator=generator)
    target[4::6] = -100
    g = torch.randn(tokens, generator=generator) * 10.0 ** torch.randint(-2, 2, (tokens,), generator=generator)
    return x.to(DEVICE, dtype), w.to(DEVICE, dtype), bias.to(DEVICE), target.to(DEVICE), g.to(DEVICE)


def logits_of(x, w, bias, cap):
    """F.linear, and what transformers' Gemma 2 does to it: logits / cap, tanh, times cap."""
    logits = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    if cap is not None:
        logits = logits / cap
        logits = torch.tanh(logits)
        logits = logits * cap
    return logits


def gradients(function, leaves, upstream):
    """(value, gradient for each leaf), a leaf being None where it is not there."""
    leaves = [leaf if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    found = torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None], upstream.to(value.dtype))
    return value.detach(), *found


def close(got, want, *bounds):
    """||got - want|| <= bound ||want|| of each; the last bound is that of all further ones."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        bound = bounds[min(i, len(bounds) - 1)]
        assert (a.double() - b).norm() <= bound * b.norm(), (i, (a.double() - b).norm() / b.norm(), bound)


# One pass, products computed again, and the dense form; fp32 keeps 1e-5 of the norm of a gradient.
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("weighted", "label_smoothing", "z_loss"), [(False, 0.0, 0.0), (True, 0.2, 0.03)])
@pytest.mark.parametrize(("biased", "cap"), LOGITS)
def test_value_and_gradients(backend, reduction, weighted, label_smoothing, z_loss, biased, cap):
    x, w, bias, target, g = make()
    weight = torch.linspace(0.2, 1.9, len(w), device=DEVICE) if weighted else None
    upstream = g if reduction == "none" else torch.tensor(1.7, device=DEVICE)
    each = torch.ones(len(w), device=DEVICE) if weight is None else weight

    def wanted(x, w, b):
        logits, class_weight = logits_of(x, w, b, cap), None if weight is None else weight.double()
        losses = F.cross_entropy(logits, target, class_weight, reduction="none", label_smoothing=label_smoothing)
        losses = losses + z_loss * logits.logsumexp(1).square() * (target >= 0)
        return losses if reduction == "none" else losses.sum() / each[target[target >= 0]].sum()

    def given(x, w, b):
        return ht.linear_cross_entropy(
            x, w, target, bias=b, softcap=cap, z_loss=z_loss, class_weight=weight, label_smoothing=label_smoothing,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    leaves = x, w, bias if biased else None
    close(gradients(given, leaves, upstream), gradients(wanted, leaves, upstream), 1e-6, 1e-5)


@pytest.mark.parametrize(("backend", "dtype", "strategy"), [
    ("torch", torch.bfloat16, ""), ("torch", torch.float16, ""), ("torch", torch.float64, ""),
    ("triton", torch.bfloat16, "one pass"), ("triton", torch.bfloat16, "recompute"), ("triton", torch.float16, "recompute"),
])  # fmt: skip
@pytest.mark.parametrize(("biased", "cap"), LOGITS)
def test_other_dtypes_and_both_strategies(backend, dtype, strategy, biased, cap):
    x, w, bias, target, _ = make(dtype)
    bias = bias.double() if dtype == torch.float64 else bias
    leaves, upstream = (x, w, bias if biased else None), torch.tensor(0.6, device=DEVICE)
    wanted = lambda x, w, b: F.cross_entropy(logits_of(x, w, b, cap), target, reduction="sum") / 8
    given = lambda x, w, b: ht.linear_cross_entropy(
        x, w, target, bias=b, softcap=cap, reduction="sum", num_items=8, backend=backend, memory_budget=40_000
    )
    with strategies.force(strategy or "recompute"):
        got = gradients(given, leaves, upstream)
    want = gradients(wanted, [leaf if leaf is None else leaf.double() for leaf in leaves], upstream)
    eps = torch.finfo(dtype).eps
    close(got, want, 1e-12 if dtype == torch.float64 else 1e-6, 1e-12 if dtype == torch.float64 else 2 * eps)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("biased", "cap"), [("bias", None), (None, 100.0), ("bias", 100.0)])
def test_a_loss_of_1e_20_keeps_its_digits(backend, biased, cap):
    """Relative error 1e-5 at true losses from 1e-3 to 1e-20; with a bias the target's is among the largest."""
    x, w, bias, target, _ = make(tokens=40, classes=300, width=256)
    target, bias = target.clamp_min(0), bias if biased else None
    length = torch.linspace(10, 110 if cap else 70, 40, dtype=torch.float64, device=DEVICE).unsqueeze(1)
    x = (length * w[target].double() / w[target].double().square().sum(1, keepdim=True)).float()
    options = {"bias": bias, "softcap": cap, "reduction": "none"}
    want = ht.linear_cross_entropy(x.double(), w.double(), target, backend="reference", **options)
    got = ht.linear_cross_entropy(x, w, target, backend=backend, **options)
    assert want.min() < 1e-20 < 1e-3 < want.max()
    assert ((got - want).abs() / want).max() < 1e-5


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_classes_at_the_cap_keep_their_gradients(backend):
    """Eight times the cap: 1 - tanh^2 is 4e-7, which 1 - t * t in fp32 reads as a multiple of 1e-7. Row by row."""
    x, w, bias, target, g = make(classes=12)
    target, cap = torch.arange(len(x), device=DEVICE) % 12, 0.5
    x = 4.0 * w[target] / w[target].square().sum(1, keepdim=True) + 0.01 * x
    leaves = x, w, 0.1 * bias
    given = lambda x, w, b: ht.linear_cross_entropy(
        x, w, target, bias=b, softcap=cap, reduction="none", backend=backend
    )

    def wanted(x, w, b):  # d loss / d a with the derivative of tanh as 1/cosh^2
        logits = F.linear(x, w, b)
        slope = torch.cosh(logits.detach() / cap) ** -2
        capped = (cap * torch.tanh(logits / cap)).detach() + slope * (logits - logits.detach())
        return F.cross_entropy(capped, target, reduction="none")

    got = gradients(given, leaves, g)
    want = gradients(wanted, [leaf.double() for leaf in leaves], g)
    assert (torch.cosh(F.linear(x, w)[torch.arange(len(x)), target].double() / cap) ** -2).max() < 1e-5
    for a, b in zip(got, want, strict=True):
        a, b = a.double().reshape(len(a), -1), b.reshape(len(b), -1)
        assert ((a - b).norm(dim=1) <= 2e-5 * b.norm(dim=1)).all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("biased", "cap"), [("bias", None), (None, 4000.0), ("bias", 4000.0)])
def test_a_common_mean_of_100_times_the_spread(backend, dtype, reduction, biased, cap):
    """The mean is part of a logit that is capped, here by some hundreds: bounds as those of its products,
    eps ||x|| ||w|| of each logit."""
    generator = torch.Generator().manual_seed(1)
    x, w, bias, target, g = make()
    w = (w.float() + 100 * torch.randn(24, generator=generator).to(DEVICE)).to(dtype)
    x, up = x.to(dtype), g if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    leaves = x, w, bias if biased else None
    given = lambda x, w, b: ht.linear_cross_entropy(
        x, w, target, bias=b, softcap=cap, reduction=reduction, backend=backend
    )
    wanted = lambda x, w, b: F.cross_entropy(logits_of(x, w, b, cap), target, reduction=reduction)
    want = gradients(wanted, [leaf if leaf is None else leaf.double() for leaf in leaves], up)
    with strategies.force("one pass"):
        got = gradients(given, leaves, up)
    logits = logits_of(x, w, bias if biased else None, None)
    assert logits.abs().mean() > 200
    unit = torch.finfo(torch.float32).eps
    off = 16 * unit * (x.double().norm(dim=1) * w.double().norm(dim=1).max()).max()  # of a log-score, and so of log p
    narrow = torch.finfo(dtype).eps
    slope = 1.0 if cap is None else (1 - torch.tanh(logits / cap) ** 2).max()
    p = torch.softmax(logits_of(x, w, bias if biased else None, cap), 1)
    others = p.scatter(1, target.clamp_min(0).unsqueeze(1), 0.0).sum(1)[target >= 0]
    size = (up.double().abs() * torch.ones(len(x), device=DEVICE))[target >= 0] * others * slope
    entries = {0: want[0].abs(), 1: 2 * w.double().norm(dim=1).max() * size, 2: 2 * x.double().norm(dim=1).max() * size}
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        bound = entries.get(i, 2 * size).double().norm() * (off + (2 * narrow if i else 0)) + 2 * narrow * b.norm() * (
            i > 0
        )
        assert (a.double() - b).norm() <= bound, (i, (a.double() - b).norm() / b.norm())


# --- log-sum-exp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_log_sum_exp_has_a_gradient(backend, reduction):
    """A z-loss of one's own from it, beside the built-in one; with statistics it is the third."""
    x, w, bias, target, g = make()
    valid = target >= 0
    own = (0.01 * g.abs() + 0.05).double()

    def wanted(x, w, b):
        logits = logits_of(x, w, b, 30.0)
        lse = torch.where(valid, logits.logsumexp(1), 0.0)
        return F.cross_entropy(logits, target, reduction=reduction).sum() + (own * lse.square()).sum() / len(x)

    def given(x, w, b):
        options = {"bias": b, "softcap": 30.0, "reduction": reduction, "backend": backend}
        loss, lse = ht.linear_cross_entropy(x, w, target, return_lse=True, **options)
        again, stats, third = ht.linear_cross_entropy(x, w, target, return_stats=True, return_lse=True, **options)
        assert torch.equal(lse, third)
        assert torch.equal(loss, again)
        assert not lse[~valid].any()
        apart = lse - stats.target_logit + stats.target_log_prob
        assert apart[valid].abs().max() < 1e-5
        return loss.sum() + (own * lse.square()).sum() / len(x)

    up = torch.tensor(0.8, device=DEVICE)
    close(gradients(given, (x, w, bias), up), gradients(wanted, (x, w, bias), up), 1e-6, 1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_the_log_sum_exp_of_a_shifted_sequence(backend):
    x, w, bias, target, _ = make()
    x, target = x.view(3, 7, -1), target.view(3, 7)
    loss, lse = ht.linear_cross_entropy(x, w, target, bias=bias, shift=2, return_lse=True, backend=backend)
    logits = logits_of(x, w, bias, None)[:, :-2]
    assert (loss - F.cross_entropy(logits.flatten(0, 1), target[:, 2:].flatten())).abs() < 1e-5
    assert lse.shape == (3, 5)
    assert (lse - torch.where(target[:, 2:] >= 0, logits.logsumexp(-1), 0.0)).abs().max() < 1e-5


# --- token scaling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
def test_token_scaling_of_logits(backend, reduction, strategy):
    """All of a token's loss times its target's probability, which is a constant; the mean is over the tokens as ever."""
    dtype = torch.bfloat16 if strategy == "one pass" and backend == "triton" else torch.float32
    x, w, bias, target, g = make(dtype)
    upstream = g if reduction == "none" else torch.tensor(1.7, device=DEVICE)

    def wanted(x, w, b):
        logits = logits_of(0.3 * x, w, b, 30.0)
        p = torch.softmax(logits, 1).gather(1, target.clamp_min(0).unsqueeze(1)).squeeze(1).detach()
        losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1 * (dtype == torch.float32))
        losses = p * (losses + 0.02 * logits.logsumexp(1).square() * (target >= 0))
        return losses if reduction == "none" else losses.sum() / (target >= 0).sum()

    def given(x, w, b):
        return ht.linear_cross_entropy(
            (0.3 * x.double()).to(x.dtype), w, target, bias=b, softcap=30.0, z_loss=0.02, token_scaling=True,
            label_smoothing=0.1 * (dtype == torch.float32), reduction=reduction, backend=backend,
        )  # fmt: skip

    with strategies.force(strategy):
        got = gradients(given, (x, w, bias), upstream)
    rounding = 30 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0  # 0.3 x is rounded as well
    want = gradients(wanted, (x, w, bias), upstream)
    close(got, want, max(1e-6, rounding), max(1e-5, rounding))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_token_scaling_of_the_harmonic_loss(backend, reduction):
    """By HarMax's own probability, without the mix, also in the exponent's gradient."""
    x, w, _, target, g = make()
    n = torch.tensor(3.0, device=DEVICE)
    upstream = g if reduction == "none" else torch.tensor(1.7, device=DEVICE)
    losses = lambda x, w, n: ht.linear_harmonic_loss(
        x, w, target, n=n, uniform_mix=0.01, reduction="none", backend="reference"
    )

    def wanted(x, w, n):
        p = (-ht.linear_harmonic_loss(x, w, target, n=n, reduction="none", backend="reference").detach()).exp()
        return p * losses(x, w, n) if reduction == "none" else (p * losses(x, w, n)).sum()

    given = lambda x, w, n: ht.linear_harmonic_loss(
        x, w, target, n=n, uniform_mix=0.01, token_scaling=True, reduction=reduction, backend=backend
    )
    want = gradients(wanted, (x.double(), w.double(), n.double()), upstream)
    close(gradients(given, (x, w, n), upstream), want, 1e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
def test_a_nan_token_that_is_masked_out_stays_out_under_scaling(backend, function):
    x, w, _, target, _ = make()
    target = target.clamp_min(0)
    x[3] = math.nan
    x, w = x.requires_grad_(), w.requires_grad_()
    losses = function(x, w, target, token_scaling=True, reduction="none", backend=backend)
    assert losses[3].isnan()
    torch.where(losses.isnan(), 0.0, losses).sum().backward()
    assert not x.grad[3].any()
    assert w.grad.isfinite().all()


# --- what is there, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("asked", ["b", "xb"])
def test_only_what_is_asked_for_gets_a_gradient(backend, reduction, asked):
    x, w, bias, target, g = make(torch.bfloat16)
    up = g if reduction == "none" else torch.tensor(0.6, device=DEVICE)

    def run(names):
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in (("x", x), ("w", w), ("b", bias))}
        loss = ht.linear_cross_entropy(
            leaves["x"], leaves["w"], target, bias=leaves["b"], softcap=9.0, reduction=reduction, backend=backend
        )
        loss.backward(up)
        return {k: leaf.grad for k, leaf in leaves.items()}

    with strategies.force("one pass"):
        every, some = run("xwb"), run(asked)
    assert {k for k, gradient in some.items() if gradient is not None} == set(asked)
    assert all(torch.equal(some[k], every[k]) for k in asked)


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_bias_of_another_dtype(backend, dtype):
    """Read as it is: a bias kept in fp32 beside 16-bit weights loses nothing; its gradient has its own dtype."""
    x, w, bias, target, _ = make(torch.bfloat16)
    bias = bias.to(dtype).requires_grad_()
    loss = ht.linear_cross_entropy(x, w, target, bias=bias, reduction="none", backend=backend)
    assert bias.dtype == dtype
    want = F.cross_entropy(logits_of(x, w, bias, None), target, reduction="none")
    assert (loss - want).abs().max() < 1e-5 * want.max()
    assert torch.autograd.grad(loss.sum(), bias)[0].dtype == dtype


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("cap", [None, 30.0])
def test_one_class_no_token_and_nothing_but_ignored_ones(backend, cap):
    x, w, bias, target, _ = make(torch.bfloat16)
    for tokens, classes in ((0, 70), (5, 1)):
        leaves = (
            x[:tokens].clone().requires_grad_(),
            w[:classes].clone().requires_grad_(),
            bias[:classes].clone().requires_grad_(),
        )
        loss = ht.linear_cross_entropy(
            *leaves[:2], target[:tokens] * 0, bias=leaves[2], softcap=cap, reduction="sum", backend=backend
        )
        loss.backward()
        assert loss == 0
        assert not any(leaf.grad.any() for leaf in leaves)
    leaves = x.clone().requires_grad_(), w.clone().requires_grad_(), bias.clone().requires_grad_()
    x.fill_(math.nan)  # of ignored tokens not even a NaN counts
    loss = ht.linear_cross_entropy(
        *leaves[:2], torch.full_like(target, -100), bias=leaves[2], softcap=cap, backend=backend
    )
    loss.backward()
    assert loss == 0
    assert not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("biased", "cap"), [("bias", 30.0)])
def test_the_nan_of_an_ignored_token_stays_out(backend, strategy, biased, cap):
    x, w, bias, target, _ = make(torch.bfloat16)
    clean = x.clone()
    x[target < 0] = math.nan
    up = torch.tensor(0.7, device=DEVICE)
    given = lambda x, w, b: ht.linear_cross_entropy(x, w, target, bias=b, softcap=cap, reduction="sum", backend=backend)
    with strategies.force(strategy):
        got, want = (gradients(given, (a, w, bias if biased else None), up) for a in (x, clean))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_statistics_are_of_the_logits_as_the_loss_sees_them(backend):
    x, w, bias, target, _ = make()
    _, stats = ht.linear_cross_entropy(x, w, target, bias=bias, softcap=6.0, return_stats=True, backend=backend)
    logits, valid = logits_of(x, w, bias, 6.0), target >= 0
    log_p = logits.log_softmax(1)
    at = target.clamp_min(0).unsqueeze(1)
    assert torch.equal(stats.predicted[valid], logits.argmax(1)[valid])
    assert (stats.target_logit - logits.gather(1, at).squeeze(1))[valid].abs().max() < 1e-5
    assert (stats.target_log_prob - log_p.gather(1, at).squeeze(1))[valid].abs().max() < 1e-5
    assert (stats.entropy + (log_p.exp() * log_p).sum(1))[valid].abs().max() < 1e-5


@pytest.mark.parametrize("backend", FUSED)
def test_a_prediction_beyond_the_cap_is_the_larger_logit(backend):
    """Both are the cap in fp32; the difference of the two is 1e-8 of it, and tells which is the larger."""
    w = torch.eye(4, device=DEVICE)
    x = torch.tensor([[10.0, 10.2, 0.0, 1.0], [10.2, 10.0, 0.0, 1.0]], device=DEVICE)
    target = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss, stats = ht.linear_cross_entropy(
        x, w, target, softcap=1.0, reduction="none", return_stats=True, backend=backend
    )
    assert stats.predicted.tolist() == [1, 0]
    assert (loss - F.cross_entropy(logits_of(x, w, None, 1.0), target, reduction="none")).abs().max() < 1e-6


@pytest.mark.parametrize("size", [1e9, 1e18, 1e30])
@pytest.mark.parametrize("backend", FUSED)
def test_logits_far_beyond_the_cap_differ_by_two_caps(backend, size):
    """Of huge numbers of both signs |a| + |b| - |a - b| is rounding, and not the 0 that an exponential is taken of."""
    x, w, bias, _, _ = make(tokens=9, classes=9)
    bias, target = size * bias, torch.arange(9, device=DEVICE)
    options = {"bias": bias, "softcap": 30.0, "backend": backend, "reduction": "none", "return_lse": True}
    loss, lse = ht.linear_cross_entropy(x, w, target, **options)
    logits = logits_of(x, w, bias, 30.0)
    assert (loss - F.cross_entropy(logits, target, reduction="none")).abs().max() < 1e-5
    assert (lse - logits.logsumexp(1)).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_under_torch_func(backend):
    """Per-sample gradients by vmap, and a second backward pass."""
    x, w, bias, target, _ = make(tokens=6)
    target = target.clamp_min(0)

    def loss(w, b, x, t):
        return ht.linear_cross_entropy(x[None], w, t[None], bias=b, softcap=5.0, token_scaling=True, backend=backend)

    dw, db = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))(w, bias, x, target)
    for i in range(6):
        w_, b_ = w.clone().requires_grad_(), bias.clone().requires_grad_()
        value = loss(w_, b_, x[i], target[i])
        close((dw[i], db[i]), torch.autograd.grad(value, (w_, b_), retain_graph=True), 1e-6)
        close((dw[i], db[i]), torch.autograd.grad(value, (w_, b_)), 1e-6)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        b_ = bias.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(w, b_, x[0], target[0]), b_, create_graph=True)
        gradient.sum().backward()


def test_compiled_without_a_break():
    x, w, bias, target, _ = make()

    def step(x, w, b, reduction):
        loss, lse = ht.linear_cross_entropy(
            x, w, target, bias=b, softcap=5.0, return_lse=True, reduction=reduction, backend="torch"
        )
        plain = ht.linear_cross_entropy(x, w, target, bias=b, token_scaling=True, backend="torch")
        return loss.sum() + 0.1 * lse.square().sum() + plain

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    up = torch.tensor(0.9, device=DEVICE)
    want = gradients(lambda *a: step(*a, "mean"), (x, w, bias), up)
    close(gradients(lambda *a: compiled(*a, "mean"), (x, w, bias), up), want, 1e-6)


def test_what_is_wrong_is_refused():
    x, w, bias, target, _ = make()
    loss = lambda **options: ht.linear_cross_entropy(x, w, target, **options)
    with pytest.raises(
        TypeError, match="bias is the vector .V,. that is added to the logits and no switch, got False; leave"
    ):
        loss(bias=False)
    with pytest.raises(TypeError, match="bias must be a torch.Tensor"):
        loss(bias=0.5)
    for bad in (bias[:-1], bias[None], bias.long()):
        with pytest.raises(ValueError, match=r"bias must be floating and of shape \((70|V),\)"):
            loss(bias=bad)
    with pytest.raises(ValueError, match="bias is on meta"):
        loss(bias=bias.to("meta"))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="softcap must be finite and > 0.*None is no cap"):
            loss(softcap=bad)
    with pytest.raises(TypeError, match="softcap must be a number"):
        loss(softcap="30")
    for name in ("return_lse", "token_scaling"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            loss(**{name: 1})
    for name in ("bias", "softcap", "return_lse", "z_loss"):
        with pytest.raises(
            TypeError, match=f"linear_harmonic_loss has no option '{name}' .(distances have|HarMax has|a common)"
        ):
            ht.linear_harmonic_loss(x, w, target, **{name: None})
