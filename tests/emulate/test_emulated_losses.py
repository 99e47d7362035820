"""Both losses as compiled for sm_80 and sm_90, forward and backward, against the fp64 reference.

Lines of ``verify`` under its bounds, and the grid of ``test_oracle`` under those that ``oracle`` derives. Approximate
instructions are off by the most that NVIDIA documents: all up, all down, or at random. Shapes are multiples of no tile. A
device has its GPU's multiprocessors, so that the classes are cut into many shares, or one, which walks through all tiles.
"""

import dataclasses
import itertools
import math

import emulation
import pytest
import torch
from oracle import oracle
from test_oracle import DTYPES, PLACES, inputs

import harmonic_triton as ht
from harmonic_triton import reference
from harmonic_triton.fused import strategy as strategies
from harmonic_triton.tools import verify

SHORT = ("bf16", "fp16", "fp32")
ERRORS = ("up", "down", "random")
CPU = torch.device("cpu")
WAYS = [("bf16", "recompute"), ("bf16", "one pass"), ("fp16", "recompute"), ("fp32", "recompute")]  # dtype, strategy
SMOOTHING = {"recompute": 0.1, "one pass": 0.0}  # with it one pass is not taken
LINES = [  # reduction, n, inputs, loss, shape, multiprocessors
    ("none", None, "far", "harmonic", (37, 72, 301), 0), ("sum", None, "far", "harmonic", (37, 72, 301), 0),
    ("none", None, "loss 1e-10", "harmonic", (24, 128, 140), 1), ("sum", 2.0, "wrong 0.3", "harmonic", (24, 128, 140), 1),
    ("none", 256.0, "far", "harmonic", (37, 72, 301), 1), ("sum", None, "loss 1e-20", "harmonic", (24, 128, 140), 0),
    ("none", None, "wrong 0.03", "harmonic", (37, 72, 301), 0), ("sum", 256.0, "loss 1e-10", "harmonic", (37, 72, 301), 1),
    ("none", None, "far", "entropy", (24, 128, 140), 0), ("sum", None, "far", "entropy", (37, 72, 301), 1),
    ("none", None, "loss 1e-20", "entropy", (37, 72, 301), 1), ("sum", None, "wrong 20", "entropy", (24, 128, 140), 0),
    ("sum", None, "far", "harmonic", (141, 104, 523), 2), ("sum", None, "far", "entropy", (141, 104, 523), 2),
]  # fmt: skip
OPTIONS = {
    "eps": {"n": 7.0, "eps": 1e-3},
    "uniform mix": {"n": 7.0, "eps": 1e-3, "uniform_mix": 0.01},
    "class weights": {"n": 7.0, "class_weight": True},
    "smoothing": {"n": 7.0, "label_smoothing": 0.1},
    "smoothing, class weights": {"n": 7.0, "label_smoothing": 0.1, "class_weight": True},
    "n = 300": {"n": 300.0},
    "logits": {"n": None},
    "logits, smoothing": {"n": None, "label_smoothing": 0.1},
    "logits, smoothing, class weights": {"n": None, "label_smoothing": 0.1, "class_weight": True},
    "logits, bias": {"n": None, "bias": True},
    "logits, cap": {"n": None, "softcap": 9.0},
    "logits, bias, cap, smoothing": {"n": None, "bias": True, "softcap": 9.0, "label_smoothing": 0.1},
}
LAYOUTS = ("transposed", "unaligned", "budget")
_rounds = itertools.cycle(ERRORS)
rounds = lambda values: [
    pytest.param(value, error, id=f"{value}-{error}") for value, error in zip(values, _rounds, strict=False)
]


