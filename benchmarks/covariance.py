"""The covariance suite: covariance of losses over draws, time, peak memory and accuracy beside the peers.

Every method turns the same (T, m) float32 losses, near 2 with a spread of 0.05, into their (m, m) correlation; those
that stream do it in two steps, the second moment (a triangle of it, or all) and what follows to the correlation. Each
runs in a process of its own, with no other beside it; times are medians over repeats after one at a smaller size, in
rounds over all methods. Peak memory is the high-water mark of the resident set beyond the inputs during the first
full-size call (on a GPU: of the caching allocator), the result included.

Rows that cannot run here say why. devinterp needs older packages: name the Python of an environment that has it by
``--devinterp-python``.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from benchmarks import UsageError, workers
from benchmarks.covariance_methods import METHODS, Job
from benchmarks.machine import OtherWork
from benchmarks.report import markdown_table, verdict
from benchmarks.runs import Record, Run, blank, median, memory, ratio, summary
from benchmarks.suite import Request, Say, Suite

GPU_REPEATS = 10
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
    figure: str  # "second_moment" | "correlation" | "memory" of ours over the method's
    method: str
    limit: float

    def judge(self, records: dict[str, Record]) -> str:
        for name in ("ours", self.method):
            record = records.get(name)
            if record is None or record["status"] != "ok":
                why = "was not in this run" if record is None else f"{record['status']}: {record['reason']}"
                return f"NOT MEASURED  {self.says}: {name} {why}"
        found = ratio(*(_figure(records[name], self.figure) for name in ("ours", self.method)))
        return f"NOT MEASURED  {self.says}: no figure" if not found else verdict(self.says, found, self.limit)


TARGETS = (
    Target("time to the second moment, ours / scipy ssyrk", "second_moment", "scipy_ssyrk", 1.1),
    Target("time to the correlation, ours / scipy ssyrk", "correlation", "scipy_ssyrk", 1.1),
    Target("time to the second moment, ours / torch addmm_", "second_moment", "torch_addmm", 0.55),
    Target("time to the correlation, ours / devinterp", "correlation", "devinterp", 1 / 8),
    Target("peak memory, ours / devinterp", "memory", "devinterp", 1 / 8),
)


def _figure(record: Record, which: str) -> float | None:
    return memory(record) if which == "memory" else median(record, which)


# --- on a CPU ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    methods: list[str]
    samples: int
    draws: int
    buffer: int
    threads: int
    repeats: int  # calls in one process
    rounds: int  # processes of each method
    devinterp_python: str | None
    gpu_samples: int


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


def measure(plan: Plan, say: Say) -> Iterator[Record]:
    """The CPU's methods, then the update on a GPU where there is one."""
    yield from _measure_cpu(plan, say)
    if torch.cuda.is_available():
        yield from measure_gpu(plan.gpu_samples, plan.buffer, GPU_REPEATS)
    else:
        workload = {"step": "update", "samples": plan.gpu_samples, "draws": plan.buffer}
        yield blank("gpu", workload) | {"status": "skipped", "reason": "no GPU here; not measured on a GPU"}


def _measure_cpu(plan: Plan, say: Say) -> list[Record]:
    """Memory of each method, then times in rounds."""
    records: dict[str, Record] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    workload = {"step": "correlation", "samples": plan.samples, "draws": plan.draws, "buffer": plan.buffer}
    for method in plan.methods:
        python, reason = _python_for(method, plan.devinterp_python)
        environment = "this one" if python == sys.executable else "its own"
        record = records[method] = blank(method, workload, says=SAYS[method], environment=environment, error=None)
        if reason is not None:
            record.update(status="skipped", reason=reason)
        elif (answer := _in_fresh_process(record, plan, say, measure_memory=True)) is not None:
            record.update(answer, status="ok")
            say(f"{method}: peak {(answer['memory_bytes'] or 0) / 2**30:.3f} GiB beyond the losses")
    others = OtherWork()
    for _ in range(plan.rounds):
        for method, record in records.items():
            if record["status"] != "ok":
                continue
            answer = _in_fresh_process(record, plan, say, measure_memory=False)
            if answer is None:
                continue
            record["error"] = answer["error"]
            for step in ("second_moment", "correlation"):
                seconds.setdefault(method, {}).setdefault(step, []).extend(answer[step])
            shown = ", ".join(f"{one:.3f}" for one in answer["correlation"])
            say(f"{method}: {min(answer['second_moment']):.3f} s to the second moment; to the correlation {shown} s")
    busy = others.cores()
    for method, steps in seconds.items():
        timing = {step: summary(values) for step, values in steps.items()}
        records[method].update(seconds=timing, other_work_cores=busy)
    return list(records.values())


def _in_fresh_process(record: Record, plan: Plan, say: Say, measure_memory: bool) -> Record | None:
    method = record["baseline"]
    job = Job(method, plan.samples, plan.draws, plan.buffer, plan.threads, plan.repeats, measure_memory)
    python, _ = _python_for(method, plan.devinterp_python)
    answer, reason = workers.Worker("covariance_methods", asdict(job), plan.threads, python).answer()
    if answer is None:
        record.update(status="failed", reason=reason)
        say(f"{method}: failed: {reason}")
    return answer


# --- on a GPU ------------------------------------------------------------------------------------------------------------


