"""Compile every Triton kernel ahead of time, without a GPU, and read its static cost off the result.

``python -m benchmarks.static_cost`` prints Markdown tables: the instructions of the sm_90 inner loops and the times that
they predict (benchmarks/inner_loops.py), then every compilation; ``--json`` prints one line per compilation. Kernels are
compiled as a launch would specialise them: contiguous operands, pointers and widths divisible by 16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import inner_loops

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_OF_ALL = {"sm80": 164 * 1024, "sm90": 228 * 1024, "sm100": 228 * 1024}  # bytes of a multiprocessor
SHARED_RESERVED = 1024  # bytes that the system takes of each program
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
SWITCHES = ("DOT", "BIAS", "CAP", "WANT_SCORES", "SMOOTHING", "SCORED", "SCALED", "KEEP", "REPAIR", "RECOMPUTE", "TMA")
OPERANDS = {"x_ptr", "w_ptr", "a_ptr", "dx_ptr", "dw_ptr", "operand_ptr", "column_ptr"}  # in the dtype of the call
TYPES = dict.fromkeys(("target_ptr", "rival_ptr", "starts_ptr", "tokens_ptr"), "i64")  # what is named nowhere is fp32
TYPES |= {"index_ptr": "i32", "target_ref_ptr": "fp64", "rival_ref_ptr": "fp64", "used_ptr": "i1"}
COLUMN_OF_TILE = {"anchor_kernel", "finish_kernel"}  # whose column_ptr is a class
FLOATS = {"eps", "softcap"}  # scalar arguments that are not i32
ABSENT = {  # arguments that are None where a switch is off
    "SMOOTHING": {"smooth_weight_ptr", "smooth_sum_ptr", "v_sum_ptr", "g_smooth_ptr"},
    "SCORED": {"g_score_ptr"},  # nothing depends on the target's logit itself
    "WANT_SCORES": {"score_sum_ptr"},
    "BIAS": {"bias_ptr"},
    "CAP": {"rival_ref_ptr"},
}
HARMONIC_ONLY = {
    "norms_ptr",
    "smallest_ptr",
    "median_ptr",
    "largest_ptr",
    "n_ptr",
    "columns_ptr",
}  # None with dot products
MATRIX = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"


@dataclass
class Cost:
    """What the compiler says of one kernel at one dtype, architecture and configuration."""

    kernel: str
    variant: str
    dtype: str
    arch: str
    shared: int  # bytes
    registers: int | None  # a thread
    spills: int  # bytes of local memory a thread (NVIDIA) or spilled registers (AMD)
    matrix_instructions: int
    products: bool  # whether the kernel computes a tile of products
    occupancy: float | None = None  # warps resident on a multiprocessor of the most that it holds (NVIDIA)
    loops: dict[str, Any] | None = None  # ``inner_loops.Loops`` (sm_90, tiles of N x V entries)


@dataclass
class Launch:
    """How a launch specialises a kernel: argument types, constants, known divisibility, compiler options."""

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]


def kernels() -> dict[str, tuple[Any, bool]]:
    """Every kernel of the heads by name, and whether it computes products."""
    from harmonic_triton.fused.triton import backward, forward, scores

    named = {**vars(scores), **vars(forward), **vars(backward)}
    return {name: (value, name == "scores_kernel") for name, value in named.items() if name.endswith("_kernel")}


def variants(arguments: list[str]) -> Iterator[dict[str, bool]]:
    """Every combination of the kernel's own switches that a call can have."""
    switches = [name for name in SWITCHES if name in arguments]
    for values in itertools.product((False, True), repeat=len(switches)):
        chosen = dict(zip(switches, values, strict=True))
        on = {name for name, value in chosen.items() if value}
        if not ({"KEEP", "SMOOTHING"} <= on or {"KEEP", "SCALED"} <= on  # one pass: bfloat16, no smoothing
                or ("RECOMPUTE" in on and on & {"KEEP", "REPAIR", "WANT_SCORES"})
                or (on & {"BIAS", "CAP"} and "DOT" not in on)  # of logits; a cap takes a bias, of zeros if there is none
                or ("CAP" in on and "BIAS" in switches and "BIAS" not in on)):  # fmt: skip
            yield chosen


