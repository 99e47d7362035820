"""Figures of the experiments, written as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from harmonic_triton.tools import DASHES, MARKERS, PALETTE

COLORS = PALETTE


def save(path: Path) -> None:
    """Write the current figure and forget it."""
    plt.tight_layout()
    plt.savefig(path, dpi=130)
    plt.close()


def histogram(path: Path, values: Tensor, groups: Tensor, names: Sequence[str], axis: str, title: str) -> None:
    """One histogram a group on common bins."""
    plt.figure(figsize=(6, 3.6))
    bins = np.histogram_bin_edges(values.numpy(), 60).tolist()
    for group, name in enumerate(names):
        filled = {"histtype": "stepfilled", "alpha": 0.35} if group == 0 else {"histtype": "step"}
        style = {"edgecolor": COLORS[group], "facecolor": COLORS[group], "linestyle": DASHES[group], "linewidth": 1.5}
        plt.hist(values[groups == group].numpy(), bins, label=name, **filled, **style)
    plt.xlabel(axis)
    plt.ylabel("samples")
    plt.title(title)
    plt.legend(frameon=False)
    save(path)


def densities(path: Path, series: Sequence[Tensor], names: Sequence[str], axis: str, title: str) -> None:
    """Densities of pair values on a logarithmic scale, drawn as steps (paper, Figure 2 D)."""
    plt.figure(figsize=(6, 3.6))
    bins = np.histogram_bin_edges(np.concatenate([values.numpy() for values in series]), 120).tolist()
    for color, dashes, values, name in zip(COLORS, DASHES, series, names, strict=False):
        style = {"color": color, "linestyle": dashes, "linewidth": 1.4}
        plt.hist(values.numpy(), bins, density=True, histtype="step", log=True, label=name, **style)
    plt.axvline(0, color="#c9ced6", lw=0.8)
    plt.xlabel(axis)
    plt.ylabel("density")
    plt.title(title)
    plt.legend(frameon=False)
    save(path)


def heatmap(path: Path, matrix: Tensor, boundaries: Sequence[int], title: str) -> None:
    """A correlation matrix as it is ordered, with ticks beside it where groups meet; colours end at the 98th percentile."""
    plt.figure(figsize=(5.6, 5))
    off_diagonal = matrix.numpy()[~np.eye(len(matrix), dtype=bool)]
    limit = float(np.quantile(np.abs(off_diagonal), 0.98)) if off_diagonal.size else 1.0
    plt.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="antialiased")
    plt.colorbar(label="correlation ρ", shrink=0.85)
    plt.title(title)
    plt.xticks([at - 0.5 for at in boundaries], [""] * len(boundaries))
    plt.yticks([at - 0.5 for at in boundaries], [""] * len(boundaries))
    plt.tick_params(length=8, width=1)
    save(path)


def scatter(
    axes: Axes, points: np.ndarray, values: Tensor, names: Sequence[str] | None, title: str, cmap: str = "twilight"
) -> None:
    """An embedding: a colour and a marker for each group where ``names`` are given, else by value; smaller dots for more points."""
    size = min(12.0, max(0.4, 2e4 / len(points)))
    if names is None:
        drawn = axes.scatter(
            points[:, 0], points[:, 1], c=values.numpy(), s=size, cmap=cmap, linewidths=0.2, edgecolors="0.6"
        )
        axes.figure.colorbar(drawn, ax=axes, shrink=0.8)
    else:
        for group, name in enumerate(names):
            part = points[(values == group).numpy()]
            style: dict[str, Any] = {"color": COLORS[group % len(COLORS)], "marker": MARKERS[group % len(MARKERS)]}
            axes.scatter(part[:, 0], part[:, 1], s=1.5 * size, label=name, linewidths=0, **style)
        legend = axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02))
        for handle in legend.legend_handles:
            handle.set_sizes([24])  # type: ignore[union-attr]
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def labeled_matrix(path: Path, matrix: Tensor, ticks: Sequence[str], axis: str, title: str) -> None:
    """A small matrix with its values written in the cells."""
    plt.figure(figsize=(1.6 + 0.62 * len(matrix), 1.2 + 0.58 * len(matrix)))
    plt.imshow(matrix.numpy(), cmap="viridis", vmin=0, vmax=1)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            plt.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    plt.xticks(range(len(ticks)), ticks, rotation=45, ha="right", fontsize=8)
    plt.yticks(range(len(ticks)), ticks, fontsize=8)
    plt.xlabel(axis)
    plt.title(title, fontsize=10)
    save(path)
