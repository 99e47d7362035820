"""The methods of the covariance suite, and the process that measures one of them.

Each takes (draws, samples) float32 losses and the draws of an update, and gives the seconds to the second moment, the
seconds in all, and the correlation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import workers
from harmonic_triton.tools.memory import NoMemoryFigureError, peak_beyond

CENTER, SPREAD = 2.0, 0.05
WARM_UP = 256  # samples and draws of the call before the measured ones
Method = Callable[[np.ndarray, int], tuple[float, float, Any]]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    method: str
    samples: int
    draws: int
    buffer: int  # draws in an update
    threads: int
    repeats: int
    memory: bool


def make_losses(samples: int, draws: int) -> np.ndarray:
    """(draws, samples) float32; 16 common factors, so that correlations are not all noise."""
    generator = np.random.default_rng(0)
    common = generator.standard_normal((draws, 16), dtype=np.float32) @ (
        0.15 * generator.standard_normal((16, samples), dtype=np.float32)
    )
    common += generator.standard_normal((draws, samples), dtype=np.float32)
    common *= SPREAD
    common += CENTER
    return common


# --- methods on a CPU ----------------------------------------------------------------------------------------------------


def ours(losses: np.ndarray, buffer: int, backend: str = "torch") -> tuple[float, float, Any]:
    from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance

    start = time.perf_counter()
    accumulator = StreamingCovariance(losses.shape[1], buffer_size=buffer, backend=backend)
    for rows in torch.from_numpy(losses).split(buffer):
        accumulator.update(rows)
    accumulator.variance()  # the last draws leave the buffer: the peers' second moments hold them too
    middle = time.perf_counter()
    rho = accumulator.correlation()
    return middle - start, time.perf_counter() - start, rho


def ours_panels(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """As where SciPy is not installed: in this process, which has not imported it."""
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment]
    return ours(losses, buffer)


def scipy_ssyrk(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """The same shift, one triangle by BLAS, float64 sums."""
    from scipy.linalg import blas

    start = time.perf_counter()
    draws, m = losses.shape
    moment = np.zeros((m, m), np.float32, order="F")
    shift, total = losses[:buffer].mean(0), np.zeros(m)
    for first in range(0, draws, buffer):
        rows = losses[first : first + buffer] - shift
        total += rows.sum(0, dtype=np.float64)
        moment = blas.ssyrk(1.0, rows.T, beta=1.0, c=moment, overwrite_c=1, lower=1)
    middle = time.perf_counter()
    moment = blas.ssyr(-1.0, (total / np.sqrt(draws)).astype(np.float32), a=moment, overwrite_a=1, lower=1)
    inverse = (1.0 / np.sqrt(moment.diagonal())).astype(np.float32)
    moment *= inverse
    moment *= inverse[:, None]
    _mirror(torch.from_numpy(moment.T))
    return middle - start, time.perf_counter() - start, moment


def torch_addmm(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """The whole second moment."""
    start = time.perf_counter()
    x = torch.from_numpy(losses)
    moment, shift, total = _begin(x, buffer)
    for rows in x.split(buffer):
        rows = rows - shift
        total += rows.sum(0, dtype=torch.float64)
        moment.addmm_(rows.T, rows)
    middle = time.perf_counter()
    return middle - start, _finish(moment, total, len(x), start), moment


def torch_tiles(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """The lower triangle in tiles of 1000 rows and columns."""
    start = time.perf_counter()
    x, side = torch.from_numpy(losses), 1000
    moment, shift, total = _begin(x, buffer)
    for rows in x.split(buffer):
        rows = rows - shift
        total += rows.sum(0, dtype=torch.float64)
        for i in range(0, x.shape[1], side):
            for j in range(0, i + 1, side):
                moment[i : i + side, j : j + side].addmm_(rows[:, i : i + side].T, rows[:, j : j + side])
    middle = time.perf_counter()
    _mirror(moment.T)
    return middle - start, _finish(moment, total, len(x), start), moment


def torch_corrcoef(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    start = time.perf_counter()
    rho = torch.corrcoef(torch.from_numpy(losses).T)
    seconds = time.perf_counter() - start
    return seconds, seconds, rho


def np_corrcoef(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    start = time.perf_counter()
    rho = np.corrcoef(losses.T, dtype=np.float32)
    seconds = time.perf_counter() - start
    return seconds, seconds, rho


def devinterp(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """compute_bif on a data tree as its sampler leaves it: sequences of one token, one chain."""
    import xarray as xr
    from devinterp.slt.bif import compute_bif

    data = {
        "loss_x": (("chain", "draw", "batch", "target_position"), losses[None, :, :, None]),
        "input_ids_x": (("batch", "position"), np.zeros((losses.shape[1], 2), np.int64)),
    }
    tree = xr.DataTree(xr.Dataset(data))
    start = time.perf_counter()
    found = compute_bif(tree, correlation_method="sequence", device="cpu")
    seconds = time.perf_counter() - start
    return seconds, seconds, found.influences.values


def _begin(x: torch.Tensor, buffer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m = x.shape[1]
    return torch.zeros(m, m), x[:buffer].mean(0), torch.zeros(m, dtype=torch.float64)


def _finish(moment: torch.Tensor, total: torch.Tensor, draws: int, start: float) -> float:
    """Second moment -> correlation, in place; seconds since ``start``."""
    center = (total / draws**0.5).float()
    moment.addr_(center, center, alpha=-1)
    inverse = moment.diagonal().rsqrt()
    moment.mul_(inverse).mul_(inverse[:, None])
    return time.perf_counter() - start


def _mirror(upper: torch.Tensor, side: int = 256) -> None:
    """The upper triangle into the lower one."""
    for i in range(0, len(upper), side):
        block = upper[i : i + side, i : i + side]
        block.copy_(block.triu() + block.triu(1).T)
        upper[i + side :, i : i + side] = upper[i : i + side, i + side :].T


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours_panels": ours_panels,
    "scipy_ssyrk": scipy_ssyrk,
    "torch_addmm": torch_addmm,
    "torch_tiles": torch_tiles,
    "torch_corrcoef": torch_corrcoef,
    "np_corrcoef": np_corrcoef,
    "devinterp": devinterp,
}


# --- the process -------------------------------------------------------------------------------------------------------


def work(job: Job) -> dict[str, Any]:
    """Measure one job in this process, which has done nothing before."""
    torch.set_num_threads(job.threads)
    run = METHODS[job.method]
    run(make_losses(WARM_UP, WARM_UP), WARM_UP)
    losses = make_losses(job.samples, job.draws)
    if job.memory:
        try:
            return {"memory_bytes": peak_beyond(lambda: run(losses, job.buffer)[2])}
        except NoMemoryFigureError as error:
            return {"memory_bytes": None, "memory_reason": str(error)}
    moments, totals = [], []
    for _ in range(job.repeats):
        moment, total, rho = run(losses, job.buffer)
        moments.append(moment)
        totals.append(total)
        last = np.asarray(rho)[: min(job.samples, 300), : min(job.samples, 300)].astype(np.float64)
        del rho
    truth = np.corrcoef(losses[:, : len(last)].T.astype(np.float64))
    return {"second_moment": moments, "correlation": totals, "error": float(abs(last - truth).max())}


if __name__ == "__main__":
    workers.reply(work(Job(**workers.order())))
