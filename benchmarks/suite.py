"""What a suite offers to the command line and to the report: the one way in which head, covariance and sampler are run."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.runs import Record, Run

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """A checked request: what ``records`` measures when it is iterated."""

    what: str  # a word or two for the file's name
    device: str  # "cpu" | "cuda"
    threads: int
    settings: Mapping[str, Any]  # what the records do not say themselves: repeats, constants
    records: Callable[[Say], Iterator[Record]]


@dataclass(frozen=True)
class Suite:
    """A topic with workloads, baselines and tables of its own."""

    name: str
    describe: str
    add_arguments: Callable[[ArgumentParser], None]
    request: Callable[[Namespace], Request]  # raises UsageError before any work
    sections: Callable[[Run], list[str]]  # Markdown, without title and machine
    draw: Callable[[Run, Path], list[Path]] = field(default=lambda run, folder: [])  # plots; their paths
