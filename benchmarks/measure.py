"""One run of the head suite: for each workload, memory in fresh processes, then the accuracy gate, then interleaved times."""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import LOSSES, Baseline
from benchmarks.gate import Gate
from benchmarks.head_memory import measure_in_fresh_process, measure_on_gpu
from benchmarks.machine import OtherWork, free_memory
from benchmarks.runs import Record, blank, summary
from benchmarks.suite import Say
from benchmarks.workloads import Inputs, Workload, make_inputs

PRODUCT_BYTES = {"cpu": 4 << 30, "cuda": 8 << 30}  # the products are taken whole up to this much scratch
MAX_INPUT_SETS = 8
PROCESS_SECONDS = 6.0  # a fresh process for the memory of a baseline, its imports included
COLUMN_BLOCKS = (0, 512)  # x @ W.T whole, or in products of so many classes, which some CPU libraries do faster
SOLVED_TOKENS = 64
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Plan:
    workloads: list[Workload]
    baselines: list[Baseline]
    by_name: bool  # the baselines were named on the command line
    repeats: int
    threads: int
    patience: float = math.inf  # seconds of timing a baseline may take in a workload before it loses repeats
    once: frozenset[str] = frozenset()  # baselines that are timed once, whatever the patience


def expected_seconds(plan: Plan) -> float:
    """About how long a run takes: every head as long as the bare products and a half, which one small product predicts.

    Beside its repeats a baseline has a warm-up, a memory measurement in a process of its own and its gate; dense forms and
    whatever compiles take longer, what does not run here less.
    """
    device = plan.workloads[0].device
    a = torch.randn(1024, 1024, device=device)

    def product() -> float:
        start = time.perf_counter()
        (a @ a).sum().item()
        return time.perf_counter() - start

    rate = 2 * 1024**3 / min(product() for _ in range(4))
    total = 0.0
    for workload in plan.workloads:
        here = [b for b in plan.baselines if b.unavailable(workload.device, workload.dtype) is None]
        here = [b for b in here if plan.by_name or b.too_large(workload) is None]
        passes = sum((1 if b.name in plan.once else plan.repeats) + 4 for b in here) + plan.repeats
        one = 1.5 * workload.floor_flops / rate
        total += one * passes + PROCESS_SECONDS * len(here)
    return total


def announcement(plan: Plan) -> str:
    """How long it will take, and what takes less."""
    seconds = expected_seconds(plan)
    how_long = "a minute or two" if seconds < 120 else f"roughly {seconds / 60:,.0f} minutes"
    less = "; --quick, fewer --repeats, --n or --baselines take less" if seconds > 300 else ""
    return f"this takes {how_long} here, if nothing else runs; workloads: {len(plan.workloads)}, repeats: {plan.repeats}{less}"


def run(plan: Plan, say: Say) -> Iterator[Record]:
    """Yield one record for each baseline and workload, and one for the three bare products of each workload."""
    say(announcement(plan))
    for workload in plan.workloads:
        say(f"== {workload}, exponent {workload.exponent:.2f}")
        yield from _run_workload(plan, workload, say)


def _run_workload(plan: Plan, workload: Workload, say: Say) -> Iterator[Record]:
    records: dict[str, Record] = {}
    for baseline in plan.baselines:
        record = records[baseline.name] = _blank(baseline.name, baseline.loss, workload)
        reason = baseline.unavailable(workload.device, workload.dtype)
        if reason is None and not plan.by_name:
            reason = baseline.too_large(workload)
        if reason is None:
            reason = baseline.too_big(workload, free_memory())
        if reason is not None:
            record.update(status="skipped", reason=reason)
            say(f"{baseline.name}: skipped: {reason}")
        elif workload.device == "cpu" and not baseline.interpreted("cpu"):
            _measure_memory(baseline, workload, plan.threads, record, say)

    inputs = {loss: make_inputs(workload, loss) for loss in LOSSES}
    gate = Gate(inputs, workload)
    for baseline in plan.baselines:
        if records[baseline.name]["status"] == "planned":
            _pass_gate(baseline, gate, records[baseline.name], say)
            if workload.device == "cuda" and records[baseline.name]["status"] == "ok":
                _measure_gpu_memory(baseline, workload, inputs[baseline.loss], records[baseline.name], say)
    del gate
    if workload.inputs != "solved":
        _measure_solved(workload, [b for b in plan.baselines if records[b.name]["checks"]], records, say)

    timed = [baseline for baseline in plan.baselines if records[baseline.name]["status"] == "ok"]
    products = _blank("products", "none", workload) | {"status": "ok"}
    _time(timed, workload, inputs, plan, records, products, say)
    yield products
    yield from records.values()


