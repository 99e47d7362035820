"""The loss kernel of a trained model, :class:`LossKernel`, and what is read off it. ``run.loss_kernel`` makes one.

K_ij = Cov(ℓ_i, ℓ_j) over weights sampled around w* (Adam, Furman and Hoogland, *The Loss Kernel*, section 2.3; "paper"
below). m samples, C chains, T draws a chain.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common import files, validate
from harmonic_triton.losskernel import estimators, figures, report, storage, views
from harmonic_triton.losskernel.about import About
from harmonic_triton.losskernel.accumulator import Accumulator
from harmonic_triton.losskernel.chain_record import ChainRecord
from harmonic_triton.losskernel.collector import Collector, QueryCovariance
from harmonic_triton.losskernel.diagnostics import Diagnostics, convergence_of
from harmonic_triton.losskernel.estimators import PrincipalComponents, sample_labels
from harmonic_triton.losskernel.layout import umap_layout
from harmonic_triton.losskernel.sampling.sampler import Draws
from harmonic_triton.losskernel.views import Neighborhood

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LossKernel:
    """The covariance of per-sample losses under the probe, and what is read off it.

    Made by :func:`loss_kernel`, by :meth:`from_losses` or by :meth:`load`. It holds either the (m, m) second moment or
    the traces, from which blocks, products and neighbours come without m x m (see ``views``); everything but
    :attr:`covariance` and :attr:`correlation` works at any m with either.

    Args:
        accumulator: the sums (``StreamingCovariance``) or the traces (``LossTraces``) of all draws that count.
        record: mean losses of every draw and a subset's traces, for the diagnostics.
        within_chain: estimate with each chain about its own mean, divisor Σ(n_c - 1), instead of pooled (paper,
            appendix B: pooled). :meth:`estimate` switches.
        labels: (m,) integers, for the same-label confound, plots and ``exclude_same=True``.
        queries: covariances with query samples, for :meth:`bif`.
        about: where the kernel comes from.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        record: ChainRecord,
        *,
        within_chain: bool = False,
        labels: Tensor | None = None,
        queries: QueryCovariance | None = None,
        about: About = About(),  # noqa: B008  # a constant
    ) -> None:
        validate.flag("within_chain", within_chain)
        self.view = views.view(accumulator, within_chain)
        self.accumulator, self.record, self.queries, self.about = accumulator, record, queries, about
        self.within_chain = within_chain
        self.num_samples = len(record.initial_losses)
        self.labels = None if labels is None else sample_labels("labels", labels, self.num_samples).cpu().clone()

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
        trace_dtype: torch.dtype = torch.bfloat16,
    ) -> LossKernel:
        """A kernel from losses that were drawn elsewhere.

        Args:
            losses: (C, T, m), or (T, m) of one chain. Chains that end non-finite are left out whole.
            initial_losses: (m,) losses at w*; without them there is no LLC and no excess loss.
            keep, within_chain, labels, backend, trace_dtype: as in :func:`loss_kernel`.

        Raises:
            TypeError, ValueError: an argument is wrong, or no chain lives.
        """
        validate.tensors(losses=losses)
        validate.flag("within_chain", within_chain)
        if losses.dim() not in (2, 3) or not losses.is_floating_point() or losses.numel() == 0:
            raise ValueError(f"losses must be floating, (C, T, m) or (T, m), got {validate.describe(losses)}")
        losses = losses.detach() if losses.dim() == 3 else losses.detach()[None]
        chains, draws, samples = losses.shape
        if initial_losses is None:
            initial_losses = torch.full((samples,), math.nan, dtype=torch.float32)
        validate.tensors(initial_losses=initial_losses)
        if initial_losses.shape != (samples,):
            raise ValueError(f"initial_losses must be ({samples},), got {validate.describe(initial_losses)}")
        collector = Collector(chains, draws, initial_losses, samples, keep, losses.device, backend, None, trace_dtype)
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
        return self.view.mean()

    @property
    def covariance(self) -> Tensor:
        """(m, m) fp32 K (paper, Eq. 4).

        Raises:
            ValueError: the kernel keeps traces and m x m would take more than 4 GiB; take :meth:`block`.
        """
        return self.view.covariance

    @property
    def correlation(self) -> Tensor:
        """(m, m) fp32 ρ, 0 where a variance is 0 (paper, Eq. 5). Raises as :attr:`covariance`."""
        return self.view.correlation

    @property
    def variance(self) -> Tensor:
        """(m,) fp64 variance of each loss, the diagonal of K: the per-sample singular fluctuation (paper, D.3)."""
        return self.view.variance

    def block(self, rows: Tensor, columns: Tensor | None = None, *, correlation: bool = True) -> Tensor:
        """(r, c) fp32 correlations (or covariances) of some samples with others.

        Args:
            rows: (r,) int64 indices.
            columns: (c,), None for all samples.
            correlation: give ρ, otherwise K.
        """
        validate.flag("correlation", correlation)
        return self.view.block(rows, columns, correlation)

    def product(self, vector: Tensor) -> Tensor:
        """ρ times a (m,) vector, fp64: for iterative solvers."""
        return self.view.product(vector)

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
        validate.integer("k", k, 1)
        if k >= self.num_samples:
            raise ValueError(f"k must be less than m = {self.num_samples}, got {k}")
        return self.view.neighbors(k, self._exclusion(exclude_same))

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
            samples: which.
            names: m names, None for the numbers.
            k, exclude_same: as in :meth:`neighbors`.
        """
        labels = self._exclusion(exclude_same)
        validate.integer("k", k, 1)
        return views.neighborhoods(self.view, samples, self.num_samples, k, labels, names)

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
    def excess_loss(self) -> float:
        """E[L_n] - L_n(w*), L_n as the mean over the samples; NaN where unknown."""
        return estimators.excess_loss(self.mean.mean().item(), self.record.initial_loss)

    @property
    def llc(self) -> float:
        """Local learning coefficient, nβ times the excess loss; NaN where unknown."""
        return estimators.llc(self.mean.mean().item(), self.record.initial_loss, self.about.nbeta)

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
        return views.alignment(self.view, other.view)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Whether the draws can be trusted; ``diagnostics.verdicts()`` says it in words."""
        confound = None
        if self.labels is not None:
            some = self.view.representatives()
            confound = estimators.same_label_confound(self.block(some, some), self.labels[some])
        return Diagnostics(
            num_chains=self.num_chains,
            num_draws=self.num_draws,
            constant_samples=int((self.variance <= 0).sum()),
            step_size=self.about.step_size,
            stability_bound=self.about.stability_bound,
            confound=confound,
            **convergence_of(self.record),
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
            method: "umap" (umap-learn on :meth:`neighbors`, started from the principal components) or "pca"; fewer than
                four samples are laid out by "pca".
            num_neighbors, min_dist: of UMAP.
            exclude_same: as in :meth:`neighbors`.
            seed: the same picture every time.

        Raises:
            ValueError: an argument is wrong. ImportError: without the ``analysis`` extra.
        """
        if method not in ("umap", "pca"):
            raise ValueError(f"method must be 'umap' or 'pca', got {method!r}")
        validate.integer("dimensions", dimensions, 1)
        start = torch.zeros(self.num_samples, dimensions, dtype=torch.float64)
        present = min(dimensions, self.num_samples - 1)  # HρH has rank m - 1 at most
        if present:
            start[:, :present] = self.principal_components(present).coordinates
        if method == "pca" or self.num_samples < 4:
            return start.float()
        graph = self.neighbors(min(num_neighbors, self.num_samples - 1), exclude_same)
        return umap_layout(*graph, start, min_dist, seed)

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
        """Sorted heatmap of ρ beside the embedding; see ``figures.overview``. Written to ``path`` if given."""
        figure = figures.overview(self, **options)
        if path is not None:
            with files.replacing(path) as file:
                figure.savefig(file, dpi=144, bbox_inches="tight", format=Path(path).suffix[1:] or None)
        return figure

    def report(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write a self-contained HTML report; see ``report.write``."""
        return report.write(self, path, **options)

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Everything into one safetensors file; :meth:`load` gives the same kernel back.

        At every moment ``path`` is the old file or the new one, whole and on the disk. It has a checksum, by which
        :meth:`load` notices any damage.

        Raises:
            ImportError: without the ``analysis`` extra.
        """
        state = {
            "accumulator": self.view.state(),
            "record": self.record.state_dict(),
            "labels": self.labels,
            "queries": None if self.queries is None else self.queries.state_dict(),
            "within_chain": self.within_chain,
            "about": self.about._asdict(),
        }
        storage.save(Path(path), state)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LossKernel:
        """The kernel that :meth:`save` wrote. One saved before there were checksums is read with a warning.

        Raises:
            ValueError: the file holds something else, or is not as it was written (one flipped bit is enough).
            ImportError: without the ``analysis`` extra.
        """
        state = storage.load(Path(path))
        return cls(
            views.restored(state["accumulator"], device),
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
        if self.view.traces is None:
            found["covariance"] = self.covariance
        if self.labels is not None:
            found["labels"] = self.labels
        return {name: value.cpu().numpy() for name, value in found.items()}

    def to_npz(self, path: str | os.PathLike[str]) -> Path:
        """:meth:`arrays` as a NumPy archive, with the configuration as JSON in ``about``."""
        with files.replacing(path) as file:
            np.savez(file, about=np.array(json.dumps(self.about._asdict())), **self.arrays())  # type: ignore[arg-type]
        return Path(path)

    def to_zarr(self, path: str | os.PathLike[str]) -> Path:
        """:meth:`arrays` as a Zarr group, with the configuration in its attributes.

        It is written beside ``path`` and renamed. In place of an earlier group of this method, not of anything else.

        Raises:
            FileExistsError: ``path`` is there and holds what this method did not write; it is left alone.
            ImportError: zarr is not installed.
        """
        path = Path(path)
        storage.save_zarr(path, self.arrays(), json.dumps(self.about._asdict()))
        return path

    def __repr__(self) -> str:
        dead = f", dead chains {list(self.record.dead)}" if self.record.dead else ""
        return (
            f"LossKernel({self.num_samples:,} samples, {self.num_draws:,} draws of {self.num_chains} chains, keeps {self.view.keeps}"
            f"{', within-chain' if self.within_chain else ''}{dead})"
        )
