"""From a sampler's draws to sums or traces: whole chains, checkpoints, and the ranks' shares brought together."""

from __future__ import annotations

import functools
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonic_triton._common.claims import Claim
from harmonic_triton._common.processes import Result, led
from harmonic_triton.losskernel import checkpoint, sharded_files
from harmonic_triton.losskernel.accumulator import Accumulator
from harmonic_triton.losskernel.chain_record import ChainRecord
from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance
from harmonic_triton.losskernel.draws import is_usable
from harmonic_triton.losskernel.sampling.parameters import ALONE, Share
from harmonic_triton.losskernel.sampling.progress import Progress
from harmonic_triton.losskernel.sampling.sampler import Draws, Sampler
from harmonic_triton.losskernel.traces.traces import LossTraces

KIND = "the checkpoint of a loss kernel"
MEND = "remove it to start this run over, or take a new directory"
DENSE = 4096  # samples up to which m x m is held whatever the number of draws


class QueryCovariance:
    """Cov(ℓ_i, φ_q) of m samples with q queries from whole chains: sums about each chain's own mean, in fp64."""

    def __init__(self, num_chains: int, num_samples: int, num_queries: int) -> None:
        self.within = torch.zeros(num_samples, num_queries, dtype=torch.float64)
        self.counts = torch.zeros(num_chains, dtype=torch.int64)
        self.sample_means = torch.zeros(num_chains, num_samples, dtype=torch.float64)
        self.query_means = torch.zeros(num_chains, num_queries, dtype=torch.float64)

    def update(self, chain: int, losses: Tensor, queries: Tensor) -> None:
        """Enter a whole chain: losses (T, m), queries (T, q)."""
        losses, queries = losses.double().cpu(), queries.double().cpu()
        self.counts[chain] = len(losses)
        self.sample_means[chain], self.query_means[chain] = losses.mean(0), queries.mean(0)
        self.within += (losses - losses.mean(0)).T @ (queries - queries.mean(0))

    def compute(self, within_chain: bool) -> Tensor:
        """(m, q) fp64 covariance, pooled over the chains or within them."""
        used = self.counts > 0
        counts = self.counts[used].double()
        if within_chain:
            return self.within / (counts - 1).sum()
        weights = counts[:, None] / counts.sum()
        samples, queries = self.sample_means[used], self.query_means[used]
        between = (samples - (weights * samples).sum(0)).T @ (counts[:, None] * (queries - (weights * queries).sum(0)))
        return (self.within + between) / (counts.sum() - 1)

    def merge(self, other: QueryCovariance) -> None:
        """Add what another entered, of other chains."""
        for name, values in vars(other).items():
            getattr(self, name).add_(values)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QueryCovariance:
        new = cls.__new__(cls)
        vars(new).update(state)
        return new


