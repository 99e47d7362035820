"""The harmonic loss's scores: squared distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harmonic_triton.fused.floors import NEAREST_SHARE, NEAREST_SQ, divisor_floors, noise_share
from harmonic_triton.fused.pytorch import per_token
from harmonic_triton.fused.pytorch.chunk import EVERY, LOG2E, Chunk, Rooms, Sums, first, part
from harmonic_triton.fused.pytorch.head import Head
from harmonic_triton.fused.pytorch.per_token import Values, at_least, column_of, columns_of, values_of, where


class HarmonicChunk(Chunk):
    """Gap r_j = s_j/s_ref - 1, log-scores -(n/2) log1p(r_j); the products take s_ref G_j/s_j."""

    measured: tuple[Values, Values] | None = None  # the rivals' distances and floors, where all were measured at once

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Rooms) -> None:
        super().__init__(head, x, target, gap, work)
        centered, dtype = head.centered(x), x.dtype
        self.exact_x = x.double()  # differences of distances far from every class are as small as a rounding of x
        self.own_sq = squared_norms(self.exact_x)
        self.x_sq = self.own_sq if head.center is None else squared_norms(centered.double())
        self.target_ref = squared_norms(self.exact_x - head.rows(target))
        target_sq = self.target_ref + head.eps
        self.on_target = target_sq == 0
        self.some_on_target = per_token.any_of(self.on_target)
        floors = divisor_floors(dtype)
        self.target_sq = at_least(target_sq, floors.least)  # s_c, able to divide
        # r_j = (u_j - u_ref)/s_ref with u_j = ||w_j||^2 - 2 x.w_j: ||x||^2 has dropped out. Relative to a target much
        # farther than other classes their distances would lose digits: some class is within twice ``near``.
        near = self.x_sq + (head.smallest + head.eps)
        scale = where(self.target_sq > 4 * near, near, self.target_sq)
        scale = at_least(scale, floors.near_share * at_least(near, head.median))
        self.scale = at_least(at_least(scale, floors.largest_share * head.largest), floors.least)
        self.by_target = self.scale == self.target_sq
        reference = where(self.by_target, self.target_ref, self.scale - head.eps)
        inverse = 1.0 / self.scale
        self.base = per_token.log(self.target_sq * inverse) * head.half_n
        # below this the expansion is rounding noise; the floor is that of classes as near as it, of x's own norm
        floor = (2 * NEAREST_SHARE * self.own_sq + NEAREST_SQ) * inverse
        noise = at_least(at_least(self.x_sq * inverse, 1.0) * noise_share(dtype), floor)
        columns = [-2 * inverse, inverse, (self.x_sq - reference) * inverse, noise - 1.0]
        factor, self.inverse, self.shift, self.noise = columns_of(columns, dtype)
        self.products(centered * factor)
        # Far from both, sum_j A_j cancels: there it is taken in its r-form and the class vectors without x.
        self.far = self.by_target & (self.target_sq > self.norms_of(target))
        self.some_far = per_token.any_of(self.far)

    def norms_of(self, index: Tensor) -> Values:
        """Squared norms of class vectors, about the center."""
        return per_token.take(self.head.norms, index)

    def complete_gaps(self, tile: slice) -> Tensor:
        part(self.gap, tile).addr_(part(self.inverse, tile).squeeze(1), self.head.norms)
        return super().complete_gaps(tile)

    def noise_gap(self, tile: slice) -> Tensor:
        noise: Tensor = part(self.noise, tile)
        return noise

    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        return torch.log1p(gap, out=out).mul_(-self.head.half_n)

    def best_score(self, gap: Values) -> Values:
        return per_token.log1p(gap) * -self.head.half_n

    def exp_scores(self, gap: Tensor, offset: Values, out: Tensor) -> Tensor:
        less = column_of(offset * -LOG2E, out.dtype)
        torch.log1p(gap, out=out)
        if isinstance(self.head.half_n, float):
            return torch.add(less, out, alpha=-LOG2E * self.head.half_n, out=out).exp2_()
        return out.mul_(-LOG2E * self.head.half_n).add_(less).exp2_()

    def rival_distance(self, rival: Tensor, tile: slice) -> tuple[Values, Values]:
        """Its s_r >= floor, and the floor, which is of the vectors as they are."""
        rows, x = self.head.rows(rival), part(self.exact_x, tile)
        rows_sq = self.norms_of(rival) if self.head.center is None else squared_norms(rows.double())
        floor = NEAREST_SHARE * (part(self.own_sq, tile) + rows_sq) + NEAREST_SQ
        return at_least(squared_norms(x - rows) + self.head.eps, floor), floor

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Values, Values]:
        s, floor = self.rival_distance(rival, tile)
        if tile is EVERY:
            self.measured = s, floor
        score = per_token.log(s / part(self.target_sq, tile)) * -self.head.half_n
        return where(self.no_rival(rival, tile), -math.inf, score), s <= floor

    def to_coefficients(self, p: Tensor, tile: slice) -> Sums:
        gap, work = part(self.gap, tile), first(self.work[1], p.shape[0])
        torch.add(gap, 1, out=work)
        if not self.some_far:
            return (torch.div(p, work, out=gap).sum(1),)  # 0 at target and rival, whose gaps are infinite
        for index in (self.target, self.rival):
            gap.scatter_(1, part(index, tile).unsqueeze(1), 0.0)
        p.div_(work)
        torch.mul(p, gap, out=work)
        gap.copy_(p)
        return p.sum(1), work.sum(1)

    def terms(
        self, g_others: Values, g_rival: Values, g_ref: Values | None, upstream: Values, sums: list[Sums]
    ) -> Tensor:
        n, s_c = 2 * self.head.half_n, self.target_sq
        s_r, floor = self.measured or self.rival_distance(self.rival, EVERY)
        skip_rival = (s_r <= floor) | self.no_rival(self.rival, EVERY)
        if self.some_on_target:
            skip_rival = skip_rival | self.on_target
        largest = torch.finfo(self.x.dtype).max / 32  # beyond it, what it multiplies is 0
        factor = self.off_target(per_token.at_most(at_least(n / self.scale * upstream, -largest), largest))
        if g_ref is not None:  # of the target's log-score itself
            g_others = g_others - g_ref
        a_target = self.off_target(n * g_others / s_c)
        a_rival = where(skip_rival, 0.0, -n * g_rival / s_r)
        plain, *by_gap = (tiles[0] if len(tiles) == 1 else torch.cat(tiles) for tiles in zip(*sums, strict=True))
        on_x, far = -factor * values_of(plain), self.far
        if self.some_far:
            far = far & (s_r > self.norms_of(self.rival))
            r_form = where(skip_rival, 0.0, n * g_rival * (s_r - s_c) / (s_r * s_c))
            if g_ref is not None:
                r_form = r_form - n * g_ref / s_c
            on_x = where(far, r_form + factor * values_of(by_gap[0]), on_x)
        columns = [factor, a_target, a_rival, on_x, per_token.zeros_like(on_x), far]
        return per_token.table_of(columns, self.x.dtype)


def squared_norms(vectors: Tensor) -> Values:
    """Of the rows, fp64."""
    return values_of(torch.linalg.vecdot(vectors, vectors))
