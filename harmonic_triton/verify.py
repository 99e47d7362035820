"""``python -m harmonic_triton verify``: every backend that serves here against the fp64 reference, as a table.

The truth is computed in fp64 by direct differences from the *same rounded inputs*. Errors are relative: the largest over
tokens for the loss, the largest over rows of ||out - truth||/||truth|| for dX and dW, |out - truth| over the sum of the
tokens' absolute contributions for dn. The upstream gradient varies from token to token.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LOSS_LEVELS = (1.0, 1e-3, 1e-10, 1e-20)
LOSS_BOUND = 1e-5
GRADIENT_BOUND = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 8e-3}
REFERENCE_ENTRIES = 2**25  # N x V entries of the fp64 reference that are held at a time


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    backend: str
    reduction: str
    dtype: torch.dtype
    shape: tuple[int, int, int]  # N, D, V
    n: float | None
    inputs: str  # "far", "loss 1e-10", "wrong 0.1"

    @property
    def exponent(self) -> float:
        """The harmonic exponent in use."""
        return torch.tensor(math.sqrt(self.shape[1]) if self.n is None else self.n).item()  # as fp32 holds it

    @property
    def growth(self) -> float:
        """Bounds grow as n/28 beyond n = 28: a relative error of a distance counts n times in its power."""
        return max(1.0, self.exponent / 28)


@dataclass(frozen=True)
class Outcome:
    """Measured errors, and the loss they belong to."""

    loss: float
    errors: dict[str, float]
    bounds: dict[str, float]
    seconds: float

    @property
    def passed(self) -> bool:
        """Every error is within its bound (NaN is not)."""
        return all(self.errors[name] <= self.bounds[name] for name in self.errors)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, target, upstream) on the device; a ninth of the tokens is ignored."""
    tokens, width, classes = case.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=generator)
    w = (0.02 * normal(classes, width)).to(device, case.dtype)
    target = torch.randint(classes, (tokens,), generator=generator).to(device)
    kind, _, level = case.inputs.partition(" ")
    noise = normal(tokens, width).to(device)
    if kind == "far":
        x = noise
    else:
        away = kind == "wrong"
        centre = w[(target + away) % classes].float()
        direction = torch.nn.functional.normalize(noise, dim=1)
        if away:  # this far from another class vector, in units of its norm
            distance = float(level) * centre.norm(dim=1, keepdim=True)
        else:
            distance = distance_for_loss(float(level), centre, direction, w.float(), target, case.exponent)
        x = centre + distance * direction
    upstream = (0.25 + torch.rand(tokens, generator=generator)).to(device)
    target[::9] = -100
    return x.to(case.dtype), w, target, upstream


def distance_for_loss(level: float, centre: Tensor, direction: Tensor, w: Tensor, target: Tensor, n: float) -> Tensor:
    """How far along ``direction`` (N, D) from its class vector an x has this loss: (N, 1), by bisection."""
    apart = torch.cdist(centre, w).double().square().scatter_(1, target.unsqueeze(1), math.inf)
    along = (direction @ w.t() - (direction * centre).sum(1, keepdim=True)).double()
    low, high = torch.full_like(apart[:, :1], -40.0), torch.full_like(apart[:, :1], 10.0)  # of log distance
    for _ in range(40):
        middle = (low + high) / 2
        t = middle.exp()
        others = (apart + t * (t - 2 * along)).clamp_min(1e-30)
        score = torch.logsumexp(n * (middle - 0.5 * others.log()), 1, keepdim=True)
        above = torch.nn.functional.softplus(score, threshold=700.0) > level
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low.exp().float()


