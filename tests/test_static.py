"""The kernels compile ahead of time, without a GPU, for every architecture we store a configuration for.

The compiler is driven by ``benchmarks.static_cost`` in a process of its own: in this one the kernels may belong to the
interpreter, which compiles nothing.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fresh
import pytest
import torch

import harmonic_triton as ht
from benchmarks import autotune, static_cost
from harmonic_triton.fused import strategy as strategies
from harmonic_triton.fused.problem import Operands

configs = pytest.importorskip("harmonic_triton.fused.triton.tile_configs")  # needs triton

ROOT = Path(__file__).parent.parent
# Bytes of stack of a tile's program: registers that wait for the sums, outside of the loop over the features. The most
# is Triton 3.6's, 728 for one pass over a transposed W.
PARKED = 768
FEW = 128  # of those where descriptors copy and a mean is taken, which are to be fast
REGISTERS = {"sm80": 255, "sm90": 255, "sm100": 255, "gfx942": 512}


def entry_kernels() -> set[str]:
    """Names of the heads' kernels, from its source alone: ``@triton.jit`` functions that no other one calls."""
    compiled, called = set(), set()
    for path in (ROOT / "harmonic_triton" / "fused").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
                compiled.add(function.name)
                called |= {node.func.id for node in ast.walk(function)
                           if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
    return compiled - called


def test_every_kernel_is_covered():
    """A kernel that static_cost does not find is not compiled below."""
    assert entry_kernels() == set(static_cost.kernels()) != set()


def test_every_stored_configuration_is_covered():
    """CONFIGS x switches x dtypes: what is stored for a GPU is what is compiled."""
    stored = {(arch, size) for arch, size in configs.CONFIGS if arch != "interpreter"}
    assert stored == {(arch, size) for arch in static_cost.TARGETS for size in set(static_cost.DTYPES.values())}
    assert set(static_cost.SHARED_LIMIT) == set(static_cost.TARGETS) == set(REGISTERS)
    jobs = {(name, dtype, arch) for name, _, dtype, arch in static_cost.jobs()}
    wanted = len(static_cost.kernels()) * len(static_cost.DTYPES) * len(static_cost.TARGETS)
    assert len(jobs) == wanted


@pytest.mark.slow  # one to three minutes each where nothing else runs; a few of the builds are in the tests below
@pytest.mark.parametrize("dtype", static_cost.DTYPES)
@pytest.mark.parametrize("arch", static_cost.TARGETS)
def test_compiles_within_limits(arch, dtype):
    """Every kernel x switches at its stored configuration: no spills, matrix instructions, shared memory."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.static_cost", "--json", "--workers=1"]
    command += ["--arch", arch, "--dtype", dtype]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    costs = [static_cost.Cost(**json.loads(line)) for line in run.stdout.splitlines()]
    assert len(costs) == len(static_cost.jobs([arch], [dtype]))
    assert {(cost.arch, cost.dtype) for cost in costs} == {(arch, dtype)}
    by_products = {products: [cost for cost in costs if cost.products == products] for products in (False, True)}
    assert {cost.kernel for cost in by_products[True]} == {"scores_kernel"}
    assert not [cost for cost in costs if cost.spills > PARKED * cost.products]
    assert not [cost for cost in costs if not 0 < cost.registers <= REGISTERS[arch]]
    assert not [cost for cost in costs if cost.shared > static_cost.SHARED_LIMIT[arch]]
    assert not [cost for cost in by_products[True] if cost.matrix_instructions == 0 and cost.dtype != "fp32"]
    # fp32 products stay in fp32: NVIDIA's matrix units would round the operands to tf32, AMD's have fp32 ones
    if arch.startswith("sm"):
        assert not [cost for cost in by_products[True] if cost.matrix_instructions and cost.dtype == "fp32"]


SCORES = dict.fromkeys(("DOT", "BIAS", "CAP", "WANT_SCORES", "SMOOTHING", "KEEP", "REPAIR", "RECOMPUTE"), False)


def compiled(program: str) -> list[str]:
    """What a program prints that compiles kernels, in a process of its own."""
    program = f"from benchmarks import static_cost\nSCORES = {SCORES}\n" + textwrap.dedent(program)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(program, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.splitlines()


@pytest.mark.slow
def test_one_pass_compiles_within_limits():
    """For 16-bit operands on every architecture, with descriptors where those are; on one also with a learnable n."""
    lines = compiled("""
        import dataclasses, json
        for arch, learnable in (*((arch, False) for arch in static_cost.TARGETS), ("sm90", True)):
            switches = {**SCORES, "KEEP": True, "TMA": arch in ("sm90", "sm100"), "WANT_SCORES": learnable}
            print(json.dumps(dataclasses.asdict(static_cost.run_job(("scores_kernel", switches, "bf16", arch)))))
        """)
    costs = [static_cost.Cost(**json.loads(line)) for line in lines]
    assert len(costs) == len(static_cost.TARGETS) + 1
    for cost in costs:
        assert cost.spills <= (FEW if cost.arch == "sm90" else PARKED), cost
        assert 0 < cost.registers <= REGISTERS[cost.arch], cost
        assert cost.shared <= static_cost.SHARED_LIMIT[cost.arch] and cost.matrix_instructions, cost


def test_instructions_of_an_entry():
    """What a thread executes for each of the N V entries at D = 768 on sm_90: the products take 0.8 ms, 29 of these as long."""
    lines = compiled("""
        from benchmarks import inner_loops
        for dot in (False, True):
            cost = static_cost.run_job(("scores_kernel", {**SCORES, "DOT": dot, "KEEP": True, "TMA": True}, "bf16", "sm90"))
            print(sum(inner_loops.Loops(**cost.loops).per_entry(768).values()))
        """)
    harmonic, dot = map(float, lines)
    assert harmonic <= 35
    assert dot <= 24


@pytest.mark.triton
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_the_bare_product_is_that_of_the_scores(layout):
    """Every tile once, whatever the order: several bands of token tiles, the last of each side not full."""
    from benchmarks import bare_product
    from harmonic_triton.fused.triton import launch

    generator = torch.Generator().manual_seed(0)
    tile = configs.CONFIGS["interpreter", 2]
    rows, classes = tile.block_n * configs.GROUP + 41, 2 * tile.block_v + 22
    x, w = (torch.randn(k, 48, generator=generator).bfloat16() for k in (rows, classes))
    if layout == "transposed":
        w = w.t().contiguous().t()
    target = torch.zeros(rows, dtype=torch.int64)
    call = launch.Launch(Operands(x, w, target, None, None), target >= 0, 0.0).measure()
    wanted = torch.stack([(x.double() @ part.double().t()).sum(1) for part in w.split(call.config.block_v)])
    sums = torch.full_like(wanted, float("nan"), dtype=torch.float32)
    bare_product.launch_product(call, sums)
    assert (sums.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_nothing_is_copied_ahead_without_a_fence():
    """The matrix units of sm_90 read shared memory by another way: descriptors wait for themselves, other copies need a
    fence, which Triton leaves out before 3.8; there the loads are synchronous."""
    lines = compiled("""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        for tma in (False, True):
            launch = static_cost.launch_of("scores_kernel", *static_cost.kernels()["scores_kernel"],
                                           {**SCORES, "KEEP": True, "TMA": tma}, "bf16", "sm90")
            source = ASTSource(static_cost.kernels()["scores_kernel"][0], launch.signature, launch.constants, launch.attributes)
            code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options).asm["ptx"]
            print("wgmma" in code, "cp.async.cg" in code or "cp.async.ca" in code, "fence.proxy.async" in code,
                  "cp.async.bulk.tensor" in code)
        """)
    plain, described = ([word == "True" for word in line.split()] for line in lines)
    assert plain[0] and (plain[2] or not plain[1]) and not plain[3]
    assert described[0] and not described[1] and described[3]


def test_products_compile_for_other_amd_gpus():
    """CONFIGS knows one of them; what it asks of the products must not be a speciality of gfx942."""
    program = """if True:
        from benchmarks import static_cost
        from harmonic_triton.fused.triton.tile_configs import CONFIGS
        for arch in ("gfx90a", "gfx950"):
            static_cost.TARGETS[arch], CONFIGS[arch, 2] = ("hip", arch, 64), CONFIGS["gfx942", 2]
            off = ("DOT", "BIAS", "CAP", "WANT_SCORES", "SMOOTHING", "KEEP", "REPAIR", "RECOMPUTE", "TMA")
            cost = static_cost.run_job(("scores_kernel", dict.fromkeys(off, False), "bf16", arch))
            print(cost.matrix_instructions)"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(program, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    assert all(map(int, run.stdout.split()))


