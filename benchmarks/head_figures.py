"""What the tables and plots of the head suite read off its records."""

from collections.abc import Sequence

from benchmarks.runs import Record, Run
from benchmarks.workloads import Workload

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
