"""The classes and the options of one call: class vectors in blocks that stay in cache, about their common mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused.center import center_of
from harmonic_triton.fused.floors import NormRange
from harmonic_triton.fused.problem import Operands, Problem

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
    smooth_weight: Tensor  # (V,) v_j, empty where there is no smoothing
    # numbers: on a GPU tensors () that nobody waits for
    half_n: Any = 0.0  # half of the harmonic exponent
    norms: Tensor = field(default_factory=lambda: torch.empty(0))  # (V,) ||w_j - center||^2
    smallest: Any = 0.0  # of the norms
    median: Any = 0.0
    largest: Any = 0.0
    bias: Tensor | None = None  # (V,) of the logits
    softcap: float = 0.0  # of the logits, 0: none

    @classmethod
    def of(cls, operands: Operands, problem: Problem) -> Head:
        """The head of a call."""
        w, n, smooth_weight = operands.w, operands.n, operands.smooth_weight
        dtype = compute_dtype(w.dtype)
        center = center_of(w) if _may_have_a_center(w, dtype) else None
        v = w.new_empty(0, dtype=dtype) if smooth_weight is None else smooth_weight.to(dtype)
        head = cls(w, dtype, center, n is not None, problem.eps, problem.mix, v)
        head.bias, head.softcap = operands.bias, problem.softcap
        if n is not None:
            number = Tensor.item if w.device.type == "cpu" else Tensor.double
            head.norms, head.half_n = head._norms(), 0.5 * number(n.to(dtype))
            head.smallest, head.median, head.largest = map(number, NormRange.of(head.norms))
        return head

    @classmethod
    def finished(cls, operands: Operands, problem: Problem, center: Tensor) -> Head:
        """The same for what is left to do once the scores are known."""
        there = center.device.type != "cpu" or bool(center.any())
        return cls(
            operands.w,
            center.dtype,
            center if there else None,
            operands.n is not None,
            problem.eps,
            problem.mix,
            center[:0],
        )

    def _norms(self) -> Tensor:
        """Each block while it is in cache; ``sum`` adds in pairs, which ``vector_norm`` does not, at the price of digits."""
        return torch.cat([self.block(classes).square().sum(1) for classes in self.blocks()])

    @property
    def plain(self) -> bool:
        """Whether class vectors are multiplied as they are, neither moved nor converted."""
        return self.center is None and self.w.dtype == self.dtype

    @property
    def smoothing(self) -> bool:
        """Whether the smoothing terms are wanted."""
        return len(self.smooth_weight) > 0

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
        return self.centered(self.w[classes].to(self.dtype))

    def blocks(self, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
        """Slices of the classes of about so many elements."""
        elements = elements if self.w.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        size = max(1, elements // self.w.shape[1] // 64) * 64
        return (slice(start, start + size) for start in range(0, len(self.w), size))


def _may_have_a_center(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether to look for a center: a glance at some rows, on a CPU, where their values can be asked for."""
    if w.device.type != "cpu":
        return True
    rows = w[:: -(-len(w) // MEAN_ROWS)].to(dtype)
    mean = rows.mean(0)
    usual = torch.linalg.vector_norm(rows, dim=1).median().item()
    return not float(mean.dot(mean)) <= MEAN_SHARE * usual**2  # NaN: look
