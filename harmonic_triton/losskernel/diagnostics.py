"""Whether the draws of a kernel can be trusted, in figures and in plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmonic_triton.losskernel import convergence, estimators
from harmonic_triton.losskernel.chain_record import ChainRecord

FOUR_DRAWS = "Needs a chain with four finite draws"
R_HAT, TAU, CKA = 1.01, 6.0, 0.9  # R-hat: Vehtari et al. 2021; the others: experience with the method, not theorems


class Verdict(NamedTuple):
    """One line of the diagnostics in plain words."""

    name: str
    value: str
    good: bool | None  # None: nothing to hold it against
    words: str


@dataclass(frozen=True)
class Diagnostics:
    """Whether the draws can be trusted. ``verdicts()`` says it in words.

    R-hat, autocorrelation times and split-half CKA are of the chains without a non-finite draw, and, but for those of
    the mean loss, of a fixed random subset of at most 256 samples.
    """

    num_chains: int
    num_draws: int  # that entered the kernel
    r_hat_mean_loss: float
    r_hat: Tensor  # (p,) fp64, of the subset
    autocorrelation_time_mean_loss: float  # in draws
    autocorrelation_time: Tensor  # (p,) fp64
    split_half_cka: float
    initial_loss: float  # mean at w*
    excess_loss: Tensor  # (C,) fp64 mean loss of each chain less the initial one, NaN for dead chains
    dead: dict[int, int]  # chain: the draw at which it died; none of its draws is in the kernel
    skipped: dict[int, int]  # chain: non-finite draws left out of a living one
    constant_samples: int  # whose loss never varied: correlation 0 with all
    step_size: float  # epsilon; NaN where unknown
    stability_bound: float  # 4 / lambda_max(nbeta H + gamma); NaN where not computed
    confound: estimators.SameLabelConfound | None  # None without labels

    @property
    def effective_draws(self) -> float:
        """Draws over the median autocorrelation time (at least 1): independent ones that would say as much."""
        return self.num_draws / max(1.0, quantile(self.autocorrelation_time, 0.5))

    @property
    def split_half_noise(self) -> float:
        """The split-half CKA of losses that share nothing: the halves' diagonals agree, 1/(1 + p τ/(T/2))."""
        tau = quantile(self.autocorrelation_time, 0.5)
        return 1 / (1 + len(self.r_hat) * tau / (self.num_draws / 2))

    def verdicts(self) -> list[Verdict]:
        """Each figure with what it means; the dead chains first."""
        return [
            self._chains(),
            self._r_hat(),
            self._autocorrelation(),
            self._split_half(),
            self._excess(),
            self._step_size(),
            self._constant(),
            self._confound(),
        ]

    def _chains(self) -> Verdict:
        value = f"{self.num_chains - len(self.dead)} of {self.num_chains} alive"
        parts = [f"Chain {chain} died at draw {draw}; none of its draws is used." for chain, draw in self.dead.items()]
        parts += [f"Chain {chain}: {count} non-finite draws left out." for chain, count in self.skipped.items()]
        if self.dead:
            parts.append("A smaller step size or a larger localization keeps chains alive.")
        return Verdict("chains", value, not (self.dead or self.skipped), " ".join(parts) or "No loss was non-finite.")

    def _r_hat(self) -> Verdict:
        name = "split R̂"
        if math.isnan(self.r_hat_mean_loss):
            return Verdict(name, "–", None, f"{FOUR_DRAWS}, and a mean loss that varies.")
        median, worst = quantile(self.r_hat, 0.5), quantile(self.r_hat, 0.95)
        value = (
            f"mean loss {self.r_hat_mean_loss:.3f}; median sample {digits(median, 3)}, 95 % below {digits(worst, 3)}"
        )
        high = above(R_HAT, 3, {"of the mean loss": self.r_hat_mean_loss, "of the median sample": median})
        words = (
            f"R̂ {high}, is above {R_HAT}: the chains, or their halves, sample different places. Longer burn-in, more draws, "
            "or a larger localization; the within-chain estimate leaves differences between chains out."
            if high
            else "The chains agree with one another and with their own halves"
            + (", but for single samples." if round(worst, 3) > R_HAT else ".")
        )
        return Verdict(name, value, not high, words)

    def _autocorrelation(self) -> Verdict:
        tau = quantile(self.autocorrelation_time, 0.5)
        name = "autocorrelation time (draws)"
        if math.isnan(tau):
            return Verdict(name, "–", None, f"{FOUR_DRAWS}, and losses that vary.")
        value = f"mean loss {digits(self.autocorrelation_time_mean_loss, 1)}; median sample {tau:.1f}"
        high = above(TAU, 1, {"of the mean loss": self.autocorrelation_time_mean_loss, "of the median sample": tau})
        words = (
            f"{self.num_draws:,} draws are worth about {self.effective_draws:,.0f} independent ones, sample by sample. "
        )
        words += (
            f"The time {high}, is above {TAU:g} draws: they repeat one another. More steps between draws, or a larger step."
            if high
            else "Draws are far enough apart."
        )
        return Verdict(name, value, not high, words)

    def _split_half(self) -> Verdict:
        name = "split-half CKA"
        if math.isnan(self.split_half_cka):
            return Verdict(name, "–", None, "Needs two halves of two draws, and losses that vary.")
        cka, noise = round(self.split_half_cka, 3), self.split_half_noise
        value = f"{cka:.3f}" + ("" if math.isnan(noise) else f"; {noise:.3f} if the losses shared nothing")
        if cka < CKA:
            words = f"Below {CKA}: two halves of the draws give different kernels, single entries are mostly noise. More draws."
            return Verdict(name, value, False, words)
        if cka < round(noise, 3):
            words = "No more than losses that share nothing would have, whose halves agree by their diagonals alone: "
            return Verdict(name, value, False, words + "what is off the diagonal is mostly noise, or 0. More draws.")
        return Verdict(name, value, True, "Two halves of the draws give the same kernel.")

    def _excess(self) -> Verdict:
        living = self.excess_loss[~self.excess_loss.isnan()]
        name = "excess loss of the chains"
        if not len(living):
            return Verdict(name, "–", None, "The losses at w* are not known." if not self.dead else "No chain lives.")
        value = f"{living.mean():.4g} ({living.min():.3g} … {living.max():.3g}); loss at w* {self.initial_loss:.4g}"
        median = living.median()
        far = [int(chain) for chain in (self.excess_loss > median + 2 * median.abs() + 1e-12).nonzero()]
        if far and len(living) > 2:
            which = f"chain{'s' * (len(far) > 1)} {', '.join(map(str, far))}"
            return Verdict(name, value, False, f"Far above the median, {median:.3g}: {which} sampled elsewhere.")
        if living.mean() < 0:
            return Verdict(name, value, None, "The probe found lower losses: w* is no minimum of these samples' loss.")
        if self.initial_loss <= 0:
            return Verdict(name, value, None, "The loss at w* is not above 0, so there is nothing to hold it against.")
        ratio = living.mean().item() / self.initial_loss
        if ratio > 3:
            words = f"{ratio:.3g} times the loss at w*: the probe may sample another model. A larger localization."
            return Verdict(name, value, False, words)
        if ratio < 0.01:
            words = f"{100 * ratio:.2g} % of the loss at w*: the probe hardly moves. A smaller localization."
            return Verdict(name, value, False, words)
        return Verdict(name, value, True, f"{100 * ratio:.3g} % of the loss at w*: the probe stays near and moves.")

    def _step_size(self) -> Verdict:
        name = "step size ε"
        if math.isnan(self.stability_bound):
            value = "–" if math.isnan(self.step_size) else f"{self.step_size:.3g}"
            return Verdict(name, value, None, "The stability bound was not computed.")
        if math.isinf(self.stability_bound):
            return Verdict(name, f"{self.step_size:.3g}", None, "No curvature was found that would bound it.")
        value = f"{self.step_size:.3g}; stability bound {self.stability_bound:.3g}"
        if self.stability_bound <= 0:
            return Verdict(name, value, False, "Gradients next to w* are not finite: no step size is stable there.")
        ratio = self.step_size / self.stability_bound
        if ratio >= 1:
            words = "At or above 4/λmax(nβH + γ): the chains are unstable in the stiffest direction. Smaller ε."
            return Verdict(name, value, False, words)
        if ratio <= 0.25:
            words = f"{100 * ratio:.2g} % of the bound: stable, and the bias of the discretisation is small."
            return Verdict(name, value, True, words)
        words = f"{100 * ratio:.0f} % of the bound: stable, with a bias of {100 * ratio / (1 - ratio):.0f} % of the "
        words += "variance in the stiffest direction."
        return Verdict(name, value, ratio <= 0.5, words + (" Smaller ε." if ratio > 0.5 else ""))

    def _constant(self) -> Verdict:
        words = "Every loss varies."
        if self.constant_samples:
            words = "Losses that never vary have correlation 0 with all. Losses rounded to 0 come from a cross-entropy "
            words += "without the leave-one-out form."
        return Verdict("constant samples", str(self.constant_samples), not self.constant_samples, words)

    def _confound(self) -> Verdict:
        name = "same-label confound (mean ρ)"
        if self.confound is None:
            return Verdict(name, "–", None, "No labels were given.")
        same, other = self.confound
        if math.isnan(same) or math.isnan(other):
            return Verdict(name, "–", None, "Not both kinds of pairs are there.")
        value = f"same label {same:.3f}, others {other:.3f}"
        good = same - other < 0.1
        words = (
            f"Pairs with one label correlate {'little' if same > other else 'no'} more than others."
            if good
            else "Pairs with one label correlate more, which noise on the output weights alone can do: leave them out of "
            "neighbours and embeddings with exclude_same=labels."
        )
        return Verdict(name, value, good, words)


