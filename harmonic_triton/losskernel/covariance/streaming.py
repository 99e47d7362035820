"""Covariance of per-sample losses over draws, accumulated as they come or in one differentiable call.

The loss kernel of m samples is the covariance of their losses over the draws of a sampler,
K_ij = 1/(T - 1) sum_t (l_ti - mean_i)(l_tj - mean_j), pooled over chains. Losses near 2 with a spread of 0.0005 leave
nothing of E[xy] - E[x] E[y] in fp32, so what is summed is the second moment S about a constant reference vector, and the
plain sums in fp64: K = (S - n d dᵀ)/(n - 1) with d = mean - reference. S about one reference is additive: chains,
devices and machines merge by addition.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.dispatch import resolve
from harmonic_triton._common.precision import no_autocast
from harmonic_triton._common.transforms import forward_mode
from harmonic_triton.losskernel.covariance.triangle import PACKED, Triangle, fastest_gap, padded

BUFFER = 512  # draws in one rank-k update: enough to be bound by arithmetic on every device, 2 kB a sample
DRIFT = 4.0  # spreads between mean and reference beyond which a warning is due
LARGEST = 2.0**52  # norm of a draw: the sum of a million squares of it stays within fp32
CONSTANT = 2.0**-40  # spread over mean below which a loss counts as constant: float64 sums resolve no more
_P = ParamSpec("_P")
_T = TypeVar("_T")
PRECISIONS = ("split", "fast", "ieee")


def _normal(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Without gradients, but no inference tensors either: state that is made in inference_mode is changed outside."""
    return torch.inference_mode(False)(torch.no_grad()(method))


@dataclass(frozen=True)
class CovarianceResult:
    """Mean and covariance of m losses over ``count`` draws."""

    mean: Tensor  # (m,) float64
    covariance: Tensor  # (m, m) in the accumulator's dtype, symmetric
    count: int

    def correlation(self) -> Tensor:
        """(m, m), a new tensor: K_ij/sqrt(K_ii K_jj) in [-1, 1]; 0 where either variance is 0, on the diagonal too."""
        inverse_sd = _inverse_sd(self.covariance.diagonal().double()).to(self.covariance.dtype)
        out = self.covariance * inverse_sd[:, None]
        out.mul_(inverse_sd).clamp_(-1.0, 1.0).diagonal().copy_(inverse_sd > 0)
        return out


