"""Every backend against the fp64 reference, on inputs that hypothesis draws and on a grid of ugly ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle

from harmonic_triton import linear_cross_entropy, linear_harmonic_loss
from harmonic_triton import reference as ht_reference
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.pytorch import backend as torch_backend
from harmonic_triton.fused.results import TokenWeights

PLACES = ("far", "near", "very near", "on target", "on another", "near another", "duplicates", "identical pair",
          "hopeless", "zero")  # fmt: skip
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(tokens, width, classes, dtype, place, scale=1.0, seed=0):
    """x, w, target, upstream; a token in seven is ignored, the upstream gradient differs in size and sign."""
    generator = torch.Generator().manual_seed(seed)
    w = (scale * torch.randn(classes, width, generator=generator)).to(dtype)
    target = torch.randint(classes, (tokens,), generator=generator)
    noise = torch.randn(tokens, width, generator=generator)
    if place in ("duplicates", "identical pair") and classes > 1:
        w[1::2] = w[: len(w) // 2 * 2 : 2].clone()[: len(w[1::2])]
    if place == "hopeless":  # norms three decades apart, in two widths of x: most targets are far behind other classes
        apart = 10 ** torch.linspace(0, 3, classes)[torch.randperm(classes, generator=generator)]
        w = (w.float() * apart.unsqueeze(1) / 30).to(dtype)
    elif place == "zero":  # a class vector without norm, as of a padding token; x lies on it or beside it
        w[0] = 0
        target[::3] = 0
    centre, size = w[target].float(), scale
    if place == "hopeless":
        x = (size / 30 * noise) * torch.tensor([1.0, 0.01])[torch.arange(tokens) % 2].unsqueeze(1)
    elif place == "zero":
        x = torch.where(torch.arange(tokens).unsqueeze(1) % 2 == 0, 0.0, 1e-2 * size) * noise
    elif place == "far":
        x = 30 * size * noise
    elif place in ("near", "very near", "duplicates"):
        x = centre + size * {"near": 0.3, "very near": 1e-3, "duplicates": 0.1}[place] * noise
    elif place in ("on target", "identical pair"):
        x = centre
    else:
        x = w[(target + 1) % classes].float() + size * (1e-3 if place == "near another" else 0.0) * noise
    g = torch.randn(tokens, generator=generator) * 10.0 ** torch.randint(-2, 3, (tokens,), generator=generator)
    target[6::7] = -100
    return x.to(dtype), w, target, g


def run(x, w, target, g, backend, **options):
    """(losses, dX, dW), and db where there is a bias; ``n=None`` is cross-entropy."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, w)]
    function = linear_harmonic_loss
    if options["n"] is None:
        function, options = linear_cross_entropy, {key: value for key, value in options.items() if key != "n"}
    if options.get("bias") is not None:
        leaves.append(options.pop("bias").clone().requires_grad_())
        options["bias"] = leaves[2]
    loss = function(*leaves[:2], target, reduction="none", backend=backend, **options)
    loss.backward(g.to(loss.dtype))
    return loss.detach(), *(leaf.grad for leaf in leaves)


def compare(x, w, target, g, backend, **options):
    """Assert loss, dX and dW within their derived bounds; with 16-bit outputs the gradients are first scaled into range."""
    if x.element_size() == 2:
        biggest = max(
            tensor.abs().max().item() for tensor in run(x.float(), w.float(), target, g, "torch", **options)[1:3]
        )
        g = g * 2.0 ** -round(math.log2(biggest)) if 1e-20 < biggest < math.inf else g
    truth = oracle(x, w, target, g, **options)
    truth.check(*run(x, w, target, g, backend, **options))


shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
exponents = st.sampled_from([0.5, 1.0, 2.0, 5.5, 28.0, 300.0, 1536.0])
option_sets = st.fixed_dictionaries(
    {"eps": st.sampled_from([0.0, 0.0, 1e-4]), "uniform_mix": st.sampled_from([0.0, 0.0, 0.01]),
     "label_smoothing": st.sampled_from([0.0, 0.0, 0.1]), "weighted": st.booleans()}
)  # fmt: skip


