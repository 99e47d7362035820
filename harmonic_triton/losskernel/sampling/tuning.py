"""Step size and localization of the SGLD probe from a few hundred steps.

What has to hold (found by hand on small transformers, and what users of the method ask for most): the probe raises the
mean loss by about as much as the model has, its chains stay below the stability bound, mix and agree.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harmonic_triton._common import validate
from harmonic_triton.losskernel import convergence
from harmonic_triton.losskernel.draws import is_usable
from harmonic_triton.losskernel.estimators import excess_loss
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.data import samples
from harmonic_triton.losskernel.sampling.parameters import Mask, PerSampleLoss
from harmonic_triton.losskernel.sampling.sampler import Sampler

SHARE_OF_BOUND = 0.15  # lr over its bound: 0.7 of a displacement is left after a step where the bound is attained, an
# autocorrelation time of (1 + 0.7)/(1 - 0.7) = 5.7, and the discretised variance there is 1/(1 - 0.15) of the right one
CLOSE = 1.5  # factor between excess loss and target that ends the search
LONGEST = 6.0  # autocorrelation time in draws, kept by thinning
PROBE_SAMPLES = 256
TRIAL_DRAWS, CHECK_DRAWS = 30, 150


class Trial(NamedTuple):
    """One localization that was tried, with a short run of every chain."""

    localization: float
    lr: float
    excess_loss: float  # mean over chains and draws of L(w) - L(w*); nan if all chains died
    autocorrelation_time: float  # in steps
    r_hat: float
    dead: int  # chains that diverged
    steps: int  # of each chain

    def ratio(self, target: float) -> float:
        """Excess over target; what diverged is far above, what fell below L(w*) far below."""
        if not math.isfinite(self.excess_loss) or self.dead:
            return 1e6
        return max(self.excess_loss / target, 1e-3)

    def __str__(self) -> str:
        return (
            f"localization {self.localization:.3g}, lr {self.lr:.3g}: excess loss {self.excess_loss:.3g},"
            f" autocorrelation time {self.autocorrelation_time:.1f} steps, R-hat {self.r_hat:.3f}, {self.dead} dead"
        )


class TuningResult(NamedTuple):
    """A configuration, what was tried to find it, and why it was chosen."""

    config: SGLDConfig
    table: list[Trial]  # the last one is the check of the configuration
    reason: str


def tune(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train_data: Any,
    *,
    seed: int,
    nbeta: float | None = None,
    target_excess: float | None = None,
    batch_size: int | None = None,
    num_chains: int = 4,
    num_draws: int = 200,
    max_trials: int = 10,
    mask: Mask = None,
    device: torch.device | str | None = None,
    verbose: bool = True,
) -> TuningResult:
    """Choose lr, localization, thinning and burn-in of method "sgld" for a trained model.

    The curvature of nbeta L at w* is estimated once (power iterations); it bounds the step size for any localization. Then
    short runs look for the localization at which the mean excess loss is the target, E[L(w)] - L(w*) falling about as
    1/localization. A longer run checks the result: thinning brings the autocorrelation time of the losses to 6 draws or
    less, and R-hat says whether the chains agree.

    Args:
        model, per_sample_loss, train_data, seed, mask, device: as for :class:`losskernel.Sampler`.
        nbeta: inverse temperature times n; None: n / log n.
        target_excess: mean excess loss wanted, in the unit of the losses; None: the mean loss at w*.
        batch_size: None: 256, or all samples if there are fewer.
        num_chains, num_draws: of the configuration returned; up to 4 of its chains are tried.
        max_trials: localizations tried at most.
        verbose: print what was tried, and why the result was chosen, on stderr.

    Returns:
        :class:`TuningResult`. Where the target was not reached the nearest trial is taken, with a warning.

    Raises:
        TypeError, ValueError: an argument is wrong, or the loss at w* is 0 and no target is given.
        RuntimeError: every chain diverged at every localization tried, or gradients are not finite.
    """
    validate.integer("max_trials", max_trials, 1)
    validate.flag("verbose", verbose)
    if target_excess is not None:
        validate.between("target_excess", target_excess, 0.0)
        if target_excess == 0:
            raise ValueError("target_excess must be > 0: the probe has to leave the trained weights")
    probe = TrialRuns(model, per_sample_loss, train_data, seed, nbeta, batch_size, num_chains, mask, device)

    def say(line: str) -> None:
        if verbose:
            print(line, file=sys.stderr)

    target = probe.initial_loss if target_excess is None else target_excess
    if target <= 0:
        raise ValueError(f"the mean loss at the trained weights is {target:g}, which is no target: give target_excess")
    say(f"loss at w* {probe.initial_loss:.4g}, target excess {target:.4g}, nbeta {probe.base.nbeta:.4g},"
        f" largest curvature of nbeta L {probe.curvature:.4g}")  # fmt: skip

    table: list[Trial] = []
    localization = max(probe.curvature, 1e-12)
    while len(table) < max_trials:
        table.append(probe.run(localization, TRIAL_DRAWS))
        say(str(table[-1]))
        if 1 / CLOSE <= table[-1].ratio(target) <= CLOSE:
            break
        if at_its_largest(table):
            say("the excess loss no longer rises as localization falls: the data alone hold the chains")
            break
        localization = next_localization(table, target)
    nearest = min(abs(math.log(trial.ratio(target))) for trial in table)
    alike = [trial for trial in table if abs(math.log(trial.ratio(target))) <= nearest + 0.15]
    best = max(alike, key=lambda trial: trial.localization)
    if not math.isfinite(best.excess_loss):
        raise RuntimeError(
            f"every chain diverged at localizations {table[0].localization:.3g} ... {table[-1].localization:.3g};"
            " is the model at a minimum of this loss on this data? A smaller nbeta may help"
        )
    check = probe.run(best.localization, CHECK_DRAWS)
    table.append(check)
    say(str(check))
    thinning = max(1, math.ceil(check.autocorrelation_time / LONGEST))
    config = dataclasses.replace(
        probe.config(best.localization),
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin_steps=max(probe.burn_in(best.localization), math.ceil(10 * check.autocorrelation_time)),
        num_steps_bw_draws=thinning,
    )
    reason = (
        f"localization {config.localization:.3g}: mean excess loss {check.excess_loss:.3g} for a target of {target:.3g};"
        f" lr {config.lr:.3g}: {SHARE_OF_BOUND:g} of the stability bound {config.lr / SHARE_OF_BOUND:.3g};"
        f" {thinning} steps a draw: autocorrelation time {check.autocorrelation_time / thinning:.1f} draws;"
        f" R-hat {check.r_hat:.3f} over {check.steps} steps of {probe.num_chains} chains, {check.dead} dead"
    )
    say(reason)
    missed = [] if 0.5 / CLOSE <= check.ratio(target) <= 2 * CLOSE else ["the excess loss is off its target"]
    missed += ["the chains disagree (R-hat > 1.1): raise num_burnin_steps"] if check.r_hat > 1.1 else []
    missed += [f"{check.dead} chains diverged"] if check.dead else []
    if missed:
        warnings.warn(f"tuning ended short of its aims: {'; '.join(missed)} ({reason})", stacklevel=2)
    return TuningResult(config, table, reason)


def _mixing(losses: Tensor) -> tuple[float, float]:
    """(autocorrelation time in draws, the longer of a sample's median and the mean loss's; split R-hat of the mean loss).

    Both are 1 where the losses never vary.
    """
    mean = losses.double().mean(-1)
    times = convergence.autocorrelation_time(mean), convergence.autocorrelation_time(losses).nanmedian()
    longest = max(1.0, *(time.nan_to_num(1.0).item() for time in times))
    return longest, convergence.gelman_rubin(mean).nan_to_num(1.0).item()


class TrialRuns:
    """Short runs of a few chains on some training samples, at any localization."""

    def __init__(
        self, model: nn.Module, per_sample_loss: PerSampleLoss, train_data: Any, seed: int, nbeta: float | None,
        batch_size: int | None, num_chains: int, mask: Mask, device: torch.device | str | None,
    ) -> None:  # fmt: skip
        validate.integer("num_chains", num_chains, 1)
        validate.seed(seed)
        self.num_chains = min(num_chains, 4)
        if device is None and isinstance(model, nn.Module):
            device = next((p.device for p in model.parameters()), None)
        train = samples("train_data", train_data, torch.device(device or "cpu"))
        n = len(train)
        self.base = SGLDConfig(
            lr=1.0, nbeta=n / math.log(max(n, 3)) if nbeta is None else nbeta, localization=1.0,
            batch_size=min(n, 256) if batch_size is None else batch_size, num_chains=self.num_chains, num_draws=1,
        )  # fmt: skip
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed % 2**63))[:PROBE_SAMPLES]
        some = train.subset(chosen)

        def sampler(config: SGLDConfig) -> Sampler:
            return Sampler(
                model, per_sample_loss, train, some, config, seed=seed, mask=mask, chains=range(self.num_chains)
            )

        self.sampler = sampler
        first = self.sampler(dataclasses.replace(self.base, localization=1e-3 * max(self.base.nbeta, 1e-3)))
        self.initial_loss = first.initial_losses.double().mean().item()
        bound = first.stability_bound()
        if bound == 0:
            raise RuntimeError("gradients next to the trained weights are not finite; no step size is stable there")
        self.curvature = max(4 / bound - first.config.localization, 0.0)

    def config(self, localization: float) -> SGLDConfig:
        """The base settings at a localization, with the step size that goes with it."""
        lr = SHARE_OF_BOUND * 4 / (self.curvature + localization)
        return dataclasses.replace(self.base, localization=localization, lr=lr)

    def burn_in(self, localization: float) -> int:
        """Steps after which a direction without curvature has forgotten w* to 5 %, between 20 and 300."""
        lr = self.config(localization).lr
        return min(max(20, math.ceil(3 / (lr * localization / 2))), 300)

    def run(self, localization: float, num_draws: int) -> Trial:
        """A short run of every chain, each step a draw."""
        burn_in = self.burn_in(localization)
        config = dataclasses.replace(self.config(localization), num_draws=num_draws, num_burnin_steps=burn_in)
        sampler = self.sampler(config)
        losses = sampler.initial_losses.new_full((self.num_chains, num_draws, sampler.num_samples), math.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dead chains are counted here
            for block in sampler.run(check_step_size=False):
                losses[block.chain, block.draw] = block.losses
        whole = losses[[chain for chain in range(self.num_chains) if chain not in sampler.dead]]
        whole = whole[is_usable(whole.flatten(0, 1)).view(whole.shape[:2]).all(1)]
        if not len(whole):
            return Trial(localization, config.lr, math.nan, math.nan, math.nan, self.num_chains, config.num_steps)
        excess = excess_loss(whole.double().mean().item(), self.initial_loss)
        return Trial(
            localization, config.lr, excess, *_mixing(whole), self.num_chains - len(whole), config.num_steps
        )  # fmt: skip


def at_its_largest(table: list[Trial]) -> bool:
    """A localization several times smaller left the excess loss where it was, to the noise of a trial."""
    if len(table) < 2 or table[-1].dead or table[-2].dead:
        return False
    last, previous = table[-1], table[-2]
    return last.localization < previous.localization / 2 and last.excess_loss < 1.1 * previous.excess_loss


def next_localization(table: list[Trial], target: float) -> float:
    """By the trials on both sides of the target, or by excess ~ 1/localization from the last one."""
    above = max((t for t in table if t.ratio(target) > 1), key=lambda t: t.localization, default=None)
    below = min((t for t in table if t.ratio(target) <= 1), key=lambda t: t.localization, default=None)
    if above is not None and below is not None and above.localization < below.localization:
        high, low = math.log(above.ratio(target)), math.log(below.ratio(target))
        share = min(max(high / (high - low), 0.2), 0.8)
        return above.localization * math.pow(below.localization / above.localization, share)
    return table[-1].localization * min(max(table[-1].ratio(target), 1e-2), 1e3)