def test_transposed_operands_compile_without_stack():
    """They are not copied: rows next to each other, features any number apart. All other operands are aligned first."""
    lines = compiled("""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        function, products = static_cost.kernels()["scores_kernel"]
        for row, feature in (("stride_wv", "stride_wd"), ("stride_xn", "stride_xd")):
            launch = static_cost.launch_of("scores_kernel", function, products, {**SCORES, "TMA": False}, "bf16", "sm90")
            one, apart = ((function.arg_names.index(argument),) for argument in (row, feature))
            launch.signature |= {row: "constexpr", feature: "i32"}
            launch.constants[one] = launch.constants.pop(apart)
            launch.attributes.pop(one)
            source = ASTSource(function, launch.signature, launch.constants, launch.attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
            print(static_cost.resource_usage(compiled.asm["cubin"])[1])
        """)
    assert [int(line) <= PARKED for line in lines] == [True] * 2


# --- tuned configurations ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """Where tuned configurations go, read anew before and after."""
    monkeypatch.setenv("HARMONIC_TRITON_TILES", str(tmp_path / "new" / "tiles.json"))
    configs.tuned.cache_clear()
    yield tmp_path / "new" / "tiles.json"
    configs.tuned.cache_clear()


def test_tuned_configuration_is_what_a_call_takes(tiles):
    """Written, read again, for its bucket of D, its dtype and its architecture alone; a second one is added."""
    mine, other = configs.TileConfig(64, 32, 32, 4, 2), configs.TileConfig(32, 32, 32, 4, 1)
    cpu = torch.device("cpu")
    stored = configs.tile_config(cpu, torch.bfloat16, 768)
    assert stored == configs.CONFIGS["interpreter", 2] != mine
    assert configs.store_tuned(configs.key_of("interpreter", 2, 768), mine) == tiles
    assert configs.store_tuned(configs.key_of("sm90", 2, 768), other) == tiles
    configs.tuned.cache_clear()
    assert configs.tile_config(cpu, torch.bfloat16, 513) == configs.tile_config(cpu, torch.float16, 1024) == mine
    assert configs.tile_config(cpu, torch.bfloat16, 512) == configs.tile_config(cpu, torch.bfloat16, 1025) == stored
    assert configs.tile_config(cpu, torch.float32, 768) == configs.CONFIGS["interpreter", 4]


