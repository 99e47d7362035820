"""What peers get wrong: every line of the semantics that the fused loss promises, on both fast backends."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import harmonic_triton as ht
from harmonic_triton import reference
from harmonic_triton.functional import linear_harmonic_loss
from harmonic_triton.fused import ops as _ops

TOKENS, WIDTH, CLASSES, N = 13, 21, 37, 6.0


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def make(tokens=TOKENS, width=WIDTH, classes=CLASSES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    w = torch.randn(classes, width, generator=generator).to(dtype)
    target = torch.randint(classes, (tokens,), generator=generator)
    g = 0.3 + torch.rand(tokens, generator=generator)
    return x, w, target, g


def gradients(x, w, target, *, upstream=1.7, **options):
    """(loss, dX, dW) under a scalar or per-token upstream gradient."""
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = linear_harmonic_loss(x, w, target, **{"n": N, **options})
    loss.backward(torch.full_like(loss, upstream) if isinstance(upstream, float) else upstream.to(loss.dtype))
    return loss.detach(), x.grad, w.grad


def close(got, wanted, tolerance=2e-5):
    """Relative in the norm of the whole tensor; 2e-5 is fp32's eps times n/2 + 2 times the largest kappa here (under 20)."""
    got, wanted = got.double(), wanted.double()
    assert got.shape == wanted.shape
    error = (got - wanted).norm().item()
    assert error <= tolerance * wanted.norm().item(), f"relative error {error / wanted.norm().item():.2e}"


def all_close(got, wanted, tolerance=2e-5):
    for one, other in zip(got, wanted, strict=True):
        close(one, other, tolerance)


# --- reductions, upstream gradients, autograd ------------------------------------------------------------------------


