"""Results on disk and what is made of them: JSON lines in, tables, verdicts and plots out."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import UsageError
from benchmarks.baselines import REGISTRY
from benchmarks.workloads import Workload

Record = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
OURS = ("ours_triton", "ours_torch")  # the first one timed is what the ratios refer to


@dataclass(frozen=True)
class Target:
    """One line that the project set itself: ours against a baseline, in one run."""

    model: str
    tokens: int
    dtype: str
    device: str
    says: str
    metric: str  # "time" | "memory" | "speed"
    baseline: str
    limit: float

    def judge(self, ours: Record, other: Record) -> str:
        if self.metric == "speed":
            ratio = _ratio(_median(other), _median(ours))
            good = ratio is not None and ratio >= self.limit
        else:
            figure = _median if self.metric == "time" else _memory
            ratio = _ratio(figure(ours), figure(other))
            good = ratio is not None and ratio <= self.limit
        if ratio is None:
            return f"NOT MEASURED  {self.says}: {_why_missing(ours, self.metric) or _why_missing(other, self.metric)}"
        sign = ">=" if self.metric == "speed" else "<="
        return f"{'PASS' if good else 'FAIL'}  {self.says}: {ratio:.3f} (wanted {sign} {self.limit:g})"


_HEAD = ("gpt2", 2048, "fp32", "cpu")
TARGETS = (
    Target(*_HEAD, "time of ours / F.cross_entropy(x @ W.T)", "time", "cross_entropy", 1.0),
    Target(
        *_HEAD, "memory of ours / F.cross_entropy(x @ W.T), beyond inputs and gradients", "memory", "cross_entropy", 0.5
    ),
    Target(*_HEAD, "speed of ours / the authors' dense form", "speed", "authors_dense", 2.0),
)


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


def _median(record: Record, phase: str = "both") -> float | None:
    return record["seconds"][phase]["median"] if record["seconds"] and phase in record["seconds"] else None


def _memory(record: Record) -> float | None:
    return record["memory_bytes"] if record["status"] == "ok" else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _why_missing(record: Record, metric: str) -> str | None:
    if record["status"] != "ok":
        return f"{record['baseline']}: {record['status']}: {record['reason']}"
    if metric == "memory" and not record["memory_bytes"]:
        return f"{record['baseline']}: {record['memory_reason'] or 'no memory beyond inputs and gradients'}"
    return None


def ours(records: Sequence[Record]) -> Record | None:
    """Our record in one workload: the backend that was timed."""
    by_name = {record["baseline"]: record for record in records}
    present = [by_name[name] for name in OURS if name in by_name]
    return next((record for record in present if record["status"] == "ok"), present[-1] if present else None)


def verdicts(workload: Workload, records: Sequence[Record]) -> list[str]:
    """PASS, FAIL or NOT MEASURED for each target set for this workload."""
    lines, mine = [], ours(records)
    by_name = {record["baseline"]: record for record in records}
    for target in TARGETS:
        if (target.model, target.tokens, target.dtype, target.device) != (
            workload.model,
            workload.tokens,
            workload.dtype,
            workload.device,
        ):
            continue
        if mine is None or target.baseline not in by_name:
            absent = "ours" if mine is None else target.baseline
            lines.append(f"NOT MEASURED  {target.says}: {absent} was not in this run")
        else:
            lines.append(target.judge(mine, by_name[target.baseline]))
    return lines


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
    "time / ours",
    "floor share",
    "TFLOP/s",
    "memory MB",
    "memory / ours",
    "loss error (bound)",
    "dX error (bound)",
    "dW error (bound)",
)


def _row(record: Record, mine: Record | None) -> list[str]:
    both = (record["seconds"] or {}).get("both")
    return [
        record["baseline"],
        _show(_median(record, "forward"), ".4g", 1e3),
        _show(_median(record, "backward"), ".4g", 1e3),
        _show(_median(record), ".4g", 1e3),
        f"{both['q20'] * 1e3:.4g}-{both['q80'] * 1e3:.4g}" if both else "-",
        _show(_ratio(_median(record), _median(mine) if mine else None), ".2f"),
        _show(record["share_of_floor"], ".2f"),
        _show(record["tflops"], ".3g"),
        _show(_memory(record), ".0f", 1e-6),
        _show(_ratio(_memory(record), _memory(mine) if mine else None), ".2f"),
        *(_error(record, quantity) for quantity in ("loss", "dX", "dW")),
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads in a terminal and renders as markdown."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1 + (i == 0)) + ("" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def machine_line(header: Record) -> str:
    where = header.get("gpu") or f"{header['cpu']}, {header['cores']} cores, {header['threads']} threads"
    commit = (header["commit"] or "no commit")[:12] + (" + changes" if header["dirty"] else "")
    return (
        f"{where}; torch {header['torch']}, triton {header['triton']}, harmonic_triton {header['harmonic_triton']}, "
        f"{commit}, {header['time']}, load before the run {header['load_before']}"
    )


def _quiet(header: Record) -> str | None:
    """A warning where something else was running when the run began."""
    load, cores = header["load_before"], header["cores"]
    if load is None or load <= 0.25 * cores:
        return None
    return (
        f"The machine was not quiet: load {load} on {cores} cores before the run. Measure again before quoting a time."
    )


def text(run: Run) -> str:
    """The whole run as markdown."""
    parts = [f"# {run.name}", machine_line(run.header), *filter(None, [_quiet(run.header)])]
    for workload, records in run.groups().items():
        mine = ours(records)
        shown = [r for r in records if r["seconds"]]
        parts.append(f"## {workload}")
        if shown:
            parts.append(markdown_table(COLUMNS, [_row(record, mine) for record in shown]))
        notes = [_note(r) for r in records if r["status"] != "ok"]
        notes += [
            f"- {r['baseline']}: no memory figure: {r['memory_reason']}"
            for r in records
            if r["status"] == "ok" and r["memory_reason"]
        ]
        parts += ["\n".join(notes)] if notes else []
        parts += ["\n".join(f"- {line}" for line in verdicts(workload, records))] if verdicts(workload, records) else []
    parts.append(LEGEND)
    return "\n\n".join(parts) + "\n"


def _note(record: Record) -> str:
    note = f"- {record['baseline']}: {record['status']}: {record['reason']}"
    if record["status"] == "checked":
        note += "; " + ", ".join(f"{quantity} error {_error(record, quantity)}" for quantity in record["checks"])
    return note


LEGEND = """\
Times are medians of interleaved repeats within this run; forward is the call, backward the gradients of x and W, and
an implementation that forms gradients in its forward shows them there. `products` is x @ W.T, A @ W and A.T @ x into
ready outputs: floor share = its time over the row's. TFLOP/s counts the floor's 6NVD operations, whatever was really
executed. Memory is the peak beyond inputs and gradients, each baseline in a process of its own
(benchmarks/memory.py). Errors are relative norms against fp64 on the same rounded inputs; a baseline beyond its bound
gets no time (benchmarks/gate.py)."""


# --- plots -----------------------------------------------------------------------------------------------------------


def plot(run: Run, folder: Path) -> list[Path]:
    """Bars of time and memory for each workload, and lines against N where a run has several; [] without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    written = []
    series: dict[tuple[str, str, str], list[tuple[Workload, list[Record]]]] = {}
    for workload, records in run.groups().items():
        measured = [record for record in records if record["seconds"]]
        if not measured:
            continue
        written.append(_bars(run, workload, measured, folder))
        series.setdefault((workload.model, workload.dtype, workload.inputs), []).append((workload, measured))
    written += [_lines(run, points, folder) for points in series.values() if len(points) > 1]
    return written


