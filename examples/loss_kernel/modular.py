"""(a) Does the kernel tell addition from division? The loss-kernel paper, section 3 and Figure 2."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from harmonic_triton.losskernel import classification_loss, estimators
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel

from . import figures
from .arithmetic import TASKS, Pairs, Transformer, accuracy, all_pairs, split, train
from .experiment import Clock, Settings

NEIGHBORS = 10


@dataclass(frozen=True)
class Modular(Settings):
    """Training and probe."""

    modulus: int = 97
    width: int = 128
    train_batch_size: int = 512
    train_fraction: float = 0.8
    steps: int = 3000
    train_lr: float = 1e-3
    weight_decay: float = 1.0
    eval_samples: int = 1000
    embedding: bool = True


SETTINGS = {
    "quick": Modular(localization=3e6, lr=3e-7, batch_size=64, num_chains=25, num_draws=400, num_burnin_steps=20),
    "paper": Modular(
        weight_decay=0.0,
        steps=5000,
        eval_samples=10_000,
        nbeta=500,
        localization=30_000,
        lr=3e-5,
        batch_size=512,
        num_chains=30,
        num_draws=800,
        num_burnin_steps=200,
    ),
}


def trained(
    settings: Modular, keep: Collection[int] = ()
) -> tuple[Transformer, Pairs, Tensor, Tensor, dict[int, dict[str, Tensor]]]:
    """The network, all pairs, the indices of those it was trained on and of the rest, its weights after some steps."""
    torch.manual_seed(settings.seed)
    pairs = all_pairs(settings.modulus)
    train_index, rest = split(pairs, settings.train_fraction, settings.seed)
    model = Transformer(settings.modulus, settings.width)
    kept = train(
        model,
        pairs.inputs[train_index],
        pairs.results[train_index],
        steps=settings.steps,
        lr=settings.train_lr,
        weight_decay=settings.weight_decay,
        batch_size=settings.train_batch_size,
        seed=settings.seed,
        keep=keep,
    )
    return model, pairs, train_index, rest, kept


def balanced(pairs: Pairs, count: int, seed: int) -> Tensor:
    """Indices of count/2 pairs of each task, addition first."""
    order = torch.randperm(len(pairs.task), generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([order[pairs.task[order] == task][: count // 2] for task in range(len(TASKS))])


def separation(kernel: LossKernel, task: Tensor, results: Tensor) -> dict[str, Any]:
    """How far the kernel keeps two tasks apart; pairs with one result count as neither same-task nor cross-task."""
    rho = kernel.correlation
    neighbors, _ = kernel.neighbors(NEIGHBORS, exclude_same=results)
    pairs = pair_groups(rho, task, results)
    return {
        "pc1_auc": estimators.unsigned_auc(estimators.pc1(rho), task),
        "knn_purity": estimators.knn_purity(neighbors, task),
        "mean_rho": {name: values.mean().item() for name, values in pairs.items()},
        "rms_rho": {name: values.square().mean().sqrt().item() for name, values in pairs.items()},
    }


def pair_groups(rho: Tensor, task: Tensor, results: Tensor) -> dict[str, Tensor]:
    """The correlations of pairs i < j, by task and by whether the results agree."""
    i, j = torch.triu_indices(len(rho), len(rho), offset=1)
    values, same = rho[i, j], results[i] == results[j]
    groups = {
        TASKS[0]: (task[i] == 0) & (task[j] == 0) & ~same,
        TASKS[1]: (task[i] == 1) & (task[j] == 1) & ~same,
        "cross": task[i] != task[j],
        "same result": same,
    }
    return {name: values[chosen] for name, chosen in groups.items()}


def run(settings: Modular, out: Path, clock: Clock) -> dict[str, Any]:
    """Train, sample, measure, draw."""
    with clock("training"):
        model, pairs, train_index, _, _ = trained(settings)
    inputs, results = pairs.inputs, pairs.results
    chosen = balanced(pairs, settings.eval_samples, settings.seed)
    with clock("sampling"):
        kernel = loss_kernel(
            model,
            classification_loss,
            (inputs[train_index], results[train_index]),
            (inputs[chosen], results[chosen]),
            settings.probe(),
            seed=settings.seed,
        )
    with clock("analysis"):
        task = pairs.task[chosen]
        measured = {
            "train_accuracy": accuracy(model, inputs[train_index], results[train_index]),
            "accuracy": accuracy(model, inputs, results),
            "initial_loss": kernel.record.initial_loss,
            "excess_loss": kernel.excess_loss,
            "draws": kernel.num_draws,
            **separation(kernel, task, results[chosen]),
        }
        kernel.save(out / "kernel.safetensors")
    with clock("figures"):
        draw(kernel, inputs[chosen], task, results[chosen], settings, out, measured)
    return measured


def draw(
    kernel: LossKernel, inputs: Tensor, task: Tensor, results: Tensor, settings: Modular, out: Path, measured: dict
) -> None:
    """The panels of the paper's Figure 2, and the matrix sorted by task."""
    rho = kernel.correlation
    title = f"PC1: ROC-AUC {measured['pc1_auc']:.4f}"
    figures.histogram(out / "pc1.png", estimators.pc1(rho), task, TASKS, "projection on PC1 of HρH", title)
    figures.heatmap(out / "heatmap.png", rho, [int((task == 0).sum())], "ρ, addition then division")
    groups = pair_groups(rho, task, results)
    groups.pop("same result")
    figures.densities(
        out / "correlations.png", list(groups.values()), list(groups), "ρ of pairs with different results", ""
    )
    if settings.embedding:
        points = kernel.embed(exclude_same=results, seed=settings.seed).numpy()
        trivial = (inputs[:, 0] == settings.modulus) & (task == 1)
        kinds = torch.where(trivial, 2, task)
        _, axes = plt.subplots(1, 3, figsize=(13, 4.2))
        figures.scatter(axes[0], points, kinds, [*TASKS, "0 / b"], "UMAP by task")
        figures.scatter(axes[1], points, inputs[:, 0] % settings.modulus, None, "by a")
        figures.scatter(axes[2], points, inputs[:, 1] % settings.modulus, None, "by b")
        figures.save(out / "umap.png")


def summary(measured: dict[str, Any]) -> str:
    """The lines to print."""
    rho = measured["mean_rho"]
    return (
        f"PC1 ROC-AUC {measured['pc1_auc']:.4f}, {NEIGHBORS}-NN task purity {measured['knn_purity']:.4f} "
        f"from {measured['draws']} draws\n"
        f"mean ρ, pairs of one result left out: addition {rho['addition']:.4f}, division {rho['division']:.4f}, "
        f"cross-task {rho['cross']:.4f}\n"
        f"accuracy {measured['accuracy']:.4f}; mean loss at w* {measured['initial_loss']:.2e}, "
        f"under the probe {measured['excess_loss']:.2e} more"
    )
