"""(e) The token kernel of the small GPT: harmonic loss beside cross-entropy, m in the hundred thousands without m x m.

Uses the checkpoints that ``python -m examples.train_gpt`` leaves in ``--run``.
"""

from __future__ import annotations

import dataclasses
import keyword
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from examples.train_gpt.config import LOSSES
from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.tables import group_correlation, write_groups, write_neighbors
from harmonic_triton.tools import memory

from . import figures, gpt
from .experiment import Clock, Settings, step_size

KINDS = ("space", "keyword", "name", "number", "punctuation")
SHOWN = 40  # tokens in the printed neighbour table


@dataclass(frozen=True)
class Tokens(Settings):
    """Which run, which tokens, which probe."""

    run: str = "runs/demo"
    split: str = "val"
    tokens: int = 100_000
    neighbors: int = 15
    stability: float = 0.15
    embedding: bool = True
    losses: tuple[str, ...] = LOSSES


SETTINGS = {
    "quick": Tokens(
        nbeta=1000,
        localization=1e4,
        batch_size=8,
        num_chains=2,
        num_draws=60,
        num_burnin_steps=20,
        num_steps_bw_draws=2,
        tokens=20_000,
    ),
    "paper": Tokens(
        nbeta=1000,
        localization=1e4,
        batch_size=32,
        num_chains=15,
        num_draws=500,
        num_burnin_steps=100,
    ),
}


def kind_of(text: str) -> int:
    """Which of KINDS a decoded token is."""
    word = text.strip()
    if not word:
        return 0
    if keyword.iskeyword(word):
        return 1
    if any(c.isalpha() or c == "_" for c in word):
        return 2
    return 3 if any(c.isdigit() for c in word) else 4


def lift(neighbors: Tensor, groups: Tensor, labels: Tensor) -> float:
    """How much likelier than chance a neighbour is of the same group, pairs of one label left out on both sides."""
    ancestors = torch.stack([torch.zeros_like(groups), groups, groups.max() + 1 + labels], 1)
    return estimators.taxonomic_lift(neighbors, ancestors, labels)[2, 1].item()


def run(settings: Tokens, out: Path, clock: Clock) -> dict[str, Any]:
    """Both losses on the same tokens: neighbours, files, embedding, report; then how alike the kernels are."""
    measured: dict[str, Any] = {}
    kernels = []
    for number, loss in enumerate(settings.losses):
        with clock("data"):
            task = gpt.from_checkpoint(run=settings.run, loss=loss, split=settings.split, tokens=str(settings.tokens))
        folder = out / loss
        folder.mkdir(exist_ok=True)
        with clock("sampling"):
            model, per_sample_loss, train_data = task["model"], task["per_sample_loss"], task["train_data"]
            probe = settings.probe(eval_batch_size=64)
            lr = step_size(model, per_sample_loss, train_data, probe, settings.stability, settings.seed)
            kernel = loss_kernel(
                model,
                per_sample_loss,
                train_data,
                task["eval_data"],
                dataclasses.replace(probe, lr=lr),
                seed=settings.seed + number,
                keep="traces",
            )
        measured[loss] = {"lr": lr, **analyse(loss, kernel, task, settings, folder, clock)}
        kernels.append(kernel)
    if len(kernels) == 2:
        with clock("analysis"):
            measured["cka_between_losses"] = kernels[0].cka(kernels[1])
    measured["peak_memory_gib"] = memory.so_far() / 2**30
    return measured


def analyse(
    loss: str, kernel: LossKernel, task: dict[str, Any], settings: Tokens, out: Path, clock: Clock
) -> dict[str, Any]:
    """One model's kernel: lifts, tables, figures."""
    labels, files, names = task["labels"], task["groups"], task["names"]
    corpus_text = [name.rsplit("⟦", 1)[1][:-1].replace("⏎", "\n").replace("⇥", "\t") for name in names]
    kinds = torch.tensor([kind_of(text) for text in corpus_text])
    with clock("neighbours"):
        neighbors, distances = kernel.neighbors(settings.neighbors, exclude_same=labels)
    with clock("analysis"):
        some = torch.linspace(0, len(labels) - 1, SHOWN).long().tolist()
        write_neighbors(out / "neighbors.tsv", neighbors, distances, names, some)
        alike = group_correlation(kernel, files)
        write_groups(out / "files.tsv", alike, task["group_names"])
        diagnostics = kernel.diagnostics
        found = {
            "samples": kernel.num_samples,
            "draws": kernel.num_draws,
            "initial_loss": kernel.record.initial_loss,
            "excess_loss": kernel.excess_loss,
            "autocorrelation_time": diagnostics.autocorrelation_time_mean_loss,
            "split_half_cka": diagnostics.split_half_cka,
            "lift_file": lift(neighbors, files, labels),
            "lift_kind": lift(neighbors, kinds, labels),
            "nearest_rho": (1 - distances[:, 0].square() / 2).mean().item(),
        }
    with clock("figures"):
        figures.heatmap(out / "files.png", alike, [], f"{loss}: correlation of the files' mean losses")
        if settings.embedding:
            points = kernel.embed(num_neighbors=settings.neighbors, exclude_same=labels, seed=settings.seed)
            draw(loss, kernel, points, kinds, out)
            kernel.report(
                out / "report.html",
                title=f"Token kernel, {loss}",
                names=names,
                labels=kinds,
                label_names=KINDS,
                exclude_same=labels,
                embedding=points,
            )
    return found


def draw(loss: str, kernel: LossKernel, points: Tensor, kinds: Tensor, out: Path) -> None:
    """The embedding by kind of token and by loss at w*."""
    _, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    figures.scatter(axes[0], points.numpy(), kinds, KINDS, f"{loss}: UMAP by kind of token")
    loss_at_center = kernel.initial_losses.clamp_min(1e-6).log10()
    figures.scatter(axes[1], points.numpy(), loss_at_center, None, "by log10 of the loss at w*", cmap="viridis")
    figures.save(out / "umap.png")


def summary(measured: dict[str, Any]) -> str:
    """The lines to print."""
    lines = []
    for loss in LOSSES:
        if loss in measured:
            row = measured[loss]
            lines.append(
                f"{loss}: {row['samples']:,} tokens, {row['draws']} draws, loss {row['initial_loss']:.3f} + "
                f"{row['excess_loss']:.3f}; neighbours share the file {row['lift_file']:.2f} times as often as by "
                f"chance, the kind of token {row['lift_kind']:.2f} times; split-half CKA {row['split_half_cka']:.3f}"
            )
    if "cka_between_losses" in measured:
        lines.append(f"CKA between the two kernels {measured['cka_between_losses']:.3f}")
    lines.append(f"peak memory {measured['peak_memory_gib']:.2f} GiB")
    return "\n".join(lines)
