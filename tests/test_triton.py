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

_triton = pytest.importorskip("harmonic_triton._triton")
triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
exp2_minus_1 = pytest.importorskip("harmonic_triton._triton.tile").exp2_minus_1
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of NumPy in the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    rows = _triton.rows_forward(x, w, target, torch.tensor(6.0, device=DEVICE), None, 1e39, 0.0, -100, False, 0)
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
    x, w, target = (tensor[:4] for tensor in inputs(width=65))
    x, w, target = x.to(DTYPES[dtype]), w.to(DTYPES[dtype]), target % 4
    step = 2**25
    try:
        room = torch.empty(64 * step + 4, dtype=w.dtype, device=DEVICE)
    except RuntimeError:
        pytest.skip("no room for 2^31 entries")
    far = room.as_strided((4, 65), (1, step))
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


def test_a_large_budget_does_not_exceed_the_grid(monkeypatch):
    """The second axis of a CUDA grid ends at 65535: slices of classes are cut there as well."""
    assert _triton.GRID_LIMIT <= 65535
    want = call(*inputs())
    gradient = Recorded(_triton.backward.gradient_kernel)
    monkeypatch.setattr(_triton.backward, "gradient_kernel", gradient)
    monkeypatch.setattr(_triton, "GRID_LIMIT", 2)
    torch.testing.assert_close(call(*inputs(), memory_budget=2**30), want)
    assert len(gradient.grids) > 1
    assert max(tiles for _, tiles in gradient.grids) == 2


@pytest.mark.skipif(DEVICE != "cpu", reason="looks at launches of the interpreter, the kernels are compiled here")
@pytest.mark.parametrize("interpreted", [True, False])
def test_the_interpreter_decides_on_upcasts(interpreted, monkeypatch):
    """Not the device: the interpreter serves CUDA tensors as well, and rounds bf16 no better there."""
    forward = Recorded(_triton.forward.forward_kernel)
    monkeypatch.setattr(_triton.forward, "forward_kernel", forward)
    monkeypatch.setattr(_triton, "interpreted", lambda: interpreted)
    x, w, target = inputs()
    _triton.rows_forward(x, w, target, torch.tensor(6.0), None, 0.0, 0.0, -100, False, 0)
    assert [constants["UPCAST"] for constants in forward.constants] == [interpreted]


@triton.jit
def exp2_minus_1_kernel(value_ptr, out_ptr, BRIEF: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, exp2_minus_1(tl.load(value_ptr + at), BRIEF))


@pytest.mark.parametrize(("brief", "error"), [(False, 5e-7), (True, 5e-6)])
def test_exp2_minus_1_near_0(brief, error):
    value = torch.cat([-torch.logspace(-6, 0.5, 512), torch.logspace(-6, 0.5, 512)]).to(DEVICE)
    out = torch.empty_like(value)
    exp2_minus_1_kernel[(1,)](value, out, BRIEF=brief, SIZE=len(value))
    truth = torch.expm1(value.double() * math.log(2.0))
    assert ((out - truth) / truth).abs().max() < error
