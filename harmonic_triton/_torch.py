"""The PyTorch backend: chunks of tokens inside a memory budget, leave-one-out numerics, never N x V whole.

With ``s_j = ||x - w_j||^2 + eps``, ``c`` the target and ``s_ref`` a squared distance, s_c unless other classes must be much
nearer: ``r_j = s_j/s_ref - 1``, log-scores ``-(n/2) log1p(r_j)``, relative to the target's (then ``z_j``) once ``base`` is
added, and ``nll = softplus(logsumexp_{j != c} z_j)``. Two classes of every row are measured directly, in fp64, and kept
out of the matrix products: the target and the *rival*, its nearest competitor.
With ``G_j = d loss / d z_j`` and ``A_j = -n G_j / s_j``: ``dX = sum_j A_j (x - w_j)``, ``dW_j = -A_j (x - w_j)``.
Cross-entropy is the same with ``z_j = x.w_j - x.w_c`` and ``dX = sum_j G_j w_j``, ``dW_j = G_j x``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from harmonic_triton._numerics import (
    IDENTICAL,
    SMALLEST_SQ,
    Rows,
    compute_dtype,
    exponent_gradient,
    full_fp32,
    mixed_nll,
    mixed_slope,
)

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for the chunk; about 1300 tokens at GPT-2's vocabulary
COLUMN_BLOCK = 512  # classes in one product x @ W.T on a CPU: 1.3 times the rate of the whole width at once
LINE = 16  # entries in a cache line; a chunk's rows are an odd number of lines apart: 2 to 4 % of the products' time
LARGE_SCORE = 2.0**20  # up to here fp32 rounds a log-score by a sixteenth at most
LOG2E = math.log2(math.e)  # exponentials are taken to base 2: on a CPU three times as fast
TILE_ELEMENTS = 2**20  # on a CPU the element-wise passes work on this many entries at a time: they stay in cache


@dataclass
class Head:
    """The classes and the options of one call."""

    weight: Tensor  # (V, D) compute dtype
    n: Tensor | None  # () harmonic exponent; None: the scores are dot products
    eps: float
    norms: Tensor  # (V,) ||w_j||^2, empty with dot products
    norm_range: tuple[Tensor, Tensor]  # () each: the smallest and the largest of them
    v: Tensor  # (V,) smoothing weights, empty where there are none
    alpha: float  # of the uniform mix, for the smoothing term

    @classmethod
    def of(cls, w: Tensor, n: Tensor | None, v: Tensor | None, eps: float, alpha: float) -> Head:
        weight = w.to(compute_dtype(w.dtype))
        norms, norm_range = weight.new_empty(0), (weight.new_zeros(()), weight.new_zeros(()))
        if n is not None:
            n, norms = n.to(weight.dtype), torch.linalg.vector_norm(weight, dim=1).square_()
            norm_range = torch.aminmax(norms)
        return cls(weight, n, eps, norms, norm_range, weight.new_empty(0) if v is None else v.to(weight.dtype), alpha)

    @property
    def mix(self) -> float:
        """alpha/V."""
        return self.alpha / len(self.weight)

    @property
    def smoothing(self) -> bool:
        """Whether the smoothing terms are wanted."""
        return len(self.v) > 0

    def share(self, p: Tensor, v: Tensor) -> Tensor:
        """v p/(p + alpha/V): how much of a class's smoothing weight its score can still move."""
        return v * p / (p + self.mix) if self.mix else v.expand_as(p)

    def chunk(self, x: Tensor, target: Tensor, ratio: Tensor, work: Tensor) -> Chunk:
        """Tokens against the classes, by this call's kind of score."""
        if self.n is None:
            return DotChunk(self, x, target, ratio, work)
        return HarmonicChunk(self, x, target, ratio, work, self.n)


class Terms(NamedTuple):
    """What of a chunk's gradients lies outside the products; per-token values are (C, 1)."""

    scale: Tensor  # multiplies a token's coefficients in the products
    on_x: Tensor | None  # dX has on_x * x
    special: list[
        tuple[Tensor, Tensor, Tensor, Tensor]
    ]  # of target and rival: a, class (C, 1); dX has a * third, dW -a * fourth


