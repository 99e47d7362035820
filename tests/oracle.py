"""The fp64 truth of a call, and how far a backend may be from it: bounds derived as in docs/design.md, not guessed.

Write eps for fp32's rounding (fp64's for float64). For a class j that goes through the matrix products
``kappa_j = (||x||^2 + ||w_j||^2)/s_j`` multiplies the relative error of its squared distance; for the target and the rival,
which are measured by direct differences, kappa is 1. A log-score is off by (n/2) kappa_j eps, so the loss is off by that
in relative terms, averaged over the non-targets. A = n G/s inherits both, and 16-bit backends round A once more.

Cross-entropy (``n=None``): a log-score x.w_j - x.w_c from the products is off by eps ||x|| (||w_j|| + ||w_c||), the rival's by
eps |z_r| where it is stored in fp32; the loss by their average over the non-targets, G = p likewise. A bias adds |b_j| + |b_c|.
Under a soft cap c an error of a logit a_j arrives times h_j = 1 - tanh^2(a_j/c), and the capped logits, of which z_j is the
difference, are rounded themselves. A coefficient is G_j h_j, and h_j is off by 2/c times the error of a_j, relatively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harmonic_triton import reference

SLACK = 16.0  # sums of up to a hundred terms, in the worst order


@dataclass
class Truth:
    """Losses (N,), gradients, and the largest admissible errors (absolute, by row)."""

    loss: Tensor
    dx: Tensor
    dw: Tensor
    dn: Tensor
    loss_bound: Tensor  # (N,)
    dx_bound: Tensor  # (N,) of the norm of a row's error
    dw_bound: Tensor  # (V,)
    db: Tensor | None = None
    db_bound: Tensor | None = None  # (V,)

    def check(self, loss: Tensor, dx: Tensor, dw: Tensor, db: Tensor | None = None) -> None:
        """Assert that per-token losses and the gradients are within their bounds."""
        self.check_rows("loss", loss.unsqueeze(1), self.loss.unsqueeze(1), self.loss_bound)
        self.check_rows("dX", dx, self.dx, self.dx_bound)
        self.check_rows("dW", dw, self.dw, self.dw_bound)
        if db is not None:
            self.check_rows("db", db.unsqueeze(1), self.db.unsqueeze(1), self.db_bound)

    @staticmethod
    def check_rows(name: str, got: Tensor, wanted: Tensor, bound: Tensor) -> None:
        """Rows that the output dtype cannot hold are left out."""
        holds = wanted.abs().amax(1) < 0.5 * torch.finfo(got.dtype).max
        error = (got.double() - wanted).norm(dim=1)
        bad = holds & ~(error <= bound)
        worst = torch.where(bad, error / bound, -1.0).nan_to_num(nan=math.inf).argmax()
        assert not bad.any(), (
            f"{name} row {worst}: error {error[worst]:.3e} exceeds {bound[worst]:.3e},"
            f" norm of the truth {wanted[worst].norm():.3e}, {int(bad.sum())} of {len(bad)} rows"
        )


def oracle(
    x: Tensor, w: Tensor, target: Tensor, g: Tensor, *, n: float | None, eps: float = 0.0, uniform_mix: float = 0.0,
    class_weight: Tensor | None = None, label_smoothing: float = 0.0, ignore_index: int = -100,
    center: Tensor | None = None, bias: Tensor | None = None, softcap: float | None = None,
) -> Truth:  # fmt: skip
    """Truth and bounds for per-token losses (reduction="none") under the upstream gradient g (N,).

    With ``center`` (D,) the bounds are those of a backend that takes it from x and every class vector before it multiplies
    them: kappa is of norms about it.
    """
    options = {"eps": eps, "uniform_mix": uniform_mix, "class_weight": class_weight,
               "label_smoothing": label_smoothing, "ignore_index": ignore_index}  # fmt: skip
    xs, ws = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    if n is None:
        del options["eps"], options["uniform_mix"]
        bs = w.new_zeros(len(w)) if bias is None else bias
        bs = bs.detach().double().requires_grad_()
        logits = {"bias": bs, "softcap": softcap}
        loss = reference.linear_cross_entropy(xs, ws, target, reduction="none", **logits, **options)
        (loss * g.double()).sum().backward()
        dx, dw, db = (torch.zeros_like(t) if t.grad is None else t.grad for t in (xs, ws, bs))
        bounds = _cross_entropy_bounds(
            x, w, bs.detach(), target, loss.detach(), (dx, dw, db), g, softcap, options, center
        )
        return Truth(loss.detach(), dx, dw, torch.zeros(()), *bounds[:3], db, bounds[3])
    exponent = torch.tensor(float(n), dtype=torch.float64, requires_grad=True)
    loss = reference.linear_harmonic_loss(xs, ws, target, n=exponent, reduction="none", **options)
    (loss * g.double()).sum().backward()
    zeros = [torch.zeros_like(t) if t.grad is None else t.grad for t in (xs, ws, exponent)]
    truth = Truth(
        loss.detach(),
        *zeros,
        *_bounds(x, w, target, loss.detach(), zeros[0], zeros[1], g, n, options, center),
    )
    return truth


def _bounds(x, w, target, loss, dx, dw, g, n, options, center):
    info = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
    unit, narrow = info.eps, torch.finfo(x.dtype).eps
    kept = target != options["ignore_index"]
    moved = 0.0 if center is None else center.double()
    xs, ws = x.detach().double()[kept] - moved, w.detach().double() - moved
    own = target[kept].unsqueeze(1)
    z, s_c = reference.log_scores(xs, ws, target[kept], n, options["eps"])
    z = z.detach().requires_grad_()
    nll = reference.negative_log_likelihood(z, target[kept])
    log_p = z - nll.unsqueeze(1)
    rows = reference.row_losses(
        log_p, z, target[kept], options["uniform_mix"], options["class_weight"], options["label_smoothing"]
    )
    (slope,) = torch.autograd.grad((rows * g.double()[kept]).sum(), z, allow_unused=True)
    slope = (torch.zeros_like(z) if slope is None else slope).nan_to_num().abs()
    # what errors of p move: the upstream gradient times p, whichever terms the loss is made of
    v = 1.0 if options["class_weight"] is None else float(options["class_weight"].abs().max())
    p = log_p.detach().exp()
    slope = slope + 2 * v * g.double()[kept].abs().unsqueeze(1) * p
    x_sq, w_sq = xs.square().sum(1, keepdim=True), ws.square().sum(1)
    floor = reference.FLOOR * (x_sq + w_sq) + 1e-36
    s = torch.maximum(reference.squared_distances(xs, ws) + options["eps"], floor)
    s = s.scatter(1, own, s_c.unsqueeze(1).clamp_min(1e-36))
    rival = s.scatter(1, own, math.inf).argmin(1, keepdim=True)
    kappa = ((x_sq + w_sq) / s).scatter(1, own, 1.0).scatter(1, rival, 1.0)
    others = log_p.detach().scatter(1, own, -math.inf)
    q = torch.softmax(others, 1).nan_to_num() if z.shape[1] > 1 else torch.zeros_like(others)
    mean_kappa = (q * kappa).sum(1, keepdim=True) + 1
    a = n * slope / s
    a = a.scatter(1, own, 0.0).scatter(1, own, n * slope.scatter(1, own, 0.0).sum(1, keepdim=True) / s.gather(1, own))
    relative = 1 + (n / 2) * (kappa + mean_kappa) + kappa
    special = torch.zeros_like(a).scatter(1, own, 1.0).scatter(1, rival, 1.0)
    x_norm, w_norm = x_sq.sqrt(), w_sq.sqrt()
    tiny = info.tiny * 100  # probabilities below fp32's normal range are rounded to its steps, or flushed
    apart = (a * s.sqrt() * relative) * unit
    # the same for A s_c/n, which is what goes through the products
    apart = apart + tiny * n * v * g.double()[kept].abs().unsqueeze(1) * torch.maximum(
        s.rsqrt(), s.sqrt() / s.gather(1, own)
    )
    through = a * (1 - special)
    rounded = narrow if x.element_size() == 2 else unit

    def whole(values):
        out = values.new_zeros(len(target))
        out[kept] = values
        return out

    v_all = 1.0 + (0.0 if options["class_weight"] is None else v) + options["uniform_mix"]
    smoothing = options["label_smoothing"] * ((q + 1 / len(w)) * kappa).amax(1) * n * v_all
    loss_bound = SLACK * unit * (1 + (n / 2) * mean_kappa.squeeze(1)) * loss[kept].abs() + SLACK * unit * smoothing
    if options["uniform_mix"]:  # a difference of terms of order one
        loss_bound = loss_bound + SLACK * unit * v_all * (1 + (n / 2) * mean_kappa.squeeze(1))
    if options["label_smoothing"]:
        loss_bound = loss_bound + SLACK * unit * v_all * (nll.detach() + 1 + z.detach().clamp_min(-1e6).abs().mean(1))
    dx_bound = SLACK * (apart.sum(1) + unit * (through * (x_norm + w_norm)).sum(1))
    dx_bound = dx_bound + 2 * rounded * (through * w_norm).sum(1) + 2 * narrow * dx[kept].norm(dim=1)
    dw_bound = SLACK * (apart.sum(0) + unit * (through * (x_norm + w_norm)).sum(0))
    dw_bound = dw_bound + 2 * rounded * (through * x_norm).sum(0) + 2 * narrow * dw.norm(dim=1)
    if x.dtype == torch.float16:  # A of a row spans 2^34 at most, from the rival's down
        largest = (a * (1 - special.scatter(1, rival, 0.0))).amax(1, keepdim=True)
        dx_bound = dx_bound + 2.0**-34 * largest.squeeze(1) * w_norm.sum()
        dw_bound = dw_bound + 2.0**-34 * (largest * x_norm).sum()
    least = torch.finfo(x.dtype).tiny * math.sqrt(x.shape[1]) + tiny
    return whole(loss_bound + tiny), whole(dx_bound + least), dw_bound + least


def _cross_entropy_bounds(x, w, bias, target, loss, gradients, g, softcap, options, center):
    dx, dw, db = gradients
    unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    narrow = torch.finfo(x.dtype).eps
    rounded = narrow if x.element_size() == 2 else unit
    tiny = 100 * torch.finfo(torch.float32).tiny  # probabilities below fp32's normal range are flushed
    kept = target != options["ignore_index"]
    xs, ws, own = x.detach().double()[kept], w.detach().double(), target[kept].unsqueeze(1)
    ws = ws if center is None else ws - center.double()
    z, target_logit = reference.relative_logits(xs, ws, target[kept], bias, softcap)
    nll = reference.negative_log_likelihood(z, target[kept]).unsqueeze(1)
    p = (z - nll).exp()
    x_norm, w_norm = xs.norm(dim=1, keepdim=True), ws.norm(dim=1)
    rival = z.scatter(1, own, -math.inf).argmax(1, keepdim=True)
    off = raw = x_norm * (w_norm + w_norm[own]) + bias.abs() + bias.abs()[own] + 1  # error of z_j, in units
    h, bend = 1.0, 1.0
    if softcap is not None:
        logits = xs @ ws.t() + bias
        h, capped = torch.cosh((logits / softcap).clamp(-300, 300)) ** -2, z + target_logit.unsqueeze(1)
        off = h * raw + capped.abs() + capped.gather(1, own).abs() + 1
        bend = 1 + 2 * raw / softcap
    off = off.scatter(1, rival, z.gather(1, rival).abs() + 1).scatter(1, own, 1.0)
    bend = bend if softcap is None else bend.scatter(1, rival, 1.0).scatter(1, own, 1.0)
    others = (z - nll).scatter(1, own, -math.inf)
    q = torch.softmax(others, 1).nan_to_num() if len(w) > 1 else torch.zeros_like(others)
    mean_off = (q * off).sum(1, keepdim=True) + nll + 1
    v = 1.0 if options["class_weight"] is None else options["class_weight"].double()
    v_max = float(torch.as_tensor(v).abs().max())
    smoothing = options["label_smoothing"]
    up = g.double()[kept].abs().unsqueeze(1) * v_max
    slope = up * (2 * p + smoothing / len(w))  # |G_j|, and what an error of p moves
    slope = slope.scatter(1, own, slope.scatter(1, own, 0.0).sum(1, keepdim=True))
    largest = slope.scatter(1, own, 0.0).amax(1, keepdim=True)
    slope = slope * h
    error = unit * slope * (off + mean_off + bend) + tiny * up
    special = torch.zeros_like(p).scatter(1, own, 1.0).scatter(1, rival, 1.0)
    through = rounded * slope * (1 - special)
    loss_bound = unit * mean_off * loss[kept].unsqueeze(1)
    if smoothing:
        spread = off.mean(1, keepdim=True) + z.abs().mean(1, keepdim=True)
        loss_bound = loss_bound + unit * smoothing * v_max * (nll + spread)
    dx_bound = (SLACK * error + 2 * through) @ w_norm + 2 * narrow * dx[kept].norm(dim=1)
    dw_bound = ((SLACK * error + 2 * through) * x_norm).sum(0) + 2 * narrow * dw.norm(dim=1)
    db_bound = (SLACK * error + 2 * through).sum(0) + 2 * unit * db.abs()
    if x.dtype == torch.float16:  # G of a row spans 2^34 at most, from the rival's down
        dx_bound = dx_bound + 2.0**-34 * largest.squeeze(1) * w_norm.sum()
        dw_bound = dw_bound + 2.0**-34 * (largest * x_norm).sum()
        db_bound = db_bound + 2.0**-34 * largest.sum()
    least = torch.finfo(x.dtype).tiny * math.sqrt(x.shape[1]) + tiny

    def whole(values):
        out = values.new_zeros(len(target))
        out[kept] = values
        return out

    return whole(SLACK * loss_bound.squeeze(1) + tiny), whole(dx_bound + least), dw_bound + least, db_bound + least
