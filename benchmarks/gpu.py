"""Everything to run once on a GPU machine, in one call of under ten minutes: ``python -m benchmarks.gpu``.

Verification against fp64, the benchmarks at GPT-2's and Llama-3-8B's heads, the two strategies side by side, a profile,
hardware counters of the slowest kernels and the memory checker; all of it under one folder of benchmarks/results.
``--tiny`` is the rehearsal for a machine without a GPU: the same steps on tiny shapes, the kernels through the Triton
interpreter, nothing measured. It reports what it finds and expects no figure.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe
from benchmarks.runs import RESULTS

BUDGET_SECONDS = 580
NO_GPU = "no GPU: nothing measured on a GPU"


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # words after "python", or a program and its words
    seconds: int  # its own limit
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None = None
    optional: bool = False  # its failure is reported and fails nothing: the machine may not allow it


def _verify(shapes: Sequence[str], dtypes: Sequence[str]) -> tuple[str, ...]:
    """The fused backends alone: the dense reference holds N x V x D in its backward."""
    named = (("--backend", ("triton", "torch")), ("--shape", shapes), ("--dtype", dtypes))
    return ("-m", "harmonic_triton", "verify", *(word for flag, values in named for v in values for word in (flag, v)))


STRATEGIES = ("--baselines", "ours_triton", "ours_triton_chunks", "ours_triton_recompute", "ours_lce_triton")


def steps(tiny: bool, folder: Path) -> list[Step]:
    """What is run, in order; the limits of the steps add up to the budget."""
    out = ("--out", str(folder))
    return _rehearsal(out) if tiny else _measurement(out)


def _rehearsal(out: Sequence[str]) -> list[Step]:
    interpreter = {"TRITON_INTERPRET": "1"}
    bench = ("-m", "benchmarks", "--workload", "tiny", "--device", "cpu", "--repeats", "2", "--n", "32", *out)
    named = ("--baselines", "ours_triton", "ours_lce_triton", "ours_torch", "ours_lce_torch", "liger", "cross_entropy")
    return [
        Step("doctor", ("-m", "harmonic_triton", "doctor"), 30, interpreter),
        Step("verify", _verify(["12x200x70"], ["fp32", "bf16"]), 180, interpreter),
        Step("benchmarks-tiny", (*bench, *named), 150, interpreter),
        Step("strategies-tiny", (*bench, "--dtype", "bf16", "--inputs", "trained", *STRATEGIES), 150, interpreter),
        Step("profile-tiny", ("-m", "benchmarks.profiling", "--workload", "tiny", "--n", "64"), 60),
        Step("counters", (), 0, skip=f"ncu reads GPU counters; {NO_GPU}"),
        Step("memcheck", (), 0, skip=f"compute-sanitizer checks GPU kernels; {NO_GPU}"),
    ]


def _measurement(out: Sequence[str]) -> list[Step]:
    bench = ("-m", "benchmarks", "--device", "cuda", "--dtype", "bf16", *out, "--repeats")
    profiling = ("-m", "benchmarks.profiling", "--n", "8192", "--dtype", "bf16", "--workload")
    small = _verify(["64x64x1000", "33x80x517"], ["bf16", "fp32"])
    sanitizer = _tool("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "python", *small)
    counters = _tool(
        *("ncu", "--set", "basic", "--kernel-name", "regex:forward_kernel|gradient_kernel", "--launch-count", "4"),
        *("python", *profiling, "gpt2"),
    )
    both = ("--workload", "gpt2", "llama-3-8b")
    return [
        Step("doctor", ("-m", "harmonic_triton", "doctor"), 20),
        Step("verify", _verify(["8192x768x50257", "8192x4096x128256"], ["bf16", "fp16", "fp32"]), 110),
        Step("benchmarks-gpt2", (*bench, "20", "--n", "8192", "--workload", "gpt2"), 110),
        Step("benchmarks-llama-3-8b", (*bench, "20", "--n", "8192", "--workload", "llama-3-8b"), 130),
        Step("strategies", (*bench, "10", "--n", "1024", "4096", "16384", *both, *STRATEGIES), 70),
        Step("profile-gpt2", (*profiling, "gpt2"), 25),
        Step("profile-llama-3-8b", (*profiling, "llama-3-8b"), 25),
        Step("counters", counters, 40, {}, _absent("ncu"), optional=True),
        Step("memcheck", sanitizer, 50, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, _absent("compute-sanitizer")),
    ]


def _tool(name: str, *words: str) -> tuple[str, ...]:
    return (shutil.which(name) or name, *words)


def _absent(name: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not on the PATH: install the CUDA toolkit's"


def run_step(step: Step, folder: Path, seconds_left: float) -> dict[str, Any]:
    """Run one step, its output in ``<name>.log``; its outcome as a record."""
    record: dict[str, Any] = {"step": step.name, "status": "skipped", "reason": step.skip, "seconds": None}
    if step.skip is not None:
        return record
    limit = min(step.seconds, seconds_left)
    if limit <= 0:
        return record | {"reason": f"the {BUDGET_SECONDS} s of this call were spent"}
    words = step.command if step.command[0] != "-m" else ("python", *step.command)
    started = time.perf_counter()
    log = folder / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable if word == "python" else word for word in words],
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
            outcome = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the step and what it started
            process.wait()
            outcome = f"stopped after {limit:.0f} s"
    record.update(status=outcome, seconds=round(time.perf_counter() - started, 1))
    if outcome != "ok":
        record["reason"] = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parse.add_argument("--tiny", action="store_true", help="rehearse on tiny shapes through the Triton interpreter")
    parse.add_argument("--out", type=Path, default=RESULTS, help="where its folder goes (default benchmarks/results)")
    arguments = parse.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.tiny:
        print("python -m benchmarks.gpu: torch finds no CUDA GPU here: rehearse with --tiny", file=sys.stderr)
        return 2
    machine = describe("cuda" if cuda else "cpu")
    label = "tiny" if arguments.tiny else "gpu"
    folder = (arguments.out / f"{machine['time'].replace(':', '').replace('-', '')}-{label}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    measured = cuda and not arguments.tiny
    note = None if measured else NO_GPU if not cuda else "--tiny: nothing measured on this GPU"
    started = time.perf_counter()
    records = []
    planned = steps(arguments.tiny, folder)
    for step in planned:
        print(f"[{time.perf_counter() - started:6.1f} s] {step.name} ...", flush=True)
        record = run_step(step, folder, BUDGET_SECONDS - (time.perf_counter() - started))
        records.append(record)
        print(f"[{time.perf_counter() - started:6.1f} s] {step.name}: {record['status']} {record['reason'] or ''}")
    (folder / "summary.json").write_text(
        json.dumps({"machine": machine, "note": note, "steps": records}, indent=2) + "\n"
    )
    for log in sorted(folder.glob("*.log")):
        print(f"\n--- {log.name}\n{log.read_text()}")
    if note is not None:
        print(note)
    optional = {step.name for step in planned if step.optional}
    bad = [r["step"] for r in records if r["status"] not in ("ok", "skipped") and r["step"] not in optional]
    print(f"not ok: {', '.join(bad)}" if bad else "every step that ran ended well")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
