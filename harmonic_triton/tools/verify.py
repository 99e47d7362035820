"""``python -m harmonic_triton verify``: every backend that serves here against the fp64 reference, as a table.

The truth is computed in fp64 by direct differences from the *same rounded inputs*. Errors are relative: the largest over
tokens for the loss, the largest over rows of ||out - truth||/||truth|| for dX and dW, that of the whole for db, |out - truth|
over the sum of the tokens' absolute contributions for dn. The upstream gradient varies from token to token.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from harmonic_triton.fused.options import BackendName, Reduction

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LOSS_LEVELS = (1.0, 1e-3, 1e-10, 1e-20)
LOSS_BOUND = 1e-5
GRADIENT_BOUND = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 8e-3}
REFERENCE_ENTRIES = 2**25  # N x V entries of the fp64 truth that are held at a time
DENSE_WORK = 2**32  # N x V x D up to which the dense reference is tried: its backward holds all differences
SOFTCAP = 50.0  # beside logits of up to 80
TRUTH_WORK = 2**36  # N x V x D differences in fp64 that one line is worth: a second on a GPU


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    backend: str
    reduction: Reduction
    dtype: torch.dtype
    shape: tuple[int, int, int]  # N, D, V
    n: float | None
    inputs: str  # "far", "loss 1e-10", "wrong 0.1"
    loss: str = "harmonic"  # or "entropy": cross-entropy; "capped": with a bias and a soft cap

    @property
    def exponent(self) -> float:
        """The harmonic exponent in use."""
        return torch.tensor(math.sqrt(self.shape[1]) if self.n is None else self.n).item()  # as fp32 holds it

    def logits(self, device: torch.device) -> dict[str, Any]:
        """The options of cross-entropy."""
        if self.loss != "capped":
            return {}
        return {"bias": torch.linspace(-1, 1, self.shape[2], device=device), "softcap": SOFTCAP}

    @property
    def growth(self) -> float:
        """Bounds grow as n/28 beyond n = 28: a relative error of a distance counts n times in its power."""
        return max(1.0, self.exponent / 28) if self.loss == "harmonic" else 1.0


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


def probes(case: Case) -> Tensor:
    """The tokens whose truth is computed, spread evenly: all of them, or as many as TRUTH_WORK allows."""
    tokens, width, classes = case.shape
    return torch.arange(0, tokens, math.ceil(tokens / max(1, TRUTH_WORK // (width * classes))))


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w, target, upstream) on the device; a ninth of the probes is ignored, tokens beside them have upstream 0."""
    tokens, width, classes = case.shape
    generator = torch.Generator(device).manual_seed(seed)
    normal: Callable[..., Tensor] = lambda *size: torch.randn(*size, generator=generator, device=device)
    w = normal(classes, width).mul_(0.02).to(case.dtype)
    target = torch.randint(classes, (tokens,), generator=generator, device=device)
    at = probes(case).to(device)
    kind, _, level = case.inputs.partition(" ")
    x = normal(tokens, width)
    if case.loss != "harmonic" and kind != "far":  # w_c, or a wrong class, has the largest logit by far
        along = torch.nn.functional.normalize(w[(target + (kind == "wrong")) % classes].float(), dim=1)
        if kind == "wrong":
            x = float(level) * along / 0.02 / math.sqrt(width)
        else:
            length = length_for_loss(float(level), along[at], w.float(), target[at])
            x = along * length.median().repeat(tokens, 1).index_copy_(0, at, length)
    elif kind != "far":
        away = kind == "wrong"
        center = w[(target + away) % classes].float()
        direction = torch.nn.functional.normalize(x, dim=1)
        if away:  # this far from another class vector, in units of its norm
            distance = float(level) * center.norm(dim=1, keepdim=True)
        else:
            near = distance_for_loss(float(level), center[at], direction[at], w.float(), target[at], case.exponent)
            distance = near.median().repeat(tokens, 1).index_copy_(0, at, near)
        x = center + distance * direction
    varying = 0.25 + torch.rand(tokens, generator=generator, device=device)
    upstream = torch.zeros_like(varying).index_copy_(0, at, varying[at])
    target[at[::9]] = -100
    return x.to(case.dtype), w, target, upstream


