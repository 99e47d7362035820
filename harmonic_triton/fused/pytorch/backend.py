"""The PyTorch backend: chunks of tokens inside a memory budget, leave-one-out numerics, never N x V whole unless it is small."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common.precision import full_fp32
from harmonic_triton.fused import strategy
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.pytorch import per_token
from harmonic_triton.fused.pytorch.chunk import EVERY, Chunk, Terms, first, part
from harmonic_triton.fused.pytorch.dot import CappedChunk, DotChunk
from harmonic_triton.fused.pytorch.gradients import Gradients
from harmonic_triton.fused.pytorch.harmonic import HarmonicChunk
from harmonic_triton.fused.pytorch.head import Head
from harmonic_triton.fused.pytorch.per_token import values_of
from harmonic_triton.fused.results import TokenResults, TokenWeights, Unfinished, Upstream, scaled, upstream_of

TILE_ELEMENTS = 2**18  # on a CPU the element-wise passes work on this many entries at a time: they stay in cache


def forward(operands: Operands, problem: Problem) -> TokenResults:
    """Per-token results; O(N + V) memory beside the chunk."""
    results = _Results(operands, problem)
    with _settings():
        for at, chunk in _chunks(Head.of(operands, problem), operands, *_counted(operands, problem), problem.budget):
            results.store(at, chunk.forward(problem.want_scores))
    return results.all


def backward(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db), distances computed again."""
    head = Head.of(operands, problem)
    out = Gradients(head, len(operands.x), wanted)
    with _settings():
        used = upstream.used() & (operands.target != problem.ignore_index)
        for at, chunk in _chunks(head, operands, *_where(used), problem.budget):
            mine, up = (results, upstream) if at is EVERY else (results.select(at), upstream.select(at))
            chunk.rival, chunk.nll, chunk.rival_score = mine.rival, values_of(mine.nll), values_of(mine.rival_score)
            chunk.to_prob = per_token.zeros_like(chunk.nll) + 1.0
            sums = []
            for tile in chunk.tiles():
                p = chunk.probabilities(tile)
                if up.smooth is not None:
                    p = chunk.smoothed(tile, p, mine.select(tile), up.select(tile))
                sums.append(chunk.to_coefficients(p, tile))
            terms = Terms.of(chunk.gradient_terms(mine, up, sums))
            out.add(at, chunk.x, chunk.target, mine.rival, chunk.gap, terms)
        dx, dw, db = out.finish()
    return dx.to(operands.x.dtype), dw.to(operands.w.dtype), db


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[TokenResults, Unfinished]:
    """Results, and of dX and dW of the weighted sum of the losses the coefficients of both products where those are few,
    else both, without the upstream gradient."""
    head = Head.of(operands, problem)
    results, gradients = _Results(operands, problem), wanted.x or wanted.w or wanted.bias
    shapes = strategy.unfinished_shapes(problem, operands, wanted)
    keeps = len(shapes.scores) > 1
    slopes = functools.partial(upstream_of, mix=problem.mix, classes=head.w.shape[0], scaling=problem.token_scaling)
    out = Gradients(head, len(operands.x), Wanted(False, False, False, False) if keeps else wanted)
    scores = head.w.new_empty(shapes.scores, dtype=head.dtype) if keeps else None
    tokens = None
    with _settings():
        used, count = _counted(operands, problem)
        for at, chunk in _chunks(head, operands, used, count, problem.budget, scores):
            mine_weights, sums = weights if at is EVERY else weights.select(at), []

            def to_coefficients(tile: slice, p: Tensor, here: TokenResults | None) -> None:
                if here is not None and weights.smooth is not None:  # called while it is this chunk's turn
                    upstream = slopes(here, mine_weights.select(tile))  # noqa: B023
                    p = chunk.smoothed(tile, p, here, upstream)  # noqa: B023
                sums.append(chunk.to_coefficients(p, tile))  # noqa: B023

            mine = chunk.forward(problem.want_scores, to_coefficients if gradients else None)
            results.store(at, mine)
            if not gradients:
                continue
            upstream = slopes(mine, mine_weights)
            table = chunk.gradient_terms(mine, upstream, sums)
            if keeps:
                tokens = table
            else:
                out.add(at, chunk.x, chunk.target, mine.rival, chunk.gap, Terms.of(table))
        dx, dw, db = out.finish()
    none = out.none
    if scores is None:
        return results.all, Unfinished(dx, dw, none, none, none, db, none)
    if tokens is None or count < len(scores):
        some, tokens = tokens, none.new_zeros(shapes.tokens)
        if some is not None:
            tokens[:count] = some
    scores[:, head.w.shape[0] :] = 0  # what nobody reads is not whatever was in memory
    scores[count:] = 0
    center = none.new_zeros(shapes.center) if head.center is None else head.center
    return results.all, Unfinished(none, none, tokens, scores, none, none, center)