def digits(value: float, places: int) -> str:
    """A number as the report shows it; a dash for none."""
    return "–" if math.isnan(value) else f"{value:.{places}f}"


def above(limit: float, places: int, figures: dict[str, float]) -> str:
    """Which figures are above a limit, judged by the digits that are shown; "" if none is."""
    return " and ".join(
        f"{which}, {value:.{places}f}" for which, value in figures.items() if round(value, places) > limit
    )


def quantile(values: Tensor, q: float) -> float:
    """Quantile of the entries that are numbers; NaN if none is."""
    return values.nanquantile(q).item() if len(values) else math.nan


def convergence_of(record: ChainRecord) -> dict[str, Any]:
    """R-hat, autocorrelation times and split-half CKA from a record, as the fields of :class:`Diagnostics`."""
    chains = record.complete()
    mean_loss, probe = record.mean_loss[chains], record.probe[chains]
    nothing = torch.full((probe.shape[2],), math.nan, dtype=torch.float64)
    enough = len(chains) > 0 and mean_loss.shape[1] >= 4
    halves = len(chains) > 0 and (len(chains) > 1 or mean_loss.shape[1] >= 4)
    return {
        "r_hat_mean_loss": convergence.gelman_rubin(mean_loss).item() if enough else math.nan,
        "r_hat": convergence.gelman_rubin(probe) if enough else nothing,
        "autocorrelation_time_mean_loss": convergence.autocorrelation_time(mean_loss).item() if enough else math.nan,
        "autocorrelation_time": convergence.autocorrelation_time(probe) if enough else nothing,
        "split_half_cka": convergence.split_half_cka(probe) if halves else math.nan,
        "initial_loss": record.initial_loss,
        "excess_loss": record.excess_loss(),
        "dead": record.dead,
        "skipped": record.skipped,
    }
