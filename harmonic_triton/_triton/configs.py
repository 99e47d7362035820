"""Stored tile configurations, by architecture and operand width. One place, so that tuning changes only this table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_BLOCK, FEATURE_BLOCK, ROW_WARPS = 8, 128, 8  # of the per-token and per-class kernels, which do no products
KEPT_ROWS, KEPT_ENTRIES = 32, 512  # of the element-wise pass over stored log-scores: rows of a tile, entries of a warp


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of the kernels that compute a tile of ratios."""

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
    ("sm90", 4): TileConfig(64, 32, 32, 4, 2),
    ("sm100", 4): TileConfig(64, 64, 32, 8, 2),
    ("gfx942", 4): TileConfig(64, 64, 32, 8, 2),
    ("interpreter", 2): TileConfig(32, 64, 64, 4, 1),
    ("interpreter", 4): TileConfig(32, 64, 64, 4, 1),
}


def architecture(device: torch.device) -> str:
    """The table's name of a device; an unknown one gets the most modest configuration of its vendor."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")


def tile_config(device: torch.device, dtype: torch.dtype) -> TileConfig:
    """The stored configuration for operands of ``dtype`` on ``device``."""
    return CONFIGS[architecture(device), dtype.itemsize]


def kept_tile(config: TileConfig) -> dict[str, int]:
    """How the element-wise pass differs: it must keep the products' BLOCK_V, whose tiles the log-scores are relative to."""
    return {"BLOCK_N": KEPT_ROWS, "num_warps": KEPT_ROWS * config.block_v // KEPT_ENTRIES}
