"""Covariance of per-sample losses over draws, accumulated as they come.

The loss kernel of m samples is the covariance of their losses over the draws of a sampler,
K_ij = 1/(T - 1) sum_t (l_ti - mean_i)(l_tj - mean_j), pooled over chains. Losses near 2 with a spread of 0.0005 leave
nothing of E[xy] - E[x] E[y] in fp32, so what is summed is the second moment S about a constant reference vector, and the
plain sums in fp64: K = (S - n d dᵀ)/(n - 1) with d = mean - reference. S about one reference is additive: chains,
devices and machines merge by addition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton.losskernel.covariance.sums import (
    BUFFER,
    CovarianceResult,
    Moments,
    inverse_sd,
    layout_gap,
    mean_of,
    merged_counts,
    moments_of,
    outside_autograd,
    rank_k,
    recentering,
    resolve_backend,
    sum_of,
    total_of,
)
from harmonic_triton.losskernel.covariance.triangle import PACKED, Triangle, padded
from harmonic_triton.losskernel.draws import check_reference, checked_chains, checked_draws, is_usable

PRECISIONS = ("split", "fast", "ieee")


class StreamingCovariance:
    """Mean and covariance of the losses of ``num_samples`` samples over draws that are seen once.

    Draws are collected in a buffer; a full buffer is added to one triangle of the second moment about the reference by
    a rank-k update (CPU: LAPACK's packed ``sfrk`` where SciPy is installed, else products of panels by PyTorch; GPU:
    Triton). The reference is the mean of the first full buffer, unless given, and stays what it is. Memory: m²/2
    numbers for the triangle and ``buffer_size`` m for the buffer, which is given back when a result, m² more, is read.

    A draw with a loss that is not finite is dead (or of 2^52 and more, whose squares would end fp32): it is counted in
    :attr:`dead` under its chain and goes no further. Draws without a chain belong to chain 0.

    The same updates and reads give the same bits (on a CPU with the same number of threads). Second moments are read
    after emptying the buffer, so that an additional read in between changes later results, by rounding; means, counts
    and :meth:`state_dict` leave the buffer alone.

    Args:
        num_samples: m.
        dtype: float32 or float64 (float64: torch backend), of the second moment and of results. Losses of any floating
            dtype are taken; float64 losses meet the reference before they are rounded.
        device: of the state and of the losses; None is torch's default device.
        backend: "auto", "triton" or "torch". Only "auto" falls back.
        buffer_size: draws in a rank-k update.
        reference: (m,) losses about which second moments are taken, for example those at w*; within a few spreads of
            the mean. Accumulators with one reference merge without re-centring.
        precision: of the Triton backend's products. "split": fp32 accuracy from six bf16 products; "fast": three, half
            the time, 16 bits of every difference from the reference (correlations to about 1e-5); "ieee": fp32
            multiplications. The torch backend multiplies in full precision.

    Raises:
        TypeError, ValueError: an argument is wrong, or a backend asked for by name cannot serve.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str = "auto",
        buffer_size: int = BUFFER,
        reference: Tensor | None = None,
        precision: str = "split",
    ) -> None:
        validate.integer("num_samples", num_samples, 1)
        validate.integer("buffer_size", buffer_size, 1)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
        self.num_samples, self.dtype, self.buffer_size, self.precision = int(num_samples), dtype, buffer_size, precision
        self.device = torch.empty(0, device=device).device  # with its index
        self.backend = resolve_backend(backend, self.device, dtype)
        self._gap = layout_gap(self.backend, self.device)
        if reference is not None:
            check_reference(reference, self.num_samples, self.device)
            reference = reference.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        self._given_reference = reference
        self.reset()

    def reset(self) -> None:
        """Forget all draws; a reference that was given stays."""
        self._reference = self._given_reference
        self._triangle: Triangle | None = None  # second moment of the draws that have left the buffer
        self._buffer: Tensor | None = None  # (buffer_size, width): draws as they came, zero beyond m
        self._pending = 0  # rows of the buffer in use
        self._counts: dict[int, int] = {}
        self._sums: dict[int, Tensor] = {}
        self._dead: dict[int, int] = {}

    # --- what came in ----------------------------------------------------------------------------------------------------

    @outside_autograd
    def update(self, losses: Tensor, chain: int | Sequence[int] | Tensor | None = None) -> None:
        """Add draws.

        Args:
            losses: (m,) one draw or (k, m) k draws, floating, on the accumulator's device.
            chain: the chain that drew them, or k chains; None is chain 0.

        Raises:
            TypeError, ValueError: losses or chain have the wrong type, shape or device.
        """
        rows = checked_draws(losses, self.num_samples, self.device)
        chains = checked_chains(chain, len(rows))
        usable = is_usable(rows)
        if not bool(usable.all()):
            pairs = list(zip(chains, usable.tolist(), strict=True))
            self._dead = merged_counts((self._dead, Counter(one for one, counts in pairs if not counts)))
            rows, chains = rows[usable], [one for one, counts in pairs if counts]
        for one in dict.fromkeys(chains):
            which = [row for row, owner in enumerate(chains) if owner == one]
            self._count(one, len(which), sum_of(rows if len(which) == len(rows) else rows[which]))
        self._append(rows)

    @outside_autograd
    def merge(self, other: StreamingCovariance) -> None:
        """Add the draws of another accumulator, which stays as it is.

        Plain addition where the references agree; else the other's second moment is re-centred first, in float64 and
        rounded once. An accumulator without a reference yet takes the other's.

        Raises:
            TypeError, ValueError: not an accumulator, or of another number of samples or dtype.
        """
        if not isinstance(other, StreamingCovariance):
            raise TypeError(f"other must be a StreamingCovariance, got {validate.describe(other)}")
        if (other.num_samples, other.dtype) != (self.num_samples, self.dtype):
            raise ValueError(
                f"other accumulates {other.num_samples} samples in {other.dtype}, this one {self.num_samples} in"
                f" {self.dtype}; only accumulators over the same samples merge"
            )
        if other is self:
            raise ValueError("other is this accumulator itself: its draws would count twice")
        if other._triangle is not None and other._reference is not None:
            reference = other._reference.to(self.device)
            if self._reference is None:
                self._reference = reference
            triangle = other._triangle.with_gap(self._gap).to(self.device)
            if torch.equal(reference, self._reference):
                self._second_moment().data.add_(triangle.data)
            else:
                self._second_moment().add_(triangle, *recentering(*other._flushed(), reference, self._reference))
        for one, count in other._counts.items():
            self._count(one, count, other._sums[one].to(self.device))
        self._dead = merged_counts((self._dead, other._dead))
        self._append(other._waiting().to(self.device))

    def close(self) -> None:
        """Nothing is to be let go of: sums have no files."""

    def gathered(self, path: Path | None, dtype: torch.dtype, run: str) -> StreamingCovariance:
        """This accumulator after :meth:`all_reduce`; the arguments are for what has files."""
        self.all_reduce()
        return self

    @outside_autograd
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the accumulators of all processes of a group; afterwards every one holds all draws, in the same bits.

        The first process that has draws broadcasts its reference, the others re-centre, and the triangles, sums and
        counts are added. To be called once, at the end: called again it would count every draw again. A chain that
        several processes drew from is one chain.

        Raises:
            ValueError: the processes' accumulators differ in samples, dtype, backend or
                layout (SciPy on some, not on others).
        """
        mine = {
            "kind": (self.num_samples, str(self.dtype), self.backend, self._gap),
            "counts": self._counts,
            "dead": self._dead,
        }
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        if any(theirs["kind"] != mine["kind"] for theirs in every):
            raise ValueError(
                "the accumulators of a group must have one num_samples, dtype, backend and (gap of the) layout, got"
                f" {', '.join(str(theirs['kind']) for theirs in every)} by rank"
            )
        self._dead = merged_counts(theirs["dead"] for theirs in every)
        holders = [rank for rank, theirs in enumerate(every) if theirs["counts"]]
        if not holders:
            return
        if dist.get_rank(group) == holders[0]:
            self._flush()
        reference = torch.zeros(self.num_samples, dtype=self.dtype, device=self.device)
        if self._reference is not None:
            reference.copy_(self._reference)
        dist.broadcast(reference, holders[0] if group is None else dist.get_global_rank(group, holders[0]), group=group)
        if self._reference is None:
            self._reference = reference
        self._flush()
        self._recenter(reference)
        dist.all_reduce(self._second_moment().data, group=group)
        self._counts = merged_counts(theirs["counts"] for theirs in every)
        nothing = torch.zeros(self.num_samples, dtype=torch.float64, device=self.device)
        sums = torch.stack([self._sums.get(one, nothing) for one in self._counts])
        dist.all_reduce(sums, group=group)
        self._sums = dict(zip(self._counts, sums, strict=True))

    # --- what is known ---------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Draws that count, over all chains."""
        return sum(self._counts.values())

    @property
    def chain_counts(self) -> dict[int, int]:
        """Draws that count, by chain."""
        return dict(self._counts)

    @property
    def chain_means(self) -> dict[int, Tensor]:
        """(m,) float64 mean losses, by chain."""
        return {one: total / self._counts[one] for one, total in self._sums.items()}

    @property
    def dead(self) -> dict[int, int]:
        """Draws that were quarantined, by chain; chains without any are not listed."""
        return dict(self._dead)

    @property
    def reference(self) -> Tensor | None:
        """(m,) vector about which second moments are taken; None before the first buffer is full."""
        return self._reference

    def mean(self) -> Tensor:
        """(m,) float64, over all draws.

        Raises:
            ValueError: there are none.
        """
        self._needs(1)
        return total_of(self._sums) / self.count

    @torch.no_grad()
    def variance(self, within_chain: bool = False) -> Tensor:
        """(m,) float64 variances, as on the diagonal of :meth:`compute`, without an m x m matrix.

        Raises:
            ValueError: fewer than two draws (within_chain: no chain with two).
        """
        return self._moments(within_chain).variance

    @torch.no_grad()
    def compute(self, within_chain: bool = False, *, out: Tensor | None = None) -> CovarianceResult:
        """Mean and covariance so far; can be called again, and followed by more updates.

        Args:
            within_chain: deviations from each chain's own mean: S_w = S - sum_c n_c mean_c mean_cᵀ over sum_c (n_c - 1)
                instead of deviations from the mean of all draws over n - 1.
            out: (m, m) tensor for the covariance, of the accumulator's dtype and device; None allocates it.

        Raises:
            ValueError: fewer than two draws (within_chain: no chain with two), or ``out`` does not fit.

        Warns:
            RuntimeWarning: means have moved more than 4 spreads from the reference: S then holds mostly the square of
            that distance, and correlations lose about 1e-7 (distance/spread)².
        """
        moments = self._moments(within_chain)
        covariance = self._fill(out, moments, None)
        covariance.diagonal().copy_(moments.variance)
        return CovarianceResult(self.mean(), covariance, self.count)

    @torch.no_grad()
    def correlation(self, within_chain: bool = False, *, out: Tensor | None = None) -> Tensor:
        """(m, m) correlations in [-1, 1], without the covariance beside them. Arguments and errors as :meth:`compute`.

        1 on the diagonal. Where a variance is 0 its row and column are 0, the diagonal too. What the sums do not resolve
        counts as 0: a variance below 2^-20 (float64: 2^-49) of the second moment about the reference, a spread below
        2^-40 of the mean.
        """
        moments = self._moments(within_chain)
        scale = inverse_sd(moments.variance).to(self.dtype)
        rho = self._fill(out, moments, scale)
        rho.diagonal().copy_(scale > 0)
        return rho

    # --- state -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """A copy of everything, the buffer included: tensors, numbers and strings that ``torch.save`` stores.

        The triangle is in LAPACK's packed format whatever the backend; an accumulator that loads it goes on bitwise.
        """
        return {
            "num_samples": self.num_samples,
            "dtype": str(self.dtype),
            "buffer_size": self.buffer_size,
            "reference": None if self._reference is None else self._reference.clone(),
            "second_moment": None if self._triangle is None else self._triangle.with_gap(PACKED).data.clone(),
            "buffer": self._waiting().clone(),
            "counts": dict(self._counts),
            "sums": {one: total.clone() for one, total in self._sums.items()},
            "dead": dict(self._dead),
        }

    @outside_autograd
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by one that :meth:`state_dict` gave, on whatever device or backend that was.

        Raises:
            ValueError: it is of another num_samples, dtype or buffer_size.
        """
        mine = {"num_samples": self.num_samples, "dtype": str(self.dtype), "buffer_size": self.buffer_size}
        differing = [
            f"{name} {state.get(name)} (here {value})" for name, value in mine.items() if state.get(name) != value
        ]
        if differing:
            raise ValueError(f"state is of another accumulator: {', '.join(differing)}; make one like it")
        self.reset()
        if state["reference"] is not None:
            self._reference = state["reference"].to(self.device, copy=True)
        if state["second_moment"] is not None:
            packed = Triangle(self.num_samples, gap=PACKED, dtype=self.dtype, device=self.device)
            packed.data.copy_(state["second_moment"])
            self._triangle = packed.with_gap(self._gap)
        self._counts, self._dead = dict(state["counts"]), dict(state["dead"])
        self._sums = {one: total.to(self.device, copy=True) for one, total in state["sums"].items()}
        self._append(state["buffer"].to(self.device))

    # --- how -------------------------------------------------------------------------------------------------------------

    def _second_moment(self) -> Triangle:
        if self._triangle is None:
            self._triangle = Triangle(self.num_samples, gap=self._gap, dtype=self.dtype, device=self.device)
        return self._triangle

    def _count(self, chain: int, count: int, total: Tensor) -> None:
        """Add draws of one chain to its count and its sum."""
        self._counts[chain] = self._counts.get(chain, 0) + count
        if chain in self._sums:
            self._sums[chain] += total
        else:
            self._sums[chain] = total.clone()

    def _append(self, rows: Tensor) -> None:
        """Into the buffer; what fills it goes on to the triangle."""
        while len(rows):
            if self._pending == 0 and len(rows) >= self.buffer_size:
                self._absorb(rows[: self.buffer_size])
                rows = rows[self.buffer_size :]
                continue
            buffer = self._room_for(rows.dtype)
            taken = rows[: self.buffer_size - self._pending]
            buffer[self._pending : self._pending + len(taken), : self.num_samples] = taken
            self._pending += len(taken)
            rows = rows[len(taken) :]
            if self._pending == self.buffer_size:
                self._flush()

    def _room_for(self, dtype: torch.dtype) -> Tensor:
        """The buffer, wide enough for draws of ``dtype``."""
        dtype = torch.promote_types(self.dtype, dtype)
        if self._buffer is None:
            width = padded(self.num_samples, self._gap)
            self._buffer = torch.zeros(self.buffer_size, width, dtype=dtype, device=self.device)
        self._buffer = self._buffer.to(torch.promote_types(self._buffer.dtype, dtype))
        return self._buffer

    def _waiting(self) -> Tensor:
        """(k, m), a view: the draws in the buffer."""
        if self._buffer is None:
            return torch.empty(0, self.num_samples, dtype=self.dtype, device=self.device)
        return self._buffer[: self._pending, : self.num_samples]

    @outside_autograd
    def _flush(self) -> None:
        """Empty the buffer into the triangle."""
        waiting, self._pending = self._waiting(), 0
        if len(waiting):
            self._absorb(waiting)

    def _absorb(self, draws: Tensor) -> None:
        """One rank-k update; the first sets the reference. What lies in the buffer may be overwritten."""
        if self._reference is None:
            self._reference = mean_of(draws).to(self.dtype)
        scratch = self._room_for(self.dtype) if self.backend == "torch" else None
        rank_k(self._second_moment(), draws, self._reference, scratch, self.precision)

    def _recenter(self, reference: Tensor) -> None:
        """Take second moments about another reference; the buffer is empty."""
        if self._reference is not None and not torch.equal(self._reference, reference) and self._triangle is not None:
            old, self._triangle = self._triangle, None
            self._second_moment().add_(old, *recentering(*self._flushed(), self._reference, reference))
        self._reference = reference

    def _flushed(self) -> tuple[int, Tensor]:
        """Count and (m,) sum of the draws that the triangle holds."""
        return self.count - self._pending, total_of(self._sums) - sum_of(self._waiting())

    def _moments(self, within_chain: bool) -> Moments:
        """What turns the triangle into a covariance."""
        validate.flag("within_chain", within_chain)
        self._needs(2)
        if within_chain and self.count <= len(self._counts):
            raise ValueError(f"within_chain needs a chain with two draws, got {self.count} draws of as many chains")
        self._flush()
        self._buffer = None  # its memory is free for the result
        return moments_of(
            self._second_moment().diagonal(), cast(Tensor, self._reference), self._counts, self._sums, within_chain
        )

    def _fill(self, out: Tensor | None, moments: Moments, scale: Tensor | None) -> Tensor:
        """The covariance, or with ``scale`` (1/sd) the correlation, in ``out``."""
        m = self.num_samples
        moments.warn_of_drift()
        if out is None:
            out = torch.empty(m, m, dtype=self.dtype, device=self.device)
        elif out.shape != (m, m) or out.dtype != self.dtype or out.device != self.device:
            raise ValueError(
                f"out must be ({m}, {m}), {self.dtype}, on {self.device}, got {validate.describe(out)};"
                " leave it out to have it allocated"
            )
        centers = moments.centers.to(self.dtype)  # their rounding is to S what that of S itself is
        self._second_moment().unfold(out, -centers, centers, 1.0 / moments.divisor, scale)
        return out

    # --- checks ----------------------------------------------------------------------------------------------------------

    def _needs(self, draws: int) -> None:
        if self.count < draws:
            dead = f" and {sum(self._dead.values())} dead ones" if self._dead else ""
            raise ValueError(f"at least {draws} draws are needed, there are {self.count}{dead}; update() first")
