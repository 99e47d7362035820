"""Runs on disk, JSON lines in and out, and the figures that reports read off their records."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import UsageError
from benchmarks.workloads import Workload

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
OURS = ("ours_triton", "ours_torch")  # the first one timed is what the ratios refer to


@dataclass
class Run:
    """One invocation of the benchmarks."""

    name: str
    header: Record
    records: list[Record] = field(default_factory=list)

    def groups(self) -> dict[Workload, list[Record]]:
        """The records of each workload, in the order measured."""
        found: dict[Workload, list[Record]] = {}
        for record in self.records:
            found.setdefault(Workload(**record["workload"]), []).append(record)
        return found


def save(path: Path, header: Record, records: Iterable[Record]) -> Run:
    """Write a run as it is measured, a line at once, and give it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Run(path.stem, {"kind": "run", **header})
    with path.open("w") as file:
        file.write(json.dumps(run.header) + "\n")
        for record in records:
            run.records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    return run


def load(path: Path) -> Run:
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path.name}, line {number} is not JSON ({error.msg}): name a file that a run wrote"
            ) from error
    if not lines or lines[0].get("kind") != "run":
        raise UsageError(f"{path.name} does not start with a run's header: name a file that a run wrote")
    return Run(path.stem, lines[0], lines[1:])


# --- figures ---------------------------------------------------------------------------------------------------------


def median(record: Record, phase: str = "both") -> float | None:
    return record["seconds"][phase]["median"] if record["seconds"] and phase in record["seconds"] else None


def memory(record: Record) -> float | None:
    return record["memory_bytes"] if record["status"] == "ok" else None


def solved_error(record: Record) -> float | None:
    """Relative error of the loss where its truth is near 1e-20; older runs have none."""
    found = record.get("solved_loss")
    return found["error"] if found else None


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def is_ours(name: str) -> bool:
    return name.startswith("ours_")


def ours(records: Sequence[Record]) -> Record | None:
    """Our record in one workload: the backend that was timed."""
    by_name = {record["baseline"]: record for record in records}
    present = [by_name[name] for name in OURS if name in by_name]
    return next((record for record in present if record["status"] == "ok"), present[-1] if present else None)


def machine_line(header: Record) -> str:
    where = header.get("gpu") or f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads"
    commit = (header["commit"] or "no commit")[:12] + (" + changes" if header["dirty"] else "")
    return (
        f"{where}; torch {header['torch']}, triton {header['triton']}, harmonic_triton {header['harmonic_triton']}, "
        f"{commit}, {header['time']}, load before the run {header['load_before']}"
    )
