"""How a model is spread over the processes of a run: replicas, FSDP2, vocabulary and feed-forward layers by tensor parallelism."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .model import GPT


def mesh_of(device: torch.device, tensor_parallel: int) -> DeviceMesh:
    """(replicas, tensor_parallel) processes; those of one row share a batch."""
    shape = (dist.get_world_size() // tensor_parallel, tensor_parallel)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))


def spread(model: GPT, mesh: DeviceMesh, fsdp: bool) -> None:
    """Shard the parameters in place; every process must have the same ones before."""
    if mesh["tensor"].size() > 1:
        plan: dict[str, ParallelStyle] = {f"blocks.{i}.{name}": style for i in range(len(model.blocks))
                for name, style in (("up", ColwiseParallel()), ("proj", RowwiseParallel()))}  # fmt: skip
        parallelize_module(model, mesh["tensor"], plan)
        whole = model.tokens.weight
        rows = distribute_tensor(whole.detach(), mesh["tensor"], [Shard(0)])
        model.tokens.weight = nn.Parameter(rows)
        model.tokens.register_forward_pre_hook(_as_dtensor)
        model.tokens.register_forward_hook(_as_plain)
    if fsdp:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])


def _as_dtensor(tokens: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Ids as embeddings sharded on their rows take them: the same in every process."""
    return (DTensor.from_local(args[0], cast(DTensor, tokens.weight).device_mesh, [Replicate()], run_check=False),)


def _as_plain(tokens: nn.Module, args: Any, out: DTensor) -> Tensor:
    return out.redistribute(out.device_mesh, [Replicate()]).to_local()


def is_spread(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass averages over the replicas; micro-batches before the last need not."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients to a norm of at most ``limit``; the norm before. One reduction for each mesh of parameters."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for p in model.parameters():
        if p.grad is not None:
            groups[p.grad.device_mesh if isinstance(p.grad, DTensor) else None].append(p.grad)
    norms = []
    for gradients in groups.values():
        norm = nn.utils.get_total_norm(gradients)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    for gradients in groups.values():
        for gradient in gradients:
            gradient.mul_(factor)
    return total


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states that one process alone would have; in process 0, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)


def load_full_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take this process's part of what :func:`full_state` gave, in a run of any number of processes."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
