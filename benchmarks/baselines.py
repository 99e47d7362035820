"""The registry of baselines: every way to compute a head's loss that the benchmarks compare.

A baseline is ``function(x, w, target, exponent) -> mean loss``; cross-entropies ignore the exponent.  ``register``
records beside it what the accuracy gate and the planner need to know.
"""

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossFunction = Callable[[Tensor, Tensor, Tensor, float], Tensor]
ANYWHERE = ("cpu", "cuda")


@dataclass(frozen=True)
class Baseline:
    name: str
    loss: str  # "harmonic" | "cross_entropy"
    describe: str
    function: LossFunction
    devices: tuple[str, ...] = ANYWHERE
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    imports: str | None = None  # the module it cannot run without
    target_exact: bool = False  # leave-one-out arithmetic: the target's distance and 1 - p_c keep every digit
    scores_in_dtype: bool = False  # x @ w.T is rounded to the inputs' dtype before it is used
    compiles: bool = False  # its first call at a shape runs a compiler, in this process
    interpreted_on_cpu: bool = False  # on a CPU only the Triton interpreter runs it: checked, never timed
    only_by_name: str | None = None  # why a run that names no baselines leaves it out
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


REGISTRY: dict[str, Baseline] = {}


def register(name: str, loss: str, describe: str, **facts: object) -> Callable[[LossFunction], LossFunction]:
    """Enter a function into the registry under ``name``; ``facts`` are the other fields of :class:`Baseline`."""

    def enter(function: LossFunction) -> LossFunction:
        if name in REGISTRY:
            raise ValueError(f"baseline {name!r} is registered already: give this one another name")
        if loss not in ("harmonic", "cross_entropy"):
            raise ValueError(f"baseline {name!r} computes {loss!r}: the gate knows 'harmonic' and 'cross_entropy'")
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


@register(
    "authors_dense",
    "harmonic",
    "dense, in the linear domain, as the authors train GPT-2 (without their uniform mix and NaN patches)",
    scores_in_dtype=True,
)
def authors_dense(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    ww: Tensor = torch.linalg.vector_norm(w, dim=-1).square()
    xx: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    square = ww + xx - 2 * (x @ w.T)  # (N, V)
    square = square / square.amin(dim=-1, keepdim=True)
    weight = square.float().pow(-exponent / 2)
    probability = weight / weight.sum(dim=-1, keepdim=True)
    return probability.gather(-1, target[:, None]).log().mean().neg()


@register("harmonic_dense", "harmonic", "dense, in the log domain, through F.cross_entropy")
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
    only_by_name="without matrix instructions its passes take minutes at a model's width; ask with --baselines keops",
    compiles=True,
    extra_reason=_compiler_reason,
)
def keops(x: Tensor, w: Tensor, target: Tensor, exponent: float) -> Tensor:
    lazy = _peer("pykeops.torch").LazyTensor
    square = ((lazy(x[:, None, :]) - lazy(w[None, :, :])) ** 2).sum(-1)
    normaliser = (square.log() * (-exponent / 2)).logsumexp(dim=1).squeeze(-1)
    loss: Tensor = (normaliser + (x - w[target]).square().sum(dim=-1).log() * (exponent / 2)).mean()
    return loss


# --- cross-entropy ---------------------------------------------------------------------------------------------------


@register("cross_entropy", "cross_entropy", "F.cross_entropy(x @ w.T)", scores_in_dtype=True)
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
    devices=("cuda",),
    imports="liger_kernel.transformers.functional",
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
