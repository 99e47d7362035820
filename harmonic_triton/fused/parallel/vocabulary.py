"""The results of tokens whose classes are spread over processes, from what each process finds among its own rows.

A process measures its rows against a *reference class* of its own: the target where it has it, any other of its classes
elsewhere. With the log-score of that class, measured directly, its results say what all its classes weigh together; small
reductions of (N,) numbers add the processes up. Backward, the share rho of a process in the whole turns the gradient of
the loss into one of its own results, beside which the reference class's log-score has a gradient of its own. Scores,
products and gradients stay the backends'.

Write S_r for the log-sum-exp of this process's log-scores, S for that of all, E for that of all but the target. Then
nll = S - score_c = softplus(E - score_c), rho = exp(S_r - S), and p_j is rho times what this process takes for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from harmonic_triton._common.precision import compute_dtype
from harmonic_triton.fused import ops
from harmonic_triton.fused.floors import NEAREST_SHARE, NEAREST_SQ, divisor_floors
from harmonic_triton.fused.parallel.shard import Shard
from harmonic_triton.fused.problem import Operands, Problem, Wanted
from harmonic_triton.fused.results import DIFFERENTIABLE, TokenResults, Upstream, exponent_gradient

MEASURED_AT_ONCE = 2**22  # entries of the fp64 operands of directly measured distances
GIVEN = len(Operands._fields)
IGNORED = -100  # what ignored targets are among the classes of one process, where no other target is negative


class Found(NamedTuple):
    """What one process finds among its own classes; (N,) each, fp64 but for the results."""

    results: TokenResults
    owned: Tensor  # whether the target is here
    score: Tensor  # log-score of the reference class
    target_ref: Tensor  # of ``TokenResults`` where the target is here, else -inf
    log_sum: Tensor  # S_r
    others: Tensor  # the same without the target
    rival: Tensor  # the best class beside the target, counted over all
    rival_score: Tensor  # its log-score, -inf where there is none or none was asked for


class Shares(NamedTuple):
    """What backward needs, (N,) fp64 each."""

    rho: Tensor  # this process's share of the whole
    elsewhere: Tensor  # the probability of other processes' classes, but for the target
    counted: Tensor  # 0 where there is no gradient: the target is ignored, or x lies on it


def forward(
    operands: Operands, problem: Problem, shard: Shard, *, want_rival: bool, reduce_input: bool = True
) -> TokenResults:
    """Per-token results over all processes, the same in every one; those of ``DIFFERENTIABLE`` have gradients.

    Args:
        operands: x and target are the same in every process; w are this process's rows; smooth_weight is (V,), of all.
        problem: as in one process.
        shard: which rows w is.
        want_rival: whether ``rival`` and ``rival_score`` are wanted, which takes a reduction more.
        reduce_input: whether dX is added up over the processes, rather than left as this process's part.
    """
    flat = (*operands, problem, shard, want_rival, reduce_input)
    return TokenResults._make(_Vocabulary.apply(*flat))  # type: ignore[no-untyped-call]


class _Vocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        given = Operands._make(flat[:GIVEN])
        problem, ctx.shard, want_rival, ctx.reduce_input = flat[GIVEN:]
        local = _local(given, problem, ctx.shard)
        ctx.problem = problem._replace(ignore_index=IGNORED)
        found = _find(given, local, ctx.problem, ctx.shard, want_rival) if ctx.shard.own else None
        results, shares = _combine(given, problem, ctx.shard, found, want_rival)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(field for name, field in zip(TokenResults._fields, results, strict=True) if name not in DIFFERENTIABLE)
        )
        mine = (None,) * len(TokenResults._fields) if found is None else found.results
        ctx.save_for_backward(
            *local, given.smooth_weight, *mine, None if found is None else found.owned, *shares, *results
        )
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        saved, given = list(ctx.saved_tensors), TokenResults._make(gradients)
        local, smooth_weight, mine, owned, shares, results = (
            Operands._make(saved[:GIVEN]),
            saved[GIVEN],
            saved[GIVEN + 1 : GIVEN + 11],
            saved[GIVEN + 11],
            Shares._make(saved[GIVEN + 12 : GIVEN + 15]),
            TokenResults._make(saved[GIVEN + 15 :]),
        )
        need = Operands._make(ctx.needs_input_grad[:GIVEN])
        g = torch.zeros_like(results.nll) if given.nll is None else given.nll
        g_smooth = None
        if smooth_weight is not None:
            g_smooth = torch.zeros_like(g) if given.smooth is None else given.smooth
        x, w = local.x, local.w
        dx, dw, dn = x.new_zeros(x.shape if need.x else 0), w.new_zeros(w.shape if need.w else 0), None
        db = None if local.bias is None else torch.zeros_like(local.bias)
        if owned is not None and (need.x or need.w or need.bias):
            here = _local_upstream(g, g_smooth, given.target_ref, owned, shares, smooth_weight, ctx.shard)
            wanted = Wanted(need.x, need.w, False, need.bias)  # type: ignore[arg-type]
            dx, dw, db = ops.perform("backward", local, TokenResults._make(mine), here, ctx.problem, wanted)
        if need.x and ctx.reduce_input:
            dx = ctx.shard.all_reduce(dx.contiguous(), dist.ReduceOp.SUM, "add up the gradient of input")
        if need.n and local.n is not None:
            dn = exponent_gradient(results, local.n, Upstream(g, g_smooth, None)).to(local.n.dtype)
        nothing = results.nll.new_zeros(0)
        dx, dw, dn, db = ops.first_order_only(
            dx, dw, nothing if dn is None else dn, nothing if db is None else db, local, g, g_smooth, given.target_ref
        )
        wanted = Wanted(need.x, need.w, need.n and local.n is not None, need.bias)  # type: ignore[arg-type]
        return ops.slots(GIVEN + 4, dx, dw, dn, db, wanted)


def _local(given: Operands, problem: Problem, shard: Shard) -> Operands:
    """The operands of this process: every token has a reference class here, other processes' targets one in turn."""
    target = given.target - shard.first
    if shard.own:
        in_turn = torch.arange(len(target), device=target.device) % shard.own
        target = torch.where((target >= 0) & (target < shard.own), target, in_turn)
    target = target.masked_fill(given.target == problem.ignore_index, IGNORED)
    smooth_weight = given.smooth_weight
    if smooth_weight is not None:
        smooth_weight = _own(smooth_weight, shard).contiguous()
    return given._replace(target=target, smooth_weight=smooth_weight)


