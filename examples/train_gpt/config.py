"""Every option of a run, its presets, its checks and its command line."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

LOSSES = ("harmonic", "cross_entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPT2_TOKENS = 50257


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of Config with its help text."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """A run. Fields are command-line options of the same name; the defaults are those of the demo preset."""

    out: str = option("runs/demo", "directory of the run: data, checkpoints, report")
    loss: str = option("both", "which head to train; both trains them in turn", (*LOSSES, "both"))

    data: tuple[str, ...] = option(
        (),
        "text files, directories of text files, or one directory with train.bin and val.bin (uint16 tokens); "
        "by default the Python standard library's own sources",
    )
    tokenizer: str = option(
        "bpe", "bpe trains a vocabulary on the training text; gpt2 takes tiktoken's", ("bpe", "gpt2")
    )
    vocab_size: int = option(2048, "number of classes V (bpe: at most; small texts give fewer)")
    val_fraction: float = option(0.1, "share of the files kept for validation (of the text, if there is one file)")

    layers: int = option(4, "transformer blocks")
    heads: int = option(4, "attention heads")
    width: int = option(128, "width of the residual stream, D")
    block: int = option(128, "context length in tokens")
    dropout: float = option(0.0, "dropout probability")
    init_std: float | None = option(None, "standard deviation of the initial weights; by default 1/sqrt(width)")
    scale_attention_by_layer: bool = option(False, "divide attention scores of layer i (from 1) by i")

    n: float | None = option(28.0, "harmonic exponent on the distance; none takes sqrt(width)")
    harmonic_gain: float | None = option(
        None, "initial gain of the last norm with the harmonic loss; by default init_std, then |x| starts as |w|"
    )
    uniform_mix: float = option(0.0, "alpha of the GPT-2 loss of the authors, -log((p + alpha/V)/(1 + alpha))")

    steps: int = option(1200, "optimiser steps")
    batch_size: int = option(8, "sequences a step, over all processes and micro-batches")
    micro_batch_size: int = option(
        8, "sequences a process takes at once, the rest is accumulated; by default no more than its share of the batch"
    )
    lr_harmonic: float | None = option(None, "peak learning rate with the harmonic loss; by default 6e-4 * 768/width")
    lr_cross_entropy: float | None = option(None, "peak learning rate with cross-entropy; by default 6e-4 * 768/width")
    min_lr_ratio: float = option(0.05, "final over peak learning rate")
    warmup_harmonic: float = option(0.1, "share of the steps spent warming up with the harmonic loss")
    warmup_cross_entropy: float = option(0.2, "share of the steps spent warming up with cross-entropy")
    weight_decay: float = option(0.0, "AdamW weight decay of matrices")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    grad_clip: float = option(1.0, "largest gradient norm; 0 switches clipping off")
    dtype: str = option("float32", "autocast data type", tuple(DTYPES))
    seed: int = option(1337, "seed of the initial weights, the batches, dropout and the samples")

    eval_every: int = option(100, "steps between validations")
    eval_batches: int = option(16, "batches of batch_size sequences in a validation, always the same")
    checkpoint_every: int = option(100, "steps between checkpoints")
    prompt: str = option("def", "start of the generated text")
    samples: int = option(3, "texts to generate")
    sample_tokens: int = option(160, "tokens in each of them")
    temperature: float = option(0.8, "temperature T of the samples; for the harmonic head it means n -> n/T")
    measure_head: bool = option(True, "measure time and memory of the head for the report")

    fsdp: bool = option(
        False, "under torchrun: shard parameters, gradients and moments over the replicas (FSDP2), not DDP"
    )
    tensor_parallel: int = option(
        1, "under torchrun: processes that share a replica, its vocabulary and feed-forward layers split over them"
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:INDEX")
    threads: int | None = option(
        None, "CPU threads; by default OMP_NUM_THREADS, or the number that a few steps at the start find fastest"
    )
    compile: bool = option(False, "torch.compile the model")
    resume: bool = option(True, "go on from the checkpoint in --out; --no-resume starts over and replaces it")

    @property
    def losses(self) -> tuple[str, ...]:
        return LOSSES if self.loss == "both" else (self.loss,)

    @property
    def exponent(self) -> float:
        return math.sqrt(self.width) if self.n is None else self.n

    @property
    def initial_std(self) -> float:
        return self.width**-0.5 if self.init_std is None else self.init_std

    def initial_gain(self, loss: str) -> float:
        """Of the last norm. Distances tell little while ‖x‖ and ‖w‖ differ much; dot products do not mind."""
        if loss == "harmonic":
            return self.initial_std if self.harmonic_gain is None else self.harmonic_gain
        return 1.0

    def peak_lr(self, loss: str) -> float:
        """The paper's rate for cross-entropy at D = 768, scaled by 1/D; for both losses.

        The paper's ten times higher rate for the harmonic loss has to stretch class vectors a fiftieth as long as the
        hidden states. Where both start equally long (``initial_gain``) a higher rate does worse: see the README.
        """
        given = self.lr_harmonic if loss == "harmonic" else self.lr_cross_entropy
        return 6e-4 * 768 / self.width if given is None else given

    def warmup(self, loss: str) -> float:
        return self.warmup_harmonic if loss == "harmonic" else self.warmup_cross_entropy

    def lr(self, loss: str, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to ``min_lr_ratio`` of it."""
        peak = self.peak_lr(loss)
        warmup = round(self.steps * self.warmup(loss))
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return peak * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, DTYPES[self.dtype], enabled=self.dtype != "float32")

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on. The rest changes where a run is computed, or how it is watched."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def validate(self, world_size: int = 1) -> None:
        """Raise before any work on values that cannot serve, naming the option and the mend."""
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{flag(f.name)} is {value!r}: choose one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(f.name)} is {value}: give a finite number")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{flag(name)} is {value}: it must be at least {least}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{flag(name)} is {value}: it must be greater than 0")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: it must be in [0, 1)")
        if self.val_fraction == 0:
            raise ValueError("--val-fraction is 0: give validation a share, for example 0.1")
        if self.seed >= 2**31:
            raise ValueError(f"--seed is {self.seed}: it must be below {2**31}")
        if self.vocab_size > 2**16:
            raise ValueError(f"--vocab-size is {self.vocab_size}: tokens are stored as uint16, so at most 65536")
        if self.tokenizer == "bpe" and not is_binary(self.data) and self.vocab_size < 257:
            raise ValueError(f"--vocab-size is {self.vocab_size}: a byte-level BPE needs at least 257")
        if self.tokenizer == "gpt2" and not is_binary(self.data) and self.vocab_size < GPT2_TOKENS:
            raise ValueError(f"--vocab-size is {self.vocab_size}: GPT-2's vocabulary needs {GPT2_TOKENS} or more")
        if self.width % self.heads:
            near = self.heads * max(1, round(self.width / self.heads))
            raise ValueError(f"--width is {self.width}, not a multiple of --heads {self.heads}: try --width {near}")
        if world_size % self.tensor_parallel:
            raise ValueError(
                f"--tensor-parallel is {self.tensor_parallel}, which does not divide the {world_size} process(es) of this run"
            )
        replicas = world_size // self.tensor_parallel
        if self.tensor_parallel > 1 and replicas > 1 and not self.fsdp:
            raise ValueError(f"--tensor-parallel {self.tensor_parallel} with {replicas} replicas needs --fsdp")
        if self.tensor_parallel > 1 and self.loss != "harmonic":
            raise ValueError(
                f"--tensor-parallel is for the harmonic head, and --loss is {self.loss}: add --loss harmonic"
            )
        if world_size == 1 and self.fsdp:
            raise ValueError("--fsdp shards over several processes: start them by torchrun --nproc-per-node")
        if self.compile and (self.fsdp or self.tensor_parallel > 1):
            raise ValueError("--compile with --fsdp or --tensor-parallel is not served here: leave one out")
        together = self.micro_batch_size * replicas
        if self.batch_size % together:
            raise ValueError(
                f"--batch-size is {self.batch_size}, not a multiple of --micro-batch-size {self.micro_batch_size} "
                f"x {replicas} replica(s): try --batch-size {together * max(1, round(self.batch_size / together))}"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device is {self.device!r}: choose auto, cpu, cuda or cuda:INDEX")
        seen = torch.cuda.device_count()
        if self.device_type == "cuda" and int(self.device.partition(":")[2] or 0) >= seen:
            raise ValueError(f"--device is {self.device} but torch {torch.__version__} sees {seen} GPU(s): use cpu")
        if self.dtype == "float16" and self.device_type == "cpu":
            raise ValueError("--dtype float16 needs a GPU and its gradient scaler: use bfloat16 or float32 on a CPU")
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise ValueError(f"--out {self.out} is a file: name a directory")

    @property
    def device_type(self) -> str:
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device.split(":")[0]


_FREE = {
    *("out", "loss", "data", "micro_batch_size", "checkpoint_every", "prompt", "samples", "sample_tokens"),
    *("temperature", "measure_head", "fsdp", "tensor_parallel", "device", "threads", "compile", "resume"),
}  # data is compared by its content instead; micro-batches, device, compile and processes change rounding alone
_AT_LEAST = {
    **dict.fromkeys(("layers", "heads", "width", "block", "steps", "batch_size", "micro_batch_size", "threads"), 1),
    **dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every", "sample_tokens"), 1),
    **dict.fromkeys(("tensor_parallel",), 1),
    **dict.fromkeys(("vocab_size",), 2),
    **dict.fromkeys(("samples", "seed", "uniform_mix", "weight_decay", "grad_clip", "min_lr_ratio"), 0),
}
_POSITIVE = ("n", "init_std", "harmonic_gain", "lr_harmonic", "lr_cross_entropy", "temperature")
_FRACTIONS = ("val_fraction", "dropout", "warmup_harmonic", "warmup_cross_entropy", "beta1", "beta2")

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "quick": {"out": "runs/quick", "steps": 200, "eval_every": 25, "checkpoint_every": 50},
    "gpt2": {
        "out": "runs/gpt2",
        "tokenizer": "gpt2",
        "vocab_size": 50304,
        "layers": 12,
        "heads": 12,
        "width": 768,
        "block": 1024,
        "init_std": 0.0202,
        "harmonic_gain": 1.0,
        "scale_attention_by_layer": True,
        "uniform_mix": 0.01,
        "steps": 10_000,
        "batch_size": 480,
        "micro_batch_size": 12,
        "lr_harmonic": 6e-3,
        "dtype": "bfloat16",
        "eval_every": 250,
        "eval_batches": 1,
        "checkpoint_every": 250,
        "prompt": "\n",
        "sample_tokens": 256,
    },
}


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def is_binary(data: Sequence[str]) -> bool:
    """True for one directory in nanoGPT's form."""
    return len(data) == 1 and os.path.isfile(os.path.join(data[0], "train.bin"))


