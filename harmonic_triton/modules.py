"""The functions as modules."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from harmonic_triton import _validate
from harmonic_triton.functional import HarmonicStats, harmonic_logits, linear_harmonic_loss

LOSS_OPTIONS = [p.name for p in inspect.signature(linear_harmonic_loss).parameters.values() if p.kind == p.KEYWORD_ONLY]


class HarmonicHead(nn.Module):
    """The harmonic layer of the paper (section 3): an ``nn.Linear`` without bias that measures distances.

    ``head(x)`` gives log-probabilities (..., V); ``head(x, target=t)`` gives the loss without the N x V matrix.
    Tie it to an embedding by ``head.weight = embedding.weight``.

    Args:
        in_features: D; out_features: V.
        n: harmonic exponent on the distance, None for sqrt(D).
        eps: added to every squared distance. The authors' layer of exponent 1 is ``n=2, eps=1e-4``.
        learnable_n: make n a 0-d parameter, initialised with the value given.
        std: standard deviation of the initial class vectors (GPT-2's 0.02; scale matters little: HarMax ignores it).
        device, dtype: of the weight.
        loss_options: further options of :func:`linear_harmonic_loss` for ``head(x, target=t)``.

    Raises:
        TypeError, ValueError: an argument is wrong.
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
        **loss_options: Any,
    ) -> None:
        super().__init__()
        _validate.integer("in_features", in_features, 1)
        _validate.integer("out_features", out_features, 1)
        _validate.exponent(n)
        _validate.eps(eps)
        _validate.between("std", std, 0.0)
        _validate.options("HarmonicHead", loss_options, LOSS_OPTIONS)
        self.in_features, self.out_features, self.std = in_features, out_features, std
        self.eps, self.loss_options = eps, loss_options
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.initial_n = float(in_features) ** 0.5 if n is None else float(n)
        self.n: float | nn.Parameter = self.initial_n
        if learnable_n:
            self.n = nn.Parameter(torch.empty((), device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors from N(0, std^2); a learnable n gets its initial value."""
        nn.init.normal_(self.weight, std=self.std)
        if isinstance(self.n, Tensor):
            nn.init.constant_(self.n, self.initial_n)

    def forward(
        self, input: Tensor, target: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, HarmonicStats]:
        """Log-probabilities, or the loss where a target is given (``options`` override the module's)."""
        if target is None:
            return harmonic_logits(input, self.weight, n=self.n, eps=self.eps)
        options = {**self.loss_options, **options}
        return linear_harmonic_loss(input, self.weight, target, n=self.n, eps=self.eps, **options)

    def extra_repr(self) -> str:
        n = self.n
        if isinstance(n, Tensor):
            n = self.initial_n if n.is_meta else n.item()
        return f"in_features={self.in_features}, out_features={self.out_features}, n={n:g}, eps={self.eps:g}"


class LinearHarmonicLoss(nn.Module):
    """:func:`linear_harmonic_loss` with its options fixed; the class vectors are passed with every call.

    Args:
        **options: keyword arguments of :func:`linear_harmonic_loss`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        _validate.options("LinearHarmonicLoss", options, LOSS_OPTIONS)
        self.options = options

    def forward(self, linear_weight: Tensor, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, HarmonicStats]:
        """The loss of input (..., D) against linear_weight (V, D) and target (...)."""
        return linear_harmonic_loss(input, linear_weight, target, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
