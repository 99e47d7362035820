"""Which runs: a search with one seed, then what it chose, with seeds that the search has not seen."""

from __future__ import annotations

from .runs import Run

ROOT = 128**0.5
TUNING, FRESH = 1, (11, 12, 13)
SHAPES = {"gpt": {}, "llama": {"steps": 300, "layers": 2}, "nanogpt": {"steps": 300}}


def harmonic(model: str, lr: float, n: float, seed: int = TUNING, ratio: float = 1.0) -> Run:
    return Run(model, "harmonic", lr, seed, n, ratio, **SHAPES[model])


def cross_entropy(model: str, lr: float, seed: int = TUNING) -> Run:
    return Run(model, "cross_entropy", lr, seed, **SHAPES[model])


WAVES = {
    "l2": [cross_entropy("llama", 1e-3), harmonic("llama", 4e-3, 64.0), harmonic("llama", 2e-3, 28.0)],
    "g2": [cross_entropy("gpt", 8e-3), cross_entropy("gpt", 1e-3)],
    "l3": [cross_entropy("llama", 5e-4)],
}
