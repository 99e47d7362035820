"""The report of a run: one HTML file that needs nothing else, made from the checkpoints."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import numpy as np
import tokenizers
import torch
from matplotlib.figure import Figure
from torch import Tensor

import harmonic_triton as ht
from harmonic_triton.tools import write_text

from . import analysis, figures, head_cost
from .config import Config
from .data import Corpus
from .model import GPT
from .trained import AVERAGED, NAMES, Trained, load_trained

SHORT = 300  # steps below which a run is a first look
CSS = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2328; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
p { margin: .4rem 0 .8rem } .quiet { color: #656d76; font-size: .92rem }
.conclusion { border-left: 4px solid #0072B2; padding: .2rem 1rem } img { width: 100%; height: auto } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e3e6ea; vertical-align: top }
th { font-weight: 600 } td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
code { font-size: .86rem; background: #f4f6f8; padding: .08rem .25rem; border-radius: 3px }
pre { font-size: .82rem; line-height: 1.4; background: #f4f6f8; padding: .8rem 1rem; overflow-x: auto;
      border-left: 3px solid #c9ced6; white-space: pre-wrap }
"""


def write_report(config: Config, corpus: Corpus, device: torch.device) -> Path:
    """Measure what the report shows and write <out>/report.html."""
    runs = [load_trained(config, corpus, device, loss) for loss in config.losses]
    counts = torch.from_numpy(np.bincount(corpus.train[: 2**24], minlength=corpus.vocab_size))
    groups = analysis.find_parallelograms(corpus.vocabulary)
    sections = [
        numbers_section(config, corpus, runs, groups),
        loss_section(config, corpus, runs),
        head_section(config, corpus, device) if config.measure_head else "",
        norm_section(runs),
        embedding_section(corpus, runs, counts),
        neighbor_section(corpus, runs, counts),
        parallelogram_section(config, runs, groups, counts),
        sample_section(config, runs),
        configuration_section(config, corpus, runs, device),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>GPT, {" and ".join(r.name for r in runs)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{CSS}</style></head>'
        f"<body>{''.join(sections)}</body></html>"
    )
    path = Path(config.out) / "report.html"
    write_text(path, page)
    return path


# ---------------------------------------------------------------------------------------------------------- sections


def numbers_section(config: Config, corpus: Corpus, runs: list[Trained], groups: list[analysis.Parallelograms]) -> str:
    """The title and the table of final numbers."""
    tokens = config.steps * config.batch_size * config.block
    guess = f"a guess: ln V = {math.log(corpus.vocab_size):.3f}"

    def quadruple_median(run: Trained) -> str:
        if not groups:
            return "none found"
        return f"{run.parallelogram_losses(groups).median().item():.3f}"

    rows: list[tuple[str, Callable[[Trained], str]]] = [
        ("validation loss at the end (nats a token)", lambda r: f"{r.history['val'][-1][1]:.4f}"),
        (
            f"validation loss before training ({guess})",
            lambda r: f"{r.history['val'][0][1]:.4f}",
        ),
        (f"training loss, mean of the last {min(AVERAGED, config.steps)} steps", lambda r: f"{r.last_mean:.4f}"),
        ("peak learning rate", lambda r: f"{config.peak_lr(r.loss):.2e}"),
        ("training time (s)", lambda r: f"{r.seconds:.1f}"),
        ("training speed (tokens/s)", lambda r: f"{tokens / r.seconds:,.0f}"),
        ("mean norm of the class vectors", lambda r: f"{r.history['weight_norm'][-1][1]:.3f}"),
        ("its growth over the last quarter", lambda r: f"{100 * r.late_growth:+.2f} %"),
        ("variance in two principal components", lambda r: f"{100 * sum(r.principal.share):.1f} %"),
        ("parallelogram loss, median", quadruple_median),
    ]
    body = table(["", *(r.name for r in runs)], [[label, *(show(r) for r in runs)] for label, show in rows])
    what = f"A GPT trained with {runs[0].name} loss for {config.steps:,} steps, {tokens:,} tokens"
    if len(runs) > 1:
        what = (
            f"The same GPT, trained with each loss in turn for {config.steps:,} steps, {tokens:,} tokens, on the same "
            "batches and from the same initial weights but for the gain of the last norm"
        )
    return (
        f"<h1>GPT with {' and '.join(r.name for r in runs)} loss</h1>"
        f"<p>{what}. Text: {esc(corpus.description)}.</p>{conclusion(config, corpus, runs)}{body}"
    )


def conclusion(config: Config, corpus: Corpus, runs: list[Trained]) -> str:
    """What to make of the numbers, in a few sentences."""
    guess, first = math.log(corpus.vocab_size), runs[0]
    unlearned = [run.name for run in runs if run.final >= guess]
    if unlearned:
        text = f"{' and '.join(unlearned)} has learned nothing yet: its validation loss is not below ln V = {guess:.2f}, a guess."
    elif len(runs) == 1:
        text = f"The {first.name} loss ends at {first.final:.3f} nats a token, {guess - first.final:.2f} below a guess."
    else:
        best, other = sorted(runs, key=lambda run: run.final)
        gap = other.final - best.final
        lower = (
            f"{best.name} ends {gap:.3f} nats a token lower than {other.name}"
            if gap >= 5e-4
            else "Both end equally low"
        )
        text = f"{lower} ({best.final:.3f} and {other.final:.3f}); both are below a guess, ln V = {guess:.2f}."
    caution = "One seed and one learning rate: differences of some hundredths mean nothing."
    if config.steps < SHORT:
        caution = f"{config.steps:,} steps are a first look" + (
            "." if len(runs) == 1 else ": not which loss is better."
        )
    return f"<p class=conclusion><b>In short:</b> {esc(text)} {caution}</p>"


def loss_section(config: Config, corpus: Corpus, runs: list[Trained]) -> str:
    mixed = f" Both contain the uniform mix with α = {config.uniform_mix}." if config.uniform_mix else ""
    return section(
        "Loss",
        "Mean of −log p of the next token; −log p means the same for both losses. Thin lines are single steps, "
        "thick lines running means, the dotted line what equal probabilities for all classes cost; validation always uses the "
        f"same sequences.{mixed}",
        image("plot-loss", figures.losses(runs, math.log(corpus.vocab_size)), "training and validation loss by step"),
    )


def head_section(config: Config, corpus: Corpus, device: torch.device) -> str:
    shape = {
        "tokens": config.micro_batch_size * config.block,
        "width": config.width,
        "classes": corpus.vocab_size,
        "n": config.exponent,
        "dtype": config.dtype,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    cache = Path(config.out) / "head_cost.json"
    stored = json.loads(cache.read_text()) if cache.exists() else {}
    if stored.get("shape") != shape:
        stored = {"shape": shape, "heads": head_cost.compare(shape)}
        write_text(cache, json.dumps(stored, indent=1))
    heads = stored["heads"]
    measured = {head: cost for head, cost in heads.items() if "error" not in cost}
    rows = [
        [NAMES[head], f"{cost['ms']:.1f}", f"{cost['bytes'] / 2**20:.1f}"]
        if head in measured
        else [NAMES[head], "did not finish", esc(cost["error"])]
        for head, cost in heads.items()
    ]
    precision = "float32" if config.dtype == "float32" else f"float32 under {config.dtype} autocast"
    methods = ", ".join(sorted({cost["method"] for cost in measured.values()}))
    return section(
        "Cost of the head",
        f"Forward and backward of the head alone, on random inputs of this run's shape: {shape['tokens']:,} tokens, "
        f"D = {config.width}, V = {corpus.vocab_size:,}, {precision}, {device}, {shape['threads']} thread(s). "
        f"Time is the fastest of {head_cost.TIMINGS} passes in each of {head_cost.PROCESSES} fresh processes, memory "
        f"the median of their peaks by {methods}. "
        "The authors' dense form is s = |w|² + |x|² − 2w·x + 1e-4, p ∝ s<sup>−n/2</sup>, all N×V at once.",
        image("plot-head", figures.head_costs(measured), "time and peak memory of the heads"),
        table(["head", "time (ms)", "peak memory (MiB)"], rows),
    )


def norm_section(runs: list[Trained]) -> str:
    growth = "; ".join(
        f"{r.name} {r.history['weight_norm'][0][1]:.2f} to {r.history['weight_norm'][-1][1]:.2f},"
        f" {100 * r.late_growth:+.2f} % over the last quarter"
        for r in runs
    )
    return section(
        "Norm of the class vectors",
        "The harmonic loss has a minimum at finite weights, cross-entropy on separable data has none. "
        f"In this run: {growth}. The falling learning rate slows both.",
        image("plot-norm", figures.norms(runs), "mean weight norm by step"),
    )


def embedding_section(corpus: Corpus, runs: list[Trained], counts: Tensor) -> str:
    frequent = analysis.words(corpus.vocabulary, counts, 60)
    names = [(token, printable(analysis.label(corpus.vocabulary, token))) for token in frequent]
    return section(
        "Embeddings",
        "The class vectors (tied with the token embedding) on their top two principal components, one dot a token; "
        "darker dots are more frequent tokens, ␣ is a space, all panels have one scale. Titles give the share of the variance: "
        "where it is small, the picture shows little of what the vectors hold.",
        image("plot-embedding", figures.embeddings(runs, counts, names), "class vectors in two principal components"),
    )


def neighbor_section(corpus: Corpus, runs: list[Trained], counts: Tensor) -> str:
    chosen = analysis.words(corpus.vocabulary, counts, 12)
    found = [analysis.nearest_tokens(run.vectors, chosen, 6) for run in runs]

    def code(token: int) -> str:
        return f"<code>{esc(analysis.label(corpus.vocabulary, token))}</code>"

    rows = [
        [code(token), *(" ".join(code(other) for other, _ in lists[row]) for lists in found)]
        for row, token in enumerate(chosen)
    ]
    return section(
        "Nearest tokens",
        "For frequent tokens, the six others whose class vectors are nearest by Euclidean distance, nearest first.",
        table(["token", *(run.name for run in runs)], rows, escape=False),
    )


def parallelogram_section(
    config: Config, runs: list[Trained], groups: list[analysis.Parallelograms], counts: Tensor
) -> str:
    title = "Parallelograms"
    if not groups:
        return section(title, "No relation has two pairs whose words are single tokens here: nothing to measure.")
    chance = analysis.random_quadruples(counts, 2000, config.seed) if len(counts) >= 4 else None
    related = [run.parallelogram_losses(groups) for run in runs]
    random = [] if chance is None else [analysis.parallelogram_loss(run.principal.points, chance) for run in runs]
    picture = figures.parallelograms(runs, related, random)
    rows = []
    for group in groups:
        medians = [analysis.parallelogram_loss(r.principal.points, group.quadruples).median().item() for r in runs]
        pairs = ", ".join("/".join(pair) for pair in group.pairs)
        rows.append([group.relation, pairs, str(len(group.quadruples)), *(f"{m:.3f}" for m in medians)])
    if chance is not None:
        medians = [values.median().item() for values in random]
        rows.append(["random", "of the 500 most frequent tokens", str(len(chance)), *(f"{m:.3f}" for m in medians)])
    return section(
        title,
        "Two pairs of one relation, such as get/set and open/close, should span a parallelogram. The loss is the "
        "paper's Eq. 3, ‖E<sub>i</sub> + E<sub>n</sub> − E<sub>j</sub> − E<sub>m</sub>‖/σ on the top two principal "
        "components, unsquared, with σ² the mean of ‖E‖² over the vocabulary: 0 is a perfect parallelogram. "
        f"Only words that are single tokens take part; thin lines are four random frequent tokens. "
        f"{beside_chance(runs, related, random)}",
        image(
            "plot-parallelogram",
            picture,
            "cumulative distribution of the parallelogram loss",
        ),
        table(["relation", "pairs", "quadruples", *(f"median, {r.name}" for r in runs)], rows),
    )


def beside_chance(runs: list[Trained], related: list[Tensor], random: list[Tensor]) -> str:
    """Whether related pairs come nearer to parallelograms than random tokens do."""
    found = [
        f"{run.name} {mine.median():.2f} against {chance.median():.2f}"
        + ("" if mine.median() < 0.9 * chance.median() else ", no better than chance")
        for run, mine, chance in zip(runs, related, random, strict=False)
    ]
    return f"Medians of related pairs and random tokens: {'; '.join(found)}." if found else ""


def sample_section(config: Config, runs: list[Trained]) -> str:
    if not config.samples:
        return ""
    parts = [f"<h3>{run.name}</h3>" + "".join(f"<pre>{esc(text)}</pre>" for text in run.samples) for run in runs]
    return section(
        "Samples",
        f"{config.sample_tokens} tokens after the prompt at temperature {config.temperature}; for the harmonic head "
        "the temperature divides the harmonic exponent.",
        *parts,
    )


def configuration_section(config: Config, corpus: Corpus, runs: list[Trained], device: torch.device) -> str:
    parameters = sum(p.numel() for p in GPT(config, corpus.vocab_size, config.losses[0]).parameters())
    machine = {
        "processor": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "harmonic_triton": ht.__version__,
        "tokenizers": tokenizers.__version__,
        "matplotlib": matplotlib.__version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    setup = {
        "parameters": f"{parameters:,}",
        "vocabulary V": f"{corpus.vocab_size:,}",
        "training tokens": f"{len(corpus.train):,}",
        "validation tokens": f"{len(corpus.val):,}",
        "harmonic exponent n (on the distance)": f"{config.exponent:g}",
        "tokens a step": f"{config.batch_size * config.block:,}",
    }
    shown = {key: value for key, value in asdict(config).items() if key not in ("out", "data", "resume")}
    rates = ", ".join(f"{config.peak_lr(run.loss):.2e} ({run.name})" for run in runs)
    shares = ", ".join(f"{100 * config.warmup(run.loss):.0f} % ({run.name})" for run in runs)
    schedule = (
        f"Peak learning rates: {rates}. The paper's are 6e-3 and 6e-4 for GPT-2 (D = 768); the default here is "
        "6e-4 · 768/D for both, with the harmonic hidden states as long as the class vectors at the start. Warm-up "
        f"takes {shares} of the steps; a cosine then brings the rate down to {config.min_lr_ratio:g} of the peak."
    )
    return section(
        "Configuration and machine",
        schedule,
        '<div class="scroll">',
        table(["this run", ""], [[k, v] for k, v in {**setup, **machine}.items()]),
        "<details><summary>Every option</summary>",
        table(["option", "value"], [[k, str(v)] for k, v in shown.items()]),
        "</details></div>",
    )


# ----------------------------------------------------------------------------------------------------------- helpers


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def printable(text: str) -> str:
    """Text that matplotlib shows as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def esc(text: str) -> str:
    return html.escape(text)


def section(title: str, sentence: str, *parts: str) -> str:
    return f"<h2>{title}</h2><p>{sentence}</p>{''.join(parts)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    """An HTML table; cells are escaped unless they are HTML already."""

    def cell(text: str) -> str:
        kind = ' class="number"' if text[:1] in "+-0123456789" else ""
        return f"<td{kind}>{esc(text) if escape else text}</td>"

    header = "".join(f"<th>{esc(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def image(name: str, figure: Figure, text: str) -> str:
    """The figure as an inline PNG."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
    figures.plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img id="{name}" alt="{text}" src="data:image/png;base64,{encoded}">'
