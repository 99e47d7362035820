"""The sampled parameters of a model that FSDP2 (``fully_shard``) has spread over processes.

Each process holds some rows of every parameter, as a DTensor, and moves those alone; the model gathers a module's weights
for its forward and backward pass. The numbers do not depend on how many processes there are:

- noise is that of the whole model, of which a process takes its rows;
- every process runs the same minibatch, and the gradient is the first one's: the others send zeros backward, so that the
  sum that FSDP takes is exact, in any order, and so is its mean, for 2, 4, 8, ... processes;
- whole blocks of evaluation data are shared out, and their losses brought together as they are;
- sums over all parameters (``sgnht``) are of integers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from harmonic_triton._common.processes import rank_and_world
from harmonic_triton.losskernel.sampling.data import Samples
from harmonic_triton.losskernel.sampling.parameters import FlatParameters, Mask, PerSampleLoss, Share
from harmonic_triton.losskernel.sampling.rng import CounterRNG


def flat_parameters(model: nn.Module, per_sample_loss: PerSampleLoss, mask: Mask) -> FlatParameters:
    """The sampled parameters of a model, whole or sharded.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model is sharded in another way than this serves.
    """
    if isinstance(model, nn.Module):
        units = sharded_modules(model)
        for unit in units:  # after a forward pass without a backward pass the outermost one is still whole
            unit.reshard()
        if units or any(is_dtensor(p) for p in model.parameters()):
            return ShardedParameters(model, per_sample_loss, mask)
    return FlatParameters(model, per_sample_loss, mask)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor, without the time that importing one takes."""
    return any(base.__name__ == "DTensor" for base in type(value).__mro__)