def finish(
    operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db): the products of the coefficients that were kept, or what is there times the upstream gradient."""
    if unfinished.scores.dim() == 1:
        dx, dw, db = scaled((unfinished.x, unfinished.w, unfinished.bias), finishing.g, finishing.last)
    else:
        head = Head.finished(operands, problem, unfinished.center)
        out = Gradients(head, len(operands.x), wanted)
        at, count = _counted(operands, problem)
        if count:
            x, target, rival = (part(values, at) for values in (operands.x, operands.target, finishing.rival))
            a, factors = unfinished.scores[:count, : head.w.shape[0]], unfinished.tokens[:count]
            terms = Terms.of(factors, finishing.g.to(head.dtype))
            with _settings():
                out.add(at, x.to(head.dtype), target, rival, a, terms)
        dx, dw, db = out.finish()
    return dx.to(operands.x.dtype), dw.to(operands.w.dtype), db


@contextmanager
def _settings() -> Iterator[None]:
    """Products in full precision; what is divided by 0 is replaced later on."""
    with full_fp32(), np.errstate(all="ignore"):
        yield


class _Results:
    """Per-token results over chunks; tokens that no chunk has hold zeros."""

    def __init__(self, operands: Operands, problem: Problem) -> None:
        self.operands, self.problem = operands, problem
        self.filled: TokenResults | None = None

    def store(self, at: Tensor | slice, part: TokenResults) -> None:
        if at is EVERY:
            self.filled = part
        else:
            self.filled = self.all
            self.filled.store(at, part)

    @property
    def all(self) -> TokenResults:
        if self.filled is not None:
            return self.filled
        x = self.operands.x
        like = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        return TokenResults.zeros(len(x), like, self.problem.want_scores, self.operands.smoothing)


def _counted(operands: Operands, problem: Problem) -> tuple[Tensor | slice, int]:
    """The tokens that count and how many there are."""
    target = operands.target
    if target.is_cpu and not np.count_nonzero(target.numpy() == problem.ignore_index):
        return EVERY, target.shape[0]
    return _where(target != problem.ignore_index)


def _where(used: Tensor) -> tuple[Tensor | slice, int]:
    """The tokens in use and how many there are."""
    at = used.nonzero().squeeze(1)
    return (EVERY, len(at)) if len(at) == len(used) else (at, len(at))


def _chunks(
    head: Head, operands: Operands, at: Tensor | slice, tokens: int, budget: int, room: Tensor | None = None
) -> Iterator[tuple[Tensor | slice, Chunk]]:
    """The tokens in use in equal chunks that fit the budget, or all at once in the room for their scores."""
    if not tokens:
        return
    classes = head.w.shape[0]
    most = tokens if room is not None else strategy.torch_chunk(tokens, classes, head.dtype.itemsize, budget)
    count = -(-tokens // most)
    size = -(-tokens // count)
    tile = min(size, max(1, TILE_ELEMENTS // classes)) if head.w.is_cpu else size
    if room is None:
        room = head.w.new_empty(size, strategy.pitch(size, classes), dtype=head.dtype)
    kind = HarmonicChunk if head.harmonic else CappedChunk if head.softcap else DotChunk
    gap, work = room[:, :classes], head.w.new_empty(2, tile, classes, dtype=head.dtype).unbind(0)
    for start in range(0, tokens, size):
        here = (
            at if size == tokens else slice(start, start + size) if isinstance(at, slice) else at[start : start + size]
        )
        x, target = part(operands.x, here).to(head.dtype), part(operands.target, here)
        yield here, kind(head, x, target, first(gap, x.shape[0]), work)
