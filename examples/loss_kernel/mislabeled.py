"""(b) Does the loss variance find samples whose label was flipped? The loss-kernel paper, appendix D.3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from harmonic_triton.losskernel import classification_loss, estimators
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel

from . import figures
from .classifiers import fit, perceptron
from .experiment import Clock, Settings


@dataclass(frozen=True)
class Mislabeled(Settings):
    """Data, training and probe."""

    flipped: float = 0.1
    width: int = 256
    hidden_layers: int = 2
    steps: int = 4000
    train_lr: float = 1e-2
    weight_decay: float = 0.1
    neighbors: int = 10
    embedding: bool = True


SETTINGS = {
    "quick": Mislabeled(
        nbeta=20, localization=4000, lr=1e-4, num_chains=4, num_draws=200, num_burnin_steps=50, batch_size=256
    ),
    "paper": Mislabeled(
        nbeta=20, localization=4000, lr=1e-4, num_chains=8, num_draws=1000, num_burnin_steps=100, batch_size=256
    ),
}


def digits(flipped: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits: images (N, 64) in [0, 1], labels of which a share is wrong, and which those are."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn is needed here: pip install 'harmonic-triton[analysis]'") from error
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(flipped * len(labels))]
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[chosen] = True
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=generator)) % 10
    return images, labels, wrong


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose label has the largest logit."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def run(settings: Mislabeled, out: Path, clock: Clock) -> dict[str, Any]:
    """Train on the wrong labels as if they were right, sample over the training set, compare variances."""
    images, labels, wrong = digits(settings.flipped, settings.seed)
    with clock("training"):
        torch.manual_seed(settings.seed)
        model = perceptron(64, settings.width, 10, settings.hidden_layers)
        fit(
            model,
            images,
            labels,
            steps=settings.steps,
            lr=settings.train_lr,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
        )
    with clock("sampling"):
        kernel = loss_kernel(
            model, classification_loss, (images, labels), (images, labels), settings.probe(), seed=settings.seed
        )
    with clock("analysis"):
        auc = estimators.memorization_auc(kernel.variance, kernel.initial_losses, wrong)
        nearest, _ = kernel.neighbors(settings.neighbors, exclude_same=labels)
        measured = {
            "flipped": int(wrong.sum()),
            "accuracy_flipped": accuracy(model, images[wrong], labels[wrong]),
            "accuracy_clean": accuracy(model, images[~wrong], labels[~wrong]),
            "initial_loss_flipped": kernel.initial_losses[wrong].double().mean().item(),
            "initial_loss_clean": kernel.initial_losses[~wrong].double().mean().item(),
            "variance_flipped": kernel.variance[wrong].mean().item(),
            "variance_clean": kernel.variance[~wrong].mean().item(),
            "auc_variance": auc.variance,
            "auc_initial_loss": auc.initial_loss,
            "neighbors_flipped": wrong[nearest[wrong]].double().mean().item(),
            "share_flipped": wrong.double().mean().item(),
            "draws": kernel.num_draws,
        }
        kernel.save(out / "kernel.safetensors")
    with clock("figures"):
        draw(kernel, labels, wrong, settings, out, measured)
    return measured


def draw(
    kernel: LossKernel, labels: Tensor, wrong: Tensor, settings: Mislabeled, out: Path, measured: dict[str, Any]
) -> None:
    """Variance and control side by side; the embedding with flipped samples marked (paper, Figure D.3)."""
    names = ("clean", "flipped")
    title = f"loss variance: AUC {measured['auc_variance']:.4f}"
    figures.histogram(
        out / "variance.png", kernel.variance.clamp_min(1e-30).log10(), wrong.long(), names, "log10 Var ℓ", title
    )
    title = f"control, the loss at w* alone: AUC {measured['auc_initial_loss']:.4f}"
    figures.histogram(
        out / "control.png", kernel.initial_losses.clamp_min(1e-30).log10(), wrong.long(), names, "log10 ℓ(w*)", title
    )
    if settings.embedding:
        points = kernel.embed(exclude_same=labels, seed=settings.seed).numpy()
        _, axes = plt.subplots(1, 2, figsize=(10, 4.6))
        figures.scatter(axes[0], points, wrong.long(), names, "UMAP")
        figures.scatter(axes[1], points, labels, [str(i) for i in range(10)], "by the label given")
        figures.save(out / "umap.png")


def summary(measured: dict[str, Any]) -> str:
    """The lines to print, never the variance without its control."""
    return (
        f"{measured['flipped']} flipped labels: ROC-AUC of the loss variance {measured['auc_variance']:.4f}, "
        f"control: of the loss at w* alone {measured['auc_initial_loss']:.4f}\n"
        f"mean variance {measured['variance_flipped']:.3g} flipped, {measured['variance_clean']:.3g} clean; the network "
        f"has learned {measured['accuracy_flipped']:.0%} of the flipped labels\n"
        f"of a flipped sample's nearest neighbours {measured['neighbors_flipped']:.0%} are flipped, "
        f"of all samples {measured['share_flipped']:.0%}"
    )
