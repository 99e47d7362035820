"""The loss kernel of a trained model: :func:`loss_kernel` runs it, :class:`LossKernel` holds it.

K_ij = Cov(ℓ_i, ℓ_j) over weights sampled around w* (Adam, Furman and Hoogland, *The Loss Kernel*, section 2.3; "paper"
below). m samples, C chains, T draws a chain.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import ConcatDataset, Dataset

from harmonic_triton import _checkpoint, _validate, estimators, kernel_record
from harmonic_triton._progress import Progress
from harmonic_triton.covariance import LARGEST, StreamingCovariance
from harmonic_triton.estimators import PrincipalComponents, needs, sample_labels
from harmonic_triton.kernel_record import ChainRecord, Diagnostics
from harmonic_triton.sgld import Draws, Sampler, SGLDConfig
from harmonic_triton.traces import LossTraces

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

FORMAT = 1
DENSE = 4096  # samples up to which the matrix is held whatever the number of draws
DENSE_BYTES = 2**32  # largest m x m that a kernel of traces forms when asked for it
SUBSET = 2000  # samples that stand for all where pairs are averaged in a kernel of traces


class About(NamedTuple):
    """Where a kernel comes from; NaN and empty where unknown."""

    nbeta: float = math.nan  # nβ of the probe
    step_size: float = math.nan  # ε
    stability_bound: float = math.nan  # of ε: 4/λmax(nβH + γ)
    num_train: int = 0  # n, 0 where unknown
    config: dict[str, Any] = {}
    fingerprint: dict[str, str] = {}


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


class LossKernel:
    """The covariance of per-sample losses under the probe, and what is read off it.

    Made by :func:`loss_kernel`, by :meth:`from_losses` or by :meth:`load`. It holds either the (m, m) second moment
    (``StreamingCovariance``) or the traces (``LossTraces``), from which blocks, products and neighbours come without
    m x m; everything but :attr:`covariance` and :attr:`correlation` works at any m with either.

    Args:
        accumulator: the sums or the traces of all draws that count.
        record: mean losses of every draw and a subset's traces, for the diagnostics.
        within_chain: estimate with each chain about its own mean, divisor Σ(n_c - 1), instead of pooled (paper,
            appendix B: pooled). :meth:`estimate` switches.
        labels: (m,) integers, for the same-label confound, plots and ``exclude_same=True``.
        queries: covariances with query samples, for :meth:`bif`.
        about: where the kernel comes from.
    """

    def __init__(
        self,
        accumulator: StreamingCovariance | LossTraces,
        record: ChainRecord,
        *,
        within_chain: bool = False,
        labels: Tensor | None = None,
        queries: QueryCovariance | None = None,
        about: About = About(),  # noqa: B008  # a constant
    ) -> None:
        if within_chain and isinstance(accumulator, LossTraces):
            raise ValueError("within_chain=True needs keep='covariance'; traces give the pooled estimate")
        self.accumulator, self.record, self.queries, self.about = accumulator, record, queries, about
        self.within_chain = within_chain
        self.num_samples = len(record.initial_losses)
        self.labels = None if labels is None else sample_labels("labels", labels, self.num_samples)

    @classmethod
    def from_losses(
        cls,
        losses: Tensor,
        *,
        initial_losses: Tensor | None = None,
        keep: str = "auto",
        within_chain: bool = False,
        labels: Tensor | None = None,
        about: About = About(),  # noqa: B008
        backend: str = "auto",
    ) -> LossKernel:
        """A kernel from losses that were drawn elsewhere.

        Args:
            losses: (C, T, m), or (T, m) of one chain. Chains that end non-finite are left out whole.
            initial_losses: (m,) losses at w*; without them there is no LLC and no excess loss.
            keep, within_chain, labels, backend: as in :func:`loss_kernel`.

        Raises:
            TypeError, ValueError: an argument is wrong, or no chain lives.
        """
        _validate.tensors(losses=losses)
        if losses.dim() not in (2, 3) or not losses.is_floating_point() or losses.numel() == 0:
            raise ValueError(f"losses must be floating, (C, T, m) or (T, m), got {_validate.describe(losses)}")
        losses = losses.detach() if losses.dim() == 3 else losses.detach()[None]
        chains, draws, samples = losses.shape
        if initial_losses is None:
            initial_losses = torch.full((samples,), math.nan)
        elif initial_losses.shape != (samples,):
            raise ValueError(f"initial_losses must be ({samples},), got {_validate.describe(initial_losses)}")
        collector = Collector(chains, draws, initial_losses, samples, keep, losses.device, backend, None)
        for chain in range(chains):
            number = torch.full((draws,), chain)
            collector.update(Draws(losses[chain], number, torch.arange(draws), losses.new_full((draws,), math.nan)))
        collector.check()
        return cls(collector.accumulator, collector.record, within_chain=within_chain, labels=labels, about=about)

    def estimate(self, within_chain: bool) -> LossKernel:
        """The same draws with the pooled or the within-chain estimate.

        Raises:
            ValueError: within-chain of a kernel that keeps traces.
        """
        return LossKernel(
            self.accumulator,
            self.record,
            within_chain=within_chain,
            labels=self.labels,
            queries=self.queries,
            about=self.about,
        )

    # --- the matrix ----------------------------------------------------------------------------------------------------

    @property
    def num_draws(self) -> int:
        """Draws in the kernel, of all chains."""
        return self.accumulator.count

    @property
    def num_chains(self) -> int:
        """Chains that were run, the dead included."""
        return self.record.num_chains

    @property
    def initial_losses(self) -> Tensor:
        """(m,) fp32 losses at w*; NaN where unknown."""
        return self.record.initial_losses

    @cached_property
    def mean(self) -> Tensor:
        """(m,) fp64 mean loss over the draws of all chains."""
        return self.accumulator.mean()

    @cached_property
    def covariance(self) -> Tensor:
        """(m, m) fp32 K (paper, Eq. 4).

        Raises:
            ValueError: the kernel keeps traces and m x m would take more than 4 GiB; take :meth:`block`.
        """
        if isinstance(self.accumulator, StreamingCovariance):
            return self.accumulator.compute(self.within_chain).covariance
        self._refuse_dense()
        return self.accumulator.covariance(slice(None))

    @cached_property
    def correlation(self) -> Tensor:
        """(m, m) fp32 ρ, 0 where a variance is 0 (paper, Eq. 5). Raises as :attr:`covariance`."""
        if isinstance(self.accumulator, StreamingCovariance):
            return self.accumulator.correlation(self.within_chain)
        self._refuse_dense()
        return self.accumulator.correlation(slice(None))

    def _refuse_dense(self) -> None:
        size = 4 * self.num_samples**2
        if size > DENSE_BYTES:
            raise ValueError(
                f"m x m for m = {self.num_samples:,} samples would take {size / 2**30:.0f} GiB; this kernel keeps traces:"
                " take block(rows, columns), neighbors(k) or product(vector)"
            )

    @cached_property
    def variance(self) -> Tensor:
        """(m,) fp64 variance of each loss, the diagonal of K: the per-sample singular fluctuation (paper, D.3)."""
        if isinstance(self.accumulator, StreamingCovariance):
            return self.accumulator.variance(self.within_chain)
        return self.accumulator.variance()

    @cached_property
    def _inverse_deviation(self) -> Tensor:
        deviation = self.variance.clamp_min(0.0).sqrt()
        return torch.where(deviation > 0, 1 / deviation, 0.0)

    def block(self, rows: Tensor, columns: Tensor | None = None, *, correlation: bool = True) -> Tensor:
        """(r, c) fp32 correlations (or covariances) of some samples with others.

        Args:
            rows: (r,) int64 indices; columns: (c,), None for all samples.
        """
        if isinstance(self.accumulator, LossTraces):
            read = self.accumulator.correlation if correlation else self.accumulator.covariance
            return read(rows, slice(None) if columns is None else columns)
        part = self.covariance[rows] if columns is None else self.covariance[rows][:, columns]
        if not correlation:
            return part
        scale = self._inverse_deviation.to(part.dtype)
        return (part * scale[rows, None] * (scale if columns is None else scale[columns])).clamp_(-1.0, 1.0)

    def product(self, vector: Tensor) -> Tensor:
        """ρ times a (m,) vector, fp64: for iterative solvers."""
        if isinstance(self.accumulator, LossTraces):
            return self.accumulator.matvec(vector.double(), correlation=True)
        scale = self._inverse_deviation
        scaled = vector.to(scale.device, torch.float64) * scale
        return (self.covariance @ scaled.to(self.covariance.dtype)).double() * scale

    def distance(self, kind: str = "euclidean") -> Tensor:
        """(m, m) fp32 distances: sqrt(2(1 - ρ)), or 1 - ρ for ``kind="linear"`` (paper, section 3)."""
        return estimators.correlation_distance(self.correlation, kind).fill_diagonal_(0.0)

    def neighbors(self, k: int, exclude_same: Tensor | bool | None = None) -> tuple[Tensor, Tensor]:
        """The k most correlated other samples of each, without m x m of scratch.

        Args:
            exclude_same: (m,) labels (True: the kernel's own): pairs with equal ones are removed *before* the k are
                taken (paper, appendix B).

        Returns:
            indices (m, k) int64 and distances sqrt(2(1 - ρ)) (m, k) fp32, nearest first; -1 and infinity where fewer
            than k samples are admissible.

        Raises:
            TypeError, ValueError: k not in 1 ... m - 1, labels that do not fit.
        """
        _validate.integer("k", k, 1)
        if k >= self.num_samples:
            raise ValueError(f"k must be less than m = {self.num_samples}, got {k}")
        labels = self._exclusion(exclude_same)
        if isinstance(self.accumulator, LossTraces):
            return self.accumulator.neighbors(k, exclude_same=labels)
        everyone = torch.arange(self.num_samples, device=self.covariance.device)
        indices, distances = [], []
        for rows in estimators.blocks(self.num_samples):
            rho = self.block(everyone[rows])
            forbidden = everyone[rows, None] == everyone
            if labels is not None:
                forbidden |= labels.to(rho.device)[rows, None] == labels.to(rho.device)
            best, which = rho.masked_fill_(forbidden, -math.inf).topk(k)
            indices.append(which.masked_fill_(best == -math.inf, -1))
            distances.append(estimators.correlation_distance(best))
        return torch.cat(indices), torch.cat(distances)

    def _exclusion(self, exclude_same: Tensor | bool | None) -> Tensor | None:
        if exclude_same is None or exclude_same is False:
            return None
        if exclude_same is True:
            if self.labels is None:
                raise ValueError("exclude_same=True needs the kernel's labels, and it has none; pass (m,) labels")
            return self.labels
        return sample_labels("exclude_same", exclude_same, self.num_samples)

    def neighbor_table(
        self,
        samples: Sequence[int] | Tensor,
        k: int = 8,
        *,
        exclude_same: Tensor | bool | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Neighborhood]:
        """The most correlated samples of a few, with their correlations.

        Args:
            samples: which; names: m names, None for the numbers; k, exclude_same: as in :meth:`neighbors`.
        """
        labels = self._exclusion(exclude_same)
        rows = torch.as_tensor(samples, dtype=torch.int64)
        rho = self.block(rows).clone()
        rho[torch.arange(len(rows)), rows] = -math.inf
        if labels is not None:
            rho[labels[rows, None] == labels] = -math.inf
        best, which = rho.topk(min(k, self.num_samples - 1))
        name = str if names is None else names.__getitem__
        table = []
        for row, columns, correlations in zip(rows.tolist(), which.tolist(), best.tolist(), strict=True):
            pairs = zip(columns, correlations, strict=True)
            table.append(Neighborhood(row, name(row), [(j, name(j), r) for j, r in pairs if r > -math.inf]))
        return table

    # --- numbers -------------------------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """Inverse temperature β = nβ/n; NaN where unknown."""
        return self.about.nbeta / self.about.num_train if self.about.num_train else math.nan

    @property
    def empirical_variance(self) -> float:
        """V_n = Σ_i Var ℓ_i over the training set; the samples stand for it where they are not all of it."""
        return estimators.empirical_variance(self.variance, self.about.num_train or None)

    @property
    def singular_fluctuation(self) -> float:
        """ν̂ = (β/2) V_n (paper, appendix A.1); NaN where β is unknown."""
        return self.beta / 2 * self.empirical_variance

    @property
    def llc(self) -> float:
        """Local learning coefficient nβ (E[L_n] - L_n(w*)), L_n as the mean over the samples; NaN where unknown."""
        return estimators.llc(self.mean.mean().item(), self.initial_losses.double().mean().item(), self.about.nbeta)

    def bif(self, query: Tensor | None = None) -> Tensor:
        """Bayesian influence -Cov(ℓ_i, φ) of every sample on queries (paper, appendix A.2).

        Args:
            query: (q,) int64 indices of samples of this kernel; None: the ``query_data`` of :func:`loss_kernel`.

        Returns:
            (m, q), fp64 for query data, fp32 otherwise.

        Raises:
            ValueError: no query was sampled.
        """
        if query is not None:
            return -self.block(torch.as_tensor(query, dtype=torch.int64), correlation=False).T
        if self.queries is None:
            raise ValueError("query: pass indices of this kernel's samples, or query_data to loss_kernel")
        return -self.queries.compute(self.within_chain)

    def principal_components(self, count: int = 2) -> PrincipalComponents:
        """Top principal components of HρH from products with vectors; see ``estimators.principal_components``."""
        ones = torch.ones(self.num_samples, dtype=torch.float64)
        trace = (self.variance > 0).sum().item() - self.product(ones).sum().item() / self.num_samples
        return estimators.principal_components(
            lambda vector: self.product(vector).cpu(), count, trace=trace, size=self.num_samples
        )

    def pc1(self) -> Tensor:
        """(m,) fp64 projections on the first principal component of HρH (paper, Figure 2 B)."""
        return self.principal_components(1).coordinates[:, 0]

    def cka(self, other: LossKernel | Tensor) -> float:
        """Centred alignment of the correlation kernels (paper, appendix D.2).

        Args:
            other: a kernel of the same samples, or an (m, m) matrix.
        """
        if isinstance(other, Tensor):
            return estimators.cka(self.correlation, other)
        if self.num_samples != other.num_samples:
            raise ValueError(
                f"the kernels are of {self.num_samples} and {other.num_samples} samples; the same are compared"
            )
        if isinstance(self.accumulator, LossTraces) and isinstance(other.accumulator, LossTraces):
            mine, others = self.accumulator, other.accumulator
            step = max(1, estimators.BLOCK // max(mine.count, others.count))
            return estimators.cka_of_chunks(zip(standardised_chunks(mine, step), standardised_chunks(others, step), strict=True))
        return estimators.cka(self.correlation, other.correlation)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Whether the draws can be trusted; ``diagnostics.verdicts()`` says it in words."""
        confound = None
        if self.labels is not None:
            some = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(0))[:SUBSET].sort().values
            if isinstance(self.accumulator, StreamingCovariance):
                some = torch.arange(self.num_samples)
            confound = estimators.same_label_confound(self.block(some, some), self.labels[some])
        return Diagnostics(
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            constant_samples=int((self.variance <= 0).sum()),
            step_size=self.about.step_size,
            stability_bound=self.about.stability_bound,
            confound=confound,
            **kernel_record.convergence(self.record),
        )

    # --- pictures ------------------------------------------------------------------------------------------------------

    def embed(
        self,
        method: str = "umap",
        *,
        dimensions: int = 2,
        num_neighbors: int = 15,
        exclude_same: Tensor | bool | None = None,
        min_dist: float = 0.1,
        seed: int = 0,
    ) -> Tensor:
        """(m, dimensions) fp32 coordinates: UMAP of the nearest-neighbour graph (paper, section 3), or kernel PCA.

        Args:
            method: "umap" (umap-learn on :meth:`neighbors`, started from the principal components) or "pca".
            num_neighbors, min_dist: of UMAP; exclude_same: as in :meth:`neighbors`; seed: the same picture every time.

        Raises:
            ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
        """
        if method not in ("umap", "pca"):
            raise ValueError(f"method must be 'umap' or 'pca', got {method!r}")
        start = self.principal_components(dimensions).coordinates
        if method == "pca":
            return start.float()
        graph = self.neighbors(min(num_neighbors, self.num_samples - 1), exclude_same)
        return umap_layout(*graph, start, min_dist, seed)

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Sorted heatmap of ρ beside the embedding; see ``kernel_report.overview``. Written to ``path`` if given."""
        from harmonic_triton import kernel_report

        figure = kernel_report.overview(self, **options)
        if path is not None:
            figure.savefig(path, dpi=144, bbox_inches="tight")
        return figure

    def report(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write a self-contained HTML report; see ``kernel_report.write``."""
        from harmonic_triton import kernel_report

        return kernel_report.write(self, path, **options)

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Everything into one safetensors file, atomically; :meth:`load` gives the same kernel back.

        Raises:
            ImportError: without the ``analysis`` extra.
        """
        tensors: dict[str, Tensor] = {}
        state = {
            "kind": "traces" if isinstance(self.accumulator, LossTraces) else "covariance",
            "accumulator": whole_state(self.accumulator),
            "record": self.record.state_dict(),
            "labels": self.labels,
            "queries": None if self.queries is None else self.queries.state_dict(),
            "within_chain": self.within_chain,
            "about": self.about._asdict(),
        }
        metadata = {"format": str(FORMAT), "loss_kernel": json.dumps(flatten(state, tensors, "state"))}
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            needs("safetensors.torch").save_file(tensors, beside, metadata=metadata)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LossKernel:
        """The kernel that :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else. ImportError: without the ``analysis`` extra.
        """
        with needs("safetensors").safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT) or "loss_kernel" not in metadata:
                raise ValueError(f"{os.fspath(path)} is no loss kernel that this version reads (format {FORMAT})")
            state = unflatten(json.loads(metadata["loss_kernel"]), file.get_tensor)
        samples = len(state["record"]["initial_losses"])
        kind: Any = LossTraces if state["kind"] == "traces" else StreamingCovariance
        dtype = getattr(torch, state["accumulator"]["dtype"].removeprefix("torch."))
        accumulator = kind(samples, device=device, dtype=dtype)
        accumulator.load_state_dict(state["accumulator"])
        return cls(
            accumulator,
            ChainRecord.from_state_dict(state["record"]),
            within_chain=state["within_chain"],
            labels=state["labels"],
            queries=None if state["queries"] is None else QueryCovariance.from_state_dict(state["queries"]),
            about=About(**state["about"]),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """The results as NumPy arrays: mean, variance, initial_losses, mean_loss (C, T), and the covariance of a kernel
        that holds it."""
        found: dict[str, Any] = {
            "mean": self.mean,
            "variance": self.variance,
            "initial_losses": self.initial_losses,
            "mean_loss": self.record.mean_loss,
        }
        if isinstance(self.accumulator, StreamingCovariance):
            found["covariance"] = self.covariance
        if self.labels is not None:
            found["labels"] = self.labels
        return {name: value.cpu().numpy() for name, value in found.items()}

    def to_npz(self, path: str | os.PathLike[str]) -> Path:
        """:meth:`arrays` as a NumPy archive, with the configuration as JSON in ``about``."""
        import numpy as np

        path = Path(path)
        with open(path, "wb") as file:
            np.savez(file, about=np.array(json.dumps(self.about._asdict())), **self.arrays())  # type: ignore[arg-type]
        return path

    def to_zarr(self, path: str | os.PathLike[str]) -> Path:
        """:meth:`arrays` as a Zarr group, with the configuration in its attributes.

        Raises:
            ImportError: zarr is not installed.
        """
        try:
            import zarr
        except ImportError as error:
            raise ImportError("to_zarr needs zarr: pip install zarr") from error
        group = zarr.open_group(os.fspath(path), mode="w")
        for name, values in self.arrays().items():
            group.create_array(name, data=values)
        group.attrs["about"] = json.dumps(self.about._asdict())
        return Path(path)

    def __repr__(self) -> str:
        kind = "traces" if isinstance(self.accumulator, LossTraces) else "covariance"
        dead = f", dead chains {list(self.record.dead)}" if self.record.dead else ""
        return (
            f"LossKernel({self.num_samples:,} samples, {self.num_draws:,} draws of {self.num_chains} chains, keeps {kind}"
            f"{', within-chain' if self.within_chain else ''}{dead})"
        )


class Neighborhood(NamedTuple):
    """A sample and its most correlated ones."""

    sample: int
    name: str
    neighbors: list[tuple[int, str, float]]  # (sample, name, ρ), nearest first


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
    ) -> None:
        self.num_samples = len(initial_losses)
        self.record = ChainRecord(num_chains, num_draws, initial_losses)
        queries = num_read - self.num_samples
        self.queries = QueryCovariance(num_chains, self.num_samples, queries) if queries else None
        self.accumulator: StreamingCovariance | LossTraces
        if chosen(keep, self.num_samples, num_chains * num_draws) == "covariance":
            self.accumulator = StreamingCovariance(self.num_samples, device=device, backend=backend)
        else:
            self.accumulator = LossTraces(self.num_samples, path=path, dtype=dtype, device=device, backend=backend)
        self.pending: dict[int, list[Tensor]] = {}

    def update(self, draws: Draws) -> None:
        """Enter draws (k, m + q)."""
        finite = (draws.losses.abs() < LARGEST).all(1)
        samples = draws.losses[:, : self.num_samples]
        self.record.update(draws.chain.cpu(), draws.draw.cpu(), samples, draws.train_loss, finite)
        for losses, chain, alive in zip(draws.losses, draws.chain.tolist(), finite.tolist(), strict=True):
            waiting = self.pending.setdefault(chain, [])
            if alive:
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


def loss_kernel(
    model: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    train_data: Any,
    eval_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    device: torch.device | str | None = None,
    mask: Any = None,
    query_data: Any = None,
    labels: Tensor | None = None,
    keep: str = "auto",
    within_chain: bool = False,
    backend: str = "auto",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> LossKernel:
    """The loss kernel of a trained model on ``eval_data`` (paper, section 2.3 and appendix B).

    Args:
        model, per_sample_loss, train_data, eval_data, config, seed, device, mask: as for ``sgld.Sampler``.
        query_data: further samples, of the form of eval_data, for :meth:`LossKernel.bif`; they are not in the kernel.
        labels: (m,) integers of the evaluation samples, for diagnostics and pictures.
        keep: "covariance", the (m, m) sums in float32; "traces", all draws in bfloat16, 2 T m bytes (memory-mapped in
            ``checkpoint_dir`` if there is one); "auto": the first for m up to the number of draws, or 4096.
        within_chain: the within-chain estimate; needs ``keep="covariance"``, where :meth:`LossKernel.estimate` switches.
        backend: of the accumulator, "auto", "triton" or "torch".
        checkpoint_dir: keep the state of chains and sums here, in one file written atomically. The same call later goes
            on, and ends with bitwise the numbers of an uninterrupted run (CPU).
        checkpoint_seconds: at least this long between two checkpoints; 0: one at every draw.
        progress: show draws per second, time left and the chains' health.

    Returns:
        The kernel. Under ``torch.distributed`` (``torchrun``) the ranks share the chains, and each gets the same one.

    Raises:
        TypeError, ValueError: an argument is wrong, the checkpoint belongs to another run (what differs is listed), or
            fewer than two draws are left because chains died.
    """
    _validate.between("checkpoint_seconds", checkpoint_seconds, 0.0)
    rank, world = processes()
    if isinstance(config, SGLDConfig) and world > config.num_chains:
        raise ValueError(f"{world} processes share {config.num_chains} chains; start one a chain at most")
    read = eval_data if query_data is None else joined(eval_data, query_data)
    sampler = Sampler(model, per_sample_loss, train_data, read, config, seed=seed, device=device, mask=mask)
    samples = sampler.num_samples
    if query_data is not None:
        samples = samples * len_of(eval_data) // (len_of(eval_data) + len_of(query_data))
    if labels is not None:
        labels = sample_labels("labels", labels, samples)
    kept = chosen(keep, samples, config.num_chains * config.num_draws)
    if kept == "traces" and within_chain:
        raise ValueError("within_chain=True needs keep='covariance'; traces give the pooled estimate")
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    dtype = torch.bfloat16 if world == 1 else torch.float32  # rounded once, when the ranks' traces meet
    collector = Collector(
        config.num_chains,
        config.num_draws,
        sampler.initial_losses[:samples],
        sampler.num_samples,
        kept,
        sampler.device,
        backend,
        directory / f"traces-{rank}" if directory and kept == "traces" else None,
        dtype,
    )
    about = About(
        nbeta=config.nbeta,
        step_size=config.lr,
        stability_bound=sampler.stability_bound() if config.method == "sgld" else math.nan,
        num_train=len(sampler.train_data),
        config=dataclasses.asdict(config),
        fingerprint=sampler.fingerprint,
    )
    collect(sampler, collector, directory, {"keep": kept, "processes": str(world)}, checkpoint_seconds, progress)
    if world > 1:
        gather(collector, rank, world, directory)
    collector.check()
    return LossKernel(
        collector.accumulator,
        collector.record,
        within_chain=within_chain,
        labels=labels,
        queries=collector.queries,
        about=about,
    )


def collect(
    sampler: Sampler,
    collector: Collector,
    directory: Path | None,
    settings: dict[str, str],
    seconds: float,
    progress: bool,
) -> None:
    """Run the sampler to its end into the collector, from the last checkpoint on."""
    path = None if directory is None else directory / f"kernel-{processes()[0]}.pt"
    fingerprint = {**sampler.fingerprint, **settings}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            state = _checkpoint.load(path)
            _checkpoint.check_fingerprint(state["fingerprint"], fingerprint)
            sampler.load_state_dict(state["sampler"])
            collector.load_state_dict(state["collector"])

    def save() -> None:
        if path is not None:
            state = {"fingerprint": fingerprint, "sampler": sampler.state_dict(), "collector": collector.state_dict()}
            _checkpoint.save(path, state)

    bar = Progress(sampler) if progress else None
    saved = time.monotonic()
    try:
        for draws in sampler.run():
            collector.update(draws)
            if bar is not None:
                bar.update(draws.losses)
            if time.monotonic() - saved >= seconds or not sampler.remaining:
                save()
                saved = time.monotonic()
    finally:
        if bar is not None:
            bar.close()


def gather(collector: Collector, rank: int, world: int, directory: Path | None) -> None:
    """Every rank's chains in each rank's collector."""
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, (collector.record, collector.queries))
    for other, (record, queries) in enumerate(every):
        if other != rank:
            collector.record.merge(record)
            if collector.queries is not None:
                collector.queries.merge(queries)
    if isinstance(collector.accumulator, StreamingCovariance):
        collector.accumulator.all_reduce()
        return
    mine, path = collector.accumulator, directory and directory / f"traces-of-all-{rank}"
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)  # of an earlier end of this run
    union = LossTraces(mine.num_samples, path=path, device=mine.device, backend=mine.backend)
    counts = torch.zeros(collector.record.num_chains, dtype=torch.int64, device=mine.device)
    for chain, count in mine.chain_counts.items():
        counts[chain] = count
    torch.distributed.all_reduce(counts)
    for chain, count in enumerate(counts.tolist()):
        if not count:
            continue
        losses = torch.empty(count, mine.num_samples, dtype=torch.float64, device=mine.device)
        if chain % world == rank:
            losses.copy_(mine.draws(mine.chains == chain)).add_(mine.reference)
        torch.distributed.broadcast(losses, src=chain % world)
        union.update(losses, chain=chain)
    collector.accumulator = union


def processes() -> tuple[int, int]:
    """(rank, number of processes) of torch.distributed; (0, 1) without."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def joined(first: Any, second: Any) -> Any:
    """The samples of two data sets, one after the other."""
    leaves, spec = tree_flatten(first)
    others, other_spec = tree_flatten(second)
    if spec == other_spec and all(isinstance(leaf, Tensor) for leaf in leaves + others):
        return tree_map(lambda a, b: torch.cat([a, b]), first, second)
    if isinstance(first, Dataset) and isinstance(second, Dataset):
        return ConcatDataset([first, second])
    raise TypeError(
        f"query_data must have the form of eval_data (tensors alike, or map-style Datasets), got {type(second).__name__}"
        f" for {type(first).__name__}"
    )


