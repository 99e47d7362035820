"""The README's block of figures, made from one stored run: ``python -m benchmarks report --readme RUN.jsonl``."""

import re
from pathlib import Path

from benchmarks import UsageError
from benchmarks.baselines import REGISTRY
from benchmarks.head_figures import HEADS, groups, ours, solved_error
from benchmarks.machine import ROOT
from benchmarks.plots import bars_name
from benchmarks.report import markdown_table
from benchmarks.runs import Record, Run, median, memory, ratio
from benchmarks.workloads import Workload

README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- figures of (\S+) -->\n.*?<!-- end of figures -->\n", re.DOTALL)
COLUMNS = ("head", "time", "of ours", "of the products' rate", "peak memory", "loss error", "at a true loss of 1e-20")


def block(run: Run, folder: str = "benchmarks/results") -> str:
    """Markers, and between them a table for each workload, the largest one's plot, and what was not measured."""
    found = {workload: records for workload, records in groups(run).items() if ours(records)}
    if not found:
        raise UsageError(f"{run.name} timed nothing of ours: name a run that did")
    largest = max(found, key=lambda workload: workload.floor_flops)
    parts = [
        f"<!-- figures of {run.name} -->",
        f"Forward and backward of the head alone: medians of interleaved repeats of one run, memory beyond inputs and\n"
        f"gradients ([the run]({folder}/{run.name}.md), `{run.header['command']}`).",
    ]
    for workload, records in found.items():
        parts.append(f"{_title(workload, run)}:")
        parts.append(_table(records))
    parts.append(f"![time and memory on {where(run)}]({folder}/{bars_name(run, largest)})")
    parts.append(_missing(found[largest], run))
    return "\n\n".join(parts) + "\n<!-- end of figures -->\n"


def where(run: Run) -> str:
    """The machine, as every figure names it."""
    header = run.header
    return str(header.get("gpu") or f"{header['cpu']}, {header['threads']} threads, no GPU")


def _title(workload: Workload, run: Run) -> str:
    shape = f"N = {workload.tokens}, D = {workload.dim}, V = {workload.classes}, {workload.dtype}"
    return f"**{shape}** on {where(run)}, torch {run.header['torch']}"


def _table(records: list[Record]) -> str:
    mine = ours(records)
    rows = []
    for record in records:
        seconds, held, solved = median(record), memory(record), solved_error(record)
        if seconds is None or mine is None:
            continue
        check = record["checks"]
        rows.append(
            [
                HEADS.get(name := str(record["baseline"]), name),
                _seconds(seconds, len(record["seconds"]["both"]["values"])),
                f"{ratio(seconds, median(mine)):.2f}",
                f"{record['share_of_floor']:.2f}",
                "" if held is None else f"{held / 1e6:.0f} MB",
                "" if not check else f"{check['loss']['error']:.0e}",
                "" if solved is None else f"{solved:.0e}",
            ]
        )
    return markdown_table(COLUMNS, rows)


def _seconds(median_seconds: float, repeats: int) -> str:
    shown = f"{median_seconds:.2f} s" if median_seconds >= 1 else f"{1e3 * median_seconds:.3g} ms"
    return f"{shown} ({repeats})"


def _missing(records: list[Record], run: Run) -> str:
    lines = ["In brackets: repeats."]
    absent = [r for r in records if r["seconds"] is None and r["baseline"] in REGISTRY and r["status"] == "skipped"]
    reasons: dict[str, list[str]] = {}
    for record in absent:
        reasons.setdefault(record["reason"], []).append(f"`{record['baseline']}`")
    lines += [f"Not in it: {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    if run.header["device"] == "cpu":
        lines.append("Not measured on a GPU: `python -m benchmarks.gpu` does it there in one call.")
    return "\n".join(lines)


def rewrite(run: Run, readme: Path = README) -> None:
    """Put the block of ``run`` where the README has one."""
    text = readme.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise UsageError(f"{readme.name} has no one block '<!-- figures of ... -->' to '<!-- end of figures -->'")
    readme.write_text(BLOCK.sub(lambda _: block(run), text), encoding="utf-8")
