"""What a training run left behind, read from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import analysis
from .config import Config
from .data import Corpus
from .model import GPT

NAMES = {"harmonic": "harmonic", "cross_entropy": "cross-entropy", "authors": "authors' dense form"}
AVERAGED = 20  # last steps in the final training loss


@dataclass
class Trained:
    """What one loss left behind."""

    loss: str
    history: dict[str, list[Any]]
    seconds: float
    vectors: Tensor  # (V, D), the tied embedding
    samples: list[str]
    principal: analysis.Principal

    @property
    def name(self) -> str:
        return NAMES[self.loss]

    @property
    def final(self) -> float:
        """Validation loss at the end."""
        return float(self.history["val"][-1][1])

    @property
    def last_mean(self) -> float:
        """Training loss of the last steps."""
        return float(np.mean(self.history["train"][-AVERAGED:]))

    @property
    def late_growth(self) -> float:
        """Relative growth of the weight norm over the last quarter of the steps."""
        steps, norms = zip(*self.history["weight_norm"], strict=True)
        return float(norms[-1] / float(np.interp(0.75 * steps[-1], steps, norms)) - 1)

    def parallelogram_losses(self, groups: list[analysis.Parallelograms]) -> Tensor:
        """Of every relation together."""
        return analysis.parallelogram_loss(self.principal.points, torch.cat([g.quadruples for g in groups]))


def load_trained(config: Config, corpus: Corpus, device: torch.device, loss: str) -> Trained:
    """The end of a training run, with samples drawn from it."""
    state = torch.load(Path(config.out) / loss / "checkpoint.pt", map_location=device, weights_only=True)
    model = GPT(config, corpus.vocab_size, loss).to(device)
    model.load_state_dict(state["model"])
    vectors = model.tokens.weight.detach().float().cpu()
    prompt = corpus.vocabulary.encode(config.prompt) or corpus.val[:8].tolist()
    texts = []
    if config.samples:
        ids = torch.tensor([prompt] * config.samples, device=device)
        generator = torch.Generator(device).manual_seed(config.seed)
        drawn = model.generate(ids, config.sample_tokens, config.temperature, generator)
        texts = [corpus.vocabulary.decode(row) for row in drawn.tolist()]
    return Trained(loss, state["history"], state["seconds"], vectors, texts, analysis.principal_components(vectors))
