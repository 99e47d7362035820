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
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from harmonic_triton._common import validate
from harmonic_triton._common.files import Blocks, Claim
from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.sampling.data import Samples, samples
from harmonic_triton.losskernel.sampling.parameters import Mask, PerSampleLoss, Weights
from harmonic_triton.losskernel.sampling.progress import Progress
from harmonic_triton.losskernel.sampling.rng import Streams

KIND = "the state of draws"
MEND = "restore it from a copy, or start over by removing it"
METHODS = ("sgld", "rmsprop", "sgnht")
VMAP_FLOPS = 2**34  # forward operations of a pass over a whole group; bounds its memory (benchmarks.sampler)
VMAP_CHAINS = 32
SAME_LOSSES = 0.02  # relative difference of losses at w* that other threads, devices and 16-bit products may make
CHECK_EVERY = 32  # steps between looks for diverged weights while no draw is taken


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGLDConfig:
    """How the probe is sampled.

    Args:
        lr: step size eps. Stable below 4 / lambda_max(nbeta H + gamma I), see :func:`stability_bound`.
        nbeta: inverse temperature times the number of training samples; it multiplies the *mean* minibatch loss.
        localization: gamma, the pull towards w*.
        batch_size: samples of a gradient, drawn without replacement, anew at each step. The size of the training data
            means full-batch gradients, without shuffling noise.
        num_chains, num_draws: chains, and draws of each.
        num_burnin_steps: steps of each chain before its first draw.
        num_steps_bw_draws: steps for each draw (thinning).
        method: "sgld"; "rmsprop", SGLD preconditioned by G = 1/(rmsprop_eps + sqrt(V)), V the moving average of the
            squared minibatch gradient (Li et al. 2016, Preconditioned SGLD). V moves during burn-in only and is frozen
            for the draws: their term with G's derivative, which implementations drop, is then exactly 0, and the chain
            targets the same probe. "sgnht": the Nose-Hoover thermostat (Ding et al. 2014) with h^2 = eps/2, friction
            a = sgnht_friction: u <- (1 - xi) u - (eps/2) [...] + N(0, a eps), w <- w + u, xi <- xi +
            (1 - xi/2) |u|^2/P - eps/2. It takes minibatch noise of unknown variance, equal in all directions, out of the
            temperature, if xi has the steps to find it. (1 - xi/2) is ours: without it the variance of w comes out
            lower by that factor, exactly so for a quadratic loss.
        microbatch_size: samples of one forward and backward pass; gradients are accumulated. None: batch_size.
        eval_batch_size: samples of one pass when losses are read. None: 256.
        chain_group_size: chains that run together under ``vmap``. None: as many as 32 within a bound on the cost of a
            pass, 1 for convolutional models (slower so) and where vmap cannot run the loss; a number given either
            serves or raises.
        rmsprop_decay, rmsprop_eps, sgnht_friction: see ``method``.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    lr: float
    nbeta: float
    localization: float
    batch_size: int
    num_chains: int = 4
    num_draws: int = 200
    num_burnin_steps: int = 0
    num_steps_bw_draws: int = 1
    method: str = "sgld"
    microbatch_size: int | None = None
    eval_batch_size: int | None = None
    chain_group_size: int | None = None
    rmsprop_decay: float = 0.99
    rmsprop_eps: float = 0.1
    sgnht_friction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "rmsprop_eps", "sgnht_friction"):
            validate.between(name, getattr(self, name), 0.0)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be > 0, got 0")
        validate.between("nbeta", self.nbeta, 0.0)
        validate.between("localization", self.localization, 0.0)
        validate.between("rmsprop_decay", self.rmsprop_decay, 0.0, 1.0)
        for name in ("batch_size", "num_chains", "num_draws", "num_steps_bw_draws"):
            validate.integer(name, getattr(self, name), 1)
        validate.integer("num_burnin_steps", self.num_burnin_steps, 0)
        for name in ("microbatch_size", "eval_batch_size", "chain_group_size"):
            if getattr(self, name) is not None:
                validate.integer(name, getattr(self, name), 1)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        if self.method == "rmsprop" and self.num_burnin_steps == 0:
            raise ValueError("method='rmsprop' learns its preconditioner during burn-in; give num_burnin_steps >= 1")
        for f in dataclasses.fields(self):  # NumPy's numbers have no JSON, and 20 is the same setting as 20.0
            kind = float if f.type == "float" else int if str(f.type).startswith("int") else None
            if kind is not None and getattr(self, f.name) is not None:
                object.__setattr__(self, f.name, kind(getattr(self, f.name)))
        if self.num_steps >= 2**32:
            raise ValueError(f"a chain can take 2^32 - 1 steps, and these settings ask for {self.num_steps}")

    @property
    def num_steps(self) -> int:
        """Steps of one chain."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws


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

    A chain whose weights are no longer finite is dead: one warning, NaN draws from then on, no further work for it. The
    others go on bitwise as if nothing had happened (in a vmapped group its row is parked at w*, to keep their shapes).

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
        chains: the chains this process runs; None: all, or under torch.distributed rank, rank + world, ...

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
        self._weights = Weights(model, per_sample_loss, mask)
        self.device = torch.device(device) if device is not None else self._weights.center.device
        self.train_data = samples("train_data", train_data, self.device)
        self.eval_data = samples("eval_data", eval_data, self.device)
        if config.batch_size > len(self.train_data):
            raise ValueError(
                f"batch_size {config.batch_size} exceeds the {len(self.train_data)} training samples;"
                f" batch_size={len(self.train_data)} means full-batch gradients"
            )
        self.chains = _own_chains(config.num_chains) if chains is None else [int(c) for c in chains]
        if len(set(self.chains)) != len(self.chains) or not all(0 <= c < config.num_chains for c in self.chains):
            raise ValueError(f"chains must be distinct and between 0 and {config.num_chains - 1}, got {self.chains}")
        self._streams = Streams(seed)
        self.initial_losses = self._read_initial_losses()
        size, self._vmapped_eval = self._choose_group_size()
        self.groups = [self.chains[i : i + size] for i in range(0, len(self.chains), size)]
        self.dead: dict[int, int] = {}  # chain: the step at which it was found
        self._group, self._draw = 0, 0
        self._state: dict[str, Tensor] = {}
        self._placed = self._weights.center.new_empty(0)
        self._fingerprint: dict[str, str] | None = None
        self._stability_bound: float | None = None

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
            loss = self._weights.probe.per_sample_loss
            self._fingerprint = {
                "model": checkpoint.digest(dict(self._weights.model.state_dict())),
                "sampled parameters": self._weights.fingerprint(),
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
        return {
            "fingerprint": dict(self.fingerprint),
            "initial_losses": self.initial_losses.clone(),
            "group": self._group,
            "draw": self._draw,
            "dead": dict(self.dead),
            "state": {name: tensor.clone() for name, tensor in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it belongs to another model, dataset, loss, configuration or seed; the message lists what differs.
        """
        checkpoint.check_fingerprint(state["fingerprint"], self.fingerprint)
        self._check_function(state)
        self._group, self._draw, self.dead = state["group"], state["draw"], dict(state["dead"])
        center = self._weights.center
        self._state = {name: tensor.to(center.device, copy=True) for name, tensor in state["state"].items()}
        self._placed = center.new_empty(0)

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
        self._placed = self._weights.center.new_empty(0)
        while self._group < len(self.groups):
            chains = self.groups[self._group]
            if all(chain in self.dead for chain in chains):
                losses, train_loss = self.initial_losses.new_full((len(chains), self.num_samples), math.nan), None
            else:
                with self._weights.evaluating():
                    train_loss = self._advance(chains)
                    losses = self._losses(chains)
            nan = losses.new_full((len(chains),), math.nan)
            draws = Draws(
                losses,
                torch.tensor(chains, device=losses.device),
                torch.full((len(chains),), self._draw, device=losses.device),
                nan if train_loss is None else torch.where(self._alive(chains, losses.device), train_loss.float(), nan),
            )
            self._draw += 1
            if self._draw == self.config.num_draws:
                self._group, self._draw, self._state = self._group + 1, 0, {}
                self._placed = self._weights.center.new_empty(0)
            yield draws

    def stability_bound(self) -> float:
        """The largest stable step size, see :func:`stability_bound`; estimated once."""
        if self._stability_bound is None:
            self._stability_bound = _stability_bound(self._weights, self.train_data, self.config, self.seed)
        return self._stability_bound

    def _warn_if_unstable(self) -> None:
        fresh = self._group == 0 and self._draw == 0
        if not fresh or not self.groups or self.config.method == "rmsprop":
            return
        bound = self.stability_bound()
        if self.config.lr >= bound:
            warnings.warn(
                f"lr {self.config.lr:g} is beyond the stability bound 4/lambda_max(nbeta H + gamma I) = {bound:.3g}"
                " estimated on a minibatch: the chains will diverge or be dominated by discretisation error; take a"
                " quarter of the bound or less",
                stacklevel=3,
            )

    def _choose_group_size(self) -> tuple[int, bool]:
        """(chains of a group, whether losses too are read for all of them at once)."""
        config, weights, most = self.config, self._weights, len(self.chains)
        wanted = config.chain_group_size
        if most <= 1 or wanted == 1:
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
        with self._weights.evaluating(), torch.no_grad():
            losses = self._read(self._weights.center)
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"per_sample_loss is not finite at the trained weights for {len(bad)} of {len(losses)} losses of"
                f" eval_data, the first at index {bad[0]}: {losses[bad[0]]}"
            )
        return losses

    def _read(self, weights: Tensor) -> Tensor:
        """(m,) losses of eval_data at (P,) weights, or (k, m) at (k, P) under vmap."""
        parts = []
        for start in range(0, len(self.eval_data), self._eval_rows):
            batch = self.eval_data.block(start, start + self._eval_rows)
            if weights.dim() == 2:
                parts.append(self._weights.losses_of_group(self._weights.parts(weights), batch, None).float())
            else:
                parts.append(self._weights.losses(self._weights.parts(weights), batch).float())
        return torch.cat(parts, -1)

    def _losses(self, chains: list[int]) -> Tensor:
        """(k, m) losses at the chains' weights."""
        with torch.no_grad():
            if self._vmapped_eval:
                losses = self._read(self._placed)
                losses[~self._alive(chains, losses.device)] = math.nan
                return losses
            losses = self.initial_losses.new_full((len(chains), self.num_samples), math.nan)
            for row, chain in enumerate(chains):
                if chain not in self.dead:
                    losses[row] = self._read(self._placed[row])
            return losses

    def _alive(self, chains: list[int], device: torch.device) -> Tensor:
        return torch.tensor([chain not in self.dead for chain in chains], device=device)

    def _advance(self, chains: list[int]) -> Tensor:
        """The steps up to the next draw; (k,) mean minibatch loss over those since the last one."""
        config = self.config
        if not self._state:
            self._state = self._start(chains)
        if not len(self._placed):
            self._place()
        thinning = config.num_steps_bw_draws
        stop = config.num_burnin_steps + (self._draw + 1) * thinning
        first = 0 if self._draw == 0 else stop - thinning
        total = torch.zeros(len(chains), dtype=torch.float32, device=self._weights.center.device)
        for step in range(first, stop):
            losses = self._step(chains, step)
            if step >= stop - thinning:
                total += losses
            if step == stop - 1 or step % CHECK_EVERY == 0:
                self._bury(chains, step)
        return total / thinning

    def _start(self, chains: list[int]) -> dict[str, Tensor]:
        center = self._weights.center
        state = {"displacement": center.new_zeros(len(chains), len(center))}
        if self.config.method == "rmsprop":
            state["square"] = torch.zeros_like(state["displacement"])
        if self.config.method == "sgnht":
            momentum = torch.empty_like(state["displacement"])
            self._streams.noise(momentum, chains, 0)
            state["momentum"] = self._weights.masked_(momentum.mul_(math.sqrt(self.config.lr / 2)))
            state["thermostat"] = center.new_full((len(chains), 1), self.config.sgnht_friction)
        return state

    def _place(self) -> None:
        """The (k, P) weights w* + displacement, in memory that is used again at every step."""
        displacement = self._state["displacement"]
        if self._placed.shape != displacement.shape:
            self._placed = torch.empty_like(displacement)
        torch.add(self._weights.center, displacement, out=self._placed)

    def _step(self, chains: list[int], step: int) -> Tensor:
        """One step of every chain of the group, in place; (k,) minibatch losses."""
        config, state, displacement = self.config, self._state, self._state["displacement"]
        losses, gradient = self._gradient(chains, step)
        noise = self._placed  # its memory: the weights are placed anew below
        half, gamma, std = config.lr / 2, config.localization, math.sqrt(config.lr)
        if config.method == "sgnht":
            std *= math.sqrt(config.sgnht_friction)
        self._streams.noise(noise, [-1 if chain in self.dead else chain for chain in chains], step + 1, std)
        if config.method == "sgld":
            torch.add(noise, displacement, alpha=1 - half * gamma, out=displacement)
            self._add(displacement, gradient, -half * config.nbeta)
        elif config.method == "rmsprop":
            slope = torch.zeros_like(displacement)
            self._add(slope, gradient, 1.0)
            if step < config.num_burnin_steps:
                decay = config.rmsprop_decay if step else 0.0
                state["square"].mul_(decay).addcmul_(slope, slope, value=1 - decay)
            preconditioner = state["square"].sqrt().add_(config.rmsprop_eps).reciprocal_()
            drift = slope.mul_(config.nbeta).add_(displacement, alpha=gamma)
            displacement.addcmul_(drift, preconditioner, value=-half)
            displacement.addcmul_(noise, preconditioner.sqrt_())
        else:
            momentum, thermostat = state["momentum"], state["thermostat"]
            momentum.mul_(1 - thermostat).add_(displacement, alpha=-half * gamma)
            momentum.add_(noise)
            self._add(momentum, gradient, -half * config.nbeta)
            self._weights.masked_(momentum)
            displacement.add_(momentum)
            kinetic = momentum.square().sum(1, keepdim=True) / self._weights.num_sampled
            thermostat.add_(kinetic * (1 - thermostat / 2) - half)
        self._weights.masked_(displacement)
        self._park(chains)
        self._place()
        return losses

    def _add(self, out: Tensor, gradient: list[Tensor], alpha: float) -> None:
        """out (k, P) += alpha times a gradient that is still in parts."""
        for part, values in zip(self._weights.parts(out), gradient, strict=True):
            part.add_(values, alpha=alpha)

    def _gradient(self, chains: list[int], step: int) -> tuple[Tensor, list[Tensor]]:
        """(k,) mean minibatch losses and their gradient, (k, ...) for each parameter."""
        config, n = self.config, len(self.train_data)
        alone = len(chains) == 1
        parts = self._weights.parts(self._placed[0] if alone else self._placed)
        parts = [part.detach().requires_grad_() for part in parts]
        full = config.batch_size == n
        picked = None if full else torch.stack([self._streams.minibatch(c, step, n, config.batch_size) for c in chains])
        size = config.microbatch_size or config.batch_size
        losses = torch.zeros(len(chains), dtype=torch.float32, device=self._placed.device)
        gradient: list[Tensor] = []
        for start in range(0, config.batch_size, size):
            rows = min(size, config.batch_size - start)
            if picked is None:
                batch, batch_dim = self.train_data.block(start, start + rows), None
            else:
                batch, batch_dim = self.train_data.batch(picked[:, start : start + rows].reshape(-1)), 0
            with torch.enable_grad():
                if alone:
                    means = self._weights.losses(parts, batch).mean().unsqueeze(0)
                else:
                    if batch_dim == 0:
                        batch = tree_map(lambda leaf: leaf.unflatten(0, (len(chains), -1)), batch)
                    means = self._weights.losses_of_group(parts, batch, batch_dim).mean(1)
                means = means * (rows / config.batch_size)
                new = list(torch.autograd.grad(means.sum(), parts, materialize_grads=True))
            new = [values.unsqueeze(0) for values in new] if alone else new
            losses += means.detach()
            gradient = [a.add_(b) for a, b in zip(gradient, new, strict=True)] if gradient else new
        return losses, gradient

    def _bury(self, chains: list[int], step: int) -> None:
        """Find chains whose weights are no longer finite."""
        displacement = self._state["displacement"]
        # NaN or infinite where an entry is; torch vectorises these two, but no norm and no isfinite().all()
        spread = displacement.amax(1) - displacement.amin(1)
        for row, finite in enumerate(spread.isfinite().tolist()):
            if not finite and chains[row] not in self.dead:
                self.dead[chains[row]] = step
                warnings.warn(
                    f"chain {chains[row]} diverged by step {step}: its draws are NaN from here on; the others go on",
                    stacklevel=5,
                )
        self._park(chains)

    def _park(self, chains: list[int]) -> None:
        for row, chain in enumerate(chains):
            if chain in self.dead:
                for tensor in self._state.values():
                    tensor[row].zero_()


def _own_chains(num_chains: int) -> list[int]:
    """All chains, or this rank's share of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return list(range(torch.distributed.get_rank(), num_chains, torch.distributed.get_world_size()))
    return list(range(num_chains))


def stability_bound(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    mask: Mask = None,
    num_iterations: int = 12,
) -> float:
    """The step size at which SGLD becomes unstable, 4 / lambda_max(nbeta H + gamma I), H the Hessian of a minibatch's loss.

    Power iterations with Hessian-vector products by central differences of gradients, over the probe's own width
    1/sqrt(lambda) in that direction (so any loss serves, also one without a second derivative). The estimate of
    lambda_max comes from below: keep a margin. For "sgnht" the bound is conservative by 2; for "rmsprop" it is that of
    plain SGLD.

    Args:
        model, per_sample_loss, train_data, config, seed, mask: as for :class:`Sampler`.
        num_iterations: of two gradients each.

    Returns:
        The bound; inf where there is no positive curvature, 0 where gradients are not finite.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    validate.seed(seed)
    validate.integer("num_iterations", num_iterations, 1)
    weights = Weights(model, per_sample_loss, mask)
    data = samples("train_data", train_data, weights.center.device)
    return _stability_bound(weights, data, config, seed, num_iterations)


def _stability_bound(weights: Weights, data: Samples, config: SGLDConfig, seed: int, iterations: int = 12) -> float:
    streams = Streams(seed ^ 0x5DEECE66D)
    n, size = len(data), min(config.batch_size, len(data))
    rows = torch.arange(n) if size == n else streams.minibatch(0, 0, n, size)
    step = config.microbatch_size or size
    center = weights.center

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        total = torch.zeros_like(at)
        for start in range(0, size, step):
            picked = rows[start : start + step]
            with torch.enable_grad():
                mean = weights.losses(weights.parts(at), data.batch(picked)).mean()
                total.add_(torch.autograd.grad(mean, at)[0], alpha=len(picked) / size)
        return weights.masked_(total)

    def largest(shift: float) -> float:
        """The eigenvalue of nbeta H + (gamma + shift) I that is largest in magnitude."""
        v = torch.empty_like(center).unsqueeze(0)
        streams.noise(v, [0], 0)
        v = weights.masked_(v.squeeze(0))
        v /= v.norm()
        value, reach = config.localization + shift, 1 + center.norm().item()
        for _ in range(iterations):
            width = min(1 / math.sqrt(abs(value)), reach) if value else reach
            product = (gradient(center + width * v) - gradient(center - width * v)).mul_(config.nbeta / (2 * width))
            product.add_(v, alpha=config.localization + shift)
            value, norm = torch.dot(v, product).item(), product.norm().item()
            if not math.isfinite(norm):
                return math.inf
            if norm == 0:
                return 0.0
            v = product / norm
        return value

    with weights.evaluating():
        top = largest(0.0)
        if top < 0:  # negative curvature is the largest; shifted by it, the positive end is
            top = largest(-top) + top
    return 4 / top if top > 0 else math.inf


def sample_losses(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train_data: Any,
    eval_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    mask: Mask = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """Per-sample losses along localised SGLD chains (*The Loss Kernel*, appendix B), draw by draw.

    Args:
        model, per_sample_loss, train_data, eval_data, config, seed, mask, device: as for :class:`Sampler`. Under
            torch.distributed each rank runs and yields chains rank, rank + world, ...
        checkpoint_dir: keep the draws (4 bytes a loss) and the state of the chains here (``draws.f32``, ``state.pt``). A
            later call with the same arguments yields the whole stream again, from the disk as far as it goes, and
            continues bitwise, whenever the process was killed. The directory belongs to one run: another one is refused,
            and so is a second process while the first is at it (a lock, which dies with its process). A later call in
            the same process takes the directory over, and the earlier iterator then raises. Everything has a checksum;
            draws are compared with theirs before they are yielded.
        checkpoint_seconds: at least this long between two checkpoints; 0: one at every draw.
        progress: draws a second, time left and the chains' health, by tqdm where it is installed, else lines on stderr.

    Returns:
        An iterator of (k, m) float32 losses: one draw of k chains of a group, groups one after the other. A chain that
        diverged gives NaN.

    Raises:
        TypeError, ValueError: an argument is wrong, the directory holds another run (what differs is listed), or a file
            in it is not as it was written; the message says which and what to do.
        RuntimeError: another process or thread is at the run in the directory.
    """
    validate.between("checkpoint_seconds", checkpoint_seconds, 0.0)
    validate.flag("progress", progress)
    sampler = Sampler(model, per_sample_loss, train_data, eval_data, config, seed=seed, device=device, mask=mask)
    bar = Progress(sampler) if progress else None
    if checkpoint_dir is None:
        return _watched((draws.losses for draws in sampler.run()), sampler, bar)
    log = _DrawLog(Path(checkpoint_dir), sampler, checkpoint_seconds)
    return _watched(log.stream(), sampler, bar)


def _watched(stream: Iterator[Tensor], sampler: Sampler, bar: Progress | None) -> Iterator[Tensor]:
    try:
        for losses in stream:
            if bar is not None:
                bar.update(losses)
            yield losses
    finally:
        if bar is not None:
            bar.close()


class _DrawLog:
    """The draws of a run in one file, appended, and beside it the state after some of them with the draws' checksums."""

    def __init__(self, directory: Path, sampler: Sampler, seconds: float) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            directory = directory / f"rank{torch.distributed.get_rank()}of{torch.distributed.get_world_size()}"
        self.claim = Claim(directory / "draws.lock", lent=True)
        self.draws = Blocks(directory / "draws.f32", 4 * sampler.num_samples, f"{MEND}, and {directory / 'state.pt'}")
        self.state, self.sampler, self.seconds = directory / "state.pt", sampler, seconds
        try:
            if self.state.exists():
                saved = checkpoint.load(self.state, KIND, f"{MEND}, and {self.draws.path}")
                sampler.load_state_dict(saved["sampler"])
                self.draws.load_state_dict(saved["draws"])
                self.draws.check_size()
            elif self.draws.path.exists() and self.draws.path.stat().st_size:
                raise ValueError(
                    f"{self.draws.path} holds draws, and {self.state}, which says of what run, is gone: restore it, or"
                    " remove the draws to start over, or take a new directory"
                )
            else:
                self.save()
        except BaseException:
            self.claim.release()
            raise

    def save(self) -> None:
        """Bring draws and state to the disk."""
        self.draws.sync()
        checkpoint.save(self.state, {"sampler": self.sampler.state_dict(), "draws": self.draws.state_dict()}, KIND)

    def stream(self) -> Iterator[Tensor]:
        """The draws that are stored, then those that come."""
        blocks = self._blocks()
        try:
            while True:
                with self.claim.working():
                    block = next(blocks, None)
                if block is None:
                    return
                yield block
        finally:
            self.draws.close()
            self.claim.release()

    def _blocks(self) -> Iterator[Tensor]:
        for data in self.draws:
            yield torch.frombuffer(data, dtype=torch.float32).view(-1, self.sampler.num_samples).to(self.sampler.device)
        saved = time.monotonic()
        for draws in self.sampler.run():
            self.draws.append(draws.losses)
            if time.monotonic() - saved >= self.seconds or not self.sampler.remaining:
                self.save()
                saved = time.monotonic()
            yield draws.losses
