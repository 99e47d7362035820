"""``integrations.classifiers``: a harmonic head in place of a model's last linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harmonic_triton import HarmonicHead, linear_harmonic_loss
from harmonic_triton.integrations.classifiers import replace_classifier


class Residual(nn.Module):
    """torchvision's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.squeeze = nn.Conv2d(1, 6, 3), nn.Linear(6, 6)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.avgpool(self.conv1(x).relu()).flatten(1)
        return self.fc(x + self.squeeze(x))


class Vision(Residual):
    """A classifier within a container, and a projection behind it in the order of modules."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Identity()
        self.heads = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5))
        self.project = nn.Linear(6, 3)

    def forward(self, x):
        return self.heads(super().forward(x))


@pytest.mark.parametrize(("model_class", "name", "at"), [(Residual, None, "fc"), (Vision, "heads.1", "heads.1")])
def test_a_training_loop_goes_on_unchanged(model_class, name, at):
    torch.manual_seed(0)
    model = model_class().double().eval()
    std = float(model.get_submodule(at).weight.detach().std())
    head = replace_classifier(model, name, n=3.0, eps=1e-3)
    assert model.get_submodule(at) is head and isinstance(head, HarmonicHead) and not head.training
    assert head.weight.dtype == torch.float64 and 0.4 < float(head.weight.detach().std()) / std < 2.5
    images, target, features = torch.randn(7, 1, 5, 5, dtype=torch.float64), torch.arange(7) % 5, []
    head.register_forward_pre_hook(lambda _, args: features.append(args[0].detach().clone().requires_grad_()))
    loss = 3 * F.cross_entropy(model(images), target)
    loss.backward()
    weight = head.weight.detach().clone().requires_grad_()
    wanted = 3 * linear_harmonic_loss(features[0], weight, target, n=3.0, eps=1e-3, backend="reference")
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(head.weight.grad, weight.grad)
    assert all(p.grad is not None for p in model.squeeze.parameters())


def test_the_last_layer_is_taken():
    model = Vision()
    assert model.project is not replace_classifier(model, "heads.1") and isinstance(model.heads[1], HarmonicHead)
    assert replace_classifier(model, uniform_mix=0.1) is model.project and model.project.loss_options == {
        "uniform_mix": 0.1
    }
    assert model.project.initial_n == pytest.approx(6**0.5)


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [(Residual(), "head", "no nn.Linear of the name 'head'; it has 'squeeze', 'fc'"),
     (nn.Sequential(nn.ReLU()), None, "has no nn.Linear; a classifier ends in one"),
     (nn.Linear(2, 3), None, "is itself the nn.Linear")],
)  # fmt: skip
def test_what_has_no_classifier(model, name, why):
    with pytest.raises(ValueError, match=why):
        replace_classifier(model, name)
