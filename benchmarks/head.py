"""The head suite: what its command line asks for, as a plan."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import UsageError, head_report, plots
from benchmarks.baselines import REGISTRY, Baseline
from benchmarks.measure import Plan, run
from benchmarks.suite import Request, Suite
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = "; ".join(f"{name} {model.dim}/{model.classes}" for name, model in MODELS.items())
    parser.add_argument("--workload", nargs="+", metavar="MODEL", help=f"heads, D/V: {shapes} (default gpt2)")
    parser.add_argument("--n", nargs="+", type=int, metavar="N", help="numbers of tokens (default 2048)")
    parser.add_argument("--dtype", default="fp32", help=f"{', '.join(DTYPES)} (default fp32)")
    parser.add_argument("--inputs", nargs="+", default=["random"], help=f"{', '.join(INPUTS)} (default random)")
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help=f"some of {', '.join(REGISTRY)} (default all)")
    parser.add_argument("--v", nargs="+", type=int, metavar="V", help="numbers of classes (default the models')")
    parser.add_argument(
        "--patience", type=float, help="seconds of timing after which a slow baseline gets fewer repeats (default none)"
    )
    parser.add_argument("--once", nargs="+", metavar="NAME", default=[], help="baselines to time once only: slow ones")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)")
    parser.add_argument("--quick", action="store_true", help="a small head at two N, within 3 minutes on two cores")
    parser.add_argument("--growth", action="store_true", help="time and memory against N and against V, with fits")


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
    if arguments.patience is not None and not arguments.patience > 0:
        raise UsageError(f"--patience {arguments.patience} leaves no time to measure: give seconds above 0")
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


def request(arguments: argparse.Namespace) -> Request:
    plan = make_plan(arguments)
    models = "+".join(dict.fromkeys(workload.model for workload in plan.workloads))
    return Request(
        what=f"{models}-{arguments.dtype}",
        device=plan.workloads[0].device,
        threads=plan.threads,
        settings={"repeats": plan.repeats},
        records=lambda say: run(plan, say),
    )


SUITE = Suite(
    name="head",
    describe="harmonic loss beside everything it would replace: accuracy first, then time and memory",
    add_arguments=add_arguments,
    request=request,
    sections=head_report.sections,
    draw=plots.draw,
)
