"""Class vectors spread over real processes give what one process gives."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist

import harmonic_triton as ht
from harmonic_triton import reference

D, V, SHAPE = 16, 37, (3, 8)
CUTS = {"even": [0, 18, 36], "uneven": [0, 20, 29, 37], "empty": [0, 11, 11, 30, 37], "one": [0, 37]}


def inputs(seed=0, spread=1.0, classes=V):
    """Hidden states, class vectors and targets, with the ugly ones: x on its class vector, near it, on another's, far away;
    two equal class vectors that different processes have; ignored targets."""
    g = torch.Generator().manual_seed(seed)
    x, w = spread * torch.randn(*SHAPE, D, generator=g), torch.randn(classes, D, generator=g)
    target = torch.randint(classes, SHAPE, generator=g)
    w[classes - 1] = w[0]
    target[0, :5] = torch.tensor([3, 0, 5, classes - 2, -100])
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = w[3], w[0], w[5] * 1.001, 1e3 * x[0, 3]
    x[1, 0] = w[(target[1, 0] + 7) % (classes - 1)] + 1e-3
    target[2, -2:] = -100
    return x, w, target, torch.rand(classes, generator=g) + 0.5


HARMONIC = [
    {"n": 6.0},
    {"n": 28.0, "reduction": "none", "return_stats": True},
    {"n": 6.0, "eps": 1e-3, "uniform_mix": 0.1, "shift": True, "reduction": "sum"},
    {"n": 6.0, "eps": 1e-2, "label_smoothing": 0.1, "weights": True, "num_items": 7, "return_stats": True},
    {"learnable": 5.0, "eps": 1e-2, "label_smoothing": 0.2, "return_stats": True},
]
CROSS_ENTROPY = [
    {},
    {"z_loss": 0.1, "label_smoothing": 0.2, "return_stats": True},
    {"reduction": "none", "weights": True, "shift": 2},
    {"biased": True, "softcap": 1e5, "z_loss": 0.1, "return_stats": True, "reduction": "none"},
    {"biased": True, "softcap": 4.0, "label_smoothing": 0.1, "token_scaling": True, "return_lse": True},
]


def call(loss_function, options, x, w, target, class_weight, bias, group):
    """Loss, statistics and gradients under an upstream gradient that is nowhere 1."""
    x, w, given = x.clone().requires_grad_(), w.clone().requires_grad_(), dict(options)
    n = None
    if "learnable" in given:
        n = given["n"] = torch.tensor(given.pop("learnable"), dtype=w.dtype).requires_grad_()
    if given.pop("weights", False):
        given["class_weight"] = class_weight
    if given.pop("biased", False):
        given["bias"] = bias = bias.clone().requires_grad_()
    loss = loss_function(x, w, target, process_group=group, **given)
    loss, *more = loss if isinstance(loss, tuple) else (loss,)
    statistics = more[0] if options.get("return_stats") else ()
    if options.get("return_lse"):
        (0.1 * more[-1].square()).sum().backward(retain_graph=True)
        statistics = (*statistics, more[-1].detach())
    (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).reshape(loss.shape)).sum().backward()
    return {"loss": loss.detach(), "dX": x.grad, "dW": w.grad, "dn": torch.zeros(()) if n is None else n.grad,
            "db": torch.zeros_like(bias) if bias.grad is None else bias.grad,
            **{f"statistic {k}": values for k, values in enumerate(statistics)}}  # fmt: skip


def check_losses(rank, world, cuts, backend, spread):
    x, w, target, class_weight = inputs(world, spread, cuts[-1])
    own = slice(cuts[rank], cuts[rank + 1])
    cases = [(ht.linear_harmonic_loss, o) for o in HARMONIC] + [(ht.linear_cross_entropy, o) for o in CROSS_ENTROPY]
    for function, options in cases:
        options = {**options, "backend": backend}
        one = call(function, options, x, w, target, class_weight, class_weight - 1, None)
        one["dW"], one["db"] = one["dW"][own], one["db"][own]
        several = call(function, options, x, w[own], target, class_weight, class_weight[own] - 1, dist.group.WORLD)
        for name, wanted in one.items():
            got, where = several[name], f"{name} of {function.__name__} {options}"
            assert got.shape == wanted.shape and got.dtype == wanted.dtype, where
            if not wanted.is_floating_point():
                assert torch.equal(got, wanted), where
                continue
            error, size = (got.double() - wanted.double()).norm(), wanted.double().norm()
            assert error <= 1e-5 * max(size, 1e-6), f"{where}: {error / size:.1e}"
            if name not in ("dW", "db"):  # everybody has the same bits
                everyones = [torch.empty_like(got) for _ in range(world)]
                dist.all_gather(everyones, got.contiguous())
                assert all(torch.equal(other, got) for other in everyones), where


@pytest.mark.parametrize(
    ("split", "spread"), [("even", 0.3), ("uneven", 10.0), ("empty", 0.3), ("empty", 10.0), ("one", 10.0)]
)
def test_losses_are_those_of_one_process(split, spread):
    ranks.all_well(len(CUTS[split]) - 1, check_losses, CUTS[split], "torch", spread)


@pytest.mark.slow
@pytest.mark.triton
def test_losses_by_triton_are_those_of_one_process():
    ranks.all_well(2, check_losses, [0, 20, 37], "triton", 1.0)


def check_against_fp64(rank, world, cuts):
    """In fp64 a process must not even round: the reference is dense, and of one process."""
    x, w, target, _ = inputs(5, 1.0, cuts[-1])
    x, target = x.flatten(0, 1), target.flatten()
    own = slice(cuts[rank], cuts[rank + 1])
    for n in (None, 6.0, 300.0):
        truth_x, truth_w = x.double().requires_grad_(), w.double().requires_grad_()
        if n is None:
            truth = reference.linear_cross_entropy(truth_x, truth_w, target, reduction="none")
        else:
            truth = reference.linear_harmonic_loss(truth_x, truth_w, target, n=n, eps=1e-4, reduction="none")
        up = torch.linspace(0.5, 2.0, truth.numel()).double().reshape(truth.shape)
        (truth * up).sum().backward()
        mine_x, mine_w = x.double().requires_grad_(), w[own].double().requires_grad_()
        options = {"reduction": "none", "process_group": dist.group.WORLD}
        if n is None:
            loss = ht.linear_cross_entropy(mine_x, mine_w, target, **options)
        else:
            loss = ht.linear_harmonic_loss(mine_x, mine_w, target, n=n, eps=1e-4, **options)
        (loss * up).sum().backward()
        for got, wanted in ((loss, truth), (mine_x.grad, truth_x.grad), (mine_w.grad, truth_w.grad[own])):
            assert (got - wanted).norm() <= 1e-11 * wanted.norm()


def test_losses_are_those_of_the_reference():
    ranks.all_well(3, check_against_fp64, CUTS["uneven"])


def check_predictions(rank, world, cuts):
    x, w, _, _ = inputs(1, 1.0, cuts[-1])
    own, group = slice(cuts[rank], cuts[rank + 1]), dist.group.WORLD
    up = torch.randn(*SHAPE, cuts[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    far = torch.randn(
        *SHAPE, D, generator=torch.Generator().manual_seed(3)
    )  # on a class vector derivatives have a pole
    found = []
    for part, weight, g in ((own, w, None), (slice(None), w[own], group)):
        a, b = far.double().requires_grad_(), weight.double().requires_grad_()
        n = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        log_p = ht.harmonic_logits(a, b, n=n, process_group=g)
        (log_p * (up if g is None else up[..., own])).sum().backward()
        found.append((log_p.detach()[..., part], a.grad, b.grad[part], n.grad))
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() <= 1e-11 * max(wanted.norm(), 1.0)
    for k in (1, 5, cuts[-1]):
        values, indices = ht.harmonic_topk(x, w, k, n=7.0)
        got_values, got = ht.harmonic_topk(x, w[own], k, n=7.0, process_group=group)
        assert ((got_values - values).abs() <= 3e-6 * values.abs().clamp_min(1e-3)).all()
        apart = values.diff(dim=-1).abs().amin(-1) > 1e-5 if k > 1 else values[..., 0] == values[..., 0]
        on_twins = (x.unsqueeze(-2) == w[0]).all(-1).any(-1)  # two classes at one place come in any order
        assert torch.equal(got[apart & ~on_twins], indices[apart & ~on_twins])


@pytest.mark.parametrize("split", ["uneven", "empty"])
def test_log_probabilities_and_the_best_classes(split):
    ranks.all_well(len(CUTS[split]) - 1, check_predictions, CUTS[split])


class Counter:
    """Numbers that the collectives of a block are given, by their kind."""

    def __enter__(self):
        self.numbers, self.kept = {}, {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        for name, function in self.kept.items():
            setattr(dist, name, self.counting(name, function))
        return self

    def counting(self, name, function):
        def counted(*args, **kwargs):
            tensor = args[0] if name == "all_reduce" else args[1]
            self.numbers.setdefault(name, []).append((tensor.numel(), tensor.dtype))
            return function(*args, **kwargs)

        return counted

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(dist, name, function)


def check_numbers(rank, world):
    tokens = 24
    x, w, target, _ = inputs()
    own = slice(18 * rank, 18 * rank + 18)
    a, b = x.requires_grad_(), w[own].clone().requires_grad_()
    with Counter() as forward:
        loss = ht.linear_harmonic_loss(a, b, target.clamp_max(35), n=6.0, process_group=dist.group.WORLD)
    with Counter() as backward:
        loss.backward()
    assert sum(count for count, _ in forward.numbers["all_reduce"]) == 4 * tokens
    assert [count for count, _ in forward.numbers["all_gather"]] == [32]
    assert backward.numbers == {"all_reduce": [(tokens * D, torch.float32)]}


def test_what_is_exchanged_grows_with_the_tokens_alone():
    """Four numbers a token forward, dX backward: never N V/world, nor W."""
    ranks.all_well(2, check_numbers)


# --- DTensors, heads, meshes ------------------------------------------------------------------------------------------


def check_dtensors(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    x, w, target, _ = inputs()
    one = call(ht.linear_harmonic_loss, {"n": 6.0}, x, w, target, None, w[:, 0], None)
    for layout, weight_layout in itertools.product((None, Replicate(), Shard(1)), (Shard(0), Replicate())):
        mine = distribute_tensor(w, mesh, [weight_layout]).requires_grad_()
        given = x.clone() if layout is None else distribute_tensor(x, mesh, [layout])
        given.requires_grad_()
        if weight_layout == Replicate() and layout is not None:
            continue  # which tokens a process has is not this package's business there
        loss = ht.linear_harmonic_loss(given, mine, target, n=6.0)
        (loss * 0.5).backward()
        dx = given.grad if layout is None else given.grad.full_tensor()
        for got, wanted in ((loss.detach(), one["loss"]), (dx, one["dX"]), (mine.grad.full_tensor(), one["dW"])):
            assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        assert layout is None or given.grad.placements == (layout,)  # sequence parallelism gets its slice back
    values, _ = ht.harmonic_topk(x, distribute_tensor(w, mesh, [Shard(0)]), 3, n=6.0)
    assert torch.allclose(values, ht.harmonic_topk(x, w, 3, n=6.0)[0], rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be \[Shard\(0\)\]"):
        ht.linear_harmonic_loss(x, distribute_tensor(w, mesh, [Shard(1)]), target)
    with pytest.raises(TypeError, match="input is a DTensor and linear_weight"):
        ht.linear_harmonic_loss(distribute_tensor(x, mesh, [Replicate()]), w, target)


def test_dtensors():
    ranks.all_well(2, check_dtensors)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = torch.nn.Embedding(V, D)
        self.up, self.down = torch.nn.Linear(D, 24), torch.nn.Linear(24, D)
        self.head = ht.HarmonicHead(D, V, n=6.0, learnable_n=True, std=1.0)

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.head(x + self.down(torch.tanh(self.up(x))), target=tokens, shift=True)


def check_training(rank, world, tensor_parallel):
    """Vocabulary and body over one dimension of the mesh, FSDP2 over the other: the curve of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from harmonic_triton.parallel import VocabularyParallel

    replicas = world // tensor_parallel
    tokens = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (replicas, tensor_parallel), mesh_dim_names=("data", "vocabulary"))
    one, several = Tied(), Tied()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": VocabularyParallel()}
    parallelize_module(several, mesh["vocabulary"], plan)
    if replicas > 1:
        for unit in (several.head, several):
            fully_shard(unit, mesh=mesh["data"])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (one, several)]
    share = len(tokens) // replicas
    mine = tokens[mesh["data"].get_local_rank() * share :][:share]
    for _ in range(5):
        wanted, got = one(tokens), several(mine)
        for loss, optimizer in zip((wanted, got), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mean = got.detach().clone()
        dist.all_reduce(mean, group=mesh["data"].get_group())
        assert abs(mean.item() / replicas - wanted.item()) <= 1e-5 * wanted.item()
    if replicas == 1:
        x = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            log_p = several.head(x)
            assert log_p.shape == (5, V)
            assert torch.allclose(log_p.full_tensor(), one.head(x), atol=1e-4)


@pytest.mark.parametrize(("world", "tensor_parallel"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_training_on_a_mesh(world, tensor_parallel):
    ranks.all_well(world, check_training, tensor_parallel)


def check_checkpoint(rank, world, folder, save):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from harmonic_triton.parallel import VocabularyParallel

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0 if save else 1)
    model = torch.nn.Sequential(ht.HarmonicHead(D, V, n=6.0, std=1.0))
    parallelize_module(model, mesh, {"0": VocabularyParallel()})
    state = {"model": get_model_state_dict(model)}
    if save:
        checkpoint.save(state, checkpoint_id=folder)
        return
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    torch.manual_seed(0)
    assert torch.equal(model[0].weight.full_tensor(), ht.HarmonicHead(D, V, n=6.0, std=1.0).weight)


@pytest.mark.slow
def test_a_sharded_head_loads_on_another_number_of_processes(tmp_path):
    ranks.all_well(2, check_checkpoint, str(tmp_path / "state"), True)
    ranks.all_well(3, check_checkpoint, str(tmp_path / "state"), False)


# --- faults -----------------------------------------------------------------------------------------------------------


def differ(rank, world, what):
    x, w, target, _ = inputs()
    own, options = w[18 * rank : 18 * rank + 18], {"n": 6.0}
    if rank == 1:
        if what == "dtype":
            x, own = x.double(), own.double()
        elif what == "target":
            target = target.roll(1)
        elif what == "width":
            x, own = x[..., :8], own[:, :8]
        else:
            options["n"] = 7.0
    ht.linear_harmonic_loss(x, own, target.clamp_max(35), process_group=dist.group.WORLD, **options)


@pytest.mark.parametrize("what", ["n", "dtype", "target", "width"])
def test_processes_that_mean_different_calls(what):
    said = ranks.run(2, differ, what)
    named = "input.shape" if what == "width" else what
    for text in said:
        assert f"ValueError: process_group: its processes 0 and 1 call with different {named}" in text


def vanish(rank, world, how):
    x, w, target, _ = inputs()
    own = w[9 * rank : 9 * rank + 9]
    loss = ht.linear_harmonic_loss(x, own, target.clamp_max(26), n=6.0, process_group=dist.group.WORLD)
    assert loss > 0
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    try:
        ht.linear_harmonic_loss(x, own, target.clamp_max(26), n=6.0, process_group=dist.group.WORLD)
    finally:
        assert time.monotonic() - start < 20, "later than it says"


@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_process_that_dies_or_hangs_ends_all_others(how):
    """Within the group's timeout, here four seconds, and with an error that says what happened."""
    said = ranks.run(3, vanish, how, timeout=4.0, within=40.0)
    for rank in (0, 1):
        assert f"process {rank} of the 3 of process_group could not" in said[rank]
        assert re.search("has died, hangs", said[rank])
    assert said[2] == ("died with -9" if how == "killed" else "hangs")


def nobody(rank, world):
    """No token at all, or none that counts."""
    x, w, target, _ = inputs()
    own = w[18 * rank : 18 * rank + 18]
    for a, t in ((x[:0], target[:0]), (x, torch.full_like(target, -100))):
        a, b = a.clone().requires_grad_(), own.clone().requires_grad_()
        loss = ht.linear_harmonic_loss(a, b, t, process_group=dist.group.WORLD)
        loss.backward()
        assert loss == 0 and not a.grad.any() and not b.grad.any()


def test_no_tokens():
    ranks.all_well(2, nobody)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"process_group": object()}, TypeError, "process_group must be None or a torch.distributed.ProcessGroup"),
        ({"process_group": "tp"}, TypeError, "got 'tp'"),
    ],
)
def test_what_is_no_group(options, error, text):
    x, w, target, _ = inputs()
    with pytest.raises(error, match=re.escape(text)):
        ht.linear_harmonic_loss(x, w, target, **options)


def refused(rank, world):
    x, w, target, _ = inputs()
    group = dist.group.WORLD
    with pytest.raises(ValueError, match="dense and of one process"):
        ht.linear_harmonic_loss(x, w, target, process_group=group, backend="reference")
    with pytest.raises(ValueError, match="uniform_mix needs every class in one process"):
        ht.linear_harmonic_loss(x, w, target, process_group=group, label_smoothing=0.1, uniform_mix=0.1)
    with pytest.raises(ValueError, match=f"outside 0 ... {V - 1}"):
        ht.linear_harmonic_loss(x, w, target + V, process_group=group)
    with pytest.raises(ValueError, match=f"of shape \\({V},\\)"):
        ht.linear_harmonic_loss(x, w, target, process_group=group, class_weight=torch.ones(V + 1))
    with pytest.raises(ValueError, match="normalize=False"):
        ht.harmonic_logits(x, w, process_group=group, normalize=False)
    with pytest.raises(ValueError, match=f"k must be between 1 and V = {V}"):
        ht.harmonic_topk(x, w, V + 1, process_group=group)


def test_what_is_refused():
    ranks.all_well(1, refused)