class StreamingCovariance:
    """Mean and covariance of the losses of ``num_samples`` samples over draws that are seen once.

    Draws are collected in a buffer; a full buffer is added to one triangle of the second moment about the reference by
    a rank-k update (CPU: LAPACK's packed ``sfrk`` where SciPy is installed, else products of panels by PyTorch; GPU:
    Triton). The reference is the mean of the first full buffer, unless given, and stays what it is. Memory: m²/2
    numbers for the triangle and ``buffer_size`` m for the buffer, which is given back when a result, m² more, is read.

    A draw with a loss that is not finite is dead (and one of norm 2^52 or more, whose squares would end fp32): it is
    counted in :attr:`dead` under its chain and goes no further. Draws without a chain belong to chain 0.

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
        self.backend = _resolve(backend, self.device, dtype)
        self._gap = _gap(self.backend, self.device)
        if reference is not None:
            self._check_vector(reference)
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

    @_normal
    def update(self, losses: Tensor, chain: int | Sequence[int] | Tensor | None = None) -> None:
        """Add draws.

        Args:
            losses: (m,) one draw or (k, m) k draws, floating, on the accumulator's device.
            chain: the chain that drew them, or k chains; None is chain 0.

        Raises:
            TypeError, ValueError: losses or chain have the wrong type, shape or device.
        """
        rows, chains = self._checked_draws(losses, chain)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        alive = norms < LARGEST  # false for NaN
        if not bool(alive.all()):
            living = alive.tolist()
            for lives, one in zip(living, chains, strict=True):
                if not lives:
                    self._dead[one] = self._dead.get(one, 0) + 1
            rows, chains = rows[alive], [one for lives, one in zip(living, chains, strict=True) if lives]
        for one in dict.fromkeys(chains):
            which = [row for row, owner in enumerate(chains) if owner == one]
            self._count(one, len(which), _sum(rows if len(which) == len(rows) else rows[which]))
        self._append(rows)

    @_normal
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
                self._second_moment().add_(triangle, *_shifted(*other._flushed(), reference, self._reference))
        for one, count in other._counts.items():
            self._count(one, count, other._sums[one].to(self.device))
        for one, count in other._dead.items():
            self._dead[one] = self._dead.get(one, 0) + count
        self._append(other._waiting().to(self.device))

    @_normal
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
        self._dead = _total(theirs["dead"] for theirs in every)
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
        self._recentre(reference)
        dist.all_reduce(self._second_moment().data, group=group)
        self._counts = _total(theirs["counts"] for theirs in every)
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
        return _total_of(self._sums) / self.count

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
        inverse_sd = _inverse_sd(moments.variance).to(self.dtype)
        rho = self._fill(out, moments, inverse_sd)
        rho.diagonal().copy_(inverse_sd > 0)
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

    @_normal
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

    @_normal
    def _flush(self) -> None:
        """Empty the buffer into the triangle."""
        waiting, self._pending = self._waiting(), 0
        if len(waiting):
            self._absorb(waiting)

    def _absorb(self, draws: Tensor) -> None:
        """One rank-k update; the first sets the reference. What lies in the buffer may be overwritten."""
        if self._reference is None:
            self._reference = _mean(draws).to(self.dtype)
        scratch = self._room_for(self.dtype) if self.backend == "torch" else None
        _rank_k(self._second_moment(), draws, self._reference, scratch, self.precision)

    def _recentre(self, reference: Tensor) -> None:
        """Take second moments about another reference; the buffer is empty."""
        if self._reference is not None and not torch.equal(self._reference, reference) and self._triangle is not None:
            old, self._triangle = self._triangle, None
            self._second_moment().add_(old, *_shifted(*self._flushed(), self._reference, reference))
        self._reference = reference

    def _flushed(self) -> tuple[int, Tensor]:
        """Count and (m,) sum of the draws that the triangle holds."""
        return self.count - self._pending, _total_of(self._sums) - _sum(self._waiting())

    def _moments(self, within_chain: bool) -> _Moments:
        """What turns the triangle into a covariance."""
        validate.flag("within_chain", within_chain)
        self._needs(2)
        divisor = self.count - (len(self._counts) if within_chain else 1)
        if divisor < 1:
            raise ValueError(f"within_chain needs a chain with two draws, got {self.count} draws of as many chains")
        self._flush()
        self._buffer = None  # its memory is free for the result
        reference = cast(Tensor, self._reference).double()  # set, now that draws have left the buffer
        if within_chain:
            centres = torch.stack([(self._sums[c] - n * reference) / math.sqrt(n) for c, n in self._counts.items()])
        else:
            centres = ((_total_of(self._sums) - self.count * reference) / math.sqrt(self.count))[None]
        second = self._second_moment().diagonal().double() / divisor
        variance = second - centres.square().sum(0) / divisor
        least = (8 * torch.finfo(self.dtype).eps * second).maximum((CONSTANT * self.mean()).square())
        variance = torch.where(variance <= least, 0.0, variance)
        visible = second > (torch.finfo(torch.float32).eps * reference).square()
        off = torch.where(visible, (second / variance - 1.0).clamp_min(0.0).sqrt(), 0.0)
        return _Moments(centres, variance, divisor, off)

    def _fill(self, out: Tensor | None, moments: _Moments, inverse_sd: Tensor | None) -> Tensor:
        """The covariance, or with ``inverse_sd`` the correlation, in ``out``."""
        m = self.num_samples
        moments.warn_of_drift()
        if out is None:
            out = torch.empty(m, m, dtype=self.dtype, device=self.device)
        elif out.shape != (m, m) or out.dtype != self.dtype or out.device != self.device:
            raise ValueError(
                f"out must be ({m}, {m}), {self.dtype}, on {self.device}, got {validate.describe(out)};"
                " leave it out to have it allocated"
            )
        centres = moments.centres.to(self.dtype)  # their rounding is to S what that of S itself is
        self._second_moment().unfold(out, -centres, centres, 1.0 / moments.divisor, inverse_sd)
        return out

    # --- checks ----------------------------------------------------------------------------------------------------------

    def _needs(self, draws: int) -> None:
        if self.count < draws:
            dead = f" and {sum(self._dead.values())} dead ones" if self._dead else ""
            raise ValueError(f"at least {draws} draws are needed, there are {self.count}{dead}; update() first")

    def _check_vector(self, reference: Any) -> None:
        validate.tensors(reference=reference)
        if reference.shape != (self.num_samples,) or not reference.is_floating_point():
            raise ValueError(
                f"reference must be floating and of shape ({self.num_samples},), got {validate.describe(reference)}"
            )
        if reference.device != self.device:
            raise ValueError(
                f"reference is on {reference.device} and the accumulator on {self.device}; move one of them"
            )
        if not bool((reference.abs() < LARGEST).all()):
            raise ValueError("reference must be finite and below 2^52 everywhere")

    def _checked_draws(self, losses: Any, chain: Any) -> tuple[Tensor, list[int]]:
        """(k, m) draws without gradient and their k chains."""
        validate.tensors(losses=losses)
        if losses.dtype not in validate.FLOAT_DTYPES:
            raise TypeError(f"losses must be floating, got {validate.describe(losses)}; cast them first")
        if losses.dim() not in (1, 2) or losses.shape[-1] != self.num_samples:
            raise ValueError(
                f"losses must be ({self.num_samples},) or (k, {self.num_samples}) for the {self.num_samples} samples of this"
                f" accumulator, got {validate.describe(losses)}"
            )
        if losses.device != self.device:
            raise ValueError(f"losses are on {losses.device} and the accumulator on {self.device}; move one of them")
        rows = losses.detach().reshape(-1, self.num_samples)
        if isinstance(chain, Tensor):
            if chain.is_floating_point() or chain.is_complex() or chain.dtype == torch.bool or chain.dim() > 1:
                raise TypeError(f"chain must hold integers, one for each draw, got {validate.describe(chain)}")
            chain = chain.tolist()
        if chain is None or not isinstance(chain, Sequence):
            chain = [0 if chain is None else chain] * len(rows)
        for one in chain:
            if isinstance(one, bool) or not isinstance(one, numbers.Integral):
                raise TypeError(f"chain must be an int or one int for each draw, got {validate.describe(one)}")
        if len(chain) != len(rows):
            raise ValueError(f"chain names {len(chain)} chains for {len(rows)} draws; give one, or one for each draw")
        return rows, [int(one) for one in chain]


@dataclass(frozen=True)
class _Moments:
    """K = (triangle - centresᵀ centres) / divisor."""

    centres: Tensor  # (1, m), or (chains, m) for the within-chain estimate, float64: sqrt(n) (mean - reference)
    variance: Tensor  # (m,) float64
    divisor: int
    off: Tensor  # (m,) float64: spreads between the means and the reference

    def warn_of_drift(self) -> None:
        far = self.off > DRIFT
        if bool(far.any()):
            worst = int(self.off.argmax())
            warnings.warn(
                f"the mean losses of {int(far.sum())} of {len(far)} samples lie more than {DRIFT:g} spreads from the"
                f" reference (sample {worst}: {float(self.off[worst]):.3g}): correlations lose about 1e-7"
                " (distance/spread)^2. Lengthen the burn-in, or start anew with reference=mean()",
                RuntimeWarning,
                stacklevel=4,
            )


def loss_covariance(losses: Tensor, *, correlation: bool = False, backend: str = "auto") -> Tensor:
    """Covariance of m losses over T draws, (m, m), differentiable: for training against a kernel.

    The gradient of the covariance for upstream G is (G + Gᵀ)(l - mean)/(T - 1), exact, as is the correlation's. Runs the
    rank-k update of :class:`StreamingCovariance` about the mean; works under ``torch.func``, ``vmap`` and
    ``torch.compile``, and can be differentiated again. Matrix products of the backward pass follow torch's own
    precision settings.

    Args:
        losses: (T, m) with T >= 2, floating. bfloat16 and float16 are computed in float32.
        correlation: K_ij/sqrt(K_ii K_jj) instead: 1 on the diagonal. A sample whose variance is 0 has 0 in its row and
            column, the diagonal too, and gets no gradient.
        backend: "auto", "triton" or "torch" (float64: torch). Only "auto" falls back.

    Returns:
        (m, m) float32 (float64 for float64 losses), symmetric.

    Raises:
        TypeError, ValueError: an argument is wrong, or a backend asked for by name cannot serve.
    """
    validate.tensors(losses=losses)
    if losses.dtype not in validate.FLOAT_DTYPES:
        raise TypeError(f"losses must be floating, got {validate.describe(losses)}; cast them first")
    if losses.dim() != 2 or losses.shape[0] < 2 or losses.shape[1] < 1:
        raise ValueError(f"losses must be (T, m) with T >= 2 draws of m >= 1 samples, got {validate.describe(losses)}")
    validate.flag("correlation", correlation)
    rows = losses.to(torch.promote_types(losses.dtype, torch.float32))
    backend = _resolve(backend, rows.device, rows.dtype)
    covariance = _plain_covariance(rows) if forward_mode() else _LossCovariance.apply(rows, backend)
    if not correlation:
        return covariance
    variance = covariance.diagonal()
    constant = variance <= 0
    inverse_sd = torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())
    rho = covariance * inverse_sd[:, None] * inverse_sd
    return torch.diagonal_scatter(rho, torch.where(constant, 0.0, 1.0).to(rho.dtype))


def _plain_covariance(losses: Tensor) -> Tensor:
    """The same of torch's own operations, in fp64: for forward mode, which the operator does not know."""
    mean = losses.double().mean(0)
    centred = losses.double() - mean
    noise = (len(losses) - 1) * (CONSTANT * mean).square()
    centred = centred - torch.where(centred.square().sum(0) <= noise, centred, 0.0).detach()  # a constant sample's: 0
    return (centred.T @ centred / (len(losses) - 1)).to(losses.dtype)


