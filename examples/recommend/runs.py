"""One run: a small model, one loss, its settings, and the losses on held-out text that it reached."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from examples.train_gpt import data
from examples.train_gpt.config import Config
from examples.train_gpt.model import GPT
from examples.train_gpt.train import Place, evaluate

BLOCK, BATCH, HEADS = 64, 12, 4  # those of nanoGPT's run for one CPU
STD = 0.02  # of the initial weights of GPT-2, nanoGPT and the models of transformers
BPE_SIZE = 2048  # classes of the llama runs
EVALUATIONS, EVALUATION_BATCHES = 4, 24


@dataclass(frozen=True)
class Run:
    """What one run is.

    ``model`` is gpt (nanoGPT's shape, characters, tied), llama (of transformers, a BPE vocabulary, untied) or nanogpt
    (karpathy's own files, with the README's change where the loss is harmonic: see nanogpt.py).
    """

    model: str
    loss: str
    lr: float
    seed: int
    n: float = 0.0  # of the harmonic loss
    ratio: float = 0.0  # initial size of hidden states over that of class vectors, with the harmonic loss
    width: int = 128
    steps: int = 400
    layers: int = 4

    def config(self, root: Path) -> Config:
        """The same as options of examples.train_gpt."""
        binary = self.model == "gpt"
        return Config(
            out=str(root / "bpe"),
            data=(str(characters(root)),) if binary else (),
            vocab_size=vocabulary_size(root) if binary else BPE_SIZE,
            layers=self.layers,
            heads=HEADS,
            width=self.width,
            block=BLOCK,
            init_std=STD,
            n=self.n or None,
            harmonic_gain=self.ratio * STD if self.ratio else None,
            steps=self.steps,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            lr_harmonic=self.lr,
            lr_cross_entropy=self.lr,
            min_lr_ratio=0.1,
            warmup_harmonic=0.1,
            warmup_cross_entropy=0.1,
            weight_decay=0.1,
            beta2=0.99,
            seed=self.seed,
            eval_batches=EVALUATION_BATCHES,
            device="cpu",
        )


def characters(root: Path) -> Path:
    """Python's standard library as nanoGPT's data/<dataset>: characters beyond ASCII are left out."""
    folder = root / "characters"
    if not (folder / "val.bin").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            split: "\n".join(data.read(path) for path in paths).encode("ascii", "ignore")
            for split, paths in data.split_files(data.text_files(()), 0.1).items()
        }
        codes = np.array(sorted(set(texts["train"]) | set(texts["val"])), dtype=np.uint8)
        np.save(folder / "codes.npy", codes)
        for split in ("train", "val"):
            ids = np.searchsorted(codes, np.frombuffer(texts[split], dtype=np.uint8))
            ids.astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


def vocabulary_size(root: Path) -> int:
    return len(np.load(characters(root) / "codes.npy"))


class Llama(nn.Module):
    """A small Llama of ``transformers``, with the interface of examples.train_gpt's GPT."""

    def __init__(self, run: Run, vocab_size: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        from harmonic_triton.integrations.transformers import apply_harmonic_loss

        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=run.width,
            intermediate_size=run.width * 8 // 3 // 8 * 8,
            num_hidden_layers=run.layers,
            num_attention_heads=HEADS,
            max_position_embeddings=BLOCK,
            initializer_range=STD,
        )
        self.model = LlamaForCausalLM(config)
        if run.loss == "harmonic":
            apply_harmonic_loss(self.model, n=run.n)
            nn.init.constant_(self.model.model.norm.weight, run.ratio * STD)

    def forward(self, ids: Tensor, targets: Tensor, num_items: int | None = None) -> Tensor:
        out = self.model(
            input_ids=ids, labels=targets, shift_labels=targets, num_items_in_batch=num_items or targets.numel()
        )
        return cast(Tensor, out.loss)


def build(run: Run, config: Config, vocab_size: int) -> nn.Module:
    torch.manual_seed(run.seed)
    return GPT(config, vocab_size, run.loss) if run.model == "gpt" else Llama(run, vocab_size)


def train(run: Run, root: Path) -> dict[str, Any]:
    """The record of a run: its settings, the losses by step, and the gradient norms before clipping."""
    config = run.config(root)
    corpus = data.load(config)
    place = Place(0, 1, torch.device("cpu"))
    model: Any = build(run, config, corpus.vocab_size)
    optimizer = GPT.optimizer(model, config)
    every = run.steps // EVALUATIONS
    curve: list[list[float]] = []
    losses: list[float] = []
    norms: list[float] = []
    start = time.perf_counter()
    for step in range(run.steps):
        if step % every == 0:
            curve.append([step, evaluate(model, config, corpus, place)])
        for group in optimizer.param_groups:
            group["lr"] = config.lr(run.loss, step)
        x, y = corpus.batch("train", BLOCK, corpus.offsets("train", config, step), place.device)
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
    curve.append([run.steps, evaluate(model, config, corpus, place)])
    return {
        **asdict(run),
        "vocab_size": corpus.vocab_size,
        "val": curve,
        "train": [round(float(np.mean(losses[i : i + 20])), 4) for i in range(0, run.steps, 20)],
        "grad_norm": [round(float(np.median(norms[i : i + 20])), 4) for i in range(0, run.steps, 20)],
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
    }
