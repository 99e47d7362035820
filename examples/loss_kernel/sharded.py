"""The loss kernel of a model whose weights FSDP2 has spread over processes.

    torchrun --nproc-per-node 4 -m examples.loss_kernel.sharded --out runs/sharded
    torchrun --nproc-per-node 4 -m examples.loss_kernel.sharded --out runs/sharded --chain-groups 2

Stopped at any moment, it goes on with any number of processes (and the same number of groups), and on a CPU it ends with the
same bits as one process: the last line that it prints is a hash of the kernel.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from harmonic_triton import SGLDConfig, loss_kernel
from harmonic_triton.losskernel import classification_loss
from harmonic_triton.losskernel.kernel import LossKernel

from .arithmetic import Transformer, all_pairs, split, train


def main(arguments: Sequence[str] | None = None) -> LossKernel:
    """Train a small transformer, shard it, and compute its kernel on the processes that torchrun started."""
    parser = argparse.ArgumentParser(prog="torchrun -m examples.loss_kernel.sharded", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sharded"), help="checkpoints, and kernel.safetensors")
    parser.add_argument(
        "--chain-groups", type=int, default=1, help="groups of processes, each with a model and chains of its own"
    )
    parser.add_argument("--modulus", type=int, default=23)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=50)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    shape = (options.chain_groups, dist.get_world_size() // options.chain_groups)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("chains", "shards"))

    # every process trains the same small model here; a large one is loaded into its shards (set_model_state_dict)
    pairs = all_pairs(options.modulus)
    chosen, _ = split(pairs, 0.8, seed=0)
    inputs, results = pairs.inputs[chosen].to(device), pairs.results[chosen].to(device)
    torch.manual_seed(0)
    model = Transformer(options.modulus, options.width).to(device)
    train(model, inputs, results, steps=options.steps, lr=1e-3, weight_decay=1.0, batch_size=256)

    for block in model.blocks:
        fully_shard(block, mesh=mesh["shards"])
    fully_shard(model, mesh=mesh["shards"])

    data = inputs, results
    config = SGLDConfig(
        lr=1e-6, nbeta=100.0, localization=1e4, batch_size=min(128, len(results)), num_chains=options.chains, num_draws=options.draws,
        num_burnin_steps=20,
    )  # fmt: skip
    some = inputs[:200], results[:200]
    kernel = loss_kernel(
        model, classification_loss, data, some, config, seed=0, keep="covariance", checkpoint_dir=options.out
    )
    if dist.get_rank() == 0:
        kernel.save(options.out / "kernel.safetensors")
        print(kernel)
        print(hashlib.blake2b(kernel.covariance.cpu().numpy().tobytes(), digest_size=8).hexdigest())
    dist.destroy_process_group()
    return kernel


if __name__ == "__main__":
    main()
