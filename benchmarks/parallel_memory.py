"""Peak memory of a head whose vocabulary is that of Llama 3, over several processes, for each way to do it.

    python -m benchmarks.parallel_memory                      # 4 processes, V = 128256: minutes
    python -m benchmarks.parallel_memory --tokens 256 --classes 8000    # seconds

Real processes over gloo. Each figure is the largest of the processes' peaks during forward and backward, beyond what a process
holds before the call: its hidden states and its part of the weight. So gradients and what is gathered count.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel

import harmonic_triton as ht
from benchmarks.machine import describe
from benchmarks.runs import RESULTS, name_of
from harmonic_triton.tools.memory import Peak

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def gathered_cross_entropy(x: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """The whole weight and all logits in every process."""
    return F.cross_entropy(x @ _whole(rows).T, target)


def gathered_harmonic(x: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """The whole weight in every process, no logits."""
    loss: Tensor = ht.linear_harmonic_loss(x, _whole(rows), target)
    return loss


def parallel_logits(x: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """PyTorch's loss_parallel: logits split over the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
    logits = DTensor.from_local(x, mesh, [Replicate()], run_check=False) @ weight.T
    with loss_parallel():
        loss = F.cross_entropy(logits, target)
        loss.backward()
    return loss.detach()


def vocabulary_harmonic(x: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """The harmonic loss with process_group."""
    loss: Tensor = ht.linear_harmonic_loss(x, rows, target, process_group=dist.group.WORLD)
    return loss


def vocabulary_cross_entropy(x: Tensor, rows: Tensor, target: Tensor) -> Tensor:
    """The ordinary loss with process_group."""
    loss: Tensor = ht.linear_cross_entropy(x, rows, target, process_group=dist.group.WORLD)
    return loss


WAYS: dict[str, Call] = {
    "whole weight, dense cross-entropy": gathered_cross_entropy,
    "whole weight, `ht.linear_harmonic_loss`": gathered_harmonic,
    "split weight, split logits (`loss_parallel`)": parallel_logits,
    "split weight, `ht.linear_cross_entropy(process_group=)`": vocabulary_cross_entropy,
    "split weight, `ht.linear_harmonic_loss(process_group=)`": vocabulary_harmonic,
}


def _whole(rows: Tensor) -> Tensor:
    """All rows, gathered; the gradient goes back to where they came from."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
    out: Tensor = weight.redistribute(mesh, [Replicate()]).to_local()
    return out


def measure(rank: int, world: int, way: str, sizes: tuple[int, int, int], folder: str) -> None:
    """One way in one process; bytes and seconds go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    tokens, width, classes = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).mul_(0.02).requires_grad_()
    target = torch.randint(classes, (tokens,), generator=generator)
    rows = torch.randn(classes // world, width, generator=generator.manual_seed(1 + rank)).mul_(0.02).requires_grad_()
    for warm in (True, False):  # libraries and sockets are up before memory is counted
        few = 8 if warm else tokens
        part = rows[:16].detach().requires_grad_() if warm else rows
        peak, start = Peak(), time.perf_counter()
        loss = WAYS[way](x[:few].detach().requires_grad_(), part, target[:few] % (len(part) * world))
        if loss.requires_grad:
            loss.backward()
        found, seconds = peak.beyond(), time.perf_counter() - start
        dist.barrier()
    Path(f"{folder}/{rank}.json").write_text(json.dumps([found, seconds, loss.item()]))
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way and print a table; a file under benchmarks/results unless --no-save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_memory", description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=128256)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args(arguments)
    world, sizes = given.processes, (given.tokens, given.width, given.classes - given.classes % given.processes)
    lines = [f"N = {sizes[0]}, D = {sizes[1]}, V = {sizes[2]}, fp32, {world} processes, one thread each.", ""]
    lines += ["| | peak of a process | time, all at once | loss |", "|---|---|---|---|"]
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(measure, (world, way, sizes, folder), nprocs=world, start_method="spawn")
            found = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(world)]
        peak, seconds = max(f[0] for f in found), max(f[1] for f in found)
        lines.append(f"| {way} | {peak / 1e6:.0f} MB | {seconds:.1f} s | {found[0][2]:.4f} |")
        print(lines[-1], flush=True)
    if given.save:
        machine, stamp = describe("cpu"), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        shown = [f"- {key}: {value}" for key, value in machine.items() if isinstance(value, (str, int, float))]
        path = RESULTS / f"{name_of('parallel', 'cpu', 'memory', stamp)}.md"
        text = "\n".join(
            ["# Peak memory of a split head", "", (__doc__ or "").split("\n\n")[2].strip(), "", *lines, "", *shown]
        )
        path.write_text(text + "\n")
        print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
