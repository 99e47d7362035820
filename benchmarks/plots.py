"""The plots of a run of the head suite: bars, growth, roofline, error beside speed. Without matplotlib there are none."""

from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.baselines import REGISTRY
from benchmarks.head_figures import groups, solved_error
from benchmarks.runs import Record, Run, is_ours, machine_line, median, memory
from benchmarks.workloads import DTYPES, Workload


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
    if is_ours(name):
        return "tab:red" if REGISTRY[name].loss == "harmonic" else "tab:pink"
    if name not in REGISTRY:
        return "0.6"
    return "tab:orange" if REGISTRY[name].loss == "harmonic" else "tab:blue"


def _marker(name: str) -> str:
    return "os^vD<>pXP*hd8"[list(REGISTRY).index(name) % 14]


def _bars(run: Run, workload: Workload, records: list[Record], folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(records) + 1.8), sharey=True)
    names = [record["baseline"] for record in records][::-1]
    colors = [_color(name) for name in names]
    times = [1e3 * (median(record) or 0.0) for record in records][::-1]
    memories = [(memory(record) or float("nan")) / 1e6 for record in records][::-1]
    for axis, values, label in (
        (left, times, "forward + backward, ms (median)"),
        (right, memories, "memory beyond inputs and gradients, MB"),
    ):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.5g", padding=2)
        axis.margins(x=0.15)
        axis.set_xlabel(label)
    return _save(figure, run, str(workload), folder / bars_name(run, workload))


def _errors(run: Run, workload: Workload, records: list[Record], folder: Path) -> Path:
    """Error of the loss and of dX beside the time; dotted, up to the error where the true loss is near 1e-20."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for axis, quantity in zip(axes, ("loss", "dX"), strict=True):
        for record in records:
            seconds, name = median(record), record["baseline"]
            if not record["checks"] or seconds is None:
                continue
            error = max(record["checks"][quantity]["error"], 1e-17)
            axis.loglog(1e3 * seconds, error, _marker(name), color=_color(name), label=name)
            solved = solved_error(record)
            if quantity == "loss" and solved is not None:
                axis.plot([1e3 * seconds] * 2, [error, max(solved, 1e-17)], ":", color=_color(name), linewidth=1)
                axis.loglog(1e3 * seconds, max(solved, 1e-17), _marker(name), color=_color(name), fillstyle="none")
        axis.set_ylabel(f"relative error of {quantity} against fp64")
        axis.set_xlabel("forward + backward, ms (median)")
        axis.margins(0.15)
        axis.grid(alpha=0.3)
    axes[0].set_title("filled: these inputs; hollow: true losses near 1e-20", fontsize=8)
    axes[1].legend(fontsize=7)
    return _save(figure, run, str(workload), folder / f"{run.name}-{_stem(workload)}-error.png")


def _growth(run: Run, one: growth.Series, folder: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, figure_of, scale, label in (
        (axes[0], median, 1e3, "forward + backward, ms (median)"),
        (axes[1], memory, 1e-6, "memory beyond inputs and gradients, MB"),
    ):
        for number, name in enumerate(one.names):
            curve = one.curve(name, figure_of)
            if not curve:
                continue
            x, y = zip(*curve, strict=True)
            axis.loglog(x, [scale * value for value in y], f"C{number}o", label=name, markersize=4)
            line = growth.fit(curve)
            if line is not None:
                fitted = [scale * (line.at_zero + line.slope * place) for place in x]
                axis.loglog(x, fitted, f"C{number}-", linewidth=2 if is_ours(name) else 1)
        axis.set_xlabel("tokens N" if one.axis == "N" else "classes V")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return _save(figure, run, f"{one.fixed}; lines: linear fits", folder / f"{run.name}-{one.stem}.png")


def intensity(workload: Workload, through_scores: bool = False) -> float:
    """Floating-point operations of the 3U floor for each byte that must move: x, W, dX, dW once, and, where N x V scores
    go through memory, those written once and read once in fp32."""
    size = DTYPES[workload.dtype].itemsize
    moved = 2 * size * workload.dim * (workload.tokens + workload.classes)
    if through_scores:
        moved += 8 * workload.tokens * workload.classes
    return workload.floor_flops / moved


def _roofline(run: Run, timed: dict[Workload, list[Record]], folder: Path) -> Path:
    """Rate of the floor's operations against operations a byte, under this run's own product rate and copy rate."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    bare = [record for records in timed.values() for record in records if record["baseline"] == "products"]
    rate = max(record["tflops"] for record in bare)
    copy = max(record.get("copy_bytes_per_second", 0.0) for record in bare) / 1e12
    places = [intensity(workload, held) for workload in timed for held in (False, True)]
    span = [min(*places, rate / copy) / 2, max(places) * 2]
    steps = [span[0] * (span[1] / span[0]) ** (i / 100) for i in range(101)]
    axis.loglog(steps, [min(rate, copy * step) for step in steps], "k-", label="products and copy of this run")
    labeled = set()
    for workload, records in timed.items():
        for record in records:
            name = record["baseline"]
            if name not in REGISTRY:
                continue
            place = intensity(workload, through_scores=REGISTRY[name].bytes_per_score > 0)
            label = None if name in labeled else name
            axis.loglog(place, record["tflops"], _marker(name), color=_color(name), label=label, markersize=5)
            labeled.add(name)
    axis.set_xlabel("floor operations for each byte that must move (dense forms: N x V scores written and read once)")
    axis.set_ylabel("TFLOP/s of the 3U floor")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return _save(figure, run, "roofline", folder / f"{run.name}-roofline.png")


def _save(figure: Any, run: Run, title: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.suptitle(f"{title}\n{machine_line(run.header)}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
