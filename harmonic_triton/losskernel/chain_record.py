"""What is kept of every draw beside the kernel's sums. C chains, T draws, m samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmonic_triton.losskernel.estimators import excess_loss

PROBES = 256  # samples whose traces are kept for R-hat, autocorrelation times and split-half CKA


class ChainRecord:
    """Small per-draw records: mean losses, and the traces of a fixed random subset of the samples.

    Args:
        num_chains, num_draws: C and T.
        initial_losses: (m,) at w*, NaN where unknown.

    Attributes:
        mean_loss: (C, T) fp64 mean over the m samples; 0 where not read yet. train_loss: (C, T) fp32 of the last minibatch.
        probe_samples: (p,) int64, min(m, 256) of the samples, the same for every run of this m.
        probe: (C, T, p) fp32 losses of those.
        read: (C, T) bool; finite: (C, T) bool, whether every loss of the draw is.
    """

    def __init__(self, num_chains: int, num_draws: int, initial_losses: Tensor) -> None:
        self.initial_losses = initial_losses.detach().to("cpu", torch.float32, copy=True)
        samples = len(initial_losses)
        generator = torch.Generator().manual_seed(0)
        self.probe_samples = torch.randperm(samples, generator=generator)[:PROBES].sort().values
        shape = (num_chains, num_draws)
        self.mean_loss = torch.zeros(shape, dtype=torch.float64)
        self.train_loss = torch.zeros(shape, dtype=torch.float32)
        self.probe = torch.zeros(*shape, len(self.probe_samples), dtype=torch.float32)
        self.read = torch.zeros(shape, dtype=torch.bool)
        self.finite = torch.zeros(shape, dtype=torch.bool)

    @property
    def num_chains(self) -> int:
        return len(self.read)

    def update(self, chain: Tensor, draw: Tensor, losses: Tensor, train_loss: Tensor, finite: Tensor) -> None:
        """Enter k draws: chain (k,), draw (k,) within it, losses (k, m), train_loss (k,), finite (k,)."""
        self.mean_loss[chain, draw] = losses.mean(1, dtype=torch.float64).cpu()
        self.train_loss[chain, draw] = train_loss.detach().cpu().float()
        self.probe[chain, draw] = losses[:, self.probe_samples.to(losses.device)].float().cpu()
        self.read[chain, draw] = True
        self.finite[chain, draw] = finite.cpu()

    def died(self, chain: int) -> int | None:
        """The draw from which on a chain is non-finite to its end; None for a living one."""
        read = self.read[chain].nonzero().flatten()
        finite = self.finite[chain].nonzero().flatten()
        if not len(read) or (len(finite) and finite[-1] == read[-1]):
            return None
        return int(finite[-1]) + 1 if len(finite) else int(read[0])

    @property
    def dead(self) -> dict[int, int]:
        """The chains that died, each with the draw at which it did."""
        deaths = {chain: self.died(chain) for chain in range(self.num_chains)}
        return {chain: draw for chain, draw in deaths.items() if draw is not None}

    @property
    def skipped(self) -> dict[int, int]:
        """Living chains with non-finite draws in between, and how many."""
        lost = (self.read & ~self.finite).sum(1).tolist()
        return {chain: count for chain, count in enumerate(lost) if count and chain not in self.dead}

    def living(self) -> list[int]:
        """Chains with draws that did not die."""
        return [chain for chain in range(self.num_chains) if chain not in self.dead and self.read[chain].any()]

    def complete(self) -> list[int]:
        """Chains all of whose draws are finite: those that R-hat and the like can compare."""
        return (self.read & self.finite).all(1).nonzero().flatten().tolist()

    @property
    def initial_loss(self) -> float:
        """Mean loss at w* over the samples."""
        return self.initial_losses.double().mean().item()

    def excess_loss(self) -> Tensor:
        """(C,) fp64 of each chain, over its finite draws; NaN for dead chains."""
        used = self.read & self.finite
        used[list(self.dead)] = False
        mean = self.mean_loss.masked_fill(~used, 0.0).sum(1) / used.sum(1)
        return excess_loss(mean, self.initial_loss)

    def merge(self, other: ChainRecord) -> None:
        """Add the records of other chains; each chain is entered in one record only."""
        for name in ("mean_loss", "train_loss", "probe", "read", "finite"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine[other.read] = theirs[other.read]

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ChainRecord:
        record = cls.__new__(cls)
        record.load_state_dict(state)
        return record
