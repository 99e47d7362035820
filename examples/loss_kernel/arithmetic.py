"""Addition and division modulo 97 in separate vocabularies, and the two-layer transformer that learns both.

The loss-kernel paper, section 3 and its appendix; the network is that of Power et al. (2022).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TASKS = ("addition", "division")


class Pairs(NamedTuple):
    """Every pair (a, b) of both tasks; tokens and results of division are counted after those of addition."""

    inputs: Tensor  # (N, 2) int64 tokens of a and b
    results: Tensor  # (N,) int64 classes
    task: Tensor  # (N,) int64: 0 addition, 1 division


def all_pairs(modulus: int = 97) -> Pairs:
    """modulus² additions and modulus·(modulus - 1) divisions, b = 0 left out: 18,721 pairs for 97."""
    a, b = (axis.flatten() for axis in torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij"))
    inverse = torch.tensor([0, *(pow(i, -1, modulus) for i in range(1, modulus))])
    divisible = b > 0
    results = torch.cat([(a + b) % modulus, (a * inverse[b] % modulus)[divisible] + modulus])
    inputs = torch.stack([a, b], 1)
    task = torch.arange(len(results)) >= modulus**2
    return Pairs(torch.cat([inputs, inputs[divisible] + modulus]), results, task.long())


def split(pairs: Pairs, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training pairs and of the rest."""
    order = torch.randperm(len(pairs.task), generator=torch.Generator().manual_seed(seed))
    count = round(fraction * len(order))
    return order[:count], order[count:]


class Attention(nn.Module):
    """Self-attention; the last position alone where nothing else is needed of it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, last_only: bool) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q[:, :, -1:] if last_only else q, k, v, is_causal=not last_only)
        return self.out(y.transpose(1, 2).reshape(batch, -1, width))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before and a residual around."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, last_only: bool = False) -> Tensor:
        x = (x[:, -1:] if last_only else x) + self.attention(self.norm1(x), last_only)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """(b, 2) tokens to (b, classes) logits, read at the last position of a causal decoder."""

    def __init__(self, modulus: int = 97, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(2 * modulus, width), nn.Embedding(2, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * modulus, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions.weight
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, last_only=layer == len(self.blocks))
        return self.head(self.norm(x)).squeeze(1)


def train(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, steps: int, lr: float, weight_decay: float,
    batch_size: int = 512, warmup: int = 50, seed: int = 0, keep: Collection[int] = (),
) -> dict[int, dict[str, Tensor]]:  # fmt: skip
    """AdamW with a linear warm-up and a cosine to 0; the weights after the steps in ``keep`` (0: before the first)."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    model.train()
    for step in range(steps + 1):
        if step in keep:
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = torch.randint(len(targets), (batch_size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    model.eval()
    return kept


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Share of inputs whose class has the largest logit."""
    return (model(inputs).argmax(1) == targets).float().mean().item()
