"""``python -m benchmarks --suite NAME`` measures; ``python -m benchmarks report`` makes tables and plots of stored runs."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import UsageError, covariance, head, readme, report, runs, sampler
from benchmarks.machine import describe
from benchmarks.suite import Suite

SUITES = {suite.name: suite for suite in (head.SUITE, covariance.SUITE, sampler.SUITE)}
PATHS = ("--out", "--devinterp-python")


def parser(suite: Suite) -> argparse.ArgumentParser:
    """The options of one suite; those of all come first."""
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"The suite {suite.name}: {suite.describe}.",
        epilog="'--suite NAME --help' shows another suite's options; 'python -m benchmarks report [FILE ...]' makes"
        " tables and plots again from stored runs.",
    )
    parse.add_argument("--suite", default="head", help=f"{', '.join(SUITES)} (default head)")
    parse.add_argument("--repeats", type=int, help="times that everything is measured (default the suite's)")
    parse.add_argument("--threads", type=int, help="CPU threads (default torch's choice)")
    parse.add_argument("--out", type=Path, default=runs.RESULTS, help="results folder (default benchmarks/results)")
    suite.add_arguments(parse)
    return parse


def parse_arguments(argv: Sequence[str]) -> tuple[Suite, argparse.Namespace]:
    """The suite and its options; raises :class:`UsageError` where one that all suites have is wrong."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--suite", default="head")
    suite = _suite(first.parse_known_args(argv)[0].suite, "--suite")
    arguments = parser(suite).parse_args(argv)
    if arguments.repeats is not None and arguments.repeats < 1:
        raise UsageError(f"--repeats {arguments.repeats} measures nothing: give an integer of at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise UsageError(f"--threads {arguments.threads} is no number of threads: give an integer of at least 1")
    return suite, arguments


def _suite(name: str, says: str) -> Suite:
    if name not in SUITES:
        raise UsageError(f"{says} {name!r} is not known: choose from {', '.join(SUITES)}")
    return SUITES[name]


def _measure(argv: Sequence[str]) -> int:
    suite, arguments = parse_arguments(argv)
    request = suite.request(arguments)
    torch.set_num_threads(request.threads)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    header = {"suite": suite.name, **describe(request.device), "command": _command(argv), "settings": request.settings}
    name = runs.name_of(suite.name, request.device, request.what, header["time"])
    done = runs.save(arguments.out / f"{name}.jsonl", header, request.records(say))
    print(write(done, arguments.out))
    say(f"{name}.jsonl, .md and plots are in the results folder")
    wrong = [r for r in done.records if runs.is_ours(r["baseline"]) and r["status"] in ("failed", "failed the gate")]
    for record in wrong:
        print(f"{record['baseline']} {record['status']}: {record['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _command(argv: Sequence[str]) -> str:
    """The command line less the results folder and other paths, which say nothing about the measurement."""
    shown, path = ["python -m benchmarks"], ""
    for word in argv:
        name, given, _ = word.partition("=")
        if path or name in PATHS:
            shown += {"--out": []}.get(path or name, ["PATH"] if path else [name, "PATH"] if given else [name])
            path = "" if path or given else name
        else:
            shown.append(word)
    return " ".join(shown)


def write(run: runs.Run, folder: Path) -> str:
    """Write a run's tables and plots beside its JSON lines; returns the text to print."""
    suite = _suite(run.header.get("suite", ""), f"{run.name}: the header's suite")
    body = report.text(run, suite.sections(run))
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in suite.draw(run, folder))
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