def launch_of(
    name: str, function: Any, products: bool, switches: dict[str, bool], dtype: str, arch: str, config: Any = None
) -> Launch:
    """The specialisation of one kernel, with the stored tile configuration unless another one is given.

    A ``KeyError`` names a constant that is not known here.
    """
    from harmonic_triton._common.copies import stages
    from harmonic_triton.fused.results import COLUMNS
    from harmonic_triton.fused.triton.tile_configs import (
        CONFIGS,
        FEATURE_BLOCK,
        FUSION,
        GROUP,
        ROW_BLOCK,
        ROW_OPTIONS,
        near,
        parts,
    )

    config = config or CONFIGS[arch, DTYPES[dtype]]
    fast = not arch.startswith("gfx")
    fixed: dict[str, Any] = {**switches, "BLOCK_N": ROW_BLOCK, "BLOCK_D": FEATURE_BLOCK, "BLOCK_V": config.block_v}
    fixed |= {"UPCAST": False, "FAST": fast, "stride_xd": 1, "stride_wd": 1, "COLUMNS": COLUMNS, "NEAR": near(config)}
    options = {**ROW_OPTIONS, "num_stages": 2}
    if products:
        fixed |= {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "GROUP": GROUP, "PARTS": parts(config)}
        ahead = config.num_stages if switches["TMA"] else stages(arch, config.num_stages, DTYPES[dtype])
        options = {"num_warps": config.num_warps, "num_stages": ahead, **FUSION}
        fixed |= dict.fromkeys(_absent_of_scores(switches))
    elif name == "coefficient_kernel":
        fixed["BLOCK_N"] = 128
    elif name == "rounded_sums_kernel":
        fixed["BLOCK_V"] = 4 * FEATURE_BLOCK
    for switch, names in ABSENT.items():
        if not switches.get(switch, True):
            fixed |= dict.fromkeys(names)
    if name in ("coefficient_kernel", "finish_kernel") and not switches["KEEP"]:
        names = (
            {"anchor_ptr", "near_score_ptr", "a_ptr"}
            if name == "coefficient_kernel"
            else {"near_score_ptr", "a_sums_ptr", "plain_ptr", "by_gap_ptr"}
        )
        fixed |= dict.fromkeys(names)
    if switches.get("DOT", False):
        fixed |= dict.fromkeys(
            HARMONIC_ONLY | (set() if name in COLUMN_OF_TILE or switches.get("BIAS") else {"column_ptr"})
        )
    blocks = {"x_ptr": ("BLOCK_N", "BLOCK_D"), "w_ptr": ("BLOCK_V", "BLOCK_D"), "a_ptr": ("BLOCK_N", "WIDTH")}
    compile_time = {name for name, kind in function.fn.__annotations__.items() if "constexpr" in str(kind)}
    launch = Launch({}, {}, {}, options)
    for position, argument in enumerate(function.arg_names):
        if argument in compile_time or argument in fixed:
            launch.signature[argument], launch.constants[(position,)] = "constexpr", fixed[argument]
        elif argument in blocks and switches.get("TMA"):
            sides = [{**fixed, "WIDTH": config.block_v // parts(config)}[side] for side in blocks[argument]]
            launch.signature[argument] = f"tensordesc<{dtype}{sides}>"
        elif argument.endswith("_ptr"):
            kind = dtype if argument in OPERANDS else TYPES.get(argument, "fp32")
            if argument == "column_ptr" and name in COLUMN_OF_TILE:
                kind = "i32"
            launch.signature[argument], launch.attributes[(position,)] = f"*{kind}", [["tt.divisibility", 16]]
        else:
            launch.signature[argument] = "fp32" if argument in FLOATS else "i32"
            if argument.startswith("stride") or argument == "D":
                launch.attributes[(position,)] = [["tt.divisibility", 16]]
    return launch


def _absent_of_scores(switches: dict[str, bool]) -> set[str]:
    """Arguments of the scores kernel that are None in one of its modes."""
    absent = {"smooth_sum_ptr"} if switches["RECOMPUTE"] or not switches["SMOOTHING"] else set()
    if not switches["REPAIR"]:
        absent |= {"anchor_ptr", "largest_anchor_ptr"}
    if not switches["RECOMPUTE"]:
        absent |= {"rival_ptr", "p_coef_ptr", "v_coef_ptr", "log_norm_ptr"}
    else:
        absent |= {"near_ptr", "index_ptr", "p_sum_ptr", "score_sum_ptr"}
    if not switches["KEEP"] and not switches["RECOMPUTE"]:
        absent |= {"a_ptr", "a_sums_ptr"}
    return absent


def compile_one(
    name: str, function: Any, products: bool, switches: dict[str, bool], dtype: str, arch: str, config: Any = None
) -> Cost:
    """Compile one kernel and read its cost."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = launch_of(name, function, products, switches, dtype, arch, config)
    source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=launch.options)
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        (registers,), (spills,) = (
            numbers_in(r"\.vgpr_count:\s+(\d+)", text),
            numbers_in(r"\.vgpr_spill_count:\s+(\d+)", text),
        )
    else:
        text = compiled.asm["ptx"]
        registers, spills = resource_usage(compiled.asm["cubin"])
    variant = "+".join(key.lower() for key, on in switches.items() if on) or "plain"
    shared, matrix = compiled.metadata.shared, len(re.findall(MATRIX, text))
    cost = Cost(name, variant, dtype, arch, shared, registers, spills, matrix, products)
    if arch in SHARED_OF_ALL:
        cost.occupancy = occupancy(arch, registers, shared, launch.options["num_warps"])
    if arch == "sm90" and products:
        block = {key: launch.constants[(function.arg_names.index(key),)] for key in ("BLOCK_N", "BLOCK_V", "BLOCK_D")}
        entries = block["BLOCK_N"] * block["BLOCK_V"] // (32 * launch.options["num_warps"])
        sass = inner_loops.disassemble(compiled.asm["cubin"])
        loops = inner_loops.read(sass, block["BLOCK_D"], entries)
        cost.loops = asdict(replace(loops, block_n=block["BLOCK_N"], block_v=block["BLOCK_V"]))
    return cost


def occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's 64 warps that programs of ``warps`` warps can fill: registers and shared memory limit."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_OF_ALL[arch] // (shared + SHARED_RESERVED)
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (spills), by the cuobjdump in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = numbers_in(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", out)
    return registers, stack + local


def numbers_in(pattern: str, text: str) -> tuple[int, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has changed: no {pattern!r} in it")
    return tuple(map(int, found.groups()))


Job = tuple[str, dict[str, bool], str, str]


def jobs(architectures: Iterable[str] = TARGETS, dtypes: Iterable[str] = DTYPES) -> list[Job]:
    """Every kernel x switches x dtype x architecture that a call can have.

    fp16 alone has a scaled backward, bf16 alone one pass; descriptors serve 16 bits on GPUs that have them.
    """
    from harmonic_triton.fused.triton.tile_configs import described

    found = []
    for name, (function, _) in kernels().items():
        for switches in variants(function.arg_names):
            for dtype, arch in itertools.product(dtypes, architectures):
                scaled = switches.get("SCALED", dtype == "fp16") == (dtype == "fp16")
                kept = not switches.get("KEEP") or dtype == "bf16"
                if scaled and kept and (not switches.get("TMA") or described(arch, DTYPES[dtype])):
                    found.append((name, switches, dtype, arch))
    return found


def run_job(job: Job) -> Cost:
    """Compile one job in this process."""
    name, switches, dtype, arch = job
    function, products = kernels()[name]
    return compile_one(name, function, products, switches, dtype, arch)


def compile_all(todo: Sequence[Job], workers: int | None = None) -> Iterator[Cost]:
    """Compile these jobs, in parallel processes."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    if workers == 1:
        yield from map(run_job, todo)
        return
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_job, todo, chunksize=4)


COLUMNS = ("kernel", "variant", "dtype", "arch", "registers", "spills", "shared", "occupancy", "matrix_instructions")


def inner_loop_tables(costs: list[Cost]) -> str:
    """Instructions for each entry of N x V by class, and what they predict for each strategy on an H200."""
    from benchmarks.report import markdown_table

    rows = []
    found = {}
    for cost in costs:
        if cost.loops is None:
            continue
        loops = inner_loops.Loops(**cost.loops)
        if cost.dtype == "bf16":
            found[cost.kernel, cost.variant] = loops
        whole = loops.per_entry(768)
        tile = [f"{loops.tile[name] / loops.entries:.2f}" for name in inner_loops.CLASSES]
        step = [f"{loops.step[name] / loops.entries * 64 / loops.block_d:.2f}" for name in inner_loops.CLASSES]
        rows.append([cost.kernel, cost.variant, cost.dtype, *tile, *step, f"{sum(whole.values()):.1f}"])
    heads = [f"{name}{where}" for where in ("", " / 64 D") for name in inner_loops.CLASSES]
    parts = [
        "## Inner loops on sm_90: instructions of a thread for each of the N V entries",
        "Outside the loop over the features, then inside it for each 64 features; the last column is the sum at D = 768.",
        markdown_table(("kernel", "variant", "dtype", *heads, "all at 768"), rows),
        "## Predicted time of forward + backward on an H200, bf16",
        "From the counts above and the limits in benchmarks/inner_loops.py, L2 traffic and finishing passes included: with\n"
        "epilogues hidden behind products, and with both in turn. The floor is 3U at the measured product rate. *Before* are\n"
        "the strategies that one pass replaced, by the same model.",
        markdown_table(PREDICTED, list(_predictions(found))),
    ]
    return "\n\n".join(parts)


PREDICTED = ("N, D, V", "strategy", "floor ms", "overlapped ms", "in turn ms", "share of the floor", "measured ms")


def _predictions(found: dict[tuple[str, str], inner_loops.Loops]) -> Iterator[list[str]]:
    machine = inner_loops.Machine()
    for shape in inner_loops.SHAPES:
        tokens, width, classes = shape
        floor = 6 * tokens * width * classes / machine.products
        for strategy in inner_loops.STRATEGIES:
            for loss, dot in (("harmonic", ""), ("cross-entropy", "dot")):
                if any((one.kernel, one.named(dot)) not in found for one in strategy.passes):
                    continue
                best, worst = inner_loops.predict(strategy, dot, found, shape, machine)
                times = [f"{1e3 * seconds:.2f}" for seconds in (floor, best, worst)]
                share = f"{floor / worst:.2f}-{floor / best:.2f}"
                name = f"{strategy.name}, {loss}"
                yield [", ".join(map(str, shape)), name, *times, share, "not measured on a GPU"]
        for name, (best, worst) in inner_loops.BEFORE[shape].items():
            times = [f"{1e3 * seconds:.2f}" for seconds in (floor, best, worst)]
            share = f"{floor / worst:.2f}-{floor / best:.2f}"
            yield [", ".join(map(str, shape)), f"before: {name}, harmonic", *times, share, "not measured on a GPU"]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", action="store_true", help="one JSON line per compilation")
    parser.add_argument("--arch", action="append", choices=TARGETS, help="only this one (can be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one (can be repeated)")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter compiles nothing. Unset it")
    import triton

    costs = compile_all(jobs(options.arch or TARGETS, options.dtype or DTYPES), options.workers)
    if options.json:
        for cost in costs:
            print(json.dumps(asdict(cost)), flush=True)
        return 0
    listed = list(costs)
    print(f"Every kernel as triton {triton.__version__} compiles it ahead of time (`{parser.prog}`).\n")
    print(inner_loop_tables(listed))
    print("\n## Every compilation\n")
    print("Registers and spills (bytes; AMD: registers) are per thread, shared memory is in bytes, occupancy is warps")
    print("resident of the most that a multiprocessor holds.\n")
    print(f"| {' | '.join(COLUMNS).replace('_', ' ')} |")
    print("|---|---|---|---|" + "---:|" * (len(COLUMNS) - 4))
    for cost in listed:
        line = asdict(cost)
        print(f"| {' | '.join('-' if line[c] is None else str(line[c]) for c in COLUMNS)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
