"""The functions as modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from harmonic_triton._common import validate
from harmonic_triton.functional import HarmonicStats, harmonic_logits, linear_harmonic_loss
from harmonic_triton.fused.options import HARMONIC, HEAD, HeadOptions, ModuleOptions, collect


class HarmonicHead(nn.Module):
    """The harmonic layer of the paper (section 3): an ``nn.Linear`` without bias that measures distances.

    ``head(x)`` gives log-probabilities (..., V); ``head(x, target=t)`` gives the loss without the N x V matrix.
    Tie it to an embedding by ``head.weight = embedding.weight``.

    Args:
        in_features: D.
        out_features: V.
        n: harmonic exponent on the distance, None for sqrt(D); :func:`harmonic_triton.recommend` has one for many classes.
        eps: added to every squared distance. The authors' layer of exponent 1 is ``n=2, eps=1e-4``.
        learnable_n: make n a parameter of shape (1,), initialised with the value given.
        std: standard deviation of the initial class vectors (GPT-2's 0.02). HarMax ignores a *common* scale of x and w
            only: training starts well where x is of the size of w (:func:`harmonic_triton.init_last_norm_`).
        device, dtype: of the weight.
        loss_options: further options of :func:`linear_harmonic_loss` for ``head(x, target=t)``.

    Raises:
        TypeError, ValueError: an argument is wrong.

    The weights mean something only with their n and eps, so ``state_dict`` holds both as ``_extra_state``, a float64
    tensor [n, eps] (n is NaN where it is a parameter), and loading them into a head of other ones is an error in PyTorch's
    list, also with ``strict=False``. A state without it (an ``nn.Linear``'s, or one of a version before) loads with a
    warning. ``uniform_mix`` and the other loss options are the training's and not the model's: they are not stored.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n: float | None = None,
        eps: float = 0.0,
        learnable_n: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **loss_options: Unpack[HeadOptions],
    ) -> None:
        super().__init__()
        validate.integer("in_features", in_features, 1)
        validate.integer("out_features", out_features, 1)
        validate.exponent(n)
        validate.eps(eps)
        validate.flag("learnable_n", learnable_n)
        validate.between("std", std, 0.0, validate.FP32_LIMIT)
        if dtype is not None and dtype not in validate.FLOAT_DTYPES:
            raise TypeError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
        validate.class_weight(collect("HarmonicHead", loss_options, HEAD).class_weight, out_features)
        self.in_features, self.out_features, self.std = in_features, out_features, std
        self.eps, self.loss_options = eps, loss_options
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.initial_n = float(in_features) ** 0.5 if n is None else float(n)
        self.n: float | nn.Parameter = self.initial_n
        if learnable_n:
            self.n = nn.Parameter(torch.empty(1, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors from N(0, std^2); a learnable n gets its initial value."""
        nn.init.normal_(self.weight, std=self.std)
        if isinstance(self.n, Tensor):
            nn.init.constant_(self.n, self.initial_n)

    def forward(
        self, input: Tensor, target: Tensor | None = None, **options: Unpack[HeadOptions]
    ) -> Tensor | tuple[Tensor, HarmonicStats]:
        """Log-probabilities, or the loss where a target is given (``options`` override the module's).

        Options without a target are allowed, and checked: ``head(x, target=target_or_none, shift=True)`` is one line.
        """
        if options and (target is None or any(name not in HEAD for name in options)):
            _check_call(options)
        if target is None:
            group = {**self.loss_options, **options}.get("process_group")
            return harmonic_logits(input, self.weight, n=self.n, eps=self.eps, process_group=group)
        every = cast(Any, {**self.loss_options, **options})
        loss: Tensor | tuple[Tensor, HarmonicStats]
        loss = linear_harmonic_loss(input, self.weight, target, n=self.n, eps=self.eps, **every)
        return loss

    def _trained_with(self) -> tuple[float, float]:
        """n and eps; NaN for an n that is a parameter."""
        return math.nan if isinstance(self.n, Tensor) else float(self.n), float(self.eps)

    def get_extra_state(self) -> Tensor:
        """[n, eps] in float64, which no cast of the module changes; n is NaN where it is a parameter."""
        return torch.tensor(self._trained_with(), dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: what the state holds has been found to be this head's."""

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        n, key = state_dict.get(f"{prefix}n"), f"{prefix}_extra_state"
        if isinstance(n, Tensor) and n.dim() == 0:  # as it was stored before FSDP2, which cannot shard it
            state_dict[f"{prefix}n"] = n.reshape(1)
        mine, theirs = self._trained_with(), _read(state_dict.get(key))
        if theirs is None and f"{prefix}weight" in state_dict:
            warnings.warn(
                f"the state of {prefix[:-1] or 'this head'} does not say which n and eps its weights were trained with"
                f" (an nn.Linear's does not, nor one of an older version); they are taken for {_named(*mine)}",
                stacklevel=2,
            )
            state_dict[key] = self.get_extra_state()
        elif theirs is not None and not _same(theirs, mine, state_dict[key].dtype):
            error_msgs.append(
                f"the weights of {prefix[:-1] or 'this head'} were trained with {_named(*theirs)}, and this head has"
                f" {_named(*mine)}: its loss would be another. Make it as HarmonicHead(..., {_arguments(*theirs)}), or take"
                f" {key!r} out of the state if the change is meant"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        n = self.n
        if isinstance(n, Tensor):  # of a sharded one no process has the value at hand
            n = self.initial_n if n.is_meta or type(n).__name__ == "DTensor" else n.item()
        return f"in_features={self.in_features}, out_features={self.out_features}, n={n:g}, eps={self.eps:g}"


def _check_call(options: Mapping[str, Any]) -> None:
    """Raise for what no call of a head takes; without a target nobody else would look at it."""
    for name in options:
        if name in ("label", "labels", "targets"):
            raise TypeError(f"HarmonicHead takes the classes as target=, not {name}=")
        if name in ("n", "eps"):
            raise TypeError(
                f"{name} belongs to the head and its weights: HarmonicHead(..., {name}=...), not a call of it"
            )
    collect("HarmonicHead", options, HEAD)


def _read(state: Any) -> tuple[float, float] | None:
    """n and eps of a stored state, None where it does not tell."""
    if not isinstance(state, Tensor) or state.shape != (2,) or state.is_meta or type(state).__name__ == "FakeTensor":
        return None
    n, eps = state.tolist()
    return n, eps


def _same(theirs: tuple[float, float], mine: tuple[float, float], dtype: torch.dtype) -> bool:
    """Whether n and eps are equal as far as the stored dtype tells: some programs cast whole states to 16 bits."""
    rounding = max(1e-6, torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0
    pairs = zip(theirs, mine, strict=True)
    return all(math.isclose(a, b, rel_tol=rounding) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def _named(n: float, eps: float) -> str:
    return f"{'a learnable n' if math.isnan(n) else f'n = {n:g}'} and eps = {eps:g}"


def _arguments(n: float, eps: float) -> str:
    return f"{'learnable_n=True' if math.isnan(n) else f'n={n!r}'}, eps={eps!r}"


class LinearHarmonicLoss(nn.Module):
    """:func:`linear_harmonic_loss` with its options fixed; the class vectors are passed with every call.

    ``loss(input=x, linear_weight=w, target=t)``: by name, for some libraries' modules begin with the weight and others with
    the input, and where N = V nothing would tell that the two were swapped.

    Args:
        **options: keyword arguments of :func:`linear_harmonic_loss`.
    """

    def __init__(self, **options: Unpack[ModuleOptions]) -> None:
        super().__init__()
        collect("LinearHarmonicLoss", options, HARMONIC)
        self.options = options

    def forward(
        self,
        *unnamed: Tensor,
        input: Tensor | None = None,
        linear_weight: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, HarmonicStats]:
        """The loss of input (..., D) against linear_weight (V, D) and target (...), each given by its name."""
        if unnamed:
            raise TypeError(
                "LinearHarmonicLoss takes tensors by name, for input and linear_weight are easily swapped:"
                " loss(input=x, linear_weight=w, target=t)"
            )
        loss: Tensor | tuple[Tensor, HarmonicStats]
        loss = linear_harmonic_loss(
            cast(Tensor, input), cast(Any, linear_weight), cast(Any, target), **cast(Any, self.options)
        )
        return loss

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
