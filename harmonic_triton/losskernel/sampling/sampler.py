"""Localised SGLD around trained weights, and the per-sample losses along it (*The Loss Kernel*, appendix B).

The probe is p(w) ~ exp(-nbeta L_n(w) - (gamma/2) ||w - w*||^2), with L_n the mean loss over the training data, nbeta the
inverse temperature times n and gamma the localization. Every chain starts at the trained weights w*. One step is

    w <- w - (eps/2) [nbeta grad L_B(w) + gamma (w - w*)] + N(0, eps),      L_B the mean loss of a random minibatch.

What chain c does in step t depends on (seed, c, t) alone: the minibatch and the noise come from generators that start
anew at every step. Chains can therefore be grouped, spread over processes, stopped and resumed without changing a draw.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from harmonic_triton._common import validate
from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.sampling import methods, stability
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.data import samples
from harmonic_triton.losskernel.sampling.parameters import Mask, PerSampleLoss, Share
from harmonic_triton.losskernel.sampling.rng import CounterRNG
from harmonic_triton.losskernel.sampling.sharding import flat_parameters

VMAP_FLOPS = 2**34  # forward operations of a pass over a whole group; bounds its memory (benchmarks.sampler)
VMAP_CHAINS = 32
SAME_LOSSES = 0.02  # relative difference of losses at w* that other threads, devices and 16-bit products may make
CHECK_EVERY = 32  # steps between looks for diverged weights while no draw is taken


class Draws(NamedTuple):
    """One draw of each of k chains."""

    losses: Tensor  # (k, m) float32, on the model's device; NaN for a chain that diverged
    chain: Tensor  # (k,) int64
    draw: Tensor  # (k,) int64, index within the chain
    train_loss: Tensor  # (k,) float32, mean minibatch loss over the steps since the last draw


class Sampler:
    """Chains of one run, group after group. :func:`sample_losses` is the plain way in; this is the machine behind it.

    The model is only read: its weights, buffers, mode and gradients are the same at every moment the caller can look, also
    after an exception or an iterator left behind. Gradients and losses are both taken in ``eval()`` mode, for the probe
    is a density of one fixed function L_n(w): dropout is off, batch-norm uses its running statistics and leaves them
    alone. Frozen parameters stay; tied ones move together. Weights below float32 are sampled in float32 and rounded for
    each pass. An autocast around the call reaches the model's passes, as in training, and nothing else.

    Weights that ``fully_shard`` has spread over processes stay spread: all processes of the mesh make the same calls with the
    same arguments and data, chains run one at a time, and on a CPU the draws are bitwise those of one process that holds the
    model (``chain_group_size=1``), for 1, 2, 4, 8, ... processes. While a draw is made the shards hold the chain's weights.

    A chain whose weights are no longer finite has diverged: one warning, NaN draws from then on, no further work for it. The
    others go on bitwise as if nothing had happened (in a vmapped group its row stays at w*, to keep their shapes).

    Args:
        model: any nn.Module. ``per_sample_loss(model, batch)`` must read weights through it.
        per_sample_loss: returns (b,) losses, or (b, ...) where a sample has several (tokens), which are then flattened.
        train_data, eval_data: tensors, tuples or dicts of them, or Datasets whose samples the default collate batches.
        config: an :class:`SGLDConfig`.
        seed: non-negative int below 2^63.
        device: where the samples go; None: where the model's parameters are.
        mask: which parameters move. None: all that require a gradient; a shell-style pattern or several: those whose
            name (or alias, if tied) matches; a dict from names to bool tensors of the parameter's shape, or True:
            those entries.
        chains: the chains this process runs; None: all, or under torch.distributed rank, rank + world, ... (of a sharded
            model counted in groups of processes that hold one together).

    Raises:
        TypeError, ValueError: an argument is wrong, or a loss at w* is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: PerSampleLoss,
        train_data: Any,
        eval_data: Any,
        config: SGLDConfig,
        *,
        seed: int,
        device: torch.device | str | None = None,
        mask: Mask = None,
        chains: Sequence[int] | None = None,
    ) -> None:
        if not isinstance(config, SGLDConfig):
            raise TypeError(f"config must be an SGLDConfig, got {validate.describe(config)}")
        validate.seed(seed)
        self.config, self.seed = config, seed
        self._parameters = flat_parameters(model, per_sample_loss, mask)
        self.device = torch.device(device) if device is not None else self._parameters.center.device
        self.train_data = samples("train_data", train_data, self.device)
        self.eval_data = samples("eval_data", eval_data, self.device)
        if config.batch_size > len(self.train_data):
            raise ValueError(
                f"batch_size {config.batch_size} exceeds the {len(self.train_data)} training samples;"
                f" batch_size={len(self.train_data)} means full-batch gradients"
            )
        share = self._parameters.share
        taken = range(share.place, config.num_chains, share.world) if chains is None else chains
        self.chains = [int(chain) for chain in taken]
        if len(set(self.chains)) != len(self.chains) or not all(0 <= c < config.num_chains for c in self.chains):
            raise ValueError(f"chains must be distinct and between 0 and {config.num_chains - 1}, got {self.chains}")
        self._rng, self._method = CounterRNG(seed), methods.method(config, self._parameters)
        self._fingerprint: dict[str, str] | None = None
        size, self._vmapped_eval = self._choose_group_size()
        self.groups = [self.chains[i : i + size] for i in range(0, len(self.chains), size)]
        if self.sharded:
            self._parameters.agree_on(self.fingerprint)
        self.initial_losses = self._read_initial_losses()
        self.dead: dict[int, int] = {}  # chain: the step at which it was found
        self._group, self._draw = 0, 0
        self._state: dict[str, Tensor] = {}
        self._weights = self._parameters.center.new_empty(0)
        self._stability_bound: float | None = None

    @property
    def sharded(self) -> bool:
        """Whether several processes hold the model's weights together."""
        return self._parameters.sharded

    @property
    def group(self) -> Any:
        """The processes that hold the model's weights together, and run each of their chains together; None for one."""
        return self._parameters.group

    @property
    def share(self) -> Share:
        """Which chains are this process's unless ``chains`` says, and whether it writes and prints for its group."""
        return self._parameters.share

    @property
    def num_samples(self) -> int:
        """m, the losses of one draw."""
        return len(self.initial_losses)

    @property
    def remaining(self) -> int:
        """Draws that this process has still to take, over all its chains."""
        chains = sum(len(group) for group in self.groups[self._group :])
        done = len(self.groups[self._group]) * self._draw if self._group < len(self.groups) else 0
        return chains * self.config.num_draws - done

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the draws depend on: hashes of the weights and data, every setting, the seed and the chains."""
        if self._fingerprint is None:
            loss = self._parameters.probe.per_sample_loss
            self._fingerprint = {
                "model": checkpoint.digest(dict(self._parameters.model.state_dict())),
                "sampled parameters": self._parameters.fingerprint(),
                "per-sample loss": getattr(loss, "__qualname__", type(loss).__qualname__),
                "train data": self.train_data.fingerprint(),
                "evaluation data": self.eval_data.fingerprint(),
                "seed": str(self.seed),
                "chains": " | ".join(" ".join(map(str, group)) for group in self.groups),
                **{name: repr(value) for name, value in dataclasses.asdict(self.config).items()},
            }
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`run` needs to go on after the last draw it yielded (tensors on their device)."""
        state: dict[str, Any] = {
            "fingerprint": dict(self.fingerprint),
            "initial_losses": self.initial_losses.clone(),
            "group": self._group,
            "draw": self._draw,
            "dead": dict(self.dead),
            "state": {name: tensor.clone() for name, tensor in self._state.items()},
        }
        if self.sharded:
            columns = [name for name in self._state if name not in methods.PER_CHAIN]
            state["sharded"] = {name: self._parameters.named(state["state"].pop(name)[0]) for name in columns}
        return state

    def sharded_templates(self, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Zeros for ``state_dict()["sharded"]`` of these names, as ``torch.distributed.checkpoint`` loads into."""
        zeros = torch.zeros_like(self._parameters.center)
        return {name: self._parameters.named(zeros) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another model, dataset, loss, configuration or seed; the message lists what differs.
        """
        checkpoint.check_fingerprint(state["fingerprint"], self.fingerprint)
        self._check_function(state)
        self._group, self._draw, self.dead = state["group"], state["draw"], dict(state["dead"])
        center = self._parameters.center
        self._state = {
            name: tensor.to(center.device, copy=True)
            if name in methods.PER_CHAIN
            else self._parameters.own(tensor).to(center.device, copy=True)
            for name, tensor in state["state"].items()
        }
        for name, parts in state.get("sharded", {}).items():
            self._state[name] = self._parameters.unnamed(parts).unsqueeze(0)
        self._weights = center.new_empty(0)

    def _check_function(self, state: Mapping[str, Any]) -> None:
        """The code of model and loss cannot be hashed: what it gives at w* stands for it, up to the last digits."""
        saved, present = state.get("initial_losses"), self.initial_losses.cpu().double()
        if saved is not None and (saved.cpu().double() - present).norm() > SAME_LOSSES * present.norm():
            raise ValueError(
                f"the checkpoint belongs to another run: its losses at the trained weights are {saved.mean():.6g} on the mean"
                f" there, {present.mean():.6g} here, so per_sample_loss or the model's forward has changed; restore it or"
                " take a new directory"
            )

    def run(self, *, check_step_size: bool = True) -> Iterator[Draws]:
        """Draws from the present state on: for each group of chains, one block for each draw.

        A run from the start first warns if lr is beyond :meth:`stability_bound` (24 gradients of a minibatch).
        """
        validate.flag("check_step_size", check_step_size)
        if check_step_size:
            self._warn_if_unstable()
        self._weights = self._parameters.center.new_empty(0)
        while self._group < len(self.groups):
            chains = self.groups[self._group]
            if all(chain in self.dead for chain in chains):
                losses, train_loss = self.initial_losses.new_full((len(chains), self.num_samples), math.nan), None
            else:
                with self._parameters.evaluating():
                    train_loss = self._advance(chains)
                    losses = self._losses(chains)
            nan = losses.new_full((len(chains),), math.nan)
            draws = Draws(
                losses,
                torch.tensor(chains, device=losses.device),
                torch.full((len(chains),), self._draw, device=losses.device),
                nan
                if train_loss is None
                else torch.where(self._active(chains, losses.device), train_loss.float(), nan),
            )
            self._draw += 1
            if self._draw == self.config.num_draws:
                self._group, self._draw, self._state = self._group + 1, 0, {}
                self._weights = self._parameters.center.new_empty(0)
            yield draws

    def stability_bound(self) -> float:
        """The largest stable step size, see :func:`stability_bound`; estimated once."""
        if self._stability_bound is None:
            self._stability_bound = stability.bound(self._parameters, self.train_data, self.config, self.seed)
        return self._stability_bound

    def _warn_if_unstable(self) -> None:
        fresh = self._group == 0 and self._draw == 0
        if not fresh or not self.groups or self.config.method == "rmsprop":
            return
        bound = self.stability_bound()
        if self.config.lr >= bound and self.share.leads:
            warnings.warn(
                f"lr {self.config.lr:g} is beyond the stability bound 4/lambda_max(nbeta H + gamma I) = {bound:.3g}"
                " estimated on a minibatch: the chains will diverge or be dominated by discretisation error; take a"
                " quarter of the bound or less",
                stacklevel=3,
            )

    def _choose_group_size(self) -> tuple[int, bool]:
        """(chains of a group, whether losses too are read for all of them at once)."""
        config, weights, most = self.config, self._parameters, len(self.chains)
        wanted = config.chain_group_size
        if weights.sharded and (wanted or 1) > 1:
            raise ValueError(
                f"chain_group_size {wanted} needs torch.func.vmap over the weights, and those of this model are sharded by"
                " fully_shard; leave it out, chains then run one after the other, or spread them over groups of processes"
            )
        if weights.sharded or most <= 1 or wanted == 1:
            return 1, False
        rows = min(config.microbatch_size or config.batch_size, config.batch_size)
        row_cost, convolutions = weights.flops(self.train_data.block(0, 1))
        if wanted is None:
            if convolutions > 0.5:  # under vmap they become grouped convolutions, slower than a loop
                return 1, False
            size = int(min(VMAP_CHAINS, VMAP_FLOPS // (rows * row_cost), most))
            if size < 2:
                return 1, False
            size = math.ceil(most / math.ceil(most / size))
        else:
            size = min(wanted, most)
        reason = weights.vmap_obstacle(self.train_data)
        if reason is not None:
            if wanted is not None:
                raise ValueError(
                    f"chain_group_size {wanted} needs torch.func.vmap, which cannot run this loss: {reason}"
                )
            return 1, False
        return size, row_cost * self._eval_rows * size <= VMAP_FLOPS

    @property
    def _eval_rows(self) -> int:
        return min(self.config.eval_batch_size or 256, len(self.eval_data))

    def _read_initial_losses(self) -> Tensor:
        with self._parameters.evaluating(), torch.no_grad():
            losses = self._read(self._parameters.center)
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"per_sample_loss is not finite at the trained weights for {len(bad)} of {len(losses)} losses of"
                f" eval_data, the first at index {bad[0]}: {losses[bad[0]]}"
            )
        return losses

    def _read(self, weights: Tensor) -> Tensor:
        """(m,) losses of eval_data at (P,) weights, or (k, m) at (k, P) under vmap."""
        rows = self._eval_rows
        if weights.dim() == 1:
            return self._parameters.read(weights, self.eval_data, rows)
        parts = self._parameters.parts(weights)
        blocks = (self.eval_data.block(start, start + rows) for start in range(0, len(self.eval_data), rows))
        return torch.cat([self._parameters.losses_of_group(parts, block, None).float() for block in blocks], -1)

    def _losses(self, chains: list[int]) -> Tensor:
        """(k, m) losses at the chains' weights."""
        with torch.no_grad():
            if self._vmapped_eval:
                losses = self._read(self._weights)
                losses[~self._active(chains, losses.device)] = math.nan
                return losses
            losses = self.initial_losses.new_full((len(chains), self.num_samples), math.nan)
            for row, chain in enumerate(chains):
                if chain not in self.dead:
                    losses[row] = self._read(self._weights[row])
            return losses

    def _active(self, chains: list[int], device: torch.device) -> Tensor:
        return torch.tensor([chain not in self.dead for chain in chains], device=device)

    def _advance(self, chains: list[int]) -> Tensor:
        """The steps up to the next draw; (k,) mean minibatch loss over those since the last one."""
        config = self.config
        if not self._state:
            self._state = self._method.init(chains, self._rng)
        if not len(self._weights):
            self._refresh_weights()
        thinning = config.num_steps_bw_draws
        stop = config.num_burnin_steps + (self._draw + 1) * thinning
        first = 0 if self._draw == 0 else stop - thinning
        total = torch.zeros(len(chains), dtype=torch.float32, device=self._parameters.center.device)
        for step in range(first, stop):
            losses = self._step(chains, step)
            if step >= stop - thinning:
                total += losses
            if step == stop - 1 or step % CHECK_EVERY == 0:
                self._mark_diverged(chains, step)
        return self._parameters.agreed(total / thinning)

    def _refresh_weights(self) -> None:
        """The (k, P) weights w* + displacement, in memory that is used again at every step."""
        displacement = self._state["displacement"]
        if self._weights.shape != displacement.shape:
            self._weights = torch.empty_like(displacement)
        torch.add(self._parameters.center, displacement, out=self._weights)

    def _step(self, chains: list[int], step: int) -> Tensor:
        """One step of every chain of the group, in place; (k,) minibatch losses."""
        losses, gradient = self._gradient(chains, step)
        noise = self._weights  # its memory: the weights are made anew below
        active = [-1 if chain in self.dead else chain for chain in chains]
        self._parameters.noise(self._rng, noise, active, step + 1, self._method.noise_std)
        self._method.step(self._state, gradient, noise, step)
        self._zero_diverged(chains)
        self._refresh_weights()
        return losses

    def _gradient(self, chains: list[int], step: int) -> tuple[Tensor, list[Tensor]]:
        """(k,) mean minibatch losses and their gradient, (k, ...) for each parameter."""
        config, n = self.config, len(self.train_data)
        single_chain = len(chains) == 1
        if single_chain:
            parts = self._parameters.placed(self._weights[0])
        else:
            parts = [part.detach().requires_grad_() for part in self._parameters.parts(self._weights)]
        full = config.batch_size == n
        picked = None if full else torch.stack([self._rng.minibatch(c, step, n, config.batch_size) for c in chains])
        size = config.microbatch_size or config.batch_size
        losses = torch.zeros(len(chains), dtype=torch.float32, device=self._weights.device)
        gradient: list[Tensor] = []
        for start in range(0, config.batch_size, size):
            rows = min(size, config.batch_size - start)
            if picked is None:
                batch, batch_dim = self.train_data.block(start, start + rows), None
            else:
                batch, batch_dim = self.train_data.batch(picked[:, start : start + rows].reshape(-1)), 0
            if single_chain:
                mean, new = self._parameters.gradient(parts, batch, rows / config.batch_size)
                means, new = mean.unsqueeze(0), [values.unsqueeze(0) for values in new]
            else:
                if batch_dim == 0:
                    batch = tree_map(lambda leaf: leaf.unflatten(0, (len(chains), -1)), batch)
                with torch.enable_grad():
                    means = self._parameters.losses_of_group(parts, batch, batch_dim).mean(1)
                    means = means * (rows / config.batch_size)
                    new = list(torch.autograd.grad(means.sum(), parts, materialize_grads=True))
            losses += means.detach()
            gradient = [a.add_(b) for a, b in zip(gradient, new, strict=True)] if gradient else new
        return losses, gradient

    def _mark_diverged(self, chains: list[int], step: int) -> None:
        """Find chains whose weights are no longer finite."""
        spread = self._parameters.spread(self._state["displacement"])
        for row, finite in enumerate(spread.isfinite().tolist()):
            if finite or chains[row] in self.dead:
                continue
            self.dead[chains[row]] = step
            if self.share.leads:
                warnings.warn(
                    f"chain {chains[row]} diverged by step {step}: its draws are NaN from here on; the others go on",
                    stacklevel=5,
                )
        self._zero_diverged(chains)

    def _zero_diverged(self, chains: list[int]) -> None:
        """Put what has diverged back at w*, where it costs no warning and no time."""
        for row, chain in enumerate(chains):
            if chain in self.dead:
                for tensor in self._state.values():
                    tensor[row].zero_()
