"""``python -m harmonic_triton loss-kernel package.module:function``: the loss kernel of any model, from the shell.

The entry point is a Python function that returns what the kernel is taken of; see :class:`Task`. Arguments for it are
given as ``--entry-arg name=value`` and reach it as strings.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harmonic_triton._common import files

if TYPE_CHECKING:
    from harmonic_triton.losskernel.kernel import LossKernel
    from harmonic_triton.losskernel.sampling.sampler import SGLDConfig

REQUIRED = ("model", "per_sample_loss", "train_data", "eval_data")
OPTIONAL = ("labels", "names", "groups", "group_names")
CONTRACT = (
    "a dict with model (nn.Module), per_sample_loss (a function of model and batch that returns a loss a sample), "
    "train_data and eval_data, and perhaps labels ((m,) integers), names (m strings), groups ((m,) integers) and "
    "group_names; or the first four as a tuple"
)
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


class EntryPointError(Exception):
    """The entry point cannot be found or does not return what is expected."""


@dataclass(frozen=True)
class Task:
    """What an entry point returns."""

    model: nn.Module
    per_sample_loss: Any  # (model, batch) -> (b,) or (b, ...)
    train_data: Any
    eval_data: Any
    labels: Tensor | None = None  # (m,) integers; pairs with equal ones are never neighbours
    names: Sequence[str] | None = None  # of the m samples
    groups: Tensor | None = None  # (m,) integers, for example which file; correlated with one another as wholes
    group_names: Sequence[str] | None = None


def resolve(text: str) -> Any:
    """The function named ``package.module:function``; modules in the working directory are found too.

    Raises:
        EntryPointError: no such module or function, or the module fails while it is imported.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise EntryPointError(f"{text!r} is no entry point: write package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise EntryPointError(
                f"there is no module {error.name!r} (of {text!r}) on the path; run from the folder that holds it, or "
                "install it"
            ) from error
        raise EntryPointError(f"{module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise EntryPointError(f"{module_name} fails while it is imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            functions = sorted(key for key, value in vars(found).items() if callable(value) and not key.startswith("_"))
            raise EntryPointError(f"{module_name} has no {name!r}; it has {', '.join(functions) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise EntryPointError(f"{text} is {type(found).__name__}, not a function; it has to return {CONTRACT}")
    return found


def load(text: str, arguments: Sequence[str]) -> Task:
    """Call the entry point with ``name=value`` arguments and check what it returns.

    Raises:
        EntryPointError: it cannot be found or called so, or returns something else than :class:`Task` describes.
    """
    function = resolve(text)
    given = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise EntryPointError(f"--entry-arg {argument!r}: write name=value")
        given[name] = value
    try:
        returned = function(**given)
    except (TypeError, ValueError, OSError) as error:
        raise EntryPointError(f"{text} failed: {type(error).__name__}: {error}") from error
    return checked(text, returned)


def checked(text: str, returned: Any) -> Task:
    """A Task out of what the entry point returned."""
    if isinstance(returned, tuple) and hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, tuple) and len(returned) == len(REQUIRED):
        returned = dict(zip(REQUIRED, returned, strict=True))
    if not isinstance(returned, Mapping):
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise EntryPointError(f"{text} returned {type(returned).__name__}{size}, expected {CONTRACT}")
    missing = [name for name in REQUIRED if name not in returned]
    unknown = [str(name) for name in returned if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        wrong = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
        raise EntryPointError(f"{text} returned a dict {' and '.join(wrong)}; expected {CONTRACT}")
    task = Task(**returned)
    if not isinstance(task.model, nn.Module):
        raise EntryPointError(f"{text}: model is {type(task.model).__name__}, expected nn.Module")
    if not callable(task.per_sample_loss):
        kind = type(task.per_sample_loss).__name__
        raise EntryPointError(f"{text}: per_sample_loss is {kind}, expected a function of (model, batch)")
    for name in ("labels", "groups"):
        value = getattr(task, name)
        if value is not None and (not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point()):
            shape = f" of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else ""
            raise EntryPointError(f"{text}: {name} is {type(value).__name__}{shape}, expected (m,) integers")
    if task.groups is not None and len(task.groups):
        low, high = int(task.groups.min()), int(task.groups.max())
        if low < 0:
            raise EntryPointError(f"{text}: groups hold {low}; number them from 0 on")
        if task.group_names is not None and high >= len(task.group_names):
            raise EntryPointError(f"{text}: groups hold {high}, group_names has {len(task.group_names)}")
    return task


def check_sizes(text: str, task: Task, samples: int) -> None:
    """Labels, names and groups must be one a sample; how many samples there are is known from the losses at w*."""
    for name in ("labels", "names", "groups"):
        value = getattr(task, name)
        if value is not None and len(value) != samples:
            raise EntryPointError(f"{text}: {name} has {len(value)} entries, but eval_data gives {samples} losses")


# --- what the command writes -------------------------------------------------------------------------------------------


def group_correlation(kernel: LossKernel, groups: Tensor) -> Tensor:
    """(G, G) fp64 correlation of the groups' mean standardised losses, from products with ρ: no m x m is formed.

    With a_g the indicator of group g over its size it is a_gᵀ ρ a_h, scaled to a diagonal of 1; 0 for groups without
    variance. The noise of few draws is in it as in ρ.
    """
    groups = groups.cpu()
    sizes = torch.bincount(groups)
    total = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
    for g in (sizes > 0).nonzero().squeeze(1).tolist():
        image = kernel.product((groups == g).double() / sizes[g]).double().cpu()
        total[g] = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, groups, image) / sizes.clamp_min(1)
    total = (total + total.T) / 2
    scale = total.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0.0)
    return (total * scale * scale[:, None]).clamp(-1, 1)


