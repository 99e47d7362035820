"""Tiles for this GPU: ``python -m benchmarks.autotune --workload gpt2 --dtype bf16`` measures candidates and stores the best.

Candidates that spill registers or exceed the shared memory are rejected by ahead-of-time compilation, which needs no GPU
(``--static sm90`` lists what remains and stores nothing). The others run forward and backward by both strategies; the
fastest sum of medians goes to the file that ``harmonic_triton/fused/triton/tile_configs.py`` describes, for this architecture,
dtype and bucket of D. Nothing tunes by itself: a call takes what the file or the package's own table holds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from benchmarks import UsageError, static_cost
from benchmarks.workloads import DTYPES, MODELS

if TYPE_CHECKING:
    from harmonic_triton.fused.triton.tile_configs import TileConfig

SPACE = {
    "block_n": (64, 128),
    "block_v": (64, 128, 256),
    "block_d": (32, 64),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
SPILLS = 256  # bytes of a thread: some registers wait outside of the loop over the features, once a tile
MODES: tuple[dict[str, bool], ...] = (
    {"KEEP": True},
    {"REPAIR": True, "KEEP": True},
    {},
    {"REPAIR": True},
    {"RECOMPUTE": True},
)  # of the scores kernel


def candidates() -> Iterator[TileConfig]:
    """All of SPACE but tiles too small to keep the matrix units busy."""
    from harmonic_triton.fused.triton.tile_configs import TileConfig

    for values in itertools.product(*SPACE.values()):
        config = TileConfig(*values)
        if config.block_n * config.block_v >= 2048 and config.block_n >= 16 * config.num_warps // 2:
            yield config


def rejection(config: TileConfig, dtype: str, arch: str) -> str | None:
    """Why ahead-of-time compilation rejects a configuration; None where it does not."""
    from harmonic_triton.fused.triton.tile_configs import described

    name, tma = "scores_kernel", described(arch, static_cost.DTYPES[dtype])
    function, products = static_cost.kernels()[name]
    for mode in MODES:
        if mode.get("KEEP") and dtype != "bf16":
            continue
        switches = {
            key: mode.get(key, key == "TMA" and tma) for key in static_cost.SWITCHES if key in function.arg_names
        }
        try:
            cost = static_cost.compile_one(name, function, products, switches, dtype, arch, config)
        except Exception as error:  # the compiler's own, of many types
            return f"{name} does not compile: {str(error).splitlines()[0]}"
        if cost.spills > SPILLS:
            return f"{name} {cost.variant} spills {cost.spills} bytes a thread"
        if cost.shared > static_cost.SHARED_LIMIT[arch]:
            return f"{name} {cost.variant} takes {cost.shared} bytes of shared memory"
    return None


def inaccuracy(dtype: torch.dtype) -> float:
    """Largest relative error of dX and dW by both strategies against the torch backend in fp32, on a small shape."""
    import harmonic_triton as ht
    from harmonic_triton.fused import strategy as strategies
    from harmonic_triton.fused.options import BackendName

    x = torch.randn(300, 192, device="cuda").to(dtype)
    w = torch.randn(2000, 192, device="cuda").mul_(0.1).to(dtype)
    target = torch.randint(2000, (300,), device="cuda")

    def gradients(backend: BackendName, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.to(wide).requires_grad_() for tensor in (x, w)]
        loss = ht.linear_harmonic_loss(leaves[0], leaves[1], target, backend=backend, reduction="sum")
        return torch.autograd.grad(loss, leaves)

    worst, wanted = 0.0, gradients("torch", torch.float32)
    for strategy in ("one pass", "recompute"):
        with strategies.force(strategy):
            for got, want in zip(gradients("triton", dtype), wanted, strict=True):
                worst = max(worst, float((got.float() - want).norm() / want.norm()))
    return worst


def milliseconds(tokens: int, width: int, classes: int, dtype: torch.dtype) -> float:
    """Medians of forward and backward, added over the strategies, with the tiles that are stored now."""
    import triton

    import harmonic_triton as ht
    from harmonic_triton.fused import strategy as strategies

    x = torch.randn(tokens, width, device="cuda").to(dtype).requires_grad_()
    w = torch.randn(classes, width, device="cuda").mul_(0.02).to(dtype).requires_grad_()
    target = torch.randint(classes, (tokens,), device="cuda")

    def step() -> None:
        ht.linear_harmonic_loss(x, w, target, backend="triton").backward()

    total = 0.0
    for strategy in ("one pass", "recompute"):
        with strategies.force(strategy):
            total += triton.testing.do_bench(step, warmup=50, rep=200, grad_to_none=[x, w], return_mode="median")
    return total


def tune(tokens: int, width: int, classes: int, dtype: str, arch: str) -> tuple[TileConfig, float]:
    """The fastest candidate on this GPU; it is what the file holds afterwards."""
    from harmonic_triton.fused.triton import tile_configs

    key = tile_configs.key_of(arch, static_cost.DTYPES[dtype], width)
    best: tuple[float, TileConfig] | None = None
    for config in candidates():
        reason = rejection(config, dtype, arch)
        if reason is None:
            tile_configs.store_tuned(key, config)
            error = inaccuracy(DTYPES[dtype])
            if not error <= 4 * torch.finfo(DTYPES[dtype]).eps:
                reason = f"gradients are off by {error:.1e}"
        if reason is None:
            took = milliseconds(tokens, width, classes, DTYPES[dtype])
            print(f"{config}: {took:.3f} ms", flush=True)
            best = min(best or (took, config), (took, config), key=lambda pair: pair[0])
        else:
            print(f"{config}: {reason}", flush=True)
    if best is None:
        raise UsageError(f"every candidate was rejected for {dtype} on {arch}")
    tile_configs.store_tuned(key, best[1])
    return best[1], best[0]


def main(argv: Sequence[str] | None = None) -> int:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.autotune", description=(__doc__ or "").splitlines()[0])
    parse.add_argument("--workload", default="gpt2", choices=MODELS)
    parse.add_argument("--n", type=int, default=8192, help="tokens")
    parse.add_argument("--dtype", default="bf16", choices=DTYPES)
    parse.add_argument("--static", choices=static_cost.TARGETS, help="list what compiles for this architecture; no GPU")
    options = parse.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parse.error("TRITON_INTERPRET=1 is set; the interpreter compiles nothing. Unset it")
    if options.static:
        for config in candidates():
            print(f"{config}: {rejection(config, options.dtype, options.static) or 'ok'}", flush=True)
        return 0
    if not torch.cuda.is_available():
        parse.error("torch finds no GPU here; --static ARCH lists what compiles without one")
    from harmonic_triton.fused.triton import tile_configs

    model, arch = MODELS[options.workload], tile_configs.architecture(torch.device("cuda"))
    config, took = tune(options.n, model.dim, model.classes, options.dtype, arch)
    print(f"stored in {tile_configs.tuned_path()}: {config}, {took:.3f} ms for a step by each strategy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
