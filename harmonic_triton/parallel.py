"""Tensor-parallel plans: a head whose class vectors are spread over the processes of a mesh.

Nothing here is needed for vocabulary-parallel losses: whoever has a slice of the rows passes it with ``process_group``, and
whoever has a DTensor of them passes that. This is for ``torch.distributed.tensor.parallel.parallelize_module``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from harmonic_triton._common import validate
from harmonic_triton.modules import HarmonicHead


class VocabularyParallel(ParallelStyle):
    """A :class:`~harmonic_triton.HarmonicHead` whose class vectors are sharded on their rows.

    ``parallelize_module(model, mesh["tp"], {"head": VocabularyParallel()})``. The loss is the same in every process, and
    every process must be given the same targets; log-probabilities come as a DTensor sharded on the classes
    (``full_tensor()`` gathers them). A learnable n stays a plain parameter, whose gradient is whole in every process.

    Args:
        input_layouts: how hidden states come that are plain tensors: ``Replicate()``, the same in every process, or
            ``Shard(1)`` as sequence parallelism leaves them. Their gradient goes back the same way.
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        if not isinstance(self.input_layouts, (Replicate, Shard)):
            raise TypeError(f"input_layouts must be Replicate() or Shard(dim), got {validate.describe(input_layouts)}")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, HarmonicHead):
            raise TypeError(f"VocabularyParallel is for a HarmonicHead, got {type(module).__name__}")
        weight = distribute_tensor(module.weight.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=module.weight.requires_grad))

        def enter(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = dict(kwargs)
            if args:
                given["input"] = args[0]
            if "input" in given and not isinstance(given["input"], DTensor):
                given["input"] = DTensor.from_local(given["input"], device_mesh, [self.input_layouts], run_check=False)
            return ((given.pop("input"), *args[1:]) if args else args), given

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module
