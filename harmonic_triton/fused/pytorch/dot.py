"""Cross-entropy's scores: dot products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harmonic_triton.fused.pytorch import per_token
from harmonic_triton.fused.pytorch.chunk import EVERY, LOG2E, Chunk, Rooms, part
from harmonic_triton.fused.pytorch.head import Head
from harmonic_triton.fused.pytorch.per_token import Values, column_of, values_of


class DotChunk(Chunk):
    """Gap x.w_c - x.w_j, z_j = -gap; the products take G_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Rooms) -> None:
        super().__init__(head, x, target, gap, work)
        logit = self.direct(target, EVERY)
        self.target_ref = per_token.where(per_token.isinf(logit), math.nan, logit)  # as log-softmax has it
        self.base = per_token.zeros_like(logit)
        self.on_target, self.some_on_target = self.base != 0, False
        shift = self.target_ref
        if head.center is not None:
            shift = shift - values_of(torch.mv(x.double(), head.center.double()))
        self.shift = column_of(shift, x.dtype)
        self.products(-x)

    def direct(self, index: Tensor, tile: slice) -> Values:
        """x.w_index."""
        return values_of(torch.linalg.vecdot(part(self.x, tile).double(), self.head.rows(index).double()))

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

    def to_coefficients(self, p: Tensor, tile: slice) -> None:
        part(self.gap, tile).copy_(p)

    def terms(
        self, g_others: Values, g_rival: Values, g_ref: Values | None, upstream: Values, sums: list[Tensor | None]
    ) -> Tensor:
        zero = per_token.zeros_like(g_others)
        g_rival = per_token.where(self.no_rival(self.rival, EVERY), 0.0, g_rival)
        if g_ref is not None:  # of x.w_c itself, about no center
            g_others = g_others - g_ref
        return per_token.table_of(
            [upstream, g_others, -g_rival, zero, zero if g_ref is None else g_ref, zero], self.x.dtype
        )
