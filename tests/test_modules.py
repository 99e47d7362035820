"""HarmonicHead and LinearHarmonicLoss as modules: tying, copies, pickles, state_dict, options."""

import copy
import io
import pickle
import warnings
from pathlib import Path

import fresh
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import harmonic_triton as ht

X, TARGET = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4, 8, -100, 2])


def head(**options):
    torch.manual_seed(3)
    return ht.HarmonicHead(12, 9, **options)


def test_forward_is_the_function():
    module = head(n=5.0, eps=1e-3, reduction="sum", label_smoothing=0.1)
    assert torch.equal(module(X), ht.harmonic_logits(X, module.weight, n=5.0, eps=1e-3))
    wanted = ht.linear_harmonic_loss(X, module.weight, TARGET, n=5.0, eps=1e-3, reduction="sum", label_smoothing=0.1)
    assert torch.equal(module(X, target=TARGET), wanted)
    assert module(X, TARGET, reduction="none").shape == (6,)
    _, stats = module(X, TARGET, return_stats=True)
    assert stats.correct.shape == (6,)


def test_loss_module_is_the_function():
    module = ht.LinearHarmonicLoss(n=4.0, ignore_index=3)
    w = head().weight
    target = TARGET.clamp_min(0)
    named = {"input": X, "linear_weight": w, "target": target}
    assert torch.equal(module(**named), ht.linear_harmonic_loss(X, w, target, n=4.0, ignore_index=3))


def test_the_loss_module_takes_tensors_by_name_alone():
    """Where N = V nothing in their shapes would tell input and weight apart."""
    module, x, w, target = ht.LinearHarmonicLoss(n=4.0), torch.randn(5, 3), torch.randn(5, 3), torch.arange(5)
    for tensors in ((x, w, target), (w, x, target)):
        with pytest.raises(TypeError, match=r"by name.*loss\(input=x, linear_weight=w, target=t\)"):
            module(*tensors)
    with pytest.raises(TypeError, match="linear_weight must be a torch.Tensor, got None"):
        module(input=x, target=target)


def test_a_head_refuses_what_its_call_would_drop():
    module = head()
    for name in ("label", "labels", "targets"):  # a loss asked for by another name came back as log-probabilities
        with pytest.raises(TypeError, match=f"takes the classes as target=, not {name}="):
            module(X, **{name: TARGET})
    for target in (None, TARGET):
        with pytest.raises(TypeError, match=r"n belongs to the head and its weights: HarmonicHead\(..., n=...\)"):
            module(X, target, n=3.0)
        with pytest.raises(TypeError, match="HarmonicHead has no option 'smoothing'.*label_smoothing"):
            module(X, target, smoothing=0.1)
        with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'avg'"):
            module(X, target, reduction="avg")
    assert torch.equal(
        module(X, target=None, reduction="sum", shift=True), module(X)
    )  # one line for training and sampling


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_says_that_it_has_no_bias(bias):
    with pytest.raises(
        TypeError, match="no option 'bias' .*class vector that is moved.*; leave bias= out, False as well"
    ):
        ht.HarmonicHead(4, 5, bias=bias)


def test_default_exponent_is_the_root_of_the_width():
    module = head()
    assert torch.equal(module(X), ht.harmonic_logits(X, module.weight, n=12**0.5))
    assert not any(name == "n" for name, _ in module.named_parameters())


def test_a_tied_head_trains_the_embedding_through_both_uses():
    embedding = nn.Embedding(9, 12)
    module = head(n=4.0)
    module.weight = embedding.weight
    ids, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    module(embedding(ids), target=target).backward()
    weight = embedding.weight.detach().clone().requires_grad_()
    x = weight.detach()[ids].requires_grad_()
    ht.linear_harmonic_loss(x, weight, target, n=4.0).backward()
    torch.testing.assert_close(embedding.weight.grad, weight.grad.index_add(0, ids, x.grad), rtol=1e-5, atol=1e-7)
    model = nn.ModuleDict({"embedding": embedding, "head": module})
    assert len(list(model.parameters())) == 1


def test_a_learnable_exponent_is_a_parameter_that_moves():
    module = head(n=5.0, learnable_n=True)
    assert dict(module.named_parameters())["n"].item() == 5.0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = module(X, target=TARGET)
        loss.backward()
        optimizer.step()
    assert abs(module.n.item() - 5.0) > 1e-3
    assert module(X, target=TARGET) < loss


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_give_the_same_loss_and_are_independent(learnable, how):
    module = head(n=5.0, eps=1e-4, learnable_n=learnable, reduction="sum")
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        other = ht.HarmonicHead(12, 9, n=5.0, eps=1e-4, learnable_n=learnable, reduction="sum")
        assert set(module.state_dict()) == {"weight", "_extra_state", *(["n"] if learnable else [])}
        other.load_state_dict(module.state_dict())
    assert torch.equal(other(X, target=TARGET), module(X, target=TARGET))
    with torch.no_grad():
        other.weight.zero_()
    assert not torch.equal(other.weight, module.weight)
    loss = ht.LinearHarmonicLoss(n=3.0)
    assert copy.deepcopy(loss).options == pickle.loads(pickle.dumps(loss)).options == loss.options


