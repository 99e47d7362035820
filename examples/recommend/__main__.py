"""``python -m examples.recommend train`` trains what is missing in results.jsonl, ``... report`` writes tables and a figure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("matplotlib", "numpy", "tokenizers", "tqdm", "transformers")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from .waves import WAVES

    out = argparse.ArgumentParser(prog="python -m examples.recommend", description=__doc__)
    out.add_argument("what", choices=("train", "report"))
    out.add_argument(
        "--waves", nargs="+", choices=WAVES, default=list(WAVES), help="which runs; by default all of them"
    )
    out.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"), help="a line a run")
    out.add_argument("--data", type=Path, default=Path("runs/recommend"), help="where tokens and working files lie")
    out.add_argument("--clone", type=Path, default=None, help="a clone of karpathy/nanoGPT, for the runs of it")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or report; the exit status."""
    options = parser().parse_args(arguments)
    if options.what == "report":
        from . import report

        records = report.load(options.results)
        print("\n\n".join(f"{title}\n\n{table}" for title, table in report.tables(records).items()))
        report.draw(records, report.PICTURE)
        return 0
    import torch

    from . import nanogpt, runs
    from .waves import WAVES

    torch.set_num_threads(1)  # what was measured; two such small models gain nothing from more
    done = known(options.results)
    for run in (run for wave in options.waves for run in WAVES[wave]):
        if run in done:
            continue
        if run.model == "nanogpt" and options.clone is None:
            print(f"left out, --clone is missing: {run}")
            continue
        record = (
            nanogpt.train(run, options.data, options.clone) if run.model == "nanogpt" else runs.train(run, options.data)
        )
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{record['val'][-1][1]:.4f} after {record['seconds']:.0f} s: {run}", flush=True)
    return 0


def known(path: Path) -> set[object]:
    """The runs that a file has. A line that a kill cut short is none, and is taken out."""
    from .runs import Run

    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        path.write_text("".join(whole))
    names = asdict(Run("", "", 0, 0))
    return {Run(**{name: record[name] for name in names}) for record in map(json.loads, whole)}


if __name__ == "__main__":
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed: pip install -e '.[examples,transformers]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
