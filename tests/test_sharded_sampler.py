"""Chains of a model that FSDP2 has spread over processes: bitwise those of one process, on any number of them.

Processes are real ones, over gloo. The model is a small GPT with a tied harmonic head and a learnable exponent: 13 rows of
vocabulary, 10 of width and an exponent of shape (1,), which neither 2 nor 3 nor 4 processes share out evenly.
"""

import dataclasses
import math
import os
import random
import secrets
import signal
import time

import fresh
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import harmonic_triton as ht
from harmonic_triton import SGLDConfig, loss_kernel
from harmonic_triton.losskernel import Sampler
from harmonic_triton.losskernel.sampling import rng
from harmonic_triton.losskernel.sampling.parameters import FlatParameters
from harmonic_triton.losskernel.sampling.sharding import Window

pytest.importorskip("torch.distributed.checkpoint")
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
V, D, T = 13, 10, 6
CONFIG = SGLDConfig(
    lr=1e-4, nbeta=30.0, localization=50.0, batch_size=8, microbatch_size=5, eval_batch_size=4, num_chains=2,
    num_draws=3, num_burnin_steps=2, chain_group_size=1,
)  # fmt: skip
METHODS = ("sgld", "rmsprop", "sgnht")
KERNEL = dataclasses.replace(CONFIG, microbatch_size=None)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(3 * D, D)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(x)))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList([Block() for _ in range(1)])
        self.head = ht.HarmonicHead(D, V, n=4.0, learnable_n=True, std=0.5)
        self.head.weight = self.wte.weight
        self.register_buffer("calls", torch.zeros(()))  # which the forward pass writes to

    def forward(self, ids, target):
        self.calls += 1
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x, target=target, reduction="none").clone()


def token_losses(model, batch):
    return model(batch[:, :-1], batch[:, 1:])


def tokens(count, seed):
    return torch.randint(0, V, (count, T + 1), generator=torch.Generator().manual_seed(seed))


TRAIN, EVAL = tokens(20, 1), tokens(11, 2)


def draws(model, config, **options):
    sampler = Sampler(model, token_losses, TRAIN, EVAL, config, seed=3, **options)
    losses = torch.cat([sampler.initial_losses[None], *(draw.losses for draw in sampler.run(check_step_size=False))])
    return losses, sampler


def kernel(model, directory=None, keep="covariance", per_sample_loss=token_losses, config=KERNEL):
    return loss_kernel(
        model, per_sample_loss, TRAIN, EVAL, config, seed=3, keep=keep, checkpoint_dir=directory, checkpoint_seconds=0.0,
        progress=False,
    )  # fmt: skip


def sharded(mesh):
    from torch.distributed.fsdp import fully_shard

    model = GPT()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def state_of(model):
    """What a caller can see of a model on this process."""
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    here = {name: getattr(value, "to_local", lambda value=value: value)() for name, value in values.items()}
    gradients = {f"{name}.grad": p.grad.to_local() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in {**here, **gradients}.items()}, model.training


def same_state(one, other):
    assert one[0].keys() == other[0].keys() and one[1] == other[1]
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


# --- the programs of the processes ---------------------------------------------------------------------------------------


