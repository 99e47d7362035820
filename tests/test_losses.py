"""Per-sample losses: precision where F.cross_entropy has none, and the ready-made ones on real models."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmonic_triton as ht
from harmonic_triton.losskernel.per_sample_losses import (
    classification_loss,
    harmonic_head_loss,
    per_sample_cross_entropy,
    regression_loss,
    sequence_loss,
    token_loss,
)
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.sampler import Sampler


def with_gradient(logits, target, function):
    logits = logits.clone().requires_grad_()
    losses = function(logits, target)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("gap", [0.0, 5.0, 17.0, 46.0, 80.0])
def test_relative_precision_down_to_the_smallest_losses(gap):
    """At a gap of 46 the loss is 1e-20. Truth: fp64 through expm1/log1p of the sum over the others; 1e-6 is 10 eps."""
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    target = torch.arange(50) % 20
    logits[torch.arange(50), target] += gap
    losses, gradient = with_gradient(logits, target, per_sample_cross_entropy)
    z = logits.double()
    others = (z - z.gather(1, target[:, None])).exp().scatter(1, target[:, None], 0.0)
    exact = others.sum(1).log1p()
    p = others / (1 + others.sum(1, keepdim=True))
    p = p.scatter(1, target[:, None], -(p.sum(1, keepdim=True)))
    # z_j - z_y is rounded once at |z| <= 84: 84 * 6e-8 = 5e-6
    assert ((losses - exact).abs() / exact).max() <= 1e-5
    assert ((gradient - p).abs() <= 1e-5 * p.abs() + 1e-38).all()
    if gap > 40:
        assert (F.cross_entropy(logits, target, reduction="none") == 0).all() and (losses > 0).all()


def test_where_the_target_is_improbable_or_the_others_impossible():
    logits = torch.tensor([[-500.0, 0.0, 300.0], [3.0, -math.inf, -math.inf], [1e4, -1e4, 0.0]])
    losses, gradient = with_gradient(logits, torch.tensor([0, 0, 0]), per_sample_cross_entropy)
    assert losses.tolist() == [800.0, 0.0, 0.0] and gradient.isfinite().all()
    assert torch.allclose(gradient[0], torch.tensor([-1.0, 0.0, 1.0]))
    one_class, gradient = with_gradient(torch.zeros(2, 1), torch.zeros(2).long(), per_sample_cross_entropy)
    assert one_class.tolist() == [0.0, 0.0] and (gradient == 0).all()


def test_it_is_cross_entropy():
    logits = torch.randn(4, 7, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (4, 7))
    target[0, :3] = -100
    wanted = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
    assert torch.allclose(per_sample_cross_entropy(logits, target), wanted, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: per_sample_cross_entropy(z, target), logits)
    gradient = torch.autograd.grad(per_sample_cross_entropy(logits, target).sum(), logits)[0]
    assert (gradient[0, :3] == 0).all()
    assert per_sample_cross_entropy(logits.bfloat16(), target).dtype == torch.float32
    shifted = torch.vmap(per_sample_cross_entropy)(logits, target)
    assert torch.allclose(shifted, wanted)


@pytest.mark.parametrize(
    ("logits", "target", "error", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, "target must be"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, "int64"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "floating"),
        (None, torch.zeros(2).long(), TypeError, "logits"),
    ],
)
def test_arguments_are_checked(logits, target, error, words):
    with pytest.raises(error, match=words):
        per_sample_cross_entropy(logits, target)


def test_classification_and_regression():
    model, x = nn.Linear(5, 3), torch.randn(6, 5)
    y = torch.randint(3, (6,))
    assert torch.allclose(classification_loss(model, (x, y)), F.cross_entropy(model(x), y, reduction="none"))
    tokens, marks = torch.randn(6, 4, 5), torch.randint(3, (6, 4))
    per_token = F.cross_entropy(model(tokens).movedim(-1, 1), marks, reduction="none")
    assert torch.allclose(classification_loss(model, (tokens, marks)), per_token.mean(1), atol=1e-6)
    wanted = torch.randn(6, 3)
    assert torch.allclose(regression_loss(model, (x, wanted)), 0.5 * (model(x) - wanted).square().sum(1))
    with pytest.raises(ValueError, match="reshape"):
        regression_loss(model, (x, wanted[:, 0]))


@pytest.fixture(scope="module")
def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def batch_of_text():
    ids = torch.randint(31, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_language_model_losses(language_model):
    model, batch = language_model.eval(), batch_of_text()
    tokens, sequences = token_loss(model, batch), sequence_loss(model, batch)
    assert tokens.shape == (6, 8) and sequences.shape == (6,)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    theirs = model(**batch, labels=labels).loss
    counted = (labels[:, 1:] != -100).sum(1)
    assert torch.allclose((sequences * counted).sum() / counted.sum(), theirs, atol=1e-5)
    assert (tokens[1, 4:] == 0).all() and torch.allclose(tokens[0].mean(), sequences[0])
    ids = batch["input_ids"][2:]
    assert torch.allclose(token_loss(model, ids), tokens[2:], atol=1e-5)
    assert torch.allclose(token_loss(model, (ids,)), tokens[2:], atol=1e-5)
    assert torch.allclose(sequence_loss(model, {**batch, "labels": labels}), sequences)
    plain = nn.Sequential(nn.Embedding(31, 8), nn.Linear(8, 31))
    assert token_loss(plain, ids).shape == (4, 8)


@pytest.mark.parametrize(("loss", "losses_of_a_sample"), [(token_loss, 8), (sequence_loss, 1)])
def test_sampling_a_transformers_model(language_model, loss, losses_of_a_sample):
    model, batch = language_model.train(), batch_of_text()
    config = SGLDConfig(lr=1e-6, nbeta=10.0, localization=100.0, batch_size=3, num_chains=2, num_draws=3)
    sampler = Sampler(model, loss, batch, batch, config, seed=0)
    got = torch.cat([block.losses for block in sampler.run()])
    assert got.shape == (6, 6 * losses_of_a_sample) and got.isfinite().all() and (got.std(0) > 0).sum() > 5
    assert model.training


class Harmonic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 8), ht.HarmonicHead(8, 7, std=1.0)

    def features(self, x):
        return self.body(x).tanh()


@pytest.mark.parametrize("group", [1, 2])
def test_sampling_a_harmonic_head(group):
    model, x = Harmonic(), torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    data = (x, torch.arange(20) % 7)
    loss = harmonic_head_loss(Harmonic.features)
    assert torch.allclose(
        loss(model, data), -model.head(model.features(x)).gather(1, data[1][:, None])[:, 0], atol=1e-5
    )
    config = SGLDConfig(
        lr=1e-5, nbeta=10.0, localization=100.0, batch_size=10, num_chains=2, num_draws=5, chain_group_size=group
    )
    sampler = Sampler(model, loss, data, data, config, seed=0)
    got = torch.cat([block.losses for block in sampler.run()])
    assert torch.allclose(sampler.initial_losses, loss(model, data), atol=1e-5)
    assert got.isfinite().all() and (got.std(0) > 0).all()
