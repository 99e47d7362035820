"""The operands of a call, and what every kernel that it launches is told about them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from harmonic_triton._common.copies import stages
from harmonic_triton._common.device import architecture
from harmonic_triton._common.dispatch import interpreted
from harmonic_triton.fused.floors import NormRange
from harmonic_triton.fused.problem import Operands
from harmonic_triton.fused.triton import forward as forward_kernels
from harmonic_triton.fused.triton import scores as scores_kernels
from harmonic_triton.fused.triton.tile_configs import (
    FEATURE_BLOCK,
    FUSION,
    GROUP,
    ROW_BLOCK,
    ROW_OPTIONS,
    described,
    near,
    parts,
    tile_config,
)

ALIGNED = 16  # entries: rows that start on multiples are copied asynchronously and keep the kernels in registers


class Launch:
    """The operands of one call and what every kernel is told about them."""

    def __init__(self, operands: Operands, valid: Tensor, eps: float, softcap: float = 0.0) -> None:
        (self.tokens, self.width), self.classes = operands.x.shape, len(operands.w)
        self.x, self.w = x, w = _aligned(operands.x), _aligned(operands.w)
        self.target = torch.where(valid, operands.target, -1)  # of tokens that count
        self.n, self.smooth_weight, self.eps = operands.n, operands.smooth_weight, eps
        self.dot = operands.n is None
        self.bias, self.softcap = operands.bias, softcap
        if softcap and self.bias is None:  # one kernel less to compile
            self.bias = w.new_zeros(self.classes, dtype=torch.float32)
        self.logits = {
            "DOT": self.dot,
            "BIAS": self.bias is not None,
            "CAP": softcap > 0,
        }  # what the scores are made of
        self.features = x.shape[1]  # with the padding, which adds nothing
        self.strides = (*x.stride(), *w.stride())
        self.upcast = interpreted()
        self.rows = {"BLOCK_N": ROW_BLOCK, "BLOCK_D": FEATURE_BLOCK, **ROW_OPTIONS}
        self.row_grid = (cdiv(self.tokens, ROW_BLOCK),)

    def measure(self) -> Launch:
        """Norms and the geometry of targets, which the scores are made with."""
        x, w = self.x, self.w
        arch, size = architecture(x.device), x.element_size()
        self.config = config = tile_config(x.device, x.dtype, self.width)
        self.tma = described(arch, size) and x.stride(1) == w.stride(1) == 1
        self.fast = x.is_cuda and not interpreted() and not torch.version.hip
        self.tile = {
            **self.logits, "TMA": self.tma, "UPCAST": self.upcast, "FAST": self.fast,
            "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d,
            "GROUP": GROUP, "NEAR": near(config),
            "num_warps": config.num_warps, "num_stages": config.num_stages if self.tma else stages(arch, config.num_stages, size),
            **FUSION,
        }  # fmt: skip
        self.sums = {"FAST": self.fast, "BLOCK_V": config.block_v}  # of the kernels that add tiles up
        self.smooth_sum = None if self.smooth_weight is None else self.smooth_weight.sum()
        self.norms = None
        norm_range: tuple[Tensor | None, ...] = (None, None, None)
        if not self.dot:
            self.norms = w.new_zeros(cdiv(self.classes, config.block_v) * config.block_v, dtype=torch.float32)
            forward_kernels.norms_kernel[(cdiv(self.classes, ROW_BLOCK),)](
                w, self.norms, self.classes, self.features, *w.stride(), **self.rows
            )
            norm_range = NormRange.of(self.norms[: self.classes])
        self.target_ref, self.vectors = self._geometry(self.target, norm_range)
        return self

    def _geometry(self, index: Tensor, norm_range: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """s_index, or the logit of index before its cap, in fp64, and what the scores relative to it are made with."""
        direct, more = self.x.new_empty(self.tokens, dtype=torch.float64), vectors(self.x, 5, self.tokens)
        forward_kernels.geometry_kernel[self.row_grid](
            self.x, self.w, index, self.bias, *norm_range, direct, *more,
            self.tokens, self.features, self.eps, self.softcap, *self.strides, **self.logits, **self.rows,
        )  # fmt: skip
        return direct, more

    def capped_logits(self) -> Tensor:
        """Those of the targets, in fp64."""
        return self.softcap * torch.tanh(self.target_ref / self.softcap)

    def logits_of(self, index: Tensor) -> Tensor:
        """A class's logit for each token, before its cap."""
        return self._geometry(index, (None, None, None))[0]

    def select(self, at: slice) -> Launch:
        """The same call for some of the tokens."""
        if at == slice(0, self.tokens):
            return self
        part = copy.copy(self)
        part.x, part.target = self.x[at], self.target[at]
        part.target_ref, part.vectors = self.target_ref[at], self.vectors[:, at]
        part.tokens = len(part.x)
        part.row_grid = (cdiv(part.tokens, ROW_BLOCK),)
        return part


def cdiv(a: int, b: int) -> int:
    """a/b, rounded up. Triton's own does for its compiler what costs a tenth of a small call's time here."""
    return -(-a // b)


def _aligned(operand: Tensor) -> Tensor:
    """(M, D) itself, or a copy padded with zero features where its rows are not ALIGNED.

    A transposed operand stays as it is, however far apart its features are: its rows are next to each other. Descriptors
    are told of no rows that overlap, as those of an expanded operand do, and of no stride of 1, which a single row may have.
    """
    rows, width = operand.shape
    by_rows = operand.stride(1) == 1 and operand.stride(0) % ALIGNED == 0 and operand.stride(0) >= width
    by_columns = operand.stride(0) == 1 and operand.stride(1) > 1
    if (by_rows or by_columns) and width % ALIGNED == 0 and operand.data_ptr() % 16 == 0:
        return operand
    padded = operand.new_zeros(rows, cdiv(width, ALIGNED) * ALIGNED)
    padded[:, :width] = operand
    return padded


def vectors(like: Tensor, count: int, length: int) -> Tensor:
    """Room for fp32 vectors (count, length), each of which starts on a boundary of 16 bytes."""
    return like.new_empty((count, cdiv(length, 4) * 4), dtype=torch.float32)[:, :length]


def launch_scores(call: Launch, a: Tensor | None, first: int, width: int, inputs: tuple[Any, ...], out: tuple[Any, ...],
            **switches: int) -> None:  # fmt: skip
    """Launch the scores kernel over the classes first ... first + width."""
    config = call.config
    switches["PARTS"] = parts(config, call.dot, switches["KEEP"], switches["WANT_SCORES"])
    tiles = cdiv(call.tokens, config.block_n) * cdiv(width, config.block_v)
    x, w, entries = call.x, call.w, a
    programs = tiles
    if call.tma:
        x, w = _descriptor(x, config.block_n, config.block_d), _descriptor(w, config.block_v, config.block_d)
        entries = None if a is None else _descriptor(a, config.block_n, config.block_v // switches["PARTS"])
        programs = min(tiles, _processors(call.x))
    _, _, offset, inverse, least = call.vectors
    scores_kernels.scores_kernel[(programs,)](
        x, w, entries, call.norms, call.bias, call.target, offset, inverse, least, call.n, call.smooth_weight, *inputs, *out,
        call.tokens, call.classes, call.features, call.softcap, first, width, *call.strides, 0 if a is None else a.stride(0),
        **switches, SMOOTHING=call.smooth_weight is not None, **call.tile,
    )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
