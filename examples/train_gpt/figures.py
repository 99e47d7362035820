"""The pictures of the report. Losses differ by dashes and markers as well as by colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from torch import Tensor

from harmonic_triton.tools import PALETTE

from .trained import NAMES, Trained

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

COLORS = {"harmonic": PALETTE[0], "cross_entropy": PALETTE[1], "authors": PALETTE[7]}
LINES: dict[str, dict[str, Any]] = {
    "harmonic": {"color": COLORS["harmonic"], "linestyle": "-", "linewidth": 1.8},
    "cross_entropy": {"color": COLORS["cross_entropy"], "linestyle": (0, (5, 2)), "linewidth": 1.8},
}
MARKS = {"harmonic": "o", "cross_entropy": "s"}
RANDOM = {"harmonic": ":", "cross_entropy": "-."}
LABELS = 14  # tokens named in an embedding
PLACES = tuple(  # of a name beside its dot, in points
    (x, y)
    for far in (7, 14)
    for x, y in ((far, 0), (-far, 0), (0, far), (0, -far), (far, far), (-far, far), (far, -far))
)


def losses(runs: list[Trained], guess: float) -> Figure:
    """Training and validation loss by step; ``guess`` is that of equal probabilities."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for run in runs:
        values = np.array(run.history["train"])
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        left.plot(np.arange(1, len(values) + 1), values, color=COLORS[run.loss], alpha=0.25, linewidth=0.7)
        left.plot(np.arange(width, len(values) + 1), smooth, label=run.name, **LINES[run.loss])
        steps, found = zip(*run.history["val"], strict=True)
        right.plot(steps, found, marker=MARKS[run.loss], markersize=4, label=run.name, **LINES[run.loss])
    for axis in (left, right):
        axis.axhline(guess, color="black", linewidth=1, linestyle=":", label=f"a guess, ln V = {guess:.2f}")
        axis.set_xlabel("step")
        axis.legend(frameon=False, handlelength=3)
    left.set(title="training", ylabel="loss (nats a token)")
    right.set(title="validation")
    return figure


def head_costs(measured: dict[str, dict[str, Any]]) -> Figure:
    """Time and memory of the head alone."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.4), sharey=True)
    for axis, key, scale, title in (
        (axes[0], "ms", 1, "time, forward and backward (ms)"),
        (axes[1], "bytes", 2**20, "peak memory beyond x, W and gradients (MiB)"),
    ):
        values = [cost[key] / scale for cost in measured.values()]
        bars = axis.barh([NAMES[h] for h in measured], values, color=[COLORS[h] for h in measured], height=0.6)
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.margins(x=0.15)
        axis.set_xlabel(title)
    axes[0].invert_yaxis()
    return figure


def norms(runs: list[Trained]) -> Figure:
    """Mean norm of the class vectors by step."""
    figure, axis = plt.subplots(figsize=(10, 3.4))
    for run in runs:
        axis.plot(*zip(*run.history["weight_norm"], strict=True), label=run.name, **LINES[run.loss])
    axis.set(xlabel="step", ylabel="mean of ‖w‖ over classes")
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, handlelength=3)
    return figure


def embeddings(runs: list[Trained], counts: Tensor, names: Sequence[tuple[int, str]]) -> Figure:
    """Class vectors on two principal components, to one scale; ``names`` of tokens that may be written beside them."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(5.2 * len(runs) + 0.8, 5), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    often = counts.clamp_min(1).numpy()
    scale = LogNorm(1, max(10.0, float(often.max())))
    order = often.argsort(kind="stable")  # frequent tokens on top
    for axis, run in zip(axes[0], runs, strict=True):
        points, share = run.principal.points.numpy(), run.principal.share
        style: dict[str, Any] = {"s": 6, "cmap": "viridis_r", "norm": scale, "linewidths": 0, "alpha": 0.8}
        dots = axis.scatter(*points[order].T, c=often[order], **style)
        axis.set_aspect("equal", adjustable="box")
        axis.set(
            title=f"{run.name}: {100 * sum(share):.1f} % of the variance",
            xlabel=f"first component ({100 * share[0]:.1f} %)",
            ylabel=f"second component ({100 * share[1]:.1f} %)",
        )
    figure.colorbar(dots, ax=axes[0].tolist(), label="times in the training text", fraction=0.03, pad=0.02)
    figure.canvas.draw()  # labels are placed on the axes as they will be
    for axis, run in zip(axes[0], runs, strict=True):
        write_names(axis, run.principal.points.numpy(), names)
    return figure


def write_names(axis: Axes, points: np.ndarray, names: Sequence[tuple[int, str]]) -> list[Text]:
    """Names beside their dots, which get a ring and a short line; one that finds no room is left out."""
    renderer = axis.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axis.get_window_extent(renderer)
    taken: list[Bbox] = []  # by names and by the dots that have one
    written: list[Text] = []
    for token, name in names:
        place = points[token].tolist()
        x, y = axis.transData.transform(place)
        dot = Bbox.from_extents(x - 4, y - 4, x + 4, y + 4)
        if any(dot.overlaps(other) for other in taken):
            continue
        for right, up in PLACES:
            note = axis.annotate(
                name, place, (right, up), textcoords="offset points", fontsize=8, va="center",
                ha="left" if right > 0 else "right" if right < 0 else "center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.8, "color": "black", "shrinkA": 0, "shrinkB": 2},
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken += [box, dot]
                written.append(note)
                axis.scatter([place[0]], [place[1]], s=26, facecolors="none", edgecolors="black", linewidths=0.9)
                break
            note.remove()
        if len(written) == LABELS:
            break
    return written


def parallelograms(runs: list[Trained], related: list[Tensor], chance: list[Tensor]) -> Figure:
    """Distributions of the parallelogram loss, of each run's related and, where given, random quadruples."""
    figure, axis = plt.subplots(figsize=(10, 3.6))
    for run, values in zip(runs, related, strict=True):
        axis.ecdf(values, label=f"{run.name}, related pairs", **LINES[run.loss])
    for run, values in zip(runs, chance, strict=False):
        style: dict[str, Any] = {**LINES[run.loss], "linestyle": RANDOM[run.loss], "linewidth": 1.1}
        axis.ecdf(values, label=f"{run.name}, random tokens", **style)
    axis.set(xlabel="parallelogram loss", ylabel="share of quadruples below", ylim=(0, 1.02))
    axis.set_xlim(left=0)
    axis.legend(frameon=False, handlelength=3.5)
    return figure