def write_neighbors(
    path: Path, indices: Tensor, distances: Tensor, names: Sequence[str] | None, samples: Sequence[int]
) -> list[str]:
    """The nearest samples of some, one line a pair: sample, rank, neighbour, ρ. Returns the lines."""
    called = (lambda i: str(i)) if names is None else (lambda i: f"{i}\t{one_line(names[i])}")
    header = "sample\trank\tneighbor\trho" if names is None else "sample\tname\trank\tneighbor\tneighbor_name\trho"
    lines = [header]
    for i in samples:
        for rank, (j, far) in enumerate(zip(indices[i].tolist(), distances[i].tolist(), strict=True), start=1):
            if j >= 0:
                lines.append(f"{called(i)}\t{rank}\t{called(j)}\t{1 - far * far / 2:.4f}")
    files.write_text(path, "\n".join(lines) + "\n")
    return lines


def write_groups(path: Path, correlation: Tensor, names: Sequence[str] | None, most: int = 5) -> list[str]:
    """Each group's most correlated other groups. Returns the lines."""
    called = str if names is None else names.__getitem__
    present = correlation.diagonal() > 0
    lines = ["group\tmost correlated others"]
    for g in present.nonzero().squeeze(1).tolist():
        row = correlation[g].masked_fill(~present, -math.inf)
        row[g] = -math.inf
        best, which = row.topk(min(most, len(row)))
        others = [f"{called(h)} {r:.3f}" for h, r in zip(which.tolist(), best.tolist(), strict=True) if r > -math.inf]
        lines.append(f"{called(g)}\t{', '.join(others)}")
    files.write_text(path, "\n".join(lines) + "\n")
    return lines


def one_line(text: str) -> str:
    """A name without tabs or line ends."""
    return " ".join(str(text).split())