class Chunk(ABC):
    """Some tokens against every class. Per-token values are fp64 columns (C, 1); ``ratio`` is the only (C, V) array.

    A subclass fills ``ratio`` with what, once ``shift`` is added, falls as a class's score rises. Log-scores of ratios are
    relative to a reference of the token's own; ``base`` makes them relative to the target's, the z_j of ``Rows``.
    ``scan`` goes over it tile by tile; ``rows`` turns what it found into results, for one tile or for all at once.
    """

    rival: Tensor  # (C, 1) the best class beside the target
    offset: Tensor  # (C, 1) its log-score by the products, relative to the reference
    base: Tensor  # (C, 1) what a log-score relative to the reference lacks to be relative to the target's
    mass: Tensor  # (C, 1) sum of exp(z_j - offset) over every class but target and rival
    nll: Tensor  # (C, 1)
    rival_score: Tensor  # (C, 1) its log-score, measured directly
    share: Tensor  # (C, 1) what the coefficients must still be multiplied by to come from probabilities
    shift: Tensor  # (C, 1)
    target_ref: Tensor  # (C, 1) fp64, for Rows
    on_target: Tensor  # (C, 1) whether x lies on its class vector, where the loss is 0

    def __init__(self, head: Head, x: Tensor, target: Tensor, ratio: Tensor, work: Tensor) -> None:
        self.head, self.x, self.target, self.ratio, self.work = head, x, target.unsqueeze(1), ratio, work
        self.rival = torch.empty_like(self.target)
        self.offset, self.mass, self.nll, self.rival_score = x.new_empty(4, len(x), 1, dtype=torch.float64)
        self.share = x.new_ones(len(x), 1, dtype=torch.float64)

    def floor(self, tile: slice) -> Tensor | None:
        """(tokens, 1) ratios below which there is rounding noise only."""
        return None

    @abstractmethod
    def log_scores(self, ratio: Tensor, out: Tensor) -> Tensor:
        """Log-scores of ratios, relative to the reference."""

    @abstractmethod
    def exp_scores(self, ratio: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        """exp(log-score - offset) of ratios, at most 1 where ``offset`` (tokens, 1) is the best of them."""

    @abstractmethod
    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """z_r by direct computation (-inf where the target is the only class), and whether it cannot be told from 0/0."""

    @abstractmethod
    def spread(self, p: Tensor, tile: slice) -> Tensor | None:
        """Turn G_j into the products' coefficients, in place; returns the sums that Terms needs, (tokens, 2)."""

    @abstractmethod
    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        """``g_others`` is the sum of G_j over j != c, ``upstream`` what the coefficients are still to be multiplied by."""

    def tiles(self) -> Iterator[slice]:
        """Slices of tokens whose entries fit in cache."""
        rows, step = len(self.x), len(self.work[0])
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def begin(self, tile: slice) -> Tensor:
        """Complete the ratios; the target's is +inf."""
        return self.ratio[tile].add_(self.shift[tile]).scatter_(1, self.target[tile], math.inf)

    def others(self, rival: Tensor, offset: Tensor, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but the target and the rival, which get 0."""
        ratio = self.ratio[tile].scatter_(1, rival, math.inf)
        rest = self.exp_scores(ratio, offset, self.work[0, : len(ratio)])
        # the difference of two log-scores beyond this may round to more than an exponential holds; seldom needed, too
        if rest.device.type != "cpu" or not bool((offset.abs() < LARGE_SCORE).all()):
            rest.clamp_max_(1.0)
        return rest

    def scan(self, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but target and rival, which get 0."""
        ratio, floor = self.begin(tile), self.floor(tile)
        nearest, rival = _row_min(ratio)
        # seldom needed; a GPU clamps rather than wait for the answer
        if floor is not None and (floor.device.type != "cpu" or not bool((nearest >= floor).all())):
            torch.maximum(ratio, floor, out=ratio)
            nearest = torch.maximum(nearest, floor)
        offset = self.log_scores(nearest.double(), torch.empty_like(nearest, dtype=torch.float64))
        offset = offset.masked_fill_(offset == -math.inf, 0.0)  # V = 1
        rest = self.others(rival, offset, tile)
        self.rival[tile], self.offset[tile], self.mass[tile] = rival, offset, rest.sum(1, keepdim=True)
        return rest

    def rows(self, tile: slice, moments: bool) -> Rows:
        """Per-token results of what was scanned; ``complete`` adds the sums over the classes."""
        rival, offset, on_target = self.rival[tile], self.offset[tile], self.on_target[tile]
        rival_score, identical = self.measure_rival(rival, tile)
        offset = offset + self.base[tile]
        total = torch.logaddexp(rival_score, offset + self.mass[tile].log())
        # nobody else has a share where x is on its target, or a class at the same place has half
        rival_score = rival_score.masked_fill(on_target, -math.inf)
        rival_score = rival_score.masked_fill(on_target & identical & (rival != self.target[tile]), 0.0)
        nll = softplus(torch.where(on_target, rival_score, total), threshold=50.0)
        self.share[tile] = (offset - nll).clamp_max(80.0).exp().masked_fill(on_target, 0.0)  # finite in fp32
        self.nll[tile], self.rival_score[tile] = nll, rival_score
        rows = Rows.zeros(len(nll), self.x, moments, self.head.smoothing)
        rows.nll.copy_(nll.squeeze(1))
        rows.target_ref.copy_(self.target_ref[tile].squeeze(1))
        rows.rival.copy_(rival.squeeze(1))
        rows.rival_score.copy_(rival_score.squeeze(1))
        return rows

    def complete(self, tile: slice, rest: Tensor, rows: Rows) -> Tensor:
        """The sums that ``rows`` has room for; returns p_j of every class but target and rival."""
        head, target, rival = self.head, self.target[tile], self.rival[tile]
        p = rest * self.share[tile].to(rest.dtype)
        nll, rival_score, base = self.nll[tile], self.rival_score[tile], self.base[tile]
        no_rival = rival_score == -math.inf
        score = self.log_scores(self.ratio[tile], self.work[1, : len(p)])  # relative to the reference: it keeps its digits
        score.scatter_(1, rival, (rival_score - base).masked_fill(no_rival, 0.0).to(p.dtype))
        score.scatter_(1, target, -base.to(p.dtype))
        own_nll, base = nll - base, base.squeeze(1)  # -log p_j is own_nll less the score of j
        every = p.scatter(1, rival, (rival_score - nll).exp().to(p.dtype))
        every.scatter_(1, target, (-nll).exp().to(p.dtype))
        if len(rows.entropy):
            on_target = self.on_target[tile]
            rows.score_mean.copy_(((every * score).sum(1) + base).masked_fill_(on_target.squeeze(1), 0.0))
            apart = (nll - rival_score).masked_fill(no_rival, 0.0)
            entropy = (-nll).exp() * nll + (-apart).exp() * apart
            entropy += (p * (own_nll.to(p.dtype) - score)).sum(1, keepdim=True)
            rows.entropy.copy_(torch.where(on_target, nll, entropy.clamp_min_(0.0)).squeeze(1))
        if head.smoothing:
            share = head.share(every, head.v)
            share_sum, share_score = share.sum(1), (share * score).sum(1)
            rows.share_score.copy_(share_score + share_sum * base)
            rows.share_sum.copy_(share_sum)
            rows.share_rest.copy_(share.scatter(1, target, 0.0).sum(1))
            rows.smooth.copy_(-torch.log((every + head.mix) / (1 + head.alpha)) @ head.v if head.mix
                              else share_sum * own_nll.squeeze(1) - share_score)  # fmt: skip
        return p

    def forward(self, moments: bool, out: Rows) -> Iterator[tuple[slice, Tensor]]:
        """Scan tile by tile and fill ``out``, the tile's part at once where sums over the classes are wanted, else at the end.

        Yields each tile with a multiple of its p_j: p_j itself with smoothing, otherwise what is to be times ``share``.
        """
        sums = moments or self.head.smoothing
        for tile in self.tiles():
            rest = self.scan(tile)
            if sums:
                rows = self.rows(tile, moments)
                p = self.complete(tile, rest, rows)
                _store(out, tile, rows)
                if self.head.smoothing:
                    rest, self.share[tile] = p, 1.0
            yield tile, rest
        if not sums:
            _store(out, slice(None), self.rows(slice(None), moments))

    def coefficients(self, tile: slice, p: Tensor) -> Tensor | None:
        """ratio becomes the products' coefficients from p_j or a multiple of it, 0 at target and rival; their sums."""
        ratio = self.ratio[tile].scatter_(1, torch.cat([self.target[tile], self.rival[tile]], 1), 0.0)
        sums = self.spread(p, tile)
        ratio.copy_(p)
        return sums

    def smoothed(self, tile: slice, p: Tensor, rows: Rows, g: Tensor, g_smooth: Tensor) -> Tensor:
        """G_j, the upstream gradients in it, from p_j: with smoothing they are no multiple of each other."""
        slope = p * (g + g_smooth * rows.share_sum).unsqueeze(1)
        slope.sub_(g_smooth.unsqueeze(1) * self.head.share(p, self.head.v))
        return slope.scatter_(1, self.target[tile], 0.0).scatter_(1, self.rival[tile], 0.0)


class HarmonicChunk(Chunk):
    """Ratio r_j = s_j/s_ref - 1, log-scores -(n/2) log1p(r_j); the products take s_ref G_j/s_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, ratio: Tensor, work: Tensor, n: Tensor) -> None:
        super().__init__(head, x, target, ratio, work)
        info = torch.finfo(x.dtype)
        self.n = n
        self.x_sq = _squares(x)
        self.target_diff, self.target_ref = self.direct(self.target, slice(None))
        self.on_target = self.target_ref + head.eps == 0
        least, least_share = 100 * info.tiny, info.eps**2 * 1e-6
        self.target_sq = (self.target_ref + head.eps).clamp_min(least)  # s_c, able to divide
        self.target_sq = torch.maximum(self.target_sq, least_share * self.x_sq)
        # r_j = (u_j - u_ref)/s_ref with u_j = ||w_j||^2 - 2 x.w_j: ||x||^2 has dropped out. Relative to a target much
        # farther than other classes their distances would lose digits: some class is within twice ``near``.
        smallest, largest = (norm.double() for norm in head.norm_range)
        near = self.x_sq + smallest + head.eps
        self.scale = torch.where(self.target_sq > 4 * near, near, self.target_sq)
        self.scale = torch.maximum(self.scale, least_share * largest).clamp_min(least)  # ratios stay inside fp32
        self.by_target = self.scale == self.target_sq
        offset = torch.where(self.by_target, self.target_ref, self.scale - head.eps) - self.x_sq
        self.base = 0.5 * n.double() * torch.log(self.target_sq / self.scale)
        inverse = self.scale.reciprocal()
        left = x * (-2 * inverse).to(x.dtype)
        for part, columns in _column_blocks(ratio):
            torch.mm(left, head.weight[columns].t(), out=part)
        self.inverse = inverse.to(x.dtype)
        self.shift = (-offset * inverse).to(x.dtype)
        # below this the expansion is rounding noise
        floor = 4 * info.eps * torch.maximum(self.x_sq, self.scale)
        self.ratio_floor = ((floor - self.scale) * inverse).to(x.dtype)

    def direct(self, index: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """x - w_index (C, D) and its squared norm (C, 1) fp64, by differences."""
        diff = self.x[tile].double() - self.head.weight[index.squeeze(1)].double()
        return diff.to(self.x.dtype), _squares(diff)

    def begin(self, tile: slice) -> Tensor:
        self.ratio[tile].addr_(self.inverse[tile].squeeze(1), self.head.norms)
        return super().begin(tile)

    def floor(self, tile: slice) -> Tensor:
        return self.ratio_floor[tile]

    def log_scores(self, ratio: Tensor, out: Tensor) -> Tensor:
        return torch.log1p(ratio, out=out).mul_(-0.5 * self.n.to(out.dtype))

    def exp_scores(self, ratio: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        torch.log1p(ratio, out=out)
        less = (offset * -LOG2E).to(out.dtype)
        if self.n.device.type == "cpu":
            return torch.add(less, out, alpha=-0.5 * LOG2E * self.n.item(), out=out).exp2_()
        return out.mul_(-0.5 * LOG2E * self.n).add_(less).exp2_()

    def rival_distance(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """x - w_r, its s_r >= floor, and the floor."""
        diff, squared = self.direct(rival, tile)
        floor = IDENTICAL * (self.x_sq[tile] + self.head.norms[rival].double()) + SMALLEST_SQ
        return diff, torch.maximum(squared + self.head.eps, floor), floor

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        _, s, floor = self.rival_distance(rival, tile)
        score = -0.5 * self.n.double() * torch.log(s / self.target_sq[tile])
        return score.masked_fill(rival == self.target[tile], -math.inf), s <= floor

    def spread(self, p: Tensor, tile: slice) -> Tensor:
        ratio, work = self.ratio[tile], self.work[1, : len(p)]
        p.div_(torch.add(ratio, 1, out=work))
        return torch.stack([p.sum(1), torch.mul(p, ratio, out=work).sum(1)], 1)

    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        n, head, x, s_c, target = self.n.double(), self.head, self.x, self.target_sq, self.target
        rival_diff, s_r, floor = self.rival_distance(rival, slice(None))
        skip_rival = self.on_target | (s_r <= floor) | (rival == target)
        factor = (n / self.scale * upstream).masked_fill(self.on_target, 0.0)
        a_target = (n * g_others / s_c).masked_fill(self.on_target, 0.0)
        a_rival = (-n * g_rival / s_r).masked_fill(skip_rival, 0.0)
        # Far from both, sum_j A_j cancels: there it is taken in its r-form and the class vectors without x.
        far = (s_c > head.norms[target].double()) & (s_r > head.norms[rival].double()) & self.by_target
        r_form = (n * g_rival * (s_r - s_c) / (s_r * s_c)).masked_fill(skip_rival, 0.0) + factor * sums[:, 1:]
        on_x = torch.where(far, r_form, -factor * sums[:, :1]).to(x.dtype)
        special = [
            (a.to(x.dtype), index, torch.where(far, -head.weight[index.squeeze(1)], diff), diff)
            for a, index, diff in ((a_target, target, self.target_diff), (a_rival, rival, rival_diff))
        ]
        return Terms(factor.to(x.dtype), on_x, special)


class DotChunk(Chunk):
    """Cross-entropy: ratio x.w_c - x.w_j, z_j = -ratio; the products take G_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, ratio: Tensor, work: Tensor) -> None:
        super().__init__(head, x, target, ratio, work)
        own = self.direct(self.target, slice(None))
        self.target_ref = own.masked_fill(own.isinf(), math.nan)  # as log-softmax has it
        self.on_target = torch.zeros_like(self.target_ref, dtype=torch.bool)
        self.base = torch.zeros_like(self.target_ref)
        self.shift = self.target_ref.to(x.dtype)
        left = -x
        for part, columns in _column_blocks(ratio):
            torch.mm(left, head.weight[columns].t(), out=part)

    def direct(self, index: Tensor, tile: slice) -> Tensor:
        """x.w_index (C, 1) in fp64."""
        return torch.linalg.vecdot(self.x[tile].double(), self.head.weight[index.squeeze(1)].double(), dim=1).unsqueeze(
            1
        )

    def log_scores(self, ratio: Tensor, out: Tensor) -> Tensor:
        return torch.neg(ratio, out=out)

    def exp_scores(self, ratio: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        return torch.add((offset * -LOG2E).to(out.dtype), ratio, alpha=-LOG2E, out=out).exp2_()

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        score = self.direct(rival, tile) - self.target_ref[tile]
        no_rival = 0 * self.target_ref[tile] - math.inf  # NaN if the target's logit is
        return torch.where(rival == self.target[tile], no_rival, score), self.on_target[tile]

    def spread(self, p: Tensor, tile: slice) -> None:
        return None

    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        x, weight = self.x, self.head.weight
        g_rival = g_rival.masked_fill(rival == self.target, 0.0)
        special = [
            (a.to(x.dtype), index, -weight[index.squeeze(1)], x)
            for a, index in ((g_others, self.target), (-g_rival, rival))
        ]
        return Terms(upstream.to(x.dtype), None, special)


class Gradients:
    """dX and dW over chunks, each only where it is asked for."""

    def __init__(self, head: Head, tokens: int, need_x: bool, need_w: bool) -> None:
        new, (classes, width) = head.weight.new_zeros, head.weight.shape
        self.head = head
        self.need_x, self.need_w = need_x, need_w
        self.dx = new(tokens, width) if need_x else new(0)
        self.dw, self.column_sum = (new(0), new(classes)) if need_w else (new(0), new(0))

    def add(self, chunk: Chunk, at: Tensor, rows: Rows, g: Tensor, g_smooth: Tensor | None, sums: Tensor) -> None:
        """Add a chunk whose ``ratio`` holds its coefficients."""
        head, x, rival = self.head, chunk.x, rows.rival.unsqueeze(1)
        nll, g = rows.nll.double().unsqueeze(1), g.double().unsqueeze(1)
        others, rival_p = -torch.expm1(-nll), (rows.rival_score.double().unsqueeze(1) - nll).exp()
        if g_smooth is None:
            scale, on_x, special = chunk.terms(rival, g * others, g * rival_p, g * chunk.share, sums)
        else:
            g_smooth, mass = g_smooth.double().unsqueeze(1), rows.share_sum.double().unsqueeze(1)
            v = head.v.double()
            g_others = (g + g_smooth * mass) * others - g_smooth * rows.share_rest.double().unsqueeze(1)
            g_rival = (g + g_smooth * mass) * rival_p - g_smooth * head.share(rival_p, v[rival])
            scale, on_x, special = chunk.terms(rival, g_others, g_rival, chunk.share, sums)
        if self.need_x:
            dx = torch.mm(chunk.ratio, head.weight).mul_(scale)
            if on_x is not None:
                dx.addcmul_(on_x, x)
            for a, _, along, _ in special:
                dx.addcmul_(a, along)
            self.dx[at] = dx
        if self.need_w:
            if len(self.dw):
                self.dw.addmm_(chunk.ratio.t(), x * scale)
            else:  # the first chunk
                self.dw = torch.mm(chunk.ratio.t(), x * scale)
            if on_x is not None:
                self.column_sum.addmv_(chunk.ratio.t(), scale.squeeze(1))
            for a, index, _, along in special:
                _scatter_add(self.dw, index.squeeze(1), along * -a)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(dX, dW) in the compute dtype; empty where not asked for."""
        if self.need_w and not len(self.dw):  # no token counts
            self.dw = torch.zeros_like(self.head.weight)
        elif self.need_w and self.head.n is not None:
            self.dw.addcmul_(self.column_sum.unsqueeze(1), self.head.weight, value=-1)
        return self.dx, self.dw


def _squares(values: Tensor) -> Tensor:
    """Squared norms of the rows, (C, 1) fp64."""
    return values.double().square().sum(1, keepdim=True)


def _column_blocks(ratio: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """(C, V) in blocks of columns, each with its classes."""
    block = COLUMN_BLOCK if ratio.device.type == "cpu" else ratio.shape[1]
    for start in range(0, ratio.shape[1], block):
        columns = slice(start, start + block)
        yield ratio[:, columns], columns


def _row_min(values: Tensor) -> tuple[Tensor, Tensor]:
    """``values.min(1, keepdim=True)`` by blocks of columns: torch vectorises ``amin``, but no reduction with an index."""
    block, columns = 256, values.shape[1]
    if columns < 8 * block:
        return values.min(1, keepdim=True)
    whole = columns // block * block
    least = values[:, :whole].unflatten(1, (-1, block)).amin(2)
    if whole < columns:
        least = torch.cat([least, values[:, whole:].amin(1, keepdim=True)], 1)
    start = (least.argmin(1, keepdim=True) * block).clamp_max(columns - block)
    least, index = values.gather(1, start + torch.arange(block, device=values.device)).min(1, keepdim=True)
    return least, start + index


def _scatter_add(out: Tensor, index: Tensor, values: Tensor) -> None:
    """out[index] += values, in the same order every run."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would use atomics


def _chunks(head: Head, x: Tensor, target: Tensor, kept: Tensor, budget: int) -> Iterator[tuple[Tensor, Chunk]]:
    """The kept tokens in equal chunks that fit the budget, each with its indices."""
    classes = len(head.weight)
    most = max(1, min(len(kept), (budget or DEFAULT_BUDGET) // (classes * head.weight.element_size())))
    count = -(-len(kept) // most)
    size = -(-len(kept) // max(count, 1))
    tile = min(size, max(1, TILE_ELEMENTS // classes)) if x.device.type == "cpu" else size
    if count:
        pitch = (-(-classes // LINE) | 1) * LINE
        ratio, work = head.weight.new_empty(size, pitch)[:, :classes], head.weight.new_empty(2, tile, classes)
    for start in range(0, len(kept), max(size, 1)):
        at = kept[start : start + size]
        yield at, head.chunk(x[at].to(head.weight.dtype), target[at], ratio[: len(at)], work)


def rows_forward(
    x: Tensor,  # (N, D)
    w: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    n: Tensor | None,  # () harmonic exponent; None: dot products
    v: Tensor | None,  # (V,)
    eps: float,
    alpha: float,
    ignore_index: int,
    moments: bool,
    budget: int,
) -> Rows:
    """Per-token results; O(N + V) memory beside the chunk."""
    head = Head.of(w, n, v, eps, alpha)
    out = Rows.zeros(len(x), head.weight, moments, v is not None)
    with full_fp32():
        for at, chunk in _chunks(head, x, target, (target != ignore_index).nonzero().squeeze(1), budget):
            mine = Rows.zeros(len(at), head.weight, moments, v is not None)
            for _ in chunk.forward(moments, mine):
                pass
            _store(out, at, mine)
    return out


def _keep(out: Tensor, at: slice, sums: Tensor | None) -> None:
    if sums is not None:
        out[at] = sums


def _store(out: Rows, at: Tensor | slice, rows: Rows) -> None:
    for field, values in zip(out, rows, strict=True):
        if len(values):
            field[at] = values


def rows_backward(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    n: Tensor | None,
    v: Tensor | None,
    g: Tensor,  # (N,) upstream gradient of nll
    g_smooth: Tensor | None,  # (N,) of smooth
    rows: Rows,
    eps: float,
    alpha: float,
    ignore_index: int,
    need_x: bool,
    need_w: bool,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """(dX, dW), distances computed again. Tokens without upstream gradient contribute nothing, not even their NaN."""
    head = Head.of(w, n, v, eps, alpha)
    out = Gradients(head, len(x), need_x, need_w)
    used = g != 0 if g_smooth is None else (g != 0) | (g_smooth != 0)
    with full_fp32():
        for at, chunk in _chunks(head, x, target, (used & (target != ignore_index)).nonzero().squeeze(1), budget):
            mine, up = rows.select(at), g[at]
            up_smooth = None if g_smooth is None else g_smooth[at]
            sums = x.new_zeros(len(at), 2, dtype=head.weight.dtype)
            chunk.rival = mine.rival.unsqueeze(1)
            for tile in chunk.tiles():
                ratio, floor = chunk.begin(tile), chunk.floor(tile)
                if floor is not None:
                    torch.maximum(ratio, floor, out=ratio)
                nll = mine.nll[tile].double().unsqueeze(1) - chunk.base[tile]
                p = chunk.others(chunk.rival[tile], nll, tile).clamp_max_(1.0)
                if up_smooth is not None:
                    p = chunk.smoothed(tile, p, mine.select(tile), up[tile], up_smooth[tile])
                _keep(sums, tile, chunk.coefficients(tile, p))
            out.add(chunk, at, mine, up, up_smooth, sums)
    dx, dw = out.finish()
    return dx.to(x.dtype), dw.to(w.dtype)


def reduced_forward(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    n: Tensor | None,
    v: Tensor | None,
    a: Tensor,  # (N,) weight of a token's mixed nll in the loss
    b: Tensor | None,  # (N,) weight of its smoothing term
    eps: float,
    alpha: float,
    ignore_index: int,
    need_x: bool,
    need_w: bool,
    need_n: bool,
    moments: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Rows]:
    """(sum_i a_i mixed_nll_i + b_i smooth_i, dX, dW, dn, rows): one pass, three products instead of four.

    dX and dW are in the compute dtype: a gradient scaler's factor comes before the rounding to 16 bits.
    """
    head = Head.of(w, n, v, eps, alpha)
    out = Gradients(head, len(x), need_x, need_w)
    loss, dn = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    every = Rows.zeros(len(x), head.weight, moments, v is not None)
    with full_fp32():
        for at, chunk in _chunks(head, x, target, (target != ignore_index).nonzero().squeeze(1), budget):
            mine = Rows.zeros(len(at), head.weight, moments, v is not None)
            up_smooth = None if b is None else b[at].to(head.weight.dtype)
            sums = x.new_zeros(len(at), 2, dtype=head.weight.dtype)
            for tile, p in chunk.forward(moments, mine):
                if up_smooth is not None:
                    rows = mine.select(tile)
                    slope = a[at[tile]] * mixed_slope(rows.nll, alpha, len(w))
                    p = chunk.smoothed(tile, p, rows, slope, up_smooth[tile])
                if need_x or need_w:
                    _keep(sums, tile, chunk.coefficients(tile, p))
            up = (a[at] * mixed_slope(mine.nll, alpha, len(w))).to(head.weight.dtype)
            _store(every, at, mine)
            loss += (a[at].double() * mixed_nll(mine.nll.double(), alpha, len(w))).sum()
            if up_smooth is not None:
                loss += (up_smooth.double() * mine.smooth.double()).sum()
            if need_n and head.n is not None:
                dn += exponent_gradient(mine, head.n, up, up_smooth)
            if need_x or need_w:
                out.add(chunk, at, mine, up, up_smooth, sums)
    return loss.to(head.weight.dtype), *out.finish(), dn.to(head.weight.dtype), every
