"""Log-probabilities, top-k and HarMax: accuracy where the model is sure, scratch memory, transforms."""

import math

import pytest
import torch
from torch import Tensor

import harmonic_triton as ht
from benchmarks import memory
from harmonic_triton import functional


def make(
    tokens: int = 7, width: int = 16, classes: int = 33, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, width, generator=generator).to(dtype) for rows in (tokens, classes))


def exact_log_p(x: Tensor, w: Tensor, n: float) -> Tensor:
    """By direct fp64 differences; the nearest class by the sum over the others, which keeps 1 - p."""
    z = -n * (x.double().unsqueeze(1) - w.double()).norm(dim=2).log()
    nearest = z.argmax(1, keepdim=True)
    z = z - z.gather(1, nearest)
    rest = z.scatter(1, nearest, -math.inf).exp().sum(1, keepdim=True)
    return z - rest.log1p()


# Distance from the class vector in units of its norm, from unsure to sure: -log p from about 1 down to 1e-20.
@pytest.mark.parametrize(("n", "away"), [(2.0, 1.0), (2.0, 1e-1), (2.0, 1e-3), (6.0, 1e-3), (28.0, 0.2)])
def test_sure_predictions_keep_their_digits(n, away):
    x, w = make()
    target = torch.arange(len(x))
    x = w[target] + away * x
    wanted = exact_log_p(x, w, n)
    log_p, (top, indices) = ht.harmonic_logits(x, w, n=n), ht.harmonic_topk(x, w, 3, n=n)
    # fp32's eps times n/2 times kappa < 100; -log p of a sure prediction is as relative as the others
    torch.testing.assert_close(log_p.double(), wanted, rtol=n * 3e-6, atol=0)
    torch.testing.assert_close(top.double(), wanted.gather(1, indices), rtol=n * 3e-6, atol=0)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_two_derivatives_also_where_sure_and_where_alone(classes):
    x, w = make(3, 4, classes, torch.float64)
    x[0] = w[0] + 1e-2 * x[0]
    n = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = (x.requires_grad_(), w.requires_grad_(), n)
    function = lambda a, b, n: ht.harmonic_logits(a, b, n=n).square().sum(1)
    if classes > 1:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)
        return
    first = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), inputs)
    assert torch.equal(ht.harmonic_logits(x, w, n=n), torch.zeros(3, 1, dtype=torch.float64))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in (*first, *second))
    assert [t.tolist() for t in ht.harmonic_topk(x, w, 1)] == [[[0.0]] * 3, [[0]] * 3]


def test_topk_in_chunks_is_topk_at_once(monkeypatch):
    x, w = make()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        at_once = ht.harmonic_topk(x.to(dtype), w.to(dtype), 4)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "TOPK_CHUNK", 2 * len(w) * 4)
            chunked = ht.harmonic_topk(x.to(dtype), w.to(dtype), 4)
        torch.testing.assert_close(chunked[0], at_once[0])
        assert torch.equal(chunked[1], at_once[1])
    values, indices = ht.harmonic_topk(x[:0], w, 4)
    assert values.shape == indices.shape == (0, 4)


def test_topk_takes_no_more_than_128_mebibytes():
    x, w = make(16384, 8, 8192)  # N x V in fp32 is 512 MiB
    ht.harmonic_topk(x[:8], w, 5)
    try:
        scratch = memory.peak_beyond(lambda: ht.harmonic_topk(x, w, 5))
    except memory.NoMemoryFigureError as error:
        pytest.skip(str(error))
    assert scratch < 2**27


def test_topk_casts_as_the_logits_do_under_autocast():
    x, w = make()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ht.harmonic_topk(x, w, 3)
    outside = ht.harmonic_topk(x.bfloat16(), w.bfloat16(), 3)
    assert all(torch.equal(*pair) for pair in zip(inside, outside, strict=True))


def test_topk_under_vmap_and_compile():
    x, w = make(6)
    x = x.view(2, 3, -1)
    function = lambda a, n: ht.harmonic_topk(a, w, 4, n=n)
    n = torch.tensor([3.0, 5.0])
    wanted = [torch.stack(parts) for parts in zip(*map(function, x, n), strict=True)]
    got = torch.vmap(function)(x, n)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    values, indices = torch.compile(function, fullgraph=True, backend="aot_eager")(x[1], n[1])
    torch.testing.assert_close(values, wanted[0][1])
    assert torch.equal(indices, wanted[1][1])


@pytest.mark.parametrize("name", ["harmonic_logits", "log_harmax"])
def test_a_tensor_exponent_under_vmap_and_compile(name):
    """Its value is not read there; vmap over it is a loop."""
    x, w = make()
    function = (
        (lambda n: ht.harmonic_logits(x, w, n=n))
        if name == "harmonic_logits"
        else (lambda n: ht.log_harmax(x.abs(), n))
    )
    exponents = torch.tensor([2.0, 5.0, 9.0])
    wanted = torch.stack([function(n) for n in exponents])
    torch.testing.assert_close(torch.vmap(function)(exponents), wanted)
    slopes = torch.vmap(torch.func.grad(lambda n: function(n)[0, 0]))(exponents)
    looped = torch.stack([torch.func.grad(lambda n: function(n)[0, 0])(n) for n in exponents])
    torch.testing.assert_close(slopes, looped)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(exponents[1]), wanted[1])
