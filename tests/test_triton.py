"""What is the Triton backend's own: propagation of NaN, addresses beyond 2^31, limits of a launch.

Its numbers are checked with the other backends'; here the kernels run through the interpreter on small shapes.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import oracle

import harmonic_triton as ht
from harmonic_triton import reference
from harmonic_triton.fused import strategy as strategies
from harmonic_triton.fused.problem import Operands, Problem

_triton = pytest.importorskip("harmonic_triton.fused.triton.backend")
_launch = pytest.importorskip("harmonic_triton.fused.triton.launch")
tile_configs = pytest.importorskip("harmonic_triton.fused.triton.tile_configs")
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of NumPy in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def inputs(tokens: int = 6, width: int = 40, classes: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, w, target), several tiles of classes; the last one is nobody's target."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    w = 0.1 * torch.randn(classes, width, generator=generator)
    return x.to(DEVICE), w.to(DEVICE), torch.randint(classes - 1, (tokens,), generator=generator).to(DEVICE)


def call(x, w, target, g=None, **options):
    """(losses, dX, dW) under the upstream gradient g."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = ht.linear_harmonic_loss(x, w, target, reduction="none", backend="triton", **options)
    return loss.detach(), *torch.autograd.grad(loss, (x, w), torch.ones_like(loss) if g is None else g)


@pytest.mark.parametrize("which", ["one class", "expanded tokens", "overlapping tokens"])
@pytest.mark.parametrize("strategy", ["recompute", "one pass"])
def test_strides_that_no_descriptor_is_told_of(strategy, which):
    """A single row whose stride is 1, rows on top of each other: the numbers of a copy, to the bit."""
    x, w, target = (tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs(width=64))
    if which == "one class":
        w, target = w[:1].as_strided((1, 64), (1, 1)), torch.zeros_like(target)
    else:
        x = x[:1].expand(6, 64) if which == "expanded tokens" else x.as_strided((6, 64), (16, 1))
    found = []
    for operands in ((x, w), (x.contiguous(), w.clone(memory_format=torch.contiguous_format).reshape(len(w), 64))):
        aligned = [_launch._aligned(operand) for operand in operands]
        assert all(len(one) == 1 or one.stride(0) >= 64 for one in aligned)
        leaves = [operand.detach().requires_grad_() for operand in operands]
        with strategies.force(strategy):
            loss = ht.linear_harmonic_loss(*leaves, target, reduction="sum", backend="triton")
        found.append((loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, -0.3))))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e7])
@pytest.mark.parametrize("strategy", ["recompute", "one pass"])
def test_the_rival_leaves_no_noise_far_from_all_classes(strategy, scale):
    """Gaps of 1/scale, and few classes: what the rival adds to their sum and loses again must not multiply x."""
    generator = torch.Generator().manual_seed(3)
    w, x = (torch.randn(rows, 64, generator=generator).bfloat16().to(DEVICE) for rows in (3, 9))
    x, target = x * scale, torch.randint(3, (9,), generator=generator).to(DEVICE)
    leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    with strategies.force(strategy):
        loss = ht.linear_harmonic_loss(
            leaf, w.clone().requires_grad_(), target, n=8.0, reduction="sum", backend="triton"
        )
    (dx,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, -0.75 * scale))
    exact = reference.linear_harmonic_loss(truth, w.double(), target, n=8.0, reduction="sum")
    (wanted,) = torch.autograd.grad(exact, truth, torch.full_like(exact, -0.75 * scale))
    assert (
        (dx.double() - wanted).norm(dim=1) <= 2.0**-7 * wanted.norm(dim=1)
    ).all()  # A and dX are rounded by 2^-9 each


# Whole tiles and a last tile with a class that is nobody's target; a target that is bad itself.
@pytest.mark.parametrize("where", ["first", "last", "target"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
def test_a_bad_class_vector_shows_in_every_loss(value, where):
    """NaN, infinity, or a square beyond fp32: no token's loss is a number, however far it is from that class."""
    x, w, target = inputs()
    w[{"first": 0, "last": len(w) - 1, "target": int(target[2])}[where], 3] = value
    loss, dx, _ = call(x, w, target, label_smoothing=0.1 * (where == "first"))
    assert loss.isnan().all()
    assert dx.isnan().any(1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e19])
def test_a_bad_token_shows_in_its_own_row_alone(value):
    """The others keep their losses and dX; without upstream gradient it adds nothing to dW either."""
    x, w, target = inputs()
    g = torch.linspace(0.5, 1.0, len(x), device=DEVICE)
    g[1] = 0.0
    want = call(x, w, target, g)
    x[1, 3] = value
    loss, dx, dw = call(x, w, target, g)
    others = torch.arange(len(x), device=DEVICE) != 1
    assert loss[1].isnan()
    assert torch.equal(loss[others], want[0][others])
    torch.testing.assert_close((dx, dw), want[1:])
    loss, dx, _ = call(x, w, target)
    assert dx[1].isnan().any()
    assert dx[others].isfinite().all()


def test_everything_too_large_is_not_a_loss_of_zero():
    """Squared norms of 1e40."""
    x, w, target = inputs()
    assert call(x * 1e19, w * 1e20, target)[0].isnan().all()


def test_eps_beyond_fp32_is_not_a_loss_of_zero():
    """The operator itself; the function's own check may refuse such an eps before."""
    x, w, target = inputs()
    rows = _triton.forward(
        Operands(x, w, target, torch.tensor(6.0, device=DEVICE), None), Problem(1e39, 0.0, -100, False, "triton", 0)
    )
    assert rows.nll.isnan().all()


@pytest.mark.parametrize("n", [1e4, 1e10, 1e30])
def test_huge_exponents_stay_finite(n):
    """One class has it all: the loss is (n/2) log of a ratio of squared distances, or 0."""
    x, w, target = inputs(tokens=24)
    target[:3] = torch.cdist(x, w)[:3].argmin(1)
    loss, dx, dw = call(x, w, target, n=n)
    want = reference.linear_harmonic_loss(x, w, target, n=n, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-37)
    assert dx.isfinite().all()
    assert dw.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["w", "x"])
