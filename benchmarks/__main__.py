"""``python -m benchmarks``: measure; ``python -m benchmarks report``: tables and plots again from stored runs."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import UsageError, report
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


QUICK = Choice(workload=("quick",), n=(512, 2048), repeats=3)
USUAL = Choice(workload=("gpt2",), n=(2048,), repeats=5)


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
    parse.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    parse.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)")
    parse.add_argument("--quick", action="store_true", help="a small head at two N, within 3 minutes on two cores")
    parse.add_argument("--out", type=Path, default=report.RESULTS, help="results folder (default benchmarks/results)")
    return parse


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Check the request before any work; raises :class:`UsageError` naming the argument and the mend."""
    if arguments.quick:
        for name in ("workload", "n", "repeats"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--quick chooses --{name} itself: drop --{name} or --quick")
    choice = QUICK if arguments.quick else USUAL
    if arguments.repeats is not None and arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats} measures nothing: give an integer of at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads} is no number of threads: give an integer of at least 1")
    if arguments.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {arguments.device!r} is not known: choose from auto, cpu, cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch finds no CUDA GPU here: use --device cpu")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workloads = [
        Workload(model, n, arguments.dtype, inputs, device)
        for model in arguments.workload or choice.workload
        for inputs in arguments.inputs
        for n in arguments.n or choice.n
    ]
    return Plan(
        workloads=workloads,
        baselines=_choose(arguments.baselines),
        by_name=arguments.baselines is not None,
        repeats=arguments.repeats or choice.repeats,
        threads=arguments.threads or torch.get_num_threads(),
    )


def _choose(names: Sequence[str] | None) -> list[Baseline]:
    for name in names or ():
        if name not in REGISTRY:
            raise UsageError(f"--baselines {name!r} is not registered: choose from {', '.join(REGISTRY)}")
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
    done = report.save(arguments.out / f"{stem}.jsonl", header, run(plan, say))
    print(report.write(done, arguments.out))
    say(f"{stem}.jsonl, .md and plots are in the results folder")
    wrong = [r for r in done.records if r["baseline"] in report.OURS and r["status"] in ("failed", "failed the gate")]
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


def _report(argv: Sequence[str]) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks report", description=_report.__doc__)
    parse.add_argument("files", nargs="*", type=Path, help="JSON lines of runs (default all in benchmarks/results)")
    files = parse.parse_args(argv).files or sorted(report.RESULTS.glob("*.jsonl"))
    if not files:
        raise UsageError("no runs are stored in benchmarks/results: measure with 'python -m benchmarks' first")
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} is no file: name the JSON lines of a run")
        print(report.write(report.load(path), path.parent))
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