def work(rank, world, folder, meeting, job, *arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{meeting}", rank=rank, world_size=world)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    globals()[job](rank, mesh, folder, *arguments)
    torch.distributed.destroy_process_group()


def start(world, folder, job, *arguments, join=True):
    given = (world, str(folder), f"meeting-{secrets.token_hex(8)}", job, *arguments)
    method = fresh.CONTEXT.get_start_method()
    return mp.start_processes(work, given, nprocs=world, start_method=method, join=join)


def draw_with_every_method(rank, mesh, folder):
    for method in METHODS:
        model = sharded(mesh)
        token_losses(model, TRAIN[:4]).mean().backward()  # gradients of the caller's own
        with torch.no_grad():
            token_losses(model, TRAIN[:4])  # which leaves the outermost weights whole
        model.calls.zero_()
        sampler = Sampler(model, token_losses, TRAIN, EVAL, dataclasses.replace(CONFIG, method=method), seed=3)
        before = state_of(model)
        losses = [sampler.initial_losses[None]]
        for draw in sampler.run(check_step_size=False):
            losses.append(draw.losses)
            same_state(state_of(model), before)
        torch.save((torch.cat(losses), sampler.fingerprint), f"{folder}/{method}-{mesh.size()}-{rank}.pt")


def draw_and_be_killed(rank, mesh, folder, *arguments):
    draw_with_every_method(rank, mesh, folder)
    compute_kernels(rank, mesh, folder, *arguments)


def compute_kernels(rank, mesh, folder, keeps, stop_after=None):
    """Loss kernels with checkpoints; ``stop_after`` so many passes of the model every process kills itself."""
    passes = 0

    def token_losses(model, batch):
        nonlocal passes
        passes += 1
        if passes == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(batch[:, :-1], batch[:, 1:])

    token_losses.__qualname__ = "token_losses"
    for keep in keeps:
        found = kernel(sharded(mesh), f"{folder}/{keep}", keep, token_losses)
        torch.save((*numbers(found), passes), f"{folder}/{keep}-of-{rank}.pt")


# --- draws -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_draws(world, folder):
    for method in METHODS:
        wanted, sampler = draws(GPT(), dataclasses.replace(CONFIG, method=method))
        assert len(wanted.unique(dim=0)) == 1 + CONFIG.num_chains * CONFIG.num_draws
        for rank in range(world):
            found, fingerprint = torch.load(folder / f"{method}-{world}-{rank}.pt")
            assert torch.equal(found, wanted), (method, rank)
            assert fingerprint == sampler.fingerprint


def test_two_processes_draw_what_one_does_and_one_goes_on_when_they_are_killed(tmp_path, one_thread):
    """One launch for both: most of its time is taken by imports. The process that goes on holds the model whole."""
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        start(2, tmp_path, "draw_and_be_killed", ["covariance"], 33)  # in its second draw
    check_draws(2, tmp_path)
    folder = tmp_path / "covariance"
    assert (folder / "kernel-0.pt").exists() and any(path.is_dir() for path in folder.iterdir())  # within a chain
    passes = []

    def token_losses(model, batch):
        passes.append(len(batch))
        return model(batch[:, :-1], batch[:, 1:])

    token_losses.__qualname__ = "token_losses"
    resumed, whole = kernel(GPT(), folder, per_sample_loss=token_losses), kernel(GPT())
    same_kernel(numbers(resumed), numbers(whole))
    # losses at w*, 24 gradients for the stability bound, two draws of the first chain, and the second chain
    assert len(passes) == 3 + 24 + 2 * (1 + 3) + (5 + 3 * 3)
    assert not any(path.is_dir() for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4, 8])
def test_draws_are_bitwise_those_of_one_process(world, tmp_path, one_thread):
    """On 3 to rounding: thirds are not exact."""
    start(world, tmp_path, "draw_with_every_method")
    if world != 3:
        check_draws(world, tmp_path)
        return
    for method in METHODS:
        wanted, _ = draws(GPT(), dataclasses.replace(CONFIG, method=method))
        torch.testing.assert_close(torch.load(tmp_path / f"{method}-3-0.pt")[0], wanted, rtol=1e-5, atol=1e-6)


def test_losses_of_a_chain_alone_are_those_of_the_model_itself(one_thread):
    """To the bit: products round by the strides and the alignment of their operands, so a chain sees what a module has."""
    model = GPT()
    initial = draws(model, CONFIG)[0][0]
    with torch.no_grad():
        own = torch.cat([token_losses(model, EVAL[start : start + 4]).flatten() for start in range(0, 11, 4)])
    assert torch.equal(initial, own)


# --- resuming --------------------------------------------------------------------------------------------------------------