@pytest.mark.triton
@pytest.mark.parametrize("strategy", ["one pass", "recompute"])
def test_tuned_configuration_computes_the_same(tiles, strategy):
    """Other tiles, other order of sums: the operands' accuracy."""
    generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16 if strategy == "one pass" else torch.float32
    x, w = (torch.randn(rows, 70, generator=generator).to(dtype) for rows in (40, 90))
    target = torch.arange(40) * 2

    def gradients():
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with strategies.force(strategy):
            return torch.autograd.grad(ht.linear_harmonic_loss(*leaves, target, backend="triton"), leaves)

    want = gradients()
    configs.store_tuned(
        configs.key_of(configs.architecture(x.device), dtype.itemsize, 70), configs.TileConfig(16, 16, 32, 4, 1)
    )
    for got, wanted in zip(gradients(), want, strict=True):
        assert strategy == "one pass" or not torch.equal(got, wanted)  # bfloat16 may round both to the same
        assert (got - wanted).norm() <= max(1e-6, torch.finfo(dtype).eps / 4) * wanted.norm()


@pytest.mark.parametrize("text", [
    "{", "[]", '{"sm90/2/1024": {"block_n": 128}}', '{"sm90/2/1024": 3}',
    '{"a": {"block_n": 96, "block_v": 64, "block_d": 64, "num_warps": 8, "num_stages": 3}}',
    '{"a": {"block_n": 64, "block_v": 64, "block_d": 64, "num_warps": 8, "num_stages": 3.5}}',
])  # fmt: skip
def test_a_bad_file_is_named(tiles, text):
    tiles.parent.mkdir()
    tiles.write_text(text)
    with pytest.raises(ValueError, match=r"tiles\.json is no file of tile configurations"):
        configs.tile_config(torch.device("cpu"), torch.float32, 64)


