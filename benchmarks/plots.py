"""The plots of a run of the head suite: bars, growth, roofline, error beside speed. Without matplotlib there are none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.baselines import REGISTRY
from benchmarks.head_figures import BYTES, SECONDS, groups, plain, shown, solved_error
from benchmarks.runs import Record, Run, is_ours, machine_line, median, memory
from benchmarks.workloads import DTYPES, Workload
from harmonic_triton.tools import PALETTE, line_style

MARKS = "os^vD<>pXP*hd8H123"
LEGEND = {  # of bars, by one of each kind
    "products": "no head: the products alone",
    "ours_torch": "this library, harmonic loss",
    "ours_lce_torch": "this library, cross-entropy",
    "authors_dense": "others, harmonic loss",
    "cross_entropy": "others, cross-entropy",
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write every plot that the run has figures for; their paths."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    timed = {workload: [r for r in records if r["seconds"]] for workload, records in groups(run).items()}
    timed = {workload: records for workload, records in timed.items() if records}
    if not timed:
        return []
    series = growth.series(run)
    in_series = {workload for one in series for workload, _ in one.points}
    written = []
    for workload, records in timed.items():
        if workload not in in_series:
            written += [_bars(run, workload, records, folder), _errors(run, workload, records, folder)]
    written += [_growth(run, one, folder) for one in series]
    if any(record.get("copy_bytes_per_second") for records in timed.values() for record in records):
        written.append(_roofline(run, timed, folder))
    return written


def _stem(workload: Workload) -> str:
    classes = "" if workload.v is None else f"-v{workload.v}"
    return f"{workload.model}-{workload.tokens}{classes}-{workload.inputs}"


def bars_name(run: Run, workload: Workload) -> str:
    return f"{run.name}-{_stem(workload)}.png"


def _color(name: str) -> str:
    return PALETTE[0] if is_ours(name) else PALETTE[4] if name in REGISTRY else PALETTE[7]


def _hatch(name: str) -> str:
    return "///" if name in REGISTRY and REGISTRY[name].loss == "cross_entropy" else ""


def _marker(name: str) -> str:
    return MARKS[list(REGISTRY).index(name) % len(MARKS)]


def _style(name: str) -> dict[str, Any]:
    """Of a marker: no two baselines have one in common; ours are blue, those of cross-entropy light inside."""
    light = bool(_hatch(name))
    return {
        "marker": _marker(name), "color": _color(name), "markerfacecolor": "none" if light else _color(name),
        "markeredgewidth": 1.6, "linestyle": "none", "markersize": 8,
    }  # fmt: skip


def _title(workload: Workload) -> str:
    shape = f"N = {workload.tokens:,} tokens, V = {workload.classes:,} classes, D = {workload.dim:,}"
    return f"the head of {workload.model}: {shape}, {workload.dtype}, {workload.inputs} inputs"


def _unit(values: list[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that the largest value fills."""
    largest = max((value for value in values if value == value), default=0.0)
    return next(((size, name) for size, name in units if largest >= size), units[-1])


def _bars(run: Run, workload: Workload, records: list[Record], folder: Path) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.42 * len(records) + 2.1), sharey=True)
    records = records[::-1]
    names = [record["baseline"] for record in records]
    places = range(len(names))
    for axis, values, units, label in (
        (left, [median(record) or 0.0 for record in records], SECONDS, "time, forward and backward"),
        (right, [float(memory(record) or "nan") for record in records], BYTES, "memory beyond inputs and gradients"),
    ):
        size, unit = _unit(values, units)
        bars = axis.barh(
            places, [value / size for value in values], color=[_color(name) for name in names], edgecolor="white",
            hatch=[_hatch(name) for name in names],
        )  # fmt: skip
        axis.bar_label(bars, [shown(value, units) for value in values], padding=3)
        axis.margins(x=0.17)
        axis.set_xlabel(f"{label} ({unit})")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [plain(name) for name in names])
    kinds = [
        Patch(facecolor=_color(name), hatch=_hatch(name), edgecolor="white", label=text)
        for name, text in LEGEND.items()
        if any((_color(name), _hatch(name)) == (_color(other), _hatch(other)) for other in names)
    ]
    figure.legend(handles=kinds, frameon=False, fontsize=8, ncols=len(kinds), loc="lower center")
    return _save(figure, run, _title(workload), folder / bars_name(run, workload), below=0.06)