def _own(values: Tensor, shard: Shard) -> Tensor:
    """Those (V,) of this process's classes."""
    return values[shard.first : shard.first + shard.own]


def _find(given: Operands, local: Operands, problem: Problem, shard: Shard, want_rival: bool) -> Found:
    """Results of this process's classes, and what they weigh together; the problem is this process's own."""
    counted = local.target != problem.ignore_index
    owned = (given.target >= shard.first) & (given.target < shard.first + shard.own) & counted
    results = TokenResults._make(ops.perform("forward", local, problem))
    measured, score = _measured(local, torch.where(counted, local.target, 0), owned, problem)
    best, rival, rival_score = torch.full_like(score, -math.inf), results.rival, results.rival_score
    if want_rival:  # measured here: equal class vectors of two processes have equal scores
        rival = torch.where(~owned & (rival_score <= 0) & counted, local.target, rival)
        best = _measured(local, rival, owned & False, problem)[1]
        best = best.masked_fill((owned & (rival == local.target)) | ~counted, -math.inf)
    nll = results.nll.double()
    others = torch.where(owned, _before_softplus(nll), nll) + score
    target_ref = measured.masked_fill(~owned, -math.inf)
    return Found(results, owned, score, target_ref, nll + score, others, rival + shard.first, best)


def _log_score(distance_sq: Tensor, n: Tensor, dtype: torch.dtype) -> Tensor:
    """-(n/2) log s, s able to divide, as the backends have it."""
    return distance_sq.clamp_min(divisor_floors(dtype).least).log() * (-0.5 * n.double())


