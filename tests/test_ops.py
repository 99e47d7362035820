"""The registered operators and the autograd around them, under everything that PyTorch puts on top of a function.

Numbers against the fp64 truth are the business of other files. Here two routes to the same numbers are compared:
compiled and eager, batched and looped, checkpointed and not; with analytic against numerical derivatives in fp64 for
the gradients themselves. Upstream gradients vary from token to token, or are 0.7 for a scalar.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import fresh
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import harmonic_triton as ht
from harmonic_triton.fused import checks as _checks
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted, unpack
from harmonic_triton.fused.results import TokenResults, TokenWeights, Unfinished, Upstream

REDUCTIONS = ("none", "sum", "mean")
BACKENDS = ("torch", "triton")
OPS = torch.ops.harmonic_triton


def inputs(
    tokens: int = 7, width: int = 6, classes: int = 9, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, target, n): x at 0.5 to 1.5 of a class vector's length from its own, one token ignored; leaves."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(classes, width, generator=generator)
    target = torch.randint(classes, (tokens,), generator=generator)
    away = torch.linspace(0.5, 1.5, tokens).unsqueeze(1)
    x = w[target] + away * torch.randn(tokens, width, generator=generator)
    target[tokens // 2] = -100
    leaves = (tensor.to(dtype).requires_grad_() for tensor in (x, w))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return *leaves, target, torch.tensor(3.3, dtype=compute, requires_grad=True)


def upstream(out: Tensor) -> Tensor:
    """Different for every token; 0.7 for a scalar."""
    if out.dim() == 0:
        return torch.full_like(out, 0.7)
    return torch.linspace(0.3, 1.2, out.numel(), dtype=out.dtype).reshape(out.shape)


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, upstream(out))


def relative(out: Tensor, ref: Tensor) -> float:
    """Largest ||out - ref||/||ref|| over rows; 0 against 0 counts as equal."""
    out, ref = (tensor.detach().double().reshape(-1, tensor.shape[-1] if tensor.dim() else 1) for tensor in (out, ref))
    error, norm = (out - ref).norm(dim=1), ref.norm(dim=1)
    return torch.where(error == 0, 0.0, error / norm).max().item()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def weights(classes: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(0.5, 2.0, classes, dtype=dtype)


# --- the operators themselves


def operator_arguments(
    name: str, dtype: torch.dtype, backend: str, smoothing: bool, want_scores: bool, needs: str
) -> tuple[Any, ...]:
    """Arguments as the autograd Functions pass them; a gradient for n needs the scores."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=dtype))
    smooth_weight = weights(dtype=n.dtype) * 0.1 / 9 if smoothing else None
    operands = Operands(x, w, target, n, smooth_weight)
    problem = Problem(0.1, 0.0 if smoothing and backend == "triton" else 0.05, -100, want_scores, backend, 0)
    wanted = Wanted(*(letter in needs for letter in "xwnb"))
    token = torch.linspace(0.3, 1.2, len(x), dtype=n.dtype)
    smooth = 0.1 * token if smoothing else None
    if wanted.bias:  # of cross-entropy, under a cap
        operands = operands._replace(n=None, bias=weights(dtype=n.dtype))
        problem = problem._replace(eps=0.0, mix=0.0, softcap=1.5, token_scaling=True)
    if name == "forward":
        return *operands, *problem
    if name == "forward_backward":
        return *operands, *TokenWeights(token, smooth, None), *problem, *wanted
    if name == "finish":
        loss, _, *rest = OPS.forward_backward(*operands, *TokenWeights(token, smooth, None), *problem, *wanted)
        unfinished, results = unpack(tuple(rest), Unfinished, TokenResults)
        return *operands, *unfinished, *Finishing(results.rival, 1.7 * torch.ones_like(loss), False), *problem, *wanted
    results = OPS.forward(*operands, *problem)
    return *operands, *results, *Upstream(token, smooth, None), *problem, *wanted


# Every operator x dtype; and for one dtype each of its switches, which change the shapes of what it returns.
@pytest.mark.parametrize(("dtype", "smoothing", "moments", "needs"), [
    (torch.float64, False, False, "xw"), (torch.float32, True, True, "xwn"), (torch.bfloat16, True, False, "xw"),
    (torch.float16, False, True, "xwn"), (torch.float32, False, False, "x"), (torch.float32, False, False, "w"),
    (torch.float32, False, True, "n"), (torch.float32, False, False, ""),
    (torch.float32, False, True, "xwb"), (torch.bfloat16, True, False, "b"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["forward", "backward", "forward_backward", "finish"])
def test_opcheck(name, dtype, smoothing, moments, needs):
    """Schema, fake (shapes, dtypes, strides) and tracing with symbolic shapes."""
    arguments = operator_arguments(name, dtype, "torch", smoothing, moments, needs)
    torch.library.opcheck(getattr(OPS, name).default, arguments)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("smoothing", "needs"), [(False, "xw"), (True, "xw"), (False, "xwb")])
@pytest.mark.parametrize("name", ["forward", "backward", "forward_backward", "finish"])
def test_opcheck_of_triton(name, smoothing, needs, dtype):
    """The Triton backend answers with what the same fakes promise."""
    pytest.importorskip("triton")
    arguments = operator_arguments(name, dtype, "triton", smoothing, True, needs)
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_rows_are_what_the_schemas_name():
    """The operators return the fields of ``TokenResults``, in that order."""
    for name, skip in (("forward", 0), ("forward_backward", 2 + len(Unfinished._fields))):
        returned = [result.name for result in getattr(OPS, name).default._schema.returns]
        assert tuple(returned[skip:]) == TokenResults._fields


# --- derivatives

OPTIONS = {
    "plain": {},
    "eps": {"eps": 0.3},
    "uniform_mix": {"uniform_mix": 0.2},
    "label_smoothing": {"label_smoothing": 0.2},
    "both": {"label_smoothing": 0.2, "uniform_mix": 0.2},
    "class_weight": {"class_weight": weights()},
    "everything": {"label_smoothing": 0.1, "uniform_mix": 0.1, "class_weight": weights(), "eps": 0.05},
    "num_items": {"num_items": 5},
}
MINUS_NUM_ITEMS = [name for name in OPTIONS if name != "num_items"]
GRADCHECK = {"eps": 1e-6, "rtol": 1e-6, "atol": 1e-8}
"""A central difference in fp64 is good to about 1e-12 (its square) plus 2e-16/1e-6 times the loss: 1e-9 here."""


@pytest.mark.parametrize(("reduction", "option"), [
    *((reduction, option) for reduction in ("sum", "mean") for option in OPTIONS),
    *(("none", option) for option in MINUS_NUM_ITEMS),
])  # fmt: skip
def test_gradcheck(reduction, option):
    """x, w and n at once, in fp64, one target ignored; per token and through the forward's own gradients."""
    x, w, target, n = inputs()

    def loss(x, w, n):
        out = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend="torch", **OPTIONS[option])
        return out * upstream(out)

    assert torch.autograd.gradcheck(loss, (x, w, n), **GRADCHECK)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("budget", [None, 150])  # few tokens; several chunks
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("option", ["plain", "label_smoothing"])
def test_batched_upstream_gradients(reduction, option, budget, keep):
    """``is_grads_batched``, as ``torch.autograd.functional.jacobian(vectorize=True)`` uses it: a loop's gradients."""
    x, w, target, n = inputs(dtype=torch.float32)
    options = {"reduction": reduction, "memory_budget": budget, **OPTIONS[option]}
    out = ht.linear_harmonic_loss(x, w, target, n=n, **options)
    ups = torch.stack([upstream(out), upstream(out).flip(0) if out.dim() else 2 * upstream(out)])
    wanted = [torch.autograd.grad(out, (x, w, n), up, retain_graph=True) for up in ups]
    batched = torch.autograd.grad(out, (x, w, n), ups, is_grads_batched=True, retain_graph=keep)
    for i, single in enumerate(wanted):
        assert all(relative(mine[i], value) < 1e-6 for mine, value in zip(batched, single, strict=True))