def numbers(found):
    return found.covariance, found.mean, found.record.mean_loss


def same_kernel(found, wanted):
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def passes_of(world):
    """(up to the first draw's checkpoint, of a whole run) on each process; the losses of 11 samples are 3 blocks."""
    read = math.ceil(3 / world)
    return read + 24 + 3 + read, read + 24 + 2 * (5 + 3 * read)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["covariance", "traces"])
@pytest.mark.parametrize("worlds", [(2, 4, 1), (4, 2)])
def test_a_run_is_killed_twice_and_goes_on_with_other_numbers_of_processes(keep, worlds, tmp_path, one_thread):
    for turn, world in enumerate(worlds[:-1]):
        first, whole = passes_of(world)
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            start(world, tmp_path, "compute_kernels", [keep], first + 2 if turn == 0 else first + 4)
    start(worlds[-1], tmp_path, "compute_kernels", [keep])
    # traces meet, rounded once, where there are several processes or shards: a run that nothing stopped does, too
    whole = tmp_path / "whole"
    whole.mkdir()
    start(1, whole, "compute_kernels", [keep])
    wanted = torch.load(whole / f"{keep}-of-0.pt")
    for rank in range(worlds[-1]):
        found = torch.load(tmp_path / f"{keep}-of-{rank}.pt")
        same_kernel(found[:3], wanted[:3])
        assert found[3] < passes_of(worlds[-1])[1]
    plain = kernel(GPT(), keep=keep)
    torch.testing.assert_close(wanted[0], plain.covariance, rtol=1e-5 if keep == "covariance" else 0.02, atol=1e-9)


@pytest.mark.slow
def test_a_checkpoint_of_a_whole_model_goes_on_in_shards(tmp_path, one_thread):
    stopped = []

    def token_losses(model, batch):
        stopped.append(0)
        if len(stopped) == 3 + 24 + 3 + 3 + 1:
            raise KeyboardInterrupt
        return model(batch[:, :-1], batch[:, 1:])

    token_losses.__qualname__ = "token_losses"
    with pytest.raises(KeyboardInterrupt):
        kernel(GPT(), tmp_path / "covariance", per_sample_loss=token_losses)
    start(2, tmp_path, "compute_kernels", ["covariance"])
    found = torch.load(tmp_path / "covariance-of-1.pt")
    same_kernel(found[:3], numbers(kernel(GPT())))
    assert found[3] < passes_of(2)[1]


@pytest.mark.slow
def test_kills_at_any_moment(tmp_path, one_thread):
    """Whole runs are killed at random moments, on 2, 1, 2, ... processes, until one ends."""
    generator = random.Random(0)
    for turn in range(40):
        world = 1 + turn % 2
        running = start(world, tmp_path, "compute_kernels", ["covariance"], join=False)
        end = time.monotonic() + generator.uniform(2.0, 20.0)
        while time.monotonic() < end and any(process.is_alive() for process in running.processes):
            time.sleep(0.05)
        if not any(process.is_alive() for process in running.processes):
            assert all(process.exitcode == 0 for process in running.processes)
            break
        for process in running.processes:
            process.kill()
        for process in running.processes:
            process.join()
    else:
        pytest.fail("no run ended")
    same_kernel(torch.load(tmp_path / "covariance-of-0.pt")[:3], numbers(kernel(GPT())))


# --- groups of processes, and what is refused ------------------------------------------------------------------------------


def compute_in_groups(rank, mesh, folder):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("chains", "shards"))["shards"]
    config = dataclasses.replace(KERNEL, num_chains=3)
    found = kernel(sharded(mesh), f"{folder}/groups", config=config)
    torch.save(numbers(found), f"{folder}/groups-of-{rank}.pt")