def _measured(local: Operands, index: Tensor, is_target: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """||x - w_index||^2, or the logit with dot products, and the log-score; fp64 (N,). Only a target's distance has no floor."""
    x, w, n = local.x, local.w, local.n
    measured = torch.empty(len(x), dtype=torch.float64, device=x.device)
    floor = torch.zeros_like(measured)
    step = max(1, MEASURED_AT_ONCE // x.shape[1])
    for start in range(0, len(x), step):
        at = slice(start, start + step)
        vectors, rows = x[at].double(), w.index_select(0, index[at]).double()
        if n is None:
            measured[at] = torch.linalg.vecdot(vectors, rows)
        else:
            measured[at] = (vectors - rows).square().sum(1)
            floor[at] = NEAREST_SHARE * (vectors.square().sum(1) + rows.square().sum(1)) + NEAREST_SQ
    if n is None:
        if local.bias is not None:
            measured += local.bias.index_select(0, index)
        if problem.softcap:
            measured = problem.softcap * torch.tanh(measured / problem.softcap)
        return measured, measured
    distance_sq = measured + problem.eps
    distance_sq = torch.where(is_target, distance_sq, torch.maximum(distance_sq, floor))
    return measured, _log_score(distance_sq, n, compute_dtype(x.dtype))


def _before_softplus(nll: Tensor) -> Tensor:
    """L with softplus(L) = nll: log(exp(nll) - 1), -inf at 0."""
    return torch.where(nll < 1.0, nll.expm1().log(), nll + torch.log1p(-torch.exp(-nll)))


def _combine(
    given: Operands, problem: Problem, shard: Shard, found: Found | None, want_rival: bool
) -> tuple[TokenResults, Shares]:
    """Results over all processes, and this one's shares: two reductions, and one each for statistics and rivals."""
    n, ignored = given.n, given.target == problem.ignore_index
    dtype = compute_dtype(given.x.dtype)
    nothing = torch.zeros(len(given.x), dtype=torch.float64, device=given.x.device)
    nobody = nothing - math.inf

    here = [nobody, nobody, nobody if found is None else found.rival_score]
    if found is not None:  # a maximum drops NaN: infinity stands for it, and becomes NaN below
        unsound = found.others.isnan() | found.score.isnan()
        here[:2] = found.others.masked_fill(unsound, math.inf), found.target_ref.nan_to_num(nan=-math.inf)
    top, target_ref, best_of_all = shard.all_reduce(torch.stack(here), dist.ReduceOp.MAX, "find the nearest classes")
    score, on_target = target_ref, torch.zeros_like(ignored)
    if n is not None:
        score, on_target = _log_score(target_ref + problem.eps, n, dtype), target_ref + problem.eps == 0
    anchor = top.masked_fill(top == -math.inf, 0.0)
    own = nothing if found is None else (found.others - anchor).exp()
    whole = shard.all_reduce(own.clone(), dist.ReduceOp.SUM, "add up the classes")
    nll = torch.logaddexp(anchor + whole.log() - score, nothing)
    rival_score = best_of_all - score if want_rival else nothing
    if n is not None:
        twin = on_target & _lies_on(given.x, n, top)
        nll = torch.where(on_target & ~nll.isnan(), torch.where(twin, math.log(2.0), 0.0), nll)
        rival_score = torch.where(on_target, torch.where(twin, 0.0, -math.inf), rival_score)
    unsound = nll.isnan()
    rival_score = rival_score.masked_fill(unsound, math.nan)
    if n is None:
        target_ref = target_ref.masked_fill(unsound, math.nan)
    log_sum = score + nll

    elsewhere = (whole - own).clamp_min(0.0) * (anchor - log_sum).exp()
    lower = nothing  # -log rho: by how much log-probabilities are lower than among this process's classes alone
    if found is not None:
        rest = elsewhere + torch.where(found.owned, 0.0, (-nll).exp())
        lower = torch.where(rest < 0.5, -torch.log1p(-rest), log_sum - found.log_sum).clamp_min(0.0)
    rho = (-lower).exp() if found is not None else nothing
    without = on_target | ignored
    shares = Shares(rho.masked_fill(without, 0.0), elsewhere.masked_fill(without, 0.0), (~without).to(dtype))

    fields = dict.fromkeys(TokenResults._fields, nothing[:0])
    sums = _sums(given, problem, shard, found, rho, lower, score)
    if sums:
        added = shard.all_reduce(torch.stack(list(sums.values())), dist.ReduceOp.SUM, "add up statistics")
        fields.update(zip(sums, added, strict=True))
    if problem.want_scores:
        fields["score_mean"] = fields["score_mean"].masked_fill(on_target, 0.0)
        fields["entropy"] = torch.where(on_target, nll, fields["entropy"].clamp_min(0.0))
    fields.update(nll=nll, target_ref=target_ref, rival_score=rival_score)
    rounded = {name: field.masked_fill(ignored, 0.0) if len(field) else field for name, field in fields.items()}
    rival = torch.zeros_like(given.target)
    if want_rival:
        rival = _rival(given, shard, found, best_of_all)
        wrong = (given.target == 0).long().clamp_max(shard.classes - 1)  # NaN is no hit
        rival = torch.where(unsound, wrong, rival).masked_fill(ignored, 0)
    results = TokenResults(**{name: field.to(dtype) for name, field in rounded.items() if name != "rival"}, rival=rival)
    return results, shares


def _lies_on(x: Tensor, n: Tensor, score: Tensor) -> Tensor:
    """Whether a class of that log-score cannot be told from x."""
    floor = 2 * NEAREST_SHARE * x.double().square().sum(1) + NEAREST_SQ
    return score >= (1.001 * floor).log() * (-0.5 * n.double())


def _sums(
    given: Operands, problem: Problem, shard: Shard, found: Found | None, rho: Tensor, lower: Tensor, score: Tensor
) -> dict[str, Tensor]:
    """This process's part of the sums over classes that were asked for, by the names of ``TokenResults``."""
    wanted = ("score_mean", "entropy") * problem.want_scores
    wanted += ("smooth", "share_score", "share_sum", "share_rest") * given.smoothing
    if found is None or not wanted:
        return dict.fromkeys(wanted, torch.zeros_like(score))
    mine = {name: getattr(found.results, name).double() for name in wanted}
    apart = torch.where(found.owned, 0.0, found.score - score)  # the reference class's log-score, the target's being 0
    if problem.want_scores:
        mine["score_mean"] = rho * (mine["score_mean"] + apart)
        mine["entropy"] = torch.where(rho == 0, 0.0, rho * (mine["entropy"] + lower))
    if given.smooth_weight is not None:
        mass = _own(given.smooth_weight, shard).double().sum()
        mine["smooth"] = mine["smooth"] + mass * lower
        mine["share_score"] = mine["share_score"] + mass * apart
        mine["share_rest"] = torch.where(found.owned, mine["share_rest"], mine["share_sum"])
    return mine


def _rival(given: Operands, shard: Shard, found: Found | None, best: Tensor) -> Tensor:
    """The first class with the best log-score beside the target; the target where there is no other."""
    rival = torch.full_like(given.target, shard.classes)
    if found is not None:
        rival = torch.where((found.rival_score == best) & (best > -math.inf), found.rival, rival)
    rival = shard.all_reduce(rival, dist.ReduceOp.MIN, "find the rivals")
    return torch.where(rival == shard.classes, given.target, rival)


def _local_upstream(
    g: Tensor, g_smooth: Tensor | None, g_score: Tensor | None, owned: Tensor, shares: Shares,
    smooth_weight: Tensor | None, shard: Shard,
) -> Upstream:  # fmt: skip
    """The gradient of this process's own results.

    Over all, G_j = g (p_j - [j = c]) and p_j = rho p_j': so the own nll has rho g. What G of the reference class then lacks is
    the gradient of its log-score; where it is not the target that is as much again, and the backends subtract the
    two exactly.
    """
    dtype, counted = g.dtype, shares.counted
    whole = (g * counted).double()
    own = missing = torch.zeros_like(whole)
    if smooth_weight is not None and g_smooth is not None:
        g_smooth = g_smooth * counted
        exact, mass = g_smooth.double(), _own(smooth_weight, shard).double().sum()
        total = smooth_weight.double().sum()
        whole, own, missing = whole + exact * total, exact * mass, exact * (total - mass)
    dropped = whole == 0  # a token that somebody drops for its NaN must not bring it back as 0 * NaN
    missing = missing - (whole * shares.elsewhere).masked_fill(dropped, 0.0)
    if g_score is not None:
        missing = missing + g_score.double()
    nll = ((shares.rho * whole).masked_fill(dropped, 0.0) - own).to(dtype)
    return Upstream(nll, g_smooth, torch.where(owned, missing.to(dtype), nll))
