"""The one place that chooses how a mean or sum of losses gets its gradients. Both ways are exact; speed decides.

U = 2 N V D operations is one product of the head.

- *recompute*: the forward pass keeps O(N + V); backward forms the products again, one slice of classes at a time: 4 U.
  Always for ``reduction="none"`` (upstream gradients are not known yet), and without gradients, where nothing is stored.
- *chunks*: gradients in the forward pass, one chunk of tokens at a time, from stored 16-bit log-scores (fp32 ones for
  fp32 operands): 3 U, but more traffic. The torch backend does nothing else; its chunks are small enough for any budget.

For Triton, ``predicted_seconds`` compares the two by what an H200 allows. A prediction, not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.problem import Operands, Problem, Wanted
from harmonic_triton.fused.results import TOKEN_FACTORS

PRODUCTS = {2: 790e12, 4: 67e12}  # operations a second by bytes of an operand: 16 bits (measured), fp32 (data sheet)
COPY = 4.3e12  # bytes a second
LEAST_BUDGET = 256 * 2**20  # bytes of scratch for the chunk of log-scores on a small GPU
MEMORY_SHARE = 48  # chunks may take 1/48 of a GPU: 2.9 GiB of an H200 hold Llama-3's 8192 x 128256 log-scores at once
TORCH_BUDGET = 64 * 2**20  # bytes of the torch backend's scores: 333 tokens at GPT-2's vocabulary
LINE = 16  # entries in a cache line
SIDE = 2  # tile maxima and partial sums take at most half a byte (1/SIDE) for each log-score: tiles of 32 x 32
MOST_CLASSES = 32 * 65535  # the second axis of a grid ends at 65535 tiles

_forced: str | None = None


@contextmanager
def force(strategy: str) -> Iterator[None]:
    """Take "chunks" or "recompute" in the Triton backend whatever the prediction: for tests and benchmarks."""
    global _forced
    if strategy not in ("chunks", "recompute"):
        raise ValueError(f"strategy is {strategy!r}; it must be 'chunks' or 'recompute'")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def gradients_in_forward(problem: Problem, operands: Operands) -> bool:
    """Whether a mean or sum over the tokens takes *chunks*."""
    if problem.backend == "torch":
        return True
    if _forced is not None:
        return _forced == "chunks"
    x, w = operands.x, operands.w
    (tokens, width), classes, size = x.shape, w.shape[0], x.element_size()
    most = chunk_tokens(tokens, classes, size, problem.budget, x.device)
    if most == 0 or classes > MOST_CLASSES:
        return False
    recompute, chunks = predicted_seconds(tokens, classes, width, size, -(-tokens // most))
    return chunks < recompute


class Shapes(NamedTuple):
    """Of ``Unfinished``, field by field."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    scores: tuple[int, ...]
    tokens: tuple[int, ...]
    center: tuple[int, ...]


def unfinished_shapes(problem: Problem, operands: Operands, wanted: Wanted) -> Shapes:
    """What ``problem.backend`` leaves unfinished in the forward pass."""
    (tokens, width), classes = operands.x.shape, operands.w.shape[0]
    size = compute_dtype(operands.x.dtype).itemsize
    none = (0,)
    few = problem.backend == "torch" and tokens <= torch_chunk(tokens, classes, size, problem.budget)
    if few and (wanted.x or wanted.w):
        return Shapes(none, none, (tokens, pitch(classes)), (tokens, TOKEN_FACTORS), (width,))
    return Shapes((tokens, width) if wanted.x else none, (classes, width) if wanted.w else none, none, none, none)


def torch_chunk(tokens: int, classes: int, size: int, budget: int) -> int:
    """How many tokens' scores of ``size`` bytes the torch backend holds at once, at most all."""
    return max(1, min(tokens, (budget or TORCH_BUDGET) // (classes * size)))


def pitch(classes: int) -> int:
    """Entries from one row of scores to the next: an odd number of lines, which is 2 to 4 % of the products' time."""
    lines = -(-classes // LINE)
    return (lines + 1 - lines % 2) * LINE


def chunk_tokens(tokens: int, classes: int, size: int, budget: int, device: torch.device) -> int:
    """How many tokens' log-scores of ``size`` bytes fit the budget, at most all."""
    return min(tokens, (budget or _default_budget(device)) * SIDE // (classes * (size * SIDE + 1)))


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return LEAST_BUDGET
    return max(LEAST_BUDGET, torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE)


_default_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]
# As torch.compiler.assume_constant_result sets it; that imports all of dynamo, two seconds of everybody's import.


def predicted_seconds(tokens: int, classes: int, width: int, size: int, chunks: int) -> tuple[float, float]:
    """Forward and backward by *recompute* and by *chunks*: products, and the passes that no product hides.

    The gain is U; the price is z read and A written in a pass of its own, dW read and written by every further chunk, and
    both gradients scaled and rounded after the forward pass. At 16 bits in one chunk D < 380 recomputes at any N;
    D = 768, V = 50257 does below N = 3000, D = 4096, V = 128256 below N = 1700.
    """
    unit = 2.0 * tokens * classes * width / PRODUCTS[size]
    gradients, dw = float((classes + tokens) * width), float(classes * width)
    recompute = 4 * unit + (4 + size) * gradients / COPY  # fp32 products read, finished, rounded
    finished = (4 + 4) + (4 + 4) + (4 + size)  # in place; times the upstream gradient; rounded
    passes = 2.0 * size * tokens * classes + 8 * (chunks - 1) * dw + finished * gradients
    return recompute, 3 * unit + passes / COPY
