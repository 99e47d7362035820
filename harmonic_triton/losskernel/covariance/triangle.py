"""One triangle of a symmetric matrix, folded into a dense rectangle: half the memory, no entry stored twice.

The rows of the right half of the lower triangle lie under its columns' left half. With a gap of 1 this is LAPACK's
rectangular full packed format (TRANSR='N', UPLO='L', even order; Gustavson et al., *Rectangular Full Packed Format for
Cholesky's Algorithm*, 2010), whose rank-k update is BLAS ``syrk`` and ``gemm`` on whole blocks. With a gap of a tile's
width every tile of the rectangle is a tile of the triangle or of its mirror image, aligned and without masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonic_triton._common.precision import exact_products

PACKED = 1  # gap of LAPACK's format
ALIGNED = 16  # gap for products of panels: rows of 64-byte lines, a third faster than packed ones
PANEL = 512  # rows of the rectangle that are worked on at a time


class Panel(NamedTuple):
    """Entries S[row : row + n, col : col + w] as they lie in the rectangle; of its n x n corner one triangle counts."""

    row: int
    col: int
    view: Tensor  # (n, w)
    upper: bool  # the corner is the view's first n columns and upper triangular; else its last n, lower triangular

    def corner(self) -> slice:
        n, w = self.view.shape
        return slice(0, n) if self.upper else slice(w - n, w)

    def rest(self) -> slice:
        n, w = self.view.shape
        return slice(n, w) if self.upper else slice(0, w - n)

    def triangle(self, corner: Tensor, diagonal: int = 0) -> Tensor:
        """The part of an n x n corner that counts; without its diagonal for ``diagonal=1``."""
        return corner.triu(diagonal) if self.upper else corner.tril(-diagonal)


class Triangle:
    """S (m, m), symmetric, zero at first: S[i, j] for i >= j at data[j, gap + i] if j < half, else data[i - half, j - half].

    ``half`` is m/2 rounded up to a multiple of ``gap``; ``width`` = 2 half is what m is padded to.
    """

    def __init__(self, num_samples: int, *, gap: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_samples, self.gap = num_samples, gap
        self.width = padded(num_samples, gap)
        self.half = self.width // 2
        self.data = torch.zeros(self.half, self.width + gap, dtype=dtype, device=device)

    def column(self, j: int) -> Tensor:
        """A view of S[j:, j]."""
        if j < self.half:
            return self.data[j, self.gap + j : self.gap + self.num_samples]
        return self.data[j - self.half : self.num_samples - self.half, j - self.half]

    def diagonal(self) -> Tensor:
        """S[i, i], (m,)."""
        return torch.cat([self.data.diagonal(self.gap), self.data.diagonal(0)])[: self.num_samples]

    def with_gap(self, gap: int) -> Triangle:
        """This one, or a copy in the layout of another gap."""
        if gap == self.gap:
            return self
        copy = Triangle(self.num_samples, gap=gap, dtype=self.data.dtype, device=self.data.device)
        for j in range(self.num_samples):
            copy.column(j).copy_(self.column(j))
        return copy

    def to(self, device: torch.device) -> Triangle:
        """This one, or a copy on another device."""
        if device == self.data.device:
            return self
        copy = Triangle(self.num_samples, gap=self.gap, dtype=self.data.dtype, device=device)
        copy.data.copy_(self.data)
        return copy

    def panels(self, step: int = PANEL) -> Iterator[Panel]:
        """Every entry of the triangle, in panels."""
        m, half = self.num_samples, self.half
        for start in range(0, min(m, half), step):
            stop = min(start + step, m, half)
            yield Panel(start, start, self.data[start:stop, self.gap + start : self.gap + m], True)
            stop = min(stop, m - half)
            if stop > start:
                yield Panel(half + start, half, self.data[start:stop, :stop], False)

    def rank_k_(self, rows: Tensor) -> None:
        """S += rowsᵀ rows; rows (k, width), contiguous, of S's dtype, zero beyond m."""
        update, _ = packed_update()
        if update is not None and self.gap == PACKED and self.data.device.type == "cpu":
            update(self, rows)
            return
        with exact_products(rows.device):
            for panel in self.panels():
                n, w = panel.view.shape
                left, right = rows[:, panel.row : panel.row + n].T, rows[:, panel.col : panel.col + w]
                panel.view[:, panel.rest()].addmm_(left, right[:, panel.rest()])
                panel.view[:, panel.corner()].add_(panel.triangle(left @ right[:, panel.corner()]))

    def add_(self, other: Triangle, u: Tensor, v: Tensor) -> None:
        """S += other + u vᵀ + v uᵀ, in fp64 until the one rounding at the end; u, v (m,) fp64. Both have one layout."""
        for mine, theirs in zip(self.panels(64), other.panels(64), strict=True):
            n, w = mine.view.shape
            rows, cols = slice(mine.row, mine.row + n), slice(mine.col, mine.col + w)
            change = theirs.view.to(torch.float64, copy=True).addr_(u[rows], v[cols]).addr_(v[rows], u[cols])
            change[:, mine.corner()] = mine.triangle(change[:, mine.corner()])
            mine.view.copy_(change.add_(mine.view))

    def unfold(self, out: Tensor, left: Tensor, right: Tensor, scale: float, inverse_sd: Tensor | None) -> None:
        """out (m, m) = scale (S + leftᵀ right), symmetric; left, right (q, m) with a symmetric product.

        With ``inverse_sd`` (m,) every entry is also multiplied by that of its row and of its column and kept in [-1, 1].
        """
        with exact_products(out.device):
            for panel in self.panels():
                n, w = panel.view.shape
                rows, cols = slice(panel.row, panel.row + n), slice(panel.col, panel.col + w)
                block = out[rows, cols]
                torch.addmm(panel.view, left[:, rows].T, right[:, cols], beta=scale, alpha=scale, out=block)
                if inverse_sd is not None:
                    block.mul_(inverse_sd[rows, None]).mul_(inverse_sd[cols]).clamp_(-1.0, 1.0)
                corner, rest = panel.corner(), panel.rest()
                block[:, corner] = panel.triangle(block[:, corner]) + panel.triangle(block[:, corner], 1).T
                out[cols, rows][rest] = block[:, rest].T


def padded(num_samples: int, gap: int) -> int:
    """What m is padded to."""
    return -(-num_samples // (2 * gap)) * 2 * gap


def fastest_gap(device: torch.device) -> int:
    """The layout that :meth:`Triangle.rank_k_` serves best on a device."""
    return PACKED if device.type == "cpu" and packed_update()[0] is not None else ALIGNED


@functools.cache
def packed_update() -> tuple[Callable[[Triangle, Tensor], None] | None, str]:
    """LAPACK's rank-k update of the packed triangle on the CPU where SciPy brings one, and what serves in words."""
    try:
        from scipy.linalg import lapack
    except ImportError as error:
        return None, (
            f"products of panels by PyTorch; SciPy's syrk is about a tenth faster, but: {error}"
            " (pip install 'harmonic-triton[analysis]')"
        )
    routines: dict[torch.dtype, Any] = {torch.float32: lapack.ssfrk, torch.float64: lapack.dsfrk}

    def update(triangle: Triangle, rows: Tensor) -> None:
        routines[rows.dtype](
            triangle.width, len(rows), 1.0, rows.numpy().T, 1.0, triangle.data.view(-1).numpy(), uplo="L", overwrite_c=1
        )

    return update, "LAPACK's sfrk (BLAS syrk and gemm) from SciPy"


def cpu_library() -> str:
    """Which library computes rank-k updates on the CPU, and why not a faster one."""
    return packed_update()[1]
