"""What layouts exchange and hold, from formulas; a test checks them against the bytes that small runs exchange.

    python -m benchmarks.scale    # the tables of docs/scale.md

A collective's *payload* is the bytes of the tensor that a process hands in or gets back, whichever is larger; a ring moves
2 (p - 1)/p times that through every process for an all-reduce, (p - 1)/p for an all-gather or a reduce-scatter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

FP64, FP32, BF16 = 8, 4, 2
FACTS = 32  # int64 at most, by which the processes of a call agree: not counted below


@dataclass(frozen=True)
class Head:
    """One head call: N tokens, D features, V classes, operands of ``size`` bytes a number."""

    tokens: int
    width: int
    classes: int
    size: int = BF16


@dataclass(frozen=True)
class Cost:
    """Of one process and one step of the head, in bytes."""

    forward: float  # payload
    backward: float
    held: float  # weight and its gradient, what the loss adds, and what is gathered for the call
    moved: float  # through the process's links by rings


def vocabulary_parallel(head: Head, processes: int) -> Cost:
    """V/p rows each: three maxima and a sum in fp64 forward, dX backward. Nothing grows with V."""
    forward = 4 * head.tokens * FP64
    backward = head.tokens * head.width * head.size
    share = (processes - 1) / processes
    rows = -(-head.classes // processes)
    held = rows * head.width * (head.size + head.size) + head.tokens * head.width * (head.size + FP32)
    return Cost(forward, backward, held, 2 * share * (forward + backward))


def split_logits(head: Head, processes: int) -> Cost:
    """V/p rows each and dense logits: two fp32 numbers a token forward, dX backward; N V/p logits and their gradient."""
    forward = 3 * head.tokens * FP32
    backward = head.tokens * head.width * head.size
    share = (processes - 1) / processes
    rows = -(-head.classes // processes)
    held = rows * head.width * 2 * head.size + head.tokens * rows * (head.size + FP32)
    return Cost(forward, backward, held, 2 * share * (forward + backward))


def gathered(head: Head, processes: int) -> Cost:
    """FSDP2: the rows are gathered for the forward pass and again for backward, their gradient scattered in fp32."""
    weight = head.classes * head.width
    share = (processes - 1) / processes
    forward, backward = weight * head.size, weight * (head.size + FP32)
    held = (
        2 * weight * head.size / processes + weight * (head.size + FP32) + head.tokens * head.width * (head.size + FP32)
    )
    return Cost(forward, backward, held, share * (forward + backward))


def both(head: Head, rows: int, replicas: int) -> Cost:
    """V/rows rows for a process of a group, FSDP2 over the groups."""
    split = vocabulary_parallel(head, rows)
    part = gathered(Head(head.tokens, head.width, -(-head.classes // rows), head.size), replicas)
    return Cost(split.forward + part.forward, split.backward + part.backward, part.held, split.moved + part.moved)


LLAMA = {"D": 16384, "V": 128256}
PARAMETERS = 405e9
PROCESSES = (8, 64, 512, 4096, 16384)
TOKENS = 8192  # of a process and step


def layouts() -> Iterator[str]:
    """The head of Llama-3 405B, 8192 tokens a process, bf16."""
    head, group = Head(TOKENS, LLAMA["D"], LLAMA["V"]), 8
    yield "| GPUs | layout | exchanged forward | exchanged backward | through a GPU's links | held for the head |"
    yield "|---|---|---|---|---|---|"
    for world in PROCESSES:
        rows = [("FSDP2 over all", gathered(head, world))]
        if world == group:
            rows.append((f"rows over {group}", vocabulary_parallel(head, group)))
            rows.append(("the same with dense logits", split_logits(head, group)))
        else:
            rows.append((f"rows over {group}, FSDP2 over {world // group:,}", both(head, group, world // group)))
        for name, cost in rows:
            figures = " | ".join(amount(value) for value in (cost.forward, cost.backward, cost.moved, cost.held))
            yield f"| {world:,} | {name} | {figures} |"


def kernel(tokens: float, draws: int) -> dict[str, float]:
    """The loss kernel of so many token losses of a model of 405 billion parameters, 4 chains."""
    losses = tokens * draws
    return {
        "traces in bfloat16, bytes": losses * BF16,
        "a covariance m x m in fp32, bytes": tokens**2 * FP32,
        "forward passes for all draws, flops": 2 * PARAMETERS * losses,
        "exact neighbours of all tokens, flops": 2 * tokens**2 * draws,
        "exact neighbours of 100,000 of them, flops": 2 * tokens * 1e5 * draws,
        "the sampler's state of one chain (weights, centre, RMS) in fp32, bytes": 3 * PARAMETERS * FP32,
        "checkpoint of a chain, bytes": 3 * PARAMETERS * FP32,
    }


def kernels(rate: float = 4e14) -> Iterator[str]:
    """What the loss kernel of a million, a hundred million and a billion tokens needs: 1000 draws."""
    sizes = (1e6, 1e8, 1e9)
    yield f"| | {' | '.join(f'{size:.0e} tokens'.replace('e+0', 'e') for size in sizes)} |"
    yield "|---|" + "---|" * len(sizes)
    tables = [kernel(size, 1000) for size in sizes]
    for name in tables[0]:
        what, _, unit = name.rpartition(", ")
        cells = [amount(t[name]) if unit == "bytes" else hours(t[name] / rate) for t in tables]
        yield f"| {what} | {' | '.join(cells)} |"


def amount(value: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} EB"


def hours(seconds: float) -> str:
    """GPU hours."""
    value = seconds / 3600
    return f"{value:,.0f} GPU hours" if value >= 10 else f"{value:.2g} GPU hours"


def main() -> None:
    for table in (layouts(), kernels()):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
