"""Workloads, named after the models whose output head they copy, and the inputs they run on."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import UsageError


@dataclass(frozen=True)
class Model:
    dim: int
    classes: int


MODELS = {
    "tiny": Model(64, 500),  # seconds, also through the Triton interpreter
    "quick": Model(256, 8192),  # what --quick runs
    "gpt2": Model(768, 50257),
    "gpt2-padded": Model(768, 50304),
    "gpt2-xl": Model(1600, 50257),
    "llama-3.2-1b": Model(2048, 128256),
    "llama-3-8b": Model(4096, 128256),
    "gemma-2-2b": Model(2304, 256000),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INPUTS = ("random", "trained")
TRAINED_RADII = (0.1, 0.3, 1.0, 1.5, 2.0)  # ||x - w_c|| / ||w_c||, cycled over the rows: solved to undecided


@dataclass(frozen=True)
class Workload:
    """One head at one batch size; ``Workload(**workload.as_dict())`` gives it back."""

    model: str
    tokens: int
    dtype: str = "fp32"
    inputs: str = "random"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("workload", self.model, MODELS),
            ("dtype", self.dtype, DTYPES),
            ("inputs", self.inputs, INPUTS),
        ):
            if value not in known:
                raise UsageError(f"--{name} {value!r} is not known: choose from {', '.join(known)}")
        if self.tokens < 1:
            raise UsageError(f"--n {self.tokens} is not a number of tokens: give an integer of at least 1")

    @property
    def dim(self) -> int:
        return MODELS[self.model].dim

    @property
    def classes(self) -> int:
        return MODELS[self.model].classes

    @property
    def exponent(self) -> float:
        """The harmonic exponent on the distance, sqrt(D)."""
        return math.sqrt(self.dim)

    @property
    def floor_flops(self) -> int:
        """3U: the three matrix products that no head can do without."""
        return 6 * self.tokens * self.classes * self.dim

    @property
    def gradient_bytes(self) -> int:
        return (self.tokens + self.classes) * self.dim * DTYPES[self.dtype].itemsize

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model} N={self.tokens} D={self.dim} V={self.classes} {self.dtype} {self.inputs} on {self.device}"


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # (N, D), requires grad
    w: Tensor  # (V, D), requires grad
    target: Tensor  # (N,) int64


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """``random``: x ~ N(0, 1), w ~ N(0, 0.02^2).  ``trained``: x around its class vector at ``TRAINED_RADII``."""
    device = torch.device(workload.device)
    draw = torch.Generator(device).manual_seed(seed)
    w = torch.randn(workload.classes, workload.dim, generator=draw, device=device).mul_(0.02)
    target = torch.randint(workload.classes, (workload.tokens,), generator=draw, device=device)
    x = torch.randn(workload.tokens, workload.dim, generator=draw, device=device)
    if workload.inputs == "trained":
        centre = w[target]
        radius = torch.tensor(TRAINED_RADII, device=device)[
            torch.arange(workload.tokens, device=device) % len(TRAINED_RADII)
        ]
        x = centre + x * (radius * centre.norm(dim=1) / math.sqrt(workload.dim))[:, None]
    dtype = DTYPES[workload.dtype]
    return Inputs(x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), target)
