"""Pictures of a loss kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.extras import needs
from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.diagnostics import R_HAT, TAU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from harmonic_triton.losskernel.kernel import LossKernel

SHOWN = 1000  # samples along a side of the heatmap
LEGEND = 10  # labels that get a colour of their own and a legend
CHAINS = 40  # chains drawn one by one
BLUE, RED, GRAY = "#0b6e99", "#d1495b", "#8a8f98"


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
    axis.set(title=f"{some}{kernel.num_samples:,} samples, {'by label' if labels is not None else 'by cluster'}")
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    if labels is None:
        return
    values, counts = labels[shown].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    if len(values) <= 60:
        for end in ends[:-1].tolist():
            axis.axhline(end - 0.5, color="black", linewidth=0.4, alpha=0.6)
            axis.axvline(end - 0.5, color="black", linewidth=0.4, alpha=0.6)
    if len(values) <= 30:
        axis.set_yticks((ends - counts / 2).tolist(), [printable(label_name(int(v), label_names)) for v in values])
        axis.tick_params(length=0, labelsize=8)


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
    """The embedding, coloured by label, or by loss variance without labels."""
    points = embedding.float().cpu().numpy()
    style: dict[str, Any] = {
        "s": min(14.0, max(0.5, 2e4 / len(points))),
        "linewidths": 0,
        "alpha": 0.75,
        "rasterized": True,
    }
    values = labels.unique() if labels is not None else torch.empty(0)
    if labels is not None and len(values) <= LEGEND:
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        palette = needs("matplotlib").colormaps["tab10"].colors
        colors = [palette[int(i)] for i in torch.searchsorted(values, labels[order])]
        axis.scatter(points[order, 0], points[order, 1], color=colors, **style)
        for i, value in enumerate(values.tolist()):
            axis.plot([], [], "o", color=palette[i], label=printable(label_name(value, label_names)), markersize=5)
        axis.legend(frameon=False, fontsize=8, loc="best", handletextpad=0.2)
        axis.set_title("by label")
    elif labels is not None:
        axis.scatter(points[:, 0], points[:, 1], c=torch.searchsorted(values, labels).numpy(), cmap="turbo", **style)
        axis.set_title(f"colours: {len(values):,} labels in order")
    else:
        spread = kernel.variance.clamp_min(0.0).sqrt().clamp_min(1e-12).log10().cpu().numpy()
        drawn = axis.scatter(points[:, 0], points[:, 1], c=spread, cmap="viridis", **style)
        axis.figure.colorbar(drawn, ax=axis, fraction=0.045, pad=0.03, label="log10 of the loss's standard deviation")
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
    for chain in living[:CHAINS]:
        loss = record.mean_loss[chain].masked_fill(~record.finite[chain], math.nan)[::every]
        traces.plot(range(0, every * len(loss), every), loss.numpy(), color=BLUE, linewidth=0.6, alpha=0.45)
    low, high = traces.get_ylim()
    for chain, death in record.dead.items():
        loss = record.mean_loss[chain, :death]
        traces.plot(range(death), loss.numpy(), color=RED, linewidth=1, linestyle="--")
        level = loss[-1].clamp(low, high).item() if death else (low + high) / 2
        traces.plot([death], [level], "x", color=RED, markersize=8, clip_on=False, label=f"chain {chain} died")
    start = diagnostics.initial_loss
    if math.isfinite(start):
        traces.axhline(start, color="black", linewidth=1, linestyle=":", label="at w*")
        low, high = min(low, start - 0.05 * (high - low)), max(high, start + 0.05 * (high - low))
    if living:
        traces.set_ylim(low, high)
    more = f", {CHAINS} of {len(living)} chains" if len(living) > CHAINS else ""
    traces.set(title=f"mean loss of the chains{more}", xlabel="draw")
    if traces.get_legend_handles_labels()[0]:
        traces.legend(frameon=False, fontsize=8)
    for axis, values, limit, title in (
        (times, diagnostics.autocorrelation_time, TAU, "autocorrelation time (draws)"),
        (hats, diagnostics.r_hat, R_HAT, "split R̂"),
    ):
        values = values[values.isfinite()]
        if len(values):
            axis.hist(values.numpy(), bins=min(30, max(5, len(values) // 4)), color=BLUE, alpha=0.8)
            axis.axvline(limit, color=RED, linewidth=1, linestyle="--")
        axis.set(title=title, ylabel="samples")
    return figure


def correlations_figure(kernel: LossKernel, labels: Tensor | None) -> Figure:
    """Distribution of ρ over pairs (paper, Figure 2 D), and loss variance against the loss at w*."""
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    some = torch.randperm(kernel.num_samples, generator=torch.Generator().manual_seed(1))[:SHOWN]
    rho = kernel.block(some, some).cpu()
    pair = torch.ones_like(rho, dtype=torch.bool).triu(1)
    kinds = [("all pairs", pair, GRAY)]
    if labels is not None:
        same = labels[some, None] == labels[some]
        kinds = [("other pairs", pair & ~same, BLUE), ("same label", pair & same, RED)]
    values = [(name, rho[which], color) for name, which, color in kinds if which.any()]
    low = min((found.min().item() for _, found, _ in values), default=-1.0)
    high = max((found.max().item() for _, found, _ in values), default=1.0)
    for name, found, color in values:
        left.hist(found.numpy(), bins=80, range=(low, high), density=True, histtype="step", color=color, label=name)
        left.axvline(found.mean().item(), color=color, linewidth=1, linestyle=":")
    left.set(title="correlations of pairs (dotted: means)", xlabel="ρ", ylabel="density (log)", yscale="log")
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


def label_name(value: int, names: Sequence[str] | None) -> str:
    """What a label is called."""
    return str(value) if names is None else names[value]


def printable(text: str) -> str:
    """Text that matplotlib shows: a dollar sign would start a formula; an underscore, or nothing, hides a legend entry."""
    return (" " * text.startswith("_") + text[:24]).replace("$", r"\$") or "–"
