"""The one place that chooses how a mean or sum of losses gets its gradients. Both ways are exact; speed decides.

U = 2 N V D operations is one product of the head.

- *recompute*: the forward pass keeps O(N + V); backward forms the products again, one slice of classes at a time: 4 U.
  Always for ``reduction="none"`` (upstream gradients are not known yet), and without gradients, where nothing is stored.
- *one pass*: gradient products in the forward pass, one chunk of tokens at a time, from coefficients that are right up to
  a factor of the token: 3 U. With Triton for bfloat16 without smoothing, since such coefficients need fp32's range and
  the rival is taken out of sums that it is in. The torch backend does nothing else; its chunks are small enough for any
  budget.

For Triton, ``predicted_seconds`` compares the two by what an H200 allows. A prediction, not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.problem import Operands, Problem, Wanted
from harmonic_triton.fused.results import COLUMNS, TOKEN_FACTORS

PRODUCTS = {2: 790e12, 4: 67e12}  # operations a second by bytes of an operand: 16 bits (measured), fp32 (data sheet)
COPY = 4.3e12  # bytes a second
CACHE = 8.2e12  # bytes a second from the L2 cache to the multiprocessors, as the best published product implies
ISSUE = 132 * 128 * 1.75e9  # instructions of one thread a second
TILE = (128, 256)  # tokens and classes of a tile
# instructions of an entry outside of the product: forward, coefficients, both in one pass
EPILOGUES = (19.0, 26.0, 23.0)
LEAST_BUDGET = 256 * 2**20  # bytes of scratch for the chunk of coefficients on a small GPU
MEMORY_SHARE = 48  # chunks may take 1/48 of a GPU: 2.9 GiB of an H200 hold Llama-3's 8192 x 128256 coefficients at once
TORCH_BUDGET = 64 * 2**20  # bytes of the torch backend's scores: 333 tokens at GPT-2's vocabulary
SMALL_HEAD = (
    2**18
)  # entries of W; to multiply dW of no more by the upstream gradient costs less than to come back to it
MANY_TOKENS = 64  # to whose products the pitch matters
LINE = 16  # entries in a cache line
SIDE = 2  # partial sums take at most half a byte (1/SIDE) for each coefficient

_forced: str | None = None


@contextmanager
def force(strategy: str) -> Iterator[None]:
    """Take "one pass" (where it serves) or "recompute" in the Triton backend whatever the prediction: for tests and benchmarks."""
    global _forced
    if strategy not in ("one pass", "recompute"):
        raise ValueError(f"strategy is {strategy!r}; it must be 'one pass' or 'recompute'")
    before, _forced = _forced, strategy
    try:
        yield
    finally:
        _forced = before


def gradients_in_forward(problem: Problem, operands: Operands) -> bool:
    """Whether a mean or sum over the tokens takes *one pass*."""
    if problem.backend == "torch":
        return True
    if not one_pass_serves(operands):
        return False
    if _forced is not None:
        return _forced == "one pass"
    (tokens, width), classes = operands.x.shape, operands.w.shape[0]
    most = chunk_tokens(tokens, classes, problem.budget, operands.x.device)
    if most == 0:
        return False
    recompute, one_pass = predicted_seconds(tokens, classes, width, -(-tokens // most))
    return one_pass < recompute


def one_pass_serves(operands: Operands) -> bool:
    """Whether the Triton backend can take *one pass* at all."""
    return operands.x.dtype == torch.bfloat16 and not operands.smoothing


class Shapes(NamedTuple):
    """Of ``Unfinished``, field by field."""

    x: tuple[int, ...] = (0,)
    w: tuple[int, ...] = (0,)
    tokens: tuple[int, ...] = (0,)
    scores: tuple[int, ...] = (0,)
    columns: tuple[int, ...] = (0,)
    bias: tuple[int, ...] = (0,)
    center: tuple[int, ...] = (0,)


def unfinished_shapes(problem: Problem, operands: Operands, wanted: Wanted) -> Shapes:
    """What ``problem.backend`` leaves unfinished in the forward pass."""
    (tokens, width), classes = operands.x.shape, operands.w.shape[0]
    products = Shapes((tokens, width) if wanted.x else (0,), (classes, width) if wanted.w else (0,))
    if problem.backend == "triton":
        columns = (classes, COLUMNS) if wanted.bias or (wanted.w and operands.n is not None) else (0,)
        if not one_pass_serves(operands):  # nobody asks for it but who calls the operator himself
            products = products._replace(bias=(classes,) if wanted.bias else (0,))
        return products._replace(tokens=(8, -(-tokens // 4) * 4), columns=columns, center=(width,))
    size = compute_dtype(operands.x.dtype).itemsize
    few = tokens <= torch_chunk(tokens, classes, size, problem.budget)
    if few and classes * width > SMALL_HEAD and (wanted.x or wanted.w or wanted.bias):
        return Shapes(tokens=(tokens, TOKEN_FACTORS), scores=(tokens, pitch(tokens, classes)), center=(width,))
    return products._replace(bias=(classes,) if wanted.bias else (0,))


def torch_chunk(tokens: int, classes: int, size: int, budget: int) -> int:
    """How many tokens' scores of ``size`` bytes the torch backend holds at once, at most all."""
    return max(1, min(tokens, (budget or TORCH_BUDGET) // (classes * size)))


def pitch(tokens: int, classes: int) -> int:
    """Entries from one row of scores to the next: an odd number of lines, which is 2 to 4 % of many tokens' products' time."""
    if tokens < MANY_TOKENS:
        return classes
    lines = -(-classes // LINE)
    return (lines + 1 - lines % 2) * LINE


def chunk_tokens(tokens: int, classes: int, budget: int, device: torch.device) -> int:
    """How many tokens' coefficients of 16 bits fit the budget, at most all."""
    return min(tokens, (budget or _default_budget(device)) * SIDE // (classes * (2 * SIDE + 1)))


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return LEAST_BUDGET
    return max(LEAST_BUDGET, torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE)


_default_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]
# As torch.compiler.assume_constant_result sets it; that imports all of dynamo, two seconds of everybody's import.


def predicted_seconds(tokens: int, classes: int, width: int, chunks: int) -> tuple[float, float]:
    """Forward and backward at 16 bits by *recompute* and by *one pass*: products, and the passes that no product hides.

    Our own product is bound by its tiles' traffic from the L2 cache where that takes longer than its operations. The gain
    is such a product; the price is dW read and written by every further chunk.
    """
    product = 2.0 * tokens * classes * width / PRODUCTS[2]
    own = max(product, 2.0 * tokens * classes * width * (1 / TILE[0] + 1 / TILE[1]) / CACHE)
    entries, gradients = float(tokens * classes), float((tokens + classes) * width)
    every = 2 * product + (2 * entries + 8 * gradients) / COPY  # column sums; fp32 products written and read, rounded
    recompute = 2 * own + (EPILOGUES[0] + EPILOGUES[1]) * entries / ISSUE
    one_pass = own + EPILOGUES[2] * entries / ISSUE + 8 * (chunks - 1) * float(classes * width) / COPY
    return every + recompute, every + one_pass