def _blank(name: str, loss: str, workload: Workload) -> Record:
    figures = dict.fromkeys(("checks", "solved_loss", "tflops", "share_of_floor"))
    return blank(name, workload.as_dict(), loss=loss, **figures)


def _measure_memory(baseline: Baseline, workload: Workload, threads: int, record: Record, say: Say) -> None:
    found, reason = measure_in_fresh_process(baseline, workload, threads)
    record.update(memory_bytes=found, memory_reason=reason)
    if found is not None:
        say(f"{baseline.name}: memory {found / 1e6:.0f} MB beyond inputs and gradients")
        return
    say(f"{baseline.name}: no memory figure: {reason}")
    if reason is not None and reason.startswith(("killed", "exit status", "it took longer")):
        record.update(status="failed", reason=f"in its memory run: {reason}")


def _measure_gpu_memory(baseline: Baseline, workload: Workload, inputs: Inputs, record: Record, say: Say) -> None:
    try:
        record["memory_bytes"] = measure_on_gpu(baseline, workload, inputs)
    except Exception as error:
        record["memory_reason"] = _first_line(error)
    say(f"{baseline.name}: memory {record['memory_bytes'] or record['memory_reason']}")


def _pass_gate(baseline: Baseline, gate: Gate, record: Record, say: Say) -> None:
    try:
        checks = gate.check(baseline)
    except Exception as error:  # whatever a peer raises is its result, not the end of the run
        record.update(status="failed", reason=_first_line(error))
        say(f"{baseline.name}: failed: {record['reason']}")
        return
    record["checks"] = {c.quantity: {"error": c.error, "bound": c.bound, "passed": c.passed} for c in checks}
    figures = ", ".join(f"{c.quantity} {c.error:.1e} (bound {c.bound:.1e})" for c in checks)
    if not all(c.passed for c in checks):
        record.update(status="failed the gate", reason=figures)
    elif baseline.interpreted(gate.device):
        record.update(status="checked", reason="through the Triton interpreter: no time")
    else:
        record["status"] = "ok"
    say(f"{baseline.name}: gate {'failed' if record['status'] == 'failed the gate' else 'passed'}: {figures}")


def _measure_solved(workload: Workload, baselines: list[Baseline], records: dict[str, Record], say: Say) -> None:
    """The error of the loss where it is near 1e-20, on a few tokens at the same width: a figure beside, no gate."""
    solved = dataclasses.replace(workload, inputs="solved", tokens=min(workload.tokens, SOLVED_TOKENS))
    gate = Gate({loss: make_inputs(solved, loss) for loss in LOSSES}, solved)
    for baseline in baselines:
        try:
            error = gate.check(baseline)[0].error
        except Exception as failure:
            say(f"{baseline.name}: no solved loss: {_first_line(failure)}")
            continue
        found = records[baseline.name]["solved_loss"] = {"truth": gate.truth(baseline.loss).loss, "error": error}
        say(f"{baseline.name}: at a true loss of {found['truth']:.1e} its error is {error:.1e}")


# --- times -----------------------------------------------------------------------------------------------------------


class _Clock:
    """Marks on one timeline: perf_counter on a CPU, events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between successive marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def _time_step(baseline: Baseline, workload: Workload, inputs: Inputs) -> dict[str, float]:
    clock = _Clock(workload.device)
    clock.mark()
    loss = baseline(inputs.x, inputs.w, inputs.target, workload.exponent)
    clock.mark()
    gradients = torch.autograd.grad(loss, (inputs.x, inputs.w))
    clock.mark()
    forward, backward = clock.intervals()
    del gradients
    return {"forward": forward, "backward": backward, "both": forward + backward}


class Products:
    """x @ W.T, A @ W and A.T @ x into outputs allocated once, the fastest way found: the floor's own rate here."""

    def __init__(self, inputs: Inputs, device: str) -> None:
        self.x, self.w = inputs.x.detach(), inputs.w.detach()
        rows = PRODUCT_BYTES[device] // (len(self.w) * self.x.element_size())
        self.rows = max(1, min(len(self.x), rows))
        self.scores = self.x.new_empty(self.rows, len(self.w))
        self.dx, self.dw = torch.empty_like(self.x), torch.empty_like(self.w)
        self.device = device
        self.block = 0
        if device == "cpu":
            self.block = min(COLUMN_BLOCKS, key=self._scores_seconds)

    def _scores_seconds(self, block: int) -> float:
        self._make_scores(self.x[: self.rows], block)
        clock = _Clock(self.device)
        clock.mark()
        self._make_scores(self.x[: self.rows], block)
        clock.mark()
        return clock.intervals()[0]

    @torch.no_grad()
    def _make_scores(self, x: Tensor, block: int) -> Tensor:
        scores = self.scores[: len(x)]
        for first in range(0, len(self.w), block or len(self.w)):
            columns = slice(first, first + (block or len(self.w)))
            torch.mm(x, self.w[columns].T, out=scores[:, columns])
        return scores

    @torch.no_grad()
    def time(self) -> dict[str, float]:
        clock = _Clock(self.device)
        clock.mark()
        for start in range(0, len(self.x), self.rows):
            x = self.x[start : start + self.rows]
            scores = self._make_scores(x, self.block)
            torch.mm(scores, self.w, out=self.dx[start : start + self.rows])
            self.dw.addmm_(scores.T, x, beta=0 if start == 0 else 1)
        clock.mark()
        return {"both": clock.intervals()[0]}