class Window(NamedTuple):
    """Where a process's part of a parameter lies in the whole model's vector: columns of (rows, width) from ``start`` on."""

    start: int
    rows: int
    width: int
    first: int  # of the columns that are this process's
    last: int  # the one behind them

    def take(self, piece: Tensor, at: int, out: Tensor) -> None:
        """Copy what lies in entries at ... at + len(piece) of the whole vector to ``out``, this part as one vector."""
        low = max(at, self.start) - self.start
        high = min(at + len(piece), self.start + self.rows * self.width) - self.start
        if low >= high or self.first == self.last:
            return
        piece, own = piece[low + self.start - at : high + self.start - at], self.last - self.first
        top, bottom = -(-low // self.width), high // self.width  # the rows that are whole in the piece

        def some(row: int, left: int, right: int) -> None:
            left, right = max(left, self.first), min(right, self.last)
            if left < right:
                place, source = row * own - self.first, row * self.width - low
                out[place + left : place + right] = piece[source + left : source + right]

        if top > bottom:
            some(bottom, low - bottom * self.width, high - bottom * self.width)
            return
        if low < top * self.width:
            some(top - 1, low - (top - 1) * self.width, self.width)
        if high > bottom * self.width:
            some(bottom, 0, high - bottom * self.width)
        if top < bottom:
            whole = piece[top * self.width - low : bottom * self.width - low].view(-1, self.width)
            out[top * own : bottom * own].view(-1, own).copy_(whole[:, self.first : self.last])


class ShardedParameters(FlatParameters):
    """The sampled parameters of which this process holds a part; see the module.

    While ``evaluating`` the model's own shards hold a chain's weights. Outside they are what they were, as its gradients are.
    """

    sharded = True

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss, mask: Mask) -> None:
        self.units = sharded_modules(model)
        meshes = []
        p: Any
        for name, p in model.named_parameters():
            if not is_dtensor(p):
                continue
            if p.device_mesh.ndim != 1 or not p.placements[0].is_shard() or not self.units:
                raise ValueError(
                    f"parameter {name!r} is sharded as {p.placements} over a mesh of {p.device_mesh.ndim} dimensions; the"
                    " sampler takes weights that fully_shard has spread over a mesh of one dimension (of a mesh of chains and"
                    " shards the second: fully_shard(model, mesh=mesh['shard']))"
                )
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {name!r} has a hook that runs when its gradient is there, as an optimizer that steps in the"
                    " backward pass; the sampler takes gradients of its own: remove the hook first"
                )
            if p.device_mesh not in meshes:
                meshes.append(p.device_mesh)
        if len(meshes) != 1:
            raise ValueError(
                f"the model's weights are sharded over {len(meshes)} meshes; give fully_shard one mesh for all its modules"
            )
        self.mesh: Any = meshes[0]
        self.group, self.rank, self.size = self.mesh.get_group(), self.mesh.get_local_rank(), self.mesh.size()
        self.first_rank = dist.get_global_rank(self.group, 0)
        if isinstance(mask, Mapping):
            mask = {name: m.full_tensor() if is_dtensor(m) else m for name, m in mask.items()}  # type: ignore[union-attr]
        super().__init__(model, per_sample_loss, mask)
        if self.center.device.type != self.mesh.device_type:
            raise ValueError(
                f"the shards are on {self.center.device} and their mesh is of {self.mesh.device_type}: offloaded parameters"
                " are not served; call fully_shard without offload_policy"
            )

    # --- where parameters lie ------------------------------------------------------------------------------------------

    def find_share(self) -> Share:
        """Which chains are this group's; asks all processes."""
        ranks = tuple(self.mesh.mesh.flatten().tolist())
        every: list[Any] = [None] * rank_and_world()[1]
        dist.all_gather_object(every, ranks)
        groups = sorted(set(every))
        if sorted(rank for group in groups for rank in group) != list(range(len(every))):
            raise ValueError(
                f"the meshes of the model's shards, {groups}, do not share out the {len(every)} processes: each process is"
                " to be in one, and to call this"
            )
        return Share(groups.index(ranks), len(groups), leads=self.rank == 0)

    def here(self, parameter: Tensor) -> Tensor:
        if not is_dtensor(parameter):
            return parameter.detach()
        local: Tensor = parameter.detach().to_local()  # type: ignore[attr-defined]
        return local

    def part_of(self, parameter: Tensor, values: Tensor) -> Tensor:
        if not is_dtensor(parameter):
            return values
        dim, first, last = self._rows(parameter)
        return values.narrow(dim, first, last - first)

    def _rows(self, parameter: Any) -> tuple[int, int, int]:
        """(the dimension that is sharded, this process's first row, the one behind its last)."""
        dim = parameter.placements[0].dim
        length = parameter.shape[dim]
        chunk = -(-length // self.size)
        first, last = (min(rank * chunk, length) for rank in (self.rank, self.rank + 1))
        return dim, first, last

    @cached_property
    def windows(self) -> list[Window]:
        """Where each part lies in the whole model's vector."""
        windows, start = [], 0
        for parameter, flip in zip(self.parameters, self.flipped, strict=True):
            shape = parameter.shape[::-1] if flip else parameter.shape
            dim, first, last = self._rows(parameter) if is_dtensor(parameter) else (0, 0, shape[0] if shape else 1)
            dim = 1 - dim if flip and is_dtensor(parameter) else dim
            rows, inner = shape[:dim].numel(), shape[dim + 1 :].numel()
            width = parameter.numel() // rows if rows else 0
            windows.append(Window(start, rows, width, first * inner, last * inner))
            start += parameter.numel()
        return windows

    def _take(self, piece: Tensor, at: int, out: Tensor) -> None:
        for window, part in zip(self.windows, out.split(self.sizes), strict=True):
            if window.start < at + len(piece) and at < window.start + window.rows * window.width:
                window.take(piece, at, part)

    def own(self, vectors: Tensor) -> Tensor:
        out = torch.empty(len(vectors), len(self.center), dtype=self.center.dtype, device=self.center.device)
        for vector, row in zip(vectors, out, strict=True):
            self._take(vector.to(row), 0, row)
        return out

    def whole_mask(self) -> Tensor:
        full = (torch.ones(p.shape) if m is None else m for p, m in zip(self.parameters, self.masks, strict=True))
        return self.flat(list(full), self.center.dtype)

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        from torch.distributed.tensor import DTensor

        named = super().named(weights)
        parameter: Any
        for (name, copy), parameter in zip(list(named.items()), self.parameters, strict=True):
            if is_dtensor(parameter):
                named[name] = DTensor.from_local(
                    copy, self.mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
        return named

    def unnamed(self, values: Mapping[str, Tensor]) -> Tensor:
        return self.flat([self.here(value) for value in values.values()], self.center.dtype)

    # --- what is said of all entries of a vector -----------------------------------------------------------------------

    def noise(self, rng: CounterRNG, out: Tensor, chains: list[int], step: int, std: float = 1.0) -> None:
        for row, chain in zip(out, chains, strict=True):
            if chain < 0:
                row.zero_()
                continue
            for start, piece in rng.noise_pieces(self.num_entries, out, chain, step, std):
                self._take(piece, start, row)

    def over_all(self, values: Tensor, how: str) -> Tensor:
        if how == "max":  # which a NaN does not survive
            values = torch.where(values.isnan(), torch.inf, values)
        dist.all_reduce(values, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=self.group)
        return values

    def spread(self, vectors: Tensor) -> Tensor:
        ends = vectors.new_full((2, len(vectors)), -torch.inf)
        if vectors.shape[1]:
            ends[0], ends[1] = vectors.amax(1), -vectors.amin(1)
        return self.over_all(ends, "max").sum(0)

    def dot(self, one: Tensor, other: Tensor) -> float:
        return float(self.over_all(torch.dot(one.double(), other.double()), "sum"))

    def norm(self, vector: Tensor) -> float:
        return math.sqrt(self.dot(vector, vector))

    def agreed(self, values: Tensor) -> Tensor:
        dist.broadcast(values, self.first_rank, group=self.group)
        return values

    # --- passes of the model -------------------------------------------------------------------------------------------

    def placed(self, weights: Tensor) -> list[Tensor]:
        parts = self.parts(weights)
        self._place(parts)
        return parts

    def _place(self, parts: list[Tensor]) -> None:
        for unit in self.units:  # what was gathered is of the weights before
            unit.reshard()
        with torch.no_grad():
            for parameter, part in zip(self.parameters, parts, strict=True):
                self.here(parameter).copy_(part)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            parameters = list(self.model.parameters())
            gradients = [p.grad for p in parameters]
            former = [self.here(p).clone() for p in self.parameters]
            try:
                for p in parameters:
                    p.grad = None
                yield
            finally:
                self._place(former)
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient

    def call(self, parts: list[Tensor], batch: Any) -> Any:
        mixed: RuntimeError | None = None
        losses: Any = None
        try:
            losses = functional_call(self.probe, dict(self.private), (batch,), tie_weights=False)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            mixed = error
        if mixed is not None or is_dtensor(losses):
            raise TypeError(
                "per_sample_loss, or the model's forward, reads weights that fully_shard has sharded outside of the forward"
                " pass of the module that holds them, where they are not gathered: call model(...), and let a loss that needs"
                " the head's weights be computed in the model's forward"
            ) from mixed
        return losses

    def gradient(self, values: list[Tensor], batch: Any, share: float) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            mean = self.losses(values, batch).mean() * share
            if not mean.requires_grad:
                raise ValueError(
                    "per_sample_loss gives losses without a gradient by the sampled parameters: it, or the model, detaches"
                    " them or leaves the parameters out"
                )
            (mean if self.rank == 0 else mean * 0.0).backward()
        gradients = [self._taken(parameter) for parameter in self.parameters]
        for parameter in self.model.parameters():
            parameter.grad = None
        return mean.detach(), gradients

    def _taken(self, parameter: Tensor) -> Tensor:
        """The gradient that a parameter has, which is the first process's."""
        if is_dtensor(parameter):
            gradient = parameter.grad
            if gradient is None:
                return torch.zeros_like(self.here(parameter))
            return self.here(gradient).mul_(self.size)  # of the mean over processes
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        return self.agreed(gradient)

    def read(self, weights: Tensor, data: Samples, rows: int) -> Tensor:
        values, starts = self.placed(weights), list(range(0, len(data), rows))
        every = self.center.new_empty(0, dtype=torch.float32)
        for turn in range(0, len(starts), self.size):
            number = turn + self.rank
            start = starts[min(number, len(starts) - 1)]  # all take part in every pass
            losses = self.losses(values, data.block(start, start + rows)).float()
            each = len(losses) // min(rows, len(data) - start)
            if not len(every):
                every = losses.new_zeros(each * len(data))
            if number < len(starts):
                every[start * each : start * each + len(losses)] = losses
        return self.over_all(every, "sum")

    def agree_on(self, fingerprint: Mapping[str, str]) -> None:
        """Whether every process of the group was given the same.

        Raises:
            ValueError: one was not, and in what.
        """
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, dict(fingerprint), group=self.group)
        for rank, other in enumerate(every):
            names = [name for name in fingerprint if other.get(name) != every[0].get(name)]
            if names:
                raise ValueError(
                    f"process {rank} of the {self.size} that hold the model was given another {' and '.join(names)} than"
                    " process 0; they run one chain together, and all need the same arguments and data"
                )