def test_linear_weights_load_into_the_head_with_a_warning_and_not_back():
    linear, module = nn.Linear(12, 9, bias=False), head(n=28.0)
    with pytest.warns(
        UserWarning, match="this head does not say which n and eps.*nn.Linear.*taken for n = 28 and eps = 0"
    ):
        module.load_state_dict(linear.state_dict())
    assert torch.equal(module.weight, linear.weight)
    with pytest.raises(RuntimeError, match="Unexpected key.*_extra_state"):
        linear.load_state_dict(module.state_dict())


# --- the exponent and eps belong to the weights ----------------------------------------------------------------------


def stored(module, how, folder):
    """The module's state dictionary by way of a file."""
    state = module.state_dict()
    if how == "torch":
        torch.save(state, folder / "state.pt")
        return torch.load(folder / "state.pt", weights_only=True)
    if how == "safetensors":
        files = pytest.importorskip("safetensors.torch")
        files.save_file(state, folder / "state.safetensors")
        return files.load_file(folder / "state.safetensors")
    if how == "distributed":
        checkpoint = pytest.importorskip("torch.distributed.checkpoint")
        checkpoint.save(state, checkpoint_id=folder / "state", no_dist=True)
        state = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        checkpoint.load(state, checkpoint_id=folder / "state", no_dist=True)
        return state
    return state


TRAINED = {"n": 28.0, "eps": 1e-4}
OTHERS = [
    ({"n": 5.0, "eps": 1e-4}, "n = 5 and eps = 0.0001"),
    ({"n": 28.0}, "n = 28 and eps = 0:"),
    ({"eps": 1e-4}, "n = 3.4641 and eps = 0.0001"),
    ({"n": 28.0, "eps": 1e-4, "learnable_n": True}, "a learnable n and eps = 0.0001"),
]


