"""``python -m harmonic_triton loss-kernel package.module:function``: the loss kernel of any model, from the shell.

The entry point is a Python function that returns what the kernel is taken of; see :class:`Task`. Arguments for it are
given as ``--entry-arg name=value`` and reach it as strings.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import warnings
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from harmonic_triton._common import files
from harmonic_triton._common.claims import Claim, InUseError
from harmonic_triton._common.extras import ANALYSIS, missing
from harmonic_triton._common.processes import is_first_process, wait_for_all
from harmonic_triton.losskernel.entry_point import CONTRACT, EntryPointError, Task, check_sizes, count_samples, load
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.run import loss_kernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.data import samples
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stability import stability_bound
from harmonic_triton.losskernel.sampling.tuning import tune
from harmonic_triton.losskernel.tables import group_correlation, write_groups, write_neighbors

# The probe where the command line does not say; every other field has SGLDConfig's own default.
PROBE: dict[str, Any] = {
    "lr": None,
    "nbeta": None,
    "localization": None,
    "batch_size": 32,
    "num_burnin_steps": 50,
    "num_steps_bw_draws": 4,
}
QUICK: dict[str, Any] = {
    "batch_size": 8,
    "num_chains": 4,
    "num_draws": 30,
    "num_burnin_steps": 20,
    "num_steps_bw_draws": 2,
}
STABILITY = 0.15  # of the stability bound, the step size where --lr is not given
PROBE_FILE = "probe.json"  # beside the checkpoint: the settings it began with
LONG = 600.0  # seconds from which on the announcement says what would take less


# --- command line ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options: one for each field of SGLDConfig, and those of the run."""
    parser.add_argument("entry", metavar="package.module:function", help=f"a function that returns {CONTRACT}")
    parser.add_argument("--entry-arg", action="append", default=[], metavar="NAME=VALUE", help="passed to the function")
    probe = parser.add_argument_group("probe", "fields of SGLDConfig")
    defaults = {
        "lr": f"{STABILITY} of the stability bound",
        "nbeta": "n/log n for n training samples",
        "localization": "nbeta times the largest curvature, so that all directions mix within a dozen steps",
    }
    for f in fields(SGLDConfig):
        value = PROBE.get(f.name, None if f.default is MISSING else f.default)
        shown = defaults.get(f.name, "chosen by the sampler" if value is None else str(value))
        option = "--" + f.name.replace("_", "-")
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(f.type))
        text = f"default: {shown}"
        probe.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)
    probe.add_argument("--mask", action="append", metavar="PATTERN", help="sample only parameters whose names match")
    probe.add_argument(
        "--quick",
        action="store_true",
        help="a first look: " + ", ".join(f"{name} {value}" for name, value in QUICK.items()) + " unless given",
    )
    probe.add_argument(
        "--tune", action="store_true", help="choose step size, localization, burn-in and thinning by short runs first"
    )
    probe.add_argument(
        "--target-excess", type=float, metavar="FLOAT", help="of --tune: mean loss above that at w* (default: as much)"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", type=Path, default=Path("runs/loss_kernel/run"), help="output folder (default %(default)s)"
    )
    run.add_argument("--checkpoint-dir", type=Path, help="default: OUT/checkpoint; the same command goes on from there")
    run.add_argument("--checkpoint-seconds", type=float, default=30.0, help="between checkpoints (default %(default)s)")
    run.add_argument("--no-resume", action="store_true", help="remove the checkpoint and start over")
    run.add_argument(
        "--keep", choices=("auto", "covariance", "traces"), default="auto", help="m x m sums, or all draws"
    )
    run.add_argument(
        "--trace-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of draws kept (default %(default)s)"
    )
    run.add_argument("--within-chain", action="store_true", help="estimate with each chain about its own mean")
    run.add_argument("--neighbors", type=int, default=10, metavar="K", help="in the tables (default %(default)s)")
    run.add_argument(
        "--table", type=int, default=30, metavar="ROWS", help="samples in the neighbour table (default 30)"
    )
    run.add_argument("--embedding", choices=("umap", "pca"), default="umap", help="of the report (default %(default)s)")
    run.add_argument("--no-report", action="store_true", help="leave report.html out")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default=None, help="default: where the model is")
    run.add_argument("--quiet", action="store_true", help="no progress")


