"""A patched model's forward pass: the model's own, whose head and loss function are told what it is for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harmonic_triton.integrations.transformers.head import ACTIVE, CHANGED, Call, LossHead
from harmonic_triton.integrations.transformers.lazy import LazyLogits
from harmonic_triton.integrations.transformers.transform import measure


def heads_of(model: Any) -> list[LossHead]:
    """The head, and the copies of it that PEFT trains in its place.

    Raises:
        TypeError: something else stands there.
    """
    module = model.get_output_embeddings()
    if isinstance(module, LossHead):
        return [module]
    heads = [part for part in module.modules() if isinstance(part, LossHead)]
    if type(module).__name__ != "ModulesToSaveWrapper" or not heads:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(
            f"the output embedding has become a {kind}"
            + (", and what an adapter adds to a head's result are dot products, not distances" if heads else "")
            + ": leave it out of target_modules and trainable_token_indices (modules_to_save trains it whole), or give the"
            " model a plain layer by model.set_output_embeddings(...)"
        )
    return heads


def run(model: Any, forward: Any, wants_loss: bool, args: Any, kwargs: Any) -> Any:
    """A forward pass whose head is told what it is for."""
    check_whole(model)
    call, outer = Call(heads_of(model), wants_loss), ACTIVE.call
    ACTIVE.call = call
    try:
        output = forward(model, *args, **kwargs)
    finally:
        ACTIVE.call = outer
    if call.head is None or call.input is None or call.given is None:
        raise TypeError(f"{type(model).__name__} does not call its output embedding: it cannot be patched")
    if not wants_loss:
        _unchanged(call.given, output, call.written())
        return output
    if call.seen is None:
        raise TypeError(f"{type(model).__name__} does not call self.loss_function where it is given labels")
    if torch.compiler.is_compiling():  # no graph can return what is not formed
        return _without(output, call.seen)
    return _replaced(output, call.seen, LazyLogits.of(call.head, call.input, call.transform))


def compute_loss(
    model: Any,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The model's ``loss_function``: the same arguments and meaning as ``transformers``' for causal language models."""
    call = ACTIVE.call
    if call is None or call.head is None or call.input is None or call.given is None:
        raise TypeError("the logits that the loss function was given did not come from the model's output embedding")
    call.seen, call.transform = logits, measure(call.given, logits, call.written())
    target = labels if shift_labels is None else shift_labels
    target = target.to(call.input.device)
    items = num_items_in_batch
    if items is not None:
        items = _count(items, target, ignore_index)
    loss: Tensor = call.head(
        call.input, target, transform=call.transform, num_items=items, ignore_index=ignore_index, shift=shift_labels is None
    )  # fmt: skip
    return loss


def _count(items: Any, target: Tensor, ignore_index: int) -> Any:
    """``num_items_in_batch``; where no token counts, a count of 0 is a 1: the loss is 0 and not 0/0."""
    if not isinstance(items, Tensor):
        if items:
            return items
        items = torch.zeros((), device=target.device)
    items = items.reshape(()).to(target.device)
    nothing = (items == 0) & (target == ignore_index).all()
    return torch.where(nothing, torch.ones_like(items), items)


def _logits_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, Tensor)), None)
    logits: Tensor | None = output.logits
    return logits


def _unchanged(given: Tensor, output: Any, written: bool) -> None:
    """Raise where a model's logits are not the log-probabilities that its head gave."""
    logits = _logits_of(output)
    if logits is None or (logits is given and not written):
        return
    if written or logits.shape != given.shape or not torch.equal(logits, given.to(logits.device, logits.dtype)):
        raise ValueError(CHANGED.format("something else"))


def _replaced(output: Any, old: Tensor, new: Any) -> Any:
    """A model's output with other logits."""
    if isinstance(output, tuple):
        return tuple(new if value is old else value for value in output)
    if output.get("logits") is old:
        output.logits = new
    return output


def _without(output: Any, old: Tensor) -> Any:
    """A model's output without logits."""
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not old)
    return type(output)(**{name: value for name, value in output.items() if value is not old})


def check_whole(model: Any) -> None:
    """Raise where the classes are spread over devices."""
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise TypeError(
            "tensor parallelism shards the output embedding, and the loss needs every class; load the model without tp_plan"
        )
