"""The losses of a run as one stream, which a directory can keep and go on with: :func:`sample_losses`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonic_triton._common import validate
from harmonic_triton._common.claims import Claim
from harmonic_triton._common.files import Blocks
from harmonic_triton._common.processes import distributed, rank_and_world
from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.parameters import Mask, PerSampleLoss
from harmonic_triton.losskernel.sampling.progress import Progress
from harmonic_triton.losskernel.sampling.sampler import Sampler

KIND = "the state of draws"
MEND = "restore it from a copy, or start over by removing it"


def sample_losses(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train_data: Any,
    eval_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    mask: Mask = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """Per-sample losses along localised SGLD chains (*The Loss Kernel*, appendix B), draw by draw.

    Args:
        model, per_sample_loss, train_data, eval_data, config, seed, mask, device: as for :class:`losskernel.Sampler`. Under
            torch.distributed each rank runs and yields chains rank, rank + world, ...; ranks that hold a sharded model
            together all yield the chains of their group, and keep no ``checkpoint_dir``.
        checkpoint_dir: keep the draws (4 bytes a loss) and the state of the chains here (``draws.f32``, ``state.pt``). A
            later call with the same arguments yields the whole stream again, from the disk as far as it goes, and
            continues bitwise, whenever the process was killed. The directory belongs to one run: another one is refused,
            and so is a second process while the first is at it (a lock, which dies with its process). A later call in
            the same process takes the directory over, and the earlier iterator then raises. Everything has a checksum;
            draws are compared with theirs before they are yielded.
        checkpoint_seconds: at least this long between two checkpoints; 0: one at every draw.
        progress: draws a second, time left and the chains' health, by tqdm where it is installed, else lines on stderr.

    Returns:
        An iterator of (k, m) float32 losses: one draw of k chains of a group, groups one after the other. A chain that
        diverged gives NaN.

    Raises:
        TypeError, ValueError: an argument is wrong, the directory holds another run (what differs is listed), or a file
            in it is not as it was written; the message says which and what to do.
        RuntimeError: another process or thread is at the run in the directory.
    """
    validate.between("checkpoint_seconds", checkpoint_seconds, 0.0)
    validate.flag("progress", progress)
    sampler = Sampler(model, per_sample_loss, train_data, eval_data, config, seed=seed, device=device, mask=mask)
    if sampler.sharded and checkpoint_dir is not None:
        raise ValueError(
            "checkpoint_dir holds no stream of a model whose weights are sharded; loss_kernel(..., keep='traces',"
            " checkpoint_dir=...) keeps its draws and goes on with them"
        )
    bar = None
    if progress and sampler.share.leads:
        bar = Progress(len(sampler.chains), config.num_draws, sampler.initial_losses)
    if checkpoint_dir is None:
        return _watched((draws.losses for draws in sampler.run()), sampler, bar)
    log = _DrawLog(Path(checkpoint_dir), sampler, checkpoint_seconds)
    return _watched(log.stream(), sampler, bar)


def _watched(stream: Iterator[Tensor], sampler: Sampler, bar: Progress | None) -> Iterator[Tensor]:
    try:
        for losses in stream:
            if bar is not None:
                bar.update(losses, len(sampler.dead))
            yield losses
    finally:
        if bar is not None:
            bar.close()


class _DrawLog:
    """The draws of a run in one file, appended, and beside it the state after some of them with the draws' checksums."""

    def __init__(self, directory: Path, sampler: Sampler, seconds: float) -> None:
        if distributed():
            rank, world = rank_and_world()
            directory = directory / f"rank{rank}of{world}"
        self.claim = Claim(directory / "draws.lock", lent=True)
        self.draws = Blocks(directory / "draws.f32", 4 * sampler.num_samples, f"{MEND}, and {directory / 'state.pt'}")
        self.state, self.sampler, self.seconds = directory / "state.pt", sampler, seconds
        try:
            if self.state.exists():
                saved = checkpoint.load(self.state, KIND, f"{MEND}, and {self.draws.path}")
                sampler.load_state_dict(saved["sampler"])
                self.draws.load_state_dict(saved["draws"])
                self.draws.check_size()
            elif self.draws.path.exists() and self.draws.path.stat().st_size:
                raise ValueError(
                    f"{self.draws.path} holds draws, and {self.state}, which says of what run, is gone: restore it, or"
                    " remove the draws to start over, or take a new directory"
                )
            else:
                self.save()
        except BaseException:
            self.claim.release()
            raise

    def save(self) -> None:
        """Bring draws and state to the disk."""
        self.draws.sync()
        checkpoint.save(self.state, {"sampler": self.sampler.state_dict(), "draws": self.draws.state_dict()}, KIND)

    def stream(self) -> Iterator[Tensor]:
        """The draws that are stored, then those that come."""
        blocks = self._blocks()
        try:
            while True:
                with self.claim.working():
                    block = next(blocks, None)
                if block is None:
                    return
                yield block
        finally:
            self.draws.close()
            self.claim.release()

    def _blocks(self) -> Iterator[Tensor]:
        for data in self.draws:
            yield torch.frombuffer(data, dtype=torch.float32).view(-1, self.sampler.num_samples).to(self.sampler.device)
        clock = checkpoint.Clock(self.seconds)
        for draws in self.sampler.run():
            self.draws.append(draws.losses)
            if clock.due() or not self.sampler.remaining:
                self.save()
                clock.restart()
            yield draws.losses
