"""The GPT that ``examples/train_gpt`` leaves, as an entry point of ``python -m harmonic_triton loss-kernel``.

python -m harmonic_triton loss-kernel examples.loss_kernel.gpt:from_checkpoint --entry-arg run=runs/demo
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harmonic_triton as ht
from examples.train_gpt.config import LOSSES, Config, is_binary
from examples.train_gpt.data import SEPARATOR, Corpus, Vocabulary, load, read, split_files, text_files
from examples.train_gpt.model import GPT
from harmonic_triton.losskernel import per_sample_cross_entropy

CONTEXT = 6  # tokens shown before a token


class TokenLosses(nn.Module):
    """A GPT whose ``forward(windows)`` gives the loss of every next token: (b, block + 1) ids to (b, block)."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, windows: Tensor) -> Tensor:
        gpt, targets = self.gpt, windows[:, 1:]
        x = gpt.hidden(windows[:, :-1])
        if gpt.loss == "harmonic":
            return ht.linear_harmonic_loss(  # type: ignore[return-value]
                x, gpt.tokens.weight, targets, n=gpt.n, uniform_mix=gpt.uniform_mix, reduction="none"
            )
        losses = per_sample_cross_entropy(F.linear(x, gpt.tokens.weight), targets)
        if gpt.uniform_mix:
            alpha = gpt.uniform_mix
            losses = -torch.log(((-losses).exp() + alpha / len(gpt.tokens.weight)) / (1 + alpha))
        return losses


def token_losses(model: TokenLosses, windows: Tensor) -> Tensor:
    """(b, block): one sample a token."""
    return model(windows)


def window_losses(model: TokenLosses, windows: Tensor) -> Tensor:
    """(b,): one sample a window, the mean of its tokens."""
    return model(windows).mean(1)