def truth(x: Tensor, w: Tensor, target: Tensor, n: float, g: Tensor) -> tuple[Tensor, ...]:
    """(losses, dX, dW, dn) in fp64, a few rows at a time, and the sum of the absolute values that dn is the sum of."""
    from harmonic_triton import reference

    n_value = torch.tensor(n, dtype=torch.float64, device=x.device, requires_grad=True)
    w = w.double().requires_grad_()
    losses, dx, dw, dn, dn_size = [], [], torch.zeros_like(w), torch.zeros_like(n_value), torch.zeros_like(n_value)
    for rows in torch.arange(len(x)).split(max(1, REFERENCE_ENTRIES // len(w))):
        part = x[rows].double().requires_grad_()
        loss = reference.linear_harmonic_loss(part, w, target[rows], n=n_value, reduction="none")
        if loss.requires_grad:  # else every token here is ignored
            part_dx, part_dw, part_dn = torch.autograd.grad(loss, (part, w, n_value), g[rows].double())
            dw, dn = dw + part_dw, dn + part_dn
        losses.append(loss.detach())
        dx.append(part_dx if loss.requires_grad else torch.zeros_like(part))
        entropy = reference.statistics(part.detach(), w.detach(), target[rows], n_value.detach(), 0.0, -100)[0]
        dn_size = dn_size + (g[rows] * (loss.detach() - entropy)).abs().sum() / n
    return torch.cat(losses), torch.cat(dx), dw.detach(), dn.detach(), dn_size


def row_error(out: Tensor, ref: Tensor, dtype: torch.dtype) -> float:
    """Largest ||out - ref||/||ref|| over the rows that the output's dtype can hold in its normal range."""
    norm = ref.norm(dim=1)
    info = torch.finfo(dtype)
    holds = norm > 8 * info.tiny * math.sqrt(ref.shape[1])
    if not bool(holds.any()):
        return math.nan
    return ((out.double() - ref).norm(dim=1)[holds] / norm[holds]).max().item()


@functools.lru_cache(maxsize=64)
def prepared(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and truth, shared by the backends (the case's backend is blank)."""
    x, w, target, g = make_inputs(case, device)
    if case.reduction == "sum":
        g = torch.full_like(g, 0.75)
    return (x, w, target, g), truth(x, w, target, case.exponent, g)


def run_case(case: Case, device: torch.device) -> Outcome:
    """One backend on one set of inputs."""
    from harmonic_triton import linear_harmonic_loss

    (x, w, target, g), (losses, dx, dw, dn, dn_size) = prepared(replace(case, backend=""), device)
    # A power of two brings the gradients into the middle of the dtype's range, as a gradient scaler would.
    typical = dx.norm(dim=1)[target >= 0].median().item()
    scale = 2.0 ** -round(math.log2(typical)) if typical > 0 else 1.0
    x, w = (tensor.detach().clone().requires_grad_() for tensor in (x, w))
    n = torch.tensor(case.exponent, device=device, requires_grad=True)
    start = time.perf_counter()
    out = linear_harmonic_loss(x, w, target, n=n, reduction=case.reduction, backend=case.backend)
    upstream = g * scale if case.reduction == "none" else out.new_tensor(0.75 * scale)
    grad_x, grad_w, grad_n = torch.autograd.grad(out, (x, w, n), upstream.to(out.dtype))
    seconds = time.perf_counter() - start
    kept = target >= 0
    got, wanted = out.detach().double(), losses
    if case.reduction == "none":
        got, wanted = got[kept], wanted[kept]
    else:
        got, wanted = got[None], wanted.sum()[None]
    errors = {
        "loss": torch.where(got == wanted, 0.0, (got - wanted).abs() / wanted).max().item(),
        "dX": row_error(grad_x, dx * scale, case.dtype),
        "dW": row_error(grad_w, dw * scale, case.dtype),
        "dn": abs(grad_n.item() - dn.item() * scale) / (dn_size.item() * scale),
    }
    gradient = GRADIENT_BOUND[case.dtype] * case.growth
    small = min(gradient, GRADIENT_BOUND[torch.float32] * case.growth)
    bounds = {"loss": min(LOSS_BOUND, gradient) * case.growth, "dX": gradient, "dW": gradient, "dn": small}
    if case.dtype == torch.float64:
        bounds["dn"] = 1e-6  # n itself is fp32
        bounds["loss"] = 1e-6
    return Outcome(losses[kept].mean().item(), errors, bounds, seconds)


def cases(
    device: torch.device,
    backends: list[str],
    shapes: list[tuple[int, int, int]] | None,
    dtypes: list[torch.dtype] | None,
) -> Iterator[Case]:
    """The grid: every backend and dtype over confidence, plus small and large exponents."""
    from harmonic_triton._dispatch import unsupported_reasons

    small = device.type == "cpu"
    inputs = ("far", *(f"loss {level:g}" for level in LOSS_LEVELS), "wrong 0.3", "wrong 0.03")
    exponents = ((2.0, "far"), (2.0, "loss 0.1"), (256.0, "far"), (256.0, "loss 1e-10"))
    for dtype in dtypes or (torch.float32, torch.bfloat16, torch.float16):
        for backend in backends:
            if unsupported_reasons(backend, device, dtype):
                continue
            first, *more = shapes or ([(24, 136, 250)] if small else [(512, 768, 50257), (1000, 1000, 12345)])
            if small and not shapes and backend != "triton":
                first, more = (32, 768, 1500), [(4, 768, 50257)]
            yield from (Case(backend, "none", dtype, first, None, kind) for kind in inputs)
            yield from (Case(backend, "sum", dtype, first, None, kind) for kind in inputs[::2])
            yield from (Case(backend, "none", dtype, first, n, kind) for n, kind in exponents)
            yield from (
                Case(backend, "none", dtype, shape, None, kind) for shape in more for kind in ("far", "loss 1e-10")
            )


def parse_shape(text: str) -> tuple[int, int, int]:
    """NxDxV."""
    try:
        tokens, width, classes = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxDxV, for example 8192x768x50257") from None
    if min(tokens, width, classes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: N, D and V must be positive")
    return tokens, width, classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--backend", action="append", choices=("reference", "torch", "triton"), help="only this one")
    parser.add_argument("--shape", action="append", type=parse_shape, metavar="NxDxV", help="in place of the defaults")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="in place of fp32, bf16 and fp16")
    parser.add_argument("--device", default=None, help="default: a GPU where there is one")


def main(options: argparse.Namespace) -> int:
    """Print the table; 1 if anything failed."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module="triton"
        )  # numpy on infinities that are meant
    from harmonic_triton.doctor import backend_lines, version_line

    print(version_line(device))
    print(*backend_lines(device), sep="\n")
    backends = options.backend or ["reference", "torch", "triton"]
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    print(f"\n{'backend':9} {'reduction':9} {'dtype':8} {'N x D x V':>18} {'n':>6} {'inputs':10} {'loss':>8}"
          f"  {'error of loss':>17}  {'dX':>17}  {'dW':>17}  {'dn':>17}")  # fmt: skip
    failed = total = 0
    for case in cases(device, backends, options.shape, dtypes):
        outcome = run_case(case, device)
        cells = "  ".join(f"{outcome.errors[k]:8.1e}/{outcome.bounds[k]:8.1e}" for k in ("loss", "dX", "dW", "dn"))
        shape = " x ".join(map(str, case.shape))
        total += 1
        failed += not outcome.passed
        print(f"{case.backend:9} {case.reduction:9} {str(case.dtype)[6:]:8} {shape:>18} {case.exponent:6.1f}"
              f" {case.inputs:10} {outcome.loss:8.1e}  {cells}{'' if outcome.passed else '  FAILED'}", flush=True)  # fmt: skip
    print(f"\n{total - failed} of {total} lines within their bounds (error/bound).")
    if not total:
        print("No backend serves here; see the reasons above.", file=sys.stderr)
    return 1 if failed or not total else 0
