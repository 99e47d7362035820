"""Some tokens against every class, and the numerics of both losses.

With ``s_j = ||x - w_j||^2 + eps``, ``c`` the target and ``s_ref`` a squared distance, s_c unless other classes must be much
nearer: the gap ``r_j = s_j/s_ref - 1``, log-scores ``-(n/2) log1p(r_j)``, relative to the target's (then ``z_j``) once
``base`` is added, and ``nll = softplus(logsumexp_{j != c} z_j)``. Two classes of every token are measured directly and kept
out of the matrix products: the target and the *rival*, its nearest competitor.
With ``G_j = d loss / d z_j`` and ``A_j = -n G_j / s_j``: ``dX = sum_j A_j (x - w_j)``, ``dW_j = -A_j (x - w_j)``.
Cross-entropy is the same with ``z_j = x.w_j - x.w_c`` and ``dX = sum_j G_j w_j``, ``dW_j = G_j x``.

Neither changes where the class vectors' center is taken from x and every w_j (from the w_j alone with dot products): the
products are of vectors about the center, so that a large common mean costs no digits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonic_triton.fused.pytorch import per_token
from harmonic_triton.fused.pytorch.head import EVERY, Head
from harmonic_triton.fused.pytorch.per_token import Values, column_of, tensor_of, values_of
from harmonic_triton.fused.results import TokenResults, Upstream

LARGE_SCORE = 2.0**20  # up to here fp32 rounds a log-score by a sixteenth at most
LOG2E = math.log2(math.e)  # exponentials are taken to base 2: on a CPU three times as fast
FEW_ELEMENTS = 2**13  # of which a minimum takes no longer than a handful of calls

Sums = tuple[Tensor, ...]  # (tokens,) each
Rooms = tuple[Tensor, ...]  # two of a tile's size
Then = Callable[[slice, Tensor, "TokenResults | None"], None]


class Terms(NamedTuple):
    """What a chunk's gradients need beside its coefficients: per-token factors (C, 1) in the compute dtype, all but
    ``far`` linear in the upstream gradient. Target and rival, measured directly, have coefficients of their own.
    """

    scale: Tensor  # multiplies a token's coefficients in the products
    direct: Tensor  # (2, C, 1) of the target and the rival: dX has direct * (x - w_c), dW_c the opposite; with dot
    # products -direct * w_c and -direct * x
    on_x: Tensor  # dX has on_x * x; 0 with dot products
    on_center: Tensor  # dX has on_center * center; 0 but with dot products
    far: Tensor | None  # 1 where dX takes target and rival without x, which on_x has then; None: nowhere

    @classmethod
    def of(cls, table: Tensor, g: Tensor | None = None) -> Terms:
        """Those of a table (C, 6), times the upstream gradient of what it was made for."""
        rows = table.t().unsqueeze(2)
        far = rows[5] if not table.is_cpu or table.numpy()[:, 5].any() else None
        if g is None or (g.is_cpu and g.item() == 1):
            return cls(rows[0], rows[1:3], rows[3], rows[4], far)
        limit = torch.finfo(table.dtype).max / 32  # what is multiplied by more is 0
        rows = rows * g
        scale = rows[0].clamp(-limit, limit) + 0 * g  # NaN where g is not finite: a gradient scaler must see it
        return cls(scale, rows[1:3], rows[3], rows[4], far)


def columns(matrix: Tensor, classes: slice) -> Tensor:
    """(C, classes) of some of the classes."""
    return matrix if classes is EVERY else matrix[:, classes]


def first(matrix: Tensor, rows: int) -> Tensor:
    """(rows, classes) of a room for as many or more."""
    return matrix if matrix.shape[0] == rows else matrix[:rows]


def part(values: Any, tile: slice | Tensor) -> Any:
    """Those of a tile."""
    return values if tile is EVERY else values[tile]


class Chunk(ABC):
    """Some tokens against every class. Per-token values are (C,) and fp64 (``per_token``); ``gap`` is the only (C, V) array.

    A subclass fills ``gap`` with what, once ``shift`` is added, falls as a class's score rises. Log-scores of gaps are
    relative to a reference of the token's own; ``base`` makes them relative to the target's, the z_j of ``TokenResults``.
    ``scan`` goes over it tile by tile; ``results`` turns what it found into results, for one tile or for all at once.
    """

    rival: Tensor  # (C,) the best class beside the target
    offset: Values  # its log-score by the products, relative to the reference
    base: Values  # what a log-score relative to the reference lacks to be relative to the target's
    mass: Values  # sum of exp(z_j - offset) over every class but target and rival
    nll: Values
    rival_score: Values  # its log-score, measured directly
    to_prob: Values  # what the coefficients must still be multiplied by to come from probabilities
    shift: Tensor  # (C, 1) compute dtype
    target_ref: Values  # for TokenResults
    on_target: Values  # whether x lies on its class vector, where the loss is 0
    some_on_target: bool

    def __init__(self, head: Head, x: Tensor, target: Tensor, gap: Tensor, work: Rooms) -> None:
        self.head, self.x, self.target, self.gap, self.work = head, x, target, gap, work
        self.target_values = values_of(target)
        if len(x) > work[0].shape[0]:  # several tiles fill them
            self.rival = torch.empty_like(target)
            for name in ("offset", "mass", "nll", "rival_score", "to_prob"):
                setattr(self, name, per_token.empty(len(x), x.device))

    def noise_gap(self, tile: slice) -> Tensor | None:
        """(tokens, 1) gaps below which there is rounding noise only."""
        return None

    @abstractmethod
    def log_scores(self, gap: Tensor, out: Tensor) -> Tensor:
        """Log-scores of gaps, relative to the reference."""

    @abstractmethod
    def best_score(self, gap: Values) -> Values:
        """The same of one gap of each token."""

    @abstractmethod
    def exp_scores(self, gap: Tensor, offset: Values, out: Tensor) -> Tensor:
        """exp(log-score - offset) of gaps, at most 1 where ``offset`` is the best of them."""

    @abstractmethod
    def measure_rival(self, rival: Tensor, tile: slice) -> tuple[Values, Values]:
        """z_r by direct computation (-inf where the target is the only class), and whether it cannot be told from 0/0."""

    @abstractmethod
    def to_coefficients(self, p: Tensor, tile: slice) -> Sums:
        """Turn G_j into the products' coefficients, in ``gap``; returns the sums that ``terms`` needs."""

    @abstractmethod
    def terms(
        self, g_others: Values, g_rival: Values, g_ref: Values | None, upstream: Values, sums: list[Sums]
    ) -> Tensor:
        """The table of ``Terms``. ``g_others`` is the sum of G_j over j != c, ``g_ref`` the upstream gradient of
        ``target_ref``, ``upstream`` what the coefficients are still to be multiplied by."""

    def products(self, left: Tensor) -> None:
        """gap = left @ W.T, W about its center."""
        if self.head.plain and (len(left) == 1 or not left.is_cpu):
            torch.mm(left, self.head.w.t(), out=self.gap)
            return
        for classes in self.head.blocks():
            torch.mm(left, self.head.block(classes).t(), out=columns(self.gap, classes))

    def tiles(self) -> list[slice]:
        """Slices of tokens whose entries fit in cache."""
        rows, step = self.x.shape[0], self.work[0].shape[0]
        if rows <= step:
            return [EVERY]
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def keep(self, tile: slice, **values: Any) -> None:
        """Per-token values of a tile."""
        for name, value in values.items():
            if tile is EVERY:
                setattr(self, name, value)
            else:
                getattr(self, name)[tile] = value

    def complete_gaps(self, tile: slice) -> Tensor:
        """Complete the gaps; the target's is +inf."""
        gap: Tensor = part(self.gap, tile)
        return gap.add_(part(self.shift, tile)).scatter_(1, part(self.target, tile).unsqueeze(1), math.inf)

    def others(self, rival: Tensor, offset: Values, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but the target and the rival, which get 0."""
        gap = part(self.gap, tile).scatter_(1, rival.unsqueeze(1), math.inf)
        rest = self.exp_scores(gap, offset, first(self.work[0], gap.shape[0]))
        # the difference of two log-scores beyond this may round to more than an exponential holds; seldom needed, too
        if per_token.any_of(~(abs(offset) < LARGE_SCORE)):
            rest.clamp_max_(1.0)
        return rest

    def probabilities(self, tile: slice) -> Tensor:
        """p_j of every class but target and rival, which get 0, from known results."""
        gap, noise = self.complete_gaps(tile), self.noise_gap(tile)
        if noise is not None:
            torch.maximum(gap, noise, out=gap)
        offset = part(self.nll, tile) - part(self.base, tile)
        return self.others(part(self.rival, tile), offset, tile).clamp_max_(1.0)

    def scan(self, tile: slice) -> Tensor:
        """exp(z_j - offset) for every class but target and rival, which get 0."""
        gap, noise = self.complete_gaps(tile), self.noise_gap(tile)
        nearest, rival = row_min(gap)
        # seldom needed; a GPU clamps rather than wait for the answer
        if noise is not None and (noise.device.type != "cpu" or not bool((nearest >= noise).all())):
            torch.maximum(gap, noise, out=gap)
            nearest = torch.maximum(nearest, noise)
        offset = self.best_score(values_of(nearest))
        offset = per_token.where(offset == -math.inf, 0.0, offset)  # V = 1
        rival = rival.squeeze(1)
        rest = self.others(rival, offset, tile)
        self.keep(tile, rival=rival, offset=offset, mass=values_of(rest.sum(1)))
        return rest

    def results(self, tile: slice) -> TokenResults:
        """Per-token results of what was scanned; ``complete`` adds the sums over the classes."""
        rival, on_target = part(self.rival, tile), part(self.on_target, tile)
        rival_score, identical = self.measure_rival(rival, tile)
        offset = part(self.offset, tile) + part(self.base, tile)
        total = per_token.logaddexp(rival_score, offset + per_token.log(part(self.mass, tile)))
        if self.some_on_target:  # nobody else has a share there, or a class at the same place has half
            twin = identical & ~self.no_rival(rival, tile)
            rival_score = per_token.where(on_target, per_token.where(twin, 0.0, -math.inf), rival_score)
            total = per_token.where(on_target, rival_score, total)
        nll = per_token.softplus(total)
        to_prob = self.off_target(per_token.exp(per_token.at_most(offset - nll, 80.0)), tile)  # finite in fp32
        to_prob = per_token.where(part(self.mass, tile) == 0, 0.0, to_prob)  # of nothing; finite times x, too
        self.keep(tile, nll=nll, rival_score=rival_score, to_prob=to_prob)
        dtype = self.x.dtype
        target_ref = tensor_of(part(self.target_ref, tile), dtype)
        nll, rival_score = tensor_of(nll, dtype), tensor_of(rival_score, dtype)
        none = self.x.new_empty(0)
        return TokenResults(nll, none, none, none, none, none, none, target_ref, rival_score, rival)

    def no_rival(self, rival: Tensor, tile: slice) -> Values:
        """Whether no class but the target was found: V = 1, or every gap infinite."""
        return values_of(rival) == part(self.target_values, tile)

    def off_target(self, values: Values, tile: slice = EVERY) -> Values:
        """The values, 0 where x lies on its class vector."""
        return per_token.where(part(self.on_target, tile), 0.0, values) if self.some_on_target else values

    def complete(
        self, tile: slice, rest: Tensor, results: TokenResults, want_scores: bool
    ) -> tuple[Tensor, TokenResults]:
        """p_j of every class but target and rival, and the results with the sums over the classes."""
        head, target, rival = self.head, part(self.target, tile).unsqueeze(1), part(self.rival, tile).unsqueeze(1)
        p = rest * column_of(part(self.to_prob, tile), rest.dtype)
        columns = (self.nll, self.rival_score, self.base, self.mass, self.to_prob)
        nll, rival_score, base, mass, to_prob = (column_of(part(v, tile), torch.float64) for v in columns)
        no_rival = rival_score == -math.inf
        gap = part(self.gap, tile)
        score = self.log_scores(gap, first(self.work[1], p.shape[0]))  # relative to the reference: with all digits
        score.scatter_(1, rival, (rival_score - base).masked_fill(no_rival, 0.0).to(p.dtype))
        score.scatter_(1, target, -base.to(p.dtype))
        own_nll = nll - base  # -log p_j is own_nll less the score of j
        if want_scores:
            on_target = torch.as_tensor(part(self.on_target, tile)).unsqueeze(1)
            apart = (nll - rival_score).masked_fill(no_rival, 0.0)
            rival_p = (rival_score - nll).exp()
            mean = mass * to_prob * base
            mean += rival_p * rival_score.masked_fill(no_rival, 0.0)
            mean += (p * score).sum(1, keepdim=True)  # the target has no part in it, whose p would round ``base``
            entropy = (-nll).exp() * nll + (-apart).exp() * apart
            entropy += (p * (own_nll.to(p.dtype) - score)).sum(1, keepdim=True)
            results = results._replace(
                score_mean=mean.masked_fill_(on_target, 0.0).squeeze(1).to(p.dtype),
                entropy=torch.where(on_target, nll, entropy.clamp_min_(0.0)).squeeze(1).to(p.dtype),
            )
        if head.smoothing:
            base = base.squeeze(1)
            every = p.scatter(1, rival, (rival_score - nll).exp().to(p.dtype))
            every.scatter_(1, target, (-nll).exp().to(p.dtype))
            smooth_share = head.smooth_share(every, head.smooth_weight)
            others = smooth_share.scatter(1, target, 0.0)  # the target's score is 0, which adding ``base`` would round
            share_rest, share_score = others.sum(1), (others * score).sum(1)
            target_share = smooth_share.gather(1, target).squeeze(1)
            smooth = (-torch.log((every + head.mix_share) / (1 + head.mix)) @ head.smooth_weight if head.mix_share
                      else share_rest * own_nll.squeeze(1) - share_score + target_share * nll.squeeze(1))  # fmt: skip
            fields = (smooth, share_score + share_rest * base, target_share + share_rest, share_rest)
            smooth, share_score, share_sum, share_rest = (values.to(p.dtype) for values in fields)
            results = results._replace(
                smooth=smooth, share_score=share_score, share_sum=share_sum, share_rest=share_rest
            )
        return p, results

    def forward(self, want_scores: bool, then: Then | None = None) -> TokenResults:
        """Scan tile by tile: the tile's results at once where sums over the classes are wanted, else all at the end.

        ``then`` is called with each tile, a multiple of its p_j, and its results if they are there: p_j itself with
        smoothing, otherwise what is to be times ``to_prob``.
        """
        sums, parts = want_scores or self.head.smoothing, []
        for tile in self.tiles():
            rest, results = self.scan(tile), None
            if sums:
                p, results = self.complete(tile, rest, self.results(tile), want_scores)
                parts.append(results)
                if self.head.smoothing:
                    rest = p
                    self.keep(tile, to_prob=per_token.zeros_like(part(self.to_prob, tile)) + 1.0)
            if then is not None:
                then(tile, rest, results)
        if not sums:
            return self.results(EVERY)
        return parts[0] if len(parts) == 1 else TokenResults._make(map(torch.cat, zip(*parts, strict=True)))

    def smoothed(self, tile: slice, p: Tensor, results: TokenResults, upstream: Upstream) -> Tensor:
        """G_j, the upstream gradients in it, from p_j: with smoothing they are no multiple of each other."""
        g = upstream.nll
        g_smooth = torch.zeros_like(g) if upstream.smooth is None else upstream.smooth
        slope = p * (g + g_smooth * results.share_sum).unsqueeze(1)
        slope.sub_(g_smooth.unsqueeze(1) * self.head.smooth_share(p, self.head.smooth_weight))
        for index in (part(self.target, tile), part(self.rival, tile)):
            slope.scatter_(1, index.unsqueeze(1), 0.0)
        return slope

    def gradient_terms(self, results: TokenResults, upstream: Upstream, sums: list[Sums]) -> Tensor:
        """The table of ``Terms`` for the coefficients that ``gap`` holds by now; ``sums`` are those of the tiles."""
        nll, g = self.nll, values_of(upstream.nll)
        others, rival_p = -per_token.expm1(-nll), per_token.exp(self.rival_score - nll)
        if upstream.smooth is None:
            g_others, g_rival, scale = g * others, g * rival_p, g * self.to_prob
        else:
            g_smooth, mass = values_of(upstream.smooth), values_of(results.share_sum)
            v = values_of(self.head.smooth_weight.index_select(0, self.rival))
            share = v * rival_p / (rival_p + self.head.mix_share) if self.head.mix_share else v
            g_others = (g + g_smooth * mass) * others - g_smooth * values_of(results.share_rest)
            g_rival = (g + g_smooth * mass) * rival_p - g_smooth * share
            scale = self.to_prob
        g_ref = None if upstream.target_ref is None else values_of(upstream.target_ref)
        return self.terms(g_others, g_rival, g_ref, scale, sums)


def row_min(values: Tensor) -> tuple[Tensor, Tensor]:
    """``values.min(1, keepdim=True)`` by blocks of columns: torch vectorises ``amin``, but no reduction with an index."""
    block, (rows, width) = 256, values.shape
    if width < 8 * block or rows * width < FEW_ELEMENTS:
        return values.min(1, keepdim=True)
    whole = width // block * block
    least = values[:, :whole].unflatten(1, (-1, block)).amin(2)
    if whole < width:
        least = torch.cat([least, values[:, whole:].amin(1, keepdim=True)], 1)
    start = (least.argmin(1, keepdim=True) * block).clamp_max(width - block)
    least, index = values.gather(1, start + torch.arange(block, device=values.device)).min(1, keepdim=True)
    return least, start + index
