"""Peak memory beyond inputs and gradients; on a CPU each baseline in a process of its own.

The figure is

    (peak during the first full-size forward + backward) - (level just before it, inputs made) - (bytes of dX and dW)

and never below zero, so an implementation pays for everything it allocates except its two results, whether or not
they are alive at the peak. On a CPU the level is the process's resident set (VmRSS) and the peak its high-water mark
(VmHWM), which is set back to the level by writing 5 to /proc/self/clear_refs; on a GPU both come from the caching
allocator (``torch.cuda.memory_allocated`` and ``max_memory_allocated``). Libraries are loaded by one call on a toy
head before the level is read; a baseline that compiles is called once at full size instead. Freed memory is handed
back to the system before the level is read, so that no baseline works in what an earlier call left behind.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.baselines import REGISTRY, Baseline
from benchmarks.workloads import DTYPES, Inputs, Workload, make_inputs

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
WORKER_SECONDS = 1800


class NoMemoryFigureError(RuntimeError):
    """This system cannot measure what was asked; the message says why."""


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise NoMemoryFigureError(f"{STATUS} has no {field}: peak memory on a CPU is measured on Linux")


def _give_back_freed_memory() -> None:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library: its freed memory stays in the level
        ctypes.CDLL(None).malloc_trim(0)


def peak_beyond(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which ``call`` raises this process's peak above its level before the call; its result is kept alive."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not STATUS.exists():
            raise NoMemoryFigureError("no /proc here: peak memory on a CPU is measured on Linux")
        _give_back_freed_memory()
        try:
            CLEAR_REFS.write_text("5")
        except OSError as error:
            raise NoMemoryFigureError(
                f"{CLEAR_REFS} cannot be written, so the peak cannot be reset: {error}"
            ) from error
        level = _resident("VmRSS")
        kept = call()
        peak = _resident("VmHWM")
    del kept
    return max(0, peak - level)


def _step(baseline: Baseline, inputs: Inputs, exponent: float) -> Callable[[], tuple[torch.Tensor, ...]]:
    def call() -> tuple[torch.Tensor, ...]:
        loss = baseline(inputs.x, inputs.w, inputs.target, exponent)
        return torch.autograd.grad(loss, (inputs.x, inputs.w))

    return call


def measure_on_gpu(baseline: Baseline, workload: Workload, inputs: Inputs) -> int:
    """The figure on a GPU, where the allocator's own count needs no fresh process; after a first call of the baseline."""
    gc.collect()
    return max(0, peak_beyond(_step(baseline, inputs, workload.exponent), "cuda") - workload.gradient_bytes)


def measure_here(baseline: Baseline, workload: Workload) -> int:
    """The figure for one baseline, in this process; meaningful only in a fresh one."""
    inputs = make_inputs(workload, baseline.loss)
    step = _step(baseline, inputs, workload.exponent)
    if baseline.compiles:
        step()
    else:
        dtype = DTYPES[workload.dtype]
        x = torch.randn(4, 32, dtype=dtype, device=workload.device, requires_grad=True)
        w = torch.randn(64, 32, dtype=dtype, device=workload.device, requires_grad=True)
        target = torch.arange(4, device=workload.device)
        _step(baseline, Inputs(x, w, target), workload.exponent)()
    return max(0, peak_beyond(step, workload.device) - workload.gradient_bytes)


def measure_in_fresh_process(baseline: Baseline, workload: Workload, threads: int) -> tuple[int | None, str | None]:
    """(bytes, None), or (None, why not)."""
    order = {"baseline": baseline.name, "workload": workload.as_dict(), "threads": threads}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=WORKER_SECONDS,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # nothing is timed: leave the cores to others
            cwd=Path(__file__).resolve().parent.parent,
        )
    except subprocess.TimeoutExpired:
        return None, f"one step took longer than {WORKER_SECONDS} s"
    if done.returncode < 0:
        return None, f"killed by signal {-done.returncode} (9 is usually: out of memory)"
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        complaint = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None, f"exit status {done.returncode}: {complaint}"
    answer = json.loads(lines[-1])
    return answer["bytes"], answer["reason"]


def _worker(order: str) -> None:
    spec = json.loads(order)
    torch.set_num_threads(spec["threads"])
    workload = Workload(**spec["workload"])
    answer: dict[str, int | str | None]
    try:
        answer = {"bytes": measure_here(REGISTRY[spec["baseline"]], workload), "reason": None}
    except NoMemoryFigureError as error:
        answer = {"bytes": None, "reason": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _worker(sys.argv[1])
