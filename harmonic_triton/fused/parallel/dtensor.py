"""DTensors as the plain tensors of one process, and back in backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonic_triton._common import validate


class Local(NamedTuple):
    """The tensors of this process, and whom it shares the rows with."""

    input: Tensor
    linear_weight: Tensor
    target: Any  # a Tensor, or None where there is none
    group: Any  # the ProcessGroup of the rows, None where every process has them all
    reduce_input: bool  # whether dX is to be added up here: a DTensor does that itself


def is_dtensor(value: Any) -> bool:
    """Without importing ``torch.distributed.tensor``, which takes a while."""
    return type(value).__name__ == "DTensor" and hasattr(value, "placements")


def localized(input: Tensor, linear_weight: Tensor, target: Tensor | None, group: Any) -> Local:
    """What the functions were given, as this process's own tensors.

    A weight that is sharded on its rows brings its group along. An input that is sharded, as sequence parallelism leaves
    it, is gathered; its gradient goes back the same way.

    Raises:
        TypeError: only the weight may be a plain tensor beside DTensors, and must then be with a ``process_group``.
        ValueError: a mesh, a placement or a group that does not fit.
    """
    if not any(map(is_dtensor, (input, linear_weight, target))):
        return Local(input, linear_weight, target, group, True)
    if not is_dtensor(linear_weight):
        which = "input" if is_dtensor(input) else "target"
        raise TypeError(
            f"{which} is a DTensor and linear_weight {validate.describe(linear_weight)} is not; distribute both over one"
            " mesh (distribute_tensor(linear_weight, mesh, [Shard(0)])), or pass local tensors and process_group="
        )
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = linear_weight.device_mesh, linear_weight.placements  # type: ignore[attr-defined]
    if mesh.ndim != 1 or placements[0] not in (Shard(0), Replicate()):
        raise ValueError(
            f"linear_weight is a DTensor with placements {list(placements)} on a mesh of {mesh.ndim} dimension(s); it must be"
            " [Shard(0)] (rows) or [Replicate()] on one: FSDP's dimension is gathered inside a module's forward"
        )
    if group is not None and group is not mesh.get_group():
        raise ValueError("process_group: linear_weight is a DTensor and brings the group of its mesh; pass None")
    sharded = placements[0] == Shard(0)
    for name, value in (("input", input), ("target", target)):
        if is_dtensor(value) and value.device_mesh != mesh:  # type: ignore[union-attr]
            raise ValueError(f"{name} is on another mesh than linear_weight; redistribute one of them")
    if is_dtensor(input):
        parts = [Partial()] if sharded else [Replicate()]
        input = input.redistribute(mesh, [Replicate()]).to_local(grad_placements=parts)  # type: ignore[attr-defined]
        reduce_input = False
    else:
        reduce_input = True
    if is_dtensor(target):
        target = target.redistribute(mesh, [Replicate()]).to_local()  # type: ignore[union-attr]
    weight = linear_weight.to_local()  # type: ignore[attr-defined]
    return Local(input, weight, target, mesh.get_group() if sharded else None, reduce_input)


def as_given(scores: Tensor, linear_weight: Tensor) -> Tensor:
    """This process's scores (..., rows), as a DTensor where the class vectors are one."""
    if not is_dtensor(linear_weight):
        return scores
    from torch.distributed.tensor import DTensor, Shard

    mesh: Any = linear_weight.device_mesh  # type: ignore[attr-defined]
    shape = torch.Size((*scores.shape[:-1], linear_weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    placements = [Shard(len(shape) - 1)]
    return DTensor.from_local(scores, mesh, placements, run_check=False, shape=shape, stride=stride)
