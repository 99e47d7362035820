"""``python -m examples.loss_kernel NAME [--setting quick|paper] [--out DIR]``; every setting is an option too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXPERIMENTS = {
    "modular": "addition and division modulo 97: task separation",
    "mislabeled": "flipped labels in the digits: loss variance beside the loss alone",
    "development": "the kernel at checkpoints of training",
    "gamma": "the localization: CKA and lift against two hierarchies",
    "tokens": "which tokens and files a GPT treats alike: harmonic loss beside cross-entropy",
}
TOOK = {"modular": 301, "mislabeled": 11, "development": 244, "gamma": 350, "tokens": 617}  # s, --setting quick: README
NEEDED = ("matplotlib", "scipy", "sklearn", "tqdm", "umap")


def parser() -> argparse.ArgumentParser:
    """One command an experiment, one option a field of its settings."""
    out = argparse.ArgumentParser(prog="python -m examples.loss_kernel", description=__doc__)
    commands = out.add_subparsers(dest="experiment", required=True)
    for name, text in EXPERIMENTS.items():
        settings = import_module(f"examples.loss_kernel.{name}").SETTINGS
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--setting", choices=settings, default="quick", help="quick: minutes on two cores (default)"
        )
        command.add_argument("--out", type=Path, default=None, help=f"default: runs/loss_kernel/{name}")
        for f in fields(settings["quick"]):
            shown = "; ".join(f"{key}: {words(getattr(value, f.name))}" for key, value in settings.items())
            command.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=shown, **kind(f))
    return out


def words(value: Any) -> str:
    """A setting as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def kind(f: Any) -> dict[str, Any]:
    """How argparse reads a field."""
    if isinstance(f.default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(f.default, tuple):
        return {"nargs": "+", "type": type(f.default[0]), "metavar": "X"}
    return {"type": str if f.default is MISSING else type(f.default), "metavar": "X"}


def expectation(name: str, settings: Any, quick: Any) -> str:
    """How long sampling takes, by its steps beside those of the quick settings, whose time was measured."""
    steps, measured = (probe.num_chains * probe.num_steps for probe in (settings.probe(), quick.probe()))
    seconds = TOOK[name] * steps / measured
    how_long = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
    how_long = how_long if seconds < 7200 else f"{seconds / 3600:,.0f} hours"
    less = "; --setting quick, or fewer --num-chains or --num-draws take less" if seconds > 900 else ""
    return f"takes {how_long} or so, by its steps and what the quick settings took on two cores of an AMD EPYC{less}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment, write results.json and figures, print a summary."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed: pip install -e '.[analysis]'", file=sys.stderr)
        return 2
    from . import experiment

    given = vars(parser().parse_args(arguments))
    name, setting, out = given.pop("experiment"), given.pop("setting"), given.pop("out")
    module = import_module(f"examples.loss_kernel.{name}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    settings = replace(module.SETTINGS[setting], **given)
    out = out or Path("runs/loss_kernel") / name
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {expectation(name, settings, module.SETTINGS['quick'])}", flush=True)
    clock = experiment.Clock()
    try:
        with clock("all"):
            measured = module.run(settings, out, clock)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    experiment.write_results(out, name, setting, settings, measured, clock.seconds)
    print(module.summary(measured))
    print("seconds: " + ", ".join(f"{part} {value:.0f}" for part, value in clock.seconds.items()))
    print(f"{out}/results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
