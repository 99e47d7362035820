"""The two forms in which a kernel is held, behind one protocol: m x m sums, or the traces whose product they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.precision import exact_products
from harmonic_triton.losskernel import estimators
from harmonic_triton.losskernel.accumulator import Accumulator
from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance
from harmonic_triton.losskernel.traces.traces import LossTraces

DENSE_BYTES = 2**32  # largest m x m that a kernel of traces forms when asked for it
SUBSET = 2000  # samples that stand for all where pairs are averaged in a kernel of traces


class View(Protocol):
    """What a kernel is read through. K is the covariance of m losses, ρ their correlation."""

    keeps: str  # "covariance" or "traces", as ``loss_kernel`` calls it

    @property
    def traces(self) -> LossTraces | None:
        """The factor form, where it is what is kept."""

    @property
    def covariance(self) -> Tensor:
        """(m, m) fp32 K. ValueError where it is not kept and would take more than 4 GiB."""

    @property
    def correlation(self) -> Tensor:
        """(m, m) fp32 ρ. Raises as ``covariance``."""

    @property
    def variance(self) -> Tensor:
        """(m,) fp64, the diagonal of K."""

    def mean(self) -> Tensor:
        """(m,) fp64 mean losses."""

    def block(self, rows: Tensor, columns: Tensor | None, correlation: bool) -> Tensor:
        """(r, c) fp32 entries of ρ or K; None is all columns."""

    def product(self, vector: Tensor) -> Tensor:
        """ρ times an (m,) vector, fp64."""

    def neighbors(self, k: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k nearest other samples of each, and their distances; pairs of one label are none."""

    def representatives(self) -> Tensor:
        """Samples whose pairs stand for all pairs: all of them where m x m is at hand."""

    def state(self) -> dict[str, Any]:
        """What :func:`restored` makes the accumulator from again, the draws of traces included."""