@pytest.mark.parametrize("how", ["plain", "torch", "safetensors", "distributed"])
@pytest.mark.parametrize(("options", "named"), OTHERS)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_exponent_or_eps_are_refused(how, options, named, strict, tmp_path):
    state = stored(nn.ModuleDict({"head": head(**TRAINED)}), how, tmp_path)
    other = nn.ModuleDict({"head": ht.HarmonicHead(12, 9, **options)})
    before = other["head"].weight.detach().clone()
    text = f"weights of head were trained with n = 28 and eps = 0.0001, and this head has {named}.*HarmonicHead.*n=28.0, eps=0.0001"
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=text):
            other.load_state_dict(state, strict=strict, assign=assign)
        assert torch.equal(other["head"].weight, before)
    del state["head._extra_state"]  # the way out that the message names
    with pytest.warns(UserWarning, match="the state of head does not say"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(other["head"].weight, head(**TRAINED).weight)


@pytest.mark.parametrize("how", ["plain", "torch", "safetensors", "distributed"])
@pytest.mark.parametrize(
    "options", [{}, TRAINED, {"n": 28, "learnable_n": True}, {"n": 1 / 3, "dtype": torch.bfloat16}]
)
def test_weights_of_the_same_load_without_a_word(how, options, tmp_path):
    trained = head(**options)
    state = stored(trained, how, tmp_path)
    for strict, assign in ((True, False), (False, True)):
        other = ht.HarmonicHead(12, 9, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert other.load_state_dict(state, strict=strict, assign=assign) == ([], [])
        x = X.to(other.weight.dtype)
        assert torch.equal(other(x, target=TARGET), trained(x, target=TARGET))


def test_the_exponent_in_the_state_survives_casts_and_wrappers():
    module = ht.HarmonicHead(768, 9)
    wanted = [768**0.5, 0.0]
    for cast in (module.bfloat16(), module.double(), copy.deepcopy(module), torch.compile(module)):
        ((name, state),) = ((k, v) for k, v in cast.state_dict().items() if k.endswith("_extra_state"))
        assert state.dtype == torch.float64 and state.tolist() == wanted, name
    whole = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    assert whole["_extra_state"][0].item() == 27.75
    ht.HarmonicHead(768, 9).load_state_dict(whole)
    with pytest.raises(RuntimeError, match="n = 27.75 and eps = 0, and this head has n = 20"):
        ht.HarmonicHead(768, 9, n=20).load_state_dict(whole)
    with torch.device("meta"):
        hollow = ht.HarmonicHead(768, 9)
        assert hollow.state_dict()["_extra_state"].tolist() == wanted
    hollow.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(hollow.weight, module.weight)
    state = module.state_dict()
    state["_extra_state"].zero_()  # a copy
    assert module.state_dict()["_extra_state"].tolist() == wanted


def test_states_of_older_versions_load_strictly():
    fixed, learned = head(n=5.0), head(n=5.0, learnable_n=True)
    for module, old in ((fixed, {}), (learned, {"n": torch.tensor(7.0)})):
        state = {"weight": torch.ones(9, 12), **old}
        for assign in (False, True):
            with pytest.warns(UserWarning, match="does not say which n and eps"):
                module.load_state_dict(state, assign=assign)
            assert torch.equal(module.weight, torch.ones(9, 12))
        assert all(value.shape == () for value in old.values())
    assert isinstance(learned.n, nn.Parameter) and learned.n.shape == (1,) and learned.n.item() == 7.0


def test_a_state_without_the_head_says_nothing_of_it():
    body = nn.Linear(12, 12)
    model = nn.Sequential(body, head())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missing = model.load_state_dict({f"0.{name}": value for name, value in body.state_dict().items()}, strict=False)
    assert missing.missing_keys == ["1.weight", "1._extra_state"]
    with pytest.raises(RuntimeError, match="Missing key.*1.weight"):
        model.load_state_dict({f"0.{name}": value for name, value in body.state_dict().items()})


class Shardable(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(12, 12), ht.HarmonicHead(12, 9, n=5.0, learnable_n=True, std=0.5, **options)

    def forward(self, x, target):
        return self.head(self.body(x), target=target)


def rank_of_two(rank, folder):
    """Three FSDP2 steps on half the batch each; the full state of the shards goes to a file and into other shards."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))

    def sharded(**options):
        model = Shardable(**options)
        fully_shard(model.head, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = sharded()
    assert "n=5," in repr(model)  # without a collective
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    half = slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        optimizer.zero_grad()
        model(X[half], TARGET[half]).backward()
        optimizer.step()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    shards = {"model": get_model_state_dict(model)}
    checkpoint.save(shards, checkpoint_id=f"{folder}/shards")
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
    for options in ({}, {"eps": 1e-3}):
        for broadcast in (False, True):
            other = sharded(**options)
            given = dict(full) if rank == 0 or not broadcast else {}
            how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            check_loading(lambda: set_model_state_dict(other, given, options=how), other, full, options)  # noqa: B023
        other = sharded(**options)
        shards = {"model": get_model_state_dict(other)}
        checkpoint.load(shards, checkpoint_id=f"{folder}/shards")
        check_loading(lambda: set_model_state_dict(other, shards["model"]), other, full, options)  # noqa: B023
    torch.distributed.destroy_process_group()


def check_loading(load, model, full, options):
    if options:
        with pytest.raises(RuntimeError, match="eps = 0, and this head has a learnable n and eps = 0.001"):
            load()
        return
    load()
    assert torch.equal(model.head.n.full_tensor(), full["head.n"])
    assert torch.equal(model.head.weight.full_tensor(), full["head.weight"])


def test_fsdp2_shards_a_head_with_a_learnable_exponent(tmp_path):
    pytest.importorskip("torch.distributed.checkpoint")
    mp.start_processes(rank_of_two, (str(tmp_path),), nprocs=2, start_method=fresh.CONTEXT.get_start_method())
    full = torch.load(Path(tmp_path) / "full.pt", weights_only=True)
    model = Shardable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):  # the halves hold as many tokens: the mean over processes is that over the batch
        optimizer.zero_grad()
        model(X[:4], TARGET[:4]).backward()
        optimizer.step()
    assert full.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(full[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert full["head.n"].shape == (1,) and abs(full["head.n"].item() - 5.0) > 1e-3
    other = Shardable()
    other.load_state_dict(full)
    assert torch.equal(other.head.n, full["head.n"])


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_exponent_of_shape_1_is_one_of_shape_0(backend, reduction):
    generator = torch.Generator("cpu").manual_seed(0)
    found = []
    for shape in ((), (1,)):
        n = torch.full(shape, 5.0, requires_grad=True)
        x, w = (torch.randn(rows, 12, generator=generator.manual_seed(0), device="cpu").to(n.device) for rows in (6, 9))
        target = torch.tensor([0, 3, 4, 8, -100, 2], device=n.device)
        loss = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction, backend=backend)
        loss.backward(torch.linspace(0.3, 2.0, 6, dtype=loss.dtype) if reduction == "none" else torch.tensor(1.7))
        assert n.grad.shape == shape
        log_p, (values, indices) = ht.harmonic_logits(x, w, n=n), ht.harmonic_topk(x, w, 3, n=n)
        found.append((loss, n.grad.reshape(()), log_p, values, indices, ht.harmax(x.abs(), n)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_changes_the_dtype(dtype):
    module = head(n=4.0).to(dtype)
    loss = module(X.to(dtype), target=TARGET)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward(torch.tensor(0.5, dtype=loss.dtype))
    assert module.weight.grad.dtype == dtype


def test_initial_vectors_and_repr():
    torch.manual_seed(0)
    module = ht.HarmonicHead(64, 500, n=8.0, std=0.1)
    assert abs(module.weight.std().item() - 0.1) < 0.1 * 4 / (2 * 64 * 500) ** 0.5
    assert "in_features=64, out_features=500, n=8" in repr(module)
    assert "n=3.0" in repr(ht.LinearHarmonicLoss(n=3.0))


WRONG = [  # loss options, whatever the tensors are
    ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    ({"reduction": "none", "num_items": 3}, ValueError, "num_items divides the summed loss"),
    ({"num_items": 0}, ValueError, "num_items must be finite and > 0 .*got 0"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be finite and between 0 and 1"),
    ({"uniform_mix": "0.1"}, TypeError, "uniform_mix must be"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
    ({"shift": -1}, ValueError, "shift must be at least 0"),
    ({"return_stats": 1}, TypeError, "return_stats must be True or False"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ({"memory_budget": 0}, ValueError, "memory_budget must be a positive number"),
    ({"class_weight": torch.ones(2, 5)}, ValueError, "class_weight must be floating and of shape"),
    ({"class_weight": [1.0] * 5}, TypeError, "class_weight must be a"),
    ({"process_group": object()}, TypeError, "process_group"),
]


def test_bad_arguments_are_refused_at_construction():
    for options, text in (({"n": -1.0}, "n must"), ({"eps": -1.0}, "eps must")):
        with pytest.raises(ValueError, match=text):
            ht.HarmonicHead(4, 5, **options)
    for options in ({"redction": "sum"}, {"redction": "sum", "reduction": "sum"}):
        with pytest.raises(TypeError, match="HarmonicHead has no option 'redction'; it takes .*reduction"):
            ht.HarmonicHead(4, 5, **options)
    for options, error, text in WRONG:
        for make in (lambda **given: ht.HarmonicHead(4, 5, **given), ht.LinearHarmonicLoss):
            with pytest.raises(error, match=text):
                make(**options)
    with pytest.raises(ValueError, match="n must"):
        ht.LinearHarmonicLoss(n=0.0)
    with pytest.raises(ValueError, match=r"class_weight must be floating and of shape \(5,\)"):
        ht.HarmonicHead(4, 5, class_weight=torch.ones(4))
    with pytest.raises(TypeError, match="LinearHarmonicLoss has no option 'foo'; it takes .*reduction"):
        ht.LinearHarmonicLoss(foo=1)
    for sizes, text in (((0, 11), "in_features must be at least 1, got 0"), ((8, 0), "out_features must be")):
        with pytest.raises(ValueError, match=text):
            ht.HarmonicHead(*sizes)
    with pytest.raises(TypeError, match="out_features must be an int, got 11.0"):
        ht.HarmonicHead(8, 11.0)
    with pytest.raises(TypeError, match="learnable_n must be True or False, got 'no'"):
        ht.HarmonicHead(8, 11, learnable_n="no")
    with pytest.raises(TypeError, match=r"dtype must be bfloat16.*got torch.int64"):
        ht.HarmonicHead(8, 11, dtype=torch.int64)
    with pytest.raises(ValueError, match="std must be finite and between 0 and 4.2.*got 1e.300"):
        ht.HarmonicHead(8, 11, std=1e300)


@pytest.mark.parametrize("n", [None, 5.0])
def test_a_head_made_on_meta_gets_its_values_later(n):
    module = ht.HarmonicHead(12, 9, n=n, learnable_n=True, device="meta")
    assert f"n={12**0.5 if n is None else n:g}" in repr(module)
    module.to_empty(device="cpu")
    with torch.no_grad():
        module.n.fill_(-1e30)
    torch.manual_seed(3)
    module.reset_parameters()
    wanted = head(n=n, learnable_n=True)
    assert torch.equal(module(X, target=TARGET), wanted(X, target=TARGET))
    assert repr(module) == repr(wanted)
    with torch.no_grad():
        module.n.fill_(2.0)
    fixed = head()
    fixed.n = 2.0
    assert "n=2," in repr(module) and "n=2," in repr(fixed)
