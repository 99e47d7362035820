"""Tables of a loss kernel, as tab-separated text: nearest samples, and groups that move together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harmonic_triton._common import files

if TYPE_CHECKING:
    from harmonic_triton.losskernel.kernel import LossKernel


def group_correlation(kernel: LossKernel, groups: Tensor) -> Tensor:
    """(G, G) fp64 correlation of the groups' mean standardised losses, from products with ρ: no m x m is formed.

    With a_g the indicator of group g over its size it is a_gᵀ ρ a_h, scaled to a diagonal of 1; 0 for groups without
    variance. The noise of few draws is in it as in ρ.
    """
    groups = groups.cpu()
    sizes = torch.bincount(groups)
    total = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    for g in (sizes > 0).nonzero().squeeze(1).tolist():
        image = kernel.product((groups == g).double() / sizes[g]).double().cpu()
        total[g] = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, image) / sizes.clamp_min(1)
    total = (total + total.T) / 2
    scale = total.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0.0)
    return (total * scale * scale[:, None]).clamp(-1, 1)


def write_neighbors(
    path: Path, indices: Tensor, distances: Tensor, names: Sequence[str] | None, samples: Sequence[int]
) -> list[str]:
    """The nearest samples of some, one line a pair: sample, rank, neighbour, ρ. Returns the lines."""

    def called(i: int) -> str:
        return str(i) if names is None else f"{i}\t{one_line(names[i])}"

    header = "sample\trank\tneighbor\trho" if names is None else "sample\tname\trank\tneighbor\tneighbor_name\trho"
    lines = [header]
    for i in samples:
        for rank, (j, far) in enumerate(zip(indices[i].tolist(), distances[i].tolist(), strict=True), start=1):
            if j >= 0:
                lines.append(f"{called(i)}\t{rank}\t{called(j)}\t{1 - far * far / 2:.4f}")
    files.write_text(path, "\n".join(lines) + "\n")
    return lines


def write_groups(path: Path, correlation: Tensor, names: Sequence[str] | None, most: int = 5) -> list[str]:
    """Each group's most correlated other groups. Returns the lines."""
    called = str if names is None else names.__getitem__
    present = correlation.diagonal() > 0
    lines = ["group\tmost correlated others"]
    for g in present.nonzero().squeeze(1).tolist():
        row = correlation[g].masked_fill(~present, -math.inf)
        row[g] = -math.inf
        best, which = row.topk(min(most, len(row)))
        others = [f"{called(h)} {r:.3f}" for h, r in zip(which.tolist(), best.tolist(), strict=True) if r > -math.inf]
        lines.append(f"{called(g)}\t{', '.join(others)}")
    files.write_text(path, "\n".join(lines) + "\n")
    return lines


def one_line(text: str) -> str:
    """A name without tabs or line ends."""
    return " ".join(str(text).split())
