"""Cross-entropy's scores: dot products and a bias, as they are or capped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harmonic_triton.fused.pytorch import per_token
from harmonic_triton.fused.pytorch.chunk import EVERY, LOG2E, Chunk, Rooms, Sums, first, part
from harmonic_triton.fused.pytorch.head import Head
from harmonic_triton.fused.pytorch.per_token import Values, column_of, values_of


class DotChunk(Chunk):
    """Gap a_c - a_j of logits a_j = x.w_j + b_j, z_j = -gap; the products take G_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Rooms) -> None:
        super().__init__(head, x, target, gap, work)
        logit = self.direct(target, EVERY)
        self.target_ref = per_token.where(per_token.isinf(logit), math.nan, logit)  # as log-softmax has it
        self.base = per_token.zeros_like(logit)
        self.on_target, self.some_on_target = self.base != 0, False
        shift = self.refer_to(self.target_ref)
        if head.center is not None:
            shift = shift - values_of(torch.mv(x.double(), head.center.double()))
        self.shift = column_of(shift, x.dtype)
        self.products(-x)

    def refer_to(self, logit: Values) -> Values:
        """Take the target's logit for the reference, and say by how much gaps exceed -x.w_j - b_j."""
        return logit

    def complete_gaps(self, tile: slice) -> Tensor:
        if self.head.bias is not None:
            part(self.gap, tile).sub_(self.head.bias)
        return super().complete_gaps(tile)

    def direct(self, index: Tensor, tile: slice) -> Values:
        """The logit of index, before a cap."""
        logit = values_of(torch.linalg.vecdot(part(self.x, tile).double(), self.head.rows(index).double()))
        return logit if self.head.bias is None else logit + values_of(self.head.bias.index_select(0, index))

    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        return torch.neg(gap, out=out)

    def best_score(self, gap: Values) -> Values:
        return -gap

    def exp_scores(self, gap: Tensor, offset: Values, out: Tensor) -> Tensor:
        return torch.add(column_of(offset * -LOG2E, out.dtype), gap, alpha=-LOG2E, out=out).exp2_()

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Values, Values]:
        target_ref = part(self.target_ref, tile)
        alone = 0.0 * target_ref - math.inf  # NaN if the target's logit is
        score = per_token.where(self.no_rival(rival, tile), alone, self.direct(rival, tile) - target_ref)
        return score, part(self.on_target, tile)

    def to_coefficients(self, p: Tensor, tile: slice) -> Sums:
        part(self.gap, tile).copy_(p)
        return ()

    def terms(
        self, g_others: Values, g_rival: Values, g_ref: Values | None, upstream: Values, sums: list[Sums]
    ) -> Tensor:
        zero = per_token.zeros_like(g_others)
        g_rival = per_token.where(self.no_rival(self.rival, EVERY), 0.0, g_rival)
        if g_ref is not None:  # of x.w_c itself, about no center
            g_others = g_others - g_ref
        return per_token.table_of(
            [upstream, g_others, -g_rival, zero, zero if g_ref is None else g_ref, zero], self.x.dtype
        )


class CappedChunk(DotChunk):
    """Gap -a_j, log-scores l_j = cap tanh(a_j/cap), relative to 0; the products take G_j times the cap's slope.

    A common mean of the class vectors is part of a logit that is capped: it is in the gaps, and the sum of a token's
    coefficients multiplies it in dX.
    """

    rival_logit: Values | None = None  # where all were measured at once

    def refer_to(self, logit: Values) -> Values:
        cap, self.logit = self.head.softcap, logit
        self.target_ref = per_token.tanh(logit / cap) * cap
        self.base = -self.target_ref
        return per_token.zeros_like(logit)

    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        return torch.mul(gap, -1 / self.head.softcap, out=out).tanh_().mul_(self.head.softcap)

    def best_score(self, gap: Values) -> Values:
        return per_token.tanh(gap / -self.head.softcap) * self.head.softcap

    def exp_scores(self, gap: Tensor, offset: Values, out: Tensor) -> Tensor:
        return self.log_scores(gap, out).sub_(column_of(offset, out.dtype)).mul_(LOG2E).exp2_()

    def others(self, rival: Tensor, offset: Values, tile: slice) -> Tensor:
        rest = super().others(rival, offset, tile)
        for index in (rival, part(self.target, tile)):  # their gaps are infinite, and a cap knows no infinity
            rest.scatter_(1, index.unsqueeze(1), 0.0)
        return rest

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Values, Values]:
        logit, target_logit = self.direct(rival, tile), part(self.logit, tile)
        if tile is EVERY:
            self.rival_logit = logit
        alone = 0.0 * target_logit - math.inf  # NaN if the target's logit is
        score = capped_difference(logit, target_logit, self.head.softcap)
        return per_token.where(self.no_rival(rival, tile), alone, score), part(self.on_target, tile)

    def to_coefficients(self, p: Tensor, tile: slice) -> Sums:
        gap, work = part(self.gap, tile), first(self.work[1], p.shape[0])
        torch.mul(gap, -2 / self.head.softcap, out=work).abs_().neg_().exp_()
        p.mul_(work).mul_(4)  # 1 - tanh^2 u = 4 e/(1 + e)^2 with e = exp(-2|u|)
        p.div_(work.add_(1).square_())
        gap.copy_(p)
        return () if self.head.center is None else (p.sum(1),)

    def terms(
        self, g_others: Values, g_rival: Values, g_ref: Values | None, upstream: Values, sums: list[Sums]
    ) -> Tensor:
        cap, zero = self.head.softcap, per_token.zeros_like(g_others)
        rival_logit = self.direct(self.rival, EVERY) if self.rival_logit is None else self.rival_logit
        g_target = (g_others if g_ref is None else g_others - g_ref) * slope(self.logit, cap)
        g_rival = per_token.where(self.no_rival(self.rival, EVERY), 0.0, g_rival * slope(rival_logit, cap))
        on_center = zero
        for tiles in zip(*sums, strict=True):  # the one sum there is about a center
            on_center = upstream * values_of(torch.cat(tiles)) + g_rival - g_target
        return per_token.table_of([upstream, g_target, -g_rival, zero, on_center, zero], self.x.dtype)


def capped_difference(a: Values, b: Values, cap: float) -> Values:
    """cap tanh(a/cap) - cap tanh(b/cap) as cap sinh(u - v)/(cosh u cosh v): right also where both are at the cap."""
    u, v, apart = abs(a / cap), abs(b / cap), abs((a - b) / cap)
    ends = (per_token.exp(-2 * u) + 1) * (per_token.exp(-2 * v) + 1)
    # (u + v - apart)/2, which huge ones of different signs would round
    lost = per_token.where((a < 0) == (b < 0), per_token.where(u < v, u, v), 0.0)
    grown = -2 * per_token.expm1(-2 * apart) * per_token.exp(-2 * lost) / ends
    return cap * per_token.where(a < b, -grown, grown)


def slope(logit: Values, cap: float) -> Values:
    """1 - tanh^2(logit/cap) with all its digits."""
    e = per_token.exp(-2 * abs(logit / cap))
    return 4 * e / ((1 + e) * (1 + e))