def number_or_none(text: str) -> float | None:
    """A number, or the word none for the default that the help names."""
    return None if text == "none" else float(text)


def parser() -> argparse.ArgumentParser:
    """The command line, one option a field."""
    out = argparse.ArgumentParser(
        prog="python -m examples.train_gpt",
        description="Train a GPT with the harmonic loss, with cross-entropy or with each in turn, and write a report.",
    )
    out.add_argument(
        "--preset",
        choices=PRESETS,
        default="demo",
        help="demo: minutes on two cores; quick: a sixth of its steps; gpt2: the paper's",
    )
    for f in fields(Config):
        values = {f"{name}: {over.get(f.name, f.default)}" for name, over in PRESETS.items()}
        shown = f"{f.metadata['help']} [{'; '.join(sorted(values))}]".replace("%", "%%")
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
        if isinstance(f.default, bool):
            out.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **common)
        elif isinstance(f.default, tuple):
            out.add_argument(flag(f.name), nargs="+", metavar="PATH", **common)
        else:
            kind = {"int": int, "int | None": int, "str": str, "float": float}.get(str(f.type), number_or_none)
            out.add_argument(flag(f.name), type=kind, choices=f.metadata["choices"], **common)
    return out


def from_arguments(arguments: Sequence[str] | None, world_size: int = 1) -> Config:
    """A preset with the given options over it."""
    given = vars(parser().parse_args(arguments))
    preset = Config(**PRESETS[given.pop("preset")])
    if "data" in given:
        given["data"] = tuple(given["data"])
    replicas = max(1, world_size // max(1, given.get("tensor_parallel", 1)))
    share = max(1, given.get("batch_size", preset.batch_size) // replicas)
    return replace(preset, **{"micro_batch_size": min(preset.micro_batch_size, share), **given})
