"""k nearest samples by correlation, without the m x m matrix: tiles of products, a running best k, an exact finish.

Tiles propose a few candidates more than k in fp32; their distances are then formed by direct differences in fp64, so that
neither the tiles nor the backend nor how the rows were shared out can be seen in the result (but for correlations that
differ by less than fp32 resolves, at the k-th place, in numbers beyond ``SPARE``).

A candidate is one int64 key, the score's bits above and the complement of its index below: larger keys are better, and
of equal scores the lower index wins. Columns come in ascending order, so a later one must be strictly better to enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.extras import needs
from harmonic_triton._common.precision import exact_products

SPARE = 4  # candidates beyond k
PANEL = {"cpu": 1024, "cuda": 8192}  # samples along a side of a tile of the PyTorch search
ROW_PANEL = 32768  # samples whose best k one launch of the Triton search looks for
COLUMN_BYTES = 2**30  # of traces that it is given at a time
ALIGNMENT = 16  # values: rows of memory begin at multiples of it, for wide loads
FINISH = 16384  # rows whose distances are formed at a time
SAMPLE = 256  # members of a tile that give the first threshold
LARGEST_TRITON_K = 64 - SPARE  # of keys that its registers hold


class Search(NamedTuple):
    """What is searched: every column is a sample, and a score is the product of two standardised columns."""

    traces: Tensor  # (T, m) as stored, perhaps memory-mapped
    mean: Tensor  # (m,) fp64, on the device of the search
    scale: Tensor  # (m,) fp64, 1/sqrt(sum of squares about the mean), 0 for a constant sample
    labels: Tensor | None  # (m,) int32: equal ones are no neighbours

    @property
    def device(self) -> torch.device:
        return self.mean.device


def with_bar(work: Callable[[Callable[[int, int], None]], Any]) -> Any:
    """Run ``work(report)`` under a progress bar."""
    tqdm = needs("tqdm", "progress=True").tqdm
    with tqdm(unit="tile", desc="neighbours") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return work(report)


def checked_labels(labels: Tensor | Sequence[int], num_samples: int) -> Tensor:
    """(m,) int32, equal where the labels are."""
    given = torch.as_tensor(labels)
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"exclude_same must hold integer labels, got {validate.describe(given)}")
    if given.shape != (num_samples,):
        raise ValueError(
            f"exclude_same must hold a label for each of the m = {num_samples} samples, got shape {tuple(given.shape)}"
        )
    groups: Tensor = given.unique(return_inverse=True)[1]
    return groups.int()


def search(
    searched: Search, k: int, rows: range, backend: str, progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Tensor]:
    """(indices (rows, k) int64, distances (rows, k) fp32), nearest first; -1 and infinity where there are fewer."""
    candidates = k + SPARE
    if backend == "triton":
        keys = _triton_keys(searched, candidates, rows, progress)
    else:
        keys = torch_keys(searched, candidates, rows, progress)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=searched.device)
    distances = torch.empty(len(rows), k, dtype=torch.float32, device=searched.device)
    for start in range(0, len(rows), FINISH):
        at = slice(start, min(start + FINISH, len(rows)))
        indices[at], distances[at] = _finish(searched, rows[at], keys[at], k)
    return indices, distances


def pack(score: Tensor, index: Tensor) -> Tensor:
    """Keys of fp32 scores and int64 indices below 2^32."""
    bits = torch.where(score == 0, 0.0, score).view(torch.int32)  # no negative zero
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0xFFFFFFFF - index)


def unpack_score(key: Tensor) -> Tensor:
    """The score of a key, fp32."""
    bits = (key >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def unpack_index(key: Tensor) -> Tensor:
    """The index of a key, int64."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


def empty_keys(rows: int, width: int, device: torch.device) -> Tensor:
    """(rows, width) keys of score -infinity, no two of a row the same."""
    score = torch.full((width,), -math.inf, dtype=torch.float32, device=device)
    return pack(score, torch.arange(width, device=device)).repeat(rows, 1)


def torch_keys(searched: Search, width: int, rows: range, progress: Callable[[int, int], None] | None) -> Tensor:
    """(rows, width) keys. Every tile among the rows themselves serves its rows and its columns."""
    keys = empty_keys(len(rows), width, searched.device)
    samples, side = searched.traces.shape[1], PANEL.get(searched.device.type, PANEL["cuda"])
    inside, below, above = (_panels(part, side) for part in (rows, range(rows.start), range(rows.stop, samples)))
    work = [(i, j) for i in inside for j in below]
    work += [(i, j) for i in inside for j in inside if i.start <= j.start]
    work += [(i, j) for i in inside for j in above]
    held, left = range(0), torch.empty(0)
    with exact_products(searched.device):
        for done, (i, j) in enumerate(work, 1):
            if i != held:
                held, left = i, _standardized(searched, i)
            right = left if i == j else _standardized(searched, j)
            tile = left.t() @ right
            if i == j:
                tile.fill_diagonal_(-math.inf)
            allowed = None if searched.labels is None else _differ(searched.labels, i, j)
            _take(keys[i.start - rows.start : i.stop - rows.start], tile, allowed, 0, j.start)
            if i != j and j.start in rows:
                _take(keys[j.start - rows.start : j.stop - rows.start], tile, allowed, 1, i.start)
            if progress is not None:
                progress(done, len(work))
    return keys


def _panels(samples: range, side: int) -> list[range]:
    return [samples[start : start + side] for start in range(0, len(samples), side)]