def test_unreduced_loss_under_a_non_uniform_upstream_gradient(backend):
    x, w, target, g = make()
    g[3] = 0.0
    all_close(gradients(x, w, target, upstream=g, reduction="none", backend=backend),
              gradients(x, w, target, upstream=g, reduction="none", backend="reference"))  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_second_backward_with_another_upstream_gradient(backend, reduction):
    x, w, target, g = make()
    x.requires_grad_(), w.requires_grad_()
    loss = linear_harmonic_loss(x, w, target, n=N, reduction=reduction, backend=backend)
    up = g if reduction == "none" else torch.tensor(0.6)
    first = torch.autograd.grad(loss, (x, w), up, retain_graph=True)
    again = torch.autograd.grad(loss, (x, w), up, retain_graph=True)
    other = torch.autograd.grad(loss, (x, w), -2.5 * up)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        close(c, -2.5 * a, 1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", ["x", "w"])
def test_nothing_is_computed_for_a_frozen_operand(backend, reduction, frozen, monkeypatch):
    asked = []
    module = _ops.backend_module(backend)
    for name in ("backward", "forward_backward"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, run=run: asked.append(a[-1][:2]) or run(*a))
    x, w, target, g = make()
    up = g if reduction == "none" else torch.tensor(1.3)
    _, dx, dw = gradients(x, w, target, upstream=up, reduction=reduction, backend=backend)
    trained = (w if frozen == "x" else x).clone().requires_grad_()
    asked.clear()
    tensors = (x, trained) if frozen == "x" else (trained, w)
    linear_harmonic_loss(*tensors, target, n=N, reduction=reduction, backend=backend).backward(up)
    assert asked == [(frozen == "w", frozen == "x")]
    close(trained.grad, dw if frozen == "x" else dx, 1e-6)


def test_no_gradient_is_formed_where_none_can_flow(monkeypatch):
    def refuse(*_):
        raise AssertionError("gradients were computed for nothing")

    monkeypatch.setattr(_ops.backend_module("torch"), "forward_backward", refuse)
    x, w, target, _ = make()
    linear_harmonic_loss(x, w, target)
    with torch.no_grad():
        linear_harmonic_loss(x.requires_grad_(), w, target)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_targets_ignored(backend, reduction):
    x, w, target, g = make()
    target.fill_(-100)
    x[2, 3] = math.nan  # what an ignored token holds does not matter
    up = g if reduction == "none" else 1.7
    loss, dx, dw = gradients(x, w, target, upstream=up, reduction=reduction, backend=backend)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.equal(dw, torch.zeros_like(w))


def test_ignore_index_may_be_a_class(backend):
    x, w, target, g = make()
    target[::3] = 5
    options = {"reduction": "none", "ignore_index": 5, "upstream": g}
    got = gradients(x, w, target, backend=backend, **options)
    all_close(got, gradients(x, w, target, backend="reference", **options))
    assert torch.equal(got[1][target == 5], torch.zeros_like(got[1][target == 5]))


@pytest.mark.parametrize("ignored", [CLASSES, 255, -7])
def test_ignored_tokens_have_no_class_weight(backend, ignored):
    """Whatever number marks them; a target that is no class and no mark is refused all the same."""
    x, w, target, _ = make()
    target[::3] = ignored
    options = {"class_weight": torch.linspace(0.5, 2.0, CLASSES), "ignore_index": ignored, "upstream": 0.7}
    got = gradients(x, w, target, backend=backend, **options)
    kept = target != ignored
    wanted = gradients(x[kept], w, target[kept], backend=backend, **options)
    all_close((got[0], got[1][kept], got[2]), wanted, 1e-6)
    if x.device.type == "cpu":  # a GPU would stop
        with pytest.raises(ValueError, match=f"target holds {ignored}, outside"):
            gradients(x, w, target, backend=backend, **{**options, "ignore_index": -100})


def test_mean_is_the_sum_over_the_count_of_kept_tokens(backend):
    x, w, target, _ = make()
    target[1::4] = -100
    kept = int((target >= 0).sum())
    mean, total = (linear_harmonic_loss(x, w, target, n=N, reduction=r, backend=backend) for r in ("mean", "sum"))
    close(mean * kept, total, 1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_makes_micro_batches_add_up_to_one_batch(backend, as_tensor):
    x, w, target, _ = make(tokens=24)
    target[::5] = -100
    count = int((target >= 0).sum())
    _, dx, dw = gradients(x, w, target, backend=backend)
    total, parts, dw_sum = 0.0, [], torch.zeros_like(w)
    for rows in torch.arange(24).tensor_split(5):
        items = torch.tensor(count) if as_tensor else count
        loss, dx_part, dw_part = gradients(x[rows], w, target[rows], num_items=items, backend=backend)
        total, dw_sum = total + loss, dw_sum + dw_part
        parts.append(dx_part)
    close(torch.cat(parts), dx)
    close(dw_sum, dw)
    close(total, linear_harmonic_loss(x, w, target, n=N, backend=backend))


# --- options against dense formulas written here ---------------------------------------------------------------------


def dense_log_p(x, w, n):
    return F.log_softmax(-n * torch.cdist(x.double(), w.double(), compute_mode="donot_use_mm_for_euclid_dist").log(), 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_smoothing_and_class_weights_are_those_of_cross_entropy(backend, weighted, smoothing, reduction):
    x, w, target, _ = make()
    target[::4] = -100
    weight = torch.linspace(0.2, 3.0, CLASSES) if weighted else None
    xs, ws = x.double().requires_grad_(), w.double().requires_grad_()
    wanted = F.cross_entropy(
        dense_log_p(xs, ws, N), target, weight=None if weight is None else weight.double(),
        label_smoothing=smoothing, reduction=reduction,
    )  # fmt: skip
    wanted.backward(torch.full_like(wanted, 1.7))
    got = gradients(x, w, target, class_weight=weight, label_smoothing=smoothing, reduction=reduction, backend=backend)
    all_close(got, (wanted.detach(), xs.grad, ws.grad))


@pytest.mark.parametrize("n", [2.0, 28.0, 1536.0])
def test_eps_and_uniform_mix_as_the_authors_use_them(backend, n):
    x, w, target, g = make()
    x = (w[target] + w[(target + 1) % CLASSES]) / 2 + 1e-3 * x  # between two classes: p is near 1/2 even at n = 1536
    alpha, eps = 0.01, 1e-4
    xs, ws = x.double().requires_grad_(), w.double().requires_grad_()
    s = (xs.unsqueeze(1) - ws).square().sum(-1) + eps
    p = F.softmax(-n / 2 * s.log(), 1).gather(1, target.unsqueeze(1)).squeeze(1)
    wanted = -torch.log((p + alpha / CLASSES) / (1 + alpha))
    wanted.backward(g.double())
    got = gradients(x, w, target, n=n, eps=eps, uniform_mix=alpha, reduction="none", upstream=g, backend=backend)
    # n/2 times fp32's rounding of a squared distance near 40, eps * kappa under 1e-6, enters p
    all_close(got, (wanted.detach(), xs.grad, ws.grad), 2e-6 * max(n, 10))


def test_every_option_at_once(backend):
    x, w, target, _ = make(tokens=20)
    target[3::6] = -100
    options = {"eps": 1e-3, "uniform_mix": 0.05, "class_weight": torch.linspace(0.5, 2, CLASSES), "num_items": 11}
    if backend == "torch":
        options["label_smoothing"] = 0.1
    n_values = [torch.tensor(4.5, requires_grad=True) for _ in range(2)]
    got = gradients(x, w, target, **{**options, "n": n_values[0]}, backend=backend)
    wanted = gradients(x, w, target, **{**options, "n": n_values[1]}, backend="reference")
    all_close(got, wanted)
    close(n_values[0].grad, n_values[1].grad)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_learnable_exponent(backend, reduction):
    x, w, target, g = make()
    found = []
    for which in (backend, "reference"):
        n = torch.tensor(5.0, requires_grad=True)
        loss = linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=which)
        loss.backward(g.to(loss.dtype) if reduction == "none" else torch.tensor(2.5))
        found.append(n.grad)
    close(*found)


@pytest.mark.parametrize("shift", [True, 1, 2, 4])  # of sequences of 4: 4 leaves nothing to predict
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_shift_is_slicing(backend, shift, reduction):
    x, w, target, g = make(tokens=24)
    x, target, g = x.view(2, 3, 4, WIDTH), target.view(2, 3, 4), g.view(2, 3, 4)[..., int(shift) :]
    target[0, 1, 2] = -100
    options = {"reduction": reduction, "upstream": g if reduction == "none" else 1.7}
    for which in (backend, "reference") if backend == "torch" else (backend,):
        got = gradients(x, w, target, shift=shift, backend=which, **options)
        wanted = gradients(x[..., : -int(shift), :], w, target[..., int(shift) :], backend=which, **options)
        assert got[0].shape == wanted[0].shape
        all_close((got[0], got[1][..., : -int(shift), :], got[2]), wanted, 1e-6)
        rest = got[1][..., -int(shift) :, :]
        assert torch.equal(rest, torch.zeros_like(rest))


@pytest.mark.parametrize("name", ["linear_harmonic_loss", "linear_cross_entropy"])
def test_statistics_are_shifted_with_the_loss(backend, name):
    x, w, target, _ = make(tokens=24)
    x, target = x.view(2, 12, WIDTH), target.view(2, 12)
    loss = getattr(ht, name)
    options = {"reduction": "none", "return_stats": True}
    for which in (backend, "reference"):
        got = loss(x, w, target, shift=np.int64(5), backend=which, **options)
        wanted = loss(x[:, :-5], w, target[:, 5:], backend=which, **options)
        for one, other in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
            assert one.shape == (2, 7) and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for off in (False, 0):
        assert torch.equal(loss(x, w, target, shift=off), loss(x, w, target))


def test_shift_copies_no_input():
    x, w, target, _ = make(tokens=24)
    read = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "harmonic_triton":
                read.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with Operators():
        linear_harmonic_loss(x.view(2, 12, WIDTH), w, target.view(2, 12), shift=3)
    assert read == [x.data_ptr()]


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_shift_under_vmap_and_compile(reduction):
    x, w, target, _ = make(tokens=24)
    x, target = x.view(3, 2, 4, WIDTH), target.view(3, 2, 4)
    function = lambda a, t: linear_harmonic_loss(a, w, t, n=N, shift=2, reduction=reduction)
    wanted = torch.stack([function(*pair) for pair in zip(x, target, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(x, target), wanted)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x[1], target[1]), wanted[1])
    short = torch.compile(function, fullgraph=False, backend="aot_eager", dynamic=False)
    with pytest.raises(ValueError, match="shift=2 needs a sequence"):
        short(x[0, :, :1], target[0, :, :1])


@pytest.mark.parametrize("bad", [0, -3, math.nan, math.inf])
def test_the_value_of_a_tensor_num_items_is_checked_wherever_it_is_used(bad):
    x, w, target, _ = make()
    x.requires_grad_()
    good, items = torch.tensor(7.0), torch.tensor(bad, device="cpu")  # on a GPU its assert ends the process
    loss = lambda count, **options: linear_harmonic_loss(x, w, target, n=N, num_items=count, **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(good), loss(7))
    torch.testing.assert_close(torch.vmap(loss)(torch.tensor([7.0, 3.5])), torch.stack([loss(7), loss(3.5)]))
    for refused in (
        lambda: loss(items),
        lambda: loss(items, reduction="sum", backend="reference"),
        lambda: compiled(items.float()),
        lambda: torch.vmap(loss)(torch.stack([good.cpu(), items.float()])),
    ):
        with pytest.raises(ValueError, match="num_items must be finite and > 0 .*got"):
            refused()
    _, slope = torch.func.jvp(loss, (good,), (torch.tensor(1.0),))
    torch.testing.assert_close(slope, -loss(7).detach() / 7)


@pytest.mark.parametrize("shape", [(), (13,), (1, 13), (13, 1, 1)])
def test_leading_shapes(backend, shape):
    x, w, target, _ = make(tokens=math.prod(shape))
    loss, stats = linear_harmonic_loss(
        x.view(*shape, WIDTH), w, target.view(shape), n=N, reduction="none", return_stats=True, backend=backend
    )
    assert loss.shape == shape
    assert all(value.shape == shape for value in stats)
    close(loss.flatten(), linear_harmonic_loss(x, w, target, n=N, reduction="none", backend="reference"))


def test_non_contiguous_everything(backend):
    x, w, target, g = make(tokens=2 * TOKENS, width=2 * WIDTH, classes=2 * CLASSES)
    target = target % CLASSES
    for xs, ws in ((x[::2, 1::2], w[1::2, ::2]), (x[:TOKENS, :WIDTH].t().contiguous().t(), w[:CLASSES, :WIDTH].t().contiguous().t()),
                   (x[:1, :WIDTH].expand(TOKENS, -1), w[:CLASSES, :WIDTH].flip(0))):  # fmt: skip
        got = gradients(xs, ws, target[::2], upstream=g[::2], reduction="none", backend=backend)
        wanted = gradients(xs.contiguous(), ws.contiguous(), target[::2].contiguous(), upstream=g[::2].contiguous(),
                           reduction="none", backend=backend)  # fmt: skip
        all_close(got, wanted, 1e-6)


def test_upstream_gradient_that_is_an_expanded_scalar(backend):
    x, w, target, _ = make()
    x.requires_grad_()
    linear_harmonic_loss(x, w, target, n=N, reduction="none", backend=backend).sum().mul(1.7).backward()
    close(x.grad, gradients(x, w, target, reduction="sum", backend=backend)[1], 1e-6)


# --- shapes at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(backend, reduction):
    x, w, target, _ = make()
    loss, dx, dw = gradients(x[:0], w, target[:0], reduction=reduction, backend=backend)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    assert dx.shape == (0, WIDTH)
    assert torch.equal(dw, torch.zeros_like(w))


def test_one_class_has_nothing_to_learn(backend):
    x, w, _, g = make(classes=1)
    target = torch.zeros(TOKENS, dtype=torch.int64)
    loss, dx, dw = gradients(x, w, target, upstream=g, reduction="none", backend=backend)
    for value in (loss, dx, dw):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("classes", [2, 3, 65])
@pytest.mark.parametrize("width", [1, 3, 17, 33])
def test_odd_sizes(backend, classes, width):
    x, w, target, g = make(width=width, classes=classes)
    all_close(gradients(x, w, target, upstream=g, reduction="none", backend=backend),
              gradients(x, w, target, upstream=g, reduction="none", backend="reference"), 1e-4)  # fmt: skip


@pytest.mark.parametrize("budget", [1, 4 * CLASSES * 3, 10**6])
def test_results_do_not_depend_on_the_memory_budget(backend, budget):
    x, w, target, _ = make()
    for reduction in ("none", "mean"):
        got = gradients(x, w, target, reduction=reduction, backend=backend, memory_budget=budget)
        all_close(got, gradients(x, w, target, reduction=reduction, backend=backend), 1e-6)


# --- where distances vanish ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1.0, 2.0, 28.0])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_x_on_its_class_vector(backend, n, reduction):
    x, w, target, g = make()
    x = w[target].clone()
    up = g if reduction == "none" else 1.7
    loss, dx, dw = gradients(x, w, target, upstream=up, n=n, reduction=reduction, backend=backend)
    for value in (loss, dx, dw):
        assert torch.equal(value, torch.zeros_like(value))


def test_x_on_another_class_vector(backend):
    x, w, target, g = make()
    x = w[(target + 1) % CLASSES].clone()
    got = gradients(x, w, target, upstream=g, reduction="none", backend=backend)
    assert all(value.isfinite().all() for value in got)
    all_close(got, gradients(x, w, target, upstream=g, reduction="none", backend="reference"), 1e-4)
    assert got[0].min() > 10  # d^-n against 1.2e-7^-n


def test_duplicate_class_vectors(backend):
    x, w, target, g = make()
    w[20:] = w[: CLASSES - 20].clone()
    all_close(gradients(x, w, target, upstream=g, reduction="none", backend=backend),
              gradients(x, w, target, upstream=g, reduction="none", backend="reference"))  # fmt: skip
    on = w[target].clone()  # on two class vectors at once: p = 1/2 for those with a duplicate, and no gradient
    loss, dx, dw = gradients(on, w, target, upstream=g, reduction="none", backend=backend)
    twice = (target < CLASSES - 20) | (target >= 20)
    close(loss[twice], torch.full_like(loss[twice], math.log(2)), 1e-6)
    assert torch.equal(loss[~twice], torch.zeros_like(loss[~twice]))
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scaling_x_and_w_leaves_the_loss_alone(backend, scale):
    x, w, target, g = make()
    small = gradients(x, w, target, upstream=g, reduction="none", backend=backend)
    large = gradients(x * scale, w * scale, target, upstream=g, reduction="none", backend=backend)
    all_close((large[0], large[1] * scale, large[2] * scale), small)


@pytest.mark.parametrize("ratio", [1e-4, 1e4, 1e6])
def test_norms_far_apart(backend, ratio):
    x, w, target, g = make()
    x = x * ratio
    got = gradients(x, w, target, upstream=g, reduction="none", backend=backend)
    wanted = gradients(x, w, target, upstream=g, reduction="none", backend="reference")
    all_close(got, wanted, 1e-6)


@pytest.mark.parametrize("n", [0.5, 1.0, 28.0, 256.0, 1536.0])
def test_exponents(backend, n):
    x, w, target, g = make()
    got = gradients(x, w, target, upstream=g, n=n, reduction="none", backend=backend)
    wanted = gradients(x, w, target, upstream=g, n=n, reduction="none", backend="reference")
    all_close(got, wanted, 2e-6 * max(n, 10))


# --- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_bad_row_poisons_its_own_loss_and_nothing_else(backend, poison):
    x, w, target, g = make()
    clean = linear_harmonic_loss(x, w, target, n=N, reduction="none", backend=backend)
    x[4, 7] = poison
    got = linear_harmonic_loss(x, w, target, n=N, reduction="none", backend=backend)
    others = torch.arange(TOKENS) != 4
    assert got[4].isnan()
    close(got[others], clean[others], 1e-6)
    g[4] = 0.0  # and where the loop drops that row, its gradients are clean
    _, dx, dw = gradients(x, w, target, upstream=g, reduction="none", backend=backend)
    _, dx_others, dw_others = gradients(
        x[others], w, target[others], upstream=g[others], reduction="none", backend=backend
    )
    close(dx[others], dx_others, 1e-6)
    close(dw, dw_others, 1e-6)
    assert torch.equal(dx[4], torch.zeros_like(dx[4]))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_outputs_do_not_read_uninitialised_memory(backend, reduction, monkeypatch):
    """Every buffer the backends allocate without filling starts as NaN; results must not change by a bit."""
    x, w, target, g = make()
    target[2] = -100
    up = g if reduction == "none" else 1.7
    run = lambda: gradients(x, w, target, upstream=up, reduction=reduction, backend=backend)
    wanted = run()
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def poisoned(make_tensor):
        def build(*args, **kwargs):
            out = make_tensor(*args, **kwargs)
            return (
                out.fill_(math.nan) if out.is_floating_point() else out.fill_(-7 if out.dtype == torch.int64 else 101)
            )

        return build

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    for got, value in zip(run(), wanted, strict=True):
        assert torch.equal(got, value)


def test_runs_are_bitwise_equal(backend):
    x, w, target, g = make(tokens=40, classes=11)
    first, second = (gradients(x, w, target, upstream=g, reduction="none", backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-6, 0.01, 3.0])
def test_uniform_mix_near_certainty(backend, alpha):
    """p near 1 and near 0: the mixed loss keeps its digits where log(p + mix) + log(1 + alpha) would cancel."""
    x, w, target, g = make()
    x[::2] = (w[target] + 0.05 * x)[::2]
    options = {"uniform_mix": alpha, "reduction": "none", "upstream": g}
    got = gradients(x, w, target, backend=backend, **options)
    wanted = gradients(x, w, target, backend="reference", **options)
    assert ((got[0] - wanted[0]).abs() <= 2e-5 * wanted[0]).all()
    all_close(got, wanted)


def test_entropy_of_confident_and_wrong_tokens(backend):
    """Tiny beside the loss, and no less than 0 but for rounding; the torch backend keeps its digits."""
    x, w, target, _ = make()
    x = w[(target + 1) % CLASSES] + 1e-3 * x
    _, stats = linear_harmonic_loss(x, w, target, n=N, return_stats=True, backend=backend)
    log_p = dense_log_p(x, w, N)
    wanted = -(log_p.exp() * log_p).sum(1)
    assert wanted.max() < 1e-10
    if backend == "torch":
        assert ((stats.entropy - wanted).abs() <= 1e-3 * wanted).all()
    assert (stats.entropy.abs() <= 1e-6 * -stats.target_log_prob).all()


@pytest.mark.parametrize("near", [False, True])
def test_statistics_are_those_of_the_dense_probabilities(backend, near):
    x, w, target, _ = make()
    if near:
        x = w[target] + 0.3 * x
    target[5] = -100
    loss, stats = linear_harmonic_loss(x, w, target, n=N, return_stats=True, backend=backend)
    log_p = dense_log_p(x, w, N)
    kept = target >= 0
    own = target.clamp_min(0).unsqueeze(1)
    close(stats.entropy, torch.where(kept, -(log_p.exp() * log_p).sum(1), 0.0))
    close(stats.target_distance, torch.where(kept, (x - w[own.squeeze(1)]).norm(dim=1), 0.0), 1e-6)
    close(stats.target_log_prob, torch.where(kept, log_p.gather(1, own).squeeze(1), 0.0))
    assert torch.equal(stats.predicted, torch.where(kept, log_p.argmax(1), -100))
    assert torch.equal(stats.correct, kept & (stats.predicted == target))
    assert not any(value.requires_grad for value in stats)
    close(loss, -stats.target_log_prob[kept].mean(), 1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", ["linear_harmonic_loss", "linear_cross_entropy"])
def test_statistics_have_no_gradient(backend, name, reduction):
    x, w, target, _ = make()
    x.requires_grad_(), w.requires_grad_()
    for which in (backend, "reference"):
        loss, stats = getattr(ht, name)(x, w, target, reduction=reduction, return_stats=True, backend=which)
        assert loss.requires_grad and not any(value.requires_grad for value in stats)


@pytest.mark.parametrize("name", ["linear_harmonic_loss", "linear_cross_entropy"])
def test_of_equal_classes_the_first_is_predicted(backend, name):
    """Classes 3, 9 and 20 are one vector, the best of every token: 3 is predicted whichever of them is the target."""
    x, w, _, _ = make()
    w[[9, 20]] = w[3] = x.mean(0) + 10.0
    x = (x + 10.0) * torch.linspace(1.0, 1.5, TOKENS)[:, None]
    scores = x @ w.t() if name == "linear_cross_entropy" else -torch.cdist(x, w)
    assert (scores.argmax(1) == 3).all()
    for label in (3, 9, 20, 0, 30):
        target = torch.full((TOKENS,), label)
        for which in (backend, "reference"):
            _, stats = getattr(ht, name)(x, w, target, return_stats=True, backend=which)
            assert stats.predicted.tolist() == [3] * TOKENS, (which, label)
            assert stats.correct.tolist() == [label == 3] * TOKENS


# --- log-probabilities, top-k, harmax --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 2.0, 300.0])
def test_harmonic_logits_are_normalised_log_probabilities(n):
    x, w, target, _ = make()
    log_p = ht.harmonic_logits(x, w, n=n)
    exponent = math.sqrt(WIDTH) if n is None else n
    close(log_p, dense_log_p(x, w, exponent), 1e-6 * max(10, exponent))
    close(log_p.exp().sum(1), torch.ones(TOKENS), 1e-5)
    loss = linear_harmonic_loss(x, w, target, n=n, reduction="none")
    close(-log_p.gather(1, target.unsqueeze(1)).squeeze(1), loss, 1e-6 * max(10, exponent))
    assert torch.equal(ht.harmonic_logits(x, w, n=n, normalize=False).max(1).values, torch.zeros(TOKENS))


def test_temperature_divides_the_exponent():
    x, w, _, _ = make()
    divided = F.log_softmax(ht.harmonic_logits(x, w, n=8.0) / 1.6, 1)
    close(ht.harmonic_logits(x, w, n=8.0 / 1.6), divided, 1e-5)


def test_harmonic_logits_where_distances_vanish():
    _, w, target, _ = make()
    x = w[target].clone().requires_grad_()
    log_p = ht.harmonic_logits(x, w, n=28.0)
    assert torch.equal(log_p.argmax(1), target)
    assert log_p.isfinite().all()
    log_p[:, 0].sum().backward()
    assert x.grad.isfinite().all()


def test_harmonic_logits_can_be_differentiated_twice():
    x, w, _, _ = make(tokens=3, width=4, classes=5, dtype=torch.float64)
    function = lambda a, b, n: ht.harmonic_logits(a, b, n=n).square().sum(1)
    n = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = (x.requires_grad_(), w.requires_grad_(), n)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_topk_is_that_of_the_dense_log_probabilities():
    x, w, _, _ = make()
    values, indices = ht.harmonic_topk(x.view(TOKENS, 1, WIDTH), w, 5, n=N)
    wanted, where = dense_log_p(x, w, N).topk(5, dim=1)
    assert values.shape == indices.shape == (TOKENS, 1, 5)
    assert torch.equal(indices.squeeze(1), where)
    close(values.squeeze(1), wanted)


def test_harmax_is_the_papers_equation():
    d = torch.rand(4, 6, dtype=torch.float64) + 0.1
    close(ht.harmax(d, 3.0), d**-3.0 / (d**-3.0).sum(1, keepdim=True), 1e-12)
    close(ht.harmax(d, 3.0, dim=0), d**-3.0 / (d**-3.0).sum(0), 1e-12)
    close(ht.log_harmax(1e-30 * d, 300.0), ht.log_harmax(d, 300.0), 1e-9)
    d = d.clone()
    d[0, :2] = 0
    assert ht.harmax(d, 2.0)[0].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert torch.autograd.gradcheck(lambda t: ht.log_harmax(t, 2.0), (d[1:].clone().requires_grad_(),))


# --- identities that hold for the true gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("near", [0.05, 1.0, 50.0])
def test_translation_and_scale_identities(backend, near):
    x, w, target, g = make(tokens=30)
    x = w[target] + near * x
    _, dx, dw = (value.double() for value in gradients(x, w, target, upstream=g, reduction="none", backend=backend))
    size = dx.norm(dim=1).sum() + dw.norm(dim=1).sum()
    assert (dx.sum(0) + dw.sum(0)).norm() < 1e-6 * size
    terms = (x.double() * dx).sum(1), (w.double() * dw).sum(1)
    assert abs(sum(t.sum() for t in terms)) < 1e-6 * sum(t.abs().sum() for t in terms) + 1e-6 * size


# --- sizes beyond 32-bit indices -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_than_two_to_the_31_entries():
    """N * V > 2^31: no index overflows and memory stays at the budget (about 3 minutes on two cores)."""
    x, w, target, g = make(tokens=43_000, width=8, classes=50_257)
    assert len(x) * len(w) > 2**31
    loss, dx, dw = gradients(x, w, target, upstream=g, reduction="none", backend="torch")
    last = slice(-40, None)
    wanted = gradients(x[last], w, target[last], upstream=g[last], reduction="none", backend="reference")
    all_close((loss[last], dx[last]), wanted[:2])
    assert dw.isfinite().all()


def test_no_kernel_is_imported_with_the_package():
    code = "import sys, harmonic_triton; print('triton' in sys.modules, 'harmonic_triton.fused.triton.backend' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[1] == "False"
    assert reference.__name__ not in dir(_ops)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_casts_the_operands_and_nothing_else(backend, reduction):
    """As if x and w had been cast by hand: products inside keep fp32 results, gradients come back in fp32."""
    x, w, target, g = make()
    up = g if reduction == "none" else 1.7
    with torch.autocast(x.device.type, torch.bfloat16):
        got = gradients(x, w, target, upstream=up, reduction=reduction, backend=backend)
        log_p = ht.harmonic_logits(x, w, n=N)
    cast = (x.bfloat16(), w.bfloat16())
    wanted = gradients(*cast, target, upstream=up, reduction=reduction, backend=backend)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, wanted, strict=True))
    assert got[1].dtype == got[2].dtype == torch.float32
    assert torch.equal(log_p, ht.harmonic_logits(*cast, n=N))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_leaves_fp64_alone(reduction):
    x, w, target, g = make(dtype=torch.float64)
    up = g.double() if reduction == "none" else 1.7
    run = lambda: gradients(x, w, target, upstream=up, reduction=reduction)
    wanted, log_p, top = run(), ht.harmonic_logits(x, w, n=N), ht.harmonic_topk(x, w, 4, n=N)
    with torch.autocast(x.device.type, torch.bfloat16):
        got = (*run(), ht.harmonic_logits(x, w, n=N), *ht.harmonic_topk(x, w, 4, n=N))
        with pytest.raises(TypeError, match="input must be bfloat16.*int64"):
            linear_harmonic_loss(x.long(), w, target)
    for one, other in zip(got, (*wanted, log_p, *top), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