_LIBRARY = torch.library.Library("harmonic_triton", "FRAGMENT")
_LIBRARY.define("loss_covariance(Tensor losses, str backend) -> Tensor")


def _loss_covariance(losses: Tensor, backend: str) -> Tensor:
    """The operator: (T, m) fp32 or fp64 -> (m, m)."""
    draws, m = losses.shape
    with torch.no_grad():
        losses = losses.detach().contiguous()
        total = _sum(losses)
        shift = (total / draws).to(losses.dtype)
        triangle = Triangle(m, gap=_gap(backend, losses.device), dtype=losses.dtype, device=losses.device)
        scratch = losses.new_zeros(min(draws, BUFFER), triangle.width) if backend == "torch" else None
        for rows in losses.split(BUFFER):
            _rank_k(triangle, rows, shift, scratch, "split")
        centre = ((total - draws * shift.double()) / math.sqrt(draws)).to(losses.dtype)[None]
        out = losses.new_empty(m, m)
        triangle.unfold(out, -centre, centre, 1.0 / (draws - 1), None)
        variance = out.diagonal()
        variance[variance <= (CONSTANT * shift).square()] = 0.0
        return out


_LIBRARY.impl("loss_covariance", _loss_covariance, "CompositeExplicitAutograd")
torch.library.register_fake(
    "harmonic_triton::loss_covariance",
    lambda losses, backend: losses.new_empty(losses.shape[1], losses.shape[1]),
    lib=_LIBRARY,
)