# --- command line ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options: one for each field of SGLDConfig, and those of the run."""
    from harmonic_triton.losskernel.sampling.sampler import SGLDConfig

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
    except (EntryPointError, ValueError, TypeError, ImportError, OSError, files.InUseError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Load, check, sample, write, print."""
    from harmonic_triton.losskernel.kernel import loss_kernel

    need_extras(None if options.no_report else options.embedding)
    for name, least in (("neighbors", 1), ("table", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    task = load(options.entry, options.entry_arg)
    samples = count_samples(options.entry, task)
    check_sizes(options.entry, task, samples)
    first = is_first_process()
    checkpoints = options.checkpoint_dir or options.out / "checkpoint"
    if options.no_resume:
        clear(checkpoints)
    config = resumed(options, checkpoints)
    if config is not None:
        if first:
            print(f"goes on from {checkpoints}, with its settings (--no-resume starts over)", flush=True)
    else:
        if first:
            print(f"{options.entry}: {samples:,} samples; settings that were not given are estimated", flush=True)
        config = configured(options, task)
        if first:
            if not begun(checkpoints):
                write_probe(checkpoints, config)
            if not options.quiet:
                print(announcement(expected_seconds(options, task, config), config, samples), flush=True)
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
    if is_first_process():
        write(kernel, task, config, options)
    return 0


def need_extras(embedding: str | None) -> None:
    """Raise before any work if what is written at the end cannot be; None is no report."""
    report = [] if embedding is None else ["matplotlib", "scipy", "sklearn", *(["umap"] if embedding == "umap" else [])]
    missing = [name for name in ["safetensors", *report] if importlib.util.find_spec(name) is None]
    if missing:
        without = ", or leave the report out with --no-report" if set(missing) & set(report) else ""
        raise ImportError(
            f"{', '.join(missing)} not installed: pip install 'harmonic-triton[analysis]' (from a clone: pip install"
            f" '.[analysis]'){without}"
        )


def count_samples(text: str, task: Task) -> int:
    """m, from the loss of the first evaluation sample."""
    from harmonic_triton.losskernel.sampling.data import samples

    device = next((p.device for p in task.model.parameters()), torch.device("cpu"))
    data = samples("eval_data", task.eval_data, device)
    training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            first = task.per_sample_loss(task.model, data.block(0, 1))
    except Exception as error:
        raise EntryPointError(
            f"{text}: per_sample_loss(model, batch) fails on the first sample of eval_data: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        task.model.train(training)
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) != 1:
        got = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise EntryPointError(f"{text}: per_sample_loss gives {got} for one sample, expected (1,) or (1, ...)")
    return len(data) * first.numel()


def configured(options: argparse.Namespace, task: Task) -> SGLDConfig:
    """The probe: what was given, the rest by default or from the curvature at the trained weights."""
    from harmonic_triton.losskernel.sampling.data import samples
    from harmonic_triton.losskernel.sampling.sampler import SGLDConfig, stability_bound

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
    from harmonic_triton.losskernel.sampling.sampler import SGLDConfig

    given = {f.name: getattr(options, f.name) for f in fields(SGLDConfig) if hasattr(options, f.name)}
    chosen = ("num_burnin_steps", "num_steps_bw_draws") if options.tune else ()
    quick = {name: value for name, value in QUICK.items() if name not in chosen} if options.quick else {}
    return {**quick, **given}


def resumed(options: argparse.Namespace, checkpoints: Path) -> SGLDConfig | None:
    """The settings of the run in the directory, with what is given over them; None where there is no run.

    Estimates depend on the number of threads in their last digits: a run goes on with the values it began with. What is
    given otherwise now is found by the check of the checkpoint, which says what differs.
    """
    from harmonic_triton.losskernel.sampling.sampler import SGLDConfig

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
    claim = files.Claim(checkpoints / "kernel-0.lock")
    try:
        files.write_text(checkpoints / PROBE_FILE, json.dumps(asdict(config), indent=1) + "\n")
    finally:
        claim.release()


def expected_seconds(options: argparse.Namespace, task: Task, config: SGLDConfig) -> float:
    """How long sampling will take, from a few steps of the first group of chains."""
    from harmonic_triton.losskernel.sampling.sampler import Sampler

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


def announcement(seconds: float, config: SGLDConfig, samples: int) -> str:
    """What is going to happen and how long it takes."""
    minutes = "less than a minute" if seconds < 60 else f"about {seconds / 60:,.0f} minutes"
    if seconds > 5400:
        minutes = f"about {seconds / 3600:,.1f} hours"
    chains = config.num_chains
    text = (
        f"sampling takes {minutes} on this machine: {chains} chains of {config.num_steps:,} steps and {config.num_draws:,}"
        f" draws, each of {samples:,} losses; the tables and the report follow"
    )
    return text + ("; --quick, fewer draws or fewer samples take less" if seconds > LONG else "")


def tuned(options: argparse.Namespace, task: Task, given: dict[str, Any]) -> SGLDConfig:
    """Step size, localization, thinning and burn-in by trial; what was given otherwise stays as it is."""
    from harmonic_triton.losskernel.sampling.tuning import tune

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
    claims = [files.Claim(directory / f"{run}.lock") for run in sorted(runs)]  # also of one without a checkpoint yet
    for run in runs:
        (directory / f"{run}.pt").unlink(missing_ok=True)
    for path in directory.glob("traces-*"):
        if (path / "draws.bin").is_file():
            shutil.rmtree(path)
    (directory / PROBE_FILE).unlink(missing_ok=True)
    for claim in claims:
        claim.release()


def is_first_process() -> bool:
    """True but on the other ranks of torch.distributed."""
    return (
        not (torch.distributed.is_available() and torch.distributed.is_initialized())
        or not torch.distributed.get_rank()
    )


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
        "initial_loss": kernel.initial_losses.double().mean().item(),
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
