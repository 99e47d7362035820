"""The checks that need values: at once on a CPU, by a device-side assert on a GPU."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LIBRARY = torch.library.Library("harmonic_triton", "FRAGMENT")
_LIBRARY.define("positive(Tensor value, str what) -> Tensor")


def inside(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Targets that can index, and which were bad: a device whose assert does nothing (ROCm's) goes on with them."""
    bad = ~known(target, classes, ignore_index)
    return target.masked_fill(bad, 0), bad


def known(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Which targets are classes or to be ignored."""
    return ((target >= 0) & (target < classes)) | (target == ignore_index)


def check_values(target: Tensor, classes: int, ignore_index: int, n: Tensor | None) -> None:
    """The checks that need values: at once on the CPU, by a device-side assert on a GPU."""
    check_targets(target, known(target, classes, ignore_index), classes, ignore_index)
    if n is not None:
        check_exponent(n)


def check_targets(target: Tensor, ok: Tensor, classes: int, ignore_index: int) -> None:
    if target.device.type != "cpu":
        torch._assert_async(ok.all(), "harmonic_triton: target out of range")
    elif not bool(ok.all()):
        bad = target[~ok]
        worst = bad[0].item()
        mend = f"mark tokens to skip with ignore_index={ignore_index}"
        if worst < 0 and bool((bad == worst).all()):  # one negative number is somebody's mark
            mend = f"if it marks tokens to skip, pass ignore_index={worst} (it is {ignore_index} now)"
        raise ValueError(
            f"target holds {worst}, outside 0 ... {classes - 1} (linear_weight has {classes} rows); {mend}"
        )


def all_known(target: Tensor, classes: int, ignore_index: int) -> bool:
    """Whether every target is a class or to be ignored, as far as that is known without waiting: on a CPU."""
    if not target.is_cpu:
        return False
    values = target.numpy()  # whose calls cost a fifth of torch's on few tokens
    if values.view(np.uint64).max(initial=0) < classes:  # where a negative one is huge
        return True
    return bool((((values >= 0) & (values < classes)) | (values == ignore_index)).all())


def check_exponent(n: Tensor) -> None:
    """n > 0 and finite: at once on the CPU, by a device-side assert on a GPU."""
    if n.device.type == "cpu":
        value = n.item()
        if not 0 < value < math.inf:
            raise ValueError(f"n must be a finite harmonic exponent > 0, got {value}")
    else:
        torch._assert_async((n > 0) & n.isfinite(), "harmonic_triton: n must be finite and > 0")


def _positive(value: Tensor, what: str) -> Tensor:
    good = (value > 0) & value.isfinite()
    if value.device.type != "cpu":
        torch._assert_async(good.all(), f"harmonic_triton: {what}")
    elif not bool(good.all()):
        raise ValueError(f"{what}, got {value[~good].flatten()[0].item()}")
    return value.clone()


def positive(value: Tensor, what: str) -> Tensor:
    """The value, if it is positive and finite: otherwise a ValueError on the CPU, a device-side assert on a GPU.

    It is an operator so that ``vmap`` and ``torch.compile`` check as well. ``what`` names it and says what it must be.
    """
    checked = torch.ops.harmonic_triton.positive(value.detach(), what)
    return torch.where(checked > 0, value, 0)  # the value with its derivatives; no compiler can drop the check


_LIBRARY.impl("positive", _positive, "CompositeExplicitAutograd")
torch.library.register_fake("harmonic_triton::positive", lambda value, what: torch.empty_like(value), lib=_LIBRARY)
torch.library.register_vmap(
    "harmonic_triton::positive",
    lambda info, in_dims, value, what: (torch.ops.harmonic_triton.positive(value, what), in_dims[0]),
    lib=_LIBRARY,
)
