"""Some tokens against every class, and the numerics of both losses.

With ``s_j = ||x - w_j||^2 + eps``, ``c`` the target and ``s_ref`` a squared distance, s_c unless other classes must be much
nearer: the gap ``r_j = s_j/s_ref - 1``, log-scores ``-(n/2) log1p(r_j)``, relative to the target's (then ``z_j``) once
``base`` is added, and ``nll = softplus(logsumexp_{j != c} z_j)``. Two classes of every token are measured directly, in fp64,
and kept out of the matrix products: the target and the *rival*, its nearest competitor.
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

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.floors import NEAREST_SHARE, NEAREST_SQ, NormRange, divisor_floors, noise_share
from harmonic_triton.fused.problem import Operands, Problem
from harmonic_triton.fused.results import TokenResults, Upstream

COLUMN_BLOCK = 512  # classes in one product x @ W.T on a CPU: 1.3 times the rate of the whole width at once
LARGE_SCORE = 2.0**20  # up to here fp32 rounds a log-score by a sixteenth at most
LOG2E = math.log2(math.e)  # exponentials are taken to base 2: on a CPU three times as fast


@dataclass
class Head:
    """The classes and the options of one call."""

    weight: Tensor  # (V, D) compute dtype
    n: Tensor | None  # () harmonic exponent; None: the scores are dot products
    eps: float
    norms: Tensor  # (V,) ||w_j||^2, empty with dot products
    norm_range: NormRange | None  # None with dot products
    smooth_weight: Tensor  # (V,) v_j, empty where there is no smoothing
    mix: float  # alpha of the uniform mix, for the smoothing term

    @classmethod
    def of(cls, operands: Operands, problem: Problem) -> Head:
        """The head of a call."""
        weight, n = operands.w.to(compute_dtype(operands.w.dtype)), operands.n
        norms, norm_range = weight.new_empty(0), None
        if n is not None:
            n, norms = n.to(weight.dtype), torch.linalg.vector_norm(weight, dim=1).square_()
            norm_range = NormRange.of(norms)
        given = operands.smooth_weight
        smooth_weight = weight.new_empty(0) if given is None else given.to(weight.dtype)
        return cls(weight, n, problem.eps, norms, norm_range, smooth_weight, problem.mix)

    @property
    def mix_share(self) -> float:
        """alpha/V."""
        return self.mix / len(self.weight)

    @property
    def smoothing(self) -> bool:
        """Whether the smoothing terms are wanted."""
        return len(self.smooth_weight) > 0

    def smooth_share(self, p: Tensor, v: Tensor) -> Tensor:
        """v p/(p + alpha/V): how much of a class's smoothing weight its score can still move."""
        return v * p / (p + self.mix_share) if self.mix_share else v.expand_as(p)

    def chunk(self, x: Tensor, target: Tensor, gap: Tensor, work: Tensor) -> Chunk:
        """Tokens against the classes, by this call's kind of score."""
        if self.n is None:
            return DotChunk(self, x, target, gap, work)
        return HarmonicChunk(self, x, target, gap, work, self.n)


class DirectTerm(NamedTuple):
    """What one class, measured directly, adds: dX has ``a * along_x``, dW of the class ``-a * along_w``."""

    a: Tensor  # (C, 1)
    classes: Tensor  # (C, 1) whose
    along_x: Tensor  # (C, D)
    along_w: Tensor  # (C, D)


class Terms(NamedTuple):
    """What of a chunk's gradients lies outside the products; per-token values are (C, 1)."""

    scale: Tensor  # multiplies a token's coefficients in the products
    on_x: Tensor | None  # dX has on_x * x
    direct: list[DirectTerm]  # the target's and the rival's


