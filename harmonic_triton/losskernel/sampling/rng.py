"""Random numbers of a chain: what chain c does in step t depends on (seed, c, t) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

PIECE = 2**22  # entries of noise that are made at once where a process holds a part of the parameters


class CounterRNG:
    """Generators that start anew for every (seed, chain, step)."""

    def __init__(self, seed: int) -> None:
        key = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=16).digest()
        self.keys = np.frombuffer(key, np.uint64)
        self.low, self.mixer = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:8], "little")
        self.philox = np.random.Philox()
        self.numpy = np.random.Generator(self.philox)
        self.generators: list[torch.Generator] = []
        self.pool: ThreadPoolExecutor | None = None

    def minibatch(self, chain: int, step: int, n: int, size: int) -> Tensor:
        """(size,) distinct indices below n, from Philox at counter (step, chain)."""
        self.philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": np.array([0, 0, step, chain], np.uint64), "key": self.keys},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return torch.from_numpy(self.numpy.choice(n, size, replace=False, shuffle=False))

    def noise(self, out: Tensor, chains: list[int], step: int, std: float = 1.0) -> None:
        """Fill each (P,) row of ``out`` with N(0, std^2) for its chain; zeros for chain -1."""
        while len(self.generators) < len(chains):
            self.generators.append(torch.Generator(out.device))

        def fill(row: int) -> None:
            if chains[row] < 0:
                out[row].zero_()
            else:
                generator = self.generators[row].manual_seed(self.noise_seed(chains[row], step))
                out[row].normal_(0.0, std, generator=generator)

        threads = torch.get_num_threads()
        if out.device.type == "cpu" and threads > 1 and len(chains) > 1 and out.shape[1] > 10_000:
            self.pool = self.pool or ThreadPoolExecutor(threads)
            list(self.pool.map(fill, range(len(chains))))
        else:
            for row in range(len(chains)):
                fill(row)

    def noise_pieces(self, total: int, like: Tensor, chain: int, step: int, std: float) -> Iterator[tuple[int, Tensor]]:
        """The row of ``total`` entries that :meth:`noise` gives, in pieces: (start, values), which the next one overwrites.

        Torch's CPU generator makes normal numbers 16 at a time, and the last ones of a row anew if those are not 16: so
        pieces of a multiple of 16, the last one of no fewer, are to the bit parts of the row. On a GPU they are not, if the
        row has more than PIECE entries.
        """
        if not self.generators:
            self.generators.append(torch.Generator(like.device))
        generator = self.generators[0].manual_seed(self.noise_seed(chain, step))
        scratch = like.new_empty(min(total, PIECE + 15))
        start = 0
        while start < total:
            size = PIECE if total - start >= PIECE + 16 else total - start
            yield start, scratch[:size].normal_(0.0, std, generator=generator)
            start += size

    def noise_seed(self, chain: int, step: int) -> int:
        """64 bits. PyTorch's CPU generator keeps the lower 32: a bijection of (chain, step), so that no two of the
        first 4,194,304 steps of the first 1024 chains of a run share their noise; a seed keys the bijection."""
        x = ((chain << 22) + step ^ self.low) & 0xFFFFFFFF
        x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        x = (x + self.mixer) & 0xFFFFFFFF
        x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        x ^= x >> 16
        high = (chain * 0x9E3779B1 + (step >> 22) * 0x85EBCA77 ^ self.mixer) & 0x7FFFFFFF
        return high << 32 | x
