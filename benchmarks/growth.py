"""How time and memory grow with N and with V: straight lines through a run's figures, and how far they miss them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.head_figures import groups
from benchmarks.runs import Record, Run, median, memory
from benchmarks.workloads import Workload

POINTS = 4  # a line through fewer says nothing


class Line(NamedTuple):
    """y = at_zero + slope x, least squares of relative errors."""

    at_zero: float
    slope: float
    residual: float  # the largest |y - line|/y


@dataclass(frozen=True)
class Series:
    """The workloads of a run that differ along one axis alone."""

    axis: str  # "N" | "V"
    points: list[tuple[Workload, list[Record]]]  # in order along the axis

    @property
    def fixed(self) -> str:
        first = self.points[0][0]
        other = f"V={first.classes}" if self.axis == "N" else f"N={first.tokens}"
        return f"{first.model} {other} D={first.dim} {first.dtype} {first.inputs} on {first.device}"

    @property
    def stem(self) -> str:
        first = self.points[0][0]
        other = f"v{first.classes}" if self.axis == "N" else f"n{first.tokens}"
        return f"{first.model}-{other}-{first.inputs}-against-{self.axis.lower()}"

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(record["baseline"] for _, records in self.points for record in records))

    def curve(self, name: str, figure: Callable[[Record], float | None]) -> list[tuple[int, float]]:
        """(N or V, figure) of one baseline, where it has one."""
        return [
            (along(workload, self.axis), value)
            for workload, records in self.points
            for record in records
            if record["baseline"] == name and (value := figure(record))
        ]


def along(workload: Workload, axis: str) -> int:
    return workload.tokens if axis == "N" else workload.classes


def series(run: Run) -> list[Series]:
    """Every set of at least ``POINTS`` timed workloads along one axis."""
    found: dict[tuple[object, ...], dict[Workload, list[Record]]] = {}
    for workload, records in groups(run).items():
        timed = [record for record in records if record["seconds"]]
        for axis, other in (("N", workload.classes), ("V", workload.tokens)):
            key = (axis, workload.model, workload.dtype, workload.inputs, other)
            if timed:
                found.setdefault(key, {})[workload] = timed
    return [_ordered(str(key[0]), points) for key, points in found.items() if len(points) >= POINTS]


def _ordered(axis: str, points: dict[Workload, list[Record]]) -> Series:
    return Series(axis, sorted(points.items(), key=lambda point: along(point[0], axis)))


def fit(curve: Sequence[tuple[int, float]]) -> Line | None:
    if len(curve) < POINTS:
        return None
    x, y = torch.tensor(curve, dtype=torch.float64).unbind(1)
    columns = torch.stack([1 / y, x / y], dim=1)
    at_zero, slope = torch.linalg.lstsq(columns, torch.ones(len(y), 1, dtype=torch.float64)).solution.flatten().tolist()
    return Line(at_zero, slope, ((at_zero + slope * x - y) / y).abs().max().item())


COLUMNS = (
    "baseline",
    "time at 0, ms",
    "time each, us",
    "largest residual",
    "memory at 0, MB",
    "memory each, bytes",
    "largest residual of memory",
    "memory of the last two, MB",
)


def rows(one: Series) -> list[list[str]]:
    """A table row for each baseline: intercept, slope and worst residual of its time and of its memory."""
    made = []
    for name in one.names:
        time, space = fit(one.curve(name, median)), fit(one.curve(name, memory))
        cells = [name]
        cells += ["-"] * 3 if time is None else [
            f"{1e3 * time.at_zero:.3g}", f"{1e6 * time.slope:.4g}", f"{time.residual:.1%}"
        ]  # fmt: skip
        cells += ["-"] * 3 if space is None else [
            f"{1e-6 * space.at_zero:.3g}", f"{space.slope:.4g}", f"{space.residual:.1%}"
        ]  # fmt: skip
        last = one.curve(name, memory)[-2:]
        cells.append(", ".join(f"{1e-6 * value:.0f}" for _, value in last) or "-")
        made.append(cells)
    return made