@pytest.mark.parametrize("up", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("budget", [None, 150])
@pytest.mark.parametrize("loss", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
def test_an_upstream_gradient_that_is_no_number_leaves_none(loss, budget, up):
    """A gradient scaler that overflowed finds it in every gradient."""
    x, w, target, _ = inputs(dtype=torch.float32)
    found = torch.autograd.grad(loss(x, w, target, memory_budget=budget), (x, w), torch.tensor(up))
    counted = target != -100
    assert not found[0][counted].isfinite().any() and not found[1].isfinite().any()


@pytest.mark.parametrize("wanted", ["x", "w", "n", "xw", "xn", "wn"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_requires_a_gradient_gets_one(wanted, reduction, backend):
    """Any subset of x, w, n: the same gradients as together, None for the rest."""
    dtype = torch.float32
    named = dict(zip("xwn", (lambda x, w, t, n: (x, w, n))(*inputs(dtype=dtype)), strict=True))
    target = inputs(dtype=dtype)[2]
    everything = ht.linear_harmonic_loss(
        named["x"], named["w"], target, n=named["n"], reduction=reduction, backend=backend
    )
    together = dict(zip("xwn", gradients(everything, *named.values()), strict=True))
    some = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in named.items()}
    out = ht.linear_harmonic_loss(some["x"], some["w"], target, n=some["n"], reduction=reduction, backend=backend)
    out.backward(upstream(out))
    for name, leaf in some.items():
        assert (leaf.grad is None) == (name not in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, together[name])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "label_smoothing", "uniform_mix"])
def test_second_derivative_of_a_fused_backend_raises(backend, reduction, option):
    """An error that names the mend instead of a silent zero; by x, w, n, or the upstream gradient."""
    x, w, target, n = inputs(dtype=torch.float32)
    out = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend, **OPTIONS[option])
    up = upstream(out).requires_grad_()
    first = torch.autograd.grad(out, (x, w, n), up, create_graph=True)
    for derivative in first:
        for leaf in (x, w, n, up):
            with pytest.raises(RuntimeError, match=r'cannot be differentiated again.*backend="reference"'):
                torch.autograd.grad(derivative.square().sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("option", ["plain", "eps", "everything"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative_of_the_reference(reduction, option):
    """It is right there, for x, w and n; and its first derivative is that of the fused backend."""
    x, w, target, n = inputs(tokens=4, width=3, classes=5)
    options = {**OPTIONS[option], **({"class_weight": weights(5)} if option == "everything" else {})}

    def loss(x, w, n, backend="reference"):
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend, **options)

    assert torch.autograd.gradgradcheck(loss, (x, w, n), **GRADCHECK)
    for mine, reference in zip(*(gradients(loss(x, w, n, b), x, w, n) for b in ("torch", "reference")), strict=True):
        assert relative(mine, reference) < 1e-12


# --- torch.func


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad(backend, reduction):
    """``torch.func.grad`` gives autograd's gradients, to the bit."""
    x, w, target, n = inputs(dtype=torch.float32)

    def loss(x, w, n):
        return 0.7 * ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend)

    wanted = torch.autograd.grad(loss(x, w, n), (x, w, n))
    assert all(torch.equal(*pair) for pair in zip(grad(loss, argnums=(0, 1, 2))(x, w, n), wanted, strict=True))


# Which arguments carry the batch: samples (per-sample gradients), class vectors (an ensemble), exponents, all of them.
@pytest.mark.parametrize("batched", ["xt", "w", "n", "xtwn"])
@pytest.mark.parametrize("option", ["plain", "label_smoothing", "uniform_mix"])
@pytest.mark.parametrize(("reduction", "backend"), [("mean", "torch"), ("none", "torch"), ("mean", "triton")])
def test_vmap_of_grad_is_a_loop(reduction, backend, option, batched):
    """Per-sample gradients by ``vmap(grad(...))`` equal those of one call a sample."""
    members = [inputs(tokens=3, dtype=torch.float32, seed=seed) for seed in range(3)]
    members = [(x, w, t, n.detach() + seed) for seed, (x, w, t, n) in enumerate(members)]
    options = {**OPTIONS[option], "reduction": reduction, "backend": backend}
    stacked, in_dims = [], []
    for name, values in zip("xwtn", zip(*members, strict=True), strict=True):
        stacked.append(torch.stack(values).detach() if name in batched else values[0].detach())
        in_dims.append(0 if name in batched else None)

    def loss(x, w, t, n):
        out = ht.linear_harmonic_loss(x, w, t, n=n, **options)
        return (out * upstream(out)).sum()

    out = vmap(grad(loss, argnums=(0, 1, 3)), in_dims=tuple(in_dims))(*stacked)
    for i in range(3):
        one = [tensor if dim is None else tensor[i] for tensor, dim in zip(stacked, in_dims, strict=True)]
        for mine, wanted in zip(out, grad(loss, argnums=(0, 1, 3))(*one), strict=True):
            assert relative(mine[i], wanted) < 1e-6  # the sums around the operators may run in another order


def test_vmap_of_statistics_is_a_loop():
    """``return_stats`` under vmap."""
    members = [inputs(tokens=3, dtype=torch.float32, seed=seed) for seed in range(3)]
    x, w, target, _ = (torch.stack(values).detach() for values in zip(*members, strict=True))

    def run(x, w, target):
        return ht.linear_harmonic_loss(x, w, target, return_stats=True, reduction="none")

    loss, stats = vmap(run)(x, w, target)
    for i in range(3):
        wanted_loss, wanted = run(x[i], w[i], target[i])
        assert torch.equal(loss[i], wanted_loss)
        assert all(torch.equal(mine[i], value) for mine, value in zip(stats, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacrev(backend):
    """The Jacobian of the per-token losses: row i holds token i's gradient alone, and the rows add up to the sum's."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))

    def losses(x, w):
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction="none", backend=backend)

    by_x, by_w = jacrev(losses, argnums=(0, 1))(x, w)
    tokens = torch.arange(len(x))
    assert not by_x[tokens != tokens.unsqueeze(1)].any()
    dx, dw = grad(lambda x, w: losses(x, w).sum(), argnums=(0, 1))(x, w)
    assert relative(by_x[tokens, tokens], dx) < 1e-6
    # dW may cancel between tokens: relative to what is added
    assert ((by_w.sum(0) - dw).norm(dim=1) / by_w.norm(dim=2).sum(0)).max() < 1e-6


def test_functional_call_of_the_head():
    """Per-sample gradients of a HarmonicHead's parameters, its learnable exponent among them."""
    x, w, target, _ = (tensor.detach() for tensor in inputs(dtype=torch.float32))
    torch.manual_seed(0)
    head = ht.HarmonicHead(6, 9, n=3.0, learnable_n=True, eps=0.1)
    parameters = {"weight": w, "n": torch.tensor(2.5)}

    def loss(parameters, x, target):
        return 0.7 * functional_call(head, parameters, (x.unsqueeze(0), target.unsqueeze(0)))

    out = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    assert out["weight"].shape == (7, 9, 6)
    assert out["n"].shape == (7,)
    for i in range(len(x)):
        weight, n = w.clone().requires_grad_(), torch.tensor(2.5, requires_grad=True)
        one = ht.linear_harmonic_loss(x[i : i + 1], weight, target[i : i + 1], n=n, eps=0.1)
        (0.7 * one).backward()
        assert relative(out["weight"][i], weight.grad) < 1e-6
        assert relative(out["n"][i], n.grad) < 1e-6


# --- forward mode


def tangents(function: Any, x: Tensor, how: str) -> Any:
    """A derivative of ``function`` that goes forward, by each of torch's ways."""
    one = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)
    if how == "jvp":
        return jvp(function, (x,), (one,))[1]
    if how == "vmap":
        return jvp(lambda x: vmap(function)(torch.stack([x, x])), (x,), (one,))[1]
    if how == "linearize":
        return linearize(function, x)[1](one)
    if how == "over_reverse":
        return jvp(grad(lambda x: function(x).sum()), (x,), (one,))[1]
    if how == "reverse_over":
        return grad(lambda x: jvp(function, (x,), (one,))[1].sum())(x)
    if how in ("dual", "dual_leaf"):
        with forward_ad.dual_level():
            leaf = x.detach().requires_grad_(how == "dual_leaf")
            return forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, one))).tangent
    return {"jacfwd": jacfwd, "hessian": hessian}[how](lambda x: function(x).sum())(x)