class DenseView:
    """A kernel held as sums of products."""

    keeps = "covariance"
    traces = None

    def __init__(self, sums: StreamingCovariance, within_chain: bool) -> None:
        self.sums, self.within_chain = sums, within_chain

    @cached_property
    def covariance(self) -> Tensor:
        return self.sums.compute(self.within_chain).covariance

    @cached_property
    def correlation(self) -> Tensor:
        return self.sums.correlation(self.within_chain)

    @cached_property
    def variance(self) -> Tensor:
        return self.sums.variance(self.within_chain)

    @cached_property
    def _inverse_deviation(self) -> Tensor:
        deviation = self.variance.clamp_min(0.0).sqrt()
        return torch.where(deviation > 0, 1 / deviation, 0.0)

    def mean(self) -> Tensor:
        return self.sums.mean()

    def block(self, rows: Tensor, columns: Tensor | None, correlation: bool) -> Tensor:
        part = self.covariance[rows] if columns is None else self.covariance[rows][:, columns]
        if not correlation:
            return part
        scale = self._inverse_deviation.to(part.dtype)
        return (part * scale[rows, None] * (scale if columns is None else scale[columns])).clamp_(-1.0, 1.0)

    def product(self, vector: Tensor) -> Tensor:
        scale = self._inverse_deviation
        scaled = vector.to(scale.device, torch.float64) * scale
        with exact_products(scale.device):
            return (self.covariance @ scaled.to(self.covariance.dtype)).double() * scale

    def neighbors(self, k: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        everyone = torch.arange(self.sums.num_samples, device=self.covariance.device)
        indices, distances = [], []
        for rows in estimators.blocks(self.sums.num_samples):
            rho = self.block(everyone[rows], None, True)
            forbidden = everyone[rows, None] == everyone
            if labels is not None:
                forbidden |= labels.to(rho.device)[rows, None] == labels.to(rho.device)
            best, which = rho.masked_fill_(forbidden, -math.inf).topk(k)
            indices.append(which.masked_fill_(best == -math.inf, -1))
            distances.append(estimators.correlation_distance(best))
        return torch.cat(indices), torch.cat(distances)

    def representatives(self) -> Tensor:
        return torch.arange(self.sums.num_samples)

    def state(self) -> dict[str, Any]:
        return self.sums.state_dict()


class TraceView:
    """A kernel held as the draws themselves."""

    keeps = "traces"

    def __init__(self, traces: LossTraces) -> None:
        self.traces = traces

    @cached_property
    def covariance(self) -> Tensor:
        self._refuse_dense()
        return self.traces.covariance(slice(None))

    @cached_property
    def correlation(self) -> Tensor:
        self._refuse_dense()
        return self.traces.correlation(slice(None))

    @cached_property
    def variance(self) -> Tensor:
        return self.traces.variance()

    def _refuse_dense(self) -> None:
        size = 4 * self.traces.num_samples**2
        if size > DENSE_BYTES:
            raise ValueError(
                f"m x m for m = {self.traces.num_samples:,} samples would take {size / 2**30:.0f} GiB; this kernel keeps"
                " traces: take block(rows, columns), neighbors(k) or product(vector)"
            )

    def mean(self) -> Tensor:
        return self.traces.mean()

    def block(self, rows: Tensor, columns: Tensor | None, correlation: bool) -> Tensor:
        read = self.traces.correlation if correlation else self.traces.covariance
        return read(rows, slice(None) if columns is None else columns)

    def product(self, vector: Tensor) -> Tensor:
        return self.traces.matvec(vector.double(), correlation=True)

    def neighbors(self, k: int, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.traces.neighbors(k, exclude_same=labels)

    def representatives(self) -> Tensor:
        some = torch.randperm(self.traces.num_samples, generator=torch.Generator().manual_seed(0))
        return some[:SUBSET].sort().values

    def state(self) -> dict[str, Any]:
        state = self.traces.state_dict()
        if state["draws"] is None:
            parts = [slice(start, start + 64) for start in range(0, self.traces.count, 64)]
            state["draws"] = torch.cat([self.traces.draws(part).to(self.traces.dtype) for part in parts])
        return state


def view(accumulator: Accumulator, within_chain: bool) -> View:
    """The view of an accumulator: the one place where the two forms are told apart.

    Raises:
        TypeError: it is none. ValueError: the within-chain estimate of traces.
    """
    if isinstance(accumulator, StreamingCovariance):
        return DenseView(accumulator, within_chain)
    if not isinstance(accumulator, LossTraces):
        raise TypeError(
            f"accumulator must be a StreamingCovariance or LossTraces, got {validate.describe(accumulator)}"
        )
    if within_chain:
        raise ValueError("within_chain=True needs keep='covariance'; traces give the pooled estimate")
    return TraceView(accumulator)


def restored(state: dict[str, Any], device: torch.device | str) -> Accumulator:
    """The accumulator of a view's state."""
    kind: type[StreamingCovariance] | type[LossTraces] = LossTraces if "draws" in state else StreamingCovariance
    dtype = getattr(torch, state["dtype"].removeprefix("torch."))
    more = {"buffer_size": state["buffer_size"]} if "buffer_size" in state else {}
    accumulator = kind(state["num_samples"], device=device, dtype=dtype, **more)
    accumulator.load_state_dict(state)
    return accumulator


def alignment(first: View, second: View) -> float:
    """Centred alignment of the correlations of two views of the same samples; without m x m where both keep traces."""
    if first.traces is None or second.traces is None:
        return estimators.cka(first.correlation, second.correlation)
    step = max(1, estimators.BLOCK // max(first.traces.count, second.traces.count))
    chunks = (standardized_chunks(traces, step) for traces in (first.traces, second.traces))
    return estimators.cka_of_chunks(zip(*chunks, strict=True))


def standardized_chunks(traces: LossTraces, step: int) -> Iterator[Tensor]:
    """(T, step) standardised traces of a few samples after the other."""
    for start in range(0, traces.num_samples, step):
        yield estimators.standardized(traces.draws(samples=slice(start, start + step)))


class Neighborhood(NamedTuple):
    """A sample and its most correlated ones."""

    sample: int
    name: str
    neighbors: list[tuple[int, str, float]]  # (sample, name, ρ), nearest first


def neighborhoods(
    view: View, samples: Sequence[int] | Tensor, size: int, k: int, labels: Tensor | None, names: Sequence[str] | None
) -> list[Neighborhood]:
    """The k most correlated samples of some (r,) of the ``size`` there are, pairs of one label left out.

    Raises:
        ValueError: there is no such sample.
    """
    rows = torch.as_tensor(samples, dtype=torch.int64).cpu()
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < size:
        raise ValueError(
            f"samples must lie between 0 and m - 1 = {size - 1}, got {int(rows.min())} ... {int(rows.max())}"
        )
    rho = view.block(rows, None, True).clone()
    rho[torch.arange(len(rows)), rows] = -math.inf
    if labels is not None:
        rho[labels[rows, None] == labels] = -math.inf
    best, which = rho.topk(min(k, rho.shape[1] - 1))
    name = str if names is None else names.__getitem__
    table = []
    for row, columns, correlations in zip(rows.tolist(), which.tolist(), best.tolist(), strict=True):
        pairs = zip(columns, correlations, strict=True)
        table.append(Neighborhood(row, name(row), [(j, name(j), r) for j, r in pairs if r > -math.inf]))
    return table