def draw(shape, dtype, place, scale, n, seed, options):
    if dtype == "fp16" and not 1e-2 <= scale <= 1e2:
        scale = 1.0  # beyond, squares of differences leave fp16's own range
    x, w, target, g = inputs(*shape, DTYPES[dtype], place, scale, seed)
    weight = torch.rand(shape[2], generator=torch.Generator().manual_seed(seed)) + 0.1 if options["weighted"] else None
    chosen = {key: options[key] for key in ("eps", "uniform_mix", "label_smoothing")}
    return (x, w, target, g), {"n": n, "class_weight": weight, **chosen}


@settings(max_examples=250, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(list(DTYPES)), st.sampled_from(PLACES), st.sampled_from([1e-4, 0.02, 1.0, 1e4]),
       exponents, st.integers(0, 10**6), option_sets)  # fmt: skip
def test_torch_drawn(shape, dtype, place, scale, n, seed, options):
    tensors, options = draw(shape, dtype, place, scale, n, seed, options)
    compare(*tensors, "torch", **options)


@pytest.mark.slow
@pytest.mark.triton
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(PLACES), st.sampled_from([1e-4, 0.02, 1.0, 1e4]),
       exponents, st.integers(0, 10**6), option_sets)  # fmt: skip
def test_triton_drawn(shape, dtype, place, scale, n, seed, options):
    tensors, options = draw(shape, dtype, place, scale, n, seed, options)
    if options["uniform_mix"]:
        options["label_smoothing"] = 0.0  # together they are the torch backend's
    compare(*tensors, "triton", **options)


# More tokens than a tile, classes and features that are multiples of nothing, each place, small and large exponents.
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n", [2.0, 28.0])
def test_torch_grid(place, dtype, n):
    compare(*inputs(70, 67, 211, DTYPES[dtype], place), "torch", n=n)


@pytest.mark.triton
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_triton_grid(place, dtype):
    compare(*inputs(37, 67, 71, DTYPES[dtype], place), "triton", n=28.0)


