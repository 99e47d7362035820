"""The sampled parameters of a model as one vector, and the losses as a function of it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from harmonic_triton._common import validate
from harmonic_triton._common.processes import rank_and_world
from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.sampling.data import Samples
from harmonic_triton.losskernel.sampling.rng import CounterRNG

SQUARED = 2**15  # entries of a vector that are squared at once: 256 KiB in fp64

PerSampleLoss = Callable[[nn.Module, Any], Tensor]
Mask = str | Sequence[str] | Mapping[str, Tensor | bool] | None


class Share(NamedTuple):
    """Which chains are this process's: number ``place``, ``place + world``, ... of them."""

    place: int
    world: int  # of processes, or of groups of processes that hold one model together
    leads: bool  # whether this is the process of its group that writes and prints


ALONE = Share(0, 1, True)


class _LossModule(nn.Module):
    """The loss as a module, so that functional_call reaches every use of the model's weights in it."""

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss) -> None:
        super().__init__()
        self.model, self.per_sample_loss = model, per_sample_loss

    def forward(self, batch: Any) -> Tensor:
        return self.per_sample_loss(self.model, batch)


class FlatParameters:
    """The sampled parameters of a model as one vector, and the losses as a function of it.

    ``sharding.ShardedParameters`` is the same for a model that several processes hold together: P, and every vector, is
    then this process's part, and what is said of all of them (``norm``, ``spread``, ...) is agreed on.
    """

    sharded = False
    group: Any = None  # the processes that hold the parameters together

    def __init__(self, model: nn.Module, per_sample_loss: PerSampleLoss, mask: Mask) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {validate.describe(model)}")
        if not callable(per_sample_loss):
            raise TypeError(f"per_sample_loss must be callable, got {validate.describe(per_sample_loss)}")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "the probe takes gradients, which torch.inference_mode forbids: call this outside; torch.no_grad does no harm"
            )
        self.model, self.share = model, self.find_share()
        self.probe = _LossModule(model, per_sample_loss)
        aliases: dict[Tensor, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(parameter, []).append(name)
        chosen = _chosen(aliases, mask)
        if not chosen:
            raise ValueError(
                f"no parameter is sampled with mask {mask!r}; the model's parameters that require a gradient are"
                f" {[names[0] for p, names in aliases.items() if p.requires_grad][:20]}"
            )
        validate.tensors(**{aliases[p][0]: self.here(p) for p in chosen})
        for p in chosen:
            if p.dtype not in validate.FLOAT_DTYPES:
                raise TypeError(
                    f"parameter {aliases[p][0]!r} must be bfloat16, float16, float32 or float64 to be sampled, got"
                    f" {validate.describe(p)}; leave it out with mask=, or hold a complex one as its"
                    " torch.view_as_real and call torch.view_as_complex in forward"
                )
        devices = {p.device for p in chosen}
        if len(devices) > 1:
            raise ValueError(f"the sampled parameters are on {sorted(map(str, devices))}; move them to one device")
        self.parameters = list(chosen)
        self.aliases = [[f"model.{name}" for name in aliases[p]] for p in self.parameters]
        self.shapes = [self.here(p).shape for p in self.parameters]
        self.sizes = [shape.numel() for shape in self.shapes]
        elsewhere = {p for m in model.modules() if not isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
        # weights of Linear lie as a group's gradients come, (in, out): sums of both go entry by entry in memory's order
        self.flipped = [p.dim() == 2 and p not in elsewhere for p in self.parameters]
        wide = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        with torch.no_grad():
            self.center = self.flat([self.here(p) for p in self.parameters], wide)
            masks = [chosen[p] for p in self.parameters]
            self.mask, self.masks = None, masks
            if any(m is not None for m in masks):
                self.mask = self.flat(
                    [
                        torch.ones_like(self.here(p)) if m is None else self.part_of(p, m)
                        for p, m in zip(self.parameters, masks, strict=True)
                    ],
                    wide,
                )
        self.num_sampled = sum(
            p.numel() if m is None else int(m.sum()) for p, m in zip(self.parameters, masks, strict=True)
        )
        self.fixed = {f"model.{name}": p.detach() for p, names in aliases.items() if p not in chosen for name in names}
        self.buffers = {f"model.{name}": b for name, b in model.named_buffers(remove_duplicate=False)}
        self.private: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def fingerprint(self) -> str:
        masked = "" if self.mask is None else f" masked {checkpoint.digest({'mask': self.whole_mask()})}"
        names = hashlib.blake2b(" ".join(names[0] for names in self.aliases).encode(), digest_size=6).hexdigest()
        return f"{self.num_sampled} in {len(self.aliases)} tensors {names}{masked}"

    # --- where parameters lie ------------------------------------------------------------------------------------------

    def find_share(self) -> Share:
        """Which chains are this process's."""
        return Share(*rank_and_world(), leads=True)

    def here(self, parameter: Tensor) -> Tensor:
        """What this process holds of a parameter."""
        return parameter

    def part_of(self, parameter: Tensor, values: Tensor) -> Tensor:
        """What this process holds, of values of the whole parameter's shape."""
        return values

    def whole_mask(self) -> Tensor:
        """The mask of the whole model's vector, ones where there is none."""
        return torch.ones_like(self.center) if self.mask is None else self.mask

    def masked_(self, values: Tensor) -> Tensor:
        """Zero the entries of (..., P) that do not move, in place."""
        return values if self.mask is None else values.mul_(self.mask)

    def add_(self, out: Tensor, values: Sequence[Tensor], alpha: float) -> None:
        """Add alpha times ``values``, (..., *shape) for each parameter, to ``out`` (..., P)."""
        for part, one in zip(self.parts(out), values, strict=True):
            part.add_(one, alpha=alpha)

    def flat(self, values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(P,) from a tensor of each parameter's shape."""
        turned = [value.mT if flip else value for value, flip in zip(values, self.flipped, strict=True)]
        return torch.cat([value.reshape(-1).to(self.parameters[0].device, dtype) for value in turned])

    def parts(self, weights: Tensor) -> list[Tensor]:
        """Views of (..., P) weights as the parameters, (..., *shape)."""
        lead, views = weights.shape[:-1], []
        for part, own, flip in zip(weights.split(self.sizes, -1), self.shapes, self.flipped, strict=True):
            shape = own[::-1] if flip else own
            views.append(part.view((*lead, *shape)).mT if flip else part.view((*lead, *shape)))
        return views

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Copies of (P,) weights as the parameters, by name: DTensors where those are."""
        copies = (part.clone(memory_format=torch.contiguous_format) for part in self.parts(weights))
        return {names[0].removeprefix("model."): copy for names, copy in zip(self.aliases, copies, strict=True)}

    def unnamed(self, values: Mapping[str, Tensor]) -> Tensor:
        """(P,) weights from what :meth:`named` gave."""
        return self.flat(list(values.values()), self.center.dtype)

    def own(self, vectors: Tensor) -> Tensor:
        """What this process holds, (k, P), of vectors of the whole model."""
        return vectors

    # --- what is said of all entries of a vector -----------------------------------------------------------------------

    def noise(self, rng: CounterRNG, out: Tensor, chains: list[int], step: int, std: float = 1.0) -> None:
        """Fill each (P,) row of ``out`` with N(0, std²) for its chain; zeros for chain -1."""
        rng.noise(out, chains, step, std)

    def spread(self, vectors: Tensor) -> Tensor:
        """(k,) largest less smallest entry of (k, P): NaN or infinite where an entry is."""
        # torch vectorises these two, but no norm and no isfinite().all()
        return vectors.amax(1) - vectors.amin(1)

    def dot(self, one: Tensor, other: Tensor) -> float:
        return float(torch.dot(one, other))

    def norm(self, vector: Tensor) -> float:
        return float(vector.norm())

    def square_sum(self, vectors: Tensor) -> Tensor:
        """(k, 1) sums of the squares of (k, P), the same bits in whatever order and parts they are added.

        The squares are cut to multiples of a unit of which int64 holds all their sum: 2^62 of them make P times the
        largest.
        """
        pieces = [piece for piece in vectors.split(SQUARED, 1) if piece.numel()]
        largest = vectors.new_zeros(len(vectors), dtype=torch.float64)
        for piece in pieces:
            largest = torch.maximum(largest, piece.abs().amax(1).double().square())  # NaN stays
        largest = self.over_all(largest, "max")
        unit = torch.exp2(torch.frexp(largest).exponent.double() - 62 + math.ceil(math.log2(self.num_entries)))
        counts, inverse = vectors.new_zeros(len(vectors), dtype=torch.int64), unit.reciprocal()[:, None]
        for piece in pieces:
            counts += piece.double().square_().mul_(inverse).long().sum(1)
        total = self.over_all(counts, "sum").double() * unit
        return torch.where(largest.isfinite(), total, math.nan).to(vectors.dtype).unsqueeze(1)

    @property
    def num_entries(self) -> int:
        """Entries of the whole model's vector."""
        return sum(p.numel() for p in self.parameters)

    def over_all(self, values: Tensor, how: str) -> Tensor:
        """The "max" or "sum" of every process's values, NaN as infinity in the first."""
        return values

    def agree_on(self, fingerprint: Mapping[str, str]) -> None:
        """Every process was given the same; ValueError if not."""

    def agreed(self, values: Tensor) -> Tensor:
        """The leading process's values."""
        return values

    # --- passes of the model -------------------------------------------------------------------------------------------

    def placed(self, weights: Tensor) -> list[Tensor]:
        """(P,) weights as the model holds its own, for ``losses`` and ``gradient``; until the next call.

        Copies, for a product rounds by the strides and the alignment of what is multiplied: a chain alone is to see
        weights as a module has them.
        """
        return [part.clone(memory_format=torch.contiguous_format) for part in self.parts(weights)]

    def gradient(self, values: list[Tensor], batch: Any, share: float) -> tuple[Tensor, list[Tensor]]:
        """``share`` times the mean loss of a batch, and the gradient of that for each parameter."""
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad():
            mean = self.losses(leaves, batch).mean() * share
            return mean.detach(), list(torch.autograd.grad(mean, leaves, materialize_grads=True))

    def read(self, weights: Tensor, data: Samples, rows: int) -> Tensor:
        """(m,) float32 losses of all samples at (P,) weights, ``rows`` of them a pass."""
        values = self.placed(weights)
        return torch.cat([self.losses(values, data.block(i, i + rows)).float() for i in range(0, len(data), rows)])

    def call(self, parts: list[Tensor], batch: Any) -> Any:
        """What per_sample_loss returns with these values of the sampled parameters."""
        swapped: dict[str, Tensor] = {**self.fixed, **self.private}
        for part, parameter, names in zip(parts, self.parameters, self.aliases, strict=True):
            part = part.to(parameter.dtype)
            for name in names:
                swapped[name] = part
        return functional_call(self.probe, swapped, (batch,), tie_weights=False)

    def losses(self, parts: list[Tensor], batch: Any) -> Tensor:
        """Flat losses of a batch with these values of the sampled parameters."""
        losses = self.call(parts, batch)
        for name, version in self.versions.items():
            if self.private[name]._version != version:  # the forward wrote to it: no pass may see another's traces
                self.private[name] = self.buffers[name].clone()
                self.versions[name] = self.private[name]._version
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"per_sample_loss must return a floating tensor, got {validate.describe(losses)}")
        rows = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)][:1]
        if losses.dim() == 0 or (rows and len(losses) != rows[0]):
            raise ValueError(
                f"per_sample_loss must return one loss for each of the {rows[0] if rows else 'b'} samples, (b,) or"
                f" (b, ...), got {validate.describe(losses)}; use reduction='none'"
            )
        if parts[0].requires_grad and not losses.requires_grad:
            raise ValueError(
                "per_sample_loss gives losses without a gradient by the sampled parameters: it, or the model, detaches them"
                " or leaves the parameters out"
            )
        return losses.reshape(-1)

    def losses_of_group(self, parts: list[Tensor], batch: Any, batch_dim: int | None) -> Tensor:
        """(k, ...) losses at k values of each parameter, on one batch or (``batch_dim=0``) one for each."""
        with sdpa_kernel(SDPBackend.MATH):  # the attention that vmap has rules for on every device
            return vmap(self.losses, in_dims=(0, batch_dim))(parts, batch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """eval() mode and private buffers within; every module's own mode again after."""
        modes = [(module, module.training) for module in self.model.modules()]
        copies = {id(buffer): buffer.clone() for buffer in self.buffers.values()}
        self.private = {name: copies[id(buffer)] for name, buffer in self.buffers.items()}
        self.versions = {name: buffer._version for name, buffer in self.private.items()}
        try:
            self.model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def flops(self, batch: Any) -> tuple[int, float]:
        """(forward operations for a batch, at least one product with each weight; convolutions' share of them)."""
        from torch.utils.flop_counter import FlopCounterMode  # brings in all of triton

        with self.evaluating(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.losses(self.parts(self.center), batch)
        counts = counter.get_flop_counts().get("Global", {})
        total = sum(counts.values())
        convolutions = sum(count for operator, count in counts.items() if "conv" in str(operator))
        return max(total, 2 * len(self.center)), convolutions / max(total, 1)

    def vmap_obstacle(self, data: Samples) -> str | None:
        """Why chains cannot be vmapped; None if they can."""
        one, each = data.batch(torch.zeros(1, dtype=torch.int64)), data.batch(torch.zeros(2, dtype=torch.int64))
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(one)):
            return "a batch holds values that are not tensors"
        each = tree_map(lambda leaf: leaf.unflatten(0, (2, 1)), each)
        parts = [part.requires_grad_() for part in self.parts(self.center.repeat(2, 1))]
        with self.evaluating(), warnings.catch_warnings(), torch.enable_grad():
            self.losses([part[0] for part in parts], one)  # what fails without vmap is no obstacle to it
            warnings.filterwarnings("error", message="There is a performance drop")
            try:
                for batch, batch_dim in ((one, None), (each, 0)):
                    losses = self.losses_of_group(parts, batch, batch_dim)
                    torch.autograd.grad(losses.sum(), parts, materialize_grads=True)
            except (RuntimeError, NotImplementedError, UserWarning) as error:
                return str(error).splitlines()[0]
        return None


def _chosen(aliases: Mapping[Tensor, list[str]], mask: Mask) -> dict[Tensor, Tensor | None]:
    """The parameters that move, each with the entries that do (None: all)."""
    trainable = {p: names for p, names in aliases.items() if p.requires_grad and p.numel()}
    if mask is None:
        return dict.fromkeys(trainable)
    known = {name: p for p, names in aliases.items() for name in names}
    if isinstance(mask, Mapping):
        chosen: dict[Tensor, Tensor | None] = {}
        for name, entries in mask.items():
            if name not in known:
                raise ValueError(f"mask names {name!r}, which is no parameter of the model")
            parameter = known[name]
            if isinstance(entries, Tensor):
                if entries.shape != parameter.shape or entries.dtype != torch.bool:
                    raise ValueError(
                        f"mask[{name!r}] must be a bool tensor of shape {tuple(parameter.shape)},"
                        f" got {validate.describe(entries)}"
                    )
                if entries.any():
                    chosen[parameter] = entries
            elif not isinstance(entries, bool):
                raise TypeError(
                    f"mask[{name!r}] must be a bool tensor, True or False, got {validate.describe(entries)}"
                )
            elif entries:
                chosen[parameter] = None
        frozen = [aliases[p][0] for p in chosen if not p.requires_grad]
        if frozen:
            raise ValueError(f"mask names frozen parameters {frozen}; call requires_grad_() on them or leave them out")
        return chosen
    patterns = [mask] if isinstance(mask, str) else list(mask)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"mask must be a name pattern, several, or a dict, got {validate.describe(mask)}")
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name in known)]
    if unmatched:
        raise ValueError(f"mask patterns {unmatched} match no parameter; names are like {list(known)[:5]}")
    return {
        p: None
        for p, names in trainable.items()
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
    }