def test_operands_whose_features_are_far_apart(spread, dtype):
    """A transposed operand of more than 2^31 entries (here: an empty one, of which few pages are touched).

    Within the bounds of the truth and no closer: the library may take another kernel, with another order of sums, for
    another layout, and so may the compiler for another stride.
    """
    x, w, target = (tensor[:4] for tensor in inputs(width=80))
    x, w, target = x.to(DTYPES[dtype]), w.to(DTYPES[dtype]), target % 4
    step = 2**25
    try:
        room = torch.empty(79 * step + 4, dtype=w.dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("no room for 2^31 entries")
    far = room.as_strided((4, 80), (1, step))
    far.copy_(w if spread == "w" else x)
    g = torch.linspace(0.5, 1.5, 4)
    got = call(far if spread == "x" else x, far if spread == "w" else w, target, g, n=8.0)
    oracle(x, w, target, g, n=8.0).check(*got)


class Recorded:
    """Stands for a kernel; keeps the grids and the constants it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.grids, self.constants = kernel, [], []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.grids.append(grid)
            self.constants.append(constants)
            return self.kernel[grid](*args, **constants)

        return launch


# Widths around a multiple of 16, rows with a gap, single entries beside each other; one class, one feature, no token.
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("shape", "how"), [
    *((shape, "plain") for shape in ((6, 1, 9), (5, 17, 40), (6, 65, 70), (4, 40, 1), (3, 1, 1), (0, 7, 9), (1, 31, 2))),
    *((shape, how) for shape in ((5, 17, 40), (6, 64, 70)) for how in ("gap", "offset", "transposed")),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("strategy", ["recompute", "one pass"])
def test_rows_that_are_not_aligned(strategy, shape, how, dtype):
    """The loss of operands padded by hand, to the bit; gradients in the shapes and within the rounding of the operands.

    Through another library product they may be summed in another order: a few roundings in fp32 beside the last one.
    """
    tokens, width, classes = shape
    x, w, target = (tensor.to(dtype) if tensor.is_floating_point() else tensor
                    for tensor in inputs(tokens, width, max(classes, 2)))  # fmt: skip
    w, target, n = w[:classes], target.clamp_max(classes - 1), torch.tensor(3.3, device=DEVICE)

    def under(tensor):
        if how == "transposed":
            return tensor.t().contiguous().t()
        if how == "plain":
            return tensor
        room = torch.full((len(tensor), width + 3), 77.0, dtype=dtype, device=DEVICE)
        room[:, 1 : 1 + width] = tensor
        return (
            room[:, 1 : 1 + width]
            if how == "gap"
            else room.flatten()[1 : 1 + tensor.numel()].view_as(tensor).copy_(tensor)
        )

    results = []
    for change in (under, lambda tensor: torch.nn.functional.pad(tensor, (0, -width % 16))):
        leaves = [change(tensor).detach().requires_grad_() for tensor in (x, w)]
        with strategies.force(strategy):
            loss = ht.linear_harmonic_loss(*leaves, target, n=n, reduction="sum", backend="triton")
            token_losses = ht.linear_harmonic_loss(*leaves, target, n=n, reduction="none", backend="triton")
        dx, dw = torch.autograd.grad(0.7 * loss, leaves)
        assert [dx.shape, dw.shape] == [leaf.shape for leaf in leaves]
        results.append((token_losses.detach(), dx[:, :width].double(), dw[:, :width].double()))
    (losses, *gradients), (wanted, *expected) = results
    assert torch.equal(losses, wanted)
    for got, value in zip(gradients, expected, strict=True):
        assert (got - value).norm() <= (ROUNDING[dtype] + 32 * 2.0**-24) * value.norm()
    truth = reference.linear_harmonic_loss(x, w, target, n=n, reduction="none")
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)


def launched(monkeypatch, run):
    """(kernel, argument, value) of every launch in ``run``."""
    seen = []

    def recorded(kernel):
        class Kernel:
            def __getitem__(self, grid):
                def launch(*args, **constants):
                    seen.extend((kernel.__name__, name, value)
                                for name, value in zip(kernel.arg_names, args, strict=False))  # fmt: skip
                    return kernel[grid](*args, **constants)

                return launch

        return Kernel()

    with monkeypatch.context() as patch:
        for module in (_launch.scores_kernels, _triton.forward_kernels, _triton.backward_kernels):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, recorded(getattr(module, name)))
        run()
    return seen


# Odd numbers of tokens, features and classes, over several chunks of tokens or slices of classes.
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("harmonic", [True, False])
@pytest.mark.parametrize("strategy", ["recompute", "one pass"])
def test_every_launch_is_aligned(strategy, harmonic, dtype, monkeypatch):
    """Every pointer on 16 bytes, features and strides in multiples of 16: what static_cost compiles, and nothing else."""
    x, w, target = inputs(101, 37, 203)
    x, w = (torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor).to(dtype) for tensor in (x, w))
    leaves = x.requires_grad_(), w.requires_grad_()
    room = torch.linspace(2.0, 4.0, 5, device=DEVICE, requires_grad=True)
    budget = {"recompute": 101 * 4 * 80, "one pass": 203 * 3 * 70}[strategy]

    def run():
        options = {"backend": "triton", "label_smoothing": 0.1 * (strategy == "recompute"), "memory_budget": budget,
                   "reduction": "sum" if strategy == "one pass" else "none"}  # fmt: skip
        with strategies.force(strategy):
            if harmonic:
                loss = ht.linear_harmonic_loss(*leaves, target, n=room[3], **options)
            else:
                loss = ht.linear_cross_entropy(*leaves, target, **options)
            loss.backward(torch.linspace(0.3, 1.2, 102, device=DEVICE)[1:] if loss.dim() else None)

    seen = launched(monkeypatch, run)
    kernels = [kernel for kernel, name, _ in seen if name == "x_ptr"]
    assert max(map(kernels.count, kernels)) > 1
    for kernel, name, value in seen:
        if isinstance(value, torch.Tensor):
            assert value.data_ptr() % 16 == 0, (kernel, name)
        elif name.startswith("stride"):
            assert value % 16 == 0 or (name in ("stride_xd", "stride_wd") and value == 1), (kernel, name, value)
        elif name == "D" and kernel not in (
            "finish_x_kernel",
            "finish_w_kernel",
            "operand_kernel",
        ):  # as gradients are
            assert value % 16 == 0, (kernel, name, value)


@pytest.mark.parametrize("block_v", [8, 16, 32, 128, 256])
@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
def test_tiles_of_any_width_compute_the_same(strategy, block_v, monkeypatch):
    """In one part, two, four or eight, which is with sums of scores; the nearest of 8 to 32 groups of classes."""
    x, w, target = inputs(classes=300)
    x, w, target = x.bfloat16(), w.bfloat16(), target % 300
    n = torch.tensor(8.0, device=DEVICE)
    want = oracle(x, w, target, torch.ones(6) / 6, n=8.0)
    exact = n.double().requires_grad_()
    mean = ht.linear_harmonic_loss(x.double(), w.double(), target, n=exact, backend="reference")
    (wanted_n,) = torch.autograd.grad(mean, exact)
    config = tile_configs.TileConfig(32, block_v, 64, 4, 1)
    monkeypatch.setattr(_launch, "tile_config", lambda *_: config)
    leaves = x.requires_grad_(), w.requires_grad_(), n.requires_grad_()
    with strategies.force(strategy):
        loss = ht.linear_harmonic_loss(x, w, target, n=n, backend="triton")
    dx, dw, dn = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(loss.detach().double(), want.loss.mean(), rtol=1e-6, atol=0.0)
    want.check(want.loss, dx, dw)
    assert abs(dn.double() / wanted_n - 1) < 1e-5


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at launches of the interpreter, the kernels are compiled here")
@pytest.mark.parametrize("interpreted", [True, False])
def test_the_interpreter_decides_on_upcasts(interpreted, monkeypatch):
    """Not the device: the interpreter serves CUDA tensors as well, and rounds bf16 no better there."""
    scores = Recorded(_launch.scores_kernels.scores_kernel)
    monkeypatch.setattr(_launch.scores_kernels, "scores_kernel", scores)
    monkeypatch.setattr(_launch, "interpreted", lambda: interpreted)
    x, w, target = inputs()
    _triton.forward(Operands(x, w, target, torch.tensor(6.0), None), Problem(0.0, 0.0, -100, False, "triton", 0))
    assert [constants["UPCAST"] for constants in scores.constants] == [interpreted] * 2