def _standardized(searched: Search, panel: range) -> Tensor:
    """Columns of mean 0 and norm 1 (0 for a constant sample), (T, panel) fp32."""
    at = slice(panel.start, panel.stop)
    values = searched.traces[:, at].to(searched.device, torch.float32) - searched.mean[at].float()
    return values.mul_(searched.scale[at].float())


def _differ(labels: Tensor, i: range, j: range) -> Tensor:
    return labels[i.start : i.stop, None] != labels[j.start : j.stop]


def _take(keys: Tensor, tile: Tensor, allowed: Tensor | None, dim: int, first: int) -> None:
    """Enter what of the tile is better into ``keys`` (owners, width), each row best first.

    Owners lie along ``dim`` of the tile, and along the other one the samples from number ``first`` on.
    """
    width = keys.shape[1]
    better = tile > unpack_score(keys[:, -1]).unsqueeze(1 - dim)
    if allowed is not None:
        better &= allowed
    positions = _positions(better)
    if len(positions) > 8 * keys.numel():  # the first tiles: as many of a few others give a threshold to begin with
        few = max(SAMPLE, 4 * width)
        part = tile[:, :few] if dim == 0 else tile[:few].t()
        if allowed is not None:
            part = part.where(allowed[:, :few] if dim == 0 else allowed[:few].t(), -math.inf)
        if part.shape[1] >= width:
            better &= tile >= part.topk(width).values[:, -1].unsqueeze(1 - dim)
            positions = _positions(better)
    if not len(positions):
        return
    place = (positions // tile.shape[1], positions % tile.shape[1])
    owner, other = place[dim], place[1 - dim]
    found = pack(tile.flatten()[positions], first + other)
    owner, order = owner.sort(stable=True)
    touched, member, counts = owner.unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(len(owner), device=keys.device) - (counts.cumsum(0) - counts)[member]
    room = keys.new_full((len(touched), width + int(counts.max())), torch.iinfo(torch.int64).min)
    room[:, :width] = keys[touched]
    room[member, width + rank] = found[order]
    keys[touched] = room.topk(width).values


def _positions(mask: Tensor) -> Tensor:
    """Where a mask is true, flat and ascending; NumPy's search is eight times as fast as PyTorch's on the CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def _triton_keys(searched: Search, width: int, rows: range, progress: Callable[[int, int], None] | None) -> Tensor:
    """(rows, width') keys in no order, width' >= width. A program owns its rows, so nothing is shared by symmetry."""
    from harmonic_triton.losskernel.traces import neighbors_triton

    draws, samples = searched.traces.shape
    keys = empty_keys(len(rows), neighbors_triton.width_of(width), searched.device)
    # Products of raw values: those of tiny losses would vanish, so each sample is first brought near a spread of 1.
    power = torch.exp2((searched.scale * math.sqrt(draws)).log2().round().nan_to_num(neginf=0.0))
    scale = (searched.scale / power).float()
    mean = (searched.mean * searched.scale * math.sqrt(draws)).float()

    def loaded(panel: range) -> Tensor:
        """Columns of the traces times powers of two, (T, panel) on the device, rows of memory aligned."""
        columns, factor = (part[..., panel.start : panel.stop] for part in (searched.traces, power))
        room = columns.new_empty(draws, -(-len(panel) // ALIGNMENT) * ALIGNMENT, device=searched.device)
        return torch.mul(columns.to(searched.device), factor.to(columns.dtype), out=room[:, : len(panel)])

    side = max(1, COLUMN_BYTES // (draws * searched.traces.element_size()))
    work = [(i, j) for i in _panels(rows, ROW_PANEL) for j in _panels(range(samples), side)]
    held, left = range(0), torch.empty(0)
    for done, (i, j) in enumerate(work, 1):
        if i != held:
            held, left = i, loaded(i)
        at = slice(i.start - rows.start, i.stop - rows.start)
        neighbors_triton.take(keys[at], left, loaded(j), i.start, j.start, scale, mean, searched.labels)
        if progress is not None:
            progress(done, len(work))
    return keys


def _finish(searched: Search, rows: range, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest among the candidates, by sqrt(2(1 - rho)) from direct differences in fp64.

    Draws are added one after the other: what a pair gets depends on nothing but the pair.
    """
    samples = searched.traces.shape[1]
    empty = unpack_score(keys) == -math.inf
    index = torch.where(empty, 0, unpack_index(keys))
    here = slice(rows.start, rows.stop)
    shift, stretch = searched.mean[index], searched.scale[index]
    squares = torch.zeros(index.shape, dtype=torch.float64, device=searched.device)
    for draw in searched.traces:
        draw = draw.to(searched.device)
        values = ((draw[here].double() - searched.mean[here]) * searched.scale[here]).unsqueeze(1)
        apart = draw[index].double().sub_(shift).mul_(stretch).sub_(values)
        squares.addcmul_(apart, apart)
    constant = (stretch == 0) | (searched.scale[here] == 0).unsqueeze(1)
    squares.masked_fill_(constant, 2.0).masked_fill_(empty, math.inf)
    index.masked_fill_(empty, samples)
    index, order = index.sort(1)
    squares, nearest = squares.gather(1, order).sort(dim=1, stable=True)
    squares, index = squares[:, :k], index.gather(1, nearest)[:, :k]
    return index.masked_fill(index == samples, -1), squares.sqrt().float()
