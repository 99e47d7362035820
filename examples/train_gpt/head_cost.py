"""Time and peak memory of one head, forward and backward, measured in a process of its own.

``python -m examples.train_gpt.head_cost '{"head": "harmonic", ...}'`` prints one measurement as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import harmonic_triton as ht
from harmonic_triton.reference import authors_loss
from harmonic_triton.tools.memory import Peak

ROOT = Path(__file__).resolve().parents[2]
HEADS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Any]] = {
    "harmonic": lambda x, w, target, n: ht.linear_harmonic_loss(x, w, target, n=n),
    "cross_entropy": lambda x, w, target, n: F.cross_entropy(F.linear(x, w), target),
    "authors": lambda x, w, target, n: authors_loss(x, w, target, n / 2),
}
PROCESSES = 3
TIMINGS = 5


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one head: ``ms`` is the fastest of TIMINGS passes, ``bytes`` the peak of the first beyond x, W, dX and dW."""
    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    loss = HEADS[spec["head"]]

    def inputs(tokens: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, spec["width"], device=device).requires_grad_()
        w = torch.randn(classes, spec["width"], device=device).requires_grad_()
        return x, w, torch.randint(classes, (tokens,), device=device)

    def run(x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, getattr(torch, spec["dtype"]), enabled=spec["dtype"] != "float32"):
            value = loss(x, w, target, spec["n"])
        out = torch.autograd.grad(value, (x, w))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    run(*inputs(16, 64))  # libraries and threads are up before memory is counted
    x, w, target = inputs(spec["tokens"], spec["classes"])
    peak = Peak(device)
    gradients = run(x, w, target)
    extra = peak.beyond() - sum(g.numel() * g.element_size() for g in gradients)
    del gradients
    times = []
    for _ in range(TIMINGS):
        start = time.perf_counter()
        run(x, w, target)
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * min(times), "bytes": max(0, extra), "method": peak.method}


def compare(shape: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every head at one shape, each PROCESSES times in turn: the fastest time and the median of the peaks."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    results: dict[str, list[dict[str, Any]]] = {head: [] for head in HEADS}
    for _ in range(PROCESSES):
        for head in HEADS:
            command = [sys.executable, "-m", __name__, json.dumps({"head": head, **shape})]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:  # a dense head may not fit in memory
                reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                results[head].append({"error": reason})
            else:
                results[head].append(json.loads(done.stdout))
    return {head: summary(runs) for head, runs in results.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest time, which another program's load disturbs least, and the median peak; or the first error."""
    for run in runs:
        if "error" in run:
            return run
    peak = statistics.median(run["bytes"] for run in runs)
    return {"ms": min(run["ms"] for run in runs), "bytes": peak, "method": runs[0]["method"]}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