@pytest.mark.slow
def test_groups_of_processes_share_the_chains(tmp_path, one_thread):
    start(4, tmp_path, "compute_in_groups")
    plain = kernel(GPT(), config=dataclasses.replace(KERNEL, num_chains=3))
    first = torch.load(tmp_path / "groups-of-0.pt")
    for rank in range(4):
        same_kernel(torch.load(tmp_path / f"groups-of-{rank}.pt"), first)
    assert torch.equal(first[2], plain.record.mean_loss)
    torch.testing.assert_close(first[0], plain.covariance, rtol=1e-5, atol=1e-9)  # chains are added in another order
    assert sorted(path.name for path in (tmp_path / "groups").glob("*.pt")) == ["kernel-0.pt", "kernel-1.pt"]


def try_what_is_refused(rank, mesh, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    def read_outside(model, batch):
        return model(batch[:, :-1], batch[:, 1:]).mean(1) * model.blocks[0].up.weight.square().mean()

    def mix_outside(model, batch):
        return (
            F.linear(torch.ones(len(batch), D), model.blocks[0].up.weight) + model(batch[:, :-1], batch[:, 1:]).mean()
        )

    with pytest.raises(ValueError, match="chain_group_size 2 needs torch.func.vmap over the weights"):
        draws(sharded(mesh), dataclasses.replace(CONFIG, chain_group_size=2))
    for outside in (read_outside, mix_outside):
        with pytest.raises(TypeError, match="reads weights that fully_shard has sharded outside of the forward"):
            Sampler(sharded(mesh), outside, TRAIN, EVAL, CONFIG, seed=3)
    with pytest.raises(
        ValueError, match="process 1 of the 2 that hold the model was given another train data than process 0"
    ):
        Sampler(sharded(mesh), token_losses, TRAIN + rank, EVAL, CONFIG, seed=3)
    with pytest.raises(ValueError, match="another seed than process 0"):
        Sampler(sharded(mesh), token_losses, TRAIN, EVAL, CONFIG, seed=3 + rank)
    with pytest.raises(ValueError, match="checkpoint_dir holds no stream of a model whose weights are sharded"):
        ht.sample_losses(
            sharded(mesh), token_losses, TRAIN, EVAL, CONFIG, seed=3, checkpoint_dir=f"{folder}/stream", progress=False
        )
    names = ("replicate", "shard")
    hsdp = fully_shard(GPT(), mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=names))
    with pytest.raises(ValueError, match="a mesh of 2 dimensions; the sampler takes weights that fully_shard"):
        draws(hsdp, CONFIG)
    tensor_parallel = nn.Linear(4, 4)
    tensor_parallel.weight = nn.Parameter(DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="parameter 'weight' is sharded as"):
        draws(tensor_parallel, CONFIG)
    hooked = sharded(mesh)
    hooked.wpe.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="'wpe.weight' has a hook that runs when its gradient is there"):
        draws(hooked, CONFIG)
    # damage is found by the first process and told to all
    kernel(sharded(mesh), f"{folder}/damaged")
    torch.distributed.barrier()
    if rank == 0:
        with open(f"{folder}/damaged/kernel-0.pt", "r+b") as file:
            file.write(b"X")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="kernel-0.pt"):
        kernel(sharded(mesh), f"{folder}/damaged")
    # an interruption leaves the model as it was
    model, passes = sharded(mesh), []
    before = state_of(model)

    def interrupted(model, batch):
        passes.append(0)
        if len(passes) == 12:
            raise KeyboardInterrupt
        return token_losses(model, batch)

    with pytest.raises(KeyboardInterrupt):
        list(Sampler(model, interrupted, TRAIN, EVAL, CONFIG, seed=3).run(check_step_size=False))
    same_state(state_of(model), before)


@pytest.mark.slow
def test_what_is_refused_is_refused_on_every_process(tmp_path):
    start(2, tmp_path, "try_what_is_refused")


def draw_masked(rank, mesh, folder):
    losses, sampler = draws(sharded(mesh), dataclasses.replace(CONFIG, method="sgnht"), mask=MASK)
    torch.save((losses, sampler.fingerprint), f"{folder}/masked-{rank}.pt")


