"""The classes and the options of one call: class vectors in blocks that stay in cache, about their common mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.center import center_of
from harmonic_triton.fused.floors import NormRange
from harmonic_triton.fused.problem import Operands, Problem

EVERY = slice(None)
BLOCK_ELEMENTS = 2**18  # of class vectors in one product x @ W.T on a CPU: they stay in cache
GPU_BLOCK_ELEMENTS = 2**26  # there a block is what is copied where the class vectors are moved or converted
MEAN_ROWS = 64  # enough to see that there is no common mean; a center is then not looked for
MEAN_SHARE = 0.25  # of the median squared norm: a mean below it costs less than half of a digit


@dataclass
class Head:
    """The classes and the options of one call."""

    w: Tensor  # (V, D) as given
    dtype: torch.dtype  # that is computed in
    center: Tensor | None  # (D,) of the class vectors; None: they are taken as they are
    harmonic: bool  # else the scores are dot products
    eps: float
    mix: float  # alpha of the uniform mix, for the smoothing term
    smoothing: bool = False  # whether the smoothing terms are wanted
    smooth_weight: Tensor = field(init=False)  # (V,) v_j of theirs
    # numbers: on a GPU tensors () that nobody waits for
    half_n: Any = 0.0  # half of the harmonic exponent
    norms: Tensor = field(init=False)  # (V,) ||w_j - center||^2, of distances
    smallest: Any = 0.0  # of the norms
    median: Any = None
    largest: Any = 0.0
    bias: Tensor | None = None  # (V,) of the logits
    softcap: float = 0.0  # of the logits, 0: none

    @classmethod
    def of(cls, operands: Operands, problem: Problem) -> Head:
        """The head of a call."""
        w, n, smooth_weight = operands.w, operands.n, operands.smooth_weight
        dtype = compute_dtype(w.dtype)
        head = cls(w, dtype, None, n is not None, problem.eps, problem.mix)
        if smooth_weight is not None:
            head.smoothing, head.smooth_weight = True, smooth_weight.to(dtype)
        head.bias, head.softcap = operands.bias, problem.softcap
        if not w.is_cpu:
            head.center = center_of(w)
        if n is not None:
            head.half_n = 0.5 * head.number(n.to(dtype))
            head.measure()
        if w.is_cpu and _may_have_a_center(w, dtype, head.median):
            head.center = center_of(w)
            if n is not None:
                head.measure()
        return head

    @classmethod
    def finished(cls, operands: Operands, problem: Problem, center: Tensor) -> Head:
        """The same for what is left to do once the scores are known."""
        there = not center.is_cpu or bool(center.numpy().any())
        about = center if there else None
        return cls(operands.w, center.dtype, about, operands.n is not None, problem.eps, problem.mix)

    def measure(self) -> None:
        """The norms, each block while it is in cache; ``vecdot`` adds in pairs, which ``vector_norm`` does not, at the
        price of digits."""
        norms = [torch.linalg.vecdot(block, block) for block in map(self.block, self.blocks())]
        self.norms = norms[0] if len(norms) == 1 else torch.cat(norms)
        self.smallest, self.median, self.largest = map(self.number, NormRange.of(self.norms))

    def number(self, value: Tensor) -> Any:
        """A tensor () as arithmetic in fp64 takes it."""
        return value.item() if self.w.is_cpu else value.double()

    @property
    def plain(self) -> bool:
        """Whether class vectors are multiplied as they are, neither moved nor converted."""
        return self.center is None and self.w.dtype == self.dtype

    @property
    def mix_share(self) -> float:
        """alpha/V."""
        return self.mix / len(self.w)

    def smooth_share(self, p: Tensor, v: Tensor) -> Tensor:
        """v p/(p + alpha/V): how much of a class's smoothing weight its score can still move."""
        return v * p / (p + self.mix_share) if self.mix_share else v.expand_as(p)

    def centered(self, vectors: Tensor) -> Tensor:
        """Vectors (..., D) about the center."""
        return vectors if self.center is None else vectors - self.center

    def rows(self, classes: Tensor) -> Tensor:
        """Class vectors (C, D) in the compute dtype, where they are."""
        return self.w.index_select(0, classes).to(self.dtype)

    def block(self, classes: slice) -> Tensor:
        """Class vectors about the center, in the compute dtype."""
        w = self.w if classes is EVERY else self.w[classes]
        return self.centered(w.to(self.dtype))

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> list[slice]:
        """Slices of the classes of about so many elements."""
        elements = elements if self.w.is_cpu else GPU_BLOCK_ELEMENTS
        classes, width = self.w.shape
        size = max(1, elements // width // 64) * 64
        return [EVERY] if size >= classes else [slice(start, start + size) for start in range(0, classes, size)]


def _may_have_a_center(w: Tensor, dtype: torch.dtype, usual: float | None) -> bool:
    """Whether to look for a center: a glance at some rows, where their values can be asked for. ``usual`` is the median
    squared norm, where it is known."""
    rows = w[:: -(-w.shape[0] // MEAN_ROWS)].to(dtype)
    if usual is None:
        usual = torch.linalg.vecdot(rows, rows).median().item()
    total = rows.sum(0)
    return not total.dot(total).item() <= MEAN_SHARE * usual * rows.shape[0] ** 2  # NaN: look
