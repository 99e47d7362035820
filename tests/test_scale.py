"""The formulas for layouts that no machine here has are those of what small runs exchange."""

from pathlib import Path

import ranks
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import harmonic_triton as ht
from benchmarks import scale

ROOT = Path(__file__).parents[1]


class Payloads(TorchDispatchMode):
    """Bytes of the largest tensor of every collective in the block, by its kind."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.found.append((str(func), max(t.numel() * t.element_size() for t in tensors)))
        return out

    def bytes(self, *kinds):
        return sum(size for name, size in self.found if any(kind in name for kind in kinds))


def check_vocabulary(rank, world):
    head = scale.Head(24, 16, 40, scale.BF16)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(head.tokens, head.width, generator=g).bfloat16().requires_grad_()
    w = torch.randn(head.classes // world, head.width, generator=g).bfloat16().requires_grad_()
    target = torch.randint(head.classes, (head.tokens,), generator=g)
    cost = scale.vocabulary_parallel(head, world)
    with Payloads() as forward:
        loss = ht.linear_harmonic_loss(x, w, target, n=6.0, process_group=dist.group.WORLD)
    with Payloads() as backward:
        loss.backward()
    assert forward.bytes("allreduce") == cost.forward
    assert 0 < forward.bytes("allgather") <= 8 * scale.FACTS * world
    assert sum(size for _, size in forward.found) == forward.bytes("allreduce", "allgather")
    assert [size for _, size in backward.found] == [cost.backward]


def check_gathered(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    head = scale.Head(24, 16, 40, scale.BF16)
    model = torch.nn.Sequential(ht.HarmonicHead(head.width, head.classes, n=6.0))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model[0], mesh=init_device_mesh("cpu", (world,)), mp_policy=policy, reshard_after_forward=True)
    cost = scale.gathered(head, world)
    target = torch.randint(head.classes, (head.tokens,))
    with Payloads() as forward:
        loss = model[0](torch.randn(head.tokens, head.width), target=target)
    with Payloads() as backward:
        loss.backward()
    assert forward.bytes("") == cost.forward, forward.found
    assert backward.bytes("") == cost.backward, backward.found


def test_vocabulary_parallel_bytes():
    ranks.all_well(2, check_vocabulary)


def test_gathered_bytes():
    ranks.all_well(2, check_gathered)


def test_the_page_has_the_tables():
    page = (ROOT / "docs" / "scale.md").read_text()
    for table in (scale.layouts(), scale.kernels()):
        assert "\n".join(table) in page
