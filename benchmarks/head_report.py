"""The report of the head suite: tables, verdicts, fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import growth
from benchmarks.baselines import REGISTRY
from benchmarks.head_figures import groups, ours, solved_error
from benchmarks.report import markdown_table, verdict
from benchmarks.runs import Record, Run, is_ours, median, memory, ratio
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Target:
    """One line that the project set itself: ours against a baseline, or against the floor, in one run."""

    model: str
    tokens: int
    dtype: str
    device: str
    metric: str  # "time" | "memory": at most ``limit`` of the baseline's; "share" of the floor: at least ``limit``
    limit: float
    baseline: str = ""

    @property
    def says(self) -> str:
        if self.metric == "share":
            return "share of the 3U floor at the product rate of this run"
        return f"{self.metric} of ours / {self.baseline}"

    def judge(self, ours: Record, other: Record | None) -> str:
        if self.metric == "share":
            found = ours["share_of_floor"]
            missing = _why_missing(ours, "time")
        elif other is None:
            return f"NOT MEASURED  {self.says}: {self.baseline} was not in this run"
        else:
            figure = median if self.metric == "time" else memory
            found = ratio(figure(ours), figure(other))
            missing = _why_missing(ours, self.metric) or _why_missing(other, self.metric)
        if found is None:
            return f"NOT MEASURED  {self.says}: {missing}"
        return verdict(self.says, found, self.limit, at_least=self.metric == "share")


def _targets() -> tuple[Target, ...]:
    small, large = ("gpt2", 2048, "fp32", "cpu"), ("gpt2", 8192, "fp32", "cpu")
    cpu_peers = [
        b.name for b in REGISTRY.values() if "cpu" in b.devices and not b.interpreted_on_cpu and not is_ours(b.name)
    ]
    gpu_peers = ("cross_entropy", "cross_entropy_compiled", "liger", "cce", "cce_exact")
    found = [
        Target(model, tokens, "fp32", "cpu", "time", 1.0, "cross_entropy")
        for model in ("gpt2", "small")
        for tokens in (1, 64, 512, 2048, 8192)
        if (model, tokens) != ("gpt2", 8192)
    ]
    found += [
        Target(*small, "memory", 0.5, "cross_entropy"),
        Target(*small, "time", 0.5, "authors_dense"),
        Target(*large, "time", 0.85, "cross_entropy"),
        Target(*large, "memory", 0.2, "cross_entropy"),
        Target(*large, "share", 0.93),
    ]
    found += [Target(*large, "time", 1.0, name) for name in cpu_peers if name != "cross_entropy"]
    for model, share in (("gpt2", 0.75), ("llama-3-8b", 0.85)):
        head = (model, 8192, "bf16", "cuda")
        found += [Target(*head, "share", share), *(Target(*head, "time", 1.0, name) for name in gpu_peers)]
    return tuple(found)


def _why_missing(record: Record, metric: str) -> str | None:
    if record["status"] != "ok":
        return f"{record['baseline']}: {record['status']}: {record['reason']}"
    if metric == "memory" and not record["memory_bytes"]:
        return f"{record['baseline']}: {record['memory_reason'] or 'no memory beyond inputs and gradients'}"
    return None


def verdicts(workload: Workload, records: Sequence[Record]) -> list[str]:
    """PASS, FAIL or NOT MEASURED for each target set for this workload."""
    mine, by_name = ours(records), {record["baseline"]: record for record in records}
    if mine is None:
        return []
    here = (workload.model, workload.tokens, workload.dtype, workload.device)
    return [
        target.judge(mine, by_name.get(target.baseline))
        for target in _targets()
        if (target.model, target.tokens, target.dtype, target.device) == here and workload.v is None
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def _show(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _error(record: Record, quantity: str) -> str:
    if not record["checks"]:
        return "-"
    check = record["checks"][quantity]
    return f"{check['error']:.1e} ({check['bound']:.0e})"


COLUMNS = (
    "baseline",
    "forward ms",
    "backward ms",
    "both ms",
    "20-80 %",
    "repeats",
    "time / ours",
    "floor share",
    "TFLOP/s",
    "memory MB",
    "memory / ours",
    "loss error (bound)",
    "dX error (bound)",
    "dW error (bound)",
    "loss error at 1e-20",
)


def _row(record: Record, mine: Record | None) -> list[str]:
    both = (record["seconds"] or {}).get("both")
    return [
        record["baseline"],
        _show(median(record, "forward"), ".5g", 1e3),
        _show(median(record, "backward"), ".5g", 1e3),
        _show(median(record), ".5g", 1e3),
        f"{both['q20'] * 1e3:.5g}-{both['q80'] * 1e3:.5g}" if both else "-",
        str(len(both["values"])) if both else "-",
        _show(ratio(median(record), median(mine) if mine else None), ".2f"),
        _show(record["share_of_floor"], ".2f"),
        _show(record["tflops"], ".3g"),
        _show(memory(record), ".0f", 1e-6),
        _show(ratio(memory(record), memory(mine) if mine else None), ".2f"),
        *(_error(record, quantity) for quantity in ("loss", "dX", "dW")),
        _show(solved_error(record), ".1e"),
    ]


def sections(run: Run) -> list[str]:
    """Tables, notes and verdicts of each workload, then the growth and what the columns mean."""
    parts = []
    for workload, records in groups(run).items():
        mine = ours(records)
        shown = [r for r in records if r["seconds"]]
        parts.append(f"## {workload}")
        if shown:
            parts.append(markdown_table(COLUMNS, [_row(record, mine) for record in shown]))
        notes = [_surroundings(r) for r in records if r.get("other_work_cores") is not None]
        notes += [_note(r) for r in records if r["status"] != "ok"]
        notes += [
            f"- {r['baseline']}: no memory figure: {r['memory_reason']}"
            for r in records
            if r["status"] == "ok" and r["memory_reason"]
        ]
        parts += ["\n".join(notes)] if notes else []
        parts += ["\n".join(f"- {line}" for line in verdicts(workload, records))] if verdicts(workload, records) else []
    for one in growth.series(run):
        parts.append(f"## Growth with {one.axis}: {one.fixed}")
        parts.append(markdown_table(growth.COLUMNS, growth.rows(one)))
    return [*parts, LEGEND]


def _surroundings(products: Record) -> str:
    copied = products["copy_bytes_per_second"] / 1e9
    return f"- during the timing other processes kept {products['other_work_cores']} cores busy; copy {copied:.3g} GB/s"


def _note(record: Record) -> str:
    note = f"- {record['baseline']}: {record['status']}: {record['reason']}"
    if record["status"] == "checked":
        note += "; " + ", ".join(f"{quantity} error {_error(record, quantity)}" for quantity in record["checks"])
    return note


LEGEND = """\
Times are medians of interleaved repeats within this run; forward is the call, backward the gradients of x and W, and
an implementation that forms gradients in its forward shows them there. `products` is x @ W.T, A @ W and A.T @ x by
torch.mm into ready, contiguous outputs, the first whole or in blocks of classes, whichever is faster: floor share = its
time over the row's. On a CPU it can pass 1: rows of A an odd number of cache lines apart make the products faster.
TFLOP/s counts the floor's 6NVD operations, whatever was really executed. Memory is the peak beyond inputs and
gradients, each baseline in a process of its own (benchmarks/head_memory.py). Errors are relative norms against fp64 on the
same rounded inputs; a baseline beyond its bound gets no time (benchmarks/gate.py). The error at 1e-20 is the loss's, on
a few tokens that are solved to a true loss near that. Growth: lines fitted by least squares of relative errors; the
residual is the worst point's. Ours fills its chunk first (harmonic_triton's memory_budget): below it memory grows,
beyond it the last two show what is left."""