@pytest.mark.parametrize("how", ["jvp", "jacfwd", "linearize", "hessian", "dual", "dual_leaf", "over_reverse",
                                 "reverse_over", "vmap"])  # fmt: skip
@pytest.mark.parametrize("by", ["x", "w", "n", "class_weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_a_fused_loss_raises(backend, by, how):
    """Not a silent zero, whatever carries the tangent, in both losses and every reduction."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))
    given = {"x": x, "w": w, "n": n, "class_weight": weights(dtype=torch.float32)}
    for reduction in REDUCTIONS:
        for function in (ht.linear_harmonic_loss, ht.linear_cross_entropy)[: 1 if by == "n" else 2]:

            def loss(value, function=function, reduction=reduction):
                now = {**given, by: value}
                more = {} if function is ht.linear_cross_entropy else {"n": now["n"]}
                return function(now["x"], now["w"], target, reduction=reduction, label_smoothing=0.1,
                                class_weight=now["class_weight"], backend=backend, **more)  # fmt: skip

            with pytest.raises(
                (NotImplementedError, ValueError), match=r'backend="reference"|class_weight is a constant'
            ):
                tangents(loss, given[by], how)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["jvp of compiled", "compiled jvp", "dual", "dual after a plain call"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode_of_a_compiled_loss_raises(reduction, how, fullgraph):
    """Dynamo, which knows no forward mode of a Function, drops no tangent either."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))

    def loss(x):
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")
    match = "no derivative in forward mode" + "|functorch" * (fullgraph and how == "jvp of compiled")
    if how == "dual after a plain call":
        compiled(x)
    if how == "compiled jvp":
        compiled = torch.compile(lambda x: tangents(loss, x, "jvp"), fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match=match):
        compiled(x) if how == "compiled jvp" else tangents(compiled, x, how.split()[0])


@pytest.mark.parametrize("how", ["jvp", "dual", "linearize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_beside_a_fused_loss(backend, how):
    """A loss that carries no tangent is a constant of the derivative; its own gradient is there as ever."""
    x, w, target, n = inputs(dtype=torch.float32)
    wanted = ht.linear_harmonic_loss(x, w, target, n=n, backend=backend)
    factor = torch.tensor(2.0)

    def beside(factor):
        return factor.square() * ht.linear_harmonic_loss(x, w, target, n=n, backend=backend)

    slope = tangents(beside, factor, how)
    torch.testing.assert_close(slope.detach(), 0.5 * 2 * factor * wanted.detach(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("by", ["x", "w", "n"])
@pytest.mark.parametrize("what", ["reference", "reference_ce", "logits", "topk", "topk_dual"])
def test_forward_mode_where_there_is_one(what, by):
    """The tangent along a direction is the gradient's product with it, in fp64."""
    x, w, target, n = (tensor.detach() for tensor in inputs())
    given = {"x": x, "w": w, "n": n}
    if what == "reference_ce" and by == "n":
        pytest.skip("cross-entropy has no exponent")

    def function(value):
        now = {**given, by: value}
        if what == "reference":
            return ht.linear_harmonic_loss(now["x"], now["w"], target, n=now["n"], backend="reference", eps=0.1)
        if what == "reference_ce":
            return ht.linear_cross_entropy(now["x"], now["w"], target, backend="reference", label_smoothing=0.1)
        if what == "logits":
            return ht.harmonic_logits(now["x"], now["w"], n=now["n"]).square().sum()
        return ht.harmonic_topk(now["x"], now["w"], 3, n=now["n"])[0].square().sum()

    def by_logits(value):
        now = {**given, by: value}
        return ht.harmonic_logits(now["x"], now["w"], n=now["n"]).topk(3)[0].square().sum()

    value = given[by]
    direction = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    gradient = grad(by_logits if what.startswith("topk") else function)(value)
    slope = tangents(function, value, "dual" if what == "topk_dual" else "jvp")
    torch.testing.assert_close(slope, (gradient * (direction if value.dim() else 0.5)).sum(), rtol=1e-9, atol=0.0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("correlation", [False, True])
@pytest.mark.parametrize("how", ["jvp", "dual", "linearize", "jacfwd", "hessian", "compiled jvp"])
def test_forward_mode_of_loss_covariance(how, correlation):
    """The derivative that goes backward gives, in fp64."""
    losses = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses[:, 2] = 3.0
    weight = torch.linspace(0.2, 1.4, 25, dtype=torch.float64).view(5, 5)

    def function(losses):
        return (ht.loss_covariance(losses, correlation=correlation) * weight).square().sum()

    if how == "compiled jvp":
        slope = torch.compile(lambda losses: tangents(function, losses, "jvp"), backend="aot_eager")(losses)
    else:
        slope = tangents(function, losses, how)
    one = torch.linspace(0.5, 1.5, 35, dtype=torch.float64).view(7, 5)
    wanted = {"jacfwd": jacrev(function), "hessian": jacrev(jacrev(function))}.get(how, grad(function))(losses)
    torch.testing.assert_close(slope, wanted if how in ("jacfwd", "hessian") else (wanted * one).sum(),
                               rtol=1e-9, atol=1e-10)  # fmt: skip


# --- what else PyTorch puts on top


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_again_and_with_hooks_on_what_is_saved(backend, reduction):
    """``retain_graph`` twice, saved tensors moved elsewhere and back, and an upstream gradient that is not there."""
    x, w, target, n = inputs(dtype=torch.float32)

    def loss():
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend, label_smoothing=0.1)

    out = loss()
    wanted = torch.autograd.grad(out, (x, w, n), upstream(out), retain_graph=True)
    again = torch.autograd.grad(out, (x, w, n), upstream(out))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double() if t.is_floating_point() else t.clone(),
                                                  lambda t: t.float() if t.is_floating_point() else t):  # fmt: skip
        packed = loss()
    hooked = gradients(packed, x, w, n)
    both = torch.autograd.grad(loss() * 0.0 + (x * 1.5).sum(), (x, w, n), upstream(out), materialize_grads=True)
    assert all(torch.equal(*pair) for pair in zip(wanted, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(wanted, hooked, strict=True))
    assert torch.equal(both[0], torch.full_like(x, 1.5) * upstream(out).sum())
    assert not both[1].any()
    assert not both[2].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend, reduction):
    """The same loss on inference tensors."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))
    run = lambda x, w, n: ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend)
    wanted = run(x, w, n)
    with torch.inference_mode():
        got = run(x.clone(), w.clone(), n.clone())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_with_randomness(randomness):
    """Noise on x inside the batched function, as a dropout would make it."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))

    def loss(x, label):
        noisy = x + 0.1 * torch.randn_like(x)
        return ht.linear_harmonic_loss(noisy[None], w, label[None], n=n, reduction="sum"), noisy

    got, noisy = vmap(loss, randomness=randomness)(x, target)
    wanted = ht.linear_harmonic_loss(noisy, w, target, n=n, reduction="none")
    assert relative(got.unsqueeze(1), wanted.unsqueeze(1)) < 1e-6


def test_exponent_of_one_element():
    """An n of shape (1,), as sharding makes it: the same everywhere, its gradient of that shape."""
    x, w, target, n = inputs(dtype=torch.float32)
    one = n.detach().reshape(1).requires_grad_()
    for run in (
        lambda n: ht.linear_harmonic_loss(x, w, target, n=n),
        lambda n: ht.linear_harmonic_loss(x, w, target, n=n, reduction="none"),
        lambda n: ht.linear_harmonic_loss(x, w, target, n=n, backend="reference"),
        lambda n: ht.harmonic_logits(x, w, n=n),
        lambda n: ht.log_harmax(torch.cdist(x, w), n),
        lambda n: ht.log_harmax(torch.tensor(2.0), n) + n.sum(),
    ):
        wanted, got = run(n), run(one)
        assert torch.equal(got, wanted)
        (slope,), (value,) = gradients(got, one), gradients(wanted, n)
        assert slope.shape == (1,)
        assert torch.equal(slope[0], value)
    assert all(map(torch.equal, ht.harmonic_topk(x, w, 3, n=one), ht.harmonic_topk(x, w, 3, n=n)))
    batched = vmap(grad(lambda n: ht.linear_harmonic_loss(x, w, target, n=n)))(torch.stack([one, one + 1]))
    assert batched.shape == (2, 1)


# --- strides


def strange(tensor: Tensor, how: str) -> Tensor:
    """The same values under other strides: every second entry, an odd offset, the other order of dimensions, stride 0."""
    if how == "every_second":
        room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77)
        room[..., ::2] = tensor
        return room[..., ::2]
    if how == "offset":
        room = tensor.new_full((tensor.numel() + 1,), 77)
        room[1:] = tensor.flatten()
        return room[1:].view(tensor.shape)
    if how == "column":
        room = tensor.new_full((*tensor.shape, 3), 77)
        room[..., 1] = tensor
        return room[..., 1]
    if how == "transposed":
        return tensor.t().contiguous().t()
    return tensor.flatten()[:1].expand(tensor.shape)  # "stride_0": not the same values


# Every vector that a kernel reads; x and w carry their strides with them.
@pytest.mark.parametrize("how", ["every_second", "offset", "column", "stride_0"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strange_strides_of_the_operators(backend, how):
    """What the operators return for strided operands is what they return for dense ones, to the bit."""
    counts = {"forward": 2, "backward": 14, "forward_backward": 4, "finish": 8}
    if backend == "triton":  # one pass takes bfloat16 without smoothing
        counts |= {"forward_backward": 2, "finish": 5}
    for name, count in counts.items():
        one_pass = backend == "triton" and name in ("forward_backward", "finish")
        dtype = torch.bfloat16 if one_pass else torch.float32
        arguments = operator_arguments(name, dtype, backend, not one_pass, True, "xwn")
        vectors = [k for k, value in enumerate(arguments) if isinstance(value, Tensor) and value.dim() == 1]
        assert len(vectors) == count
        strided = [strange(value, how) if k in vectors else value for k, value in enumerate(arguments)]
        dense = [value.clone(memory_format=torch.contiguous_format) if k in vectors else value
                 for k, value in enumerate(strided)]  # fmt: skip
        operator = getattr(OPS, name)
        for got, wanted in zip(operator(*strided), operator(*dense), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("how", ["every_second", "offset", "column", "transposed"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strange_strides_of_the_arguments(backend, reduction, how):
    """Everything that a caller passes, the upstream gradient too; gradients come back in the operands' shapes."""
    x, w, target, n = (tensor.detach() for tensor in inputs(tokens=9, width=7, classes=11, dtype=torch.float32))
    given = {"x": x, "w": w, "target": target, "v": weights(11, torch.float32), "g": torch.linspace(0.3, 1.2, 9)}
    results = []
    for change in (lambda t: t, lambda t: t if how == "transposed" and t.dim() == 1 else strange(t, how)):
        now = {name: change(tensor) for name, tensor in given.items()}
        leaves = now["x"].requires_grad_(), now["w"].requires_grad_(), n.clone().requires_grad_()
        loss = ht.linear_harmonic_loss(*leaves[:2], now["target"], n=leaves[2], class_weight=now["v"], backend=backend,
                                       label_smoothing=0.1, reduction=reduction)  # fmt: skip
        up = now["g"] if reduction == "none" else torch.tensor(0.7)
        results.append((loss.reshape(-1, 1), *torch.autograd.grad(loss, leaves, up)))
    assert all(relative(got, wanted) < 1e-6 for wanted, got in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_token_losses_backward(backend):
    """``loss.sum().backward()`` hands over an upstream gradient with stride 0: the gradients of reduction "sum"."""
    x, w, target, n = inputs(dtype=torch.float32)
    for smoothing in (0.0, 0.1):
        losses = [ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend,
                                          label_smoothing=smoothing) for reduction in ("none", "sum")]  # fmt: skip
        got, wanted = (torch.autograd.grad(0.7 * loss.sum(), (x, w, n)) for loss in losses)
        assert all(relative(*pair) < 1e-6 for pair in zip(got, wanted, strict=True))


# The batch in the second dimension of everything: what each member sees has strides, in forward and in backward.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_vmap_of_grad_over_the_second_dimension(reduction, backend):
    members = [inputs(tokens=5, dtype=torch.float32, seed=seed) for seed in range(3)]
    x, w, target, _ = (
        torch.stack(values, 1).detach() for values in zip(*(m[:3] + (m[0],) for m in members), strict=True)
    )
    v = torch.stack([weights(dtype=torch.float32) + k for k in range(3)], 1)
    g = torch.linspace(0.2, 1.4, 15).reshape(5, 3)

    def loss(x, w, target, v, g):
        out = ht.linear_harmonic_loss(x, w, target, n=3.3, class_weight=v, label_smoothing=0.2, reduction=reduction,
                                      backend=backend)  # fmt: skip
        return (out * g).sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=1, out_dims=1)(x, w, target, v, g)
    for k in range(3):
        one = [tensor.select(1, k).contiguous() for tensor in (x, w, target, v, g)]
        for mine, wanted in zip(got, grad(loss, argnums=(0, 1))(*one), strict=True):
            assert relative(mine[:, k], wanted) < 1e-6


@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_bad_target_shows_in_its_loss(backend, function, monkeypatch):
    """On a device whose assert does nothing, as ROCm's: NaN for that token and for the sum, and nothing else changes."""
    monkeypatch.setattr(_checks, "check_targets", lambda *arguments: None)
    x, w, target, _ = inputs(dtype=torch.float32)
    wanted = function(x, w, target, reduction="none", backend=backend)
    for bad in (10**12, -(10**12), 9, -1):
        wrong = target.clone()
        wrong[1] = bad
        losses = function(x, w, wrong, reduction="none", backend=backend)
        assert losses.isnan().tolist() == [k == 1 for k in range(len(target))]
        assert torch.equal(losses[2:], wanted[2:])
        assert function(x, w, wrong, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_target_reads_nothing_outside(backend, monkeypatch):
    """The operators themselves, the gradients too."""
    monkeypatch.setattr(_checks, "check_targets", lambda *arguments: None)
    for bad in (10**12, -(10**12), 9, -1):
        for name in ("forward", "forward_backward", "backward"):
            arguments = operator_arguments(name, torch.float32, backend, True, True, "xw")
            wanted = getattr(OPS, name)(*arguments)
            target = arguments[2].clone()
            target[1] = bad
            out = getattr(OPS, name)(*arguments[:2], target, *arguments[3:])
            if name == "backward":
                rest = torch.arange(len(target)) != 1
                assert torch.equal(out[0][rest], wanted[0][rest])
                continue
            if name == "forward_backward":
                assert out[0].isnan()
                out, wanted = (values[-len(TokenResults._fields) :] for values in (out, wanted))
            nll, others = out[0], torch.arange(len(target)) != 1
            assert nll[1].isnan()
            assert torch.equal(nll[others], wanted[0][others])


# --- autocast


# Mixed operands too: that is what a layer before the head hands over inside the region.
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float64, torch.float64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast_casts_as_a_linear_layer_does(reduction, dtypes, lower):
    """The operands become what F.linear makes of them; gradients come back in the parameters' own dtypes."""
    x, w, target, n = inputs(dtype=torch.float32)
    x, w = (tensor.detach().to(dtype).requires_grad_() for tensor, dtype in zip((x, w), dtypes, strict=True))
    with torch.autocast("cpu", lower):
        as_linear = F.linear(x, w).dtype
        out = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction)
        logits = ht.harmonic_logits(x, w)
        with torch.autocast("cpu", enabled=False):
            full = ht.linear_harmonic_loss(x.float(), w.float(), target, n=n, reduction=reduction)
    assert as_linear == (torch.float64 if torch.float64 in dtypes else lower)
    assert out.dtype == logits.dtype == (torch.float64 if as_linear == torch.float64 else torch.float32)
    mine = gradients(out, x, w, n)
    assert [g.dtype for g in mine] == [x.dtype, w.dtype, n.dtype]
    cast = [tensor.detach().to(as_linear).requires_grad_() for tensor in (x, w)]
    wanted = ht.linear_harmonic_loss(*cast, target, n=n, reduction=reduction)
    assert torch.equal(out, wanted)
    assert torch.equal(logits, ht.harmonic_logits(*cast))
    for g, value in zip(mine, gradients(wanted, *cast, n), strict=True):
        assert torch.equal(g, value.to(g.dtype))
    if dtypes == (torch.float32, torch.float32):
        assert torch.equal(full, ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction))
        assert not torch.equal(full, out)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_inside_the_autocast_region(backend, reduction):
    """Autocast is still on when the gradients are formed; it must not reach the arithmetic inside the operators."""
    x, w, target, n = inputs(dtype=torch.float32)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend)
        inside = torch.autograd.grad(out, (x, w, n), upstream(out), retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(inside, gradients(out, x, w, n), strict=True))


# --- checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, reduction, reentrant):
    """Recomputing the head in the backward pass gives the same gradients, to the bit.

    The re-entrant kind first runs without gradients: another route, whose loss may be rounded differently.
    """
    x, w, target, n = inputs(dtype=torch.float32)

    def block(x, w, n):
        return ht.linear_harmonic_loss(x.tanh(), w, target, n=n, reduction=reduction, backend=backend)

    plain, again = block(x, w, n), checkpoint(block, x, w, n, use_reentrant=reentrant)
    assert relative(again.reshape(-1, 1), plain.reshape(-1, 1)) <= (2**-22 if reentrant else 0)
    wanted = gradients(plain, x, w, n)
    again.backward(upstream(again))
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip((x, w, n), wanted, strict=True))


# --- torch.compile


def compiled_equals_eager(function: Any, compiled: Any, leaves: list[Tensor], tolerance: float = 0.0) -> None:
    """Loss, gradients and statistics; ``tolerance`` 0 means to the bit."""
    mine, wanted = compiled(*leaves), function(*leaves)
    (mine, mine_stats), (wanted, stats) = (out if isinstance(out, tuple) else (out, ()) for out in (mine, wanted))
    assert relative(mine, wanted) <= tolerance
    differentiable = [leaf for leaf in leaves if leaf.requires_grad]
    for g, value in zip(gradients(mine, *differentiable), gradients(wanted, *differentiable), strict=True):
        assert g.dtype == value.dtype
        assert relative(g, value) <= tolerance
    for value, other in zip(mine_stats, stats, strict=True):
        assert value.dtype == other.dtype
        assert relative(value, other) <= tolerance


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_without_graph_breaks_or_recompilation(reduction, return_stats):
    """Three numbers of tokens: the second makes it symbolic, the third compiles nothing. Learnable n."""

    def loss(x, w, target, n):
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, return_stats=return_stats)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for call, tokens in enumerate((12, 20, 33)):
        strict = torch._dynamo.config.patch(error_on_recompile=True) if call == 2 else contextlib.nullcontext()
        with strict:
            compiled_equals_eager(loss, compiled, list(inputs(tokens, dtype=torch.float32)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("option", [*OPTIONS, "shift", "triton", "autocast"])
def test_compiled_options(option):
    """dynamic=True from the start: one graph for two shapes, for every option; n a plain number."""
    options = OPTIONS.get(option, {"shift": True} if option == "shift" else {})
    if option == "triton":
        pytest.importorskip("triton")
        options = {"backend": "triton"}
    if "class_weight" in options:
        options = {**options, "class_weight": options["class_weight"].float()}

    def loss(x, w, target):
        with torch.autocast("cpu", torch.bfloat16, enabled=option == "autocast"):
            return ht.linear_harmonic_loss(x, w, target, n=3.3, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 20):
        compiled_equals_eager(loss, compiled, list(inputs(tokens, dtype=torch.float32)[:3]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
@pytest.mark.parametrize(("backend", "option"), [
    ("torch", "label_smoothing"), ("torch", "class_weight"), ("torch", "both"), ("triton", "both"),
])  # fmt: skip
def test_compiled_token_losses(backend, option, function):
    """``reduction="none"`` with each option: one graph for two shapes, in which a backend is a word."""
    options = {"label_smoothing": 0.2} if option != "class_weight" else {}
    if option != "label_smoothing":
        options["class_weight"] = weights(dtype=torch.float32)

    def loss(x, w, target):
        return function(x, w, target, reduction="none", backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 20):
        compiled_equals_eager(loss, compiled, list(inputs(tokens, dtype=torch.float32)[:3]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


A_GPU_BY_ITS_PROPERTIES = """
    import sys
    import torch
    import harmonic_triton as ht
    from harmonic_triton._common.dispatch import resolve
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Properties:
        major, minor, total_memory, multi_processor_count = 9, 0, 2**37, 132

    torch.version.cuda = torch.version.cuda or "13.0"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: Properties
    backend, gpu, graphs = sys.argv[1], torch.device("cuda", 0), []

    def recorded(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def which(x):
        return x + 1 if resolve(backend, gpu, torch.float32) == "triton" else x

    assert torch.compile(which, fullgraph=True, backend="eager")(torch.zeros(())) == 1
    if torch.backends.cuda.is_built():
        for reduction in ("none", "mean"):
            def loss(x, w, target, n):
                return ht.linear_harmonic_loss(
                    x, w, target, n=n, reduction=reduction, backend=backend, label_smoothing=0.1
                )

            torch._dynamo.reset()
            with FakeTensorMode():
                leaves = [torch.empty(k, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True) for k in (12, 40)]
                n = torch.empty((), device=gpu, requires_grad=True)
                target = torch.zeros(12, dtype=torch.int64, device=gpu)
                out = torch.compile(loss, fullgraph=True, backend=recorded)(*leaves, target, n)
                assert out.shape == ((12,) if reduction == "none" else ()) and out.device == gpu
            code = "".join(module.code for module in graphs.pop().modules() if hasattr(module, "code"))
            assert "harmonic_triton.forward" in code and "harmonic_triton.backward" in code
            assert "'triton'" in code
    print("traced")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real one serves the other tests here")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_traced_for_a_gpu(backend):
    """What is asked about a GPU and about Triton is known to dynamo: fullgraph, with the properties of a GPU given.

    Where PyTorch is built for CUDA, fake tensors show the whole function, forward and backward in the graph.
    """
    run = fresh.run(A_GPU_BY_ITS_PROPERTIES, backend)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == "traced\n"


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_head():
    """The module with a learnable exponent: the loss through inductor, the logits."""
    torch.manual_seed(0)
    head = ht.HarmonicHead(6, 9, n=3.0, learnable_n=True, std=1.0)
    x, _, target, _ = inputs(12, dtype=torch.float32)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    losses, logits = [], []
    for module in (compiled, head):
        head.zero_grad()
        loss = module(x, target=target)
        losses.append((loss, torch.autograd.grad(0.7 * loss, (x, head.weight, head.n))))
        logits.append((module(x), torch.autograd.grad(module(x).square().sum(), (x, head.weight, head.n))))
    for (mine, mine_grads), (wanted, wanted_grads) in (losses, logits):
        assert torch.equal(mine, wanted)
        assert all(torch.equal(*pair) for pair in zip(mine_grads, wanted_grads, strict=True))


@pytest.mark.parametrize("asked", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_gradient_of_torch_func(reduction, asked):
    """``torch.compile`` of ``torch.func.grad``, whose class vectors no operation has touched before the loss."""
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))

    def loss(x, w, n):
        out = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction)
        return (out * upstream(out)).sum()

    compiled = torch.compile(grad(loss, asked), fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(x, w, n), grad(loss, asked)(x, w, n), strict=True)
    assert all(wanted.norm() > 0 and relative(mine, wanted) < 1e-6 for mine, wanted in pairs)


# Per-sample gradients, and a gradient of a batch of losses: what vmap wraps does not say that it wants a gradient.
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
@pytest.mark.parametrize(("reduction", "how"), [("mean", "vmap of grad"), ("none", "vmap of grad"), ("sum", "backward of vmap"),
                                               ("none", "grad of vmap")])  # fmt: skip
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_vmap(reduction, how, function):
    """Without a graph break, x and target batched, the class vectors shared."""
    x, w, target, _ = (tensor.detach() for tensor in inputs(5, dtype=torch.float32))
    up = torch.linspace(0.3, 1.2, 5)

    def one(x, w, label):
        return 0.7 * function(x[None], w, label[None], reduction=reduction).sum()

    def weighted(x, w):
        return (vmap(one, (0, None, 0))(x, w, target) * up).sum()

    if how == "vmap of grad":
        run = lambda x, w: vmap(grad(one, (0, 1)), (0, None, 0))(x, w, target)
    elif how == "grad of vmap":
        run = grad(weighted, (0, 1))
    else:
        run = weighted
        x, w = x.requires_grad_(), w.requires_grad_()
    mine, wanted = torch.compile(run, fullgraph=True, backend="aot_eager")(x, w), run(x, w)
    if how == "backward of vmap":
        mine, wanted = (torch.autograd.grad(out, (x, w)) for out in (mine, wanted))
    for got, value in zip(mine, wanted, strict=True):
        assert value.norm() > 0 and relative(got.flatten(1), value.flatten(1)) < 1e-6


def test_who_looks_on_sees_operators():
    """In plain eager mode their bodies run at once; a dispatch mode and the profiler still see the operators, with equal results."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    def step():
        x, w, target, n = inputs(dtype=torch.float32)
        loss = ht.linear_harmonic_loss(x, w, target, n=n, backend="torch")
        return [loss, *torch.autograd.grad(loss, (x, w, n), torch.tensor(0.7))]

    wanted, names = step(), []
    with Seen():
        seen = step()
    with torch.profiler.profile() as profile:
        profiled = step()
    for got, seen_names in ((seen, names), (profiled, [event.key for event in profile.key_averages()])):
        assert {"harmonic_triton::forward_backward", "harmonic_triton::finish"} <= set(seen_names)
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


FIRST_CALL = """
    import sys
    import torch
    import harmonic_triton as ht
    backend, reduction = sys.argv[1:]
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(k, 16, generator=generator).requires_grad_() for k in (24, 40))
    target = torch.randint(40, (24,), generator=generator)
    n = torch.tensor(3.3, requires_grad=True)

    def loss(x, w, n):
        return ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, return_stats=True)

    results = []
    for function in (torch.compile(loss, fullgraph=True, backend=backend), loss):
        out, stats = function(x, w, n)
        up = torch.linspace(0.3, 1.2, out.numel()).reshape(out.shape)
        results.append((out.reshape(-1, 1), *torch.autograd.grad(out, (x, w, n), up), *stats))
    for mine, wanted in zip(*results, strict=True):
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape
        mine, wanted = (t.detach().double().reshape(len(t) if t.dim() else 1, -1) for t in (mine, wanted))
        assert ((mine - wanted).norm(dim=1) <= 1e-6 * wanted.norm(dim=1)).all(), (mine, wanted)
    print("equal")
"""


@pytest.mark.parametrize(
    ("backend", "reduction"), [pytest.param("inductor", "mean", marks=pytest.mark.slow), ("aot_eager", "none")]
)
def test_compiled_as_the_first_call_of_a_process(backend, reduction):
    """Nothing has run eagerly before: no operator, backend or cache is there yet. Inductor may sum in another order."""
    run = fresh.run(FIRST_CALL, backend, reduction)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == "equal\n"


# Differentiating a vmap: the wrapper that vmap puts around a tensor hides that its inside wants a gradient.
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("batched", ["x", "n"])
def test_gradient_of_a_vmap(batched, which, reduction):
    torch.manual_seed(0)
    x, w, t = torch.randn(4, 8), torch.randn(11, 8), torch.randint(11, (4,))
    n = torch.tensor([2.0, 3.0, 4.0]) if batched == "n" else torch.tensor(3.0)

    def over_n(one, x, w):
        return ht.linear_harmonic_loss(x, w, t, n=one, reduction=reduction).sum()

    def over_x(row, label, w, n):
        return ht.linear_harmonic_loss(row[None], w, label[None], n=n, reduction=reduction).sum()

    def vectorised(x, w, n):
        if batched == "n":
            return (torch.func.vmap(lambda one: over_n(one, x, w))(n) * torch.tensor([1.0, 2.0, -0.5])).sum()
        rows = torch.func.vmap(lambda row, label: over_x(row, label, w, n))(x, t)
        return (rows * torch.tensor([1.0, 2.0, -0.5, 3.0])).sum()

    def looped(x, w, n):
        if batched == "n":
            return sum(k * over_n(one, x, w) for k, one in zip((1.0, 2.0, -0.5), n, strict=True))
        return sum(k * over_x(*row, w, n) for k, row in zip((1.0, 2.0, -0.5, 3.0), zip(x, t, strict=True), strict=True))

    got = torch.func.grad(vectorised, argnums=which)(x, w, n)
    wanted = torch.func.grad(looped, argnums=which)(x, w, n)
    for one, other in zip(got, wanted, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= 1e-5 * other.norm()
    leaves = [tensor.clone().requires_grad_(k in which) for k, tensor in enumerate((x, w, n))]
    vectorised(*leaves).backward()
    for k, other in zip(which, wanted, strict=True):
        assert (leaves[k].grad - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_compiled_where_no_gradient_is_wanted(how, reduction):
    torch._dynamo.reset()
    x, w, t = torch.randn(4, 8), torch.randn(11, 8), torch.randint(11, (4,))
    loss = lambda a, b, c: ht.linear_harmonic_loss(a, b, c, reduction=reduction, return_stats=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[how]
    with context():
        leaf = x if how == "frozen" else x.clone().requires_grad_()
        got, stats = compiled(leaf, w, t)
        wanted, expected = loss(leaf, w, t)
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
    assert not got.requires_grad


# However a user asked for fast products, ours stay in fp32 and the setting is left as it was (torch refuses to mix its
# two interfaces, so each is tried in a process of its own).
@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_fp16_accumulation = True",
    ],
)
def test_the_users_matmul_precision_is_left_alone(setting):
    code = f"""
import torch, threading, harmonic_triton as ht
from harmonic_triton._common.precision import full_fp32
def state():
    out = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision,
           torch.backends.cuda.matmul.allow_fp16_accumulation]
    try:
        return [*out, torch.get_float32_matmul_precision()]
    except RuntimeError:
        return [*out, "mixed"]
x, w, t = torch.randn(64, 32, requires_grad=True), torch.randn(50, 32), torch.arange(50).repeat(2)[:64]
plain = ht.linear_harmonic_loss(x, w, t)
{setting}
before = state()
ht.linear_harmonic_loss(x, w, t, reduction="none").sum().backward()
ht.harmonic_logits(x, w)
assert torch.equal(ht.linear_harmonic_loss(x, w, t), plain)
with full_fp32():
    assert state()[1] in ("ieee", "none") and state()[2] is False, state()
assert state() == before, (state(), before)
barrier = threading.Barrier(3)
def work():
    barrier.wait()
    for _ in range(50):
        ht.linear_harmonic_loss(x.detach(), w, t)
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert state() == before, (state(), before)
"""
    run = fresh.run(code)
    assert run.returncode == 0, run.stderr


# Few tokens keep their coefficients, several chunks their gradients; the last backward pass hands those out as they are.
@pytest.mark.parametrize("budget", [None, 4 * 9 * 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_kept_graph_has_given_is_not_written_over(backend, budget):
    x, w, target, n = (tensor.detach() for tensor in inputs(dtype=torch.float32))
    leaves = x.requires_grad_(), w.requires_grad_()
    loss = ht.linear_harmonic_loss(*leaves, target, n=n, backend=backend, memory_budget=budget)
    once = torch.autograd.grad(loss, leaves, torch.tensor(1.0), retain_graph=True)
    before = [gradient.clone() for gradient in once]
    thrice = torch.autograd.grad(loss, leaves, torch.tensor(3.0), retain_graph=True)
    last = torch.autograd.grad(loss, leaves, torch.tensor(1.7))
    for first, kept, three, other in zip(once, before, thrice, last, strict=True):
        assert torch.equal(first, kept)
        torch.testing.assert_close(three, 3 * first, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other, 1.7 * first, rtol=1e-5, atol=1e-7)
