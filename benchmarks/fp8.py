"""What the two gradient products would lose in fp8 e4m3, emulated on a CPU: ``python -m benchmarks.fp8``.

Strategy (b) with A, W and X rounded to e4m3, one scale per row of the left and per column of the right operand of each
product (scales along the summed dimension would not factor out of it), accumulation in fp32. The target and the k
nearest competitors stay out of the products and are added exactly; row and column sums of A are exact. Truth is fp64
from the same bf16 inputs. The report with the decision is written to benchmarks/results/fp8-emulation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.runs import RESULTS

PLACES = {  # classes in a cluster of near-duplicates -> losses; 1: class vectors at random
    1: (9.0, 1.65, 0.002),
    4: (0.03, 0.75, 2.0),
    16: (0.03, 0.75, 2.0),
}
COMPETITORS = (0, 1, 4, 8)
SPREAD = 0.1  # distance of a near-duplicate from its cluster's centre, in norms of a class vector
E4M3 = torch.float8_e4m3fn
E4M3_UNIT = 2.0**-4  # largest relative rounding error of a normal number
PRODUCT_RATE, COPY_RATE = 790e12, 4.3e12  # of an H200: dense bf16 flop/s, bytes/s
SHAPES = {"GPT-2": (8192, 768, 50257), "Llama-3-8B": (8192, 4096, 128256)}


@dataclass
class Case:
    """Tokens at one loss level, in fp64."""

    x: Tensor  # (N, D)
    w: Tensor  # (V, D)
    target: Tensor  # (N,)
    loss: float  # mean
    a: Tensor  # (N, V): dX = sum_j a_j (x - w_j), dW_j = -sum_i a_ij (x_i - w_j)
    order: Tensor  # (N, max k) nearest competitors first


def _bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).double()


def _scores(x: Tensor, w: Tensor, target: Tensor, n: float) -> tuple[Tensor, Tensor]:
    """(log p, s) (N, V) in fp64; the target's own distance by direct differences."""
    s = x.square().sum(1, keepdim=True) + w.square().sum(1) - 2 * x @ w.t()
    s = s.clamp_min(1e-12).scatter(1, target.unsqueeze(1), (x - w[target]).square().sum(1, keepdim=True))
    return torch.log_softmax(-0.5 * n * s.log(), 1), s


