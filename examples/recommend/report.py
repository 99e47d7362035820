"""Tables and a figure of the runs, from their file alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .waves import FRESH, TUNING

PICTURE = Path(__file__).parents[2] / "docs" / "training.png"
NAMES = {"gpt": "nanoGPT's shape", "nanogpt": "nanoGPT itself", "llama": "Llama"}
STYLES = {"harmonic": ("#0b7a75", "-", "o"), "cross_entropy": ("#d1495b", "--", "s")}
Record = dict[str, Any]


def final(record: Record) -> float:
    return float(record["val"][-1][1])


def load(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(records: list[Record]) -> dict[str, str]:
    """What docs/training.md shows, in Markdown, by title."""
    out = {}
    for model, name in NAMES.items():
        searched, fresh = (
            [r for r in records if r["model"] == model and (r["seed"] == TUNING) == tuning] for tuning in (True, False)
        )
        if searched:
            out[f"{name}, seed {TUNING}"] = table(searched)
        if fresh:
            out[f"{name}, fresh seeds"] = differences(fresh)
    return out


def table(records: list[Record]) -> str:
    """The search: a row for each setting, a column for each learning rate."""
    rates = sorted({r["lr"] for r in records})
    rows: dict[tuple[str, float, float], dict[float, float]] = {}
    for r in records:
        rows.setdefault((r["loss"], r["n"], r["ratio"]), {})[r["lr"]] = final(r)
    out = [
        "| peak learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for (loss, n, ratio), values in sorted(rows.items()):
        cells = [f"{values[rate]:.3f}" if rate in values else "" for rate in rates]
        out.append(f"| {named(loss, n, ratio)} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def named(loss: str, n: float, ratio: float) -> str:
    if loss == "cross_entropy":
        return "cross-entropy"
    return f"harmonic, n = {n:.3g}" + (f", hidden states {ratio:g} times as long" if ratio != 1 else "")


def differences(records: list[Record]) -> str:
    """The fresh seeds: both losses of each, and harmonic minus cross-entropy with its standard deviation."""
    by_loss = {loss: {r["seed"]: r for r in records if r["loss"] == loss} for loss in STYLES}
    seeds = sorted(set(by_loss["harmonic"]) & set(by_loss["cross_entropy"]))
    out = ["| seed | harmonic | cross-entropy | difference |", "|---|---|---|---|"]
    gaps = []
    for seed in seeds:
        ours, theirs = (final(by_loss[loss][seed]) for loss in STYLES)
        gaps.append(ours - theirs)
        out.append(f"| {seed} | {ours:.3f} | {theirs:.3f} | {gaps[-1]:+.3f} |")
    means = [mean(final(by_loss[loss][seed]) for seed in seeds) for loss in STYLES]
    spread = f" ± {stdev(gaps):.3f}" if len(gaps) > 1 else ""
    out.append(f"| mean | {means[0]:.3f} | {means[1]:.3f} | {mean(gaps):+.3f}{spread} |")
    return "\n".join(out)


def draw(records: list[Record], path: Path) -> None:
    """Loss on held-out text by step, a panel for each model: the mean over the fresh seeds, and each of them."""
    from matplotlib.figure import Figure

    records = [r for r in records if r["seed"] in FRESH]
    models = [model for model in NAMES if any(r["model"] == model for r in records)]
    if not models:
        return
    figure = Figure(figsize=(4.2 * len(models), 3.6), layout="constrained")
    for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for loss, (color, line, marker) in STYLES.items():
            curves = [r["val"] for r in records if r["model"] == model and r["loss"] == loss]
            if not curves:
                continue
            curves = [curve[1:] for curve in curves]  # the loss before training would press the others together
            steps = [step for step, _ in curves[0]]
            for curve in curves:
                axis.plot(steps, [value for _, value in curve], line, color=color, alpha=0.3, linewidth=0.8)
            average = [mean(values) for values in zip(*([v for _, v in curve] for curve in curves), strict=True)]
            axis.plot(
                steps, average, line, color=color, marker=marker, label=named(loss, curves_n(records, model), 1.0)
            )
        axis.set(title=NAMES[model], xlabel="step", ylabel="loss on held-out text (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def curves_n(records: list[Record], model: str) -> float:
    """The exponent of a model's harmonic runs."""
    return next(r["n"] for r in records if r["model"] == model and r["loss"] == "harmonic")
