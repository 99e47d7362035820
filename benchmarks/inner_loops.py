"""What the inner loops of a compiled kernel execute for each of the N V entries, and the time that this predicts.

The kernels that work on tiles of (BLOCK_N, BLOCK_V) entries run a loop over the features inside the work on one tile. Both
are found in the machine code (SASS): the features loop is the innermost loop with the products in it, the tile is the
loop around it, or the whole kernel where a program does one tile. Instructions are counted as issued to a thread, so that
count x threads / entries compares kernels of different tiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLASSES = ("matrix", "special", "fp32", "memory", "other")
PATTERNS = {
    "matrix": r"[A-Z]*(GMMA|MMA)\b",
    "special": r"MUFU",
    "fp32": r"F(ADD|MUL|FMA|MNMX|SEL|SETP?|CHK|SWZADD|2FP?|RND)|I2FP?|H(ADD2|MUL2|FMA2|SETP?2|MNMX2)",
    "memory": r"LD|ST[GSL]\b|ST\b|STSM|ATOM|RED|SHFL|UTMA|CCTL|SULD|SUST",
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*)")
LABEL = re.compile(r"(\.L_x_\d+):")
LEAST_FMA = 64  # in a loop that multiplies without matrix instructions


@dataclass
class Loops:
    """Instructions of each class that a thread executes."""

    tile: dict[str, int]  # for one tile, outside the features loop
    step: dict[str, int]  # for one tile and ``block_d`` features
    block_d: int
    entries: int  # of a tile, for each thread
    block_n: int = 128
    block_v: int = 256

    def per_entry(self, width: int) -> dict[str, float]:
        """Instructions for each of the N V entries at ``width`` features."""
        steps = -(-width // self.block_d)
        return {name: (self.tile[name] + steps * self.step[name]) / self.entries for name in CLASSES}


def classify(opcode: str) -> str:
    return next((name for name, pattern in PATTERNS.items() if re.match(pattern, opcode)), "other")


def disassemble(cubin: bytes) -> str:
    """SASS of a kernel, by the nvdisasm in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def _parse(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in order, and every loop as the range of its instructions."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        label, instruction = LABEL.match(line.strip()), INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(opcodes)
        elif instruction:
            opcode, operands = instruction.groups()
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            if opcode == "BRA" and target and target[1] in labels and labels[target[1]] < len(opcodes):
                loops.append((labels[target[1]], len(opcodes) + 1))
            opcodes.append(opcode)
    return opcodes, loops


def read(sass: str, block_d: int, entries: int) -> Loops:
    """The loops of one kernel; ``entries`` of a tile for each thread."""
    opcodes, loops = _parse(sass)
    end = max((i for i, opcode in enumerate(opcodes) if opcode == "EXIT"), default=len(opcodes))

    def work(loop: tuple[int, int]) -> tuple[int, int]:
        body = opcodes[slice(*loop)]
        return sum(classify(o) == "matrix" for o in body), sum(o == "FFMA" for o in body)

    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = [loop for loop in innermost if work(loop)[0] or work(loop)[1] >= LEAST_FMA]
    features = max(found, key=work, default=(0, 0))
    around = [
        loop for loop in loops if found and loop[0] <= features[0] and features[1] <= loop[1] and loop != features
    ]
    tile = min(around, key=lambda loop: loop[1] - loop[0], default=(0, end))
    step = Counter(classify(opcode) for opcode in opcodes[slice(*features)])
    whole = Counter(classify(opcode) for opcode in opcodes[slice(*tile)])
    return Loops(
        {name: whole[name] - step[name] for name in CLASSES},
        {name: step[name] for name in CLASSES},
        block_d,
        entries,
    )


# --- prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """An H200. Product and copy rates as measured on one, the rest from its clock and its 132 multiprocessors."""

    products: float = 790e12  # operations a second in bf16
    copy: float = 4.3e12  # bytes a second
    cache: float = 8.2e12  # bytes a second from L2 to the multiprocessors, as the best published bf16 product implies
    special: float = 132 * 16 * 1.75e9  # a second
    issue: float = 132 * 128 * 1.75e9  # instructions of one thread a second


@dataclass(frozen=True)
class Pass:
    """One kernel over the N V entries."""

    kernel: str
    variant: str  # the kernel's switches that are on, beside the loss's own
    products: int  # of 2 N V D operations each
    traffic: int  # bytes to and from memory for each entry, in bf16, while the products run

    def named(self, *more: str) -> str:
        """The variant's name with further switches in front."""
        return "+".join(filter(None, [*more, self.variant])) or "plain"


@dataclass(frozen=True)
class Strategy:
    """Passes of ours, the two gradient products that the library does, and what makes gradients of them."""

    name: str
    passes: tuple[Pass, ...]
    library_products: int = 2
    column_sums: int = 2  # bytes read for each entry (harmonic loss)
    finish: int = 8  # bytes for each entry of a gradient: an fp32 product written and read, operand and result


STRATEGIES = (
    Strategy("recompute", (Pass("scores_kernel", "tma", 1, 0), Pass("scores_kernel", "recompute+tma", 1, 2))),
    Strategy("one pass", (Pass("scores_kernel", "keep+tma", 1, 2),)),
)
BEFORE = {  # the strategies that one pass replaced, by the same model with its terms (cf959e3, 128x64x64 tiles, cp.async)
    (8192, 768, 50257): {"recompute": (5.4e-3, 6.8e-3), "chunks": (4.5e-3, 4.9e-3)},
    (8192, 4096, 128256): {"recompute": (72e-3, 76e-3), "chunks": (51e-3, 53e-3)},
}
SHAPES = ((8192, 768, 50257), (8192, 4096, 128256))
LAUNCHES = 0.12e-3  # seconds of norms, geometry, finish, sort and launches, beside one reading of W


def pass_seconds(one: Pass, loops: Loops, shape: Sequence[int], machine: Machine) -> tuple[float, float]:
    """Seconds of one pass: (its product with the loads of that, its epilogue). A tile's operands come from the L2 cache."""
    tokens, width, classes = shape
    entries, steps = float(tokens * classes), -(-width // loops.block_d)
    loads = 2 * width * entries * (1 / loops.block_n + 1 / loops.block_v)
    inside = steps * sum(loops.step.values()) / loops.entries
    product = one.products * max(2 * entries * width / machine.products, loads / machine.cache)
    return max(product, inside * entries / machine.issue), max(
        loops.tile["special"] / loops.entries * entries / machine.special,
        sum(loops.tile.values()) / loops.entries * entries / machine.issue,
        one.traffic * entries / machine.copy,
    )


def predict(
    strategy: Strategy, loss: str, found: Mapping[tuple[str, str], Loops], shape: Sequence[int], machine: Machine
) -> tuple[float, float]:
    """Seconds of forward and backward: (epilogues hidden behind products, products and epilogues in turn).

    ``loss`` is the switch that turns its kernels on: "" or "dot".
    """
    tokens, width, classes = shape
    entries, gradients = float(tokens * classes), float((tokens + classes) * width)
    always = strategy.library_products * 2 * entries * width / machine.products
    always += (strategy.finish * gradients + 2 * classes * width) / machine.copy + LAUNCHES
    if loss != "dot":
        always += strategy.column_sums * entries / machine.copy
    overlapped = in_turn = always
    for one in strategy.passes:
        product, epilogue = pass_seconds(one, found[one.kernel, one.named(loss)], shape, machine)
        overlapped += max(product, epilogue)
        in_turn += product + epilogue
    return overlapped, in_turn
