"""``python -m benchmarks.covariance``: covariance of losses over draws, time, peak memory and accuracy beside the peers.

Every method turns the same (T, m) float32 losses, near 2 with a spread of 0.05, into their (m, m) correlation; those
that stream do it in two steps, the second moment (a triangle of it, or all) and what follows to the correlation. Each
runs in a process of its own, with no other beside it; times are medians over repeats after one at a smaller size, in
rounds over all methods. Peak memory is the high-water mark of the resident set beyond the inputs during the first
full-size call (on a GPU: of the caching allocator), the result included.

Rows that cannot run here say why. devinterp needs older packages: name the Python of an environment that has it by
``--devinterp-python``. Results go to ``benchmarks/results`` as JSON lines and a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.memory import NoMemoryFigureError, peak_beyond
from benchmarks.runs import RESULTS

ROOT = Path(__file__).resolve().parent.parent
CENTRE, SPREAD = 2.0, 0.05
WARM_UP = 256  # samples and draws of the call before the measured ones
WORKER_SECONDS = 1800
Steps = Callable[[np.ndarray], tuple[float, float, Any]]  # losses -> seconds to the second moment, in all, correlation


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    method: str
    samples: int
    draws: int
    buffer: int
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
    common += CENTRE
    return common


# --- methods on a CPU ----------------------------------------------------------------------------------------------------


def ours(losses: np.ndarray, buffer: int, backend: str = "torch") -> tuple[float, float, Any]:
    from harmonic_triton.losskernel.covariance.streaming import StreamingCovariance

    start = time.perf_counter()
    accumulator = StreamingCovariance(losses.shape[1], buffer_size=buffer, backend=backend)
    for rows in torch.from_numpy(losses).split(buffer):
        accumulator.update(rows)
    accumulator._flush()  # the last draws too: the peers' second moments hold them
    middle = time.perf_counter()
    rho = accumulator.correlation()
    return middle - start, time.perf_counter() - start, rho


def ours_panels(losses: np.ndarray, buffer: int) -> tuple[float, float, Any]:
    """Without SciPy."""
    from harmonic_triton.losskernel.covariance import triangle

    triangle._packed_update = lambda: (None, "left out for this row")  # type: ignore[assignment]
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
    centre = (total / draws**0.5).float()
    moment.addr_(centre, centre, alpha=-1)
    inverse = moment.diagonal().rsqrt()
    moment.mul_(inverse).mul_(inverse[:, None])
    return time.perf_counter() - start


def _mirror(upper: torch.Tensor, side: int = 256) -> None:
    """The upper triangle into the lower one."""
    for i in range(0, len(upper), side):
        block = upper[i : i + side, i : i + side]
        block.copy_(block.triu() + block.triu(1).T)
        upper[i + side :, i : i + side] = upper[i : i + side, i + side :].T


METHODS: dict[str, Callable[[np.ndarray, int], tuple[float, float, Any]]] = {
    "ours": ours,
    "ours_panels": ours_panels,
    "scipy_ssyrk": scipy_ssyrk,
    "torch_addmm": torch_addmm,
    "torch_tiles": torch_tiles,
    "torch_corrcoef": torch_corrcoef,
    "np_corrcoef": np_corrcoef,
    "devinterp": devinterp,
}
SAYS = {
    "ours": "StreamingCovariance, one triangle by LAPACK's sfrk",
    "ours_panels": "StreamingCovariance without SciPy: panels by torch",
    "scipy_ssyrk": "scipy ssyrk, streaming, one triangle",
    "torch_addmm": "torch addmm_, streaming, all of it",
    "torch_tiles": "torch, lower tiles of addmm_, streaming",
    "torch_corrcoef": "torch.corrcoef, all traces at once",
    "np_corrcoef": "np.corrcoef(dtype=float32), all traces at once",
    "devinterp": "devinterp, compute_bif of sequences",
}


@dataclass(frozen=True)
class Target:
    """One line that the project set itself."""

    says: str
    ours: str  # "second_moment" | "correlation" | "memory"
    other: str
    method: str
    limit: float

    def judge(self, records: dict[str, dict[str, Any]]) -> str:
        mine, peer = records.get("ours"), records.get(self.method)
        for name, record in (("ours", mine), (self.method, peer)):
            if record is None or record["status"] != "ok":
                why = "was not in this run" if record is None else f"{record['status']}: {record['reason']}"
                return f"NOT MEASURED  {self.says}: {name} {why}"
        a, b = _figure(mine, self.ours), _figure(peer, self.other)
        if not a or not b:
            return f"NOT MEASURED  {self.says}: no figure"
        return f"{'PASS' if a / b <= self.limit else 'FAIL'}  {self.says}: {a / b:.3f} (wanted <= {self.limit:.4g})"


TARGETS = (
    Target("time to the second moment, ours / scipy ssyrk", "second_moment", "second_moment", "scipy_ssyrk", 1.1),
    Target("time to the correlation, ours / scipy ssyrk", "correlation", "correlation", "scipy_ssyrk", 1.1),
    Target("time to the second moment, ours / torch addmm_", "second_moment", "second_moment", "torch_addmm", 0.55),
    Target("time to the correlation, ours / devinterp", "correlation", "correlation", "devinterp", 1 / 8),
    Target("peak memory, ours / devinterp", "memory", "memory", "devinterp", 1 / 8),
)


def _figure(record: dict[str, Any] | None, which: str) -> float | None:
    if record is None:
        return None
    if which == "memory":
        return record["memory_bytes"]
    return statistics.median(record["seconds"][which]) if record["seconds"] else None


# --- one method, in a process of its own ---------------------------------------------------------------------------------


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


def in_fresh_process(job: Job, python: str) -> tuple[dict[str, Any] | None, str | None]:
    """(answer, None), or (None, why not)."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    try:
        done = subprocess.run(
            [python, "-W", "ignore", "-m", "benchmarks.covariance", "--worker", json.dumps(asdict(job))],
            capture_output=True, text=True, timeout=WORKER_SECONDS, cwd=ROOT,
            env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"it took longer than {WORKER_SECONDS} s"
    except OSError as error:
        return None, f"{python} does not run: {error}"
    if done.returncode:
        why = "killed by a signal" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None, f"exit status {done.returncode}: {why}"
    return json.loads(done.stdout.splitlines()[-1]), None


def _python_for(method: str, devinterp_python: str | None) -> tuple[str, str | None]:
    """(interpreter, None), or (it, why the method cannot run)."""
    if method == "devinterp":
        if devinterp_python is not None:
            return devinterp_python, None
        if importlib.util.find_spec("devinterp") is None:
            return sys.executable, "devinterp is not installed here; name an environment by --devinterp-python"
    if method in ("ours", "scipy_ssyrk") and importlib.util.find_spec("scipy") is None:
        return sys.executable, "SciPy is not installed"
    return sys.executable, None


def measure_cpu(options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Memory of each method, then times in rounds."""
    records = {}
    for method in options.method:
        python, reason = _python_for(method, options.devinterp_python)
        record: dict[str, Any] = {
            "kind": "covariance", "method": method, "says": SAYS[method], "status": "ok", "reason": None,
            "samples": options.samples, "draws": options.draws, "buffer": options.buffer, "python": python,
            "memory_bytes": None, "seconds": {"second_moment": [], "correlation": []}, "error": None,
        }  # fmt: skip
        records[method] = record
        if reason is not None:
            record.update(status="skipped", reason=reason)
        else:
            _into(record, options, say, memory=True)
    for _ in range(options.rounds):
        for record in records.values():
            if record["status"] == "ok":
                _into(record, options, say, memory=False)
    for record in records.values():
        record["python"] = "its own environment" if record["python"] != sys.executable else "this one"
    return list(records.values())


def _into(record: dict[str, Any], options: argparse.Namespace, say: Callable[[str], None], memory: bool) -> None:
    job = Job(
        record["method"], options.samples, options.draws, options.buffer, options.threads, options.repeats, memory
    )
    answer, reason = in_fresh_process(job, record["python"])
    if answer is None:
        record.update(status="failed", reason=reason)
        say(f"{job.method}: failed: {reason}")
    elif memory:
        record.update(answer)
        say(f"{job.method}: peak {(answer['memory_bytes'] or 0) / 2**30:.3f} GiB beyond the losses")
    else:
        for step, seconds in record["seconds"].items():
            seconds.extend(answer[step])
        record["error"] = answer["error"]
        shown = ", ".join(f"{one:.3f}" for one in answer["correlation"])
        say(f"{job.method}: {min(answer['second_moment']):.3f} s to the second moment; to the correlation {shown} s")


# --- on a GPU ------------------------------------------------------------------------------------------------------------


def measure_gpu(samples: int, k: int, repeats: int) -> list[dict[str, Any]]:
    """One rank-k update of m = ``samples``: torch.addmm_ in fp32 beside the Triton triangle in its precisions.

    ``of_limit`` is the rate over that of the same device's own products: a square fp32 product of PyTorch's for "ieee",
    a bf16 one over the number of split products else.
    """
    from harmonic_triton.losskernel.covariance.rank_k_triton import GAP, PARTS, rank_k_
    from harmonic_triton.losskernel.covariance.triangle import Triangle

    device = torch.device("cuda")
    x = torch.randn(k, samples, device=device)
    shift = torch.zeros(samples, device=device)
    wanted = x[:, :64].double().T @ x[:, :64].double()

    def timed(call: Callable[[], object]) -> list[float]:
        call()
        seconds = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        return seconds

    side = 8192
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        rates[dtype] = 2 * side**3 / statistics.median(timed(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    records = []

    def record(method: str, says: str, seconds: list[float], error: float, limit: float | None) -> None:
        rate = samples**2 * k / statistics.median(seconds)  # of the triangle's own multiplications and additions
        records.append({
            "kind": "update", "method": method, "says": says, "status": "ok", "reason": None, "samples": samples, "k": k,
            "seconds": {"update": seconds}, "error": error, "of_limit": None if limit is None else rate / limit,
        })  # fmt: skip

    record("torch_addmm", "torch addmm_, all of it", *_dense_update(x, wanted, timed), None)
    for precision, parts in PARTS.items():
        triangle = Triangle(samples, gap=GAP, dtype=torch.float32, device=device)
        rank_k_(triangle, x, shift, precision)
        found = torch.stack([torch.cat([wanted[:j, j].float(), triangle.column(j)[: 64 - j]]) for j in range(64)], 1)
        error = float((found - wanted).abs().max() / k)
        seconds = timed(lambda p=precision, t=triangle: rank_k_(t, x, shift, p))  # type: ignore[misc]
        limit = rates[torch.float32] if parts == 1 else rates[torch.bfloat16] / {2: 3, 3: 6}[parts]
        record(f"ours_{precision}", f"Triton rank-k update of the triangle, {precision}", seconds, error, limit)
    return records


def _dense_update(
    x: torch.Tensor, wanted: torch.Tensor, timed: Callable[[Callable[[], object]], list[float]]
) -> tuple[list[float], float]:
    """Seconds of the whole product by addmm_ and its error; its memory is free again afterwards."""
    moment = x.new_zeros(x.shape[1], x.shape[1])
    seconds = timed(lambda: moment.addmm_(x.T, x))
    moment.zero_().addmm_(x.T, x)
    return seconds, float((moment[: len(wanted), : len(wanted)] - wanted).abs().max() / len(x))


def _gpu_verdicts(records: list[dict[str, Any]]) -> list[str]:
    by_name = {record["method"]: record for record in records}
    peer, mine = (statistics.median(by_name[name]["seconds"]["update"]) for name in ("torch_addmm", "ours_split"))
    share = by_name["ours_split"]["of_limit"]
    return [
        f"{'PASS' if peer / mine >= 1.8 else 'FAIL'}  speed of the update, ours (split) / torch addmm_: {peer / mine:.2f}"
        " (wanted >= 1.8)",
        f"{'PASS' if share >= 0.7 else 'FAIL'}  share of the split products' limit: {share:.2f} (wanted >= 0.7)",
    ]


# --- results -------------------------------------------------------------------------------------------------------------


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The CPU rows as Markdown."""
    lines = [
        "| method | s to the second moment | s to the correlation | peak beyond the losses, GiB | max error of rho |",
        "|---|---:|---:|---:|---:|",
    ]
    for record in records:
        if record["status"] != "ok":
            lines.append(f"| {record['says']} | {record['status']}: {record['reason']} | | | |")
            continue
        streams = record["seconds"]["second_moment"] != record["seconds"]["correlation"]
        moment = f"{_figure(record, 'second_moment'):.2f}" if streams else ""
        memory = "" if record["memory_bytes"] is None else f"{record['memory_bytes'] / 2**30:.2f}"
        lines.append(
            f"| {record['says']} | {moment} | {_figure(record, 'correlation'):.2f} | {memory} | {record['error']:.1e} |"
        )
    return lines


def gpu_table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The GPU rows as Markdown."""
    lines = ["| update | ms | share of the limit | max error / k |", "|---|---:|---:|---:|"]
    for record in records:
        share = "" if record["of_limit"] is None else f"{record['of_limit']:.2f}"
        milliseconds = 1e3 * statistics.median(record["seconds"]["update"])
        lines.append(f"| {record['says']} | {milliseconds:.2f} | {share} | {record['error']:.1e} |")
    return lines


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.covariance", description=(__doc__ or "").splitlines()[0])
    parse.add_argument("--samples", type=int, default=10_000, help="m (10000)")
    parse.add_argument("--draws", type=int, default=2_000, help="T (2000)")
    parse.add_argument("--buffer", type=int, default=512, help="draws in an update (512)")
    parse.add_argument("--method", action="append", choices=METHODS, help="only this one (can be repeated)")
    parse.add_argument("--repeats", type=int, default=3, help="calls in one process (3)")
    parse.add_argument("--rounds", type=int, default=2, help="processes of each method (2)")
    parse.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every library")
    parse.add_argument("--devinterp-python", metavar="PATH", help="Python of an environment with devinterp")
    parse.add_argument("--gpu-samples", type=int, default=20_000, help="m of the update on a GPU (20000)")
    parse.add_argument("--output", type=Path, default=RESULTS, help="folder for the results (benchmarks/results)")
    parse.add_argument("--worker", help=argparse.SUPPRESS)
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results and print the table."""
    options = parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(work(Job(**json.loads(options.worker)))))
        return 0
    options.method = options.method or list(METHODS)
    header = describe("cuda" if torch.cuda.is_available() else "cpu") | {"threads": options.threads}
    records = measure_cpu(options, lambda line: print(line, file=sys.stderr, flush=True))
    lines = [
        f"# Covariance of {options.samples} losses over {options.draws} draws",
        "",
        f"{header['cpu']}, {header['cores']} cores, {options.threads} threads, load {header['load_before']} before; torch"
        f" {header['torch']}, Python {header['python']}, commit {(header['commit'] or 'unknown')[:12]}; medians of"
        f" {options.rounds} x {options.repeats} calls, k = {options.buffer}.",
        "",
        *table(records),
        "",
        *(f"    {target.judge({record['method']: record for record in records})}" for target in TARGETS),
        "",
    ]
    if torch.cuda.is_available():
        updates = measure_gpu(options.gpu_samples, options.buffer, 10)
        records += updates
        lines += [f"One update of m = {options.gpu_samples} on {header['gpu']}:", "", *gpu_table(updates), ""]
        lines += [f"    {verdict}" for verdict in _gpu_verdicts(updates)]
    else:
        reason = "no GPU here; not measured on a GPU"
        records.append({"kind": "update", "method": "gpu", "status": "skipped", "reason": reason})
        lines.append(f"Update of m = {options.gpu_samples}, k = {options.buffer} on a GPU: skipped: {reason}.")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{stamp}-covariance-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    rows = [{"kind": "covariance run", **header}, *records]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
