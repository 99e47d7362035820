"""The options of the losses: names, types and defaults. Functions, modules and type checkers have them from here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypedDict, get_type_hints

from torch import Tensor

from harmonic_triton._common import validate
from harmonic_triton._common.dispatch import check_name

Reduction = Literal["none", "mean", "sum"]
BackendName = Literal["auto", "triton", "torch", "reference"]


@dataclass(frozen=True)
class Options:
    """Every option of both losses, as a call was given them; the functions' docstrings say what each does."""

    n: float | Tensor | None = None
    eps: float = 0.0
    uniform_mix: float = 0.0
    bias: Tensor | None = None
    softcap: float | None = None
    z_loss: float = 0.0
    token_scaling: bool = False
    class_weight: Tensor | None = None
    ignore_index: int = -100
    reduction: Reduction = "mean"
    num_items: float | Tensor | None = None
    label_smoothing: float = 0.0
    shift: bool | int = False
    return_stats: bool = False
    return_lse: bool = False
    process_group: object | None = None
    backend: BackendName = "auto"
    memory_budget: int | None = None


class LossOptions(TypedDict, total=False):
    """The keyword arguments that both losses take; ``return_stats`` beside them decides the type of the result."""

    class_weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    num_items: float | Tensor | None
    label_smoothing: float
    token_scaling: bool
    shift: bool | int
    process_group: object | None
    backend: BackendName
    memory_budget: int | None


class HeadLossOptions(LossOptions, total=False):
    """Those of the harmonic loss that a head, which has n and eps itself, is given for training."""

    uniform_mix: float


class HarmonicOptions(HeadLossOptions, total=False):
    """The keyword arguments of the harmonic loss."""

    n: float | Tensor | None
    eps: float


class HeadOptions(HeadLossOptions, total=False):
    """What a head keeps for its losses."""

    return_stats: bool


class ModuleOptions(HarmonicOptions, total=False):
    """What a loss module keeps."""

    return_stats: bool


class CrossEntropyOptions(LossOptions, total=False):
    """The keyword arguments of cross-entropy."""

    bias: Tensor | None
    softcap: float | None
    z_loss: float


def names(options: type, *more: str) -> tuple[str, ...]:
    """The names of a TypedDict of options in the order of :class:`Options`, and some more."""
    known = {*get_type_hints(options), *more}
    return tuple(field.name for field in fields(Options) if field.name in known)


HARMONIC = names(ModuleOptions)
HEAD = names(HeadOptions)
CROSS_ENTROPY = names(CrossEntropyOptions, "return_stats", "return_lse")


def signature(function: Any, allowed: tuple[str, ...]) -> inspect.Signature:
    """What ``help`` shows: the function's own signature with the options in place of ``**options``."""
    declared = inspect.signature(function)
    keywords = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Options)
        if f.name in allowed and f.default is not MISSING
    ]
    plain = [p for p in declared.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    return declared.replace(parameters=[*plain, *keywords])


def collect(owner: str, given: Mapping[str, Any], allowed: tuple[str, ...]) -> Options:
    """The options of a call or a module, checked as far as they tell without its tensors.

    Raises:
        TypeError: ``owner`` has no such option (the message lists those that it has), or one has a wrong type.
        ValueError: one has a wrong value.
    """
    _check_names(owner, given, allowed)
    for name, value in given.items():
        check = _CHECKS.get(name)
        if check is not None:
            check(value)
    options = Options(**given)
    validate.reduction(options.reduction, options.num_items)
    if options.process_group is not None:
        if options.backend == "reference":
            raise ValueError(
                "backend='reference' is dense and of one process; pass process_group=None and the full weights"
            )
        if options.uniform_mix and options.label_smoothing:
            raise ValueError(
                "label_smoothing together with uniform_mix needs every class in one process: choose one of both"
            )
    return options


_CHECKS: dict[str, Callable[[Any], object]] = {
    "n": validate.exponent,
    "eps": validate.eps,
    "uniform_mix": functools.partial(validate.between, "uniform_mix", low=0.0, high=validate.FP32_LIMIT),
    "bias": validate.bias,
    "softcap": validate.softcap,
    "z_loss": functools.partial(validate.between, "z_loss", low=0.0, high=validate.FP32_LIMIT),
    "token_scaling": functools.partial(validate.flag, "token_scaling"),
    "class_weight": validate.class_weight,
    "ignore_index": functools.partial(validate.integer, "ignore_index"),
    "label_smoothing": functools.partial(validate.between, "label_smoothing", low=0.0, high=1.0),
    "shift": validate.offset,
    "return_stats": functools.partial(validate.flag, "return_stats"),
    "return_lse": functools.partial(validate.flag, "return_lse"),
    "process_group": validate.process_group,
    "backend": check_name,
    "memory_budget": validate.budget,
}
"""What an option tells alone; ``reduction`` and ``num_items`` only tell together. The defaults need no check."""


def _check_names(owner: str, given: Collection[str], allowed: tuple[str, ...]) -> None:
    """Raise a TypeError for the first name that is not allowed, with those that are."""
    for name in given:
        if name not in allowed:
            reason = _ABSENT.get(name, "")
            raise TypeError(f"{owner} has no option {name!r}{reason}; it takes {', '.join(allowed)}")


_ABSENT = {
    "z_loss": " (HarMax has no logits whose scale could drift: a common factor of all distances changes nothing)",
    "deterministic": " (the fused backends give bitwise the same result on every run)",
    "bias": " (distances have none: a class vector that is moved does what a bias would; leave bias= out, False as well)",
    "softcap": " (HarMax has no logits to cap: its log-scores -n log d_j are bounded by a smaller n, its loss by uniform_mix)",
    "return_lse": " (a common factor of all distances changes the sum over the classes and nothing else; -log p_c is the loss)",
}
