"""Compile every Triton kernel ahead of time, without a GPU, and read its static cost off the result.

``python -m benchmarks.static_cost`` prints a table; ``--json`` one line per compilation. Kernels are compiled as a launch
would specialise them: contiguous operands, pointers and widths divisible by 16.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
OPERANDS = {"x_ptr", "w_ptr", "a_ptr", "dx_ptr", "dw_ptr"}
INDICES = {"target_ptr", "rival_ptr", "starts_ptr", "tokens_ptr"}
SMALL = {"index_ptr": "i32", "far_ptr": "i8"}
MATRIX = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"


@dataclass
class Cost:
    """What the compiler says of one kernel at one dtype, architecture and configuration."""

    kernel: str
    variant: str
    dtype: str
    arch: str
    shared: int  # bytes
    registers: int | None  # a thread; None where the disassembler is missing
    spills: int  # bytes of local memory or spilled registers
    matrix_instructions: int
    products: bool  # whether the kernel computes a tile of products


def kernels() -> dict[str, tuple[Any, bool]]:
    """Every kernel by name, and whether it computes products."""
    from harmonic_triton._triton import backward, forward

    found = {}
    for module in (forward, backward):
        for name in dir(module):
            if name.endswith("_kernel"):
                found[name] = (getattr(module, name), "PRECISION" in getattr(module, name).arg_names)
    return found


def variants(arguments: list[str]) -> Iterator[dict[str, bool]]:
    """Every combination of the kernel's own switches."""
    switches = [name for name in ("MOMENTS", "SMOOTHING", "SCALED") if name in arguments]
    for values in itertools.product((False, True), repeat=len(switches)):
        yield dict(zip(switches, values, strict=True))


def compile_one(name: str, function: Any, products: bool, switches: dict[str, bool], dtype: str, arch: str) -> Cost:
    """Compile one kernel and read its cost."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from harmonic_triton._triton.configs import CONFIGS, FEATURE_BLOCK, ROW_BLOCK

    config = CONFIGS[arch, DTYPES[dtype]]
    blocks = {"BLOCK_N": ROW_BLOCK, "BLOCK_D": FEATURE_BLOCK}
    options = {"num_warps": 4, "num_stages": 2}
    if products:
        blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    elif name == "coefficient_kernel":
        blocks = {"BLOCK_N": 128}
    fixed: dict[str, Any] = {**switches, **blocks, "PRECISION": "ieee" if dtype == "fp32" else "tf32", "UPCAST": False}
    fixed |= {"stride_xd": 1, "stride_wd": 1}
    if not switches.get("SMOOTHING", True):
        fixed |= {key: None for key in ("v_ptr", "v_sum_ptr", "smooth_ptr", "g_smooth_ptr")}
    signature, constants, attributes = {}, {}, {}
    for position, argument in enumerate(function.arg_names):
        if argument in fixed:
            signature[argument], constants[(position,)] = "constexpr", fixed[argument]
        elif argument.endswith("_ptr"):
            kind = (
                dtype
                if argument in OPERANDS
                else "i64"
                if argument in INDICES
                else "i8"
                if argument == "far_ptr"
                else "fp32"
            )
            signature[argument], attributes[(position,)] = f"*{kind}", [["tt.divisibility", 16]]
        elif argument == "eps":
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.startswith("stride") or argument in ("D", "classes_per_split"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[arch]), options=options)
    registers, spills, text = None, 0, ""
    if arch == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    else:
        text = compiled.asm["ptx"]
        registers, spills = _resource_usage(compiled.asm["cubin"])
    variant = "+".join(key.lower() for key, on in switches.items() if on) or "plain"
    matrix = len(re.findall(MATRIX, text))
    return Cost(name, variant, dtype, arch, compiled.metadata.shared, registers, spills, matrix, products)


def _resource_usage(cubin: bytes) -> tuple[int | None, int]:
    """Registers a thread and bytes of local memory (spills), by the cuobjdump in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", out)
    return int(usage[1]), int(usage[2]) + int(usage[3])


def jobs() -> list[tuple[str, dict[str, bool], str, str]]:
    """Every kernel x switches x dtype x architecture; fp16 alone has a scaled backward."""
    found = []
    for name, (function, _) in kernels().items():
        for switches in variants(function.arg_names):
            for dtype, arch in itertools.product(DTYPES, TARGETS):
                if switches.get("SCALED", False) == (dtype == "fp16") or "SCALED" not in switches:
                    found.append((name, switches, dtype, arch))
    return found


def run_job(job: tuple[str, dict[str, bool], str, str]) -> Cost:
    """Compile one job in this process."""
    name, switches, dtype, arch = job
    function, products = kernels()[name]
    return compile_one(name, function, products, switches, dtype, arch)


def compile_all(workers: int | None = None) -> Iterator[Cost]:
    """Compile every job, in parallel processes."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_job, jobs(), chunksize=4)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON line per compilation")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set; the interpreter compiles nothing. Unset it")
    if not options.json:
        print(
            f"{'kernel':20} {'variant':18} {'dtype':5} {'arch':7} {'registers':>9} {'spills':>7} {'shared':>8} {'matrix':>7}"
        )
    for cost in compile_all():
        if options.json:
            print(json.dumps(asdict(cost)), flush=True)
        else:
            print(f"{cost.kernel:20} {cost.variant:18} {cost.dtype:5} {cost.arch:7} {cost.registers!s:>9} {cost.spills:7d}"
                  f" {cost.shared:8d} {cost.matrix_instructions:7d}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
