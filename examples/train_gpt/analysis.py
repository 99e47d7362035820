"""What the report measures on a trained embedding: principal components, parallelograms, neighbours."""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Vocabulary

# Word pairs of one relation each. A pair counts where both words are single tokens of the corpus.
RELATIONS: dict[str, list[tuple[str, str]]] = {
    "opposites": [
        *(("get", "set"), ("open", "close"), ("min", "max"), ("first", "last"), ("True", "False"), ("read", "write")),
        *(("start", "end"), ("left", "right"), ("add", "remove"), ("encode", "decode"), ("input", "output")),
    ],
    "singular, plural": [
        *(("key", "keys"), ("value", "values"), ("name", "names"), ("line", "lines"), ("file", "files")),
        *(("arg", "args"), ("item", "items"), ("type", "types"), ("option", "options"), ("module", "modules")),
        *(("day", "days"), ("year", "years"), ("thing", "things"), ("hand", "hands")),
    ],
    "present, past": [
        *(("call", "called"), ("use", "used"), ("return", "returned"), ("raise", "raised"), ("define", "defined")),
        *(("go", "went"), ("say", "said"), ("see", "saw"), ("take", "took"), ("come", "came"), ("know", "knew")),
    ],
    "lower case, capital": [
        *(("error", "Error"), ("type", "Type"), ("path", "Path"), ("file", "File"), ("test", "Test")),
        *(("return", "Return"), ("base", "Base"), ("the", "The"), ("this", "This"), ("if", "If"), ("it", "It")),
    ],
    "male, female": [("he", "she"), ("his", "her"), ("man", "woman"), ("king", "queen"), ("father", "mother")],
    "even, odd digit": [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")],
}


class Principal(NamedTuple):
    """The top two principal components of the class vectors."""

    points: Tensor  # (V, 2) coordinates of the centred vectors
    share: tuple[float, float]  # of the variance


class Parallelograms(NamedTuple):
    """The quadruples of one relation, two pairs each, and what they are called."""

    relation: str
    pairs: list[tuple[str, str]]
    quadruples: Tensor  # (Q, 4) token ids i, j, m, n


def principal_components(vectors: Tensor) -> Principal:
    """PCA in fp64: (V, D) to (V, 2)."""
    centered = vectors.double() - vectors.double().mean(0)
    values, directions = torch.linalg.eigh(centered.t() @ centered)
    top = directions[:, -2:].flip(1)
    top = top * torch.where(top.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    first, second = (values.flip(0)[:2] / values.sum()).tolist()
    return Principal(centered @ top, (first, second))


def parallelogram_loss(points: Tensor, quadruples: Tensor) -> Tensor:
    """Paper, Eq. 3: ||E_i + E_n - E_j - E_m|| / sigma with sigma^2 the mean of ||E_k||^2 over the vocabulary.

    ``points`` (V, 2) are the embeddings on their first two principal components, ``quadruples`` (Q, 4) the tokens
    (i, j, m, n) of two pairs i : j and m : n. The authors' code takes the square of this.
    """
    i, j, m, n = points[quadruples].unbind(1)
    sigma = points.square().sum(1).mean().sqrt()
    return (i + n - j - m).norm(dim=1) / sigma


def single_token(vocabulary: Vocabulary, word: str) -> int | None:
    """The id of a word that is one token."""
    ids = vocabulary.encode(word)
    return ids[0] if len(ids) == 1 else None


def find_parallelograms(vocabulary: Vocabulary) -> list[Parallelograms]:
    """Every relation with at least two pairs of single tokens, the form after a space preferred."""
    found = []
    for relation, words in RELATIONS.items():
        pairs, ids = [], []
        for a, b in words:
            for space in (" ", ""):
                first, second = single_token(vocabulary, space + a), single_token(vocabulary, space + b)
                if first is not None and second is not None:
                    pairs.append((a, b))
                    ids.append((first, second))
                    break
        quadruples = [(*p, *q) for p, q in combinations(ids, 2) if len({*p, *q}) == 4]
        if quadruples:
            found.append(Parallelograms(relation, pairs, torch.tensor(quadruples)))
    return found


def random_quadruples(counts: Tensor, quantity: int, seed: int) -> Tensor:
    """Four different tokens out of the 500 most frequent, the yardstick for the relations: (quantity, 4)."""
    frequent = counts.argsort(descending=True, stable=True)[:500]
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(quantity, len(frequent), generator=generator).argsort(1)
    return frequent[order[:, :4]]


def nearest_tokens(vectors: Tensor, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
    """The k class vectors nearest to each of the given ones, and their distances."""
    vectors = vectors.float()
    distances = torch.cdist(vectors[ids], vectors, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(ids)), ids] = math.inf
    values, neighbors = distances.topk(min(k, len(vectors) - 1), largest=False)
    return [list(zip(row, far, strict=True)) for row, far in zip(neighbors.tolist(), values.tolist(), strict=True)]


def label(vocabulary: Vocabulary, token: int) -> str:
    """A token as one shows it in print: spaces and line ends made visible."""
    return vocabulary.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def words(vocabulary: Vocabulary, counts: Tensor, quantity: int) -> list[int]:
    """The most frequent tokens that read as words; the most frequent of all where none does."""
    order = [i for i in counts.argsort(descending=True, stable=True)[:2000].tolist() if counts[i] > 0]
    readable = [i for i in order if len(text := vocabulary.decode([i]).strip()) > 2 and text.isalpha()]
    return (readable or order)[:quantity]