def make_case(cluster: int, loss: float, tokens: int, width: int, classes: int, n: float, seed: int) -> Case:
    """x = w_c + t noise, with t found by bisection so that the mean loss is the one asked for (or the largest)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = randn(classes, width)
    if cluster > 1:
        w = randn(-(-classes // cluster), width).repeat_interleave(cluster, 0)[:classes] + SPREAD * w
    w = _bf16(0.02 * w)
    target = torch.randint(classes, (tokens,), generator=generator)
    noise = 0.02 * randn(tokens, width)
    low, high = -8.0, 6.0  # log2 of t
    few = slice(0, min(tokens, 64))
    for _ in range(14):
        middle = (low + high) / 2
        x = _bf16(w[target[few]] + 2.0**middle * noise[few])
        mean = -_scores(x, w, target[few], n)[0].gather(1, target[few].unsqueeze(1)).mean()
        low, high = (middle, high) if mean < loss else (low, middle)
    x = _bf16(w[target] + 2.0**low * noise)
    log_p, s = _scores(x, w, target, n)
    own = target.unsqueeze(1)
    p = log_p.exp()
    slope = p.scatter(1, own, -(1 - p.gather(1, own))) / tokens  # -d loss / d z
    order = s.scatter(1, own, torch.inf).topk(max(COMPETITORS), 1, largest=False).indices
    return Case(x, w, target, float(-log_p.gather(1, own).mean()), -n * slope / s, order)


def to_fp8(values: Tensor, dim: int) -> Tensor:
    """Rounded to e4m3 under one scale for each index of the dimensions other than ``dim``; back in fp32."""
    values = values.float()
    scale = values.abs().amax(dim, keepdim=True) / torch.finfo(E4M3).max
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).to(E4M3).float() * scale


def to_bf16(values: Tensor, dim: int) -> Tensor:
    """The same interface; bf16 needs no scale."""
    return values.to(torch.bfloat16).float()


def gradients(case: Case, k: int, rounded: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """(dX, dW) with the products of the rounded operands; target, k competitors and the sums of A in fp32."""
    special = torch.cat([case.target.unsqueeze(1), case.order[:, :k]], 1)
    through = case.a.scatter(1, special, 0.0)
    dx = through.sum(1, keepdim=True).float() * case.x.float() - rounded(through, 1) @ rounded(case.w, 0)
    dw = through.sum(0).unsqueeze(1).float() * case.w.float() - rounded(through.t(), 1) @ rounded(case.x, 0)
    for index, a in zip(special.t(), case.a.gather(1, special).float().t(), strict=True):
        term = a.unsqueeze(1) * (case.x - case.w[index]).float()
        dx += term
        dw.index_add_(0, index, -term)
    return dx.double(), dw.double()


def errors(case: Case, k: int, rounded: Callable[[Tensor, int], Tensor]) -> tuple[float, float, float]:
    """Relative errors: of dX, of its worst row, of dW."""
    true_x = case.a.sum(1, keepdim=True) * case.x - case.a @ case.w
    true_w = case.a.sum(0).unsqueeze(1) * case.w - case.a.t() @ case.x
    dx, dw = gradients(case, k, rounded)
    worst = ((dx - true_x).norm(dim=1) / true_x.norm(dim=1)).max()
    return float((dx - true_x).norm() / true_x.norm()), float(worst), float((dw - true_w).norm() / true_w.norm())


def predicted(tokens: int, width: int, classes: int, k: int) -> tuple[float, float, float]:
    """Milliseconds on an H200 at its limits: products in bf16 (3U), two of them in fp8 (U + 2 U/2), k competitors.

    A competitor costs its class vector and its token, gathered in 16 bits for dX and again for dW, and two fp32
    multiply-adds for each feature; the traffic is what counts.
    """
    unit = 2.0 * tokens * width * classes / PRODUCT_RATE
    # A twice in one byte (row scales for dX, column scales and K-major for dW), written and read, instead of two bytes
    # written once and read twice; its column maxima are one more pass over the 16-bit log-scores.
    traffic = tokens * classes * ((1 + 1 + 1 + 1 + 2) - (2 + 2 + 2)) / COPY_RATE
    fetched = 2.0 * 2.0 * tokens * k * width / COPY_RATE
    return 3e3 * unit, 2e3 * unit + 1e3 * traffic, 1e3 * fetched


def report(tokens: int, width: int, classes: int, n: float, seed: int) -> Iterator[str]:
    """Lines of the report."""
    facts = describe("cpu")
    yield "# The two gradient products in fp8 e4m3: emulation and decision\n"
    yield (
        f"`python -m benchmarks.fp8 --tokens {tokens} --width {width} --classes {classes} --n {n:g} --seed {seed}`, "
        f"torch {facts['torch']}, commit {str(facts['commit'])[:12]}; {facts['cpu']}. "
        "**Not measured on a GPU**: accuracy is emulated, times are predictions from limits.\n"
    )
    yield (
        "Truth: fp64 from the same bf16 inputs. Products: operands rounded as stated (e4m3 with a scale for each row of "
        "the left and each column of the right operand), accumulated in fp32. Out of the products and exact: the target, "
        'the k nearest competitors, and the row and column sums of A. Relative Frobenius errors; "row" is the worst '
        "token's dX. A bf16 *output* alone rounds by 1.7e-3.\n"
    )
    yield "| class vectors | loss | k | bf16: dX | row | dW | e4m3: dX | row | dW |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    worst: dict[tuple[int, int], float] = {}
    for cluster, losses in PLACES.items():
        place = "random" if cluster == 1 else f"clusters of {cluster} near-duplicates"
        for loss in losses:
            case = make_case(cluster, loss, tokens, width, classes, n, seed)
            for k in COMPETITORS:
                in_bf16, in_fp8 = errors(case, k, to_bf16), errors(case, k, to_fp8)
                worst[cluster, k] = max(worst.get((cluster, k), 0.0), *in_fp8)
                figures = " | ".join(f"{value:.1e}" for value in (*in_bf16, *in_fp8))
                yield f"| {place} | {case.loss:.2g} | {k} | {figures} |"
    yield "\nWorst e4m3 figure:\n"
    yield f"| classes in a cluster | {' | '.join(f'k = {k}' for k in COMPETITORS)} |"
    yield "|---|" + "---:|" * len(COMPETITORS)
    for cluster in PLACES:
        yield f"| {cluster} | {' | '.join(f'{worst[cluster, k]:.1e}' for k in COMPETITORS)} |"
    yield ""
    yield from _bound()
    yield from _times()
    yield from _decision(worst)


def _bound() -> Iterator[str]:
    both = (1 + E4M3_UNIT) ** 2 - 1
    yield "## Bound\n"
    yield (
        f"Both operands are rounded by at most 2^-4 (e4m3 has 3 bits of mantissa), a product by at most {both:.3f}; so with "
        f"R the classes left in the products, ‖error of dX_i‖ ≤ {both:.3f} Σ_(j∈R) |A_ij| ‖w_j‖ + u, and for dW_j the same "
        "over tokens with ‖x_i‖. u is what lies below e4m3's normal range under its scale: the smallest step is 2^-9 of 448, "
        "so entries under 2.2e-6 of the largest of their row (column) are lost in the product while the exact sums keep "
        "them. Relative to ‖dX_i‖ that is up to Σ_(j∈R) |A_ij| ‖w_j‖ / ‖dX_i‖, which grows with 1/‖x − w_j‖ near duplicates.\n"
    )


def _times() -> Iterator[str]:
    yield "## Predicted time, and what the competitors cost\n"
    yield (
        f"An H200 at {PRODUCT_RATE / 1e12:.0f} TFLOP/s dense bf16 (e4m3 taken as twice that) and {COPY_RATE / 1e12:.1f} "
        "TB/s. Taking out k competitors is O(N·k·D): gathers of w for dX and of x for dW (sorted by class). Finding them "
        "costs a pass over the (row, tile) maxima, N·V/64 floats, and k tiles of log-scores a token.\n"
    )
    yield "| head | 3U in bf16, ms | U + 2U in e4m3, ms | k = 1 | k = 4 | k = 8 |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, (tokens, width, classes) in SHAPES.items():
        wide, narrow, _ = predicted(tokens, width, classes, 0)
        taken = " | ".join(f"+{predicted(tokens, width, classes, k)[2]:.3f}" for k in (1, 4, 8))
        shape = f"{name}: N = {tokens}, D = {width}, V = {classes}"
        yield f"| {shape} | {wide:.2f} | {narrow:.2f} | {taken} |"
    yield ""


def _decision(worst: dict[tuple[int, int], float]) -> Iterator[str]:
    largest = max(PLACES)
    yield "## Decision: not shipped\n"
    yield (
        "An option is kept only if it was measured faster within a stated bound. Speed could not be measured: there was no "
        f"GPU. And the bound fails in the emulation already: in clusters of {largest} near-duplicates e4m3 is off by "
        f"{worst[largest, 4]:.0e} at k = 4 and {worst[largest, 8]:.0e} at k = 8, since the classes left in the products carry "
        "most of the gradient; no fixed k removes it, and shapes do not foretell it. Where it is accurate (random class "
        "vectors, clusters no larger than k) it saves at most a third of the step on paper, less what the table of times "
        "leaves out: on sm_90 an e4m3 product takes both operands contiguous along the summed dimension, so transposed "
        "copies of W and X; and its tensor cores add e4m3 products in fewer than 32 bits unless partial sums are promoted.\n"
    )
    yield (
        "To reopen it, measure on one GPU and in one run: (1) `torch._scaled_mm` with row-wise scales at (N, V) × (V, D) and "
        "(V, N) × (N, D) against the bf16 products, with `use_fast_accum` off; (2) the pass that writes A twice; (3) the "
        "first table with those products instead of the emulated ones, on heads of trained models; (4) the whole step. Keep "
        "it, opt-in, if (4) is at least 1.15 times as fast at D = 4096 and (3) stays under 1e-2 in every row.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=(__doc__ or "").splitlines()[0])
    parse.add_argument("--tokens", type=int, default=256)
    parse.add_argument("--width", type=int, default=768)
    parse.add_argument("--classes", type=int, default=8192)
    parse.add_argument("--n", type=float, default=28.0, help="harmonic exponent")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--out", type=Path, default=RESULTS / "fp8-emulation.md", help="file of the report")
    options = parse.parse_args(argv)
    lines = []
    for line in report(options.tokens, options.width, options.classes, options.n, options.seed):
        print(line, flush=True)
        lines.append(line)
    options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
