"""What the tables and plots of the head suite read off its records."""

from collections.abc import Sequence

from benchmarks.runs import Record, Run
from benchmarks.workloads import Workload

HEADS = {
    "products": "the three matrix products alone",
    "ours_torch": "`ht.linear_harmonic_loss`",
    "ours_triton": "`ht.linear_harmonic_loss`",
    "ours_lce_torch": "`ht.linear_cross_entropy`",
    "ours_lce_triton": "`ht.linear_cross_entropy`",
    "authors_dense": "the authors' dense harmonic loss",
    "harmonic_dense": "dense harmonic loss in the log domain",
    "cross_entropy": "`F.cross_entropy(x @ W.T)`",
    "cross_entropy_compiled": "the same under `torch.compile`",
    "torch_chunked": "`F.linear_cross_entropy`, chunked",
    "cce_compiled": "Cut Cross-Entropy, `torch_compile`",
    "ours_triton_one_pass": "`ht.linear_harmonic_loss`, one pass",
    "ours_triton_recompute": "`ht.linear_harmonic_loss`, recomputing",
    "keops": "KeOps",
    "liger": "Liger",
    "cce": "Cut Cross-Entropy",
    "cce_exact": "Cut Cross-Entropy, unfiltered",
    "quack": "quack",
}
PLAIN = {  # where a table's words lean on the row above, or two backends stand side by side
    "products": "three matrix products alone",
    "ours_triton": "ht.linear_harmonic_loss (Triton)",
    "ours_lce_triton": "ht.linear_cross_entropy (Triton)",
    "cross_entropy_compiled": "F.cross_entropy, torch.compile",
    "authors_dense": "authors' dense harmonic loss",
    "harmonic_dense": "dense harmonic loss, log domain",
}
SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
OURS = ("ours_triton", "ours_torch")  # the first one timed is what the ratios refer to


def groups(run: Run) -> dict[Workload, list[Record]]:
    """The records of each workload, in the order measured."""
    found: dict[Workload, list[Record]] = {}
    for record in run.records:
        found.setdefault(Workload(**record["workload"]), []).append(record)
    return found


def solved_error(record: Record) -> float | None:
    """Relative error of the loss where its truth is near 1e-20."""
    found = record["solved_loss"]
    return found["error"] if found else None


def ours(records: Sequence[Record]) -> Record | None:
    """Our record in one workload: the backend that was timed."""
    by_name = {record["baseline"]: record for record in records}
    present = [by_name[name] for name in OURS if name in by_name]
    return next((record for record in present if record["status"] == "ok"), present[-1] if present else None)


def plain(name: str) -> str:
    """What a picture calls a baseline."""
    return PLAIN.get(name, HEADS.get(name, name).replace("`", ""))


def shown(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and a unit; a dash for what was not measured."""
    if value != value:
        return "–"
    size, unit = next(((size, unit) for size, unit in units if value >= size), units[-1])
    return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
