"""Runs on disk, in the one format of every suite, and the figures that all reports read off their records.

A run is a file of JSON lines. The first is the header: ``kind`` "run", ``suite``, ``command``, ``settings``, and what
``machine.describe`` says of machine, versions and commit. Each other line is one baseline at one workload, as
:func:`blank` begins it: ``seconds`` holds a :func:`summary` for each phase, and a suite may add figures of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import UsageError

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Run:
    """One invocation of the benchmarks."""

    name: str
    header: Record
    records: list[Record] = field(default_factory=list)


def name_of(topic: str, device: str, what: str, time: str) -> str:
    """The name of every result, less its ending."""
    return f"{topic}-{device}-{what}-{time.replace(':', '').replace('-', '')}"


def blank(baseline: str, workload: Mapping[str, Any], **more: Any) -> Record:
    """The record of a baseline at a workload before anything is known of it."""
    return {
        "kind": "measurement",
        "baseline": baseline,
        "workload": dict(workload),
        "status": "planned",  # then "ok" | "checked" | "skipped" | "failed" | "failed the gate"
        "reason": None,
        "memory_bytes": None,
        "memory_reason": None,
        "seconds": None,
        **more,
    }


def summary(values: Sequence[float]) -> Record:
    """Median and the middle 60 % of repeats, and the repeats themselves."""
    data = torch.tensor(values, dtype=torch.float64)
    low, middle, high = (data.quantile(q).item() for q in (0.2, 0.5, 0.8))
    return {"median": middle, "q20": low, "q80": high, "values": list(values)}


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


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def is_ours(name: str) -> bool:
    return name.split("_")[0] == "ours"


def machine_line(header: Record) -> str:
    where = header.get("gpu") or f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads"
    commit = (header["commit"] or "no commit")[:12] + (" + changes" if header["dirty"] else "")
    return (
        f"{where}; torch {header['torch']}, triton {header['triton']}, harmonic_triton {header['harmonic_triton']}, "
        f"{commit}, {header['time']}, load before the run {header['load_before']}"
    )