def _errors(run: Run, workload: Workload, records: list[Record], folder: Path) -> Path:
    """Error of the loss and of dX beside the time; at the end of a dotted line that where the true loss is near 1e-20."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True)
    size, unit = _unit([median(record) or 0.0 for record in records], SECONDS)
    for axis, quantity, words in zip(axes, ("loss", "dX"), ("the loss", "the gradient of x"), strict=True):
        for record in records:
            seconds, name = median(record), record["baseline"]
            if not record["checks"] or seconds is None:
                continue
            error, at = max(record["checks"][quantity]["error"], 1e-17), seconds / size
            axis.loglog([at], [error], label=plain(name), **_style(name))
            solved = solved_error(record)
            if quantity == "loss" and solved is not None:
                axis.plot([at] * 2, [error, max(solved, 1e-17)], ":", color=_color(name), linewidth=1.2)
                axis.loglog([at], [max(solved, 1e-17)], **{**_style(name), "markersize": 5})
        axis.set_ylabel(f"relative error of {words}")
        axis.set_xlabel(f"time, forward and backward ({unit})")
        axis.margins(0.15)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=8)
    axes[0].set_title("large: these inputs; small, dotted: tokens whose true loss is near 1e-20", fontsize=9)
    axes[1].set_title("lower and further left is better", fontsize=9)
    _legend_below(figure, axes[0])
    return _save(figure, run, _title(workload), folder / f"{run.name}-{_stem(workload)}-error.png", below=0.14)


def _growth(run: Run, one: growth.Series, folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for axis, figure_of, units, label in (
        (axes[0], median, SECONDS, "time, forward and backward"),
        (axes[1], memory, BYTES, "memory beyond inputs and gradients"),
    ):
        curves = {name: one.curve(name, figure_of) for name in one.names}
        size, unit = _unit([value for curve in curves.values() for _, value in curve], units)
        for number, (name, curve) in enumerate(curves.items()):
            if not curve:
                continue
            x, y = zip(*curve, strict=True)
            style, line = line_style(number), growth.fit(curve)
            marker = _marker(name) if name in REGISTRY else "o"
            if line is not None:
                fitted = [(line.at_zero + line.slope * place) / size for place in x]
                axis.loglog(x, fitted, linewidth=2.2 if is_ours(name) else 1.3, **style)
            axis.loglog(
                x, [value / size for value in y], linestyle="none", marker=marker, markersize=6, color=style["color"]
            )
            axis.plot([], [], marker=marker, linewidth=1.8, label=plain(name), **style)
        axis.set_xlabel("tokens N" if one.axis == "N" else "classes V")
        axis.set_ylabel(f"{label} ({unit})")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xticks(sorted({growth.along(workload, one.axis) for workload, _ in one.points}))
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
    _legend_below(figure, axes[0])
    first = one.points[0][0]
    fixed = f"V = {first.classes:,} classes" if one.axis == "N" else f"N = {first.tokens:,} tokens"
    title = f"{fixed}, D = {first.dim:,}, {first.dtype}: measured points, and straight lines fitted to them"
    return _save(figure, run, title, folder / f"{run.name}-{one.stem}.png", below=0.12)


def intensity(workload: Workload, through_scores: bool = False) -> float:
    """Floating-point operations of the three products for each byte that must move: x, W, dX, dW once, and, where N x V scores
    go through memory, those written once and read once in fp32."""
    size = DTYPES[workload.dtype].itemsize
    moved = 2 * size * workload.dim * (workload.tokens + workload.classes)
    if through_scores:
        moved += 8 * workload.tokens * workload.classes
    return workload.floor_flops / moved


def _roofline(run: Run, timed: dict[Workload, list[Record]], folder: Path) -> Path:
    """Rate of the floor's operations against operations a byte, under this run's own product rate and copy rate."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5.5))
    bare = [record for records in timed.values() for record in records if record["baseline"] == "products"]
    rate = max(record["tflops"] for record in bare)
    copy = max(record.get("copy_bytes_per_second", 0.0) for record in bare) / 1e12
    places = [intensity(workload, held) for workload in timed for held in (False, True)]
    span = [min(*places, rate / copy) / 2, max(places) * 2]
    steps = [span[0] * (span[1] / span[0]) ** (i / 100) for i in range(101)]
    axis.loglog(
        steps, [min(rate, copy * step) for step in steps], "k-", label="this machine's limit: bare products, copying"
    )
    labeled = set()
    for workload, records in timed.items():
        for record in records:
            name = record["baseline"]
            if name not in REGISTRY:
                continue
            place = intensity(workload, through_scores=REGISTRY[name].bytes_per_score > 0)
            label = None if name in labeled else plain(name)
            axis.loglog([place], [record["tflops"]], label=label, **{**_style(name), "markersize": 6})
            labeled.add(name)
    axis.set_xlabel(
        "operations of the three products that no head can do without, for each byte that must move"
        "\n(dense forms write the N x V scores once and read them once)"
    )
    axis.set_ylabel("TFLOP/s of the three products")
    axis.grid(alpha=0.3, which="both")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    _legend_below(figure, axis)
    return _save(
        figure, run, "how near each head comes to what the machine can do", folder / f"{run.name}-roofline.png", 0.14
    )


def _legend_below(figure: Any, axis: Any) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="lower center", handlelength=3.5
    )


def _save(figure: Any, run: Run, title: str, path: Path, below: float = 0.0) -> Path:
    """``below`` is the share of the height that a legend under the axes takes."""
    import matplotlib.pyplot as plt

    figure.suptitle(title, fontsize=11)
    figure.text(0.5, 0.925, machine_line(run.header), ha="center", fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, below, 1, 0.95))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
