"""One run: for each workload, memory in fresh processes, then the accuracy gate, then interleaved times."""

import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import Baseline
from benchmarks.gate import Gate
from benchmarks.memory import measure_in_fresh_process
from benchmarks.workloads import Inputs, Workload, make_inputs

Record = dict[str, Any]
Say = Callable[[str], None]
PRODUCT_BYTES = {"cpu": 4 << 30, "cuda": 8 << 30}  # the products are taken whole up to this much scratch
MAX_INPUT_SETS = 8


@dataclass(frozen=True)
class Plan:
    workloads: list[Workload]
    baselines: list[Baseline]
    by_name: bool  # the baselines were named on the command line
    repeats: int
    threads: int


def run(plan: Plan, say: Say) -> Iterator[Record]:
    """Yield one record for each baseline and workload, and one for the three bare products of each workload."""
    for workload in plan.workloads:
        say(f"== {workload}, exponent {workload.exponent:.2f}")
        yield from _run_workload(plan, workload, say)


def _run_workload(plan: Plan, workload: Workload, say: Say) -> Iterator[Record]:
    records: dict[str, Record] = {}
    for baseline in plan.baselines:
        record = records[baseline.name] = _blank(baseline.name, baseline.loss, workload)
        reason = baseline.unavailable(workload.device, workload.dtype)
        if reason is None and baseline.only_by_name and not plan.by_name:
            reason = baseline.only_by_name
        if reason is not None:
            record.update(status="skipped", reason=reason)
            say(f"{baseline.name}: skipped: {reason}")
        elif not baseline.interpreted(workload.device):
            _measure_memory(baseline, workload, plan.threads, record, say)

    inputs = make_inputs(workload)
    gate = Gate(inputs, workload)
    for baseline in plan.baselines:
        if records[baseline.name]["status"] == "planned":
            _pass_gate(baseline, gate, records[baseline.name], say)
    del gate

    timed = [baseline for baseline in plan.baselines if records[baseline.name]["status"] == "ok"]
    products = _blank("products", "none", workload) | {"status": "ok"}
    _time(timed, workload, inputs, plan.repeats, records, products, say)
    yield products
    yield from records.values()


def _blank(name: str, loss: str, workload: Workload) -> Record:
    return {
        "kind": "measurement",
        "baseline": name,
        "loss": loss,
        "workload": workload.as_dict(),
        "status": "planned",
        "reason": None,
        "memory_bytes": None,
        "memory_reason": None,
        "checks": None,
        "seconds": None,
        "tflops": None,
        "share_of_floor": None,
    }


def _measure_memory(baseline: Baseline, workload: Workload, threads: int, record: Record, say: Say) -> None:
    found, reason = measure_in_fresh_process(baseline, workload, threads)
    record.update(memory_bytes=found, memory_reason=reason)
    if found is not None:
        say(f"{baseline.name}: memory {found / 1e6:.0f} MB beyond inputs and gradients")
        return
    say(f"{baseline.name}: no memory figure: {reason}")
    if reason is not None and reason.startswith(("killed", "exit status", "one step took")):
        record.update(status="failed", reason=f"in its memory run: {reason}")


def _pass_gate(baseline: Baseline, gate: Gate, record: Record, say: Say) -> None:
    try:
        checks = gate.check(baseline)
    except Exception as error:  # whatever a peer raises is its result, not the end of the run
        record.update(status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
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


class _Products:
    """x @ W.T, A @ W and A.T @ x into outputs allocated once: the floor's own rate at these shapes."""

    def __init__(self, inputs: Inputs, device: str) -> None:
        self.x, self.w = inputs.x.detach(), inputs.w.detach()
        rows = PRODUCT_BYTES[device] // (len(self.w) * self.x.element_size())
        self.rows = max(1, min(len(self.x), rows))
        self.scores = self.x.new_empty(self.rows, len(self.w))
        self.dx, self.dw = torch.empty_like(self.x), torch.empty_like(self.w)
        self.device = device

    @torch.no_grad()
    def time(self) -> dict[str, float]:
        clock = _Clock(self.device)
        clock.mark()
        for start in range(0, len(self.x), self.rows):
            x = self.x[start : start + self.rows]
            scores = self.scores[: len(x)]
            torch.mm(x, self.w.T, out=scores)
            torch.mm(scores, self.w, out=self.dx[start : start + self.rows])
            self.dw.addmm_(scores.T, x, beta=0 if start == 0 else 1)
        clock.mark()
        return {"both": clock.intervals()[0]}


def _input_sets(workload: Workload, first: Inputs) -> list[Inputs]:
    """On a GPU, enough copies of the inputs that no call finds its own in the second-level cache."""
    if workload.device != "cuda":
        return [first]
    one = (first.x.numel() + first.w.numel()) * first.x.element_size()
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    more = min(MAX_INPUT_SETS, 1 + -(-cache // one))
    return [first, *(make_inputs(workload, seed) for seed in range(1, more))]


def _time(
    timed: list[Baseline],
    workload: Workload,
    inputs: Inputs,
    repeats: int,
    records: dict[str, Record],
    products: Record,
    say: Say,
) -> None:
    """Round after round, everything once a round and from another start each time, so that noise hits all alike."""
    sets = _input_sets(workload, inputs)
    bare = _Products(inputs, workload.device)
    steps: dict[str, Callable[[Inputs], dict[str, float]]] = {"products": lambda _: bare.time()}
    for baseline in timed:
        steps[baseline.name] = functools.partial(_time_step, baseline, workload)
    names = [name for name in steps if _warm_up(steps[name], sets[0], records.get(name, products), say)]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(steps[name](sets[turn % len(sets)]))
            say(
                f"round {turn + 1}/{repeats}: "
                + ", ".join(f"{name} {1e3 * samples[name][-1]['both']:.4g} ms" for name in names)
            )
    finally:
        gc.enable()

    floor = _summary([sample["both"] for sample in samples["products"]])["median"] if "products" in samples else None
    for name in names:
        record = products if name == "products" else records[name]
        phases = samples[name][0].keys()
        record["seconds"] = {phase: _summary([sample[phase] for sample in samples[name]]) for phase in phases}
        median = record["seconds"]["both"]["median"]
        record["tflops"] = workload.floor_flops / median / 1e12
        record["share_of_floor"] = None if floor is None else floor / median


def _warm_up(step: Callable[[Inputs], dict[str, float]], inputs: Inputs, record: Record, say: Say) -> bool:
    """One untimed step (allocators, thread pools, autotuners); a step that raises leaves the run with its reason."""
    try:
        step(inputs)
    except Exception as error:
        record.update(status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0])
        say(f"{record['baseline']}: failed: {record['reason']}")
        return False
    return True


def _summary(values: list[float]) -> dict[str, Any]:
    data = torch.tensor(values, dtype=torch.float64)
    low, median, high = (data.quantile(q).item() for q in (0.2, 0.5, 0.8))
    return {"median": median, "q20": low, "q80": high, "values": values}
