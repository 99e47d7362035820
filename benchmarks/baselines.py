"""The registry of baselines: every way to compute a head's loss that the benchmarks compare.

A baseline is ``function(x, w, target, exponent) -> mean loss``; cross-entropies ignore the exponent.  ``register``
records beside it what the accuracy gate and the planner need to know.
"""

import functools
import importlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload

LossFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]
os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # it is read at import
ANYWHERE = ("cpu", "cuda")
LOSSES = ("harmonic", "cross_entropy")
RECOMPUTE_BUDGET = (
    16 * 2**20
)  # bytes for a slice of A and its dW; the rest of what it takes are vectors, and dX in fp32


@dataclass(frozen=True)
class Baseline:
    name: str
    loss: str  # one of LOSSES
    describe: str
    function: LossFunction
    devices: tuple[str, ...] = ANYWHERE
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    imports: str | None = None  # the module it cannot run without
    target_exact: bool = False  # leave-one-out arithmetic: the target's distance and 1 - p_c keep every digit
    scores_in_dtype: bool = False  # x @ w.T is rounded to the inputs' dtype before it is used
    compiles: bool = False  # its first call at a shape runs a compiler, in this process
    interpreted_on_cpu: bool = False  # on a CPU only the Triton interpreter runs it: checked, never timed
    largest: float = math.inf  # N V D beyond which a run that names no baselines leaves it out
    bytes_per_score: int = 0  # of memory on a CPU for each of the N V scores, as measured: 0 where they are never held
    extra_reason: Callable[[str], str | None] = lambda device: None

    def __call__(self, x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
        return self.function(x, w, target, exponent)

    def unavailable(self, device: str = "cpu", dtype: str = "fp32") -> str | None:
        """Why it cannot run here, or None where it can."""
        if device not in self.devices:
            return f"serves {' and '.join(self.devices)} only; this run is on {device}"
        if dtype not in self.dtypes:
            return f"serves {', '.join(self.dtypes)} only; this run is in {dtype}"
        if self.interpreted(device) and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA GPU (TRITON_INTERPRET=1 checks its results, without times)"
        if self.imports is not None:
            try:
                importlib.import_module(self.imports)
            except Exception as error:  # a broken installation is a reason too
                return f"{self.imports} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return self.extra_reason(device)

    def interpreted(self, device: str) -> bool:
        return self.interpreted_on_cpu and device == "cpu"

    def too_large(self, workload: Workload) -> str | None:
        """Why a run that names no baselines leaves this workload out, or None."""
        work = workload.tokens * workload.classes * workload.dim
        if work <= self.largest:
            return None
        return (
            f"N V D = {work:.1e} is beyond the {self.largest:.0e} that it does in seconds: "
            f"ask with --baselines {self.name}"
        )

    def too_big(self, workload: Workload, free: int | None) -> str | None:
        """Why its scores do not fit into ``free`` bytes of a CPU's memory, or None."""
        wanted = self.bytes_per_score * workload.tokens * workload.classes
        if workload.device != "cpu" or free is None or wanted <= 0.9 * free:
            return None
        return f"needs about {wanted / 1e9:.1f} GB for its N x V scores; {free / 1e9:.1f} GB are free here"


REGISTRY: dict[str, Baseline] = {}


def register(name: str, loss: str, describe: str, **facts: object) -> Callable[[LossFunction], LossFunction]:
    """Enter a function into the registry under ``name``; ``facts`` are the other fields of :class:`Baseline`."""

    def enter(function: LossFunction) -> LossFunction:
        if name in REGISTRY:
            raise ValueError(f"baseline {name!r} is registered already: give this one another name")
        if loss not in LOSSES:
            raise ValueError(f"baseline {name!r} computes {loss!r}: the gate knows {' and '.join(map(repr, LOSSES))}")
        REGISTRY[name] = Baseline(name, loss, describe, function, **facts)  # type: ignore[arg-type]
        return function

    return enter


def _compiler_reason(device: str) -> str | None:
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler (g++ or clang++) on a CPU"
    return None


def _chunked_reason(device: str) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"needs torch >= 2.13 (this is {torch.__version__})"
    return None


def _peer(module: str) -> Any:
    return importlib.import_module(module)


# --- harmonic loss ---------------------------------------------------------------------------------------------------


@register(
    "ours_torch",
    "harmonic",
    "harmonic_triton, PyTorch backend",
    imports="harmonic_triton",
    target_exact=True,
)
def ours_torch(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("harmonic_triton").linear_harmonic_loss(x, w, target, n=exponent, backend="torch")
    return loss


@register(
    "ours_triton",
    "harmonic",
    "harmonic_triton, Triton backend",
    imports="harmonic_triton",
    target_exact=True,
    interpreted_on_cpu=True,
)
def ours_triton(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("harmonic_triton").linear_harmonic_loss(x, w, target, n=exponent, backend="triton")
    return loss


def _register_strategy(strategy: str, describe: str, memory_budget: int | None) -> None:
    """One strategy of the Triton backend, whatever harmonic_triton.fused.strategy would choose."""

    @register(
        f"ours_triton_{strategy}",
        "harmonic",
        describe,
        imports="harmonic_triton.fused.strategy",
        target_exact=True,
        interpreted_on_cpu=True,
    )
    def run(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
        options = {"n": exponent, "backend": "triton", "memory_budget": memory_budget}
        with _peer("harmonic_triton.fused.strategy").force(strategy):
            loss: Tensor = _peer("harmonic_triton").linear_harmonic_loss(x, w, target, **options)
        return loss


_register_strategy("chunks", "the same, always with three products and stored 16-bit log-scores", None)
_register_strategy("recompute", "the same, always with four products and O(N + V) memory", RECOMPUTE_BUDGET)


@register(
    "authors_dense",
    "harmonic",
    "dense, in the linear domain, as the authors train GPT-2 (without their uniform mix and NaN patches)",
    scores_in_dtype=True,
    bytes_per_score=33,
)
def authors_dense(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    ww: Tensor = torch.linalg.vector_norm(w, dim=-1).square()
    xx: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    square = ww + xx - 2 * (x @ w.T)  # (N, V)
    square = square / square.amin(dim=-1, keepdim=True)
    weight = square.float().pow(-exponent / 2)
    probability = weight / weight.sum(dim=-1, keepdim=True)
    return probability.gather(-1, target[:, None]).log().mean().neg()


@register("harmonic_dense", "harmonic", "dense, in the log domain, through F.cross_entropy", bytes_per_score=20)
def harmonic_dense(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    x, w = x.float(), w.float()
    square = torch.addmm(w.square().sum(dim=-1), x, w.T, alpha=-2) + x.square().sum(dim=-1, keepdim=True)
    return F.cross_entropy(square.log() * (-exponent / 2), target)


@register(
    "keops",
    "harmonic",
    "KeOps reduction over symbolic distances",
    imports="pykeops.torch",
    dtypes=("fp32",),
    largest=1e9,  # no matrix products: seconds for each 1e9 on a CPU
    compiles=True,
    extra_reason=_compiler_reason,
)
def keops(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    lazy = _peer("pykeops.torch").LazyTensor
    square = ((lazy(x[:, None, :]) - lazy(w[None, :, :])) ** 2).sum(-1)
    log_sum = (square.log() * (-exponent / 2)).logsumexp(dim=1).squeeze(-1)
    loss: Tensor = (log_sum + (x - w[target]).square().sum(dim=-1).log() * (exponent / 2)).mean()
    return loss


# --- cross-entropy ---------------------------------------------------------------------------------------------------


@register(
    "ours_lce_torch",
    "cross_entropy",
    "harmonic_triton's linear_cross_entropy, PyTorch backend",
    imports="harmonic_triton",
    target_exact=True,
)
def ours_lce_torch(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("harmonic_triton").linear_cross_entropy(x, w, target, backend="torch")
    return loss


@register(
    "ours_lce_triton",
    "cross_entropy",
    "harmonic_triton's linear_cross_entropy, Triton backend",
    imports="harmonic_triton",
    target_exact=True,
    interpreted_on_cpu=True,
)
def ours_lce_triton(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("harmonic_triton").linear_cross_entropy(x, w, target, backend="triton")
    return loss


@register("cross_entropy", "cross_entropy", "F.cross_entropy(x @ w.T)", scores_in_dtype=True, bytes_per_score=12)
def cross_entropy(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    return F.cross_entropy((x @ w.T).float(), target)


@functools.cache
def _compiled_cross_entropy() -> Callable[..., Tensor]:
    return torch.compile(cross_entropy, dynamic=False, fullgraph=True)


@register(
    "cross_entropy_compiled",
    "cross_entropy",
    "the same under torch.compile",
    scores_in_dtype=True,
    bytes_per_score=12,
    compiles=True,
    extra_reason=_compiler_reason,
)
def cross_entropy_compiled(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    return _compiled_cross_entropy()(x, w, target, exponent)


@register(
    "torch_chunked",
    "cross_entropy",
    "torch.nn.functional.linear_cross_entropy, chunked with its own default options",
    scores_in_dtype=True,
    extra_reason=_chunked_reason,
)
def torch_chunked(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())


@register(
    "liger",
    "cross_entropy",
    "Liger fused linear cross-entropy",
    imports="liger_kernel.transformers.functional",
    interpreted_on_cpu=True,
    scores_in_dtype=True,
)
def liger(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    functional = _peer("liger_kernel.transformers.functional")
    loss: Tensor = functional.liger_fused_linear_cross_entropy(x, w, target)
    return loss


@register(
    "cce",
    "cross_entropy",
    "Cut Cross-Entropy, with its default gradient filter",
    devices=("cuda",),
    imports="cut_cross_entropy",
)
def cce(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("cut_cross_entropy").linear_cross_entropy(x, w, target)
    return loss


@register(
    "cce_exact",
    "cross_entropy",
    "Cut Cross-Entropy without its gradient filter",
    devices=("cuda",),
    imports="cut_cross_entropy",
)
def cce_exact(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("cut_cross_entropy").linear_cross_entropy(x, w, target, filter_eps=None)
    return loss


@register(
    "cce_compiled",
    "cross_entropy",
    "Cut Cross-Entropy's torch.compile implementation, the one that runs without a GPU",
    imports="cut_cross_entropy",
    scores_in_dtype=True,
    bytes_per_score=12,
    compiles=True,
    extra_reason=_compiler_reason,
)
def cce_compiled(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("cut_cross_entropy").linear_cross_entropy(x, w, target, impl="torch_compile")
    return loss


@register(
    "quack",
    "cross_entropy",
    "quack's chunked linear cross-entropy",
    devices=("cuda",),
    dtypes=("bf16", "fp16"),
    imports="quack.linear_cross_entropy",
    scores_in_dtype=True,
)
def quack(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    loss: Tensor = _peer("quack.linear_cross_entropy").chunked_linear_cross_entropy(x, w, target)
    return loss
