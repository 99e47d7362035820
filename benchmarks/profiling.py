"""Where the time of ours goes, forward + backward: ``python -m benchmarks.profiling --workload gpt2 --n 8192``."""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import UsageError
from benchmarks.baselines import REGISTRY
from benchmarks.gate import answer
from benchmarks.workloads import Workload, make_inputs

OURS = {"harmonic": "ours_", "cross_entropy": "ours_lce_"}


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parse.add_argument("--workload", default="gpt2")
    parse.add_argument("--n", type=int, default=2048)
    parse.add_argument("--dtype", default="fp32")
    parse.add_argument("--loss", choices=OURS, default="harmonic")
    arguments = parse.parse_args(argv)
    cuda = torch.cuda.is_available()
    try:
        workload = Workload(arguments.workload, arguments.n, arguments.dtype, device="cuda" if cuda else "cpu")
    except UsageError as error:
        print(f"python -m benchmarks.profiling: {error}", file=sys.stderr)
        return 2
    baseline = REGISTRY[OURS[arguments.loss] + ("triton" if cuda else "torch")]
    reason = baseline.unavailable(workload.device, workload.dtype)
    if reason is not None:
        print(f"{baseline.name} cannot be profiled: {reason}", file=sys.stderr)
        return 1
    inputs = make_inputs(workload, baseline.loss)
    answer(baseline, inputs, workload.exponent)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as taken:
        answer(baseline, inputs, workload.exponent)
        if cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(f"{baseline.name}: {workload}")
    averages = taken.key_averages()
    print(averages.table(sort_by=order, row_limit=15, max_name_column_width=60))
    slowest = max(averages, key=lambda event: getattr(event, order))
    share = getattr(slowest, order) / sum(getattr(event, order) for event in averages)
    print(f"slowest: {slowest.key}, {share:.0%} of the time, {slowest.count} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
