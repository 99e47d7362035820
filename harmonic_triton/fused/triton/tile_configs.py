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

ROW_BLOCK, FEATURE_BLOCK = 8, 128  # of the per-token and per-class kernels, which do no products
FUSION = {"enable_fp_fusion": False}
# A product fused into a sum whose terms lanes of a warp exchange is rounded in two ways, and the lanes store to one address. And
# what one kernel has added another one takes away, to the bit. Where a fused multiply-add is wanted, tl.fma says so.
ROW_OPTIONS = {"num_warps": 8, **FUSION}
GROUP = 16  # token tiles that take one class tile after the other


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of the kernel that computes a tile of scores."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# (architecture, bytes per operand) -> configuration
CONFIGS = {
    ("sm80", 2): TileConfig(128, 128, 32, 8, 3),
    ("sm90", 2): TileConfig(128, 256, 64, 8, 3),
    ("sm100", 2): TileConfig(128, 128, 64, 8, 3),
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


def parts(config: TileConfig, dot: int = True, keep: int = False, want_scores: int = False) -> int:
    """In how many parts a tile's classes are taken from the product to the sums: the others wait in registers.

    One pass over distances that also adds up scores has the most sums, and room for half as many classes at a time.
    """
    return min(8 if keep and want_scores and not dot else 4, max(1, config.block_v // 32))


def near(config: TileConfig) -> int:
    """How many classes of a tile have a nearest of their own: the rival is looked for among as many as share one."""
    return min(32, config.block_v // parts(config))


def described(arch: str, size: int) -> bool:
    """Whether tiles of row-major operands are copied by descriptors (TMA): for operands of 16 bits, on GPUs that have them.

    The interpreter stands for those GPUs.
    """
    return arch in ("sm90", "sm100", "interpreter") and size == 2
