"""The training loop: one process or several under torchrun, checkpoints that resume to the same bits."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from harmonic_triton.tools import replacing

from . import pace, parallel
from .config import Config, flag, from_arguments
from .data import Corpus, load
from .model import GPT

CURVE_POINTS = 200  # weight norms in a run, and updates of the progress bar


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others."""

    rank: int  # among the replicas: those of a tensor-parallel group share their batch
    world: int  # replicas
    device: torch.device
    mesh: Any = None  # (replicas, tensor-parallel processes), where there are several processes

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.mesh is None or dist.get_rank() == 0

    @classmethod
    def join(cls, config: Config) -> Place:
        rank, world = int(os.environ.get("RANK", "0")), world_size()
        device = torch.device(config.device_type if config.device == "auto" else config.device)
        if world > 1:
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            mesh = parallel.mesh_of(device, config.tensor_parallel)
            return cls(mesh["data"].get_local_rank(), mesh["data"].size(), device, mesh)
        return cls(rank, world, device)

    def mean(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values, group=self.mesh["data"].get_group())
        return values / self.world


class Trainer:
    """One GPT with one loss: its model, optimiser and history, and how they are stored."""

    def __init__(self, config: Config, corpus: Corpus, place: Place, loss: str) -> None:
        self.config, self.corpus, self.place, self.loss = config, corpus, place, loss
        self.path = checkpoint_path(config, loss)
        torch.manual_seed(config.seed)
        self.model = GPT(config, corpus.vocab_size, loss).to(place.device)
        if place.mesh is not None:
            parallel.spread(self.model, place.mesh, config.fsdp)
        self.optimizer = self.model.optimizer(config)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.dtype == "float16")
        self.step = 0
        self.seconds = 0.0
        self.history: dict[str, list[Any]] = {"train": [], "val": [], "weight_norm": [], "grad_norm": []}
        if config.resume and self.path.exists():
            self.restore()

    def restore(self) -> None:
        state = torch.load(self.path, map_location=self.place.device, weights_only=True)
        parallel.load_full_state(self.model, self.optimizer, state)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]

    def save(self) -> None:
        """Write the checkpoint beside the old one, then put it in its place: a kill leaves one of the two."""
        model, optimizer = parallel.full_state(self.model, self.optimizer)
        if self.place.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            state = {
                "identity": identity(self.config, self.corpus),
                "model": model,
                "optimizer": optimizer,
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "threads": torch.get_num_threads(),
                "history": self.history,
            }
            with replacing(self.path) as file:
                torch.save(state, file)

    def train(self) -> None:
        config, place, history = self.config, self.place, self.history
        model: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        if place.world > 1 and not config.fsdp:
            model = DistributedDataParallel(model, process_group=place.mesh["data"].get_group())
        if not history["val"]:
            history["val"].append([0, evaluate(self.model, config, self.corpus, place)])
            history["weight_norm"].append([0, self.weight_norm()])
        bar = tqdm(
            desc=f"{self.loss:13}",
            total=config.steps,
            initial=self.step,
            unit="step",
            mininterval=1.0,
            disable=not place.first,
        )
        pending: list[tuple[Tensor, Tensor]] = []
        start = time.perf_counter()
        while self.step < config.steps:
            pending.append(self.update(model))
            self.step += 1
            shown, evaluated, saved = (
                self.step == config.steps or self.step % every == 0
                for every in (max(1, config.steps // CURVE_POINTS), config.eval_every, config.checkpoint_every)
            )
            if not (shown or evaluated or saved):
                continue
            steps = len(pending)
            self.flush(pending)
            elapsed = time.perf_counter() - start
            self.seconds += elapsed
            if shown:
                history["weight_norm"].append([self.step, self.weight_norm()])
            if evaluated:
                history["val"].append([self.step, evaluate(self.model, config, self.corpus, place)])
            speed = steps * config.batch_size * config.block / elapsed
            train, val = history["train"][-1], history["val"][-1][1]
            bar.set_postfix_str(f"loss {train:.3f}, val {val:.3f}, {speed / 1000:.1f}k tokens/s", refresh=False)
            bar.update(self.step - bar.n)
            if saved:
                self.save()
            start = time.perf_counter()
        bar.close()

    def update(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """One optimiser step; this process's mean loss and the gradient norm.

        Sums over micro-batches divided by the tokens of the whole step give the gradient of one big batch; DDP averages
        over the processes, hence the division by their number.
        """
        config, place = self.config, self.place
        if config.dropout:
            torch.manual_seed((config.seed << 32) + self.step * place.world + place.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr(self.loss, self.step)
        offsets = self.corpus.offsets("train", config, self.step)
        num_items = config.batch_size * config.block // place.world
        size = config.micro_batch_size
        mine = range(place.rank * size, config.batch_size, place.world * size)
        total = torch.zeros((), device=place.device)
        for at in mine:
            x, y = self.corpus.batch("train", config.block, offsets[at : at + size], place.device)
            parallel.sync_gradients(model, at == mine[-1])
            waits = isinstance(model, DistributedDataParallel) and at != mine[-1]
            with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with config.autocast(place.device):
                    loss = model(x, y, num_items)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = parallel.clip(self.model, config.grad_clip or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total, norm

    def flush(self, pending: list[tuple[Tensor, Tensor]]) -> None:
        """Bring the losses and gradient norms of the last steps over from the device."""
        losses, norms = (torch.stack(column) for column in zip(*pending, strict=True))
        self.history["train"] += self.place.mean(losses).tolist()
        self.history["grad_norm"] += norms.tolist()
        pending.clear()
        last = self.history["train"][-1]
        if not math.isfinite(last):
            lr = flag("lr_" + self.loss)
            raise FloatingPointError(f"the {self.loss} loss is {last} at step {self.step}: try a smaller {lr}")

    def weight_norm(self) -> float:
        """Mean norm of the class vectors."""
        norms = self.model.tokens.weight.detach().norm(dim=1)
        return (norms.full_tensor() if isinstance(norms, DTensor) else norms).mean().item()


@torch.no_grad()
def evaluate(model: GPT, config: Config, corpus: Corpus, place: Place) -> float:
    """Mean loss over the same validation sequences every time, shared among the processes."""
    model.eval()
    offsets = corpus.offsets("val", config, 0)
    size = config.micro_batch_size
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for at in range(place.rank * size, len(offsets), place.world * size):
        x, y = corpus.batch("val", config.block, offsets[at : at + size], place.device)
        with config.autocast(place.device):
            total += model(x, y, num_items=1).double()
    model.train()
    return place.mean(total).item() * place.world / (len(offsets) * config.block)


def checkpoint_path(config: Config, loss: str) -> Path:
    return Path(config.out) / loss / "checkpoint.pt"


def identity(config: Config, corpus: Corpus) -> dict[str, Any]:
    """What two runs share if one can go on from the other's checkpoint."""
    return {**config.identity(), "data": corpus.fingerprint}


def check_checkpoints(config: Config, corpus: Corpus) -> None:
    """Raise if a checkpoint in the run's directory belongs to another configuration."""
    for loss in config.losses if config.resume else ():
        path = checkpoint_path(config, loss)
        if path.exists():
            try:
                old = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["identity"]
            except Exception as error:  # cut short, or not a checkpoint: torch.load has no one error for that
                raise ValueError(
                    f"{path} cannot be read as a checkpoint ({type(error).__name__}): remove it or choose another --out"
                ) from error
            new = identity(config, corpus)
            differences = [
                f"{flag(key)} was {old.get(key)}, is {new.get(key)}"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
            if differences:
                raise ValueError(
                    f"{path} belongs to another configuration: {'; '.join(differences)}. "
                    "Repeat the former options, choose another --out, or start over with --no-resume"
                )


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare(config: Config) -> tuple[Corpus, Place]:
    """Every check, the process group and the corpus, which process 0 tokenises before the others read it."""
    config.validate(world_size())
    place = Place.join(config)
    failure: list[str | None] = [None]
    if place.first:
        try:
            corpus = load(config)
            check_checkpoints(config, corpus)
        except (ValueError, OSError) as error:
            failure = [str(error)]
    if place.mesh is not None:
        dist.broadcast_object_list(failure, device=place.device)
    if failure[0] is not None:
        raise ValueError(failure[0])
    return corpus if place.first else load(config), place


def run(config: Config) -> int:
    """Train, then write the report; the exit status."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        corpus, place = prepare(config)
        if first:
            counts = f"{len(corpus.train):,} training and {len(corpus.val):,} validation tokens"
            print(f"{corpus.description}; {counts}, V = {corpus.vocab_size}", flush=True)
    except (ValueError, OSError) as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        steps = pace.steps_left(config)
        if steps and not (config.fsdp or config.tensor_parallel > 1):  # a whole model may not fit there
            found = pace.measure(config, corpus, place)
            if first:
                print(pace.announcement(config, found, steps), flush=True)
        for loss in config.losses:
            Trainer(config, corpus, place, loss).train()
    except FloatingPointError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if place.mesh is not None:
            dist.destroy_process_group()
    if first:
        from .report import write_report

        print(f"report: {write_report(config, corpus, place.device)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 2 nothing could begin, 1 the loss is not finite, 130 interrupted."""
    config = from_arguments(arguments, world_size())
    try:
        return run(config)
    except KeyboardInterrupt:
        print("\nstopped; run again, without --no-resume, to go on from the last checkpoint", file=sys.stderr)
        return 130
