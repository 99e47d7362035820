"""A GPT in nanoGPT's shape. The two losses share everything but the last lines of ``forward`` and ``next_token``."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harmonic_triton as ht

from .config import Config


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.scale = (config.width // config.heads) ** -0.5 / (layer if config.scale_attention_by_layer else 1)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=self.scale)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a norm before and a residual around."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config, layer)
        self.norm2 = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.proj = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.proj(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and a head that shares the token embedding."""

    def __init__(self, config: Config, vocab_size: int, loss: str) -> None:
        super().__init__()
        self.loss, self.n, self.uniform_mix = loss, config.exponent, config.uniform_mix
        self.tokens = nn.Embedding(vocab_size, config.width)  # also the head's class vectors
        self.positions = nn.Embedding(config.block, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(1, config.layers + 1))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = math.sqrt(2 * config.layers) if name.endswith("proj.weight") else 1.0
                nn.init.normal_(p, std=config.initial_std / residual)
        nn.init.constant_(self.norm.weight, config.initial_gain(loss))

    def hidden(self, ids: Tensor) -> Tensor:
        """(batch, length) ids to (batch, length, D)."""
        x = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids: Tensor, targets: Tensor, num_items: int | None = None) -> Tensor:
        """Sum of the tokens' losses over ``num_items``; without it, their mean."""
        x = self.hidden(ids)
        if self.loss == "harmonic":
            loss = ht.linear_harmonic_loss(
                x, self.tokens.weight, targets, n=self.n, uniform_mix=self.uniform_mix, num_items=num_items
            )
            return cast(Tensor, loss)
        logits = F.linear(x, self.tokens.weight)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        if self.uniform_mix:
            alpha = self.uniform_mix
            nll = -torch.log((torch.exp(-nll) + alpha / logits.shape[-1]) / (1 + alpha))
        return nll.sum() / (targets.numel() if num_items is None else num_items)

    def next_token(self, ids: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities (batch, V) of the token that follows."""
        x = self.hidden(ids)[:, -1]
        if self.loss == "harmonic":
            return ht.harmonic_logits(x, self.tokens.weight, n=self.n / temperature)
        return F.log_softmax(F.linear(x, self.tokens.weight).float() / temperature, dim=-1)

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
        """(batch, length) ids followed by ``count`` sampled tokens."""
        training = self.training
        self.eval()
        for _ in range(count):
            p = self.next_token(ids[:, -self.positions.num_embeddings :], temperature).float().exp()
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
        self.train(training)
        return ids

    def optimizer(self, config: Config) -> torch.optim.AdamW:
        """AdamW with weight decay on matrices only; the loop sets the learning rate."""
        groups = [
            {"params": [p for p in self.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
