"""The PyTorch backend: chunks of tokens inside a memory budget, leave-one-out numerics, never N x V whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from harmonic_triton._common.precision import full_fp32
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.pytorch.chunk import Chunk, Head
from harmonic_triton.fused.pytorch.gradients import Gradients
from harmonic_triton.fused.results import TokenResults, TokenWeights, Unfinished, Upstream, scaled, upstream_of

DEFAULT_BUDGET = 256 * 2**20  # bytes of scratch for the chunk; about 1300 tokens at GPT-2's vocabulary
LINE = 16  # entries in a cache line; a chunk's rows are an odd number of lines apart: 2 to 4 % of the products' time
TILE_ELEMENTS = 2**20  # on a CPU the element-wise passes work on this many entries at a time: they stay in cache


def forward(operands: Operands, problem: Problem) -> TokenResults:
    """Per-token results; O(N + V) memory beside the chunk."""
    head = Head.of(operands, problem)
    out = _room(head, problem, len(operands.x))
    with full_fp32():
        for at, chunk in _chunks(head, operands, operands.target != problem.ignore_index, problem.budget):
            mine = _room(head, problem, len(at))
            for _ in chunk.forward(problem.want_scores, mine):
                pass
            out.store(at, mine)
    return out


def backward(
    operands: Operands, results: TokenResults, upstream: Upstream, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """(dX, dW), distances computed again."""
    head = Head.of(operands, problem)
    out = Gradients(head, len(operands.x), wanted)
    used = upstream.used() & (operands.target != problem.ignore_index)
    with full_fp32():
        for at, chunk in _chunks(head, operands, used, problem.budget):
            mine, up = results.select(at), upstream.select(at)
            sums = head.weight.new_zeros(len(at), 2)
            chunk.rival = mine.rival.unsqueeze(1)
            for tile in chunk.tiles():
                p = chunk.probabilities(tile, mine.nll[tile])
                if up.smooth is not None:
                    p = chunk.smoothed(tile, p, mine.select(tile), up.select(tile))
                _keep(sums, tile, chunk.coefficients(tile, p))
            out.add(chunk, at, mine, up, sums)
    dx, dw = out.finish()
    return dx.to(operands.x.dtype), dw.to(operands.w.dtype)


def forward_backward(
    operands: Operands, weights: TokenWeights, problem: Problem, wanted: Wanted
) -> tuple[TokenResults, Unfinished]:
    """Results, and dX and dW of the weighted sum of the losses: one pass, three products instead of four."""
    head = Head.of(operands, problem)
    classes = len(head.weight)
    out = Gradients(head, len(operands.x), wanted)
    every = _room(head, problem, len(operands.x))
    with full_fp32():
        for at, chunk in _chunks(head, operands, operands.target != problem.ignore_index, problem.budget):
            mine, mine_weights = _room(head, problem, len(at)), weights.select(at)
            sums = head.weight.new_zeros(len(at), 2)
            for tile, p in chunk.forward(problem.want_scores, mine):
                if not (wanted.x or wanted.w):
                    continue
                if weights.smooth is not None:
                    here = mine.select(tile)
                    p = chunk.smoothed(
                        tile, p, here, upstream_of(here, mine_weights.select(tile), problem.mix, classes)
                    )
                _keep(sums, tile, chunk.coefficients(tile, p))
            every.store(at, mine)
            if wanted.x or wanted.w:
                out.add(chunk, at, mine, upstream_of(mine, mine_weights, problem.mix, classes), sums)
    return every, Unfinished(*out.finish())


def finish(
    operands: Operands, unfinished: Unfinished, finishing: Finishing, problem: Problem, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """(dX, dW) times the upstream gradient."""
    dx, dw = scaled(unfinished, finishing.g, finishing.last)
    return dx.to(operands.x.dtype), dw.to(operands.w.dtype)


def _room(head: Head, problem: Problem, tokens: int) -> TokenResults:
    return TokenResults.zeros(tokens, head.weight, problem.want_scores, head.smoothing)


def _keep(out: Tensor, at: slice, sums: Tensor | None) -> None:
    if sums is not None:
        out[at] = sums


def _chunks(head: Head, operands: Operands, used: Tensor, budget: int) -> Iterator[tuple[Tensor, Chunk]]:
    """The tokens in use in equal chunks that fit the budget, each with its indices."""
    valid, classes = used.nonzero().squeeze(1), len(head.weight)
    most = max(1, min(len(valid), (budget or DEFAULT_BUDGET) // (classes * head.weight.element_size())))
    count = -(-len(valid) // most)
    size = -(-len(valid) // max(count, 1))
    tile = min(size, max(1, TILE_ELEMENTS // classes)) if used.device.type == "cpu" else size
    if count:
        pitch = (-(-classes // LINE) | 1) * LINE
        gap, work = head.weight.new_empty(size, pitch)[:, :classes], head.weight.new_empty(2, tile, classes)
    for start in range(0, len(valid), max(size, 1)):
        at = valid[start : start + size]
        x, target = operands.x[at].to(head.weight.dtype), operands.target[at]
        yield at, head.chunk(x, target, gap[: len(at)], work)
