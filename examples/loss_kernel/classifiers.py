"""A small multilayer perceptron and its training, for the experiments on feature vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def perceptron(inputs: int, width: int, classes: int, hidden_layers: int = 1) -> nn.Sequential:
    """Linear layers of one width with ReLU between them."""
    layers: list[nn.Module] = []
    for size in [inputs] + [width] * (hidden_layers - 1):
        layers += [nn.Linear(size, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def fit(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, steps: int, lr: float, weight_decay: float = 0.0,
    batch_size: int = 128, seed: int = 0,
) -> None:  # fmt: skip
    """AdamW with a cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = torch.randint(len(labels), (batch_size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval()
