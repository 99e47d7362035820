"""The factor form of the loss kernel: the draws themselves, and what can be asked of their covariance without forming it.

Notation: m samples, T draws of their losses; K = cov(losses) over draws, rho its correlation (*The loss kernel*, section 2).
For m >> T the T x m traces are smaller than the m x m matrix and hold as much.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.dispatch import resolve
from harmonic_triton._common.extras import needs
from harmonic_triton._common.processes import rank_and_world
from harmonic_triton.losskernel.draws import checked_chains, checked_draws, is_usable
from harmonic_triton.losskernel.traces import neighbors
from harmonic_triton.losskernel.traces.factor import Factor, Selection, moments, selection, warn_of_drift
from harmonic_triton.losskernel.traces.store import MEND, FileStore, MemoryStore, State, read_state

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}


class Neighbors(NamedTuple):
    """The nearest samples, nearest first; where there are fewer than k, index -1 at an infinite distance."""

    indices: Tensor  # (rows, k) int64
    distances: Tensor  # (rows, k) fp32, sqrt(2(1 - rho))


class LossTraces:
    """Draws of m per-sample losses, less a constant reference, in memory or memory-mapped.

    The reference is the mean of the first batch of draws, in fp64. Stored are the shifted losses in ``dtype``. bfloat16
    moves correlations by about 2.4e-3/sqrt(T) in the root mean square, below Monte-Carlo noise; single ones by a few 1e-4
    for bell-shaped losses, by 1e-3 to 3e-3 where a few draws hold most of a sample's variance (log-normal losses), and
    by 2^-7 at most. float32 moves none by more than 5e-6: take it where single correlations matter. ``mean`` and
    ``variance`` come from fp64 sums of the losses before rounding, so they hold even where the traces have drifted too
    far from the reference to be stored well (which is warned of); everything else comes from the stored values and is
    consistent in itself: every block of the covariance belongs to one positive semi-definite matrix, and rho_ii = 1. A
    spread below 1e-35/sqrt(T) counts as none, and rho is 0.

    Example::

        traces = ht.LossTraces(m, path="runs/traces")   # continues where the directory ends
        for losses in draws:                            # (k, m)
            traces.update(losses, chain=0)
        indices, distances = traces.neighbors(15, exclude_same=labels)

    Args:
        num_samples: m.
        path: directory to keep the draws in (``draws.bin``, ``state.pt``, ``lock``); opened again where it already holds
            some. Every update is on the disk when it returns (a few milliseconds: better many draws at a time), and a
            process killed at any moment leaves the last complete one. Checksums are kept of everything; they are
            compared when draws are first read or gone on from, and damage raises. One object may write, from its first
            update to :meth:`close` or its end; others may read what was there when they were opened. None keeps the draws
            on ``device``.
        dtype: torch.bfloat16 or torch.float32.
        device: of the computations, and of the draws without ``path``; None is the CPU.
        backend: of ``neighbors``: "auto", "triton" or "torch". Only "auto" falls back.
        capacity: number of draws to reserve room for; more can follow.
        run: what the draws are of, in a word that no other run has. It is kept in ``path``, and a directory of another
            run is refused. None takes any.

    Raises:
        TypeError, ValueError: an argument is wrong, or ``path`` holds traces of another shape, dtype, format or run, or
            files that are not as they were written; the message says which and what to do.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        path: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        backend: str = "auto",
        capacity: int = 0,
        run: str | None = None,
    ) -> None:
        validate.integer("num_samples", num_samples, 1)
        validate.integer("capacity", capacity, 0)
        if dtype == torch.float16:
            raise ValueError(
                "dtype=torch.float16 holds nothing above 65504 and little below 6e-5: heavy-tailed losses overflow"
                " and small spreads vanish; use torch.bfloat16 or torch.float32"
            )
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float32, got {dtype!r}")
        self.num_samples, self.dtype, self.backend = int(num_samples), dtype, backend
        self.device = torch.device("cpu" if device is None else device)
        self.path = None if path is None else Path(path)
        self._resolve_backend()
        state: State | None = None
        self._store: MemoryStore | FileStore
        if self.path is None:
            self._store = MemoryStore(self.num_samples, dtype, self.device, capacity)
        else:
            self._store = FileStore(self.path, self.num_samples, dtype, capacity, run)
            state = self._store.state(self.device)
        self._set(state or self._nothing())

    @classmethod
    def open(cls, path: str | os.PathLike[str], **options: Any) -> LossTraces:
        """The traces that a directory holds, whatever their number of samples and dtype; options as of the class.

        Raises:
            FileNotFoundError: there are none. ValueError: what it holds is damaged.
        """
        found = read_state(Path(path))
        if found is None:
            raise FileNotFoundError(f"path={str(path)!r} holds no traces (no state.pt)")
        return cls(found["num_samples"], path=path, dtype=DTYPES[found["dtype"]], **options)

    def _nothing(self) -> State:
        sums = torch.zeros(2, self.num_samples, dtype=torch.float64, device=self.device)
        return State(0, None, sums, torch.empty(0, dtype=torch.int64), {})

    def _set(self, state: State) -> None:
        self._state = state
        self._moments_of_stored: tuple[Tensor, Tensor] | None = None

    def _resolve_backend(self) -> str:
        if self.backend not in ("auto", "torch", "triton"):
            raise ValueError(f"backend is {self.backend!r}; it must be 'auto', 'triton' or 'torch'")
        return resolve(self.backend, self.device, self.dtype)

    # --- draws in ------------------------------------------------------------------------------------------------

    def update(self, losses: Tensor, chain: int | Sequence[int] | Tensor | None = None) -> None:
        """Append draws.

        A draw with a loss that is not finite (or 2^52 and more) is left out and counted in ``dead`` under its chain.

        Args:
            losses: (m,) one draw or (k, m), floating, any device.
            chain: the chain of every draw, an int or (k,) ints; None is chain 0.

        Raises:
            TypeError, ValueError: an argument is wrong.
            RuntimeError: another process, or another object of this one, writes to ``path``.
        """
        losses = checked_draws(losses, self.num_samples)
        chains = torch.tensor(checked_chains(chain, len(losses)), dtype=torch.int64)
        state = self._state
        usable = is_usable(losses)
        dead = self.dead
        for number in chains[~usable.cpu()].tolist():
            dead[number] = dead.get(number, 0) + 1
        counted = (losses if usable.all() else losses[usable]).to(self.device)
        reference, sums = state.reference, state.sums.clone()
        draws = torch.empty(counted.shape, dtype=self.dtype, device=self.device)
        if reference is None and len(counted):
            reference = torch.zeros_like(sums[0])
            for row in counted:
                reference += row
            reference /= len(counted)
        for row, draw in zip(counted, draws, strict=True):  # one by one, so that sums do not depend on the batches
            shifted = row - reference
            sums[0] += shifted
            sums[1].addcmul_(shifted, shifted)
            draw.copy_(shifted)
        if len(counted):
            self._store.write(state.count, draws)
        state = State(
            state.count + len(counted), reference, sums, torch.cat([state.chains, chains[usable.cpu()]]), dead
        )
        if len(losses):
            self._store.commit(state)
        self._set(state)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: with ``path`` which draws count, by their checksums; without it the draws themselves."""
        held: dict[str, Any] = {"num_samples": self.num_samples, "dtype": str(self.dtype), "draws": None}
        if isinstance(self._store, FileStore):
            held["blocks"] = self._store.blocks.state_dict()
        else:
            held["draws"] = self._stored().clone()
        return asdict(self._state) | held

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint: draws that were added after it are dropped, from the directory too.

        Raises:
            ValueError: the checkpoint is of other traces, or its draws are not here or not as they were.
            RuntimeError: as :meth:`update`.
        """
        for name, here in (("num_samples", self.num_samples), ("dtype", str(self.dtype))):
            if state[name] != here:
                raise ValueError(f"the state is of traces with {name} {state[name]}, these have {here}")
        reference = state["reference"]
        found = State(
            count=state["count"],
            reference=None if reference is None else reference.to(self.device, copy=True),
            sums=state["sums"].to(self.device, copy=True),
            chains=state["chains"].cpu().clone(),
            dead=dict(state["dead"]),
        )
        if not isinstance(self._store, FileStore):
            if state["draws"] is None:
                raise ValueError("the state's draws are in the directory it was taken from; give LossTraces that path")
            self._store.write(0, state["draws"].to(self.device))
        else:
            if state["draws"] is not None:
                raise ValueError("the state holds its draws, so it was taken without path; load it without path")
            if "blocks" not in state:
                raise ValueError(
                    "the state was taken by a version that kept no checksums; begin anew, in another directory"
                )
            if self.count < found.count:
                raise ValueError(
                    f"path={str(self.path)!r} holds {self.count} draws, the state counts {found.count}; {MEND}"
                )
            if not self._store.blocks.begins_with(state["blocks"]):
                raise ValueError(f"path={str(self.path)!r} holds the draws of another run than the state's")
            if (self.count, self.dead) != (found.count, found.dead):
                self._store.commit(found)
        self._set(found)

    def reset(self) -> None:
        """Drop every draw, from the directory too.

        Raises:
            RuntimeError: as :meth:`update`.
        """
        nothing = self._nothing()
        self._store.commit(nothing)
        self._set(nothing)

    def close(self) -> None:
        """Let other objects and processes write to ``path``. The draws stay readable; an update takes the right again."""
        self._store.close()

    def gathered(self, path: Path | None, dtype: torch.dtype, run: str) -> LossTraces:
        """The draws of every process of ``torch.distributed``, chain by chain, in new traces; these ones are closed.

        What ``path`` holds of an earlier call is dropped; the arguments are the new ones', as of the class.
        """
        union = LossTraces(self.num_samples, path=path, dtype=dtype, device=self.device, backend=self.backend, run=run)
        union.reset()
        mine, world = rank_and_world()
        every: list[Any] = [None] * world
        dist.all_gather_object(every, self.chain_counts)
        for chain, rank in sorted((chain, rank) for rank, counts in enumerate(every) for chain in counts):
            losses = torch.empty(every[rank][chain], self.num_samples, dtype=torch.float64, device=self.device)
            if rank == mine:
                losses.copy_(self.draws(self.chains == chain)).add_(self.reference)
            dist.broadcast(losses, src=rank)
            union.update(losses, chain=chain)
        self.close()
        return union

    # --- draws out -----------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Draws stored, of all chains."""
        return self._state.count

    @property
    def chains(self) -> Tensor:
        """(count,) int64 on the CPU, the chain of every stored draw."""
        return self._state.chains

    @property
    def chain_counts(self) -> dict[int, int]:
        """Draws stored of each chain."""
        numbers, counts = self.chains.unique(return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    @property
    def dead(self) -> dict[int, int]:
        """Draws left out, by chain, because a loss in them was not finite."""
        return dict(self._state.dead)

    @property
    def reference(self) -> Tensor:
        """(m,) fp64, what was subtracted from every draw. ValueError before the first."""
        if self._state.reference is None:
            raise ValueError("there is no reference before the first draw; call update first")
        return self._state.reference

    def draws(self, draws: Selection = slice(None), samples: Selection = slice(None)) -> Tensor:
        """Losses less ``reference`` as stored: (draws, samples) fp32 on ``device``.

        Args:
            draws: which draws, a slice or indices or a mask: ``traces.draws(traces.chains == 3)`` is a chain,
                ``traces.draws(slice(0, traces.count // 2))`` a half.
            samples: which samples, likewise.
        """
        rows, columns = selection("draws", draws, self.count), selection("samples", samples, self.num_samples)
        stored = self._stored()
        part = stored[rows][:, columns] if isinstance(rows, slice) else stored[:, columns][rows]  # slices copy nothing
        return part.to(self.device, torch.float32, copy=True)

    @property
    def chain_means(self) -> dict[int, Tensor]:
        """Mean loss of every sample in each chain, {chain: (m,) fp64}, from the stored values."""
        total = {chain: torch.zeros_like(self._state.sums[0]) for chain in self.chain_counts}
        for draw, chain in zip(self._stored(), self.chains.tolist(), strict=True):
            total[chain] += draw.to(self.device)
        return {chain: self.reference + total[chain] / count for chain, count in self.chain_counts.items()}

    # --- moments and products ------------------------------------------------------------------------------------

    def mean(self) -> Tensor:
        """Mean loss of every sample, (m,) fp64, from the losses before rounding."""
        self._need(1)
        return self.reference + self._state.sums[0] / self.count

    def variance(self) -> Tensor:
        """Variance of every sample's loss, (m,) fp64, divisor T - 1, from the losses before rounding."""
        self._need(2)
        total, squares = self._state.sums.unbind()
        # exactly 0 for a constant: it lies a few last places of its fp64 mean off, and fp64 holds the squares of such
        return (squares - total.square() / self.count) / (self.count - 1)

    def covariance(self, rows: Selection, columns: Selection | None = None) -> Tensor:
        """A block of K, (rows, columns) fp32, divisor T - 1.

        Args:
            rows: which samples, a slice, indices or a mask.
            columns: likewise, None for the same ones.
        """
        products, row_scale, column_scale = self.factor().products(rows, columns)
        row_spread, column_spread = (torch.where(scale > 0, 1 / scale, 0.0) for scale in (row_scale, column_scale))
        return products.mul_(row_spread.unsqueeze(1)).mul_(column_spread).div_(self.count - 1).float()

    def correlation(self, rows: Selection, columns: Selection | None = None) -> Tensor:
        """A block of rho, (rows, columns) fp32 in [-1, 1]; 0 where either variance is 0. Arguments as in covariance."""
        return self.factor().products(rows, columns)[0].clamp_(-1.0, 1.0).float()

    def matvec(self, v: Tensor, *, correlation: bool = False, centered: bool = False) -> Tensor:
        """K v, in one pass over the draws, (m,) or (m, p) fp64 like v.

        Args:
            v: (m,) or (m, p), floating.
            correlation: rho instead of K.
            centered: H K H (or H rho H) with H = I - 1/m, as the first principal component takes it.
        """
        validate.tensors(v=v)
        validate.flag("correlation", correlation)
        validate.flag("centered", centered)
        if not v.is_floating_point() or v.dim() not in (1, 2) or len(v) != self.num_samples:
            raise ValueError(
                f"v must be floating, (m,) or (m, p) with m = {self.num_samples}, got {validate.describe(v)}"
            )
        return self.factor().matvec(v.detach(), correlation, centered)

    def linear_operator(self, *, correlation: bool = True, centered: bool = False) -> LinearOperator:
        """The products of :meth:`matvec` for ``scipy.sparse.linalg``: ``eigsh(traces.linear_operator(), k=5)``.

        Returns:
            A symmetric (m, m) LinearOperator on fp64 NumPy vectors.
        """
        validate.flag("correlation", correlation)
        validate.flag("centered", centered)
        sparse = needs("scipy.sparse.linalg", "linear_operator")

        def product(v: Any) -> Any:
            return self.matvec(torch.as_tensor(v).double(), correlation=correlation, centered=centered).cpu().numpy()

        shape = (self.num_samples, self.num_samples)
        return sparse.LinearOperator(shape, product, rmatvec=product, matmat=product, rmatmat=product, dtype="float64")

    # --- neighbours ----------------------------------------------------------------------------------------------

    def neighbors(
        self,
        k: int,
        exclude_same: Tensor | Sequence[int] | None = None,
        *,
        rows: range | slice | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> Neighbors:
        """The k samples most correlated with each, without the m x m matrix; never the sample itself.

        Equal distances go to the lower index. A sample of variance 0 is at sqrt(2) from all. Memory is O(m k) beside tiles.

        Args:
            k: at least 1.
            exclude_same: (m,) integer labels; samples of the same label are left out before the k are taken.
            rows: consecutive samples whose neighbours are wanted, None for all: processes that open one path can share the
                work, and a range that was interrupted is done again. The result for a row does not depend on it.
                All rows at once take about half the products on the PyTorch backend: each serves both its samples.
            progress: True for a bar (tqdm), or called with (tiles done, tiles in all).

        Returns:
            Neighbors(indices (rows, k) int64, distances (rows, k) fp32) on ``device``, distance sqrt(2(1 - rho)), nearest
            first; index -1 at distance infinity where a row has fewer than k partners.

        Raises:
            TypeError, ValueError: an argument is wrong, or there are fewer than two draws.
        """
        validate.integer("k", k, 1)
        if not callable(progress):
            validate.flag("progress", progress)
        chosen = range(self.num_samples)
        if rows is not None:
            if not isinstance(rows, (range, slice)):
                raise TypeError(f"rows must be a range or a slice, got {validate.describe(rows)}")
            chosen = rows if isinstance(rows, range) else chosen[rows]
            if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= self.num_samples:
                raise ValueError(f"rows must be consecutive samples between 0 and m = {self.num_samples}, got {rows!r}")
        labels = (
            None if exclude_same is None else neighbors.checked_labels(exclude_same, self.num_samples).to(self.device)
        )
        backend = self._resolve_backend()
        if backend == "triton" and k > neighbors.LARGEST_TRITON_K:
            if self.backend == "triton":
                raise ValueError(
                    f"backend='triton' keeps at most k = {neighbors.LARGEST_TRITON_K} neighbours, got {k};"
                    " backend='auto' falls back"
                )
            backend = "torch"
        searched = neighbors.Search(*self.factor(), labels)
        if progress is True:
            return Neighbors(*neighbors.with_bar(lambda report: neighbors.search(searched, k, chosen, backend, report)))
        return Neighbors(*neighbors.search(searched, k, chosen, backend, progress or None))

    def _stored(self) -> Tensor:
        """(count, m) as stored."""
        return self._store.read(self.count)

    def _need(self, draws: int) -> None:
        if self.count < draws:
            raise ValueError(f"this takes {draws} draws at least, there are {self.count}; call update first")

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(mean, 1/sqrt(sum of squares about it) or 0 where constant) of the stored values, (m,) fp64 each."""
        self._need(2)
        if self._moments_of_stored is None:
            mean, scale, ratio = moments(self._stored(), self.device)
            warn_of_drift(ratio, self.dtype, self.num_samples)
            self._moments_of_stored = mean, scale
        return self._moments_of_stored

    def factor(self) -> Factor:
        """What products are taken from."""
        return Factor(self._stored(), *self._moments())
