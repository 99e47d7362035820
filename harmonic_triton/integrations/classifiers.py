"""The harmonic loss for classifiers in the style of ``torchvision`` and ``timm``: features, then one linear layer."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from harmonic_triton._common import validate
from harmonic_triton.fused.options import HeadOptions
from harmonic_triton.modules import HarmonicHead


def replace_classifier(
    model: nn.Module,
    name: str | None = None,
    *,
    n: float | None = None,
    eps: float = 0.0,
    std: float | None = None,
    **loss_options: Unpack[HeadOptions],
) -> HarmonicHead:
    """Put a :class:`HarmonicHead` where a model has its last ``nn.Linear``, in place.

    ``model(images)`` then gives log-probabilities, so that whatever trains it goes on unchanged: of log-probabilities
    ``F.cross_entropy`` is ``F.nll_loss``, the harmonic loss. Class vectors are new, drawn at the size of the layer's weights;
    it does without the layer's bias, for a class vector that is moved does what that would.

    Args:
        model: any module; the last ``nn.Linear`` in the order of its modules is taken, which is the classifier of every
            ``torchvision`` and ``timm`` model without an auxiliary classifier behind it.
        name: the layer's name in ``model.named_modules()``, where it is another one.
        n, eps, loss_options: as in :class:`HarmonicHead`.
        std: of the class vectors; None for that of the layer's weights.

    Returns:
        The head.

    Raises:
        TypeError, ValueError: there is no such layer, or an argument is wrong.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {validate.describe(model)}")
    layers = {at: module for at, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = name if name is not None else next(reversed(layers), None)
    if found is None or found not in layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear"
            + ("" if name is None else f" of the name {name!r}")
            + (f"; it has {', '.join(map(repr, layers))}" if layers else "; a classifier ends in one")
        )
    if found == "":
        raise ValueError("the model is itself the nn.Linear; make a HarmonicHead in its place")
    old = layers[found]
    weight = old.weight
    head = HarmonicHead(
        old.in_features, old.out_features, n=n, eps=eps, std=float(weight.detach().std()) if std is None else std,
        device=weight.device, dtype=weight.dtype, **loss_options,
    )  # fmt: skip
    head.train(old.training)
    parent, _, last = found.rpartition(".")
    setattr(model.get_submodule(parent), last, head)
    return head
