"""(c) How the kernel forms while the network learns. The loss-kernel paper, appendix D, "The loss kernel over development".

The network and the tasks are those of ``modular``; the kernel is taken at checkpoints of one training run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt

from harmonic_triton.losskernel import classification_loss, estimators
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.tools import MARKERS, line_style

from . import figures, modular
from .arithmetic import TASKS, accuracy
from .experiment import Clock, step_size


@dataclass(frozen=True)
class Development(modular.Modular):
    """As ``modular``, at several steps of training."""

    checkpoints: tuple[int, ...] = (0, 300, 600, 900, 1200, 1800, 2400, 3000)
    stability: float = 0.15


SETTINGS = {
    "quick": Development(eval_samples=400, num_chains=4, num_draws=100, num_burnin_steps=30, localization=1e6),
    "paper": Development(
        eval_samples=10_000,
        batch_size=512,
        num_chains=30,
        num_draws=800,
        num_burnin_steps=200,
        localization=1e6,
    ),
}


def run(settings: Development, out: Path, clock: Clock) -> dict[str, Any]:
    """One training run, a kernel at each checkpoint, all on the same samples."""
    with clock("training"):
        model, pairs, train_index, rest, kept = modular.trained(settings, settings.checkpoints)
    chosen = modular.balanced(pairs, settings.eval_samples, settings.seed)
    task, results = pairs.task[chosen], pairs.results[chosen]
    kernels, rows = [], []
    data = (pairs.inputs[train_index], pairs.results[train_index])
    for number, (step, state) in enumerate(sorted(kept.items())):
        model.load_state_dict(state)
        with clock("sampling"):
            probe = settings.probe()
            probe = dataclasses.replace(
                probe, lr=step_size(model, classification_loss, data, probe, settings.stability, settings.seed)
            )
            kernel = loss_kernel(
                model,
                classification_loss,
                data,
                (pairs.inputs[chosen], results),
                probe,
                seed=settings.seed + number,  # the same noise at every checkpoint would pass for likeness
                progress=False,
            )
        with clock("analysis"):
            rows.append(
                {
                    "step": step,
                    "lr": probe.lr,
                    "train_accuracy": accuracy(model, *data),
                    "test_accuracy": accuracy(model, pairs.inputs[rest], pairs.results[rest]),
                    "initial_loss": kernel.record.initial_loss,
                    "excess_loss": kernel.excess_loss,
                    "split_half_cka": kernel.diagnostics.split_half_cka,
                    **modular.separation(kernel, task, results),
                }
            )
            kernels.append(kernel.correlation)
            print(row_text(rows[-1]), flush=True)
    with clock("analysis"):
        alike = torch.tensor([[estimators.cka(a, b) for b in kernels] for a in kernels])
        final = [alike[i, -1].item() for i in range(len(kernels))]
    with clock("figures"):
        draw(rows, alike, out)
    return {"checkpoints": rows, "cka": alike.tolist(), "cka_with_the_last": final}


def row_text(row: dict[str, Any]) -> str:
    """One checkpoint in one line."""
    rho = row["mean_rho"]
    return (
        f"step {row['step']:5}: accuracy {row['train_accuracy']:.3f}/{row['test_accuracy']:.3f}, "
        f"loss {row['initial_loss']:.1e} + {row['excess_loss']:.1e}, PC1 AUC {row['pc1_auc']:.3f}, "
        f"purity {row['knn_purity']:.3f}, ρ {rho[TASKS[0]]:.3f}/{rho[TASKS[1]]:.3f}/{rho['cross']:.3f}, "
        f"same result {rho['same result']:.3f}"
    )


def draw(rows: list[dict[str, Any]], alike: torch.Tensor, out: Path) -> None:
    """Separation and accuracy over training; CKA between checkpoints."""
    steps = [row["step"] for row in rows]
    figures.labeled_matrix(out / "cka.png", alike, [str(s) for s in steps], "training step", "CKA of the kernels")
    _, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, color in (("pc1_auc", 0), ("knn_purity", 1), ("test_accuracy", 3)):
        style = {**line_style(color), "marker": MARKERS[color]}
        axes[0].plot(steps, [row[name] for row in rows], label=name.replace("_", " "), **style)
    for name, color in ((TASKS[0], 0), (TASKS[1], 1), ("cross", 4), ("same result", 2)):
        values = [row["mean_rho"][name] for row in rows]
        axes[1].plot(steps, values, label=f"mean ρ, {name}", **line_style(color), marker=MARKERS[color])
    for each in axes:
        each.set_xlabel("training step")
        each.legend(frameon=False, fontsize=8)
    figures.save(out / "development.png")


def summary(measured: dict[str, Any]) -> str:
    """The lines to print."""
    rows = measured["checkpoints"]
    best = max(rows, key=lambda row: row["knn_purity"])
    return (
        f"CKA with the last kernel: {', '.join(f'{value:.2f}' for value in measured['cka_with_the_last'])}\n"
        f"task purity is largest at step {best['step']}: {best['knn_purity']:.3f}"
    )