class _LossCovariance(torch.autograd.Function):
    """loss_covariance's operator and its gradient, which is made of differentiable operations."""

    @staticmethod
    def forward(losses: Tensor, backend: str) -> Tensor:
        return torch.ops.harmonic_triton.loss_covariance(losses, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (losses,) = ctx.saved_tensors
        centred = losses - losses.mean(0)
        centred = centred - centred.mean(0)  # what rounding left of a mean much larger than the spread
        with no_autocast(losses.device):
            return centred @ (upstream + upstream.T) / (len(losses) - 1), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], losses: Tensor, backend: str) -> tuple[Tensor, int]:
        return torch.stack([_LossCovariance.apply(one, backend) for one in losses.unbind(in_dims[0])]), 0


def _resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "reference":
        raise ValueError("backend is 'reference'; it must be one of 'auto', 'triton', 'torch'")
    return resolve(backend, device, dtype)


def _gap(backend: str, device: torch.device) -> int:
    if backend == "torch":
        return fastest_gap(device)
    from harmonic_triton.losskernel.covariance.rank_k_triton import GAP

    return GAP


def _rank_k(triangle: Triangle, draws: Tensor, shift: Tensor, scratch: Tensor | None, precision: str) -> None:
    """triangle += (draws - shift)ᵀ (draws - shift) for draws (k, m).

    ``scratch`` (>= k, width), zero beyond m, is for the torch backend and may be where the draws lie; None is Triton.
    """
    if scratch is None:
        from harmonic_triton.losskernel.covariance.rank_k_triton import rank_k_

        rank_k_(triangle, draws, shift, precision)
        return
    if scratch.dtype != triangle.data.dtype:  # a buffer of float64 draws
        scratch = scratch.new_zeros(len(draws), triangle.width, dtype=triangle.data.dtype)
    rows = scratch[: len(draws)]
    torch.sub(draws, shift, out=rows[:, : triangle.num_samples])
    triangle.rank_k_(rows)


def _shifted(count: int, total: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """u, v with S about ``new`` = S about ``old`` + u vᵀ + v uᵀ, for ``count`` draws that add up to ``total``."""
    apart = old.double() - new.double()
    return total.to(apart.device) - count * old.double() + 0.5 * count * apart, apart


def _sum(rows: Tensor) -> Tensor:
    """(m,) float64 sum of (k, m), a few rows at a time: they are widened first."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(16):
        total += part.sum(0, dtype=torch.float64)
    return total


def _mean(rows: Tensor) -> Tensor:
    """(m,) float64 mean of (k, m)."""
    return _sum(rows) / len(rows)


def _total_of(sums: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(sums.values())).sum(0)


def _total(counts: Any) -> dict[int, int]:
    """Counts by chain, added up."""
    total: dict[int, int] = {}
    for some in counts:
        for one, count in some.items():
            total[one] = total.get(one, 0) + count
    return dict(sorted(total.items()))


def _inverse_sd(variance: Tensor) -> Tensor:
    """1/sqrt(variance), 0 where that is 0."""
    return torch.where(variance > 0, variance.rsqrt(), 0.0)
