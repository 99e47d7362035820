"""What the experiments share: their options, the clock, results on disk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.stability import stability_bound
from harmonic_triton.tools import write_text


@dataclass(frozen=True)
class Settings:
    """The probe: fields of SGLDConfig under the same names. Experiments add their data and training."""

    nbeta: float = 500.0
    localization: float = 1e6
    lr: float = 1e-7
    batch_size: int = 256
    num_chains: int = 4
    num_draws: int = 200
    num_burnin_steps: int = 50
    num_steps_bw_draws: int = 1
    seed: int = 0

    def probe(self, **changes: Any) -> SGLDConfig:
        """The sampler's configuration, with ``changes`` in place of single fields."""
        names = {f.name for f in fields(SGLDConfig)} & {f.name for f in fields(Settings)}
        return SGLDConfig(**{**{name: getattr(self, name) for name in names}, **changes})


def step_size(model: nn.Module, loss: Any, data: Any, probe: SGLDConfig, fraction: float, seed: int) -> float:
    """A fraction of the largest stable step, for probes of models whose curvature nobody looked at."""
    return fraction * stability_bound(model, loss, data, probe, seed=seed)


@dataclass
class Clock:
    """Wall seconds of each part of an experiment."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_results(
    out: Path, name: str, setting: str, settings: Settings, measured: dict[str, Any], seconds: dict[str, float]
) -> None:
    """results.json: what was asked, where it ran, how long it took, what was measured."""
    content = {
        "experiment": name,
        "setting": setting,
        "settings": asdict(settings),
        "machine": machine(),
        "seconds": {part: round(value, 2) for part, value in seconds.items()},
        "measured": measured,
    }
    write_text(out / "results.json", json.dumps(content, indent=1) + "\n")
