"""One step of each method, of k chains at once: a small class with ``init`` and ``step``. P weights move.

A method writes only to the state that it is given. What all methods share is the sampler's: the gradient, the noise,
which chains run together, and what has diverged.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.parameters import FlatParameters
from harmonic_triton.losskernel.sampling.rng import CounterRNG

State = dict[str, Tensor]  # "displacement" (k, P), the weights less w*, and whatever else a method keeps of each chain
PER_CHAIN = ("thermostat",)  # what of it is (k, 1) and not (k, P)


class Method(Protocol):
    """What the sampler asks of a method."""

    noise_std: float  # of the noise that a step is given

    def init(self, chains: list[int], rng: CounterRNG) -> State:
        """The state of chains that stand at w*."""

    def step(self, state: State, gradient: list[Tensor], noise: Tensor, number: int) -> None:
        """Take step ``number`` (from 0 on) of every chain in place.

        Args:
            gradient: (k, ...) of the mean minibatch loss for each parameter.
            noise: (k, P) N(0, noise_std²); may be overwritten.
        """


class SGLD:
    """w <- w - (eps/2) [nbeta grad L_B(w) + gamma (w - w*)] + N(0, eps) (Welling and Teh 2011)."""

    def __init__(self, config: SGLDConfig, parameters: FlatParameters) -> None:
        self.config, self.parameters = config, parameters
        self.half, self.noise_std = config.lr / 2, math.sqrt(config.lr)

    def init(self, chains: list[int], rng: CounterRNG) -> State:
        return at_center(self.parameters, chains)

    def step(self, state: State, gradient: list[Tensor], noise: Tensor, number: int) -> None:
        displacement = state["displacement"]
        torch.add(noise, displacement, alpha=1 - self.half * self.config.localization, out=displacement)
        self.parameters.add_(displacement, gradient, -self.half * self.config.nbeta)
        self.parameters.masked_(displacement)


class RMSprop:
    """SGLD preconditioned by G = 1/(rmsprop_eps + sqrt(V)), V learned in burn-in and frozen after (Li et al. 2016)."""

    def __init__(self, config: SGLDConfig, parameters: FlatParameters) -> None:
        self.config, self.parameters = config, parameters
        self.half, self.noise_std = config.lr / 2, math.sqrt(config.lr)

    def init(self, chains: list[int], rng: CounterRNG) -> State:
        state = at_center(self.parameters, chains)
        state["square"] = torch.zeros_like(state["displacement"])
        return state

    def step(self, state: State, gradient: list[Tensor], noise: Tensor, number: int) -> None:
        config, displacement = self.config, state["displacement"]
        slope = torch.zeros_like(displacement)
        self.parameters.add_(slope, gradient, 1.0)
        if number < config.num_burnin_steps:
            decay = config.rmsprop_decay if number else 0.0
            state["square"].mul_(decay).addcmul_(slope, slope, value=1 - decay)
        preconditioner = state["square"].sqrt().add_(config.rmsprop_eps).reciprocal_()
        drift = slope.mul_(config.nbeta).add_(displacement, alpha=config.localization)
        displacement.addcmul_(drift, preconditioner, value=-self.half)
        displacement.addcmul_(noise, preconditioner.sqrt_())
        self.parameters.masked_(displacement)


class SGNHT:
    """The Nose-Hoover thermostat (Ding et al. 2014), with the correction that :class:`SGLDConfig` describes."""

    def __init__(self, config: SGLDConfig, parameters: FlatParameters) -> None:
        self.config, self.parameters = config, parameters
        self.half = config.lr / 2
        self.noise_std = math.sqrt(config.lr) * math.sqrt(config.sgnht_friction)

    def init(self, chains: list[int], rng: CounterRNG) -> State:
        state = at_center(self.parameters, chains)
        momentum = torch.empty_like(state["displacement"])
        self.parameters.noise(rng, momentum, chains, 0)
        state["momentum"] = self.parameters.masked_(momentum.mul_(math.sqrt(self.config.lr / 2)))
        state["thermostat"] = momentum.new_full((len(chains), 1), self.config.sgnht_friction)
        return state

    def step(self, state: State, gradient: list[Tensor], noise: Tensor, number: int) -> None:
        displacement, momentum, thermostat = state["displacement"], state["momentum"], state["thermostat"]
        momentum.mul_(1 - thermostat).add_(displacement, alpha=-self.half * self.config.localization)
        momentum.add_(noise)
        self.parameters.add_(momentum, gradient, -self.half * self.config.nbeta)
        self.parameters.masked_(momentum)
        displacement.add_(momentum)
        kinetic = self.parameters.square_sum(momentum) / self.parameters.num_sampled
        thermostat.add_(kinetic * (1 - thermostat / 2) - self.half)
        self.parameters.masked_(displacement)


def at_center(parameters: FlatParameters, chains: list[int]) -> State:
    """Every chain at w*."""
    return {"displacement": parameters.center.new_zeros(len(chains), len(parameters.center))}


def method(config: SGLDConfig, parameters: FlatParameters) -> Method:
    """The method that a configuration names."""
    kinds: dict[str, type[SGLD] | type[RMSprop] | type[SGNHT]] = {"sgld": SGLD, "rmsprop": RMSprop, "sgnht": SGNHT}
    return kinds[config.method](config, parameters)
