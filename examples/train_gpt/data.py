"""Text to tokens: files, a vocabulary, uint16 tokens on disk, batches that depend on nothing but (seed, step)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from harmonic_triton.tools import replacing, write_text

from .config import GPT2_TOKENS, Config, is_binary

SEPARATOR = "<|endoftext|>"
ENCODE_AT_ONCE = 2**24  # characters
LONGEST_WORD = 512  # bytes: merging the pairs of a word takes time quadratic in its length

# Left out of the default corpus: installed packages, tests, and files that are tables rather than code.
STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "pydoc_data", "encodings"),
}


class Vocabulary(Protocol):
    """What the samples and the report need of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class BPE:
    """A vocabulary of the ``tokenizers`` library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class GPT2:
    """GPT-2's vocabulary from ``tiktoken``."""

    def __init__(self) -> None:
        try:
            import tiktoken

            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # no module, no cached vocabulary and no network, a proxy's refusal...
            raise ValueError(
                f"--tokenizer gpt2: tiktoken cannot give GPT-2's vocabulary here ({type(error).__name__}: {error}). "
                "Install tiktoken and let it cache the vocabulary once, use --tokenizer bpe, "
                "or point --data to a directory with nanoGPT's train.bin and val.bin"
            ) from error

    def encode(self, text: str) -> list[int]:
        return list(self.encoding.encode(text, allowed_special={SEPARATOR}))

    def decode(self, ids: Sequence[int]) -> str:
        # ids above 50256 pad the model's vocabulary and stand for nothing
        return str(self.encoding.decode([i for i in ids if i < self.encoding.n_vocab]))


class TokenIds:
    """Stands in where train.bin comes without its vocabulary: tokens are shown as numbers."""

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


@dataclass(frozen=True)
class Corpus:
    """Tokens of both splits, the vocabulary and where they came from."""

    train: np.ndarray  # uint16, memory-mapped
    val: np.ndarray
    vocabulary: Vocabulary
    vocab_size: int
    description: str
    fingerprint: str

    def batch(self, split: str, block: int, offsets: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and their next tokens, each (len(offsets), block)."""
        tokens = self.train if split == "train" else self.val
        rows = np.stack([tokens[o : o + block + 1] for o in offsets]).astype(np.int64)
        check_range(rows, self.vocab_size, split)
        both = torch.from_numpy(rows)
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def offsets(self, split: str, config: Config, step: int) -> np.ndarray:
        """Where the sequences of a step start: the whole step's, of which each process takes its own."""
        tokens, batches = (self.train, 1) if split == "train" else (self.val, config.eval_batches)
        rng = np.random.default_rng([config.seed, step, split == "val"])
        return rng.integers(0, len(tokens) - config.block, size=batches * config.batch_size)


def check_range(tokens: np.ndarray, vocab_size: int, split: str) -> None:
    """Raise on a token that has no class vector."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"the {split} data hold token {int(tokens.max())}, beyond --vocab-size {vocab_size}: "
            f"give at least --vocab-size {int(tokens.max()) + 1}"
        )


def stdlib_files() -> list[Path]:
    """The Python standard library's sources, without what STDLIB_EXCLUDED names."""
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not STDLIB_EXCLUDED & set(p.relative_to(root).parts)]


def text_files(data: Sequence[str]) -> list[tuple[str, Path]]:
    """Every file under ``data`` as (name, path), in a fixed order, hidden files left out."""
    if not data:
        root = Path(sysconfig.get_path("stdlib"))
        return [(p.relative_to(root).as_posix(), p) for p in stdlib_files()]
    found = []
    for entry in map(Path, data):
        if entry.is_file():
            found.append((entry.name, entry))
        elif entry.is_dir():
            inside = [(p.relative_to(entry), p) for p in sorted(entry.rglob("*")) if p.is_file()]
            found += [(r.as_posix(), p) for r, p in inside if not any(part.startswith(".") for part in r.parts)]
        else:
            raise FileNotFoundError(f"--data {entry}: no such file or directory")
    if not found:
        raise ValueError(f"--data {' '.join(data)}: no files in it; name text files or a directory that holds some")
    return found


def read(path: Path) -> str:
    """The text of a file; bytes that are not UTF-8 become the replacement character, binary files are refused."""
    raw = path.read_bytes()
    if b"\0" in raw[:8192]:
        raise ValueError(f"--data: {path} is not text (it holds zero bytes); leave it out")
    return raw.decode("utf-8", errors="replace")


def split_files(files: list[tuple[str, Path]], fraction: float) -> dict[str, list[Path]]:
    """Validation takes the files whose names hash lowest, so a file added moves few others."""
    by_hash = sorted(files, key=lambda file: (hashlib.sha256(file[0].encode()).digest(), file[1]))
    count = min(max(1, round(fraction * len(files))), len(files) - 1)
    held = {path for _, path in by_hash[:count]}
    return {
        "train": [path for _, path in files if path not in held],
        "val": [path for _, path in files if path in held],
    }


def split_texts(files: list[tuple[str, Path]], fraction: float, split: str) -> Iterator[str]:
    """The texts of one split: by file, or the end of the text where there is one file."""
    if len(files) > 1:
        yield from (read(path) for path in split_files(files, fraction)[split])
    else:
        text = read(files[0][1])
        cut = int(len(text) * (1 - fraction))
        yield text[:cut] if split == "train" else text[cut:]


