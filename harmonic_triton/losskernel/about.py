"""Where a kernel comes from."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class About(NamedTuple):
    """Where a kernel comes from; NaN and empty where unknown."""

    nbeta: float = math.nan  # nβ of the probe
    step_size: float = math.nan  # ε
    stability_bound: float = math.nan  # of ε: 4/λmax(nβH + γ)
    num_train: int = 0  # n, 0 where unknown
    config: dict[str, Any] = {}
    fingerprint: dict[str, str] = {}
