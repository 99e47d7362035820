"""Every backend against the fp64 reference, on inputs that hypothesis draws and on a grid of ugly ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle

from harmonic_triton import linear_harmonic_loss

PLACES = ("far", "near", "very near", "on target", "on another", "near another", "duplicates", "identical pair")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(tokens, width, classes, dtype, place, scale=1.0, seed=0):
    """x, w, target, upstream; a token in seven is ignored, the upstream gradient differs in size and sign."""
    generator = torch.Generator().manual_seed(seed)
    w = (scale * torch.randn(classes, width, generator=generator)).to(dtype)
    target = torch.randint(classes, (tokens,), generator=generator)
    noise = torch.randn(tokens, width, generator=generator)
    if place in ("duplicates", "identical pair") and classes > 1:
        w[1::2] = w[: len(w) // 2 * 2 : 2].clone()[: len(w[1::2])]
    centre, size = w[target].float(), scale
    if place == "far":
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
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = linear_harmonic_loss(x, w, target, reduction="none", backend=backend, **options)
    loss.backward(g.to(loss.dtype))
    return loss.detach(), x.grad, w.grad


def compare(x, w, target, g, backend, **options):
    """Assert loss, dX and dW within their derived bounds; with 16-bit outputs the gradients are first scaled into range."""
    if x.element_size() == 2:
        biggest = max(
            tensor.abs().max().item() for tensor in run(x.float(), w.float(), target, g, "torch", **options)[1:]
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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_triton_grid(place, dtype):
    compare(*inputs(37, 67, 83, DTYPES[dtype], place), "triton", n=28.0)


# Three and more class vectors at one place: beyond the target and the rival they go through the products, and their
# errors grow as 1/distance^2. At a tenth of their norm that is still fp32's accuracy, and everywhere it stays finite.
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