def load(config: Config) -> Corpus:
    """The corpus of a run, tokenised on first use into ``<out>/data``. Call on one process before the others."""
    corpus = load_binary(config) if is_binary(config.data) else load_text(config)
    for split, tokens in (("train", corpus.train), ("val", corpus.val)):
        if len(tokens) <= config.block:
            raise ValueError(
                f"the {split} data have {len(tokens)} tokens, --block {config.block} needs {config.block + 1}: "
                "give more text or a shorter --block"
            )
        check_range(tokens[: 2**24], corpus.vocab_size, split)
    return corpus


def load_binary(config: Config) -> Corpus:
    """nanoGPT's train.bin and val.bin; tokenizer.json beside them, or GPT-2's vocabulary, makes tokens readable."""
    root = Path(config.data[0])
    if not (root / "val.bin").is_file():
        raise FileNotFoundError(f"--data {root}: train.bin is there but val.bin is not")
    digest = hashlib.sha256()
    splits = {}
    for split in ("train", "val"):
        path = root / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"--data: {path} has {size} bytes; uint16 tokens need an even number above 0")
        splits[split] = np.memmap(path, dtype=np.uint16, mode="r")
        ends = splits[split][: 2**20].tobytes() + splits[split][-(2**20) :].tobytes()
        digest.update(f"{split} {size} ".encode() + ends)
    vocabulary: Vocabulary = TokenIds()
    if (root / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(root / "tokenizer.json", "replace it, or remove it to show tokens as numbers")
        if tokenizer.get_vocab_size() > config.vocab_size:
            needed = f"{root / 'tokenizer.json'} has {tokenizer.get_vocab_size()} tokens"
            raise ValueError(f"--vocab-size is {config.vocab_size} but {needed}: give at least as many")
        vocabulary = BPE(tokenizer)
    elif config.tokenizer == "gpt2" and config.vocab_size >= GPT2_TOKENS:
        with contextlib.suppress(ValueError):  # training needs no vocabulary; samples then show token numbers
            vocabulary = GPT2()
    text = f"{root.name}: train.bin, val.bin"
    return Corpus(splits["train"], splits["val"], vocabulary, config.vocab_size, text, digest.hexdigest()[:16])


def load_text(config: Config) -> Corpus:
    """Text files through a BPE trained on the training split, or through GPT-2's vocabulary."""
    files = text_files(config.data)
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    how = [config.tokenizer, config.vocab_size, config.val_fraction]
    digest.update(json.dumps([*how, tokenizers.__version__ if config.tokenizer == "bpe" else ""]).encode())
    fingerprint = digest.hexdigest()[:16]
    root = Path(config.out) / "data" / fingerprint
    gpt2 = GPT2() if config.tokenizer == "gpt2" else None
    if not (root / "meta.json").is_file():  # written last
        root.mkdir(parents=True, exist_ok=True)
        tokenize(config, files, root, gpt2)
    mend = f"remove {root} to have the text tokenised again"
    try:
        meta = json.loads((root / "meta.json").read_text())
        vocab_size, size = int(meta["vocab_size"]), int(meta["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / 'meta.json'} is damaged ({type(error).__name__}: {error}): {mend}") from error
    vocabulary = gpt2 or BPE(read_tokenizer(root / "tokenizer.json", mend))
    for split in ("train", "val"):
        path = root / f"{split}.bin"
        if not path.is_file() or path.stat().st_size == 0 or path.stat().st_size % 2:
            raise ValueError(f"{path} is missing or cut short: {mend}")
    splits = [np.memmap(root / f"{split}.bin", dtype=np.uint16, mode="r") for split in ("train", "val")]
    source = "Python standard library" if not config.data else ", ".join(Path(d).name for d in config.data)
    text = f"{source}: {len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:.1f} MB"
    return Corpus(splits[0], splits[1], vocabulary, vocab_size, text, fingerprint)


def read_tokenizer(path: Path, mend: str) -> Tokenizer:
    """A vocabulary of the ``tokenizers`` library.

    Raises:
        ValueError: the file holds none; ``mend`` says what to do.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path} cannot be read as a tokenizer ({error}): {mend}") from error


def tokenize(config: Config, files: list[tuple[str, Path]], root: Path, gpt2: GPT2 | None) -> None:
    """Train the vocabulary where there is none and write train.bin, val.bin, tokenizer.json and meta.json."""
    if gpt2 is None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated"),  # what is longer comes in pieces
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(split_texts(files, config.val_fraction, "train"), trainer)
        write_text(root / "tokenizer.json", bpe.to_str())
        size, separator = bpe.get_vocab_size(), bpe.token_to_id(SEPARATOR)
    else:
        size, separator = config.vocab_size, gpt2.encoding.eot_token
    for split in ("train", "val"):
        with replacing(root / f"{split}.bin") as file:
            for texts in groups(split_texts(files, config.val_fraction, split)):
                if gpt2 is None:
                    encoded = [e.ids for e in bpe.encode_batch(texts, add_special_tokens=False)]
                else:
                    encoded = gpt2.encoding.encode_ordinary_batch(texts)
                for ids in encoded:
                    file.write(np.array([*ids, separator], dtype=np.uint16).tobytes())
    meta = {"vocab_size": size, "bytes": sum(path.stat().st_size for _, path in files)}
    write_text(root / "meta.json", json.dumps(meta))


def groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of texts of about ENCODE_AT_ONCE characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= ENCODE_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group
