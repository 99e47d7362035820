"""Peak memory of a head beyond inputs and gradients; on a CPU each baseline in a process of its own.

The figure is

    (peak of the first full-size forward + backward, harmonic_triton/tools/memory.py) - (bytes of dX and dW)

so an implementation pays for everything it allocates except its two results, whether or not they are alive at the peak.
Libraries are loaded by one call on a toy head before; a baseline that compiles is called once at full size instead.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import workers
from benchmarks.baselines import REGISTRY, Baseline
from benchmarks.workloads import DTYPES, Inputs, Workload, make_inputs
from harmonic_triton.tools.memory import NoMemoryFigureError, peak_beyond


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
    asked = {"baseline": baseline.name, "workload": workload.as_dict(), "threads": threads}
    quiet = {"OMP_WAIT_POLICY": "passive"}  # nothing is timed: leave the cores to others
    answer, reason = workers.Worker("head_memory", asked, environment=quiet).answer()
    return (None, reason) if answer is None else (answer["bytes"], answer["reason"])


def _work(asked: dict[str, Any]) -> dict[str, int | str | None]:
    torch.set_num_threads(asked["threads"])
    workload = Workload(**asked["workload"])
    try:
        return {"bytes": measure_here(REGISTRY[asked["baseline"]], workload), "reason": None}
    except NoMemoryFigureError as error:
        return {"bytes": None, "reason": str(error)}


if __name__ == "__main__":
    workers.reply(_work(workers.order()))
