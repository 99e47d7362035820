"""How the probe of a run is sampled."""

from __future__ import annotations

import dataclasses

from harmonic_triton._common import validate

METHODS = ("sgld", "rmsprop", "sgnht")


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