class Chunk(ABC):
    """Some tokens against every class. Per-token values are fp64 columns (C, 1); ``gap`` is the only (C, V) array.

    A subclass fills ``gap`` with what, once ``shift`` is added, falls as a class's score rises. Log-scores of gaps are
    relative to a reference of the token's own; ``base`` makes them relative to the target's, the z_j of ``TokenResults``.
    ``scan`` goes over it tile by tile; ``results`` turns what it found into results, for one tile or for all at once.
    """

    rival: Tensor  # (C, 1) the best class beside the target
    offset: Tensor  # (C, 1) its log-score by the products, relative to the reference
    base: Tensor  # (C, 1) what a log-score relative to the reference lacks to be relative to the target's
    mass: Tensor  # (C, 1) sum of exp(z_j - offset) over every class but target and rival
    nll: Tensor  # (C, 1)
    rival_score: Tensor  # (C, 1) its log-score, measured directly
    to_prob: Tensor  # (C, 1) what the coefficients must still be multiplied by to come from probabilities
    shift: Tensor  # (C, 1)
    target_ref: Tensor  # (C, 1) fp64, for TokenResults
    on_target: Tensor  # (C, 1) whether x lies on its class vector, where the loss is 0

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Tensor) -> None:
        self.head, self.x, self.target, self.gap, self.work = head, x, target.unsqueeze(1), gap, work
        self.rival = torch.empty_like(self.target)
        self.offset, self.mass, self.nll, self.rival_score = x.new_empty(4, len(x), 1, dtype=torch.float64)
        self.to_prob = x.new_ones(len(x), 1, dtype=torch.float64)

    def noise_gap(self, tile: slice) -> Tensor | None:
        """(tokens, 1) gaps below which there is rounding noise only."""
        return None

    @abstractmethod
    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        """Log-scores of gaps, relative to the reference."""

    @abstractmethod
    def exp_scores(self, gap: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        """exp(log-score - offset) of gaps, at most 1 where ``offset`` (tokens, 1) is the best of them."""

    @abstractmethod
    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """z_r by direct computation (-inf where the target is the only class), and whether it cannot be told from 0/0."""

    @abstractmethod
    def to_coefficients(self, p: Tensor, tile: slice) -> Tensor | None:
        """Turn G_j into the products' coefficients, in place; returns the sums that Terms needs, (tokens, 2)."""

    @abstractmethod
    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        """``g_others`` is the sum of G_j over j != c, ``upstream`` what the coefficients are still to be multiplied by."""

    def tiles(self) -> Iterator[slice]:
        """Slices of tokens whose entries fit in cache."""
        rows, step = len(self.x), len(self.work[0])
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def complete_gaps(self, tile: slice) -> Tensor:
        """Complete the gaps; the target's is +inf."""
        return self.gap[tile].add_(self.shift[tile]).scatter_(1, self.target[tile], math.inf)

    def others(self, rival: Tensor, offset: Tensor, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but the target and the rival, which get 0."""
        gap = self.gap[tile].scatter_(1, rival, math.inf)
        rest = self.exp_scores(gap, offset, self.work[0, : len(gap)])
        # the difference of two log-scores beyond this may round to more than an exponential holds; seldom needed, too
        if rest.device.type != "cpu" or not bool((offset.abs() < LARGE_SCORE).all()):
            rest.clamp_max_(1.0)
        return rest

    def probabilities(self, tile: slice, nll: Tensor) -> Tensor:
        """p_j of every class but target and rival, which get 0, from known results."""
        gap, noise = self.complete_gaps(tile), self.noise_gap(tile)
        if noise is not None:
            torch.maximum(gap, noise, out=gap)
        offset = nll.double().unsqueeze(1) - self.base[tile]
        return self.others(self.rival[tile], offset, tile).clamp_max_(1.0)

    def scan(self, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but target and rival, which get 0."""
        gap, noise = self.complete_gaps(tile), self.noise_gap(tile)
        nearest, rival = row_min(gap)
        # seldom needed; a GPU clamps rather than wait for the answer
        if noise is not None and (noise.device.type != "cpu" or not bool((nearest >= noise).all())):
            torch.maximum(gap, noise, out=gap)
            nearest = torch.maximum(nearest, noise)
        offset = self.log_scores(nearest.double(), torch.empty_like(nearest, dtype=torch.float64))
        offset = offset.masked_fill_(offset == -math.inf, 0.0)  # V = 1
        rest = self.others(rival, offset, tile)
        self.rival[tile], self.offset[tile], self.mass[tile] = rival, offset, rest.sum(1, keepdim=True)
        return rest

    def results(self, tile: slice, want_scores: bool) -> TokenResults:
        """Per-token results of what was scanned; ``complete`` adds the sums over the classes."""
        rival, offset, on_target = self.rival[tile], self.offset[tile], self.on_target[tile]
        rival_score, identical = self.measure_rival(rival, tile)
        offset = offset + self.base[tile]
        total = torch.logaddexp(rival_score, offset + self.mass[tile].log())
        # nobody else has a share where x is on its target, or a class at the same place has half
        rival_score = rival_score.masked_fill(on_target, -math.inf)
        rival_score = rival_score.masked_fill(on_target & identical & (rival != self.target[tile]), 0.0)
        nll = softplus(torch.where(on_target, rival_score, total), threshold=50.0)
        self.to_prob[tile] = (offset - nll).clamp_max(80.0).exp().masked_fill(on_target, 0.0)  # finite in fp32
        self.nll[tile], self.rival_score[tile] = nll, rival_score
        results = TokenResults.zeros(len(nll), self.x, want_scores, self.head.smoothing)
        results.nll.copy_(nll.squeeze(1))
        results.target_ref.copy_(self.target_ref[tile].squeeze(1))
        results.rival.copy_(rival.squeeze(1))
        results.rival_score.copy_(rival_score.squeeze(1))
        return results

    def complete(self, tile: slice, rest: Tensor, results: TokenResults) -> Tensor:
        """The sums that ``results`` has room for; returns p_j of every class but target and rival."""
        head, target, rival = self.head, self.target[tile], self.rival[tile]
        p = rest * self.to_prob[tile].to(rest.dtype)
        nll, rival_score, base = self.nll[tile], self.rival_score[tile], self.base[tile]
        no_rival = rival_score == -math.inf
        score = self.log_scores(self.gap[tile], self.work[1, : len(p)])  # relative to the reference: with all digits
        score.scatter_(1, rival, (rival_score - base).masked_fill(no_rival, 0.0).to(p.dtype))
        score.scatter_(1, target, -base.to(p.dtype))
        own_nll, base = nll - base, base.squeeze(1)  # -log p_j is own_nll less the score of j
        every = p.scatter(1, rival, (rival_score - nll).exp().to(p.dtype))
        every.scatter_(1, target, (-nll).exp().to(p.dtype))
        if len(results.entropy):
            on_target = self.on_target[tile]
            apart = (nll - rival_score).masked_fill(no_rival, 0.0)
            rival_p = (rival_score - nll).exp()
            mean = self.mass[tile] * self.to_prob[tile] * self.base[tile]
            mean += rival_p * rival_score.masked_fill(no_rival, 0.0)
            mean += (p * score).sum(1, keepdim=True)  # the target has no part in it, whose p would round ``base``
            results.score_mean.copy_(mean.masked_fill_(on_target, 0.0).squeeze(1))
            entropy = (-nll).exp() * nll + (-apart).exp() * apart
            entropy += (p * (own_nll.to(p.dtype) - score)).sum(1, keepdim=True)
            results.entropy.copy_(torch.where(on_target, nll, entropy.clamp_min_(0.0)).squeeze(1))
        if head.smoothing:
            smooth_share = head.smooth_share(every, head.smooth_weight)
            others = smooth_share.scatter(1, target, 0.0)  # the target's score is 0, which adding ``base`` would round
            share_rest, share_score = others.sum(1), (others * score).sum(1)
            target_share = smooth_share.gather(1, target).squeeze(1)
            results.share_score.copy_(share_score + share_rest * base)
            results.share_sum.copy_(target_share + share_rest)
            results.share_rest.copy_(share_rest)
            results.smooth.copy_(-torch.log((every + head.mix_share) / (1 + head.mix)) @ head.smooth_weight if head.mix_share
                              else share_rest * own_nll.squeeze(1) - share_score + target_share * nll.squeeze(1))  # fmt: skip
        return p

    def forward(self, want_scores: bool, out: TokenResults) -> Iterator[tuple[slice, Tensor]]:
        """Scan tile by tile and fill ``out``, the tile's part at once where sums over the classes are wanted, else at the end.

        Yields each tile with a multiple of its p_j: p_j itself with smoothing, otherwise what is to be times ``to_prob``.
        """
        sums = want_scores or self.head.smoothing
        for tile in self.tiles():
            rest = self.scan(tile)
            if sums:
                results = self.results(tile, want_scores)
                p = self.complete(tile, rest, results)
                out.store(tile, results)
                if self.head.smoothing:
                    rest, self.to_prob[tile] = p, 1.0
            yield tile, rest
        if not sums:
            out.store(slice(None), self.results(slice(None), want_scores))

    def coefficients(self, tile: slice, p: Tensor) -> Tensor | None:
        """gap becomes the products' coefficients from p_j or a multiple of it, 0 at target and rival; their sums."""
        gap = self.gap[tile].scatter_(1, torch.cat([self.target[tile], self.rival[tile]], 1), 0.0)
        sums = self.to_coefficients(p, tile)
        gap.copy_(p)
        return sums

    def smoothed(self, tile: slice, p: Tensor, results: TokenResults, upstream: Upstream) -> Tensor:
        """G_j, the upstream gradients in it, from p_j: with smoothing they are no multiple of each other."""
        g = upstream.nll
        g_smooth = torch.zeros_like(g) if upstream.smooth is None else upstream.smooth
        slope = p * (g + g_smooth * results.share_sum).unsqueeze(1)
        slope.sub_(g_smooth.unsqueeze(1) * self.head.smooth_share(p, self.head.smooth_weight))
        return slope.scatter_(1, self.target[tile], 0.0).scatter_(1, self.rival[tile], 0.0)


class HarmonicChunk(Chunk):
    """Gap r_j = s_j/s_ref - 1, log-scores -(n/2) log1p(r_j); the products take s_ref G_j/s_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Tensor, n: Tensor) -> None:
        super().__init__(head, x, target, gap, work)
        self.n = n
        self.x_sq = squared_norms(x)
        self.target_diff, self.target_ref = self.direct(self.target, slice(None))
        self.on_target = self.target_ref + head.eps == 0
        floors = divisor_floors(x.dtype)
        self.target_sq = (self.target_ref + head.eps).clamp_min(floors.least)  # s_c, able to divide
        # r_j = (u_j - u_ref)/s_ref with u_j = ||w_j||^2 - 2 x.w_j: ||x||^2 has dropped out. Relative to a target much
        # farther than other classes their distances would lose digits: some class is within twice ``near``.
        smallest, median, largest = (norm.double() for norm in head.norm_range or NormRange.of(head.norms))
        near = self.x_sq + smallest + head.eps
        self.scale = torch.where(self.target_sq > 4 * near, near, self.target_sq)
        self.scale = torch.maximum(self.scale, floors.near_share * torch.maximum(near, median))
        self.scale = torch.maximum(self.scale, floors.largest_share * largest).clamp_min(floors.least)
        self.by_target = self.scale == self.target_sq
        offset = torch.where(self.by_target, self.target_ref, self.scale - head.eps) - self.x_sq
        self.base = 0.5 * n.double() * torch.log(self.target_sq / self.scale)
        inverse = self.scale.reciprocal()
        left = x * (-2 * inverse).to(x.dtype)
        for part, columns in column_blocks(gap):
            torch.mm(left, head.weight[columns].t(), out=part)
        self.inverse = inverse.to(x.dtype)
        self.shift = (-offset * inverse).to(x.dtype)
        # below this the expansion is rounding noise
        noise = noise_share(x.dtype) * torch.maximum(self.x_sq, self.scale)
        self.noise = ((noise - self.scale) * inverse).to(x.dtype)

    def direct(self, index: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """x - w_index (C, D) and its squared norm (C, 1) fp64, by differences."""
        diff = self.x[tile].double() - self.head.weight[index.squeeze(1)].double()
        return diff.to(self.x.dtype), squared_norms(diff)

    def complete_gaps(self, tile: slice) -> Tensor:
        self.gap[tile].addr_(self.inverse[tile].squeeze(1), self.head.norms)
        return super().complete_gaps(tile)

    def noise_gap(self, tile: slice) -> Tensor:
        return self.noise[tile]

    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        return torch.log1p(gap, out=out).mul_(-0.5 * self.n.to(out.dtype))

    def exp_scores(self, gap: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        torch.log1p(gap, out=out)
        less = (offset * -LOG2E).to(out.dtype)
        if self.n.device.type == "cpu":
            return torch.add(less, out, alpha=-0.5 * LOG2E * self.n.item(), out=out).exp2_()
        return out.mul_(-0.5 * LOG2E * self.n).add_(less).exp2_()

    def rival_distance(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """x - w_r, its s_r >= floor, and the floor."""
        diff, squared = self.direct(rival, tile)
        floor = NEAREST_SHARE * (self.x_sq[tile] + self.head.norms[rival].double()) + NEAREST_SQ
        return diff, torch.maximum(squared + self.head.eps, floor), floor

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        _, s, floor = self.rival_distance(rival, tile)
        score = -0.5 * self.n.double() * torch.log(s / self.target_sq[tile])
        return score.masked_fill(rival == self.target[tile], -math.inf), s <= floor

    def to_coefficients(self, p: Tensor, tile: slice) -> Tensor:
        gap, work = self.gap[tile], self.work[1, : len(p)]
        p.div_(torch.add(gap, 1, out=work))
        return torch.stack([p.sum(1), torch.mul(p, gap, out=work).sum(1)], 1)

    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        n, head, x, s_c, target = self.n.double(), self.head, self.x, self.target_sq, self.target
        rival_diff, s_r, floor = self.rival_distance(rival, slice(None))
        skip_rival = self.on_target | (s_r <= floor) | (rival == target)
        largest = torch.finfo(x.dtype).max / 32  # beyond it, what it multiplies is 0
        factor = (n / self.scale * upstream).clamp(-largest, largest).masked_fill(self.on_target, 0.0)
        a_target = (n * g_others / s_c).masked_fill(self.on_target, 0.0)
        a_rival = (-n * g_rival / s_r).masked_fill(skip_rival, 0.0)
        # Far from both, sum_j A_j cancels: there it is taken in its r-form and the class vectors without x.
        far = (s_c > head.norms[target].double()) & (s_r > head.norms[rival].double()) & self.by_target
        r_form = (n * g_rival * (s_r - s_c) / (s_r * s_c)).masked_fill(skip_rival, 0.0) + factor * sums[:, 1:]
        on_x = torch.where(far, r_form, -factor * sums[:, :1]).to(x.dtype)
        direct = [
            DirectTerm(a.to(x.dtype), index, torch.where(far, -head.weight[index.squeeze(1)], diff), diff)
            for a, index, diff in ((a_target, target, self.target_diff), (a_rival, rival, rival_diff))
        ]
        return Terms(factor.to(x.dtype), on_x, direct)


class DotChunk(Chunk):
    """Cross-entropy: gap x.w_c - x.w_j, z_j = -gap; the products take G_j."""

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Tensor) -> None:
        super().__init__(head, x, target, gap, work)
        logit = self.direct(self.target, slice(None))
        self.target_ref = logit.masked_fill(logit.isinf(), math.nan)  # as log-softmax has it
        self.on_target = torch.zeros_like(self.target_ref, dtype=torch.bool)
        self.base = torch.zeros_like(self.target_ref)
        self.shift = self.target_ref.to(x.dtype)
        left = -x
        for part, columns in column_blocks(gap):
            torch.mm(left, head.weight[columns].t(), out=part)

    def direct(self, index: Tensor, tile: slice) -> Tensor:
        """x.w_index (C, 1) in fp64."""
        w = self.head.weight[index.squeeze(1)].double()
        dot: Tensor = torch.linalg.vecdot(self.x[tile].double(), w, dim=1)
        return dot.unsqueeze(1)

    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        return torch.neg(gap, out=out)

    def exp_scores(self, gap: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        return torch.add((offset * -LOG2E).to(out.dtype), gap, alpha=-LOG2E, out=out).exp2_()

    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        score = self.direct(rival, tile) - self.target_ref[tile]
        no_rival = 0 * self.target_ref[tile] - math.inf  # NaN if the target's logit is
        return torch.where(rival == self.target[tile], no_rival, score), self.on_target[tile]

    def to_coefficients(self, p: Tensor, tile: slice) -> None:
        return None

    def terms(self, rival: Tensor, g_others: Tensor, g_rival: Tensor, upstream: Tensor, sums: Tensor) -> Terms:
        x, weight = self.x, self.head.weight
        g_rival = g_rival.masked_fill(rival == self.target, 0.0)
        direct = [
            DirectTerm(a.to(x.dtype), index, -weight[index.squeeze(1)], x)
            for a, index in ((g_others, self.target), (-g_rival, rival))
        ]
        return Terms(upstream.to(x.dtype), None, direct)


def squared_norms(values: Tensor) -> Tensor:
    """Squared norms of the rows, (C, 1) fp64."""
    return values.double().square().sum(1, keepdim=True)


def column_blocks(gap: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """(C, V) in blocks of columns, each with its classes."""
    block = COLUMN_BLOCK if gap.device.type == "cpu" else gap.shape[1]
    for start in range(0, gap.shape[1], block):
        columns = slice(start, start + block)
        yield gap[:, columns], columns


def row_min(values: Tensor) -> tuple[Tensor, Tensor]:
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
