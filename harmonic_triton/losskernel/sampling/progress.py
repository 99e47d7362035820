"""Progress of a run of chains: draws a second, time left, health."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from harmonic_triton.losskernel.sampling.sampler import Sampler

EVERY = 5.0  # seconds between two lines


class Progress:
    """A tqdm bar, or lines on stderr where tqdm is not installed."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.started, self.said = sampler, time.monotonic(), time.monotonic()
        self.total, self.done = len(sampler.chains) * sampler.config.num_draws, 0
        self.bar: Any = None
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        self.bar = tqdm(total=self.total, unit="draw", desc="SGLD", file=sys.stderr)

    def update(self, losses: Tensor) -> None:
        """Count the rows of (k, m) losses."""
        self.done += len(losses)
        if self.bar is not None:
            self.bar.update(len(losses))
        now = time.monotonic()
        if now - self.said < EVERY and self.done < self.total:
            return
        self.said = now
        health = self.health(losses)
        if self.bar is not None:
            self.bar.set_postfix_str(health)
            return
        rate = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / rate
        print(f"SGLD {self.done}/{self.total} draws, {rate:.1f}/s, {left:.0f} s left, {health}", file=sys.stderr)

    def health(self, losses: Tensor) -> str:
        """Dead chains, and the mean loss of the draw less that at w*."""
        alive = losses[losses.isfinite().all(1)]
        excess = (alive - self.sampler.initial_losses).mean().item() if len(alive) else float("nan")
        return f"excess loss {excess:.3g}, {len(self.sampler.dead)} of {len(self.sampler.chains)} chains dead"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