MASK = {
    "blocks.0.qkv.weight": torch.rand(3 * D, D, generator=torch.Generator().manual_seed(4)) < 0.5,
    "head.n": True,
    "wte.weight": torch.arange(V * D).view(V, D) % 3 == 0,
}


@pytest.mark.slow
def test_masks_are_cut_as_the_weights_are(tmp_path, one_thread):
    start(2, tmp_path, "draw_masked")
    wanted, sampler = draws(GPT(), dataclasses.replace(CONFIG, method="sgnht"), mask=MASK)
    for rank in range(2):
        losses, fingerprint = torch.load(tmp_path / f"masked-{rank}.pt")
        assert torch.equal(losses, wanted) and fingerprint == sampler.fingerprint


@pytest.mark.slow
def test_the_example_prints_the_same_bits_on_two_processes(tmp_path):
    words = ["--steps", "5", "--draws", "3", "--chains", "2", "--modulus", "7", "--width", "16"]
    program, environment = fresh.module("examples.loss_kernel.sharded"), {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = fresh.run(program, "--out", tmp_path / "one", *words, env=environment)
    assert alone.returncode == 0, alone.stderr
    started = ["--standalone", "--nproc-per-node", "2", "-m", "examples.loss_kernel.sharded"]
    two = fresh.Started(
        fresh.module("torch.distributed.run"), *started, "--out", tmp_path / "two", *words, env=environment
    ).wait(timeout=600)
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone.stdout and len(alone.stdout.splitlines()) == 2


# --- what they are made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_in_pieces_is_the_noise(dtype, monkeypatch):
    """A part of the standard: torch's generator fills sixteen at a time, and a row's last sixteen anew."""
    for piece in (16, 48, 160):
        monkeypatch.setattr(rng, "PIECE", piece)
        for total in (1, 15, 16, 17, 31, 32, 47, 63, 64, 65, 170, 1003):
            whole = torch.empty(1, total, dtype=dtype)
            rng.CounterRNG(5).noise(whole, [3], 7, 0.3)
            pieces = rng.CounterRNG(5).noise_pieces(total, whole, 3, 7, 0.3)
            joined = torch.full_like(whole[0], math.nan)
            for start, values in pieces:
                joined[start : start + len(values)] = values
            assert torch.equal(joined, whole[0]), (piece, total)


def test_windows_take_their_columns_of_any_piece():
    generator = random.Random(0)
    for _ in range(300):
        rows, width, start = generator.randint(1, 6), generator.randint(1, 7), generator.randint(0, 9)
        first = generator.randint(0, width)
        last = generator.randint(first, width)
        vector = torch.arange(start + rows * width + generator.randint(0, 5)) + 1
        out = torch.zeros(rows * (last - first), dtype=torch.int64)
        at = 0
        while at < len(vector):
            piece = vector[at : at + generator.randint(1, 12)]
            Window(start, rows, width, first, last).take(piece, at, out)
            at += len(piece)
        wanted = vector[start : start + rows * width].view(rows, width)[:, first:last].reshape(-1)
        assert torch.equal(out, wanted)


def test_sums_of_squares_do_not_depend_on_the_order():
    parameters = FlatParameters(nn.Linear(50, 60), token_losses, None)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 3060, generator=generator) * torch.tensor([[1e-12], [1.0], [1e15]])
    found = parameters.square_sum(vectors)
    exact = torch.tensor([math.fsum(value**2 for value in row) for row in vectors.tolist()])
    assert torch.equal(found[:, 0], exact)  # rounded once: units are 2^-50 of the largest square
    for _ in range(5):
        assert torch.equal(parameters.square_sum(vectors[:, torch.randperm(3060, generator=generator)]), found)
    vectors[1, 7], vectors[2, 9] = math.nan, math.inf
    assert parameters.square_sum(vectors)[:, 0].isfinite().tolist() == [True, False, False]
    assert torch.equal(parameters.square_sum(torch.zeros(2, 3060)), torch.zeros(2, 1))
