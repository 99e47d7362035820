"""Everything to run once on a GPU machine, in one call of under ten minutes: ``python -m benchmarks.gpu``.

In the order of what matters most: the kernels compiled, verification against fp64, the tests that launch kernels, time
and memory at GPT-2's and Llama-3-8B's heads beside the peers that are installed, the bare products, the scores kernel, the
two strategies, a profile; then, in the time that is left and where the machine has them, hardware counters and the memory
checker. Every step is a process with a limit of its own: one that fails, crashes or hangs takes nothing else with it. All of
it goes under one folder of --out: ``summary.json``, written again at every turn, ``log.txt`` with all output as it comes,
and the benchmarks' lines as they are measured. What is not "ok" there makes the exit status 1.

``--tiny`` is the rehearsal for a machine without a GPU: the same steps on tiny shapes, the kernels through the Triton
interpreter, nothing measured. It reports what it finds and expects no figure.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, describe
from benchmarks.runs import RESULTS, name_of
from benchmarks.workloads import DTYPES

BUDGET_SECONDS = 570
GRACE_SECONDS = 5  # between the request to stop and the end: a test run then says what it has seen
TAIL_LINES = 15
NO_GPU = "no GPU: nothing measured on a GPU"
HEADS = {False: {"gpt2": (8192, 768, 50257), "llama-3-8b": (8192, 4096, 128256)}, True: {"tiny": (16, 32, 100)}}


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]  # words after "python", or a program and its words
    seconds: int  # its own limit
    environment: dict[str, str] = field(default_factory=dict)
    skip: str | None = None
    optional: bool = False  # runs in what time is left, and its failure fails nothing: the machine may not allow it


# --- what is run ------------------------------------------------------------------------------------------------------

STRATEGIES = ("--baselines", "ours_triton", "ours_triton_one_pass", "ours_triton_recompute", "ours_lce_triton")


def steps(tiny: bool, folder: Path) -> list[Step]:
    """What is run, in order; the limits of the steps that are not optional add up to the budget."""
    out = ("--out", str(folder))
    return _rehearsal(out) if tiny else _measurement(out)


def _rehearsal(out: Sequence[str]) -> list[Step]:
    interpreter = {"TRITON_INTERPRET": "1"}
    bench = ("-m", "benchmarks", "--workload", "tiny", "--device", "cpu", "--repeats", "2", "--n", "32", *out)
    named = ("--baselines", "ours_triton", "ours_lce_triton", "ours_torch", "ours_lce_torch", "liger", "cross_entropy")
    return [
        Step("doctor", ("-m", "harmonic_triton", "doctor"), 30, interpreter),
        Step("compile", ("-m", "benchmarks.gpu", "compile", "--tiny"), 90, interpreter),
        Step("verify", _verify(["12x200x70"], ["fp32", "bf16"]), 110, interpreter),
        Step("tests", _tests("tests/test_triton.py", "-k", "bad_token"), 60, interpreter, _missing("pytest")),
        Step("benchmarks-tiny", (*bench, *named), 95, interpreter),
        Step("products", ("-m", "benchmarks.gpu", "products", "--tiny"), 15),
        Step("scores", ("-m", "benchmarks.gpu", "scores", "--tiny"), 20, interpreter),
        Step("strategies-tiny", (*bench, "--dtype", "bf16", "--inputs", "trained", *STRATEGIES), 95, interpreter),
        Step("profile-tiny", ("-m", "benchmarks.profiling", "--workload", "tiny", "--n", "64"), 50),
        Step("counters", (), 0, skip=f"ncu reads GPU counters; {NO_GPU}", optional=True),
        Step("memcheck", (), 0, skip=f"compute-sanitizer checks GPU kernels; {NO_GPU}", optional=True),
    ]


def _measurement(out: Sequence[str]) -> list[Step]:
    bench = ("-m", "benchmarks", "--device", "cuda", "--dtype", "bf16", *out, "--repeats")
    profiling = ("-m", "benchmarks.profiling", "--n", "8192", "--dtype", "bf16", "--workload")
    small = _verify(["64x64x1000", "33x80x517"], ["bf16", "fp32"])
    sanitizer = _tool("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "python", *small)
    counters = _tool(
        *("ncu", "--set", "basic", "--kernel-name", "regex:scores_kernel", "--launch-count", "4"),
        *("python", *profiling, "gpt2"),
    )
    both = ("--workload", "gpt2", "llama-3-8b")
    shapes = ["x".join(map(str, shape)) for shape in HEADS[False].values()]
    return [
        Step("doctor", ("-m", "harmonic_triton", "doctor"), 20),
        Step("compile", ("-m", "benchmarks.gpu", "compile"), 100),
        Step("verify", _verify(shapes, ["bf16", "fp16", "fp32"]), 90),
        Step("tests", _tests("tests"), 95, skip=_missing("pytest") or _missing("hypothesis")),
        Step("benchmarks-gpt2", (*bench, "10", "--n", "8192", "--workload", "gpt2"), 60),
        Step("benchmarks-llama-3-8b", (*bench, "10", "--n", "8192", "--workload", "llama-3-8b"), 70),
        Step("products", ("-m", "benchmarks.gpu", "products"), 25),
        Step("scores", ("-m", "benchmarks.gpu", "scores"), 25),
        Step("strategies", (*bench, "5", "--n", "1024", "4096", "16384", *both, *STRATEGIES), 45),
        Step("profile-gpt2", (*profiling, "gpt2"), 20),
        Step("profile-llama-3-8b", (*profiling, "llama-3-8b"), 20),
        Step("counters", counters, 40, {}, _absent("ncu"), optional=True),
        Step("memcheck", sanitizer, 60, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, _absent("compute-sanitizer"), True),
    ]


def _verify(shapes: Sequence[str], dtypes: Sequence[str]) -> tuple[str, ...]:
    """The fused backends alone: the dense reference holds N x V x D in its backward."""
    named = (("--backend", ("triton", "torch")), ("--shape", shapes), ("--dtype", dtypes))
    return ("-m", "harmonic_triton", "verify", *(word for flag, values in named for v in values for word in (flag, v)))


def _tests(*words: str) -> tuple[str, ...]:
    """Those that launch kernels, a line each: what was seen is there also where it has to be stopped."""
    spread = ("-n", "8") if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else ()
    return ("-m", "pytest", "-m", "triton and not slow", "-v", "--tb=short", "-p", "no:cacheprovider", *spread, *words)


def _tool(name: str, *words: str) -> tuple[str, ...]:
    return (shutil.which(name) or name, *words)


def _absent(name: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not on the PATH: install the CUDA toolkit's"


def _missing(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


# --- three steps of its own ---------------------------------------------------------------------------------------------


def compile_kernels(tiny: bool) -> int:
    """Every kernel that the heads need, into Triton's cache on disk: one process for each dtype and loss."""
    jobs = list(itertools.product(["bf16", "fp16", "fp32"], ["harmonic", "cross_entropy"], [tiny]))
    workers = min(len(jobs), os.cpu_count() or 1)
    failed = 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, *job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                print(f"{job[0]} {job[1]}: {future.result():.1f} s", flush=True)
            except Exception as error:
                failed += 1
                print(f"{job[0]} {job[1]}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


def _compile(dtype: str, loss: str, tiny: bool) -> float:
    """Seconds for calls of few tokens, a multiple of 16 as the many are: that and the rest of the shape is what is compiled."""
    import harmonic_triton as ht
    from harmonic_triton.fused import strategy as strategies

    started, device = time.perf_counter(), "cpu" if tiny else "cuda"
    function: Callable[..., torch.Tensor] = ht.linear_harmonic_loss if loss == "harmonic" else ht.linear_cross_entropy
    for n, width, classes in HEADS[tiny].values():
        x, w = (torch.randn(k, width, dtype=DTYPES[dtype], device=device) for k in (min(n, 64), classes))
        target = torch.arange(len(x), device=device)
        for strategy in ("one pass", "recompute"):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            with strategies.force(strategy):
                function(*leaves, target, backend="triton").backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


CHUNKS = (
    4096,
    5632,
    8192,
)  # tokens whose products are tried: whole waves of 128 x 256 tiles on 132 multiprocessors, or not
STAGES = (3, 4)  # of the scores kernel


def measure_products(tiny: bool) -> int:
    """Rates of the library's three products of a head, with fp32 results as the backends take them.

    Those of one pass at several chunks of tokens, and with the 8 columns of ``unscale`` inside of dW's product.
    """
    device = "cpu" if tiny else "cuda"
    for (name, (n, d, v)), dtype in itertools.product(HEADS[tiny].items(), ["fp32"] if tiny else ["bf16", "fp32"]):
        kind = DTYPES[dtype]
        for tokens in (n,) if tiny or dtype == "fp32" else CHUNKS:
            shapes = {"x w^T": ((tokens, d), (d, v)), "A w": ((tokens, v), (v, d)), "A^T x": ((v, tokens), (tokens, d))}
            if dtype == "bf16" or tiny:
                shapes |= {"A^T [x, c]": ((v, tokens), (tokens, d + 8)), "A^T c": ((v, tokens), (tokens, 8))}
            for product, (left_shape, right_shape) in shapes.items():
                turned = product.startswith("A^T")
                left = torch.randn(left_shape[::-1] if turned else left_shape, dtype=kind, device=device)
                right = torch.randn(right_shape, dtype=kind, device=device)
                if product == "x w^T":
                    right = torch.randn(right_shape[::-1], dtype=kind, device=device).t()
                left = left.t() if turned else left
                seconds = min(_seconds(left, right) for _ in range(5))
                rate = 2e-12 * left.numel() * right.shape[1] / seconds
                print(
                    f"{name} {dtype} {tokens} tokens, {product}: {1e3 * seconds:.3f} ms, {rate:.1f} TFLOP/s", flush=True
                )
                del left, right
    return 0


def measure_scores(tiny: bool) -> int:
    """The scores kernel alone: one pass, forward and recompute's, with 3 and 4 stages; its product without what follows it.

    One pass less *product alone* is what the epilogue costs; *product alone* less the library's is what our product does.
    """
    import triton

    from benchmarks.bare_product import launch_product
    from harmonic_triton.fused.problem import Operands
    from harmonic_triton.fused.triton import launch, tile_configs

    device = "cpu" if tiny else "cuda"
    for (name, (n, d, v)), dot in itertools.product(HEADS[tiny].items(), (False, True)):
        x, w = (torch.randn(k, d, device=device).mul_(0.02).to(torch.bfloat16) for k in (n, v))
        target, exponent = torch.randint(v, (n,), device=device), None if dot else torch.tensor(d**0.5, device=device)
        call = launch.Launch(Operands(x, w, target, exponent, None), target >= 0, 0.0).measure()
        entries = x.new_empty((n, -(-v // 64) * 64))[:, :v]
        tiles = -(-v // call.config.block_v)
        near, p_sum = launch.vectors(x, 2, tiles * n)
        index = x.new_empty((tiles, n), dtype=torch.int32)
        sums = x.new_empty((2, tiles, n), dtype=torch.float32)
        rival, (p_coef, v_coef, log_norm) = target.roll(1), launch.vectors(x, 3, n).zero_()
        modes = {
            "forward": (None, (None,) * 6, (near, index, p_sum, None, None, None), {}),
            "one pass": (entries, (None,) * 6, (near, index, p_sum, None, None, sums), {"KEEP": True}),
            "recompute": (
                entries,
                (None, None, rival, p_coef, v_coef, log_norm),
                (*(None,) * 5, sums),
                {"RECOMPUTE": True},
            ),
        }
        off = {"KEEP": False, "REPAIR": False, "RECOMPUTE": False, "WANT_SCORES": False}
        runs: dict[str, Callable[[], None]] = {
            mode: functools.partial(launch.launch_scores, call, a, 0, v, inputs, out, **off | on)
            for mode, (a, inputs, out, on) in modes.items()
        }
        runs["product alone"] = functools.partial(launch_product, call, p_sum.view(tiles, n))
        for (mode, run), stages in itertools.product(runs.items(), STAGES):
            call.tile["num_stages"] = stages
            loss, said = "cross-entropy" if dot else "harmonic", "ran"
            try:
                run()
                if not tiny:
                    milliseconds = triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")
                    said = f"{milliseconds:.3f} ms, {2e-9 * n * d * v / milliseconds:.1f} TFLOP/s of its product"
            except triton.runtime.errors.OutOfResources as error:
                said = str(error)
            print(f"{name} {loss} {mode}, {stages} stages, {tile_configs.parts(call.config)} parts: {said}", flush=True)
    return 0


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    if left.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    if left.dtype == torch.float32:
        torch.mm(left, right)
    else:
        torch.mm(left, right, out_dtype=torch.float32)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


# --- running and recording --------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """This process was asked to end."""


def run_step(step: Step, folder: Path, seconds_left: float) -> dict[str, Any]:
    """Run one step, its output at the end of ``log.txt``; its outcome as a record."""
    record: dict[str, Any] = {"step": step.name, "status": "skipped", "reason": step.skip, "seconds": None}
    if step.skip is not None:
        return record
    limit = min(step.seconds, seconds_left - GRACE_SECONDS)
    if limit <= 0:
        return record | {
            "status": "skipped" if step.optional else "not reached",
            "reason": "the time was spent before it",
        }
    words = [sys.executable, *step.command] if step.command[0] == "-m" else list(step.command)
    words = [sys.executable if word == "python" else word for word in words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    started = time.perf_counter()
    with (folder / "log.txt").open("a+b") as log:
        log.write(f"\n=== {step.name}: {' '.join(words)}\n".encode())
        log.flush()
        begin, outcome = log.tell(), "ok"
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return record | {"status": "failed", "reason": str(error)}
        try:
            status = process.wait(timeout=limit)
            outcome = "ok" if status == 0 else f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:
            _end(process, GRACE_SECONDS if outcome.startswith("stopped") else 0)
            log.seek(begin)
            tail = log.read().decode(errors="replace").strip().splitlines()[-TAIL_LINES:]
            record |= {"status": outcome, "seconds": round(time.perf_counter() - started, 1), "tail": tail}
    if outcome != "ok":
        record["reason"] = (tail or ["it printed nothing"])[-1]
    return record


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a step and what it started."""
    for number, patience in ((signal.SIGINT, grace), (signal.SIGKILL, 5.0)):
        try:
            if patience:
                os.killpg(process.pid, number)
                process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _write(folder: Path, summary: dict[str, Any]) -> None:
    """In place of the last one, never half of it."""
    beside = folder / "summary.json.new"
    beside.write_text(json.dumps(summary, indent=2) + "\n")
    beside.replace(folder / "summary.json")


def run_all(planned: Sequence[Step], folder: Path, facts: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """Run the steps; what is known so far is on disk before and after each."""
    started = time.perf_counter()
    records: list[dict[str, Any]] = [
        {"step": step.name, "status": "not reached", "reason": None, "seconds": None} for step in planned
    ]
    try:
        for at, step in enumerate(planned):
            print(f"[{time.perf_counter() - started:6.1f} s] {step.name} ...", flush=True)
            records[at] = {"step": step.name, "status": "running", "reason": None, "seconds": None}
            _write(folder, facts | {"steps": records})
            records[at] = run_step(step, folder, budget - (time.perf_counter() - started))
            for made in (*folder.glob("*.md"), *folder.glob("*.png")):  # python -m benchmarks report makes them again
                made.unlink()
            said = records[at].get("tail", [])[-1 if records[at]["status"] == "ok" else -TAIL_LINES :]
            print(f"[{time.perf_counter() - started:6.1f} s] {step.name}: {records[at]['status']}", flush=True)
            print("".join(f"    {line}\n" for line in said), end="", flush=True)
    except (Stopped, KeyboardInterrupt):
        running = next((record for record in records if record["status"] == "running"), None)
        if running is not None:
            running |= {"status": "stopped", "reason": "this script was asked to end"}
    finally:
        _write(folder, facts | {"seconds": round(time.perf_counter() - started, 1), "steps": records})
    return records


def stop(*_: object) -> None:
    raise Stopped


def _machine(device: str) -> dict[str, Any]:
    try:
        return describe(device)
    except Exception as error:  # a GPU that does not answer is what the record is to say
        return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "error": f"{type(error).__name__}: {error}"}


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parse.add_argument(
        "part", nargs="?", choices=("compile", "products", "scores"), help="one step of its own, in this process"
    )
    parse.add_argument("--tiny", action="store_true", help="rehearse on tiny shapes through the Triton interpreter")
    parse.add_argument("--out", type=Path, default=RESULTS, help="where its folder goes (default benchmarks/results)")
    parse.add_argument(
        "--seconds", type=float, default=BUDGET_SECONDS, help=f"for everything (default {BUDGET_SECONDS})"
    )
    arguments = parse.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.tiny:
        print("python -m benchmarks.gpu: torch finds no CUDA GPU here: rehearse with --tiny", file=sys.stderr)
        return 2
    if arguments.part is not None:
        return {"compile": compile_kernels, "products": measure_products, "scores": measure_scores}[arguments.part](
            arguments.tiny
        )
    machine = _machine("cuda" if cuda else "cpu")
    label = "tiny" if arguments.tiny else "everything"
    folder = (arguments.out / name_of("gpu", "cuda" if cuda else "cpu", label, machine["time"])).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    note = None if cuda and not arguments.tiny else NO_GPU if not cuda else "--tiny: nothing measured on this GPU"
    planned = steps(arguments.tiny, folder)
    signal.signal(signal.SIGTERM, stop)
    records = run_all(planned, folder, {"machine": machine, "note": note}, arguments.seconds)
    for record in records:
        seconds = "" if record["seconds"] is None else f"{record['seconds']:.1f} s"
        print(f"{record['step']:24} {seconds:>8}  {record['status']}  {record['reason'] or ''}")
    if note is not None:
        print(note)
    optional = {step.name for step in planned if step.optional}
    bad = [r["step"] for r in records if r["status"] not in ("ok", "skipped") and r["step"] not in optional]
    print(f"not ok: {', '.join(bad)}" if bad else "every step that ran ended well")
    print(f"the record is in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
