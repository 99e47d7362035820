"""Pictures of a loss kernel and its report, one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harmonic_triton._common import files, validate
from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.chain_record import R_HAT, TAU
from harmonic_triton.losskernel.estimators import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from harmonic_triton.losskernel.kernel import LossKernel

SHOWN = 1000  # samples along a side of the heatmap
LEGEND = 10  # labels that get a colour of their own and a legend
EMBEDDINGS = {"umap": "UMAP of the nearest-neighbour graph", "pca": "the first two principal components"}
CHAINS = 40  # chains drawn one by one
BLUE, RED, GREY = "#0b6e99", "#d1495b", "#8a8f98"
CSS = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2328; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
p { margin: .4rem 0 .8rem } img { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top }
th { font-weight: 600 } td { overflow-wrap: anywhere }
.good { color: #1a7f37 } .bad { color: #b3261e; font-weight: 600 } .open { color: #656d76 }
.warning { background: #fdf0ef; border-left: 4px solid #b3261e; padding: .6rem 1rem }
code { font-size: .86rem; background: #f4f6f8; padding: .08rem .25rem; border-radius: 3px; white-space: pre-wrap }
"""


# --- figures -----------------------------------------------------------------------------------------------------------


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
        labels: (m,) integers that sort and colour the samples, None for the kernel's own; label_names: of labels 0, 1, ...

    Raises:
        ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
    """
    labels = sample_labels(kernel, labels)
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
        colours = [palette[int(i)] for i in torch.searchsorted(values, labels[order])]
        axis.scatter(points[order, 0], points[order, 1], color=colours, **style)
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
    kinds = [("all pairs", pair, GREY)]
    if labels is not None:
        same = labels[some, None] == labels[some]
        kinds = [("other pairs", pair & ~same, BLUE), ("same label", pair & same, RED)]
    values = [(name, rho[which], colour) for name, which, colour in kinds if which.any()]
    low = min((found.min().item() for _, found, _ in values), default=-1.0)
    high = max((found.max().item() for _, found, _ in values), default=1.0)
    for name, found, colour in values:
        left.hist(found.numpy(), bins=80, range=(low, high), density=True, histtype="step", color=colour, label=name)
        left.axvline(found.mean().item(), color=colour, linewidth=1, linestyle=":")
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
    return needs("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


# --- the report --------------------------------------------------------------------------------------------------------


def write(
    kernel: LossKernel,
    path: str | os.PathLike[str],
    *,
    title: str = "Loss kernel",
    names: Sequence[str] | None = None,
    labels: Tensor | None = None,
    label_names: Sequence[str] | None = None,
    samples: Sequence[int] | None = None,
    num_neighbors: int = 8,
    exclude_same: Tensor | bool | None = None,
    method: str = "umap",
    embedding: Tensor | None = None,
) -> Path:
    """Write the report: diagnostics in plain words (which chains died), chains, kernel, embedding, neighbours.

    Args:
        names: what to call the samples, m of them, in the table of neighbours.
        labels: (m,) integers that sort and colour the samples, None for the kernel's own; label_names: of labels 0, 1, ...
        samples: whose neighbours are listed; None: twelve spread over the order of their loss variance.
        exclude_same: leave pairs with one label out of neighbours and embedding: (m,) labels, or True for the kernel's.
        method, embedding: as in :func:`overview`.

    Returns:
        The path.

    Raises:
        ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
    """
    if names is not None and len(names) != kernel.num_samples:
        raise ValueError(f"names must hold {kernel.num_samples} strings, one a sample, got {len(names)}")
    if method not in EMBEDDINGS:
        raise ValueError(f"method must be 'umap' or 'pca', got {method!r}")
    labels = sample_labels(kernel, labels)
    check_label_names(labels, label_names)
    layout = EMBEDDINGS[method if kernel.num_samples > 3 else "pca"] if embedding is None else "the embedding that was given"
    excluded = exclude_same is not None and exclude_same is not False
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{esc(title)}</title><style>{CSS}</style><h1>{esc(title)}</h1>"
        + summary(kernel)
        + diagnostics_section(kernel)
        + section(
            "Chains",
            "Each line is a chain's mean loss over the samples. Histograms are of a random subset of the samples; the "
            "dashed line is where a value becomes a warning.",
            image(chains_figure(kernel), "mean loss of the chains, autocorrelation times and R-hat"),
        )
        + section(
            "Kernel and embedding",
            f"Left: correlations of the samples' losses. Right: {layout}"
            f"{', pairs with one label left out' if excluded else ''}. Axes of an embedding have no meaning.",
            image(
                overview(
                    kernel,
                    embedding=embedding,
                    labels=labels,
                    label_names=label_names,
                    method=method,
                    exclude_same=exclude_same,
                ),
                "sorted correlation matrix and embedding",
            ),
        )
        + section(
            "Correlations and spreads",
            f"Correlations of {min(SHOWN, kernel.num_samples):,} random samples with one another{shares(kernel)}",
            image(correlations_figure(kernel, labels), "distribution of correlations; spread against loss"),
        )
        + neighbor_section(kernel, samples, num_neighbors, exclude_same, names)
        + configuration(kernel)
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, page)
    return path


def summary(kernel: LossKernel) -> str:
    about = kernel.about
    rows = [
        ("samples", f"{kernel.num_samples:,}"),
        ("draws in the kernel", f"{kernel.num_draws:,} of {kernel.num_chains} chains"),
        ("estimate", "within chains" if kernel.within_chain else "pooled over chains"),
        (
            "mean loss: at w*, under the probe",
            f"{shown(kernel.diagnostics.initial_loss)}, {shown(kernel.mean.mean().item())}",
        ),
        ("local learning coefficient λ̂", shown(kernel.llc)),
        ("singular fluctuation ν̂", shown(kernel.singular_fluctuation)),
        ("nβ, β, ε", f"{shown(about.nbeta)}, {shown(kernel.beta)}, {shown(about.step_size)}"),
        ("localization γ", shown(about.config.get("localization", math.nan))),
    ]
    deaths = [f"Chain {chain} died at draw {draw}." for chain, draw in kernel.record.dead.items()]
    warning = f"<p class=warning>{' '.join(deaths)} The kernel is that of the other chains.</p>" if deaths else ""
    return warning + table(None, [[esc(name), esc(value)] for name, value in rows])


def diagnostics_section(kernel: LossKernel) -> str:
    marks = {True: ("good", "good"), False: ("bad", "look here"), None: ("open", "–")}
    rows = []
    for verdict in kernel.diagnostics.verdicts():
        kind, word = marks[verdict.good]
        mark = f"<span class='{kind}'>{word}</span>"
        rows.append([esc(verdict.name), esc(verdict.value), mark, esc(verdict.words)])
    return section("Can the draws be trusted?", "", table(["", "value", "", "in words"], rows))


def neighbor_section(
    kernel: LossKernel,
    samples: Sequence[int] | None,
    count: int,
    exclude_same: Tensor | bool | None,
    names: Sequence[str] | None,
) -> str:
    if samples is None:
        order = kernel.variance.argsort(descending=True).cpu()
        samples = order[torch.linspace(0, len(order) - 1, min(12, len(order)), dtype=torch.float64).long()].tolist()
    rows = [
        [
            f"<code>{esc(near.name)}</code>",
            shown(kernel.variance[near.sample].sqrt().item()),
            " ".join(f"<code>{esc(name)}</code>&nbsp;{rho:.2f}" for _, name, rho in near.neighbors),
        ]
        for near in kernel.neighbor_table(samples, count, exclude_same=exclude_same, names=names)
    ]
    return section(
        "Nearest samples",
        "The most correlated samples of a few, with ρ; from the largest spread of the loss to the smallest unless chosen.",
        table(["sample", "spread", "most correlated"], rows),
    )


def configuration(kernel: LossKernel) -> str:
    from harmonic_triton import __version__

    values = {**kernel.about.config, "training samples": kernel.about.num_train or "unknown"}
    values |= {f"fingerprint: {name}": value for name, value in kernel.about.fingerprint.items() if name not in values}
    values |= {
        "harmonic_triton": __version__,
        "torch": torch.__version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    rows = [[esc(str(name)), f"<code>{esc(str(value))}</code>"] for name, value in values.items()]
    return section("Configuration", "", "<details><summary>Every setting</summary>", table(None, rows), "</details>")


# --- helpers -----------------------------------------------------------------------------------------------------------


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


def sample_labels(kernel: LossKernel, labels: Tensor | None) -> Tensor | None:
    return kernel.labels if labels is None else estimators.sample_labels("labels", labels, kernel.num_samples).cpu()


def shares(kernel: LossKernel) -> str:
    """The first principal components' shares in a sentence."""
    if kernel.num_samples < 7:
        return "."
    found = ", ".join(f"{100 * share:.1f}" for share in kernel.principal_components(5).share.tolist())
    return f"; the first five principal components of ρ hold {found} % of its trace."


def label_name(value: int, names: Sequence[str] | None) -> str:
    return str(value) if names is None else names[value]


def shown(value: float) -> str:
    """Four digits, and a dash for what is unknown."""
    return "–" if math.isnan(value) else f"{value:,.4g}"


def printable(text: str) -> str:
    """Text that matplotlib shows: a dollar sign would start a formula; an underscore, or nothing, hides a legend entry."""
    return (" " * text.startswith("_") + text[:24]).replace("$", r"\$") or "–"


def esc(text: str) -> str:
    return html.escape(text)


def section(title: str, sentence: str, *parts: str) -> str:
    return f"<h2>{title}</h2>" + (f"<p>{sentence}</p>" if sentence else "") + "".join(parts)


def table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already."""
    header = "" if head is None else f"<tr>{''.join(f'<th>{esc(text)}</th>' for text in head)}</tr>"
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{header}{body}</table></div>'


def image(figure: Figure, text: str) -> str:
    """The figure as an inline PNG."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text}" src="data:image/png;base64,{encoded}">'
