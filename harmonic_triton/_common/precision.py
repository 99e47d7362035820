"""In which precision products are computed, whatever the settings of the process say."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_precision_lock = threading.Lock()
_precision_users = 0
_restore_precision: Callable[[], None]


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products accumulate and stay in fp32 whatever the global settings: TF32 puts s_c off by 26 % near a class vector.

    The settings are the process's: the first of several threads changes them and the last one puts them back.
    """
    global _precision_users, _restore_precision
    with _precision_lock:
        if _precision_users == 0:
            _restore_precision = _highest_precision()
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                _restore_precision()


def _autocast_available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


_autocast_available._dynamo_marked_constant = True  # type: ignore[attr-defined]
# As torch.compiler.assume_constant_result sets it, without importing dynamo: PyTorch 2.11 cannot trace the question.


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products of tensors on ``device`` in their own dtype, whatever autocast surrounds the call."""
    if not _autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor the precision setting reaches the products of fp32 tensors on ``device``."""
    with no_autocast(device), full_fp32():
        yield


def _highest_precision() -> Callable[[], None]:
    """Set full precision through the interface that the user's setting came by (torch refuses a mix); returns the undo."""
    if _is_highest():
        return _nothing
    backends: Any = torch.backends
    products = (getattr(backends.cuda, "matmul", None), getattr(backends.mkldnn, "matmul", None))
    halves = backends.cuda.matmul.allow_fp16_accumulation  # with it a product of fp16 in fp32 is refused
    backends.cuda.matmul.allow_fp16_accumulation = False
    places: list[Any] = [place for place in products if hasattr(place, "fp32_precision")]
    before = [place.fp32_precision for place in places]

    def restore(legacy: str | None) -> None:
        backends.cuda.matmul.allow_fp16_accumulation = halves
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for place, value in zip(places, before, strict=True):
            if place.fp32_precision != value:
                place.fp32_precision = value

    try:
        legacy: str | None = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        legacy = None
        for place in places:
            place.fp32_precision = "ieee"
    return functools.partial(restore, legacy)


def _is_highest() -> bool:
    """Whether there is nothing to set, which a small call need not pay for."""
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the other interface
        return False
    return legacy == "highest" and not torch._C._get_cublas_allow_fp16_accumulation()


def _nothing() -> None:
    pass


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 is computed in fp64, everything else in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
