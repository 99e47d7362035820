"""The accuracy gate: no baseline is timed before its loss, dX and dW agree with fp64.

The truth is computed here, apart from every backend, from the same rounded inputs: scores by the fp64 expansion with
the target's distance by direct difference, everything relative to the target. The loss is checked over all N rows, dX
on ``ROWS`` rows, dW on ``CLASSES`` classes, each by the norm of its error relative to the norm of the truth.

The bound is derived from the arithmetic that a baseline declares.  With u the unit roundoff of fp32 (and of the inputs'
dtype where the scores or the coefficients are rounded to it), a score of row i and class j carries

    a_ij = M_ij * SLACK * u,     M_ij = (n/2) (|x_i| + |w_j|)^2 / s_ij  (harmonic),   |x_i| |w_j|  (cross-entropy),

which moves the loss by (1 - p_c) times its mean over the other classes and the relative size of a gradient
coefficient by a_ij plus that mean. Arithmetic that is not exact at the target also loses u/(1 - p_c) there and u
times the size of the scores. A bound may grow past usefulness, so an error must also stay under ``LIMITS``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines import Baseline
from benchmarks.workloads import Inputs, Workload

ROWS = 64
CLASSES = 64
SLACK = 8.0  # roundings on the way to one score: two norms, a product, their sum, the logarithm
SCRATCH_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}

# What no derived bound excuses: (loss, gradients) by (target exact?, 16-bit inputs?).  The exact rows are the figures
# that the package promises at n = 28, growing with n beyond; the others ask for two right digits.
LIMITS = {
    (True, False): (1e-5, 5e-5),
    (True, True): (1e-5, 8e-3),
    (False, False): (1e-2, 1e-2),
    (False, True): (5e-2, 5e-2),
}


@dataclass(frozen=True)
class Check:
    """One figure of the gate."""

    quantity: str  # "loss" | "dX" | "dW"
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


@dataclass
class _Rows:
    """Per-row truth, streamed over all classes; float64, each (N,)."""

    nll: Tensor
    target_square: Tensor  # |x - w_c|^2
    target_magnitude: Tensor  # M_ic
    mean_magnitude: Tensor  # mean of M_ij over j != c, weighted by p
    score_size: Tensor  # largest |score| of the row


class Truth:
    """The fp64 answer for one workload and one kind of loss, and the error bound of a declared arithmetic."""

    def __init__(self, inputs: Inputs, loss: str, exponent: float) -> None:
        self.harmonic, self.exponent = loss == "harmonic", exponent
        self.x, self.w, self.target = inputs.x.detach(), inputs.w.detach().double(), inputs.target
        self.dtype = self.x.dtype
        self.w_square = self.w.square().sum(dim=1)  # (V,)
        self.rows = self._stream()
        count, classes = len(self.target), len(self.w)
        self.row_ids = torch.arange(0, count, max(1, count // ROWS), device=self.x.device)[:ROWS]
        spread = torch.arange(0, classes, max(1, classes // (CLASSES // 2)), device=self.x.device)[: CLASSES // 2]
        self.class_ids = torch.unique(torch.cat([self.target[: CLASSES // 2], spread]))
        self.loss = self.rows.nll.mean().item()

    @torch.no_grad()
    def _stream(self) -> _Rows:
        block = max(1, SCRATCH_BYTES[self.x.device.type] // (8 * len(self.w)))
        parts = [self._row_block(slice(i, i + block)) for i in range(0, len(self.target), block)]
        return _Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _row_block(self, rows: slice) -> tuple[Tensor, ...]:
        x, target = self.x[rows].double(), self.target[rows][:, None]
        target_square = (x - self.w[target[:, 0]]).square().sum(dim=1)
        score, magnitude = self._scores(x, self.w, self.w_square, (target, target_square))
        low, high = score.aminmax(dim=1)
        score.sub_(score.gather(1, target)).scatter_(1, target, -math.inf)
        others = score.logsumexp(dim=1)
        share = score.sub_(others[:, None]).exp_()
        target_magnitude = magnitude.gather(1, target)[:, 0]
        mean_magnitude = share.mul_(magnitude).sum(dim=1)
        nll = torch.logaddexp(others, torch.zeros_like(others))
        return nll, target_square, target_magnitude, mean_magnitude, torch.maximum(low.abs(), high.abs())

    def _scores(
        self, x: Tensor, w: Tensor, w_square: Tensor, exact: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Scores and magnitudes M of a block; ``exact`` = (column of each row's target, its distance)."""
        product = x @ w.T
        x_square = x.square().sum(dim=1, keepdim=True)
        if not self.harmonic:
            return product, x_square.sqrt() * w_square.sqrt()
        square = product.mul_(-2).add_(w_square).add_(x_square).clamp_min_(torch.finfo(torch.float64).tiny)
        if exact is not None:
            square.scatter_(1, exact[0], exact[1][:, None])
        half = self.exponent / 2
        return square.log() * -half, (x_square.sqrt() + w_square.sqrt()).square_().div_(square).mul_(half)

    @torch.no_grad()
    def _block(self, quantity: str, rows: Tensor, classes: Tensor, baseline: Baseline) -> tuple[Tensor, Tensor]:
        """Gradient coefficients A of a block of rows and classes, and |A| times its bounded relative error times the
        size of what A multiplies."""
        facts = _Rows(*(column[rows] for column in vars(self.rows).values()))
        x, w = self.x[rows].double(), self.w[classes]
        at_target = self.target[rows][:, None] == classes
        score, magnitude = self._scores(x, w, self.w_square[classes], None)
        x_size, w_size = x.norm(dim=1, keepdim=True), self.w_square[classes].sqrt()
        others = -torch.expm1(-facts.nll)[:, None]  # 1 - p_c
        half = self.exponent / 2
        if self.harmonic:
            target_score = -half * facts.target_square.log()[:, None]
            square = torch.where(at_target, facts.target_square[:, None], (score / -half).exp())
        else:
            target_score = (x * self.w[self.target[rows]]).sum(dim=1, keepdim=True)
        probability = (score - target_score - facts.nll[:, None]).exp()
        coefficient = torch.where(at_target, -others, probability)
        if self.harmonic:
            coefficient = coefficient * -self.exponent / square

        unit, score_unit = self._units(baseline)
        mean = (facts.mean_magnitude * score_unit)[:, None]
        own = torch.where(at_target, self._target_error(facts, baseline)[:, None], magnitude * score_unit)
        relative = own * (1 + 1 / half if self.harmonic else 1) + mean + SLACK * unit
        if self.dtype.itemsize < 4:
            relative = relative + torch.where(at_target & baseline.target_exact, 0.0, self._dtype_unit())
        reach = x_size + w_size if self.harmonic else (w_size if quantity == "dX" else x_size)
        if baseline.target_exact:
            if self.harmonic:
                reach = torch.where(at_target, square.clamp_min(0).sqrt(), reach)
        else:
            rounding = unit * (1 + facts.score_size)[:, None]
            relative = relative + torch.where(at_target, rounding / others.clamp_min(unit), rounding)
        return coefficient, coefficient.abs() * relative * reach

    def _combine(self, coefficient: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The gradient that the coefficients give: of distances own - other, or of dot products with other."""
        mixed = coefficient @ other
        return coefficient.sum(dim=1, keepdim=True) * own - mixed if self.harmonic else mixed

    def _dtype_unit(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    def _units(self, baseline: Baseline) -> tuple[float, float]:
        """Roundoff of the arithmetic, and of one score relative to its magnitude."""
        unit = torch.finfo(torch.float32).eps / 2
        coarse = self._dtype_unit() if baseline.scores_in_dtype and self.dtype.itemsize < 4 else 0.0
        return unit, SLACK * unit + coarse

    def _target_error(self, facts: _Rows, baseline: Baseline) -> Tensor:
        unit, score_unit = self._units(baseline)
        if baseline.target_exact and self.harmonic:
            return torch.full_like(facts.nll, SLACK * unit * self.exponent / 2)
        return facts.target_magnitude * score_unit

    def _limits(self, baseline: Baseline) -> tuple[float, float]:
        loss, gradient = LIMITS[baseline.target_exact, self.dtype.itemsize < 4]
        growth = max(1.0, self.exponent / 28) if self.harmonic else 1.0
        return loss * growth, gradient * growth

    def _loss_bound(self, baseline: Baseline) -> float:
        unit, score_unit = self._units(baseline)
        rows = self.rows
        moved = -torch.expm1(-rows.nll) * (self._target_error(rows, baseline) + rows.mean_magnitude * score_unit)
        bound = moved + SLACK * unit * rows.nll
        if not baseline.target_exact:
            bound = bound + unit * (1 + rows.score_size)
        return bound.mean().item() / self.loss

    @torch.no_grad()
    def check(self, baseline: Baseline, loss: Tensor, dx: Tensor, dw: Tensor) -> list[Check]:
        """Compare one answer of ``baseline`` with the truth."""
        loss_limit, gradient_limit = self._limits(baseline)
        loss_bound = self._loss_bound(baseline)
        if loss.dtype.itemsize < 4:
            loss_bound += torch.finfo(loss.dtype).eps / 2
        checks = [Check("loss", abs(loss.item() - self.loss) / self.loss, min(loss_bound, loss_limit))]
        all_rows = torch.arange(len(self.target), device=self.x.device)
        all_classes = torch.arange(len(self.w), device=self.x.device)
        for quantity, found, rows, classes in (
            ("dX", dx[self.row_ids], self.row_ids, all_classes),
            ("dW", dw[self.class_ids], all_rows, self.class_ids),
        ):
            coefficient, doubt = self._block(quantity, rows, classes, baseline)
            x, w = self.x[rows].double(), self.w[classes]
            truth = self._combine(coefficient, x, w) if quantity == "dX" else self._combine(coefficient.T, w, x)
            truth /= len(self.target)
            doubt = doubt.sum(dim=1 if quantity == "dX" else 0) / len(self.target)
            size = truth.norm()
            stored = self._dtype_unit()  # the result itself is rounded to the inputs' dtype
            bound = (doubt.norm() / size).item() + stored
            error = ((found.double() - truth).norm() / size).item()
            checks.append(Check(quantity, error, min(bound, gradient_limit)))
        return checks


def answer(baseline: Baseline, inputs: Inputs, exponent: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dX, dW) of one call."""
    loss = baseline(inputs.x, inputs.w, inputs.target, exponent)
    dx, dw = torch.autograd.grad(loss, (inputs.x, inputs.w))
    return loss.detach(), dx, dw


class Gate:
    """Checks baselines on one workload, each on the inputs of its loss; the truth of each loss is computed once."""

    def __init__(self, inputs: Mapping[str, Inputs], workload: Workload) -> None:
        self.inputs, self.exponent, self.device = inputs, workload.exponent, workload.device
        self._truths: dict[str, Truth] = {}

    def truth(self, loss: str) -> Truth:
        if loss not in self._truths:
            self._truths[loss] = Truth(self.inputs[loss], loss, self.exponent)
        return self._truths[loss]

    def check(self, baseline: Baseline) -> list[Check]:
        found = answer(baseline, self.inputs[baseline.loss], self.exponent)
        return self.truth(baseline.loss).check(baseline, *found)