def len_of(data: Any) -> int:
    """Samples of tensors or of a dataset."""
    leaves = tree_flatten(data)[0]
    return len(leaves[0]) if isinstance(leaves[0], Tensor) else len(data)


def standardised_chunks(traces: LossTraces, step: int) -> Iterator[Tensor]:
    """(T, step) standardised traces of a few samples after the other."""
    for start in range(0, traces.num_samples, step):
        yield estimators.standardised(traces.draws(samples=slice(start, start + step)))


def umap_layout(indices: Tensor, distances: Tensor, start: Tensor, min_dist: float, seed: int) -> Tensor:
    """UMAP (McInnes et al. 2018) of a nearest-neighbour graph, by umap-learn.

    Args:
        indices, distances: (m, k) without the samples themselves, -1 where there is none; start: (m, d) coordinates to
            begin with.

    Returns:
        (m, d) fp32.
    """
    umap = needs("umap")
    size, device = len(indices), indices.device
    itself = torch.arange(size, device=device)[:, None]  # umap-learn counts a sample as its own first neighbour
    graph = torch.cat([itself, indices], 1).cpu().numpy()
    lengths = torch.cat([torch.zeros(size, 1, device=device), distances.clamp_max(2.0)], 1).float().cpu().numpy()
    spread = (start / start.std(0)).clamp(-3, 3).float().cpu().numpy()  # a few outliers would flatten the rest
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module="umap|sklearn"
        )  # that transform() is off, that a seed means one thread
        layout = umap.UMAP(
            n_neighbors=graph.shape[1],
            n_components=spread.shape[1],
            min_dist=min_dist,
            init=spread,
            random_state=seed,
            n_jobs=1,
            low_memory=True,
            precomputed_knn=(graph, lengths),
            force_approximation_algorithm=True,
        ).fit_transform(spread)
    return torch.from_numpy(layout)


def whole_state(accumulator: StreamingCovariance | LossTraces) -> dict[str, Any]:
    """Its state dict, with the draws of traces that lie in a directory."""
    state = accumulator.state_dict()
    if isinstance(accumulator, LossTraces) and state["draws"] is None:
        parts = [slice(start, start + 64) for start in range(0, accumulator.count, 64)]
        state["draws"] = torch.cat([accumulator.draws(part).to(accumulator.dtype) for part in parts])
    return state


def flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for nested dicts, sequences and plain values; tensors go into ``tensors`` under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, flatten(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        return {"list": [flatten(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    return value


def unflatten(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`flatten`; tuples have become lists."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: unflatten(item, tensor) for key, item in content}
    return [unflatten(item, tensor) for item in content]
