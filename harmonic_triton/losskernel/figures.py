"""Pictures of a loss kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.extras import needs
from harmonic_triton._common.palette import MARKERS, PALETTE, line_style
from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.diagnostics import R_HAT, TAU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from harmonic_triton.losskernel.kernel import LossKernel

SHOWN = 1000  # samples along a side of the heatmap
LEGEND = 10  # labels that get a colour and a marker of their own, and a legend
CHAINS = 40  # chains drawn one by one
NAMED_CHAINS = 8  # at most, where each has a line of its own kind and a legend
NARROWEST = 0.022  # share of the heatmap's side that the name of a label needs
BLUE, RED, GRAY = PALETTE[0], PALETTE[1], PALETTE[7]


def overview(
    kernel: LossKernel,
    *,
    embedding: Tensor | None = None,
    labels: Tensor | None = None,
    label_names: Sequence[str] | None = None,
    method: str = "umap",
    exclude_same: Tensor | bool | None = None,
) -> Figure:
    """The sorted heatmap of ρ beside the embedding.

    Args:
        embedding: (m, 2) coordinates; None: ``kernel.embed(method, exclude_same=exclude_same)``.
        labels: (m,) integers that sort and colour the samples, None for the kernel's own.
        label_names: of labels 0, 1, ...

    Raises:
        ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
    """
    labels = labels_of(kernel, labels)
    check_label_names(labels, label_names)
    if embedding is None:
        embedding = kernel.embed(method, exclude_same=exclude_same)
    elif embedding.shape != (kernel.num_samples, 2):
        raise ValueError(f"embedding must be ({kernel.num_samples}, 2), got {validate.describe(embedding)}")
    figure = new_figure(11, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    heatmap(left, kernel, labels, label_names)
    scatter(right, kernel, embedding, labels, label_names)
    return figure


def heatmap(axis: Axes, kernel: LossKernel, labels: Tensor | None, label_names: Sequence[str] | None = None) -> None:
    """ρ of at most 1000 samples, sorted by label and within one by likeness; without labels by clusters."""
    shown = sorted_samples(kernel, labels)
    rho = kernel.block(shown, shown).cpu()
    off = rho[~torch.eye(len(rho), dtype=torch.bool)].abs()
    limit = max(off[:: max(1, len(off) // 10**6)].quantile(0.99).item(), 1e-3) if len(off) else 1.0
    image = axis.imshow(rho.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest", rasterized=True)
    axis.figure.colorbar(image, ax=axis, fraction=0.045, pad=0.03, label="correlation ρ", extend="both")
    some = "" if len(shown) == kernel.num_samples else f"{len(shown):,} of "
    sorting = "cluster" if labels is None else kind_of(kernel, labels)
    axis.set(title=f"{some}{kernel.num_samples:,} samples, by {sorting}")
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    if labels is None:
        return
    values, counts = labels[shown].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    if len(values) <= 60:  # ticks beside the matrix: lines across would hide what they part
        borders = (ends[:-1] - 0.5).tolist()
        axis.set_xticks(borders, minor=True)
        axis.set_yticks(borders, minor=True)
        axis.tick_params(which="minor", length=7, width=0.8)
    wide = counts >= NARROWEST * len(shown)
    middles, named = (ends - counts / 2 - 0.5)[wide].tolist(), values[wide].tolist()
    if len(named) <= 40:
        axis.set_yticks(middles, [printable(label_name(value, label_names)) for value in named])
        axis.tick_params(which="major", length=0, labelsize=8, pad=9)


def sorted_samples(kernel: LossKernel, labels: Tensor | None) -> Tensor:
    """(at most 1000,) samples, spread evenly over the sorted ones."""
    size = kernel.num_samples
    some = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:SHOWN].sort().values
    if labels is not None:
        order = labels.argsort(stable=True)
        some = order[torch.linspace(0, size - 1, len(some), dtype=torch.float64).round().long()]
    if len(some) < 3:
        return some
    hierarchy = needs("scipy.cluster.hierarchy")
    distance = estimators.correlation_distance(kernel.block(some, some).cpu().double(), "linear")
    position = torch.empty(len(some), dtype=torch.int64)
    for value in [None] if labels is None else labels[some].unique().tolist():
        member = torch.arange(len(some)) if value is None else (labels[some] == value).nonzero().flatten()  # type: ignore[index]
        leaves = torch.arange(len(member))
        if len(member) > 2:
            upper = torch.triu_indices(len(member), len(member), 1)
            condensed = distance[member][:, member][upper[0], upper[1]].numpy()
            leaves = torch.from_numpy(hierarchy.leaves_list(hierarchy.linkage(condensed, "average")).copy()).long()
        position[member] = member[leaves]
    return some[position]


def scatter(
    axis: Axes,
    kernel: LossKernel,
    embedding: Tensor,
    labels: Tensor | None,
    label_names: Sequence[str] | None = None,
) -> None:
    """The embedding: a colour and a marker for each label, a colour bar for many, or the spread of the loss without any."""
    points = embedding.float().cpu().numpy()
    style: dict[str, Any] = {
        "s": min(18.0, max(0.5, 2e4 / len(points))),
        "linewidths": 0,
        "alpha": 0.75,
        "rasterized": True,
    }
    values = labels.unique() if labels is not None else torch.empty(0)
    if labels is not None and len(values) <= LEGEND:
        for i, value in enumerate(values.tolist()):
            part = points[(labels == value).numpy()]
            axis.scatter(
                part[:, 0], part[:, 1], color=PALETTE[i % len(PALETTE)], marker=MARKERS[i],
                label=printable(label_name(value, label_names)), zorder=2 + (i * 7 % len(values)) / 100, **style,
            )  # fmt: skip
        legend = axis.legend(
            frameon=False, fontsize=8, handletextpad=0.2, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.02)
        )
        for handle in legend.legend_handles:
            handle.set(sizes=[28.0], alpha=1.0)  # type: ignore[union-attr]
        axis.set_title(f"one dot a sample, by {kind_of(kernel, labels)}")
    elif labels is not None:
        places = torch.searchsorted(values, labels).numpy()
        drawn = axis.scatter(points[:, 0], points[:, 1], c=places, cmap="viridis", **style)
        axis.figure.colorbar(
            drawn, ax=axis, fraction=0.045, pad=0.03, label=f"place of its {kind_of(kernel, labels)} in their order"
        )
        axis.set_title(f"one dot a sample, {len(values):,} {kind_of(kernel, labels)}s")
    else:
        spread = kernel.variance.clamp_min(0.0).sqrt().clamp_min(1e-12).log10().cpu().numpy()
        drawn = axis.scatter(points[:, 0], points[:, 1], c=spread, cmap="viridis", **style)
        axis.figure.colorbar(drawn, ax=axis, fraction=0.045, pad=0.03, label="log10 of the loss's standard deviation")
        axis.set_title("one dot a sample")
    axis.set(xticks=[], yticks=[])
    low, high = (torch.from_numpy(points).quantile(q, 0).numpy() for q in (0.001, 0.999))
    margin = 0.08 * (high - low) + 1e-9
    axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))


def chains_figure(kernel: LossKernel) -> Figure:
    """Mean loss of the chains by draw, and the autocorrelation times and R-hat of the subset."""
    record, diagnostics = kernel.record, kernel.diagnostics
    figure = new_figure(11, 3.6)
    traces, times, hats = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
    living = [chain for chain in range(kernel.num_chains) if chain not in record.dead]
    every = max(1, record.read.shape[1] // 1000)
    few = len(living) <= NAMED_CHAINS
    for number, chain in enumerate(living[:CHAINS]):
        loss = record.mean_loss[chain].masked_fill(~record.finite[chain], math.nan)[::every]
        style = line_style(number) if few else {"color": BLUE, "alpha": 0.5}
        label = {"label": f"chain {chain}"} if few else {}
        traces.plot(range(0, every * len(loss), every), loss.numpy(), linewidth=1.5 if few else 0.9, **style, **label)
    low, high = traces.get_ylim()
    for chain, death in record.dead.items():
        loss = record.mean_loss[chain, :death]
        traces.plot(range(death), loss.numpy(), color=RED, linewidth=1.5, linestyle="--")
        level = loss[-1].clamp(low, high).item() if death else (low + high) / 2
        traces.plot([death], [level], "x", color=RED, markersize=8, clip_on=False, label=f"chain {chain} died")
    start = diagnostics.initial_loss
    if math.isfinite(start):
        traces.axhline(start, color="black", linewidth=1.2, linestyle=":", label="at w*, the trained weights")
        low, high = min(low, start - 0.05 * (high - low)), max(high, start + 0.05 * (high - low))
    if living:
        traces.set_ylim(low, high)
    more = f", {CHAINS} of {len(living)} chains" if len(living) > CHAINS else ""
    traces.set(title=f"mean loss of the chains{more}", xlabel="draw", ylabel="mean loss over the samples")
    traces.xaxis.get_major_locator().set_params(integer=True)
    if traces.get_legend_handles_labels()[0]:
        traces.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17), handlelength=3
        )
    for axis, values, limit, title in (
        (times, diagnostics.autocorrelation_time, TAU, "autocorrelation time (draws)"),
        (hats, diagnostics.r_hat, R_HAT, "split R̂"),
    ):
        values = values[values.isfinite()]
        if len(values):
            axis.hist(values.numpy(), bins=min(30, max(5, len(values) // 4)), color=BLUE, alpha=0.8)
            axis.axvline(limit, color=RED, linewidth=1.5, linestyle="--", label=f"limit, {limit:g}")
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        axis.set(title=title, ylabel="samples")
    return figure


def correlations_figure(kernel: LossKernel, labels: Tensor | None) -> Figure:
    """Distribution of ρ over pairs (paper, Figure 2 D), and loss variance against the loss at w*."""
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    some = torch.randperm(kernel.num_samples, generator=torch.Generator().manual_seed(1))[:SHOWN]
    rho = kernel.block(some, some).cpu()
    pair = torch.ones_like(rho, dtype=torch.bool).triu(1)
    kinds = [("all pairs", pair, BLUE, "-")]
    if labels is not None:
        same = labels[some, None] == labels[some]
        kinds = [("other pairs", pair & ~same, BLUE, "--"), (f"same {kind_of(kernel, labels)}", pair & same, RED, "-")]
    values = [(name, rho[which], color, dashes) for name, which, color, dashes in kinds if which.any()]
    low = min((found.min().item() for _, found, _, _ in values), default=-1.0)
    high = max((found.max().item() for _, found, _, _ in values), default=1.0)
    for name, found, color, dashes in values:
        mean, named = found.mean().item(), f"{name}, mean {found.mean():.3f}"
        left.hist(
            found.numpy(), bins=80, range=(low, high), density=True, histtype="step", color=color, label=named,
            linestyle=dashes, linewidth=1.5,
        )  # fmt: skip
        left.axvline(mean, color=color, linewidth=1, linestyle=":")
    left.set(title="correlations of pairs (dotted: their means)", xlabel="correlation ρ", yscale="log")
    left.set_ylabel("density (logarithmic)")
    if values:
        left.legend(frameon=False, fontsize=8)
    loss, spread = kernel.initial_losses.cpu(), kernel.variance.clamp_min(0.0).sqrt().cpu()
    shown = (loss > 0) & (spread > 0)
    name = "loss at w*"
    if not shown.any():
        loss, name = kernel.mean.cpu(), "mean loss"
        shown = (loss > 0) & (spread > 0)
    right.scatter(loss[shown].numpy(), spread[shown].numpy(), s=4, alpha=0.4, color=BLUE, linewidths=0, rasterized=True)
    right.set(xlabel=name, ylabel="standard deviation of the loss")
    if shown.any():
        right.set(xscale="log", yscale="log")
    hidden = int((~shown).sum())
    right.set_title("spread of each sample's loss" + (f" ({hidden:,} without a positive one)" if hidden else ""))
    return figure


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside of pyplot's state."""
    figure: Figure = needs("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def check_label_names(labels: Tensor | None, names: Sequence[str] | None) -> None:
    """Every label has a name: a negative one would be counted from the end of them."""
    if names is None:
        return
    if labels is None:
        raise ValueError("label_names needs labels, and neither the call nor the kernel has any")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise ValueError(
            f"label_names names labels 0 ... {len(names) - 1}, and labels hold {low} ... {high}; name every label, or"
            " number them anew, for example by labels.unique(return_inverse=True)[1]"
        )


def labels_of(kernel: LossKernel, labels: Tensor | None) -> Tensor | None:
    """The labels that were given, or the kernel's own."""
    return kernel.labels if labels is None else estimators.sample_labels("labels", labels, kernel.num_samples).cpu()


def kind_of(kernel: LossKernel, labels: Tensor) -> str:
    """What labels are called where they are shown: the diagnostics' are the kernel's own, others are groups."""
    return "label" if kernel.labels is None or torch.equal(labels.cpu(), kernel.labels.cpu()) else "group"


def label_name(value: int, names: Sequence[str] | None) -> str:
    """What a label is called."""
    return str(value) if names is None else names[value]


def printable(text: str) -> str:
    """Text that matplotlib shows: a dollar sign would start a formula; an underscore, or nothing, hides a legend entry."""
    short = text if len(text) <= 24 else f"{text[:8]}…{text[-15:]}"  # the ends of paths differ
    return (" " * short.startswith("_") + short).replace("$", r"\$") or "–"
