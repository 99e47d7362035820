"""(d) What the localization γ does: CKA between kernels and taxonomic lift. The loss-kernel paper, appendix D.1-D.2.

Two hierarchies: a synthetic tree, and the files of the standard library's packages, grouped by their directories. The
lift of neighbours by the cosine of the input features is the control: structure that is there without any network. The
lift of the most negative correlations is measured too: classes that compete for the same inputs move against one another.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

from harmonic_triton.losskernel import classification_loss, estimators
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.tools import MARKERS, line_style

from . import figures
from .classifiers import fit, perceptron
from .experiment import Clock, Settings, step_size
from .hierarchies import Hierarchy, standard_library, synthetic_tree


@dataclass(frozen=True)
class Gamma(Settings):
    """Localizations, training and probe."""

    gammas: tuple[float, ...] = (10.0, 100.0, 1e3, 1e4, 1e5)
    neighbors: int = 15
    eval_samples: int = 1000
    width: int = 128
    steps: int = 1500
    train_lr: float = 3e-3
    weight_decay: float = 0.01
    stability: float = 0.15


SETTINGS = {
    "quick": Gamma(nbeta=20, batch_size=256, num_chains=5, num_draws=160, num_burnin_steps=100),
    "paper": Gamma(
        nbeta=20,
        batch_size=256,
        num_chains=5,
        num_draws=1200,
        num_burnin_steps=2000,
        gammas=(1.0, 10.0, 100.0, 1e3, 4e3, 1e4, 1e5, 1e6),
    ),
}


def lift_by_depth(neighbors: Tensor, ancestors: Tensor, labels: Tensor) -> dict[str, float]:
    """Lift at every depth between root and label, averaged over the label's depths by their number of samples."""
    lift = estimators.taxonomic_lift(neighbors, ancestors, labels)
    depth = (ancestors >= 0).sum(1) - 1
    found = {}
    for d in range(1, ancestors.shape[1] - 1):
        weights = torch.bincount(depth, minlength=ancestors.shape[1]).double()
        values = lift[:, d]
        used = values.isfinite() & (torch.arange(len(values)) > d)
        if used.any():
            found[str(d)] = ((values * weights)[used].sum() / weights[used].sum()).item()
    return found


def nearest_inputs(features: Tensor, labels: Tensor, k: int) -> Tensor:
    """(m, k) nearest samples of other classes by the cosine of their features."""
    cosine = F.normalize(features - features.mean(0), dim=1)
    cosine = cosine @ cosine.T
    return cosine.masked_fill(labels[:, None] == labels, -2.0).topk(k).indices


def sweep(name: str, data: Hierarchy, settings: Gamma, out: Path, clock: Clock) -> dict[str, Any]:
    """Train one classifier, then one kernel for each γ, on samples it was not trained on."""
    features, labels = data.features, data.labels
    train_x, train_y = features[data.train], labels[data.train]
    chosen = (~data.train).nonzero().squeeze(1)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(settings.seed))
    chosen = chosen[order[: settings.eval_samples]].sort().values
    eval_y, ancestors = labels[chosen], data.ancestors[chosen]
    with clock("training"):
        torch.manual_seed(settings.seed)
        model = perceptron(features.shape[1], settings.width, len(data.names))
        fit(
            model,
            train_x,
            train_y,
            steps=settings.steps,
            lr=settings.train_lr,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
        )
    rows, kernels = [], []
    for number, gamma in enumerate(settings.gammas):
        with clock("sampling"):
            probe = settings.probe(localization=gamma)
            lr = step_size(model, classification_loss, (train_x, train_y), probe, settings.stability, settings.seed)
            kernel = loss_kernel(
                model,
                classification_loss,
                (train_x, train_y),
                (features[chosen], eval_y),
                dataclasses.replace(probe, lr=lr),
                seed=settings.seed + number,  # the same noise at every γ would pass for likeness
                progress=False,
            )
        with clock("analysis"):
            rows.append(describe(kernel, gamma, lr, ancestors, eval_y, settings.neighbors))
            kernels.append(kernel.correlation)
            print(f"{name}: {row_text(rows[-1])}", flush=True)
    with clock("analysis"):
        control = lift_by_depth(nearest_inputs(features[chosen], eval_y, settings.neighbors), ancestors, eval_y)
        alike = torch.tensor([[estimators.cka(a, b) for b in kernels] for a in kernels])
    with torch.no_grad():
        right = [
            (model(x).argmax(1) == y).double().mean().item()
            for x, y in ((train_x, train_y), (features[chosen], eval_y))
        ]
    with clock("figures"):
        draw(name, rows, alike, control, out)
    return {
        "classes": len(data.names),
        "samples": len(chosen),
        "train_accuracy": right[0],
        "eval_accuracy": right[1],
        "rows": rows,
        "cka": alike.tolist(),
        "control_lift": control,
    }


