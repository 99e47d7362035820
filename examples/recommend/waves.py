"""Which runs: a search with one seed, then what it chose, with seeds that the search has not seen."""

from __future__ import annotations

import harmonic_triton as ht

from .runs import BPE_SIZE, Run

WIDTH, CHARACTERS = 128, 96
ROOT = WIDTH**0.5
TUNING, FRESH = 1, (11, 12, 13)
SHAPES = {"gpt": {}, "llama": {"steps": 300, "layers": 2}, "nanogpt": {"steps": 300}}


def harmonic(model: str, lr: float, n: float, seed: int = TUNING, ratio: float = 1.0) -> Run:
    return Run(model, "harmonic", lr, seed, n, ratio, **SHAPES[model])


def cross_entropy(model: str, lr: float, seed: int = TUNING) -> Run:
    return Run(model, "cross_entropy", lr, seed, **SHAPES[model])


def recommended(model: str, seed: int) -> Run:
    """The harmonic loss with the settings of ``harmonic_triton.recommend``."""
    settings = ht.recommend(WIDTH, BPE_SIZE if model == "llama" else CHARACTERS)
    return harmonic(model, settings.lr, settings.n, seed)


WAVES = {
    "gpt-search": [
        *(cross_entropy("gpt", lr) for lr in (2e-3, 4e-3, 8e-3)),
        *(harmonic("gpt", lr, ROOT) for lr in (2e-3, 4e-3)),
        harmonic("gpt", 2e-3, 28.0),
        harmonic("gpt", 2e-3, ROOT, ratio=50.0),  # a last norm left at 1
    ],
    "llama-search": [
        *(cross_entropy("llama", lr) for lr in (1e-3, 2e-3, 3e-3, 4e-3, 8e-3)),
        *(harmonic("llama", 4e-3, n) for n in (ROOT, 28.0, 64.0)),
        *(harmonic("llama", lr, 28.0) for lr in (1e-3, 2e-3)),
        harmonic("llama", 2e-3, 20.0),
    ],
    "llama": [run for seed in FRESH for run in (recommended("llama", seed), cross_entropy("llama", 2e-3, seed))],
    "nanogpt": [run for seed in FRESH for run in (recommended("nanogpt", seed), cross_entropy("nanogpt", 4e-3, seed))],
}