def copy_rate(device: str) -> float:
    """Bytes read and written in a second by one large copy, the best of five."""
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    clock = _Clock(device)
    for _ in range(6):  # the first one touches the pages
        clock.mark()
        target.copy_(source)
    clock.mark()
    return 2 * COPY_BYTES[device] / min(clock.intervals()[1:])


def _input_sets(workload: Workload, first: Mapping[str, Inputs]) -> list[Mapping[str, Inputs]]:
    """On a GPU, enough copies of the inputs that no call finds its own in the second-level cache."""
    if workload.device != "cuda":
        return [first]
    x, w = first["harmonic"].x, first["harmonic"].w
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    more = min(MAX_INPUT_SETS, 1 + -(-cache // ((x.numel() + w.numel()) * x.element_size())))
    return [first, *({loss: make_inputs(workload, loss, seed) for loss in first} for seed in range(1, more))]


def _time(
    timed: list[Baseline],
    workload: Workload,
    inputs: Mapping[str, Inputs],
    plan: Plan,
    records: dict[str, Record],
    products: Record,
    say: Say,
) -> None:
    """Round after round, everything at most once a round and from another start each time, so that noise hits all alike.

    The gate has called every baseline at this shape once: compilers, autotuners and allocators are warm.
    """
    sets = _input_sets(workload, inputs)
    products["copy_bytes_per_second"] = copy_rate(workload.device)
    bare = Products(inputs["harmonic"], workload.device)
    bare.time()
    steps: dict[str, Callable[[Mapping[str, Inputs]], dict[str, float]]] = {"products": lambda _: bare.time()}
    for baseline in timed:
        steps[baseline.name] = functools.partial(_time_on_its_inputs, baseline, workload)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    others = OtherWork()
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.repeats):
            names = [name for name in steps if has_turn(name, samples[name], turn, plan)]
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                try:
                    samples[name].append(steps[name](sets[turn % len(sets)]))
                except Exception as error:  # the gate had memory for it, the timing has not
                    if name == "products":
                        raise
                    records[name].update(status="failed", reason=_first_line(error))
                    del steps[name]
            shown = (f"{name} {1e3 * samples[name][-1]['both']:.4g} ms" for name in names if name in steps)
            say(f"round {turn + 1}/{plan.repeats}: {', '.join(shown) or 'every baseline has had its repeats'}")
    finally:
        gc.enable()
    products["other_work_cores"] = others.cores()

    floor = summary([sample["both"] for sample in samples["products"]])["median"]
    for name in steps:
        record = products if name == "products" else records[name]
        phases = samples[name][0].keys()
        record["seconds"] = {phase: summary([sample[phase] for sample in samples[name]]) for phase in phases}
        median = record["seconds"]["both"]["median"]
        record["tflops"] = workload.floor_flops / median / 1e12
        record["share_of_floor"] = floor / median


def _time_on_its_inputs(baseline: Baseline, workload: Workload, inputs: Mapping[str, Inputs]) -> dict[str, float]:
    return _time_step(baseline, workload, inputs[baseline.loss])


def has_turn(name: str, samples: list[dict[str, float]], turn: int, plan: Plan) -> bool:
    """Whether a baseline is timed in this round: those that ``patience`` leaves fewer repeats get them evenly spread."""
    if not samples:
        return True
    if name in plan.once:
        return False
    affordable = int(max(1, min(plan.repeats, plan.patience / samples[0]["both"])))
    return turn * affordable // plan.repeats > (turn - 1) * affordable // plan.repeats


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
