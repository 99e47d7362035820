"""Progress of a run of chains: draws a second, time left, health."""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor

from harmonic_triton.losskernel.draws import is_usable
from harmonic_triton.losskernel.estimators import excess_loss

EVERY = 5.0  # seconds between two lines


class Progress:
    """A tqdm bar, or lines on stderr where tqdm is not installed.

    Args:
        num_chains: chains that this process runs.
        num_draws: draws of each.
        initial_losses: (m,) losses at w*.
    """

    def __init__(self, num_chains: int, num_draws: int, initial_losses: Tensor) -> None:
        self.num_chains, self.initial_loss = num_chains, initial_losses.double().mean().item()
        self.started = self.said = time.monotonic()
        self.total, self.done = num_chains * num_draws, 0
        self.bar: Any = None
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=self.total, unit="draw", desc="SGLD", file=sys.stderr)

    def update(self, losses: Tensor, diverged: int) -> None:
        """Count the rows of (k, m) losses; ``diverged`` chains have ended so far."""
        self.done += len(losses)
        if self.bar is not None:
            self.bar.update(len(losses))
        now = time.monotonic()
        if now - self.said < EVERY and self.done < self.total:
            return
        self.said = now
        health = self.health(losses, diverged)
        if self.bar is not None:
            self.bar.set_postfix_str(health)
            return
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate
        print(f"SGLD {self.done}/{self.total} draws, {rate:.1f}/s, {left:.0f} s left, {health}", file=sys.stderr)

    def health(self, losses: Tensor, diverged: int) -> str:
        """Diverged chains, and the excess loss of the draw."""
        usable = losses[is_usable(losses)]
        excess = excess_loss(usable.double().mean().item(), self.initial_loss)  # NaN of no draw
        return f"excess loss {excess:.3g}, {diverged} of {self.num_chains} chains dead"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
