"""Stored tile configurations, by architecture and operand width; those that ``python -m benchmarks.autotune`` measured.

The tuned ones come first. They lie in one JSON file, ``$HARMONIC_TRITON_TILES`` or else
``~/.config/harmonic_triton/tiles.json`` ($XDG_CONFIG_HOME instead of ~/.config), by architecture, bytes of an operand and
D rounded up to a power of two: ``{"sm90/2/1024": {"block_n": 128, ...}}``. It is read once in a process.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from harmonic_triton._common import files
from harmonic_triton._common.device import architecture

ROW_BLOCK, FEATURE_BLOCK, ROW_WARPS = 8, 128, 8  # of the per-token and per-class kernels, which do no products
STORED_ROWS, STORED_ENTRIES = 32, 512  # rows of a tile and entries of a warp, in the pass over stored log-scores
MOST_WARPS = 16  # of a program, on every GPU: 1024 threads, and AMD's warps have 64


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of the kernels that compute a tile of gaps."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# (architecture, bytes per operand) -> configuration
CONFIGS = {
    ("sm80", 2): TileConfig(128, 64, 32, 8, 3),
    ("sm90", 2): TileConfig(128, 64, 64, 8, 3),
    ("sm100", 2): TileConfig(128, 64, 64, 8, 3),
    ("gfx942", 2): TileConfig(128, 128, 32, 8, 2),
    ("sm80", 4): TileConfig(64, 64, 32, 8, 2),
    ("sm90", 4): TileConfig(64, 32, 16, 4, 2),
    ("sm100", 4): TileConfig(64, 64, 32, 8, 2),
    ("gfx942", 4): TileConfig(64, 64, 32, 8, 2),
    ("interpreter", 2): TileConfig(32, 64, 64, 4, 1),
    ("interpreter", 4): TileConfig(32, 64, 64, 4, 1),
}


def tile_config(device: torch.device, dtype: torch.dtype, width: int) -> TileConfig:
    """The configuration for operands of ``dtype`` and ``width`` features on ``device``: a tuned one, or the stored one."""
    arch = architecture(device)
    return tuned().get(key_of(arch, dtype.itemsize, width)) or CONFIGS[arch, dtype.itemsize]


def key_of(arch: str, size: int, width: int) -> str:
    """Name of a tuned configuration; a bucket of D holds the widths above half of it."""
    return f"{arch}/{size}/{1 << max(width - 1, 0).bit_length()}"


def tuned_path() -> Path:
    """Where tuned configurations are kept."""
    if named := os.environ.get("HARMONIC_TRITON_TILES"):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "harmonic_triton" / "tiles.json"


@functools.cache
def tuned() -> dict[str, TileConfig]:
    """The tuned configurations by :func:`key_of`; none without a file.

    Raises:
        ValueError: the file is not what :func:`store_tuned` writes.
    """
    path = tuned_path()
    if not path.exists():
        return {}
    names = {field.name for field in fields(TileConfig)}
    try:
        found = json.loads(path.read_text())
        for key, values in found.items():
            if set(values) != names or not all(type(value) is int and value > 0 for value in values.values()):
                raise ValueError(f"{key} holds {values}; wanted positive integers {', '.join(sorted(names))}")
            if any(values[name] & (values[name] - 1) for name in names - {"num_stages"}):
                raise ValueError(f"{key} holds {values}; all but num_stages must be powers of two")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no file of tile configurations: {error}. Delete it or tune again") from error
    return {key: TileConfig(**values) for key, values in found.items()}


def store_tuned(key: str, config: TileConfig) -> Path:
    """Add one to the file, or replace it; this process takes it from now on."""
    path, every = tuned_path(), {**tuned(), key: config}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps({name: asdict(one) for name, one in sorted(every.items())}, indent=1) + "\n")
    tuned.cache_clear()
    return path


def stored_tile(config: TileConfig) -> dict[str, int]:
    """How the element-wise pass differs: it must keep the products' BLOCK_V, whose tiles the log-scores are relative to."""
    warps = STORED_ROWS * config.block_v // STORED_ENTRIES
    return {"BLOCK_N": STORED_ROWS, "num_warps": min(max(warps, 1), MOST_WARPS)}
