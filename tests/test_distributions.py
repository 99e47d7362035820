"""Log-probabilities, top-k and HarMax: accuracy where the model is sure, scratch memory, transforms."""

import math

import pytest
import torch
from torch import Tensor

import harmonic_triton as ht
from harmonic_triton import functional
from harmonic_triton.tools import memory


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
            for room in (2 * len(w) * 4, 1):  # for two tokens, and for less than one
                patch.setattr(functional, "TOPK_CHUNK", room)
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


# --- eps, dtypes, strides, sizes at the edge -------------------------------------------------------------------------


@pytest.mark.parametrize("away", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("eps", [1e-4, 1.0, 100.0])
def test_eps_is_added_to_every_squared_distance(eps, away):
    x, w = make()
    x, n = w[: len(x)] + away * x, 6.0
    s = (x.double().unsqueeze(1) - w.double()).square().sum(2) + eps
    wanted = (-n / 2 * s.log()).log_softmax(1)
    got, (top, indices) = ht.harmonic_logits(x, w, n=n, eps=eps), ht.harmonic_topk(x, w, 33, n=n, eps=eps)
    # n/2 times fp32's eps times kappa, (16 + 16)/1e-4 at the nearest class, which is measured directly, and under 10 else
    torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(top.double(), wanted.gather(1, indices), rtol=2e-5, atol=1e-9)


SHAPES = {
    "transposed": lambda x, w: (x.t().contiguous().t(), w.t().contiguous().t()),
    "every other": lambda x, w: (x.repeat_interleave(2, 1)[:, ::2], w.repeat_interleave(2, 0)[::2]),
    "expanded": lambda x, w: (x[:1].expand(7, -1), w),
    "expanded classes": lambda x, w: (x, w[:1].expand(9, -1)),
    "leading": lambda x, w: (x[:6].view(3, 1, 2, 16).transpose(0, 2), w),
    "vector": lambda x, w: (x[0], w),
    "no tokens": lambda x, w: (x[:0].view(2, 0, 16), w),
    "one class": lambda x, w: (x, w[:1]),
    "one feature": lambda x, w: (x[:, :1], w[:, :1]),
    "offset": lambda x, w: (torch.cat([x.flatten()[:1], x.flatten()])[1:].view(7, 16), w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_and_sizes_change_nothing(shape, dtype):
    x, w = (value.clone() for value in SHAPES[shape](*make()))
    odd = SHAPES[shape](*(value.to(dtype) for value in make()))
    x, w = x.to(dtype).contiguous(), w.to(dtype).contiguous()
    out, classes = torch.float64 if dtype == torch.float64 else torch.float32, len(w)
    s = (x.double().unsqueeze(-2) - w.double()).square().sum(-1)
    wanted = (-3.0 * s.log()).log_softmax(-1)
    kappa = (x.double().square().sum(-1, keepdim=True) + w.double().square().sum(-1)) / s
    tolerance = 3.0 * torch.finfo(out).eps * max([1.0, *kappa.flatten().tolist()])
    log_p = ht.harmonic_logits(*odd, n=6.0)
    assert log_p.dtype == out and log_p.shape == (*x.shape[:-1], classes)
    torch.testing.assert_close(log_p.double(), wanted, rtol=tolerance, atol=tolerance)
    for k in (1, classes):
        values, indices = ht.harmonic_topk(*odd, k, n=6.0)
        assert values.dtype == out and indices.dtype == torch.int64
        assert values.shape == indices.shape == (*x.shape[:-1], k)
        torch.testing.assert_close(values.double(), wanted.gather(-1, indices), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(values.double(), wanted.topk(k).values, rtol=tolerance, atol=tolerance)
    assert torch.equal(indices.sort(-1).values, torch.arange(classes).expand_as(indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3.0, 300.0])
def test_harmax_of_16_bits_is_rounded_once(dtype, n):
    distances = (torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype).requires_grad_()
    for name in ("harmax", "log_harmax"):
        function = getattr(ht, name)
        for exponent in (n, torch.tensor(n), torch.tensor(n, dtype=torch.float64)):
            got = function(distances, exponent)
            assert got.dtype == dtype
            assert torch.equal(got, function(distances.float(), n).to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(distances, n), got)
    up = torch.linspace(0.2, 1.5, 200).view(5, 40).to(dtype)
    (grad,) = torch.autograd.grad(ht.log_harmax(distances, n), distances, up)
    exact = distances.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(ht.log_harmax(exact, n), exact, up.double())
    assert grad.dtype == dtype  # rounded once from fp32, where terms of size n |up| / d cancel
    assert ((grad.double() - wanted).norm() <= torch.finfo(dtype).eps * wanted.norm()).item()


def test_harmax_of_odd_shapes():
    d = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    wanted = ht.harmax(d.contiguous(), 3.0)
    assert torch.equal(ht.harmax(d.t().contiguous().t(), 3.0), wanted)
    assert torch.equal(ht.harmax(d.repeat_interleave(2, 1)[:, ::2], 3.0), wanted)
    torch.testing.assert_close(ht.harmax(d.t(), 3.0, dim=0), wanted.t())
    torch.testing.assert_close(ht.harmax(d.t(), 3.0, dim=-2), wanted.t())
    assert torch.equal(ht.harmax(d[:1, :1].expand(2, 4), 3.0), torch.full((2, 4), 0.25))
    for shape, dim in (((0, 6), 1), ((0, 6), 0), ((6, 0), 1), ((0,), 0)):
        assert ht.harmax(d.new_empty(shape), 3.0, dim).shape == shape
    for dim in (0, -1):
        assert torch.equal(ht.harmax(torch.tensor(2.0), 3.0, dim), torch.tensor(1.0))
    far = torch.tensor([1.0, math.inf, 1e-30, 2.0])
    assert ht.harmax(far, 2.0).tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["harmonic_logits", "harmonic_topk", "log_harmax"])
def test_a_bad_tensor_exponent_is_refused_under_vmap_and_compile(name):
    """A traced function holds the check too: NaN or nonsense without a word would be the alternative."""
    x, w = make()
    functions = {
        "harmonic_logits": lambda n: ht.harmonic_logits(x, w, n=n),
        "harmonic_topk": lambda n: ht.harmonic_topk(x, w, 3, n=n)[0],
        "log_harmax": lambda n: ht.log_harmax(x.abs(), n),
    }
    function = functions[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor(2.0))
    for run in (compiled, lambda n: torch.vmap(function)(n.view(1)), lambda n: torch.func.vjp(function, n)):
        with pytest.raises(ValueError, match="n must be a finite harmonic exponent > 0, got -2"):
            run(torch.tensor(-2.0))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 300.0])
def test_the_floor_of_the_nearest_distance(size):
    """On a class vector, and on two at once: 2^-46 (||x||^2 + ||w||^2) + 1e-36 stands for a squared distance of 0."""
    x, w = (value.double() for value in make())
    w[1] = 4.0 + size  # far from x; its own norm does not enter
    x, w[0] = size * w[:1] / w[0].norm(), size * w[0] / w[0].norm()
    floor = 2.0**-46 * (x.square().sum() + w[0].square().sum()) + 1e-36
    wanted = -1.5 * torch.log1p((x - w).square().sum(1) / floor)[None]
    x, w = x.float(), w.float()
    log_p, (top, indices) = ht.harmonic_logits(x, w, n=3.0), ht.harmonic_topk(x, w, 33, n=3.0)
    for got, exact in ((log_p, wanted), (top, wanted.gather(1, indices))):
        torch.testing.assert_close(got[exact < -1].double(), exact[exact < -1], rtol=1e-5, atol=0)
        assert (got[exact > -1] > -1e-6).all()
    w[7] = w[0]
    log_p, (top, indices) = ht.harmonic_logits(x, w, n=3.0), ht.harmonic_topk(x, w, 2, n=3.0)
    for both in (log_p[:, [0, 7]], top):
        torch.testing.assert_close(both, torch.full((1, 2), -math.log(2.0)), rtol=1e-5, atol=0)
    assert indices.sort().values.tolist() == [[0, 7]]


@pytest.mark.parametrize("classes", [150, 1000])
def test_unsure_predictions_among_many_classes(classes):
    """The sum over the others is many times the nearest's share: softplus is not yet its argument."""
    x, w = make(5, 16, classes)
    x = 4.0 * x
    wanted = exact_log_p(x, w, 0.5)
    log_p, (top, indices) = ht.harmonic_logits(x, w, n=0.5), ht.harmonic_topk(x, w, 3, n=0.5)
    torch.testing.assert_close(log_p.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(top.double(), wanted.gather(1, indices), rtol=1e-6, atol=0)


def test_gradients_of_sure_predictions_keep_their_digits():
    """log p of the nearest class is -sum_j (s_c/s_j)^(n/2) to first order, of 1e-12 here, and its gradient as small."""
    x, w = make()
    target = torch.arange(len(x))
    x, up = w[target] + 1e-2 * x, torch.linspace(0.3, 2.0, len(x))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [value.to(dtype).requires_grad_() for value in (x, w)]
        log_p = ht.harmonic_logits(*leaves, n=6.0)[target, target]
        found.append((log_p.detach(), *torch.autograd.grad(log_p, leaves, up.to(dtype))))
    assert found[1][0].abs().max() < 1e-9
    for got, wanted in zip(*found, strict=True):  # n/2 times fp32's eps times kappa < 10 of the others
        assert ((got.double() - wanted).norm() <= 2e-5 * wanted.norm()).item()


@pytest.mark.parametrize("name", ["harmonic_logits", "harmonic_topk"])
def test_products_are_in_full_fp32_whatever_the_setting(name, monkeypatch):
    x, w = make()
    found, addmm = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *a, **k: found.append(torch.get_float32_matmul_precision()) or addmm(*a, **k)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        ht.harmonic_logits(x, w) if name == "harmonic_logits" else ht.harmonic_topk(x, w, 3)
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_distance_of_zero_gives_no_gradient():
    d = torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, 2.0]], requires_grad=True)
    up = torch.tensor([[0.3, 0.7, 1.1], [0.2, 0.5, 0.9]])
    (grad,) = torch.autograd.grad(ht.harmax(d, 2.0), d, up)
    assert torch.equal(grad[0], torch.zeros(3)) and (grad[1] != 0).all()
