"""Losses sample by sample, for :func:`sample_losses` and its relatives: ``per_sample_loss(model, batch) -> (b,)``.

Cross-entropy is computed in the leave-one-out form, log1p(sum_{j != y} exp(z_j - z_y)): F.cross_entropy in fp32 gives
exactly 0 below 6e-8, which on a confident model destroys the covariance of a third of the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harmonic_triton._common import validate
from harmonic_triton._common.transforms import in_transform


def per_sample_cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """-log softmax(logits)_target with full relative precision at any confidence: 1e-20 is 1e-20, not 0.

    Args:
        logits: (..., V), float16, bfloat16 (both computed in float32), float32 or float64.
        target: (...) int64; where it is ``ignore_index`` the loss is 0 and so is the gradient.

    Returns:
        (...) float32 or float64.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit.
    """
    validate.tensors(logits=logits, target=target)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {validate.describe(logits)}")
    if target.shape != logits.shape[:-1] or target.is_floating_point():
        raise ValueError(
            f"target must be int64 of shape {tuple(logits.shape[:-1])} (logits without the last dimension),"
            f" got {validate.describe(target)}" + ("; use target.long()" if target.is_floating_point() else "")
        )
    classes, ignored = logits.shape[-1], target == ignore_index
    if target.device.type == "cpu" and not (in_transform() or torch.compiler.is_compiling()):
        bad = target[((target < 0) | (target >= classes)) & ~ignored]
        if len(bad):
            raise ValueError(
                f"target holds {bad[0].item()}, outside 0 ... {classes - 1} (logits have {classes} classes);"
                f" mark what to skip with {ignore_index}"
            )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index = torch.where(ignored, 0, target.long()).unsqueeze(-1)
    others = (logits - logits.gather(-1, index)).scatter(-1, index, torch.finfo(logits.dtype).min)
    return F.softplus(others.logsumexp(-1), threshold=50.0).masked_fill(ignored, 0.0)


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of ``model(x)``, logits (b, V), against y (b,), for batches ``(x, y)``.

    Logits (b, T, V) against y (b, T) give the mean over T.
    """
    x, y = batch
    losses = per_sample_cross_entropy(model(x), y)
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def regression_loss(model: nn.Module, batch: Any) -> Tensor:
    """Half the squared error of ``model(x)`` against y of the same shape, summed over all but the batch: (b,)."""
    x, y = batch
    prediction = model(x)
    if prediction.shape != y.shape:
        raise ValueError(f"model(x) has shape {tuple(prediction.shape)} and y {tuple(y.shape)}; reshape one of them")
    squares: Tensor = (prediction - y).square()
    return 0.5 * squares.flatten(1).sum(1) if squares.dim() > 1 else 0.5 * squares


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Next-token cross-entropy of a causal language model, token by token: (b, T - 1).

    ``batch`` is input_ids (b, T), a tuple that begins with them, or a dict with "input_ids" and perhaps
    "attention_mask" and "labels" as a transformers model takes them. The model returns logits (b, T, V), or an object
    with ``.logits``, or a tuple that begins with them. Tokens masked out or labelled -100 have loss 0.
    """
    losses, _ = _next_token(model, batch)
    return losses


def sequence_loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean of :func:`token_loss` over each sequence's tokens that count: (b,)."""
    losses, counted = _next_token(model, batch)
    return losses.sum(-1) / counted.sum(-1).clamp(min=1)


def harmonic_head_loss(features: Callable[[nn.Module, Any], Tensor], head: str = "head") -> Callable[..., Tensor]:
    """A per-sample loss for a model whose submodule ``head`` is a :class:`HarmonicHead`, for batches ``(x, y)``.

    Args:
        features: ``features(model, x)``, the head's input (b, ..., D).
        head: the submodule's name.

    Returns:
        A function of (model, batch): the head's unreduced loss, shape of y.
    """

    def harmonic_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        losses: Tensor = model.get_submodule(head)(features(model, x), target=y, reduction="none")
        return losses

    return harmonic_loss


def _next_token(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    inputs = (
        dict(batch)
        if isinstance(batch, Mapping)
        else {"input_ids": batch[0] if isinstance(batch, (tuple, list)) else batch}
    )
    labels = inputs.pop("labels", inputs["input_ids"])[:, 1:]
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    output = model(**inputs) if isinstance(batch, Mapping) else model(inputs["input_ids"])
    logits = output.logits if hasattr(output, "logits") else output[0] if isinstance(output, tuple) else output
    return per_sample_cross_entropy(logits[:, :-1], labels), labels != -100
