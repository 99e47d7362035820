"""How many CPU threads a run takes, and how long it will take: a few real steps before it tell both.

Threads that wait for one another on cores that other programs hold can take twenty times as long as one thread alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import Config
from .data import Corpus
from .model import GPT

if TYPE_CHECKING:
    from .train import Place

REPEATS = 3
HOPELESS = 3.0  # times the best: such a number of threads is not timed again
WORTH = 0.9  # more threads must take at most this share of the time


@dataclass(frozen=True)
class Pace:
    """Threads, seconds of an optimiser step's forward and backward passes, and why these threads."""

    threads: int
    step_seconds: float
    reason: str


def candidates(config: Config, place: Place, stored: int | None) -> tuple[list[int], str]:
    """Numbers of threads to try, and the reason where there is but one."""
    now = torch.get_num_threads()
    if config.threads is not None:
        return [config.threads], "as --threads says"
    if place.world > 1 or place.mesh is not None or place.device.type != "cpu":
        return [now], "torch's own choice"
    if stored is not None:
        return [stored], "as this run began: another number would round otherwise"
    if "OMP_NUM_THREADS" in os.environ:
        return [now], "as OMP_NUM_THREADS says"
    return sorted({1, now, *(2**i for i in range(1, now.bit_length()) if 2**i < now)}), ""


def fastest(tried: list[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Seconds of a step with each number of threads, medians; one that is hopeless is timed once."""
    found: dict[int, float] = {}
    for threads in tried:
        first = seconds(threads)
        slow = bool(found) and first > HOPELESS * min(found.values())
        found[threads] = first if slow else statistics.median(seconds(threads) for _ in range(REPEATS))
    return found


def chosen(found: dict[int, float]) -> int:
    """The fewest threads, unless more are faster by enough to tell."""
    best = next(iter(found))
    for threads in found:
        if found[threads] < WORTH * found[best]:
            best = threads
    return best


def measure(config: Config, corpus: Corpus, place: Place) -> Pace:
    """Time forward and backward passes of a model like the run's, then set the number of threads."""
    states = [state for loss in config.losses if (state := read(config, loss)) is not None]
    tried, reason = candidates(config, place, next((state["threads"] for state in states if "threads" in state), None))
    model = GPT(config, corpus.vocab_size, config.losses[0]).to(place.device)
    size = config.micro_batch_size
    x, y = corpus.batch("train", config.block, corpus.offsets("train", config, 0)[:size], place.device)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        with config.autocast(place.device):
            loss = model(x, y, num_items=1)
        loss.backward()
        model.zero_grad()
        loss.item()  # waits for a GPU
        return (time.perf_counter() - start) * config.batch_size / (size * place.world)

    seconds(tried[0])  # libraries and memory
    found = fastest(tried, seconds)
    threads = chosen(found)
    torch.set_num_threads(threads)
    others = ", ".join(f"{number}: {value:.2f} s" for number, value in found.items())
    return Pace(
        threads, found[threads], reason or f"the fastest by a few steps ({others}); --threads takes another number"
    )


def read(config: Config, loss: str) -> dict[str, int] | None:
    """How far a run has come, and with how many threads; None where it begins."""
    path = Path(config.out) / loss / "checkpoint.pt"
    if not (config.resume and path.exists()):
        return None
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {key: state[key] for key in ("step", "threads") if key in state}


def steps_left(config: Config) -> int:
    """Optimiser steps of every loss together that no checkpoint holds."""
    return sum(config.steps - (state["step"] if (state := read(config, loss)) else 0) for loss in config.losses)


def expected_seconds(config: Config, pace: Pace, steps: int) -> float:
    """Of training: passes, an optimiser's tenth, and validations, whose forward pass is a third of both passes."""
    validation = config.eval_batches / 3 / config.eval_every
    return steps * pace.step_seconds * (1.1 + validation)


def announcement(config: Config, pace: Pace, steps: int) -> str:
    """What is going to happen and how long it takes."""
    seconds = expected_seconds(config, pace, steps)
    how_long = "less than a minute" if seconds < 60 else f"about {seconds / 60:,.0f} minutes"
    if seconds > 5400:
        how_long = f"about {seconds / 3600:,.1f} hours"
    what = " and ".join(config.losses)
    quick = "" if seconds < 180 else "; a first look: --preset quick, or fewer --steps"
    return (
        f"{pace.threads} thread{'s' * (pace.threads > 1)}, {pace.reason}\n"
        f"training takes {how_long} here: {steps:,} steps ({what}) of {pace.step_seconds:.2f} s; the report follows{quick}"
    )