@pytest.mark.parametrize("errors", ERRORS)
@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line[3]}-{line[0]}-{line[2]}".replace(" ", "_"))
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_lines_of_verify(arch, dtype, line, errors, strategy):
    """Loss, dX, dW and dn; a line of reduction="none" knows one strategy alone."""
    reduction, n, kind, loss, shape, processors = line
    if reduction == "none" and strategy != "recompute":
        pytest.skip("upstream gradients that vary are not known in the forward pass")
    case = verify.Case("triton", reduction, verify.DTYPES[dtype], shape, n, kind, loss)
    with emulation.on_gpu(arch, processors=processors, worst_case=errors), strategies.force(strategy):
        outcome = verify.run_case(case, CPU)
    # Beside the bounds: lg2.approx is off by 2^-22 of a logarithm, and absolutely by as much where its argument is near 1. A
    # loss of A's logarithm, which is n/2 + 1 times that of s_j/s_c; dn is the sum of the scores' means over n.
    if loss == "harmonic":
        (_, _, target, g), (_, _, _, _, dn_size, _) = verify.prepared(dataclasses.replace(case, backend=""), CPU)
        outcome.bounds["loss"] += (1 + 2 / case.exponent) * abs(math.log(outcome.loss)) * 2.0**-22
        outcome.bounds["dn"] += 0.5 * math.log(2) * 2.0**-22 * (g[target >= 0].sum() / dn_size).item()
    assert outcome.passed, (outcome.errors, outcome.bounds)


def compare(x, w, target, n, strategy, layout=None, **options):
    """A sum's loss and gradients under the bounds of the oracle, with an upstream gradient of -0.75 times a power of two."""
    if options.get("class_weight") is True:
        options["class_weight"] = 0.1 + torch.rand(len(w), generator=torch.Generator().manual_seed(1))
    if options.get("bias") is True:
        options["bias"] = 3 * torch.randn(len(w), generator=torch.Generator().manual_seed(2))
    function = ht.linear_harmonic_loss if n is not None else ht.linear_cross_entropy
    given = {"n": n, **options} if n is not None else options
    bounds = lambda g: oracle(x, w, target, torch.full((len(x),), g), n=n, **options)
    upstream, truth = -0.75, bounds(-0.75)
    biggest = max(truth.dx.abs().max().item(), truth.dw.abs().max().item())
    if (
        x.element_size() == 2 and 1e-20 < biggest < 1e30
    ):  # gradients are brought into the dtype's range, as a scaler would
        upstream *= 2.0 ** -round(math.log2(biggest))
        truth = bounds(upstream)
    more = {}
    if layout == "transposed":
        w = w.t().contiguous().t()
    elif layout == "unaligned":
        x = torch.cat([x[:, :1], x], 1)[:, 1:]
        w = torch.cat([w, w[:, :3]], 1)[:, : w.shape[1]]
    elif layout == "budget":
        more["memory_budget"] = 20000
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    if "bias" in given:
        leaves.append(given["bias"].detach().requires_grad_())
        given = {**given, "bias": leaves[2]}
    with strategies.force(strategy):
        loss = function(*leaves[:2], target, reduction="sum", backend="triton", **given, **more)
        dx, dw, *db = torch.autograd.grad(loss, leaves, torch.tensor(upstream))
    assert (loss.double() - truth.loss.sum()).abs() <= truth.loss_bound.sum() + 1e-6 * truth.loss.abs().sum()
    truth.check_rows("dX", dx, truth.dx, truth.dx_bound)
    truth.check_rows("dW", dw, truth.dw, truth.dw_bound)
    if db:
        truth.check_rows("db", db[0].unsqueeze(1), truth.db.unsqueeze(1), truth.db_bound)


@pytest.mark.parametrize(("option", "errors"), rounds(OPTIONS))
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_options(arch, dtype, option, errors, strategy):
    with emulation.on_gpu(arch, worst_case=errors):
        compare(*inputs(37, 72, 301, DTYPES[dtype], "near")[:3], strategy=strategy, **OPTIONS[option])


@pytest.mark.parametrize(("place", "errors"), rounds(PLACES))
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_places(arch, dtype, place, errors, strategy):
    with emulation.on_gpu(arch, processors=1, worst_case=errors):
        compare(*inputs(70, 67, 211, DTYPES[dtype], place)[:3], 28.0, strategy)


@pytest.mark.parametrize(("layout", "errors"), rounds(LAYOUTS))
@pytest.mark.parametrize("n", [7.0, None], ids=["distances", "logits"])
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_layouts(arch, dtype, n, layout, errors, strategy):
    """A transposed W, rows that are not aligned, a budget that takes the work apart."""
    with emulation.on_gpu(arch, processors=3, worst_case=errors):
        compare(*inputs(150, 80, 301, DTYPES[dtype], "near")[:3], n, strategy, layout)


