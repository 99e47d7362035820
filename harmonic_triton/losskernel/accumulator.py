"""What a collector asks of the form in which draws are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Accumulator(Protocol):
    """Draws of m losses, by chain. ``StreamingCovariance`` holds their sums, ``LossTraces`` the draws themselves."""

    num_samples: int
    device: torch.device

    @property
    def count(self) -> int:
        """Draws that count, of all chains."""

    def update(self, losses: Tensor, chain: int) -> None:
        """Enter draws (k, m) of a chain."""

    def reset(self) -> None:
        """Forget every draw, in files too."""

    def close(self) -> None:
        """Let other objects and processes write to its files, where it has any."""

    def gathered(self, path: Path | None, dtype: torch.dtype, run: str) -> Accumulator:
        """One that holds the draws of every process of ``torch.distributed``; all of them call it.

        Args:
            path, dtype, run: of the new traces, as for :class:`LossTraces`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes back to."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace every draw by those of a state."""
