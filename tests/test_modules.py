"""HarmonicHead and LinearHarmonicLoss as modules: tying, copies, pickles, state_dict, options."""

import copy
import io
import pickle

import pytest
import torch
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
    assert torch.equal(module(w, X, target), ht.linear_harmonic_loss(X, w, target, n=4.0, ignore_index=3))


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
        assert set(module.state_dict()) == ({"weight", "n"} if learnable else {"weight"})
        other.load_state_dict(module.state_dict())
    assert torch.equal(other(X, target=TARGET), module(X, target=TARGET))
    with torch.no_grad():
        other.weight.zero_()
    assert not torch.equal(other.weight, module.weight)
    loss = ht.LinearHarmonicLoss(n=3.0)
    assert copy.deepcopy(loss).options == pickle.loads(pickle.dumps(loss)).options == loss.options


def test_linear_weights_load_into_the_head():
    linear, module = nn.Linear(12, 9, bias=False), head()
    module.load_state_dict(linear.state_dict())
    assert torch.equal(module.weight, linear.weight)


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


def test_bad_arguments_are_refused_at_construction():
    for options, text in (({"n": -1.0}, "n must"), ({"eps": -1.0}, "eps must")):
        with pytest.raises(ValueError, match=text):
            ht.HarmonicHead(4, 5, **options)
    for options in ({"redction": "sum"}, {"redction": "sum", "reduction": "sum"}):
        with pytest.raises(TypeError, match="HarmonicHead has no option 'redction'; it takes .*reduction"):
            ht.HarmonicHead(4, 5, **options)
    with pytest.raises(TypeError, match="LinearHarmonicLoss has no option 'foo'; it takes .*reduction"):
        ht.LinearHarmonicLoss(foo=1)
    for sizes, text in (((0, 11), "in_features must be at least 1, got 0"), ((8, 0), "out_features must be")):
        with pytest.raises(ValueError, match=text):
            ht.HarmonicHead(*sizes)
    with pytest.raises(TypeError, match="out_features must be an int, got 11.0"):
        ht.HarmonicHead(8, 11.0)


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
