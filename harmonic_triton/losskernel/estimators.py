"""What is read off a loss kernel: pure functions of matrices, losses and neighbours; no model, no sampler.

Sources, cited by these names below: *paper* is Adam, Furman and Hoogland, *The Loss Kernel* (2025); BDA3 is Gelman et al.,
Lau is Lau et al., *The local learning coefficient* (2025); Kornblith is Kornblith et al.,
*Similarity of neural network representations revisited* (2019). m samples, C chains, T draws a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.extras import needs
from harmonic_triton._common.precision import exact_products

BLOCK = 2**24  # elements of an m x m matrix worked on at a time


class PrincipalComponents(NamedTuple):
    """Kernel principal components of HρH, largest first."""

    coordinates: Tensor  # (m, k) fp64, sqrt(eigenvalue) x eigenvector: inner products of rows approximate HρH
    share: Tensor  # (k,) fp64, part of the trace of HρH


class SameLabelConfound(NamedTuple):
    """Mean correlation of pairs with one label, and of the other pairs of one group."""

    same_label: float
    other: float


class MemorizationAUC(NamedTuple):
    """ROC-AUC for finding memorised samples by their loss variance, and by the loss at w* alone (the control)."""

    variance: float
    initial_loss: float


# --- comparing and reducing kernels ------------------------------------------------------------------------------------


def correlation_distance(correlation: Tensor, kind: str = "euclidean") -> Tensor:
    """Distance of correlations, entry by entry: "euclidean" is sqrt(2 (1 - ρ)), "linear" is 1 - ρ (paper, section 3).

    Both rank neighbours alike. The first is the Euclidean distance between standardised loss traces over sqrt(T - 1).

    Raises:
        TypeError: correlation is not a tensor. ValueError: unknown kind.
    """
    validate.tensors(correlation=correlation)
    if kind not in ("euclidean", "linear"):
        raise ValueError(f"kind must be 'euclidean' (sqrt(2(1-rho))) or 'linear' (1-rho), got {kind!r}")
    gap = (1 - correlation).clamp_min_(0.0)
    return gap if kind == "linear" else gap.mul_(2.0).sqrt_()


def cka(first: Tensor, second: Tensor) -> float:
    """Centred kernel alignment <HKH, HLH> / (||HKH|| ||HLH||) in [-1, 1] (Kornblith; paper, appendix D.2).

    Args:
        first, second: (m, m) symmetric kernels of the same samples. Sums run in fp64, by blocks of rows.

    Returns:
        The alignment; NaN if a centred kernel is zero.

    Raises:
        TypeError, ValueError: not square matrices of one size.
    """
    square("first", first)
    square("second", second)
    if first.shape != second.shape:
        raise ValueError(
            f"first is {tuple(first.shape)} and second {tuple(second.shape)}; kernels of the same samples are compared"
        )
    device = first.device
    means = [matrix.mean(1, dtype=torch.float64).to(device) for matrix in (first, second)]
    products = torch.zeros(3, dtype=torch.float64)
    for rows in blocks(len(first)):
        a, b = (
            matrix[rows].to(device, torch.float64) - mean[rows, None] - mean + mean.mean()
            for matrix, mean in zip((first, second), means, strict=True)
        )
        products += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
    return alignment(*products.tolist())


def cka_of_factors(first: Tensor, second: Tensor) -> float:
    """:func:`cka` of the kernels XᵀX and YᵀY from their factors, without m x m (Kornblith, section 3).

    Args:
        first: (T, m) factor X, for example traces standardised over the draws.
        second: (T', m).

    Raises:
        TypeError, ValueError: not two factors of the same samples.
    """
    for name, factor in (("first", first), ("second", second)):
        validate.tensors(**{name: factor})
        if factor.dim() != 2:
            raise ValueError(f"{name} must be (draws, m), got {validate.describe(factor)}")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"first has {first.shape[1]} samples and second {second.shape[1]}; the same are compared")
    return cka_of_chunks([(first, second)])


def cka_of_chunks(chunks: Iterable[tuple[Tensor, Tensor]]) -> float:
    """:func:`cka_of_factors` by chunks of samples: pairs of (T, chunk) and (T', chunk), which is all that is held."""
    samples = 0
    totals: list[Tensor] = []
    for first, second in chunks:
        x, y = first.double(), second.to(first.device, torch.float64)
        terms = [x @ y.T, x @ x.T, y @ y.T, x.sum(1), y.sum(1)]
        totals = [a + b for a, b in zip(totals, terms, strict=True)] if totals else terms
        samples += x.shape[1]
    *products, x_sum, y_sum = totals
    pairs = ((x_sum, y_sum), (x_sum, x_sum), (y_sum, y_sum))
    centered = (total - torch.outer(a, b) / samples for total, (a, b) in zip(products, pairs, strict=True))
    return alignment(*(matrix.square().sum().item() for matrix in centered))


def standardized(losses: Tensor) -> Tensor:
    """(T, m) fp64: centred over the draws and scaled to norm 1, 0 where a loss never varies; ZᵀZ is the correlation."""
    centered = losses.double() - losses.mean(0, dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(centered, dim=0)
    return centered / norm.masked_fill(norm == 0, math.inf)


def alignment(product: float, first: float, second: float) -> float:
    """<K, L> over the norms, from the product and the two squared norms."""
    return product / math.sqrt(first * second) if first > 0 and second > 0 else math.nan


def principal_components(
    correlation: Tensor | Callable[[Tensor], Tensor], count: int = 1, *, trace: float | None = None, size: int = 0
) -> PrincipalComponents:
    """Top principal components of HρH, H = 1 - 11ᵀ/m (paper, Figure 2 B), by ARPACK.

    Args:
        correlation: (m, m), or its product with a (m,) fp64 vector as a function; then ``size`` is m and ``trace``
            the trace of HρH.
        count: k, fewer than m.

    Returns:
        Coordinates with the sign that makes their third moment positive; the same from run to run.

    Raises:
        TypeError, ValueError: not square, count out of range. ImportError: without the ``analysis`` extra.
    """
    if isinstance(correlation, Tensor):
        square("correlation", correlation)
        size = len(correlation)
        means = correlation.mean(1, dtype=torch.float64)
        trace = (correlation.diagonal().double() - means).sum().item()
        matrix = correlation if correlation.dtype == torch.float64 else correlation.float()

    def product(vector: Tensor) -> Tensor:
        if callable(correlation):
            return correlation(vector)
        with exact_products(matrix.device):
            return (matrix @ vector.to(matrix.device, matrix.dtype)).double().cpu()

    validate.integer("count", count, 1)
    if count >= size:
        raise ValueError(f"count must be less than m = {size}, got {count}")

    def centered(vector: Any) -> Any:
        vector = torch.as_tensor(vector).flatten()
        image = product(vector - vector.mean())
        return (image - image.mean()).numpy()

    sparse = needs("scipy.sparse.linalg")
    operator = sparse.LinearOperator((size, size), matvec=centered, dtype="float64")
    start = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    values, vectors = sparse.eigsh(operator, k=count, which="LA", v0=start, tol=1e-6)
    order = values.argsort()[::-1]
    eigenvalues = torch.from_numpy(values[order].copy()).clamp_min(0.0)
    found = torch.from_numpy(vectors[:, order].copy())
    found *= torch.where(found.pow(3).sum(0) < 0, -1.0, 1.0)
    total = trace if trace is not None and trace > 0 else math.nan
    return PrincipalComponents(found * eigenvalues.sqrt(), eigenvalues / total)


def pc1(correlation: Tensor) -> Tensor:
    """(m,) projections on the first principal component of HρH (paper, Figure 2 B); see :func:`principal_components`."""
    return principal_components(correlation, 1).coordinates[:, 0]


# --- scores against labels ---------------------------------------------------------------------------------------------


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: (m,).
        labels: (m,) bool, or two values of which the larger is positive.

    Raises:
        TypeError, ValueError: shapes differ, or labels do not hold two values. ImportError: without ``analysis``.
    """
    scores, labels = torch.as_tensor(scores), torch.as_tensor(labels)
    if scores.dim() != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be (m,), got {tuple(scores.shape)} and {tuple(labels.shape)}")
    values = labels.unique()
    if len(values) != 2:
        raise ValueError(f"labels must hold two values, got {len(values)}: {values.tolist()[:5]}")
    positive = (labels == values[1]).cpu().numpy()
    return float(needs("sklearn.metrics").roc_auc_score(positive, scores.double().cpu().numpy()))


def unsigned_auc(scores: Tensor, labels: Tensor) -> float:
    """max(AUC, 1 - AUC), for scores whose sign means nothing, such as a principal component (paper, Figure 2 B)."""
    area = roc_auc(scores, labels)
    return max(area, 1 - area)


def memorization_auc(variance: Tensor, initial_loss: Tensor, memorized: Tensor) -> MemorizationAUC:
    """How well the loss variance finds memorised (mislabelled) samples, with its control (paper, appendix D.3).

    Args:
        variance: (m,) variance of each sample's loss, the kernel's diagonal.
        initial_loss: (m,) losses at w*.
        memorized: (m,) bool.

    Raises:
        ValueError: shapes differ, or memorized holds one value only. ImportError: without ``analysis``.
    """
    return MemorizationAUC(roc_auc(variance, memorized), roc_auc(initial_loss, memorized))


def same_label_confound(correlation: Tensor, labels: Tensor, groups: Tensor | None = None) -> SameLabelConfound:
    """Whether samples correlate because they share a label (paper, appendix B, "Avoiding spurious correlations").

    Args:
        correlation: (m, m).
        labels: (m,) integers.
        groups: (m,) integers, for example the task: only pairs within a group count. None is one group.

    Returns:
        Mean ρ over pairs i != j of one group with the same label, and with different labels; NaN where there is none.

    Raises:
        TypeError, ValueError: shapes differ.
    """
    square("correlation", correlation)
    labels = sample_labels("labels", labels, len(correlation)).to(correlation.device)
    groups = torch.zeros_like(labels) if groups is None else sample_labels("groups", groups, len(correlation))
    groups = groups.to(correlation.device)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rows in blocks(len(correlation)):
        same = labels[rows, None] == labels
        group = groups[rows, None] == groups
        group[torch.arange(len(group)), torch.arange(len(labels))[rows]] = False
        for which, pairs in enumerate((same & group, ~same & group)):
            sums[which] += correlation[rows].double().masked_fill(~pairs, 0.0).sum().cpu()
            counts[which] += pairs.sum().cpu()
    return SameLabelConfound(*(sums / counts).tolist())


def knn_purity(neighbors: Tensor, labels: Tensor) -> float:
    """Mean share of a sample's k nearest neighbours that carry its label.

    Args:
        neighbors: (m, k) int64 indices, -1 where there is none.
        labels: (m,) integers.

    Raises:
        TypeError, ValueError: shapes differ.
    """
    labels = sample_labels("labels", labels, len(neighbor_matrix(neighbors))).to(neighbors.device)
    found = neighbors >= 0
    same = (labels[neighbors.clamp_min(0)] == labels[:, None]) & found
    return (same.sum().double() / found.sum()).item()


def taxonomic_lift(neighbors: Tensor, ancestors: Tensor, labels: Tensor | None = None) -> Tensor:
    """Lift(d | q): how much likelier than chance neighbours share a depth-d ancestor (paper, appendix D.1).

    For queries whose label has depth q: the mean share of their neighbours that have the query's ancestor at depth d,
    over the base rate, the mean share of all admissible candidates that have it.

    Args:
        neighbors: (m, k) int64 neighbours under the correlation kernel, -1 where there is none.
        ancestors: (m, D) int64: column d is the ancestor at depth d of the sample's label in the hierarchy (the root at
            0, the label itself at its depth q), -1 below it.
        labels: (m,) given when the neighbours were searched with ``exclude_same=labels``: pairs of one label then are no
            candidates for the base rate either.

    Returns:
        (D, D) fp64, [q, d]; NaN for d > q, where no sample has depth q, or where the base rate is 0.

    Raises:
        TypeError, ValueError: shapes differ, or a row of ancestors has a gap.
    """
    size = len(neighbor_matrix(neighbors))
    validate.tensors(ancestors=ancestors)
    if ancestors.dim() != 2 or len(ancestors) != size or ancestors.is_floating_point():
        raise ValueError(f"ancestors must be integer, (m, depths) with m = {size}, got {validate.describe(ancestors)}")
    ancestors = ancestors.to(neighbors.device)
    known = ancestors >= 0
    if not known[:, 0].all() or (known[:, 1:] & ~known[:, :-1]).any():
        raise ValueError(
            "ancestors: each row must hold the ancestors from the root at depth 0 on, and -1 after the last"
        )
    if labels is not None:
        labels = sample_labels("labels", labels, size).to(neighbors.device)
    depth, found, depths = known.sum(1) - 1, neighbors >= 0, ancestors.shape[1]
    lift = torch.full((depths, depths), math.nan, dtype=torch.float64)
    for d in range(depths):
        mine = ancestors[:, d]
        hits = (mine[neighbors.clamp_min(0)] == mine[:, None]) & found
        share = hits.sum(1).double() / found.sum(1)
        candidates, sharing = torch.full_like(mine, size - 1), population(mine) - 1
        if labels is not None:
            candidates = candidates - (population(labels) - 1)
            sharing = sharing - (population(labels * (int(mine.max()) + 2) + mine + 1) - 1)
        base = sharing.double() / candidates
        for q in range(d, depths):
            query = (depth == q) & found.any(1)
            if query.any() and base[query].mean() > 0:
                lift[q, d] = share[query].mean() / base[query].mean()
    return lift


def population(values: Tensor) -> Tensor:
    """For each entry, how many entries are equal to it."""
    counts: Tensor
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return counts[inverse]


# --- singular learning theory ------------------------------------------------------------------------------------------


def empirical_variance(variance: Tensor, num_train: int | None = None) -> float:
    """V_n = Σ_i Var ℓ_i over the training set, the trace of its kernel (paper, appendix A.1).

    Args:
        variance: (m,) loss variances.
        num_train: n, when the m samples are drawn from a training set of n: the sum is scaled by n/m. None means they are
            the training set.
    """
    return variance.double().sum().item() * (1.0 if num_train is None else num_train / len(variance))


def singular_fluctuation(variance: Tensor, beta: float, num_train: int | None = None) -> float:
    """ν̂ = (β/2) V_n (Watanabe 2009; paper, appendix A.1), β the inverse temperature (nβ over n).

    Args:
        variance, num_train: as in :func:`empirical_variance`.
        beta: β.
    """
    return beta / 2 * empirical_variance(variance, num_train)


Loss = TypeVar("Loss", float, Tensor)


def excess_loss(mean_loss: Loss, initial_loss: float) -> Loss:
    """E[L_n(w)] - L_n(w*): how far above the trained weights the probe lies, in the unit of the losses.

    Args:
        mean_loss: L_n, the mean over the samples, averaged over draws; a tensor where there are several averages.
        initial_loss: L_n(w*).
    """
    return mean_loss - initial_loss


def llc(mean_loss: float, initial_loss: float, nbeta: float) -> float:
    """Local learning coefficient λ̂ = nβ (E[L_n] - L_n(w*)) (Lau, Eq. for the WBIC-based estimator).

    Args:
        mean_loss: L_n averaged over the draws.
        initial_loss: L_n(w*).
        nbeta: nβ of the probe.
    """
    return nbeta * excess_loss(mean_loss, initial_loss)


def bif(losses: Tensor, query: Tensor) -> Tensor:
    """Bayesian influence of each sample on each query: -Cov(ℓ_i, φ) over the draws (paper, appendix A.2).

    Args:
        losses: (T, m) losses, draw by draw.
        query: (T,) or (T, q) observables at the same draws.

    Returns:
        (m,) or (m, q) fp64, with the divisor T - 1. Negative: giving the sample more weight lowers E[φ].

    Raises:
        TypeError, ValueError: not the same draws, or fewer than two.
    """
    validate.tensors(losses=losses, query=query)
    if losses.dim() != 2 or query.dim() not in (1, 2) or len(losses) != len(query) or len(losses) < 2:
        raise ValueError(
            f"losses must be (T, m) and query (T,) or (T, q) with the same T >= 2,"
            f" got {validate.describe(losses)} and {validate.describe(query)}"
        )
    a = losses.double() - losses.mean(0, dtype=torch.float64)
    b = query.to(losses.device, torch.float64)
    b = b - b.mean(0)
    return -(a.T @ b) / (len(losses) - 1)


# --- arguments ---------------------------------------------------------------------------------------------------------


def blocks(size: int) -> list[slice]:
    """Row slices of a (size, size) matrix of at most BLOCK elements each."""
    step = max(1, BLOCK // max(size, 1))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def square(name: str, matrix: Tensor) -> None:
    """A floating (m, m) matrix."""
    validate.tensors(**{name: matrix})
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise ValueError(f"{name} must be a floating (m, m) matrix, got {validate.describe(matrix)}")


def neighbor_matrix(neighbors: Tensor) -> Tensor:
    """(m, k) int64 indices."""
    validate.tensors(neighbors=neighbors)
    if neighbors.dim() != 2 or neighbors.dtype != torch.int64:
        raise ValueError(f"neighbors must be (m, k) int64, got {validate.describe(neighbors)}")
    return neighbors


def sample_labels(name: str, labels: Any, size: int) -> Tensor:
    """(m,) int64 labels."""
    given = torch.as_tensor(labels)
    if given.shape != (size,) or given.is_floating_point():
        raise ValueError(f"{name} must be integers of shape ({size},), one a sample, got {validate.describe(given)}")
    return given.long()
