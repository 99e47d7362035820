"""Coordinates of samples in the plane, for pictures."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from harmonic_triton._common.extras import needs


def umap_layout(indices: Tensor, distances: Tensor, start: Tensor, min_dist: float, seed: int) -> Tensor:
    """UMAP (McInnes et al. 2018) of a nearest-neighbour graph, by umap-learn.

    Args:
        indices, distances: (m, k) without the samples themselves, -1 where there is none.
        start: (m, d) coordinates to begin with.

    Returns:
        (m, d) fp32.
    """
    threads = torch.get_num_threads()  # numba sets OpenMP's, and with them torch's
    umap = needs("umap")
    size, device = len(indices), indices.device
    itself = torch.arange(size, device=device)[:, None]  # umap-learn counts a sample as its own first neighbour
    graph = torch.cat([itself, indices], 1).cpu().numpy()
    lengths = (
        torch.cat([torch.zeros(size, 1, dtype=torch.float32, device=device), distances.clamp_max(2.0)], 1)
        .float()
        .cpu()
        .numpy()
    )
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
    torch.set_num_threads(threads)
    return torch.from_numpy(layout)
