"""Labelled data whose classes are the leaves of a tree: one drawn, one found in the Python standard library."""

from __future__ import annotations

import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
WORD = re.compile(r"[A-Za-z]+|\d+")


class Hierarchy(NamedTuple):
    """Samples, their classes and where the classes sit in the tree."""

    features: Tensor  # (N, D) fp32
    labels: Tensor  # (N,) int64 classes, the leaves
    ancestors: Tensor  # (N, depths) int64: the label's ancestor at each depth, the root at 0, -1 below the label
    names: list[str]  # of the classes
    train: Tensor  # (N,) bool; the others are for evaluation


def synthetic_tree(
    *, depth: int = 4, branching: int = 2, width: int = 64, per_class: int = 80, noise: float = 1.0, seed: int = 0
) -> Hierarchy:
    """A random walk down a tree: each node is its parent's vector and a standard normal step, each sample its leaf and
    ``noise`` times a standard normal. All leaves have the same depth."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.zeros(1, width)
    for _ in range(depth):
        nodes = nodes.repeat_interleave(branching, 0)
        nodes = nodes + torch.randn(nodes.shape, generator=generator)
    labels = torch.arange(len(nodes)).repeat_interleave(per_class)
    features = nodes[labels] + noise * torch.randn(len(labels), width, generator=generator)
    ancestors = torch.stack([labels // branching ** (depth - d) for d in range(depth + 1)], 1)
    train = torch.arange(len(labels)) % 2 == 0
    return Hierarchy(features / width**0.5, labels, ancestors, [f"leaf {i}" for i in range(len(nodes))], train)


def standard_library(
    *, lines: int = 15, per_file: int = 24, least_lines: int = 200, buckets: int = 2048, seed: int = 0
) -> Hierarchy:
    """Which file of the standard library does a piece of code come from? The tree is that of the directories.

    Samples are pieces of ``lines`` lines that are not blank, at most ``per_file`` a file, spread evenly; files have at
    least ``least_lines``. Features are the logarithms of hashed word counts at length 1.
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows: list[Tensor] = []
    labels: list[int] = []
    paths: list[str] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            text = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            if len(text) < least_lines:
                continue
            pieces = [text[at : at + lines] for at in range(0, len(text) - lines + 1, lines)]
            chosen = torch.linspace(0, len(pieces) - 1, min(per_file, len(pieces))).round().long().tolist()
            rows += [hashed_words("\n".join(pieces[i]), buckets) for i in chosen]
            labels += [len(paths)] * len(chosen)
            paths.append(path.relative_to(root).as_posix())
    order = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    return Hierarchy(torch.stack(rows), torch.tensor(labels), tree_of(paths)[labels], paths, order < 0.5)


def hashed_words(text: str, buckets: int) -> Tensor:
    """(buckets,) log(1 + count) of the lower-case words of a text, at Euclidean length 1."""
    at = torch.tensor([zlib.crc32(word.lower().encode()) % buckets for word in WORD.findall(text)], dtype=torch.int64)
    return F.normalize(torch.bincount(at, minlength=buckets).float().log1p(), dim=0)


def tree_of(paths: list[str]) -> Tensor:
    """(len(paths), depths) ancestors of files: directories from the root on, the file itself last, then -1."""
    parts = [path.split("/") for path in paths]
    found: dict[tuple[str, ...], int] = {}
    out = torch.full((len(paths), 1 + max(map(len, parts))), -1)
    for row, names in enumerate(parts):
        for depth in range(len(names) + 1):
            out[row, depth] = found.setdefault(tuple(names[:depth]), len(found))
    return out
