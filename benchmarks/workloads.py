"""Workloads, named after the models whose output head they copy, and the inputs they run on."""

import math
from collections.abc import Sequence
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
    "growth": Model(256, 16384),  # what --growth varies N and V around
    "gpt2": Model(768, 50257),
    "gpt2-padded": Model(768, 50304),
    "gpt2-xl": Model(1600, 50257),
    "llama-3.2-1b": Model(2048, 128256),
    "llama-3-8b": Model(4096, 128256),
    "gemma-2-2b": Model(2304, 256000),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INPUTS = ("random", "trained", "solved")
TRAINED_RADII = (0.1, 0.3, 1.0, 1.5, 2.0)  # ||x - w_c|| / ||w_c||, cycled over the rows: solved to undecided
TRAINED_MARGINS = (60.0, 30.0, 15.0, 8.0, 4.0)  # x.w_c, cycled over the rows
SOLVED_LOSS = 1e-20


@dataclass(frozen=True)
class Workload:
    """One head at one batch size; ``Workload(**workload.as_dict())`` gives it back."""

    model: str
    tokens: int
    dtype: str = "fp32"
    inputs: str = "random"
    device: str = "cpu"
    v: int | None = None  # classes, where they are not the model's

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
        if self.v is not None and self.v < 1:
            raise UsageError(f"--v {self.v} is not a number of classes: give an integer of at least 1")

    @property
    def dim(self) -> int:
        return MODELS[self.model].dim

    @property
    def classes(self) -> int:
        return self.v or MODELS[self.model].classes

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


def make_inputs(workload: Workload, loss: str = "harmonic", seed: int = 0) -> Inputs:
    """Inputs of one workload, drawn from ``seed``; w ~ N(0, 0.02^2).

    ``random``: x ~ N(0, 1), whatever the loss. ``trained``: x as a trained model has it, from solved tokens to undecided
    ones: near its class vector for the harmonic loss, along it for the cross-entropy. ``solved``: the same with every
    true loss near ``SOLVED_LOSS`` (at a model's width; narrow heads are spread around it).
    """
    device = torch.device(workload.device)
    draw = torch.Generator(device).manual_seed(seed)
    w = torch.randn(workload.classes, workload.dim, generator=draw, device=device).mul_(0.02)
    target = torch.randint(workload.classes, (workload.tokens,), generator=draw, device=device)
    x = torch.randn(workload.tokens, workload.dim, generator=draw, device=device)
    if workload.inputs != "random":
        center = w[target]
        size = center.norm(dim=1, keepdim=True)
        direction = x / math.sqrt(workload.dim)  # of length 1, nearly
        if loss == "harmonic":
            x = center + direction * size * _cycled(_radii(workload), x)
        else:
            x = (center + 0.1 * direction * size) * _cycled(_margins(workload), x) / size.square()
    dtype = DTYPES[workload.dtype]
    return Inputs(x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), target)


def _cycled(values: Sequence[float], x: Tensor) -> Tensor:
    rows = torch.arange(len(x), device=x.device)
    return torch.tensor(values, device=x.device)[rows % len(values)][:, None]


def _radii(workload: Workload) -> Sequence[float]:
    """The other classes are sqrt(2) ||w|| away: loss = V (r/sqrt(2))^n."""
    if workload.inputs == "trained":
        return TRAINED_RADII
    return (math.sqrt(2) * (SOLVED_LOSS / workload.classes) ** (1 / workload.exponent),)


def _margins(workload: Workload) -> Sequence[float]:
    """With x.w_c = m the other scores are N(0, m^2/D): loss = V exp(-m + m^2/2D), solved for m where it has a root."""
    if workload.inputs == "trained":
        return TRAINED_MARGINS
    root = 1 - 2 * math.log(workload.classes / SOLVED_LOSS) / workload.dim
    return (workload.dim * (1 - math.sqrt(max(0.0, root))),)