def _colour(name: str) -> str:
    if name in OURS:
        return "tab:red"
    return "0.6" if name == "products" else "tab:orange" if REGISTRY[name].loss == "harmonic" else "tab:blue"


def _bars(run: Run, workload: Workload, records: list[Record], folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.5 * len(records) + 1.8), sharey=True)
    names = [record["baseline"] for record in records][::-1]
    colours = [_colour(name) for name in names]
    times = [1e3 * (_median(record) or 0.0) for record in records][::-1]
    memories = [(_memory(record) or float("nan")) / 1e6 for record in records][::-1]
    for axis, values, label in (
        (left, times, "forward + backward, ms (median)"),
        (right, memories, "memory beyond inputs and gradients, MB"),
    ):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, fmt="%.4g", padding=2)
        axis.margins(x=0.15)
        axis.set_xlabel(label)
    figure.suptitle(f"{workload}\n{machine_line(run.header)}", fontsize=7)
    return _save(figure, folder / f"{run.name}-{workload.model}-{workload.tokens}-{workload.inputs}.png")


def _lines(run: Run, points: list[tuple[Workload, list[Record]]], folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    names = list(dict.fromkeys(record["baseline"] for _, records in points for record in records))
    for axis, figure_of, scale, label in (
        (axes[0], _median, 1e3, "forward + backward, ms (median)"),
        (axes[1], _memory, 1e-6, "memory beyond inputs and gradients, MB"),
    ):
        for colour, name in enumerate(names):
            curve = [
                (workload.tokens, value * scale)
                for workload, records in sorted(points, key=lambda point: point[0].tokens)
                for record in records
                if record["baseline"] == name and (value := figure_of(record))
            ]
            if curve:
                width = 2.5 if name in OURS else 1.2
                axis.loglog(*zip(*curve, strict=True), f"C{colour}o-", label=name, linewidth=width)
        axis.set_xlabel("tokens N")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    workload = points[0][0]
    figure.suptitle(f"{workload.model} {workload.dtype} {workload.inputs}\n{machine_line(run.header)}", fontsize=7)
    return _save(figure, folder / f"{run.name}-{workload.model}-against-n-{workload.inputs}.png")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def write(run: Run, folder: Path) -> str:
    """Write the run's table and plots beside its JSON lines; returns the text to print."""
    body = text(run)
    plots = plot(run, folder)
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    (folder / f"{run.name}.md").write_text(body + (f"\n{pictures}\n" if pictures else ""))
    return body