def from_checkpoint(
    run: str = "runs/demo",
    loss: str = "harmonic",
    per: str = "token",
    split: str = "val",
    tokens: str = "20000",
    data: str = "",
) -> dict[str, Any]:
    """Model, losses, data and names for the loss kernel of a run of ``examples/train_gpt``.

    Args (strings, as the command line gives them):
        run: the run's folder. loss: "harmonic" or "cross_entropy", which of its checkpoints.
        per: "token", each token's loss is a sample; "window", each window's mean.
        split: "val" or "train", whose tokens are the samples; gradients always come from the training split.
        tokens: how many, in windows of the model's context length spread evenly over the split.
        data: the text files or folders the run was trained on, separated by commas, where they are not the standard
            library: to name files. A folder with train.bin and val.bin also holds the tokens.

    Returns:
        model, per_sample_loss, train_data, eval_data, labels (a token's own id; None for windows), names, groups (which
        file) and group_names.

    Raises:
        ValueError, FileNotFoundError: an argument cannot serve; the message says what would.
    """
    for name, value, choices in (
        ("loss", loss, LOSSES),
        ("per", per, ("token", "window")),
        ("split", split, ("val", "train")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
    count = int(tokens) if tokens.isdigit() else 0
    if count < 1:
        raise ValueError(f"tokens={tokens!r}: give a number of tokens, for example 20000")
    path = Path(run) / loss / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"run={run}: no {path}; train one with python -m examples.train_gpt --out {run}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        identity, weights = dict(state["identity"]), state["model"]
    except Exception as error:  # cut short, or not a checkpoint: torch.load has no one error for that
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): train again with"
            f" python -m examples.train_gpt --out {run} --no-resume"
        ) from error
    corpus, config = open_corpus(run, identity.pop("data"), identity, data)
    gpt = GPT(config, corpus.vocab_size, loss)
    gpt.load_state_dict(weights)
    block = config.block
    ids = corpus.train if split == "train" else corpus.val
    starts = window_starts(len(ids), block, -(-count // block))
    windows = torch.from_numpy(np.stack([ids[at : at + block + 1] for at in starts]).astype(np.int64))
    documents, names = document_names(corpus, config, split, tuple(filter(None, data.split(","))))
    if per == "token":
        positions = (starts[:, None] + np.arange(1, block + 1)).ravel()
        titles = [names[i] for i in documents[positions]]
        shown = [
            f"{title}: {context(corpus.vocabulary, ids, int(at))}" for title, at in zip(titles, positions, strict=True)
        ]
        groups, labels = documents[positions], windows[:, 1:].flatten()
    else:
        groups, labels = documents[starts + block // 2], None
        shown = [
            f"{names[file]}: {visible(corpus.vocabulary.decode(ids[at : at + 16].tolist()))}…"
            for file, at in zip(groups, starts, strict=True)
        ]
    return {
        "model": TokenLosses(gpt).eval(),
        "per_sample_loss": token_losses if per == "token" else window_losses,
        "train_data": all_windows(corpus.train, block),
        "eval_data": windows,
        "labels": labels,
        "names": shown,
        "groups": torch.from_numpy(groups.astype(np.int64)),
        "group_names": names,
    }


def open_corpus(run: str, fingerprint: str, identity: dict[str, Any], data: str) -> tuple[Corpus, Config]:
    """The run's own tokens, under its folder or in ``data``."""
    own = Path(run) / "data" / fingerprint
    place = str(own) if own.is_dir() else data
    if not is_binary((place,)):
        raise ValueError(
            f"run={run}: its tokens are not in {own}; give the folder with train.bin and val.bin it was trained on as data="
        )
    config = Config(**identity, out=run, data=(place,), device="cpu")
    corpus = load(config)
    if not own.is_dir() and corpus.fingerprint != fingerprint:
        raise ValueError(
            f"data={data} is not what run={run} was trained on: its fingerprint is {corpus.fingerprint}, not {fingerprint}"
        )
    return corpus, config


def window_starts(length: int, block: int, count: int) -> np.ndarray:
    """(count,) starts of windows of block + 1 tokens that do not overlap in their targets, spread evenly."""
    available = (length - 1) // block
    if count > available:
        raise ValueError(
            f"tokens: the split has {available * block} in windows of {block}, {count * block} were asked for"
        )
    return (np.arange(count) * available // count) * block


def all_windows(ids: np.ndarray, block: int) -> Tensor:
    """(n, block + 1) int64 windows of the training tokens, one after the other."""
    count = (len(ids) - 1) // block
    rows = torch.from_numpy(ids[: count * block + 1].astype(np.int64))
    return rows.unfold(0, block + 1, block)


def document_names(corpus: Corpus, config: Config, split: str, data: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """For every token of a split its document, and the documents' file names where the files are still there.

    Documents end with the separator token. A file's name is taken only if its text is the document's.
    """
    ids = corpus.train if split == "train" else corpus.val
    separator = corpus.vocabulary.encode(SEPARATOR)
    if len(separator) != 1:
        return np.zeros(len(ids), np.int64), [f"{split}.bin"]
    ends = np.flatnonzero(ids == separator[0])
    documents = np.searchsorted(ends, np.arange(len(ids)))
    names = [f"document {i}" for i in range(int(documents[-1]) + 1)]
    paths: dict[Path, str] = {}
    if not is_binary(data):
        try:
            paths = {path: name for name, path in text_files(data)}
        except (FileNotFoundError, ValueError):
            return documents, names
    files = (
        split_files([(name, path) for path, name in paths.items()], config.val_fraction)[split]
        if len(paths) > 1
        else []
    )
    if len(files) == len(ends):
        for i, path in enumerate(files):
            text = corpus.vocabulary.decode(ids[ends[i - 1] + 1 if i else 0 : ends[i]].tolist())
            if text == read(path):
                names[i] = paths[path]
    return documents, names


def visible(text: str) -> str:
    """Text on one line."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def context(vocabulary: Vocabulary, ids: np.ndarray, at: int) -> str:
    """A token between ⟦ ⟧ after those before it."""
    before = vocabulary.decode(ids[max(0, at - CONTEXT) : at].tolist())
    return f"{visible(before)}⟦{visible(vocabulary.decode([int(ids[at])]))}⟧"
