"""What the command is given: a Python function, ``package.module:function``, that returns a :class:`Task`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonic_triton.losskernel.sampling.data import samples

REQUIRED = ("model", "per_sample_loss", "train_data", "eval_data")
OPTIONAL = ("labels", "names", "groups", "group_names")
CONTRACT = (
    "a dict with model (nn.Module), per_sample_loss (a function of model and batch that returns a loss a sample), "
    "train_data and eval_data, and perhaps labels ((m,) integers), names (m strings), groups ((m,) integers) and "
    "group_names; or the first four as a tuple"
)


class EntryPointError(Exception):
    """The entry point cannot be found or does not return what is expected."""


@dataclass(frozen=True)
class Task:
    """What an entry point returns."""

    model: nn.Module
    per_sample_loss: Any  # (model, batch) -> (b,) or (b, ...)
    train_data: Any
    eval_data: Any
    labels: Tensor | None = None  # (m,) integers; pairs with equal ones are never neighbours
    names: Sequence[str] | None = None  # of the m samples
    groups: Tensor | None = None  # (m,) integers, for example which file; correlated with one another as wholes
    group_names: Sequence[str] | None = None


def resolve(text: str) -> Any:
    """The function named ``package.module:function``; modules in the working directory are found too.

    Raises:
        EntryPointError: no such module or function, or the module fails while it is imported.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise EntryPointError(f"{text!r} is no entry point: write package.module:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise EntryPointError(
                f"there is no module {error.name!r} (of {text!r}) on the path; run from the folder that holds it, or "
                "install it"
            ) from error
        raise EntryPointError(f"{module_name} needs {error.name!r}, which is not installed") from error
    except Exception as error:
        raise EntryPointError(f"{module_name} fails while it is imported: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            functions = sorted(key for key, value in vars(found).items() if callable(value) and not key.startswith("_"))
            raise EntryPointError(f"{module_name} has no {name!r}; it has {', '.join(functions) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise EntryPointError(f"{text} is {type(found).__name__}, not a function; it has to return {CONTRACT}")
    return found


def load(text: str, arguments: Sequence[str]) -> Task:
    """Call the entry point with ``name=value`` arguments and check what it returns.

    Raises:
        EntryPointError: it cannot be found or called so, or returns something else than :class:`Task` describes.
    """
    function = resolve(text)
    given = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise EntryPointError(f"--entry-arg {argument!r}: write name=value")
        given[name] = value
    try:
        returned = function(**given)
    except (TypeError, ValueError, OSError) as error:
        raise EntryPointError(f"{text} failed: {type(error).__name__}: {error}") from error
    return checked(text, returned)


def checked(text: str, returned: Any) -> Task:
    """A Task out of what the entry point returned."""
    if isinstance(returned, tuple) and hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if isinstance(returned, tuple) and len(returned) == len(REQUIRED):
        returned = dict(zip(REQUIRED, returned, strict=True))
    if not isinstance(returned, Mapping):
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise EntryPointError(f"{text} returned {type(returned).__name__}{size}, expected {CONTRACT}")
    missing = [name for name in REQUIRED if name not in returned]
    unknown = [str(name) for name in returned if name not in REQUIRED + OPTIONAL]
    if missing or unknown:
        wrong = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
        raise EntryPointError(f"{text} returned a dict {' and '.join(wrong)}; expected {CONTRACT}")
    task = Task(**returned)
    if not isinstance(task.model, nn.Module):
        raise EntryPointError(f"{text}: model is {type(task.model).__name__}, expected nn.Module")
    if not callable(task.per_sample_loss):
        kind = type(task.per_sample_loss).__name__
        raise EntryPointError(f"{text}: per_sample_loss is {kind}, expected a function of (model, batch)")
    for name in ("labels", "groups"):
        value = getattr(task, name)
        if value is not None and (not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point()):
            shape = f" of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else ""
            raise EntryPointError(f"{text}: {name} is {type(value).__name__}{shape}, expected (m,) integers")
    if task.groups is not None and len(task.groups):
        low, high = int(task.groups.min()), int(task.groups.max())
        if low < 0:
            raise EntryPointError(f"{text}: groups hold {low}; number them from 0 on")
        if task.group_names is not None and high >= len(task.group_names):
            raise EntryPointError(f"{text}: groups hold {high}, group_names has {len(task.group_names)}")
    return task


def check_sizes(text: str, task: Task, samples: int) -> None:
    """Labels, names and groups must be one a sample; how many samples there are is known from the losses at w*."""
    for name in ("labels", "names", "groups"):
        value = getattr(task, name)
        if value is not None and len(value) != samples:
            raise EntryPointError(f"{text}: {name} has {len(value)} entries, but eval_data gives {samples} losses")


def count_samples(text: str, task: Task) -> int:
    """m, from the loss of the first evaluation sample."""
    device = next((p.device for p in task.model.parameters()), torch.device("cpu"))
    data = samples("eval_data", task.eval_data, device)
    training = task.model.training
    task.model.eval()
    try:
        with torch.no_grad():
            first = task.per_sample_loss(task.model, data.block(0, 1))
    except Exception as error:
        raise EntryPointError(
            f"{text}: per_sample_loss(model, batch) fails on the first sample of eval_data: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        task.model.train(training)
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) != 1:
        got = f"a tensor of shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise EntryPointError(f"{text}: per_sample_loss gives {got} for one sample, expected (1,) or (1, ...)")
    return len(data) * first.numel()