def main(options: argparse.Namespace) -> int:
    """Sample and write; 2 if the entry point or an option cannot serve, 130 if interrupted."""
    try:
        return run(options)
    except (EntryPointError, ValueError, TypeError, ImportError, OSError, InUseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Load, check, sample, write, print."""
    need_extras(None if options.no_report else options.embedding)
    for name, least in (("neighbors", 1), ("table", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    task = load(options.entry, options.entry_arg)
    num_samples = count_samples(options.entry, task)
    check_sizes(options.entry, task, num_samples)
    first = is_first_process()
    checkpoints = options.checkpoint_dir or options.out / "checkpoint"
    if options.no_resume:
        if first:
            clear(checkpoints)
        wait_for_all()
    config = resumed(options, checkpoints)
    if config is not None:
        if first:
            print(f"goes on from {checkpoints}, with its settings (--no-resume starts over)", flush=True)
    else:
        if first:
            print(f"{options.entry}: {num_samples:,} samples; settings that were not given are estimated", flush=True)
        config = configured(options, task)
        if first:
            if not begun(checkpoints):
                write_probe(checkpoints, config)
            if not options.quiet:
                print(announcement(expected_seconds(options, task, config), config, num_samples), flush=True)
    if first:
        print(f"{options.entry}: {config}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    kernel = loss_kernel(
        task.model,
        task.per_sample_loss,
        task.train_data,
        task.eval_data,
        config,
        seed=options.seed,
        device=options.device,
        mask=options.mask,
        labels=task.labels,
        keep=options.keep,
        trace_dtype=getattr(torch, options.trace_dtype),
        within_chain=options.within_chain,
        checkpoint_dir=checkpoints,
        checkpoint_seconds=options.checkpoint_seconds,
        progress=not options.quiet,
    )
    if first:
        write(kernel, task, config, options)
    return 0


def need_extras(embedding: str | None) -> None:
    """Raise before any work if what is written at the end cannot be; None is no report."""
    report = [] if embedding is None else ["matplotlib", "scipy", "sklearn", *(["umap"] if embedding == "umap" else [])]
    absent = missing(["safetensors", *report])
    if absent:
        without = ", or leave the report out with --no-report" if set(absent) & set(report) else ""
        raise ImportError(
            f"{', '.join(absent)} not installed: {ANALYSIS} (from a clone: pip install '.[analysis]'){without}"
        )


def configured(options: argparse.Namespace, task: Task) -> SGLDConfig:
    """The probe: what was given, the rest by default or from the curvature at the trained weights."""
    given = given_fields(options)
    count = len(samples("train_data", task.train_data, torch.device("cpu")))
    if options.tune:
        return tuned(options, task, given)
    values = {**PROBE, "nbeta": count / math.log(max(count, 2)), "batch_size": min(PROBE["batch_size"], count), **given}
    undecided = [name for name in ("lr", "localization") if values[name] is None]
    placeholders = {"lr": 1e-30, "localization": 0.0}  # until the curvature decides
    config = SGLDConfig(**{**values, **{name: placeholders[name] for name in undecided}})
    if not undecided:
        return config
    bound = stability_bound(
        task.model, task.per_sample_loss, task.train_data, config, seed=options.seed, mask=options.mask
    )
    if not math.isfinite(bound):
        raise ValueError("the loss is flat at the trained weights: give --localization (and --lr)")
    if bound == 0:
        raise ValueError("gradients next to the trained weights are not finite: give --localization and --lr")
    largest = 4 / bound - config.localization  # of nbeta H: one estimate serves both
    if "localization" in undecided:
        config = replace(config, localization=largest)
    if "lr" in undecided:
        config = replace(config, lr=STABILITY * 4 / (largest + config.localization))
    return config


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of SGLDConfig that the command line gives, by themselves or as --quick."""
    given = {f.name: getattr(options, f.name) for f in fields(SGLDConfig) if hasattr(options, f.name)}
    chosen = ("num_burnin_steps", "num_steps_bw_draws") if options.tune else ()
    quick = {name: value for name, value in QUICK.items() if name not in chosen} if options.quick else {}
    return {**quick, **given}


def resumed(options: argparse.Namespace, checkpoints: Path) -> SGLDConfig | None:
    """The settings of the run in the directory, with what is given over them; None where there is no run.

    Estimates depend on the number of threads in their last digits: a run goes on with the values it began with. What is
    given otherwise now is found by the check of the checkpoint, which says what differs.
    """
    path = checkpoints / PROBE_FILE
    if not path.is_file() or not begun(checkpoints):
        return None
    try:
        return SGLDConfig(**{**json.loads(path.read_text(encoding="utf-8")), **given_fields(options)})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no settings of a run ({error}): start over with --no-resume") from error


def begun(checkpoints: Path) -> bool:
    """Whether a run has left a checkpoint or draws."""
    return any(checkpoints.glob("kernel-[0-9]*.pt")) or any(checkpoints.glob("traces-[0-9]*/state.pt"))


def write_probe(checkpoints: Path, config: SGLDConfig) -> None:
    """Keep the settings beside the checkpoint, whole or not at all; InUseError while a process is at it."""
    claim = Claim(checkpoints / "kernel-0.lock")
    try:
        files.write_text(checkpoints / PROBE_FILE, json.dumps(asdict(config), indent=1) + "\n")
    finally:
        claim.release()


def expected_seconds(options: argparse.Namespace, task: Task, config: SGLDConfig) -> float:
    """How long sampling will take, from a few steps of the first group of chains."""
    extra = 3
    trial = replace(config, num_draws=2, num_burnin_steps=extra, num_steps_bw_draws=1)
    sampler = Sampler(
        task.model, task.per_sample_loss, task.train_data, task.eval_data, trial,
        seed=options.seed, device=options.device, mask=options.mask,
    )  # fmt: skip
    laps, last = [], time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself warns
        for draws in sampler.run(check_step_size=False):
            float(draws.losses[0, 0])  # wait for a GPU
            laps.append(time.perf_counter() - last)
            last = time.perf_counter()
            if len(laps) == 2:
                break
    step = max(laps[0] - laps[1], 0.0) / extra  # the first lap holds four steps and a reading, the second one of each
    reading = max(laps[1] - step, 0.0)
    return len(sampler.groups) * (config.num_steps * step + config.num_draws * reading)


def announcement(seconds: float, config: SGLDConfig, num_samples: int) -> str:
    """What is going to happen and how long it takes."""
    minutes = "less than a minute" if seconds < 60 else f"about {seconds / 60:,.0f} minutes"
    if seconds > 5400:
        minutes = f"about {seconds / 3600:,.1f} hours"
    chains = config.num_chains
    text = (
        f"sampling takes {minutes} on this machine: {chains} chains of {config.num_steps:,} steps and {config.num_draws:,}"
        f" draws, each of {num_samples:,} losses; the tables and the report follow"
    )
    return text + ("; --quick, fewer draws or fewer samples take less" if seconds > LONG else "")


def tuned(options: argparse.Namespace, task: Task, given: dict[str, Any]) -> SGLDConfig:
    """Step size, localization, thinning and burn-in by trial; what was given otherwise stays as it is."""
    decided = [name for name in ("lr", "localization", "num_burnin_steps", "num_steps_bw_draws") if name in given]
    if decided or given.get("method", "sgld") != "sgld":
        named = ", ".join("--" + name.replace("_", "-") for name in decided) or "--method"
        raise ValueError(f"--tune chooses step size, localization, burn-in and thinning of sgld: leave {named} out")
    passed: dict[str, Any] = {name: given.get(name) for name in ("nbeta", "batch_size")}
    passed |= {name: given[name] for name in ("num_chains", "num_draws") if name in given}
    result = tune(
        task.model,
        task.per_sample_loss,
        task.train_data,
        seed=options.seed,
        target_excess=options.target_excess,
        mask=options.mask,
        device=options.device,
        verbose=not options.quiet,
        **passed,
    )
    print(result.reason)
    return replace(result.config, **given)


def clear(directory: Path) -> None:
    """Remove a run's checkpoint, and nothing else; InUseError while a process is at it."""
    runs = {path.stem for kind in ("pt", "lock") for path in directory.glob(f"kernel-[0-9]*.{kind}")}
    claims = [Claim(directory / f"{run}.lock") for run in sorted(runs)]  # also of one without a checkpoint yet
    for run in runs:
        (directory / f"{run}.pt").unlink(missing_ok=True)
    for path in directory.glob("traces-*"):
        if (path / "draws.bin").is_file():
            shutil.rmtree(path)
    (directory / PROBE_FILE).unlink(missing_ok=True)
    for claim in claims:
        claim.release()


def write(kernel: LossKernel, task: Task, config: SGLDConfig, options: argparse.Namespace) -> None:
    """Kernel, tables, report and results into the output folder; the most telling lines to stdout."""
    out, k = options.out, min(options.neighbors, kernel.num_samples - 1)
    kernel.save(out / "kernel.safetensors")
    nothing = torch.empty(kernel.num_samples, 0, dtype=torch.int64), torch.empty(kernel.num_samples, 0)
    found = kernel.neighbors(k, exclude_same=task.labels) if k else nothing  # a single sample has no neighbour
    indices, distances = (t.cpu() for t in found)
    listed = min(options.table, kernel.num_samples)
    rows = torch.linspace(0, kernel.num_samples - 1, listed, dtype=torch.float64).round().long().tolist()
    table = write_neighbors(out / "neighbors.tsv", indices, distances, task.names, rows)
    groups = None
    if task.groups is not None:
        groups = write_groups(out / "groups.tsv", group_correlation(kernel, task.groups), task.group_names)
    verdicts = kernel.diagnostics.verdicts()
    results = {
        "entry": options.entry,
        "entry_args": options.entry_arg,
        "seed": options.seed,
        "config": asdict(config),
        "samples": kernel.num_samples,
        "draws": kernel.num_draws,
        "chains": kernel.num_chains,
        "initial_loss": kernel.record.initial_loss,
        "mean_loss": kernel.mean.mean().item(),
        "llc": kernel.llc,
        "diagnostics": [verdict._asdict() for verdict in verdicts],
    }
    files.write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    for verdict in verdicts:
        mark = {True: "good", False: "LOOK", None: ""}[verdict.good]
        print(f"{verdict.name:32} {mark:5} {verdict.value}\n{'':38} {verdict.words}")
    print(f"\nnearest samples ({out / 'neighbors.tsv'} has {len(rows)} samples):")
    print(*table[: 1 + 3 * k], sep="\n")
    if groups is not None:
        print(f"\ngroups whose mean losses move together ({out / 'groups.tsv'}):")
        print(*groups[:16], sep="\n")
    if not options.no_report:
        title = f"Loss kernel of {options.entry}"
        kernel.report(
            out / "report.html", title=title, names=task.names, labels=task.groups, label_names=task.group_names,
            exclude_same=task.labels, method=options.embedding,
        )  # fmt: skip
        print(f"\nreport: {out / 'report.html'}")