def describe(kernel: LossKernel, gamma: float, lr: float, ancestors: Tensor, labels: Tensor, k: int) -> dict[str, Any]:
    """What one γ gives; neighbours of the same class are left out before the k are taken."""
    neighbors, _ = kernel.neighbors(k, exclude_same=labels)
    opposite = (-kernel.correlation).masked_fill(labels[:, None] == labels, -2.0).topk(k).indices
    confound = estimators.same_label_confound(kernel.correlation, labels)
    return {
        "gamma": gamma,
        "lr": lr,
        "initial_loss": kernel.record.initial_loss,
        "excess_loss": kernel.excess_loss,
        "split_half_cka": kernel.diagnostics.split_half_cka,
        "same_label_rho": confound.same_label,
        "other_rho": confound.other,
        "lift": lift_by_depth(neighbors, ancestors, labels),
        "lift_opposite": lift_by_depth(opposite, ancestors, labels),
    }


def row_text(row: dict[str, Any]) -> str:
    """One γ in one line."""
    lifts = ", ".join(
        f"depth {depth}: {value:.2f} (opposite {row['lift_opposite'][depth]:.2f})"
        for depth, value in row["lift"].items()
    )
    return (
        f"γ {row['gamma']:g}: excess loss {row['excess_loss']:.2e} over {row['initial_loss']:.2e}, split-half CKA "
        f"{row['split_half_cka']:.3f}, lift {lifts}"
    )


def run(settings: Gamma, out: Path, clock: Clock) -> dict[str, Any]:
    """Both hierarchies."""
    with clock("data"):
        hierarchies = {
            "synthetic tree": synthetic_tree(seed=settings.seed),
            "standard library": standard_library(seed=settings.seed),
        }
    return {name: sweep(name, data, settings, out, clock) for name, data in hierarchies.items()}


def draw(name: str, rows: list[dict[str, Any]], alike: Tensor, control: dict[str, float], out: Path) -> None:
    """CKA between γ; lift against γ with the control as thin lines."""
    stem = name.replace(" ", "-")
    gammas = [row["gamma"] for row in rows]
    figures.labeled_matrix(out / f"{stem}-cka.png", alike, [f"{g:g}" for g in gammas], "γ", f"{name}: CKA")
    plt.figure(figsize=(6, 3.8))
    for number, depth in enumerate(control):
        values = [row["lift"][depth] for row in rows]
        style = line_style(number)
        plt.plot(
            gammas,
            values,
            marker=MARKERS[number % len(MARKERS)],
            label=f"ancestor at depth {depth}",
            linewidth=1.8,
            **style,
        )
        plt.axhline(control[depth], linewidth=0.8, **style)
    plt.axhline(1, color="k", lw=0.6)
    plt.xscale("log")
    plt.xlabel("γ")
    plt.ylabel("lift of nearest neighbours")
    plt.title(f"{name} (thin: neighbours by input features)", fontsize=10)
    plt.legend(frameon=False, fontsize=8)
    figures.save(out / f"{stem}-lift.png")


def summary(measured: dict[str, Any]) -> str:
    """The lines to print."""
    lines = []
    for name, found in measured.items():
        best = {depth: max(found["rows"], key=lambda row: row["lift"][depth]) for depth in found["control_lift"]}
        lifts = ", ".join(
            f"depth {depth}: {row['lift'][depth]:.2f} at γ {row['gamma']:g} (inputs alone {found['control_lift'][depth]:.2f})"
            for depth, row in best.items()
        )
        neighbors = ", ".join(f"{found['cka'][i][i + 1]:.2f}" for i in range(len(found["rows"]) - 1))
        lines.append(f"{name}: largest lift {lifts}; CKA from each γ to the next {neighbors}")
    return "\n".join(lines)
