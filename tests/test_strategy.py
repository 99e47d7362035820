"""The Triton backend's one pass: gradient products in the forward pass, from entries without their token's factor; who
chooses it."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle
from test_oracle import DTYPES, PEAKS, PLACES, draw, exponents, inputs, logits_inputs, option_sets, shapes
from test_oracle import run as run_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import harmonic_triton as ht
from harmonic_triton.fused import ops
from harmonic_triton.fused import strategy as strategies
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.results import TokenWeights, Upstream, token_losses

_triton = pytest.importorskip("harmonic_triton.fused.triton.backend")
_launch = pytest.importorskip("harmonic_triton.fused.triton.launch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.triton
SHAPE = (37, 67, 70)  # more tokens than a tile of 32, two tiles of classes, multiples of nothing
BUDGET = 32 * 70 * 3  # chunks of one tile of rows


def run(x, w, target, g, *, n, eps=0.0, uniform_mix=0.0, class_weight=None, label_smoothing=0.0, budget=0):
    """(losses, dX, dW) of sum_i g_i loss_i by the reduced operator, whose token weights can be anything."""
    x, w = (leaf.detach().to(DEVICE, copy=True).requires_grad_() for leaf in (x, w))
    target, g = target.to(DEVICE), g.to(DEVICE)
    each = torch.ones_like(g) if class_weight is None else class_weight.to(DEVICE)[target.clamp_min(0)]
    kept = (target != -100).float()
    v = b = None
    if label_smoothing:
        v = (torch.ones(len(w), device=DEVICE) if class_weight is None else class_weight.to(DEVICE)) / len(w)
        b = kept * label_smoothing
    token = kept * each * (1 - label_smoothing)
    exponent = None if n is None else torch.tensor(float(n), device=DEVICE)
    problem = Problem(eps, uniform_mix, -100, False, "triton", budget)
    loss, results = ops.forward_backward(
        Operands(x, w, target, exponent, v), TokenWeights(g * token, None if b is None else g * b, None),
        problem, Wanted(True, True, False),
    )  # fmt: skip
    losses = token_losses(results, TokenWeights(token, b, None), uniform_mix, len(w))
    torch.testing.assert_close(loss, (g * losses).sum(), rtol=1e-5, atol=1e-5 * float((g * losses).abs().sum()))
    loss.backward()
    return losses.detach(), x.grad, w.grad


def compare(x, w, target, g, budget=0, **options):
    if x.element_size() == 2:  # gradients into the range of their dtype
        every = run_rows(x.float(), w.float(), target, g, "torch", **options)
        largest = max(t.abs().max().item() for t in every[1:])
        g = g / largest if 1e-20 < largest < 1e30 else g
    oracle(x, w, target, g, **options).check(*run(x, w, target, g, budget=budget, **options))


@pytest.mark.parametrize("n", [2.0, 28.0])
@pytest.mark.parametrize("place", PLACES)
def test_one_pass_grid(place, n):
    compare(*inputs(*SHAPE, torch.bfloat16, place), BUDGET, n=n)


@pytest.mark.parametrize("peak", PEAKS)
def test_one_pass_grid_of_cross_entropy(peak):
    compare(*logits_inputs(*SHAPE, torch.bfloat16, peak), BUDGET, n=None)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(PLACES), st.sampled_from([1e-4, 0.02, 1.0, 1e4]),
       exponents, st.integers(0, 10**6), option_sets)  # fmt: skip
def test_one_pass_drawn(shape, place, scale, n, seed, options):
    tensors, options = draw(shape, "bf16", place, scale, n, seed, options)
    options["label_smoothing"] = 0.0  # is recompute's
    compare(*tensors, **options)


def call(dtype=torch.bfloat16, strategy="one pass", function=ht.linear_harmonic_loss, shape=(37, 64, 70), **options):
    """(loss, dX, dW, dn) of the public function."""
    x, w, target, _ = inputs(*shape, dtype, "near")
    x, w = x.to(DEVICE).requires_grad_(), w.to(DEVICE).requires_grad_()
    leaves = [x, w]
    if function is ht.linear_harmonic_loss:
        options["n"] = torch.tensor(7.0, device=DEVICE, requires_grad=True)
        leaves.append(options["n"])
    with strategies.force(strategy):
        loss = function(x, w, target.to(DEVICE), backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("function", "options"), [
    (ht.linear_harmonic_loss, {}), (ht.linear_harmonic_loss, {"uniform_mix": 0.1}),
    (ht.linear_cross_entropy, {"reduction": "sum"}),
])  # fmt: skip
def test_both_strategies_agree(function, options):
    """The same kernel measures the loss; gradients differ in roundings to bfloat16 alone. Three tiles of classes."""
    one, other = (
        call(torch.bfloat16, strategy, function, (70, 64, 140), **options) for strategy in ("one pass", "recompute")
    )
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0.0)
    for got, want in zip(one, other, strict=True):
        assert (got - want).norm() <= 2.0**-7 * want.norm()


@pytest.mark.parametrize(("dtype", "options"), [
    (torch.float32, {}), (torch.float16, {}), (torch.bfloat16, {"label_smoothing": 0.1}),
])  # fmt: skip
def test_what_one_pass_does_not_serve_is_recomputed(dtype, options):
    """Coefficients without their token's factor need fp32's range, and sums from which the rival can be taken away."""
    one, other = (call(dtype, strategy, **options) for strategy in ("one pass", "recompute"))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(("dtype", "smoothing"), [("fp32", 0.1), ("fp16", 0.0), ("bf16", 0.1)])
def test_the_operator_serves_what_one_pass_does_not(dtype, smoothing):
    """By recomputing at once; the upstream gradient still comes before the rounding."""
    compare(*inputs(*SHAPE, DTYPES[dtype], "near"), BUDGET, n=28.0, label_smoothing=smoothing)


def test_chunk_size_changes_sums_alone():
    """One chunk of 37 tokens, or two. The products are of other shapes, for which a library may sum in another order:
    70 fp32 terms of up to 1/0.3 of their sum, whose rounding may then turn the other way."""
    whole, cut = (call(memory_budget=budget) for budget in (2**30, BUDGET))
    allowed = 2 * torch.finfo(torch.bfloat16).eps + 70**0.5 / 0.3 * torch.finfo(torch.float32).eps
    for got, want in zip(whole[1:], cut[1:], strict=True):
        assert (got - want).norm() <= allowed * want.norm()


@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
@pytest.mark.parametrize(("row", "logit"), [(30.0, 60.0), (1e3, 1e3)])
def test_tokens_beyond_fp32_are_done_again(function, row, logit):
    """Half of them lie near another class, or have a logit of hundreds: A~ with anchor 0 is 2^1000, or infinite.

    Without the second pass nothing here is a number.
    """
    x, w, target, g = inputs(70, 64, 140, torch.float32, "far")
    other = (target.clamp_min(0) + 1) % len(w)
    x[::2] = (w[other] + 0.1 * torch.randn(70, 64, generator=torch.Generator().manual_seed(1)))[::2]
    n = row if function is ht.linear_harmonic_loss else None
    if n is None:
        x, w = x * (logit / 64) ** 0.5, w * (logit / 64) ** 0.5
    compare(x.bfloat16(), w.bfloat16(), target, g, n=n)


@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
def test_a_common_mean_of_the_class_vectors_costs_nothing(function, strategy):
    """100 times their spread: what rounding takes from the sum of A, times that, would be many times the last rounding."""
    generator = torch.Generator().manual_seed(0)
    mean = 100 * torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0) * 8
    w = (mean + torch.randn(140, 64, generator=generator)).bfloat16()
    target = torch.randint(140, (37,), generator=generator)
    x = w[target].float() + torch.randn(37, 64, generator=generator)
    if function is ht.linear_cross_entropy:
        x = 0.05 * torch.randn(37, 64, generator=generator)
        x = x - (x @ mean)[:, None] * mean / mean.square().sum()
    x = x.bfloat16()
    gradients = []
    for backend, dtype in (("triton", torch.bfloat16), ("reference", torch.float64)):
        leaves = [leaf.to(DEVICE, dtype).requires_grad_() for leaf in (x, w)]
        with strategies.force(strategy):
            loss = function(*leaves, target.to(DEVICE), backend=backend)
        gradients.append(torch.autograd.grad(loss, leaves))
    (dx, _), (want, _) = gradients
    assert (dx - want).norm() < 2.0**-8 * want.norm()


def test_nothing_is_done_again_without_need(monkeypatch):
    """The second launch reads one number and ends: its partial sums stay what the first one wrote."""
    seen = []
    kernel = _launch.scores_kernels.scores_kernel

    class Launched:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                names = dict(zip(kernel.arg_names, args, strict=False))
                if constants["REPAIR"]:
                    names["p_sum_ptr"].fill_(torch.nan)
                kernel[grid](*args, **constants)
                seen.append((constants["REPAIR"], bool(names["p_sum_ptr"].isnan().all())))

            return launch

    monkeypatch.setattr(_launch.scores_kernels, "scores_kernel", Launched())
    x, w, target, _ = inputs(5, 8, 9, torch.bfloat16, "near")
    problem, operands = Problem(0.0, 0.0, -100, False, "triton", 0), Operands(x, w, target, torch.tensor(3.0), None)
    _triton.forward(Operands(*(None if t is None else t.to(DEVICE) for t in operands)), problem)
    assert seen == [(False, False), (True, True)]


@pytest.mark.parametrize("wanted", ["x", "w", "n"])
def test_only_what_is_asked_for(wanted):
    """A frozen head, frozen features, or a learnable exponent alone."""
    x, w, target, _ = inputs(37, 64, 70, torch.bfloat16, "near")
    leaves = {"x": x.to(DEVICE), "w": w.to(DEVICE), "n": torch.tensor(7.0, device=DEVICE)}
    leaves[wanted].requires_grad_()
    with strategies.force("one pass"):
        loss = ht.linear_harmonic_loss(
            leaves["x"], leaves["w"], target.to(DEVICE), n=leaves["n"], backend="triton", memory_budget=BUDGET
        )
    (grad,) = torch.autograd.grad(loss, leaves[wanted])
    want = call(memory_budget=BUDGET)[1 + "xwn".index(wanted)]
    torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
def test_no_token_counts(function):
    """All ignored, and none at all: loss and gradients are 0."""
    for tokens in (5, 0):
        x, w = (torch.randn(rows, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for rows in (tokens, 9))
        target = torch.full((tokens,), -100, device=DEVICE)
        with strategies.force("one pass"):
            loss = function(x, w, target, backend="triton")
        grads = torch.autograd.grad(loss, (x, w))
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


def test_a_bad_token_shows_and_an_ignored_one_does_not():
    """NaN in a counted token is in the loss and in dW; in an ignored token it is nowhere."""
    x, w, target, g = inputs(37, 64, 70, torch.bfloat16, "near")
    x[6] = torch.nan  # ignored
    _, dx, dw = run(x, w, target, g, n=7.0)
    assert (dx[6] == 0).all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    x[5] = torch.nan
    losses, dx, dw = nll_and_gradients(x, w, target, g)
    assert losses.isnan().nonzero().flatten().tolist() == [5]
    assert dx.isnan().any(1).nonzero().flatten().tolist() == [5]
    assert dw.isnan().any()


def nll_and_gradients(x, w, target, g):
    """The operator itself; :func:`run` compares sums, which are NaN here."""
    up = (g * (target != -100)).to(DEVICE)
    n = torch.tensor(7.0, device=DEVICE)
    operands = Operands(x.to(DEVICE), w.to(DEVICE), target.to(DEVICE), n, None)
    problem = Problem(0.0, 0.0, -100, False, "triton", 0)
    wanted = Wanted(True, True, False)
    results, unfinished = _triton.forward_backward(operands, TokenWeights(up, None, None), problem, wanted)
    finishing = Finishing(results.rival, torch.ones((), device=DEVICE), True)
    return results.nll, *_triton.finish(operands, unfinished, finishing, problem, wanted)[:2]


# --- deterministic, without waiting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
@pytest.mark.parametrize("function", [ht.linear_harmonic_loss, ht.linear_cross_entropy])
def test_bitwise_equal_from_run_to_run(strategy, function):
    """No atomics, every sum in a fixed order."""
    first, second = (call(strategy=strategy, function=function, memory_budget=BUDGET) for _ in range(2))
    assert all(map(torch.equal, first, second))


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for: values read by the host, shapes that depend on values."""

    WAITING = ("local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.seen.add(name)
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if name.strip("_").startswith(self.WAITING) or masks:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def operators(dtype, harmonic, label_smoothing):
    """Both strategies of the backend, from tensors that are there: what a captured graph would hold."""
    x, w, target, g = (tensor.to(DEVICE) for tensor in inputs(37, 64, 70, dtype, "near"))
    n = torch.tensor(7.0, device=DEVICE) if harmonic else None
    v = torch.full((70,), label_smoothing / 70, device=DEVICE) if label_smoothing else None
    b = g.abs() if label_smoothing else None
    alpha = 0.01 if harmonic and not label_smoothing else 0.0
    operands = Operands(x, w, target, n, v)
    problem = Problem(0.0, alpha, -100, True, "triton", BUDGET)
    wanted = Wanted(True, True, harmonic)

    def step():
        results, gradients = (), ()
        if strategies.one_pass_serves(operands):
            results, unfinished = _triton.forward_backward(operands, TokenWeights(g, b, None), problem, wanted)
            finishing = Finishing(results.rival, torch.full_like(g[0], 1.7), False)
            gradients = _triton.finish(operands, unfinished, finishing, problem, wanted)
        again = _triton.backward(operands, _triton.forward(operands, problem), Upstream(g, b, None), problem, wanted)
        return *results, *gradients, *again

    return step


@pytest.mark.parametrize(("dtype", "harmonic", "label_smoothing"), [
    ("bf16", True, 0.0), ("bf16", False, 0.0), ("fp16", True, 0.1), ("fp32", False, 0.1),
])  # fmt: skip
def test_nothing_waits_for_the_device(dtype, harmonic, label_smoothing):
    """By the operations that PyTorch is asked for; a kernel's launch has none of them."""
    step = operators(DTYPES[dtype], harmonic, label_smoothing)
    with NoWaiting() as mode:
        step()
    assert {"empty_strided", "sort"} & mode.seen or {"new_empty", "sort"} & mode.seen


@pytest.mark.parametrize("wait", [
    lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: bool(t.any()),
    lambda t: t.masked_select(t > 0), lambda t: t.unique(),
])  # fmt: skip
def test_waiting_would_be_seen(wait):
    with pytest.raises(RuntimeError, match="waits"), NoWaiting():
        wait(torch.ones(3))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("harmonic", [True, False])
def test_captured_in_a_cuda_graph(harmonic):
    """Under the driver's own check for synchronisation; a replay gives the same bits."""
    step = operators(torch.bfloat16, harmonic, 0.0)
    want = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(tokens, width, classes, dtype=torch.bfloat16, budget=2**31):
    x, w = (torch.empty(rows, width, dtype=dtype, device="meta") for rows in (tokens, classes))
    problem = Problem(0.0, 0.0, -100, False, "triton", budget)
    return "one pass" if strategies.gradients_in_forward(problem, Operands(x, w, x, None, None)) else "recompute"


@pytest.mark.parametrize(("shape", "options", "wanted"), [
    ((8192, 768, 50257), {}, "one pass"),
    ((8192, 4096, 128256), {}, "one pass"),
    ((8192, 4096, 128256), {"budget": 48 * 2**20}, "recompute"),  # 170 tokens a chunk: dW 48 times
    ((512, 768, 50257), {}, "one pass"),
    ((8192, 768, 50257), {"dtype": torch.float32}, "recompute"),  # whose entries cannot give the rival back
    ((8192, 768, 50257), {"dtype": torch.float16}, "recompute"),  # whose range is too small
    ((8192, 768, 50257), {"budget": 1}, "recompute"),
    ((2**16, 4096, 2**16), {"budget": 2**60}, "one pass"),
])  # fmt: skip
def test_choice(shape, options, wanted):
    assert chosen(*shape, **options) == wanted


@pytest.mark.parametrize("dynamic", [False, True])
def test_choice_is_traced(dynamic):
    """torch.compile of a whole function: as many tokens and classes as there are, known or not."""
    traced = torch.compile(
        lambda x, w, target: ht.linear_cross_entropy(x, w, target, backend="triton"),
        fullgraph=True, dynamic=dynamic, backend="eager",
    )  # fmt: skip
    for tokens in (3, 5):
        x, w = (torch.randn(rows, 8, device=DEVICE, requires_grad=True) for rows in (tokens, 9))
        target = torch.arange(tokens, device=DEVICE)
        want = ht.linear_cross_entropy(x, w, target, backend="torch")
        torch.testing.assert_close(traced(x, w, target), want)


def test_torch_always_forms_gradients_in_forward():
    x = torch.empty(4, 8)
    problem = Problem(0.0, 0.0, -100, False, "torch", 1)
    assert strategies.gradients_in_forward(problem, Operands(x, x, x, None, None))


def test_force_is_undone_and_checked():
    with pytest.raises(ValueError, match="'fast'"), strategies.force("fast"):
        pass
    with strategies.force("one pass"), strategies.force("recompute"):
        assert chosen(8192, 768, 50257) == "recompute"
    assert chosen(8192, 768, 50257, budget=1) == "recompute"
    assert chosen(8192, 768, 50257) == "one pass"


@pytest.mark.parametrize(("strategy", "kept", "recomputed"), [("one pass", 4, 0), ("recompute", 0, 1)])
def test_the_strategy_is_what_runs(strategy, kept, recomputed, monkeypatch):
    """Entries kept in the forward pass, two launches a chunk, or coefficients in the backward one. Neither without gradients."""
    seen = []
    kernel = _launch.scores_kernels.scores_kernel

    class Launched:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                seen.append((constants["KEEP"], constants["RECOMPUTE"]))
                return kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(_launch.scores_kernels, "scores_kernel", Launched())
    call(strategy=strategy)
    assert [sum(column) for column in zip(*seen, strict=True)] == [kept, recomputed]
    seen.clear()
    x, w, target, _ = (tensor.to(DEVICE) for tensor in inputs(37, 64, 70, torch.bfloat16, "near"))
    with strategies.force(strategy):
        ht.linear_harmonic_loss(x, w, target, backend="triton")
    assert seen == [(False, False)] * 2


class Allocated(TorchDispatchMode):
    """Bytes of all storages that operations made and Python still holds, and their peak."""

    def __init__(self):
        super().__init__()
        self.holders, self.now, self.peak = {}, 0, 0

    def release(self, key, size):
        self.holders[key] -= 1
        self.now -= size * (self.holders[key] == 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if self.holders.get(key, 0) == 0 and key in given:
                    continue  # the caller's
                if self.holders.get(key, 0) == 0:
                    self.now += size
                self.holders[key] = self.holders.get(key, 0) + 1
                weakref.finalize(leaf, self.release, key, size)
        self.peak = max(self.peak, self.now)
        return out


def recompute_peak(monkeypatch, tokens, classes, width, budget, dtype=torch.bfloat16):
    """Peak bytes of forward and backward beyond inputs and gradients; nothing is computed, no shape depends on values."""

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **constants: None

    for module in (_launch.scores_kernels, _launch.forward_kernels, _triton.backward_kernels):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Silent())
    monkeypatch.setattr(_triton, "_product", lambda *args, **options: None)
    x, w = torch.zeros(tokens, width, dtype=dtype), torch.zeros(classes, width, dtype=dtype)
    target, n, g = torch.zeros(tokens, dtype=torch.int64), torch.tensor(28.0), torch.ones(tokens)
    with Allocated() as allocated:
        operands, problem = Operands(x, w, target, n, None), Problem(0.0, 0.0, -100, False, "triton", budget)
        results = _triton.forward(operands, problem)
        gradients = _triton.backward(operands, results, Upstream(g, None, None), problem, Wanted(True, True, False))
    return allocated.peak - sum(gradient.nbytes for gradient in gradients)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the host asks for; a GPU's allocator says it itself")
def test_recompute_keeps_to_its_budget_and_vectors(monkeypatch):
    """Beyond inputs, gradients and the budget: dX's fp32 sum, the operand A^T is multiplied with, vectors of N and V."""
    budget, width, classes = 2**22, 64, 20_000
    peaks = {tokens: recompute_peak(monkeypatch, tokens, classes, width, budget) for tokens in (512, 1024, 2048, 4096)}
    for tokens, peak in peaks.items():
        vectors = tokens * (4 + 2) * width + 300 * tokens + 40 * classes
        assert 0 < peak - vectors <= budget, (tokens, peak)
    wide = recompute_peak(monkeypatch, 1024, 2 * classes, width, budget)
    assert wide - peaks[1024] <= 40 * classes  # vectors of V only


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the host asks for; a GPU's allocator says it itself")
def test_recompute_at_gpt2_size_is_below_64_megabytes(monkeypatch):
    """With the budget that the benchmark gives it."""
    from benchmarks.baselines import RECOMPUTE_BUDGET

    assert recompute_peak(monkeypatch, 8192, 50257, 768, RECOMPUTE_BUDGET) < 64e6
