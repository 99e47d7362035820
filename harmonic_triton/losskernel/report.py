"""The report of a loss kernel, one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harmonic_triton._common import files
from harmonic_triton._version import __version__
from harmonic_triton.losskernel.figures import (
    SHOWN,
    chains_figure,
    check_label_names,
    correlations_figure,
    kind_of,
    labels_of,
    overview,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harmonic_triton.losskernel.kernel import LossKernel

EMBEDDINGS = {"umap": "UMAP of the nearest-neighbour graph", "pca": "the first two principal components"}
CSS = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2328; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
p { margin: .4rem 0 .8rem } img { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top }
th { font-weight: 600 } td { overflow-wrap: break-word } td small { color: #656d76; display: block }
.good { color: #00664a } .bad { color: #a63a00; font-weight: 600 } .open { color: #656d76 }
.good, .bad { white-space: nowrap } .conclusion { border-left: 4px solid #0072B2; padding: .2rem 1rem }
.warning { background: #fdf3ec; border-left: 4px solid #a63a00; padding: .6rem 1rem }
code { font-size: .86rem; background: #f4f6f8; padding: .08rem .25rem; border-radius: 3px; white-space: pre-wrap }
"""
ASKS = {  # what each line of the diagnostics asks, by its name
    "chains": "Did every chain stay finite?",
    "split R̂": "Do the chains, and the halves of each, sample one place? R̂ compares the spread between them with that within: 1"
    " where they do.",
    "autocorrelation time (draws)": "After how many draws has a loss forgotten its value?",
    "split-half CKA": "Would other draws give the same kernel? The likeness of the kernels of two halves, from 0 to 1.",
    "excess loss of the chains": "How far did the chains climb above the loss at w*?",
    "step size ε": "Is a step short enough for the steepest direction?",
    "constant samples": "Are there losses that never move, of which nothing can be said?",
    "same-label confound (mean ρ)": "Are correlations no more than samples having one label?",
}


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
        labels: (m,) integers that sort and colour the samples, None for the kernel's own.
        label_names: of labels 0, 1, ...
        samples: whose neighbours are listed; None: twelve spread over the order of their loss variance.
        exclude_same: leave pairs with one label out of neighbours and embedding: (m,) labels, or True for the kernel's.
        method, embedding: as in ``figures.overview``.

    Returns:
        The path.

    Raises:
        ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
    """
    if names is not None and len(names) != kernel.num_samples:
        raise ValueError(f"names must hold {kernel.num_samples} strings, one a sample, got {len(names)}")
    if method not in EMBEDDINGS:
        raise ValueError(f"method must be 'umap' or 'pca', got {method!r}")
    labels = labels_of(kernel, labels)
    check_label_names(labels, label_names)
    layout = (
        EMBEDDINGS[method if kernel.num_samples > 3 else "pca"] if embedding is None else "the embedding that was given"
    )
    excluded = exclude_same is not None and exclude_same is not False
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{esc(title)}</title><style>{CSS}</style><h1>{esc(title)}</h1>"
        + conclusion(kernel)
        + summary(kernel)
        + diagnostics_section(kernel)
        + section(
            "Chains",
            "Each line is a chain's mean loss over the samples: lines that wander about one level, over and through one another, "
            "are as they should be. Histograms are of a random subset of the samples; beyond the dashed line a value is a "
            "warning.",
            image(chains_figure(kernel), "mean loss of the chains, autocorrelation times and R-hat"),
        )
        + section(
            "Kernel and embedding",
            "Left: correlations of the samples' losses; red blocks are samples that the model treats alike"
            f"{f', ticks part the {kind_of(kernel, labels)}s' if labels is not None else ''}. Right: {layout}"
            f"{', pairs with one label left out' if excluded else ''}. Axes of an embedding have no meaning, and neither have "
            "distances across it.",
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


def conclusion(kernel: LossKernel) -> str:
    """What to make of the kernel, in two or three sentences."""
    verdicts = kernel.diagnostics.verdicts()
    confound = verdicts[-1]
    failed = [verdict.name for verdict in verdicts[:-1] if verdict.good is False]
    unknown = [
        verdict.name for verdict in verdicts if verdict.name in ("split R̂", "split-half CKA") and verdict.good is None
    ]
    if failed:
        text = (
            f"<b>Not to be relied on yet.</b> {esc(_listed(failed))}: look below for what is wrong and what mends it. Until then"
            " read averages over many pairs, not single ones."
        )
    elif unknown:
        text = f"<b>Not known whether the draws suffice</b>, for there are too few: {esc(_listed(unknown))} could not be computed."
    else:
        text = (
            "<b>The draws can be trusted:</b> chains and halves agree, and single correlations can be read. Samples whose losses"
            " move together are treated alike by the model."
        )
    if confound.good is not None:
        text += f" Mean correlation of pairs: {esc(confound.value)}. {esc(confound.words)}"
    return f"<p class=conclusion>{text}</p>"


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def summary(kernel: LossKernel) -> str:
    about = kernel.about
    rows = [
        ("samples", f"{kernel.num_samples:,}", "Inputs whose losses are compared."),
        (
            "draws in the kernel",
            f"{kernel.num_draws:,} of {kernel.num_chains} chains",
            "Each is a set of weights near the trained ones; at each the loss of every sample was taken.",
        ),
        (
            "estimate",
            "within chains" if kernel.within_chain else "pooled over chains",
            "Losses are taken about their mean in "
            + ("each chain." if kernel.within_chain else "all chains together."),
        ),
        (
            "mean loss: at w*, under the probe",
            f"{shown(kernel.diagnostics.initial_loss)}, {shown(kernel.mean.mean().item())}",
            "w* are the trained weights; the probe is the chains that wander about them.",
        ),
        (
            "local learning coefficient λ̂",
            shown(kernel.llc),
            "nβ times how much the probe raises the mean loss: about half the number of directions that the loss holds. Below 0"
            " the probe has found lower losses than w*, which is then no minimum.",
        ),
        (
            "singular fluctuation ν̂",
            shown(kernel.singular_fluctuation),
            "β/2 times the variances of all training samples' losses, summed: how much single losses move. In theory it decides"
            " how far the loss on new data lies above that on the training data.",
        ),
        (
            "nβ, β, ε",
            f"{shown(about.nbeta)}, {shown(kernel.beta)}, {shown(about.step_size)}",
            "nβ: how strongly the loss holds the chains, as so many samples would; n is the number of training samples and β their"
            " weight. ε is the size of a step.",
        ),
        (
            "localization γ",
            shown(about.config.get("localization", math.nan)),
            "The pull back to w*: the larger, the nearer the chains stay.",
        ),
    ]
    deaths = [f"Chain {chain} died at draw {draw}." for chain, draw in kernel.record.dead.items()]
    warning = f"<p class=warning>{' '.join(deaths)} The kernel is that of the other chains.</p>" if deaths else ""
    return warning + table(
        None, [[esc(name), esc(value), f"<small>{esc(words)}</small>"] for name, value, words in rows]
    )


def diagnostics_section(kernel: LossKernel) -> str:
    marks = {True: ("good", "good"), False: ("bad", "look here"), None: ("open", "–")}
    rows = []
    for verdict in kernel.diagnostics.verdicts():
        kind, word = marks[verdict.good]
        mark = f"<span class='{kind}'>{word}</span>"
        asks = f"{esc(verdict.name)}<small>{esc(ASKS[verdict.name])}</small>"
        rows.append([asks, esc(verdict.value), mark, esc(verdict.words)])
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


def shares(kernel: LossKernel) -> str:
    """The first principal components' shares in a sentence."""
    if kernel.num_samples < 7:
        return "."
    found = ", ".join(f"{100 * share:.1f}" for share in kernel.principal_components(5).share.tolist())
    return f"; the first five principal components of ρ hold {found} % of its trace."


def shown(value: float) -> str:
    """Four digits, and a dash for what is unknown."""
    return "–" if math.isnan(value) else f"{value:,.4g}"


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