# Three and more class vectors at one place: beyond the target and the rival they go through the products, and their
# errors grow as 1/distance^2. At a tenth of their norm that is still fp32's accuracy, and everywhere it stays finite.
# The logarithm is of fp32 whatever the operands are, and fp32 has the narrowest bounds.
@pytest.mark.triton
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "side"), [("fp32", -1), ("fp32", 0), ("fp32", 1), ("bf16", 0)])
def test_triton_with_the_fast_logarithm_of_a_gpu(place, dtype, side, monkeypatch):
    """The worst that lg2.approx may do, 2^-22 off on one side or on both, stays within the bounds; it is not run here."""
    if torch.cuda.is_available():
        pytest.skip("emulated in the interpreter; the kernels are compiled here, with the instruction itself")
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def log2(values):
        exact = np.log2(values)
        if values.dtype != np.float32:
            return exact
        sign = side or np.where(values.view(np.int32) & 4, 1.0, -1.0)
        error = 2.0**-22 * np.where((values > 0.5) & (values < 2), 1.0, np.abs(exact)) * sign
        return (exact.astype(np.float64) + error).astype(np.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_log2", lambda self, arg: self.unary_op(arg, log2))
    x, w, target, g = inputs(24, 40, 70, DTYPES[dtype], place)
    compare(x, w, target, g, "triton", n=28.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("away", [0.3, 0.1, 1e-2, 1e-4, 0.0])
def test_three_coinciding_classes(backend, away):
    x, w, target, g = inputs(12, 24, 30, torch.float32, "far")
    w[1::3], w[2::3] = w[::3], w[::3]
    x = w[target.clamp_min(0)] + away * torch.nn.functional.normalize(x, dim=1) * w.norm(dim=1).mean()
    compare(x, w, target, g, backend, n=5.0)
    loss, dx, dw = run(x, w, target, g, backend, n=5.0)
    assert loss.isfinite().all()
    assert dx.isfinite().all()
    assert dw.isfinite().all()
    if away >= 0.1:
        assert (loss[target >= 0] - math.log(3)).abs().max() < (
            1e-3 if away == 0.1 else 0.05
        )  # what the other classes add


@pytest.mark.parametrize(("tokens", "scale"), [(1, 1.0), (13, 1.0), (13, 1e8)])
@pytest.mark.parametrize("n", [1.0, 28.0, None])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_a_weighted_sum(place, dtype, n, tokens, scale):
    """Coefficients kept by the forward pass, with an upstream gradient of their own: one token and several."""
    x, w, target, g = inputs(tokens, 24, 30, DTYPES[dtype], place, 1.0 if n is None else scale)
    exponent = None if n is None else torch.tensor(n)
    operands, wanted = Operands(x, w, target, exponent, None), Wanted(True, True, False)
    problem = Problem(0.0, 0.0, -100, n is not None, "torch", 0)
    results, unfinished = torch_backend.forward_backward(operands, TokenWeights(g, None, None), problem, wanted)
    finishing = Finishing(results.rival, torch.tensor(0.75), True)
    gradients = torch_backend.finish(operands, unfinished, finishing, problem, wanted)
    oracle(x, w, target, 0.75 * g, n=n).check(results.nll, *gradients[:2])
    p = torch.log_softmax(ht_reference.log_scores(x, w, target.clamp_min(0), n)[0], 1).exp() if n else None
    if p is not None and scale == 1 and place in ("far", "near"):
        entropy = torch.where(target < 0, 0.0, -(p * p.log()).sum(1))
        assert (results.entropy - entropy).abs().max() < 1e-4


# --- cross-entropy ---------------------------------------------------------------------------------------------------

PEAKS = ("flat", "certain", "wrong", "huge", "twins", "duplicates", "shifted")


def logits_inputs(tokens, width, classes, dtype, peak, seed=0):
    """Logits of order one; losses down to 1e-20; confidently wrong; logits of thousands, and of a pair
    of classes that differ in the last digits; equal classes; a common mean."""
    x, w, target, g = inputs(
        tokens, width, classes, torch.float32, "duplicates" if peak == "duplicates" else "far", seed=seed
    )
    x = x / x.norm(dim=1, keepdim=True)
    along = w[(target.clamp_min(0) + (peak == "wrong")) % classes]
    along = along / along.square().sum(1, keepdim=True)
    if peak in ("certain", "wrong"):  # a margin of 0 ... 60 nats, the loss of a certain token about exp(-margin)
        x = 0.3 * x + torch.linspace(1, 60, tokens).unsqueeze(1) * along
    elif peak == "huge":
        x = 1e3 * x
    elif peak == "twins" and classes > 1:
        w[1::2] = w[: classes // 2 * 2 : 2] + 1e-5 * w[1::2]
        x = 1e4 * w[target.clamp_min(0)] / w.square().sum(1).mean() + x
    elif peak == "shifted":
        w = w + 5
    return x.to(dtype), w.to(dtype), target, g


logit_options = st.tuples(st.sampled_from([0.0, 0.0, 3.0, 100.0]), st.sampled_from([None, None, 1.0, 30.0]))


def chosen_for_logits(classes, dtype, seed, options, bias, softcap):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(classes, generator=generator) + 0.1 if options["weighted"] else None
    bias = bias * torch.randn(classes, generator=generator, dtype=torch.float64 if dtype == "fp64" else torch.float32)
    return {"class_weight": weight, "label_smoothing": options["label_smoothing"], "n": None, "softcap": softcap,
            "bias": bias if bias.any() else None}  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(list(DTYPES)), st.sampled_from(PEAKS), st.integers(0, 10**6), option_sets, logit_options)
def test_cross_entropy_torch_drawn(shape, dtype, peak, seed, options, of_logits):
    chosen = chosen_for_logits(shape[2], dtype, seed, options, *of_logits)
    compare(*logits_inputs(*shape, DTYPES[dtype], peak, seed), "torch", **chosen)


@pytest.mark.slow
@pytest.mark.triton
@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(["fp32", "bf16", "fp16"]), st.sampled_from(PEAKS), st.integers(0, 10**6), option_sets,
       logit_options)  # fmt: skip
def test_cross_entropy_triton_drawn(shape, dtype, peak, seed, options, of_logits):
    chosen = chosen_for_logits(shape[2], dtype, seed, options, *of_logits)
    compare(*logits_inputs(*shape, DTYPES[dtype], peak, seed), "triton", **chosen)


# More tokens than a tile, classes and features that are multiples of nothing.
@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cross_entropy_grid(backend, peak, dtype):
    compare(*logits_inputs(37, 67, 71, DTYPES[dtype], peak), backend, n=None)


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", "fp32"), ("torch", "bf16"), ("triton", "bf16"), ("triton", "fp16")]
)
def test_cross_entropy_grid_with_a_bias_and_a_cap(backend, dtype, peak):
    bias = 3 * torch.randn(71, generator=torch.Generator().manual_seed(5))
    compare(*logits_inputs(37, 67, 71, DTYPES[dtype], peak), backend, n=None, bias=bias, softcap=20.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cross_entropy_keeps_a_loss_of_1e_20(backend, dtype):
    """Relative error 1e-5 at true losses from 1e-3 to 1e-20, where fp32's log-softmax reads 0."""
    _, w, target, _ = logits_inputs(40, 64, 300, torch.float64, "flat")
    target = target.clamp_min(0)
    margin = torch.linspace(10, 75, 40, dtype=torch.float64).unsqueeze(1)
    x = (margin * w[target] / w[target].square().sum(1, keepdim=True)).to(DTYPES[dtype])
    w = w.to(DTYPES[dtype])
    want = ht_reference.linear_cross_entropy(x, w, target, reduction="none")
    got = linear_cross_entropy(x, w, target, reduction="none", backend=backend)
    assert want.min() < 1e-20 < 1e-3 < want.max()
    assert ((got - want).abs() / want).max() < 1e-5


# --- far targets and extreme values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("n", [2.0, 28.0])
@pytest.mark.parametrize("times", [300, 1000, 1e5])
def test_a_target_far_behind_other_classes(backend, reduction, n, times):
    """Loss to 1e-5, gradients as near classes have them, and the right prediction, whatever the target's distance."""
    x, w, target, g = inputs(12, 24, 40, torch.float32, "near another", seed=3)
    target = torch.arange(12)
    x = w[target + 20] + 0.3 * torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    w[:12] *= times
    truth = oracle(x, w, target, g, n=n)
    x, w = x.requires_grad_(), w.requires_grad_()
    options = {"n": n, "backend": backend}
    losses, stats = linear_harmonic_loss(x, w, target, reduction="none", return_stats=True, **options)
    if reduction == "none":
        (losses * g).sum().backward()
    else:  # every token has a class of its own, whose weight may be any number
        by_class = torch.cat([g, torch.ones(28)])
        linear_harmonic_loss(x, w, target, class_weight=by_class, reduction="sum", **options).backward()
    truth.check(losses.detach(), x.grad, w.grad)
    want = ht_reference.statistics(x.detach(), w.detach(), target, n, 0.0, -100)
    assert ((losses - truth.loss).abs() / truth.loss).max() < 1e-5
    assert torch.equal(stats.predicted, want[1])
    assert (stats.entropy - want[0]).abs().max() < 1e-5
    assert (stats.target_distance - want[3]).div(want[3]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_norms_five_decades_apart_predict_the_nearest(backend):
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator), dim=1)
    w = w * torch.logspace(0, 5, 300).unsqueeze(1)
    x, target = 0.14 * torch.randn(16, 64, generator=generator), torch.randint(300, (16,), generator=generator)
    _, stats = linear_harmonic_loss(x, w, target, n=2.0, return_stats=True, backend=backend)
    assert torch.equal(stats.predicted, ht_reference.squared_distances(x, w).argmin(1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cross_entropy_of_logits_of_1e10(backend):
    """Finite as F.cross_entropy is, also where fp32 rounds the best class's own log-score by hundreds."""
    generator = torch.Generator().manual_seed(0)
    x, w = 1e5 * torch.randn(40, 16, generator=generator), 1e5 * torch.randn(70, 16, generator=generator)
    target = torch.randint(70, (40,), generator=generator)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = linear_cross_entropy(x, w, target, reduction="none", backend=backend)
    (loss * torch.linspace(-1, 2, 40)).sum().backward()
    want = ht_reference.linear_cross_entropy(x, w, target, reduction="none").detach()
    logits = (x.double() @ w.double().t()).abs().max().item()
    assert logits > 1e11
    assert (loss - want).abs().max() < 4 * torch.finfo(torch.float32).eps * logits
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_harmonic_loss])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_class_and_an_x_that_is_not_finite(backend, function, value):
    x = torch.tensor([[value, 1.0], [0.5, 1.0]])
    loss = function(x, torch.ones(1, 2), torch.tensor([0, 0]), reduction="none", backend=backend)
    assert loss[0].isnan()
    assert loss[1] == 0