def measure_gpu(samples: int, k: int, repeats: int) -> list[Record]:
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
        workload = {"step": "update", "samples": samples, "draws": k}
        share = None if limit is None else rate / limit
        figures = {"says": says, "error": error, "of_limit": share, "seconds": {"update": summary(seconds)}}
        records.append(blank(method, workload, **figures) | {"status": "ok"})

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


# --- report --------------------------------------------------------------------------------------------------------------


def sections(run: Run) -> list[str]:
    """Tables and verdicts."""
    methods = [record for record in run.records if record["workload"]["step"] == "correlation"]
    updates = [record for record in run.records if record["workload"]["step"] == "update"]
    parts = []
    if methods:
        at = methods[0]["workload"]
        parts.append(f"## Correlation of {at['samples']} losses over {at['draws']} draws, {at['buffer']} in an update")
        parts.append(markdown_table(COLUMNS, [_row(record) for record in methods]))
        notes = [f"{r['baseline']}: {r['status']}: {r['reason']}" for r in methods if r["status"] != "ok"]
        notes += [target.judge({record["baseline"]: record for record in methods}) for target in TARGETS]
        parts.append("\n".join(f"- {note}" for note in notes))
    if updates:
        at = updates[0]["workload"]
        parts.append(f"## One update of {at['samples']} losses by {at['draws']} draws on a GPU")
        timed = [record for record in updates if record["status"] == "ok"]
        parts += [f"Skipped: {record['reason']}." for record in updates if record["status"] == "skipped"]
        if timed:
            parts.append(markdown_table(UPDATE_COLUMNS, [_update_row(record) for record in timed]))
            parts.append("\n".join(f"- {line}" for line in _update_verdicts(timed)))
    return [*parts, LEGEND]


COLUMNS = ("method", "s to the second moment", "s to the correlation", "repeats", "peak, GiB", "max error of rho")
UPDATE_COLUMNS = ("update", "ms", "share of the limit", "max error / k")


def _row(record: Record) -> list[str]:
    if record["status"] != "ok":
        return [record["says"], *["-"] * (len(COLUMNS) - 1)]
    moment, whole = (record["seconds"][step] for step in ("second_moment", "correlation"))
    streams = moment["values"] != whole["values"]
    peak = memory(record)
    return [
        record["says"],
        f"{moment['median']:.2f}" if streams else "-",
        f"{whole['median']:.2f}",
        str(len(whole["values"])),
        "-" if peak is None else f"{peak / 2**30:.2f}",
        f"{record['error']:.1e}",
    ]


def _update_row(record: Record) -> list[str]:
    share = "-" if record["of_limit"] is None else f"{record['of_limit']:.2f}"
    return [record["says"], f"{1e3 * record['seconds']['update']['median']:.2f}", share, f"{record['error']:.1e}"]


def _update_verdicts(records: list[Record]) -> list[str]:
    by_name = {record["baseline"]: record for record in records}
    peer, mine = (by_name[name]["seconds"]["update"]["median"] for name in ("torch_addmm", "ours_split"))
    share = by_name["ours_split"]["of_limit"]
    return [
        verdict("speed of the update, ours (split) / torch addmm_", peer / mine, 1.8, at_least=True),
        verdict("share of the split products' limit", share, 0.7, at_least=True),
    ]


LEGEND = """\
Times are medians, each method in processes of its own and with no other beside it. A method that streams has a second
moment first; the others take all traces at once. The peak is memory beyond the losses during the first call, the result
included. The error of rho is against fp64, on the first 300 losses."""


# --- command line --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=10_000, help="m (10000)")
    parser.add_argument("--draws", type=int, default=2_000, help="T (2000)")
    parser.add_argument("--buffer", type=int, default=512, help="draws in an update (512)")
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help=f"some of {', '.join(METHODS)} (default all)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes of each method, of --repeats (3) calls each (2)"
    )
    parser.add_argument("--devinterp-python", metavar="PATH", help="Python of an environment with devinterp")
    parser.add_argument("--gpu-samples", type=int, default=20_000, help="m of the update on a GPU (20000)")


def request(arguments: argparse.Namespace) -> Request:
    for name in ("samples", "draws", "buffer", "rounds", "gpu_samples"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give an integer of at least 1")
    for name in arguments.baselines or ():
        if name not in METHODS:
            raise UsageError(f"--baselines {name!r} is not a method of this suite: choose from {', '.join(METHODS)}")
    plan = Plan(
        methods=list(dict.fromkeys(arguments.baselines or METHODS)),
        samples=arguments.samples,
        draws=arguments.draws,
        buffer=arguments.buffer,
        threads=arguments.threads or torch.get_num_threads(),
        repeats=arguments.repeats or 3,
        rounds=arguments.rounds,
        devinterp_python=arguments.devinterp_python,
        gpu_samples=arguments.gpu_samples,
    )
    return Request(
        what=f"{plan.samples}x{plan.draws}",
        device="cuda" if torch.cuda.is_available() else "cpu",
        threads=plan.threads,
        settings={"repeats": plan.repeats, "rounds": plan.rounds},
        records=lambda say: measure(plan, say),
    )


SUITE = Suite(
    name="covariance",
    describe="correlation of losses over draws: time, peak memory and accuracy beside the peers",
    add_arguments=add_arguments,
    request=request,
    sections=sections,
)