@pytest.mark.slow
def test_the_sweep_rejects_what_spills_or_does_not_fit():
    """The stored configuration passes; half of the warps spill; six stages exceed shared memory."""
    program = """if True:
        from benchmarks import autotune
        from harmonic_triton.fused.triton.tile_configs import CONFIGS, TileConfig
        for config in (CONFIGS["sm90", 2], TileConfig(128, 256, 64, 4, 3), TileConfig(128, 128, 128, 8, 6)):
            print(autotune.rejection(config, "bf16", "sm90"))"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = fresh.run(program, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    passed, spilled, large = run.stdout.splitlines()
    assert passed == "None"
    assert "spills" in spilled
    assert "shared memory" in large


def test_tuning_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        autotune.main(["--workload", "tiny"])
    assert "--static" in capsys.readouterr().err


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = {dtype: name for name, dtype in DTYPES.items()}
KINDS |= {torch.float64: "fp64", torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", int: "i32", float: "fp32"}


@pytest.mark.triton
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", ["distances", "logits", "bias", "cap"])
@pytest.mark.parametrize("strategy", ["recompute", "one pass"])
def test_compiled_signatures_are_those_of_real_launches(strategy, dtype, smoothing, scores, monkeypatch):
    """What is compiled is what is launched: a call through the interpreter shows every kernel's argument types.

    Learnable n (WANT_SCORES) with and without smoothing; every kernel has to be seen (norms are the harmonic loss's, a bias
    has a gradient).
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    kernels, seen = static_cost.kernels(), set()
    if not isinstance(kernels["norms_kernel"][0], interpreter.InterpretedFunction):
        pytest.skip("the kernels are compiled in this process, not interpreted")
    launch = interpreter.InterpretedFunction.run

    def recorded(function, *args, **options):
        name, names = function.__name__, function.arg_names
        given = {**dict(zip(names, args, strict=False)), **options}
        switches = {switch: given[switch] for switch in static_cost.SWITCHES if switch in names}
        assert (name, switches, dtype, "sm90") in jobs
        compiled = static_cost.launch_of(name, *kernels[name], switches, dtype, "sm90")
        constants = {names[position]: value for (position,), value in compiled.constants.items()}
        for argument in names:
            value = given[argument]
            kind = f"*{KINDS[value.dtype]}" if isinstance(value, torch.Tensor) else KINDS.get(type(value))
            if argument in ("stride_xd", "stride_wd") or value is None:
                assert constants.get(argument, "no constant") == value, (name, argument)
            elif hasattr(value, "block_shape"):  # the interpreter's tiles are of its own sizes
                assert compiled.signature[argument].startswith(f"tensordesc<{dtype}["), (name, argument)
                assert len(value.block_shape) == 2
            elif argument not in constants:
                assert compiled.signature[argument] == kind, (name, argument)
        seen.add(name)
        return launch(function, *args, **options)

    jobs = static_cost.jobs(["sm90"])
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", recorded)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 32, generator=generator).to(DTYPES[dtype]).requires_grad_() for rows in (5, 7))
    n = torch.tensor(3.0, requires_grad=True)
    target = torch.randint(7, (5,), generator=generator)
    with strategies.force(strategy):
        if scores == "distances":
            loss = ht.linear_harmonic_loss(x, w, target, n=n, label_smoothing=smoothing, eps=0.25, backend="triton")
        else:
            bias = torch.zeros(7, requires_grad=True) if scores == "bias" else None
            loss = ht.linear_cross_entropy(
                x, w, target, bias=bias, softcap=3.0 if scores == "cap" else None, label_smoothing=smoothing,
                z_loss=smoothing, backend="triton",
            )  # fmt: skip
    (0.5 * loss).backward()
    absent = {"norms_kernel" if scores != "distances" else "", "finish_bias_kernel" if scores != "bias" else ""}
    assert seen == set(kernels) - absent