class Collector:
    """Takes draws as a sampler yields them and enters whole chains into the accumulator, in the order they end.

    A chain's draws wait until it has ended, T m floats for every chain that runs at the time: one that ends non-finite
    has died, and none of its draws is entered, not even those on its way there. So the kernel is that of the other
    chains alone, and does not depend on how chains were grouped. Single non-finite draws of a living chain are left out.
    """

    def __init__(
        self,
        num_chains: int,
        num_draws: int,
        initial_losses: Tensor,  # (m,)
        num_read: int,  # m and the queries behind
        keep: str,
        device: torch.device | str,
        backend: str,
        path: Path | None,
        dtype: torch.dtype = torch.bfloat16,
        run: str | None = None,
    ) -> None:
        self.num_samples = len(initial_losses)
        self.record = ChainRecord(num_chains, num_draws, initial_losses)
        queries = num_read - self.num_samples
        self.queries = QueryCovariance(num_chains, self.num_samples, queries) if queries else None
        self.accumulator: Accumulator
        if chosen(keep, self.num_samples, num_chains * num_draws) == "covariance":
            self.accumulator = StreamingCovariance(self.num_samples, device=device, backend=backend)
        else:
            self.accumulator = LossTraces(
                self.num_samples, path=path, dtype=dtype, device=device, backend=backend, run=run
            )
        self.pending: dict[int, list[Tensor]] = {}

    def update(self, draws: Draws) -> None:
        """Enter draws (k, m + q)."""
        usable = is_usable(draws.losses)
        samples = draws.losses[:, : self.num_samples]
        self.record.update(draws.chain.cpu(), draws.draw.cpu(), samples, draws.train_loss, usable)
        for losses, chain, counts in zip(draws.losses, draws.chain.tolist(), usable.tolist(), strict=True):
            waiting = self.pending.setdefault(chain, [])
            if counts:
                waiting.append(losses.clone())
        for chain in list(self.pending):
            if self.record.read[chain].all():
                self._enter(chain)

    def _enter(self, chain: int) -> None:
        waiting = self.pending.pop(chain)
        if self.record.died(chain) is not None:
            return
        losses = torch.stack(waiting)
        self.accumulator.update(losses[:, : self.num_samples], chain=chain)
        if self.queries is not None:
            self.queries.update(chain, losses[:, : self.num_samples], losses[:, self.num_samples :])

    def begin(self) -> None:
        """Drop draws that lie in files and that no checkpoint vouches for."""
        if self.accumulator.count:
            self.accumulator.reset()

    def close(self) -> None:
        """Let others write to the accumulator's files."""
        self.accumulator.close()

    def check(self) -> None:
        """There is a kernel: two draws or more.

        Raises:
            ValueError: every chain died, or there is one draw.
        """
        if self.accumulator.count < 2:
            deaths = ", ".join(f"chain {chain} at draw {draw}" for chain, draw in self.record.dead.items())
            raise ValueError(
                f"{self.accumulator.count} draws are left, a covariance needs two"
                + (f"; died: {deaths}. Take a smaller step size or a larger localization" if deaths else "")
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "accumulator": self.accumulator.state_dict(),
            "record": self.record.state_dict(),
            "queries": None if self.queries is None else self.queries.state_dict(),
            "pending": {chain: torch.stack(rows) if rows else None for chain, rows in self.pending.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accumulator.load_state_dict(state["accumulator"])
        self.record.load_state_dict(state["record"])
        if state["queries"] is not None:
            self.queries = QueryCovariance.from_state_dict(state["queries"])
        device = self.accumulator.device
        self.pending = {
            chain: [] if rows is None else list(rows.to(device)) for chain, rows in state["pending"].items()
        }


def chosen(keep: str, num_samples: int, num_draws: int) -> str:
    """What ``keep`` means: m x m pays while m is no larger than the number of draws, or small."""
    if keep not in ("covariance", "traces", "auto"):
        raise ValueError(f"keep must be 'covariance', 'traces' or 'auto', got {keep!r}")
    if keep != "auto":
        return keep
    return "covariance" if num_samples <= max(num_draws, DENSE) else "traces"


class Stored:
    """The checkpoint of one share of a run, ``directory/kernel-INDEX.pt``, and the right to write it.

    The state of chains whose weights are sharded lies beside it, in a directory of ``torch.distributed.checkpoint`` that the
    checkpoint names, with the checksum of each file: each process writes its part, and the checkpoint takes its name last.

    Args:
        directory: None keeps nothing.
        fingerprint: what the run's numbers depend on.
        share, group: of the sampler. Processes that hold a model together have one share, which the first of them writes.

    Attributes:
        run: a hash of the fingerprint, the traces' ``run``; state: the last checkpoint, None without one.

    Raises:
        ValueError: the checkpoint is of another run, which is told in what, or damaged. InUseError: another process or
            thread is at this run.
    """

    def __init__(
        self, directory: Path | None, fingerprint: dict[str, str], share: Share = ALONE, group: Any = None
    ) -> None:
        self.fingerprint, self.index, self.group, self.directory = fingerprint, share.place, group, directory
        self.run = hashlib.blake2b(json.dumps(fingerprint, sort_keys=True).encode(), digest_size=12).hexdigest()
        self.path = None if directory is None else directory / f"kernel-{self.index}.pt"
        self.state: dict[str, Any] | None = None
        self._claim: Claim | None = None
        self.led(self._open)

    def _open(self) -> None:
        if self.path is None:
            return
        self._claim = Claim(self.path.with_suffix(".lock"))
        if self.path.exists():
            try:
                self.state = checkpoint.load(self.path, KIND, MEND)
                checkpoint.check_fingerprint(self.state["fingerprint"], self.fingerprint)
            except BaseException:
                self.close()
                raise

    def led(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives in the process that writes, in all that hold the model together."""
        return led(work, self.group)

    def restore(self, sampler: Sampler, collector: Collector) -> None:
        """Put sampler and collector where the last checkpoint was."""
        chains = self.led(lambda: None if self.state is None else dict(self.state["sampler"]))
        if chains is None:
            self.led(collector.begin)
            return
        shards = chains.pop("shards", None)
        if shards is not None and self.directory is not None:
            folder = self.directory / shards["folder"]
            self.led(lambda: sharded_files.check(folder, shards["files"], MEND))
            chains["sharded"] = sampler.sharded_templates(shards["names"])
            sharded_files.read(folder, chains["sharded"], self.group)
        sampler.load_state_dict(chains)
        self.led(lambda: self._load(collector))

    def _load(self, collector: Collector) -> None:
        if self.state is not None:
            collector.load_state_dict(self.state["collector"])
            self.state = None

    def save(self, sampler: Sampler, collector: Collector) -> None:
        """Write the present state, in place of the former."""
        path, directory = self.path, self.directory
        if path is None or directory is None:
            return
        chains = sampler.state_dict()
        sharded, name = chains.pop("sharded", {}), ""
        if sharded:
            name = self.led(lambda: f"chains-{self.index}-{secrets.token_hex(8)}")
            sharded_files.write(directory / name, sharded, self.group)

        def commit() -> None:
            if sharded:
                files = sharded_files.checksums(directory / name)
                chains["shards"] = {"folder": name, "names": list(sharded), "files": files}
            state = {"fingerprint": self.fingerprint, "sampler": chains, "collector": collector.state_dict()}
            checkpoint.save(path, state, KIND)
            for left in directory.glob(f"chains-{self.index}-*"):
                if left.name != name:
                    shutil.rmtree(left, ignore_errors=True)

        self.led(commit)

    def close(self) -> None:
        """Let others go on with the run."""
        if self._claim is not None:
            self._claim.release()


def collect(sampler: Sampler, collector: Collector, stored: Stored, seconds: float, progress: bool) -> None:
    """Run the sampler to its end into the collector, from the last checkpoint on."""
    stored.restore(sampler, collector)
    bar = None
    if progress and sampler.share.leads:
        bar = Progress(len(sampler.chains), sampler.config.num_draws, sampler.initial_losses)
    clock = checkpoint.Clock(seconds)

    def enter(draws: Draws) -> bool:
        collector.update(draws)
        if bar is not None:
            bar.update(draws.losses, len(sampler.dead))
        return clock.due()

    try:
        for draws in sampler.run():
            due = stored.led(functools.partial(enter, draws))
            if due or not sampler.remaining:
                stored.save(sampler, collector)
                clock.restart()
    finally:
        if bar is not None:
            bar.close()


def gather(collector: Collector, rank: int, world: int, directory: Path | None, dtype: torch.dtype, run: str) -> None:
    """Every rank's chains in each rank's collector."""
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, (collector.record, collector.queries))
    for other, (record, queries) in enumerate(every):
        if other != rank:
            collector.record.merge(record)
            if collector.queries is not None:
                collector.queries.merge(queries)
    path = directory and directory / f"traces-of-all-{rank}"
    collector.accumulator = collector.accumulator.gathered(path, dtype, run)