def distance_for_loss(level: float, center: Tensor, direction: Tensor, w: Tensor, target: Tensor, n: float) -> Tensor:
    """How far along ``direction`` (N, D) from its class vector an x has this loss: (N, 1), by bisection."""
    apart = torch.cdist(center, w).double().square().scatter_(1, target.unsqueeze(1), math.inf)
    along = (direction @ w.t() - (direction * center).sum(1, keepdim=True)).double()
    low, high = torch.full_like(apart[:, :1], -40.0), torch.full_like(apart[:, :1], 10.0)  # of log distance
    for _ in range(40):
        middle = (low + high) / 2
        t = middle.exp()
        others = (apart + t * (t - 2 * along)).clamp_min(1e-30)
        score = torch.logsumexp(n * (middle - 0.5 * others.log()), 1, keepdim=True)
        above = torch.nn.functional.softplus(score, threshold=700.0) > level
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low.exp().float()


def length_for_loss(level: float, direction: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """How long an x along ``direction`` (N, D) has this cross-entropy: (N, 1), by bisection."""
    logits = (direction @ w.t()).double()
    target_logit = logits.gather(1, target.unsqueeze(1))
    others = logits.scatter(1, target.unsqueeze(1), -math.inf)
    low, high = torch.zeros_like(target_logit), 1e3 / target_logit
    for _ in range(40):
        middle = (low + high) / 2
        score = torch.logsumexp(middle * others, 1, keepdim=True) - middle * target_logit
        above = torch.nn.functional.softplus(score, threshold=700.0) > level
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return high.float()


def truth(
    x: Tensor, w: Tensor, target: Tensor, n: float | None, g: Tensor, bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(losses, dX, dW, dn, db) in fp64, a few rows at a time, and the sum of the absolute values that dn is the sum of.

    ``n=None`` is cross-entropy, which has no dn (0), and alone a db.

    Rows without upstream gradient are left out: their losses are 0 here.
    The reference's distances and losses, and their derivative written out (A = -n G/s, as in the fused backends, but
    nothing kept out of the products): neither N x V x D differences nor a second product's worth of autograd.
    """
    from harmonic_triton import reference

    w = w.double()
    losses, dx = w.new_zeros(len(x)), torch.zeros_like(x, dtype=torch.float64)
    dw, dn, dn_size, db = torch.zeros_like(w), w.new_zeros(()), w.new_zeros(()), w.new_zeros(len(w))
    for rows in ((target >= 0) & (g != 0)).nonzero().squeeze(1).split(max(1, REFERENCE_ENTRIES // len(w))):
        part, index, grad = x[rows].double(), target[rows].unsqueeze(1), g[rows].double()
        if n is None:
            z, _ = reference.relative_logits(part, w, target[rows], bias, softcap)
        else:
            z, s_c = reference.log_scores(part, w, target[rows], n)
        losses[rows] = loss = reference.negative_log_likelihood(z, target[rows])
        p = (z - loss.unsqueeze(1)).exp_().scatter_(1, index, 0.0)  # of the classes beside the target
        if n is None:
            slope = p.scatter_(1, index, -p.sum(1, keepdim=True)).mul_(grad.unsqueeze(1))
            if softcap is not None:
                slope *= torch.cosh((part @ w.t() + (0.0 if bias is None else bias)) / softcap) ** -2
            dx[rows] = slope @ w
            dw += slope.t() @ part
            db += slope.sum(0)
            continue
        terms = (p * z).sum(1) * grad / n
        dn, dn_size = dn + terms.sum(), dn_size + terms.abs().sum()
        slope = p.scatter_(1, index, -p.sum(1, keepdim=True)).mul_((-n * grad / s_c).unsqueeze(1))
        a = slope.mul_(z.mul_(2 / n).exp_())
        dx[rows] = a.sum(1, keepdim=True) * part - a @ w
        dw += a.sum(0).unsqueeze(1) * w - a.t() @ part
    return losses, dx, dw, dn, dn_size, db


def row_error(out: Tensor, ref: Tensor, dtype: torch.dtype) -> float:
    """Largest ||out - ref||/||ref|| over the rows that the output's dtype can hold in its normal range."""
    norm = ref.norm(dim=1)
    info = torch.finfo(dtype)
    holds = norm > 8 * info.tiny * math.sqrt(ref.shape[1])
    if not bool(holds.any()):
        return math.nan
    return float(((out.double() - ref).norm(dim=1)[holds] / norm[holds]).max())


@functools.lru_cache(maxsize=1)
def prepared(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and truth, shared by the backends (the case's backend is blank), which follow one another."""
    x, w, target, g = make_inputs(case, device)
    if case.reduction == "sum":
        g.fill_(0.75)
    exponent = case.exponent if case.loss == "harmonic" else None
    return (x, w, target, g), truth(x, w, target, exponent, g, **case.logits(device))


def run_case(case: Case, device: torch.device) -> Outcome:
    """One backend on one set of inputs."""
    from harmonic_triton import linear_cross_entropy, linear_harmonic_loss

    (x, w, target, g), (losses, dx, dw, dn, dn_size, db) = prepared(replace(case, backend=""), device)
    counted = (target >= 0) & (g != 0)
    # A power of two brings the gradients into the middle of the dtype's range, as a gradient scaler would.
    typical = dx.norm(dim=1)[counted].median().item()
    scale = 2.0 ** -round(math.log2(typical)) if typical > 0 else 1.0
    x, w = (tensor.detach().clone().requires_grad_() for tensor in (x, w))
    n = torch.tensor(case.exponent, device=device, requires_grad=True)
    backend, logits = cast(BackendName, case.backend), case.logits(device)
    bias = logits.get("bias", n.detach()).requires_grad_()
    start = time.perf_counter()
    if case.loss == "harmonic":
        out = linear_harmonic_loss(x, w, target, n=n, reduction=case.reduction, backend=backend)
    else:
        out = linear_cross_entropy(x, w, target, reduction=case.reduction, backend=backend, **logits) + 0 * n
    upstream = g * scale if case.reduction == "none" else out.new_tensor(0.75 * scale)
    grad_x, grad_w, grad_n, grad_b = torch.autograd.grad(out + 0 * bias.sum(), (x, w, n, bias), upstream.to(out.dtype))
    seconds = time.perf_counter() - start
    got, wanted = out.detach().double(), losses
    if case.reduction == "none":
        got, wanted = got[counted], wanted[counted]
    else:
        got, wanted = got[None], wanted.sum()[None]
    errors = {
        "loss": torch.where(got == wanted, 0.0, (got - wanted).abs() / wanted).max().item(),
        "dX": row_error(grad_x, dx * scale, case.dtype),
        "dW": row_error(grad_w, dw * scale, case.dtype),
    }
    if case.loss == "harmonic":
        errors["dn"] = abs(grad_n.item() - dn.item() * scale) / (dn_size.item() * scale)
    elif logits:
        errors["db"] = float((grad_b.double() / scale - db).norm() / db.norm())
    gradient = GRADIENT_BOUND[case.dtype] * case.growth
    small = min(gradient, GRADIENT_BOUND[torch.float32] * case.growth)
    bounds = {"loss": LOSS_BOUND, "dX": gradient, "dW": gradient, "dn": small, "db": gradient}
    if case.dtype == torch.float64:
        bounds["dn"] = 1e-6  # n itself is fp32
        bounds["loss"] = 1e-6
    return Outcome(losses[counted].mean().item(), errors, bounds, seconds)


def default_shapes(backend: str, device: torch.device) -> list[tuple[int, int, int]]:
    """The first gets the whole grid. The interpreter is slow, and the dense reference would fill a GPU."""
    if device.type == "cpu" and backend == "triton":
        return [(24, 136, 140)]
    if device.type == "cpu" or backend == "reference":
        return [(32, 768, 1500), (4, 768, 50257)]
    return [(512, 768, 50257), (1000, 1000, 12345)]


def cases(
    device: torch.device,
    backends: list[str],
    shapes: list[tuple[int, int, int]] | None,
    dtypes: list[torch.dtype] | None,
) -> Iterator[Case]:
    """The grid: every dtype and backend over confidence, plus small and large exponents, sums and other shapes."""
    from harmonic_triton._common.dispatch import unsupported_reasons

    inputs = ("far", *(f"loss {level:g}" for level in LOSS_LEVELS), "wrong 0.3", "wrong 0.03")
    exponents = ((2.0, "far"), (2.0, "loss 0.1"), (256.0, "far"), (256.0, "loss 1e-10"))
    for dtype in dtypes or (torch.float32, torch.bfloat16, torch.float16):
        together: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
        for backend in backends:
            if not unsupported_reasons(backend, device, dtype):
                together.setdefault(tuple(shapes or default_shapes(backend, device)), []).append(backend)
        for (first, *more), serving in together.items():
            lines = [Case("", "none", dtype, first, None, kind) for kind in inputs]
            lines += [Case("", "none", dtype, first, n, kind) for n, kind in exponents]
            lines += [Case("", "sum", dtype, first, None, kind) for kind in inputs[::5]]
            lines += [Case("", "none", dtype, shape, None, kind) for shape in more for kind in ("far", "loss 1e-10")]
            logits = [(first, kind) for kind in ("far", "loss 0.001", "loss 1e-20", "wrong 20")]
            logits += [(shape, "loss 1e-10") for shape in more]
            lines += [Case("", "none", dtype, shape, None, kind, "entropy") for shape, kind in logits]
            lines.append(Case("", "sum", dtype, first, None, "far", "entropy"))
            lines += [
                Case("", "none", dtype, first, None, kind, "capped") for kind in ("far", "loss 1e-20", "wrong 20")
            ]
            lines.append(Case("", "sum", dtype, first, None, "far", "capped"))
            for line in lines:
                if line.reduction == "sum" and len(probes(line)) < line.shape[0]:
                    continue  # its truth needs all tokens
                held = math.prod(line.shape) <= DENSE_WORK
                yield from (replace(line, backend=name) for name in serving if held or name != "reference")


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
    from harmonic_triton.tools.doctor import backend_lines, version_line

    print(version_line(device))
    print(*backend_lines(device), sep="\n")
    backends = options.backend or ["reference", "torch", "triton"]
    dtypes = [DTYPES[name] for name in options.dtype] if options.dtype else None
    print(f"\n{'kind':8} {'backend':9} {'reduction':9} {'dtype':8} {'N x D x V':>18} {'n':>6} {'inputs':10} {'loss':>8}"
          f"  {'error of loss':>17}  {'dX':>17}  {'dW':>17}  {'dn or db':>17}")  # fmt: skip
    failed = total = 0
    for case in cases(device, backends, options.shape, dtypes):
        outcome = run_case(case, device)
        cells = "  ".join(f"{error:8.1e}/{outcome.bounds[name]:8.1e}" for name, error in outcome.errors.items())
        shape = " x ".join(map(str, case.shape))
        total += 1
        failed += not outcome.passed
        exponent = f"{case.exponent:6.1f}" if case.loss == "harmonic" else "     -"
        print(f"{case.loss:8} {case.backend:9} {case.reduction:9} {str(case.dtype)[6:]:8} {shape:>18} {exponent}"
              f" {case.inputs:10} {outcome.loss:8.1e}  {cells}{'' if outcome.passed else '  FAILED'}", flush=True)  # fmt: skip
    print(f"\n{total - failed} of {total} lines within their bounds (error/bound).")
    if not total:
        print("Nothing was checked: no backend serves here (see above), or not at this shape.", file=sys.stderr)
    return 1 if failed or not total else 0