@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_z_loss(arch, dtype, strategy):
    """Under verify's bounds, against the reference's own autograd."""
    x, w, target, _ = inputs(37, 72, 301, DTYPES[dtype], "near", scale=0.3)
    truth = x.double().requires_grad_(), w.double().requires_grad_()
    options = {"z_loss": 0.03, "label_smoothing": SMOOTHING[strategy]}
    wanted = reference.linear_cross_entropy(*truth, target, **options)
    leaves = x.requires_grad_(), w.requires_grad_()
    with emulation.on_gpu(arch, worst_case="random"), strategies.force(strategy):
        got = ht.linear_cross_entropy(*leaves, target, backend="triton", **options)
        gradients = torch.autograd.grad(got, leaves, torch.tensor(-64.0))
    assert abs(got.item() / wanted.item() - 1) <= verify.LOSS_BOUND
    for gradient, exact in zip(
        gradients, torch.autograd.grad(wanted, truth, torch.tensor(-64.0).double()), strict=True
    ):
        assert (gradient.double() - exact).norm() <= verify.GRADIENT_BOUND[x.dtype] * exact.norm()


@pytest.mark.parametrize("n", [7.0, None], ids=["distances", "logits"])
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_statistics(arch, dtype, n):
    """Every statistic of every token, beside the reference's."""
    x, w, target, _ = inputs(37, 72, 301, DTYPES[dtype], "near", scale=0.3)
    options = {} if n is None else {"n": n}
    function = ht.linear_cross_entropy if n is None else ht.linear_harmonic_loss
    with emulation.on_gpu(arch, worst_case="random"):
        _, got = function(x, w, target, return_stats=True, backend="triton", **options)
    _, want = function(x.double(), w.double(), target, return_stats=True, backend="reference", **options)
    valid = target >= 0
    for one, other in zip(got, want, strict=True):
        if one.dtype.is_floating_point:  # a score is a sum of 301 terms of size one at most
            assert ((one.double() - other.double()).abs() <= 1e-4 * other.double().abs().clamp_min(1e-3))[valid].all()
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_rows_by_themselves(arch, dtype, strategy):
    """x on its class vector, no token that counts, one class, and a NaN that stays in its row."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 40, generator=generator).to(DTYPES[dtype]) for rows in (9, 70))
    target = torch.randint(70, (9,), generator=generator)
    with emulation.on_gpu(arch), strategies.force(strategy):
        for tokens, targets in ((w[target], target), (x, torch.full_like(target, -100))):
            leaf = tokens.clone().requires_grad_()
            loss = ht.linear_harmonic_loss(leaf, w, targets, reduction="sum", backend="triton")
            loss.backward(torch.tensor(3.0))
            assert loss == 0 and not leaf.grad.any()
        assert ht.linear_harmonic_loss(x, w[:1], torch.zeros_like(target), backend="triton") == 0
        x[5] = float("nan")
        rows = ht.linear_harmonic_loss(x, w, target, reduction="none", backend="triton")
    assert rows.isnan().tolist() == [row == 5 for row in range(9)]


@pytest.mark.parametrize("loss", ["harmonic", "entropy"])
@pytest.mark.parametrize(("dtype", "strategy"), WAYS)
@pytest.mark.parametrize("arch", emulation.ARCHITECTURES)
def test_the_same_bits_in_any_order(arch, dtype, loss, strategy):
    """Blocks, warps and the winner among several writers in random order: no race, the bits of any other order."""
    x, w, target, _ = inputs(21, 72, 140, DTYPES[dtype], "near", scale=0.3)
    options = {"n": torch.tensor(7.0, requires_grad=True)} if loss == "harmonic" else {}
    function = ht.linear_harmonic_loss if loss == "harmonic" else ht.linear_cross_entropy
    found = []
    for seed in (0, 1):
        with emulation.on_gpu(arch, processors=3, order="random", seed=seed), strategies.force(strategy):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_(), *options.values()
            value, stats = function(
                *leaves[:2], target, label_smoothing=SMOOTHING[strategy], return_stats=True, backend="triton", **options
            )
            gradients = torch.autograd.grad(value, leaves, torch.tensor(-0.3))
        found.append((value, *stats, *gradients))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
