"""dX and dW from chunks whose gaps have become the products' coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from harmonic_triton.fused.problem import Wanted
from harmonic_triton.fused.pytorch.chunk import Chunk, Head
from harmonic_triton.fused.results import TokenResults, Upstream


class Gradients:
    """dX and dW over chunks, each only where it is asked for."""

    def __init__(self, head: Head, tokens: int, wanted: Wanted) -> None:
        new, (classes, width) = head.weight.new_zeros, head.weight.shape
        self.head, self.wanted = head, wanted
        self.dx = new(tokens, width) if wanted.x else new(0)
        self.dw, self.column_sum = (new(0), new(classes)) if wanted.w else (new(0), new(0))

    def add(self, chunk: Chunk, at: Tensor, results: TokenResults, upstream: Upstream, sums: Tensor) -> None:
        """Add a chunk whose ``gap`` holds its coefficients."""
        head, x, rival = self.head, chunk.x, results.rival.unsqueeze(1)
        nll, g = results.nll.double().unsqueeze(1), upstream.nll.double().unsqueeze(1)
        others, rival_p = -torch.expm1(-nll), (results.rival_score.double().unsqueeze(1) - nll).exp()
        if upstream.smooth is None:
            g_others, g_rival, scale = g * others, g * rival_p, g * chunk.to_prob
        else:
            g_smooth, mass = upstream.smooth.double().unsqueeze(1), results.share_sum.double().unsqueeze(1)
            v = head.smooth_weight.double()
            g_others = (g + g_smooth * mass) * others - g_smooth * results.share_rest.double().unsqueeze(1)
            g_rival = (g + g_smooth * mass) * rival_p - g_smooth * head.smooth_share(rival_p, v[rival])
            scale = chunk.to_prob
        if upstream.target_ref is not None:  # of dot products: x.w_c itself
            g_others = g_others - upstream.target_ref.double().unsqueeze(1)
        terms = chunk.terms(rival, g_others, g_rival, scale, sums)
        if self.wanted.x:
            dx = torch.mm(chunk.gap, head.weight).mul_(terms.scale)
            if terms.on_x is not None:
                dx.addcmul_(terms.on_x, x)
            for term in terms.direct:
                dx.addcmul_(term.a, term.along_x)
            self.dx[at] = dx
        if self.wanted.w:
            if len(self.dw):
                self.dw.addmm_(chunk.gap.t(), x * terms.scale)
            else:  # the first chunk
                self.dw = torch.mm(chunk.gap.t(), x * terms.scale)
            if terms.on_x is not None:
                self.column_sum.addmv_(chunk.gap.t(), terms.scale.squeeze(1))
            for term in terms.direct:
                _scatter_add(self.dw, term.classes.squeeze(1), term.along_w * -term.a)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(dX, dW) in the compute dtype; empty where not asked for."""
        if self.wanted.w and not len(self.dw):  # no token counts
            self.dw = torch.zeros_like(self.head.weight)
        elif self.wanted.w and self.head.n is not None:
            self.dw.addcmul_(self.column_sum.unsqueeze(1), self.head.weight, value=-1)
        return self.dx, self.dw


def _scatter_add(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values, in the same order every run."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would use atomics
