"""``python -m benchmarks``: measure; ``python -m benchmarks report``: tables and plots again from stored runs."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import UsageError, plots, readme, report, runs
from benchmarks.baselines import REGISTRY, Baseline
from benchmarks.machine import describe
from benchmarks.measure import Plan, run
from benchmarks.workloads import DTYPES, INPUTS, MODELS, Workload


@dataclass(frozen=True)
class Choice:
    """What a run measures where the command line leaves it open."""

    workload: tuple[str, ...]
    n: tuple[int, ...]
    repeats: int
    patience: float
    v: tuple[int, ...] = ()  # workloads beside those with the models' own V: every one of these V at the first N


USUAL = Choice(workload=("gpt2",), n=(2048,), repeats=5, patience=math.inf)
QUICK = Choice(workload=("quick",), n=(256, 1024), repeats=5, patience=4.0)
GROWTH = Choice(
    workload=("growth",),
    n=(2048, 512, 1024, 4096, 8192),
    repeats=5,
    patience=8.0,
    v=(4096, 8192, 32768, 65536),
)
GROWTH_BASELINES = ("ours_torch", "ours_triton", "ours_lce_torch", "ours_lce_triton", "cross_entropy")


def parser() -> argparse.ArgumentParser:
    shapes = "; ".join(f"{name} {model.dim}/{model.classes}" for name, model in MODELS.items())
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Harmonic loss beside everything it would replace: accuracy first, then time and memory.",
        epilog="'python -m benchmarks report [FILE ...]' makes tables and plots again from stored runs.",
    )
    parse.add_argument("--workload", nargs="+", metavar="MODEL", help=f"heads, D/V: {shapes} (default gpt2)")
    parse.add_argument("--n", nargs="+", type=int, metavar="N", help="numbers of tokens (default 2048)")
    parse.add_argument("--dtype", default="fp32", help=f"{', '.join(DTYPES)} (default fp32)")
    parse.add_argument("--inputs", nargs="+", default=["random"], help=f"{', '.join(INPUTS)} (default random)")
    parse.add_argument("--baselines", nargs="+", metavar="NAME", help=f"some of {', '.join(REGISTRY)} (default all)")
    parse.add_argument("--repeats", type=int, help="interleaved rounds (default 5)")
    parse.add_argument("--v", nargs="+", type=int, metavar="V", help="numbers of classes (default the models')")
    parse.add_argument(
        "--patience", type=float, help="seconds of timing after which a slow baseline gets fewer repeats (default none)"
    )
    parse.add_argument("--once", nargs="+", metavar="NAME", default=[], help="baselines to time once only: slow ones")
    parse.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    parse.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)")
    parse.add_argument("--quick", action="store_true", help="a small head at two N, within 3 minutes on two cores")
    parse.add_argument("--growth", action="store_true", help="time and memory against N and against V, with fits")
    parse.add_argument("--out", type=Path, default=runs.RESULTS, help="results folder (default benchmarks/results)")
    return parse


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the request before any work; raises :class:`UsageError` naming the argument and the mend."""
    if arguments.quick and arguments.growth:
        raise UsageError("--quick and --growth are two runs: drop one")
    choice, preset = (
        (QUICK, "--quick") if arguments.quick else (GROWTH, "--growth") if arguments.growth else (USUAL, "")
    )
    if preset:
        for name in ("workload", "n", "v", "repeats", "patience"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{preset} chooses --{name} itself: drop --{name} or {preset}")
    if arguments.repeats is not None and arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats} measures nothing: give an integer of at least 1")
    if arguments.patience is not None and not arguments.patience > 0:
        raise UsageError(f"--patience {arguments.patience} leaves no time to measure: give seconds above 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads} is no number of threads: give an integer of at least 1")
    if arguments.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {arguments.device!r} is not known: choose from auto, cpu, cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA GPU here: use --device cpu")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    models, tokens = arguments.workload or choice.workload, arguments.n or choice.n
    shapes = [(n, v) for v in arguments.v or (None,) for n in tokens] + [(tokens[0], v) for v in choice.v if preset]
    workloads = [
        Workload(model, n, arguments.dtype, inputs, device, v)
        for model in models
        for inputs in arguments.inputs
        for n, v in shapes
    ]
    named = arguments.baselines or (GROWTH_BASELINES if arguments.growth else None)
    return Plan(
        workloads=workloads,
        baselines=_choose(named),
        by_name=arguments.baselines is not None,
        repeats=arguments.repeats or choice.repeats,
        threads=arguments.threads or torch.get_num_threads(),
        patience=arguments.patience or choice.patience,
        once=frozenset(baseline.name for baseline in _choose(arguments.once, "--once") if arguments.once),
    )


def _choose(names: Sequence[str] | None, option: str = "--baselines") -> list[Baseline]:
    for name in names or ():
        if name not in REGISTRY:
            raise UsageError(f"{option} {name!r} is not registered: choose from {', '.join(REGISTRY)}")
    return [REGISTRY[name] for name in dict.fromkeys(names or REGISTRY)]


def _measure(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    plan = make_plan(arguments)
    torch.set_num_threads(plan.threads)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    device = plan.workloads[0].device
    header = describe(device) | {"command": " ".join(["python -m benchmarks", *_without_out(argv)])}
    models = "+".join(dict.fromkeys(workload.model for workload in plan.workloads))
    stem = f"{header['time'].replace(':', '').replace('-', '')}-{device}-{models}-{arguments.dtype}"
    done = runs.save(arguments.out / f"{stem}.jsonl", header, run(plan, say))
    print(write(done, arguments.out))
    say(f"{stem}.jsonl, .md and plots are in the results folder")
    wrong = [r for r in done.records if runs.is_ours(r["baseline"]) and r["status"] in ("failed", "failed the gate")]
    for record in wrong:
        print(f"{record['baseline']} {record['status']}: {record['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _without_out(argv: Sequence[str]) -> list[str]:
    """The command line less the results folder, which says nothing about the measurement."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return kept


def write(run: runs.Run, folder: Path) -> str:
    """Write a run's tables and plots beside its JSON lines; returns the text to print."""
    body = report.text(run)
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in plots.draw(run, folder))
    (folder / f"{run.name}.md").write_text(body + (f"\n{pictures}\n" if pictures else ""))
    return body


def _report(argv: Sequence[str]) -> int:
    """Tables and plots again from stored runs, and the README's block from one of them."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks report", description=_report.__doc__)
    parse.add_argument("files", nargs="*", type=Path, help="JSON lines of runs (default all in benchmarks/results)")
    parse.add_argument("--readme", type=Path, metavar="FILE", help="also put this run's figures into the README")
    arguments = parse.parse_args(argv)
    files = arguments.files or ([arguments.readme] if arguments.readme else sorted(runs.RESULTS.glob("*.jsonl")))
    if not files:
        raise UsageError("no runs are stored in benchmarks/results: measure with 'python -m benchmarks' first")
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is no file: name the JSON lines of a run")
        print(write(runs.load(path), path.parent))
    if arguments.readme:
        readme.rewrite(runs.load(arguments.readme))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _report(argv[1:]) if argv[:1] == ["report"] else _measure(argv)
    except UsageError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
