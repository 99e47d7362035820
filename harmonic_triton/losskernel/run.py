"""The loss kernel of a trained model from its samples to the result: :func:`loss_kernel`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.data import ConcatDataset, IterableDataset

from harmonic_triton._common import validate
from harmonic_triton._common.processes import rank_and_world
from harmonic_triton.losskernel.collector import Collector, Stored, chosen, collect, gather
from harmonic_triton.losskernel.estimators import sample_labels
from harmonic_triton.losskernel.kernel import About, LossKernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig
from harmonic_triton.losskernel.sampling.sampler import Sampler


def loss_kernel(
    model: nn.Module,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    train_data: Any,
    eval_data: Any,
    config: SGLDConfig,
    *,
    seed: int,
    device: torch.device | str | None = None,
    mask: Any = None,
    query_data: Any = None,
    labels: Tensor | None = None,
    keep: str = "auto",
    within_chain: bool = False,
    backend: str = "auto",
    trace_dtype: torch.dtype = torch.bfloat16,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> LossKernel:
    """The loss kernel of a trained model on ``eval_data`` (paper, section 2.3 and appendix B).

    Args:
        model, per_sample_loss, train_data, eval_data, config, seed, device, mask: as for :class:`losskernel.Sampler`.
        query_data: further samples, of the form of eval_data, for :meth:`LossKernel.bif`; they are not in the kernel.
        labels: (m,) integers of the evaluation samples, for diagnostics and pictures.
        keep: "covariance", the (m, m) sums in float32; "traces", all draws in ``trace_dtype`` (memory-mapped in
            ``checkpoint_dir`` if there is one); "auto": the first for m up to the number of draws, or 4096.
        within_chain: the within-chain estimate; needs ``keep="covariance"``, where :meth:`LossKernel.estimate` switches.
        backend: of the accumulator, "auto", "triton" or "torch".
        trace_dtype: torch.bfloat16, 2 T m bytes, or torch.float32, twice as much, where single correlations matter: see
            :class:`LossTraces` for what rounding moves.
        checkpoint_dir: keep the state of chains and sums here (``kernel-0.pt``; of rank r ``kernel-r.pt``), the traces
            (``traces-0``), and the state of sharded chains (``chains-0-*``, which any number of processes can go on from). A
            run that was killed at any moment, or interrupted, goes on from its last checkpoint when the same call is made
            again, and ends with bitwise the numbers of an uninterrupted run (CPU); a finished one returns at once. The
            directory belongs to one run: another model, data, setting or seed is refused, and so is a second process while
            the first is at it (a lock, which dies with its process). Every file has a checksum; damage raises, with the
            file's name and what to do.
        checkpoint_seconds: at least this long between two checkpoints; 0: one at every draw.
        progress: show draws per second, time left and the chains' health.

    Returns:
        The kernel. Under ``torch.distributed`` (``torchrun``) the ranks share the chains, and each gets the same one. Ranks
        over which ``fully_shard`` has spread the model run each chain together; with several such groups, each on its own
        mesh, the groups share the chains.

    Raises:
        TypeError, ValueError: an argument is wrong, the checkpoint belongs to another run (what differs is listed) or is
            damaged, or fewer than two draws are left because chains died.
        RuntimeError: another process or thread is at the run in ``checkpoint_dir``.
    """
    validate.between("checkpoint_seconds", checkpoint_seconds, 0.0)
    validate.flag("within_chain", within_chain)
    validate.flag("progress", progress)
    if isinstance(config, SGLDConfig) and config.num_draws * (1 if within_chain else config.num_chains) < 2:
        raise ValueError(
            f"num_chains={config.num_chains} and num_draws={config.num_draws} give one draw"
            f"{' a chain' if within_chain else ''}; a covariance needs two, so take num_draws=2 or more"
        )
    rank, world = rank_and_world()
    read = eval_data if query_data is None else joined(eval_data, query_data)
    sampler = Sampler(model, per_sample_loss, train_data, read, config, seed=seed, device=device, mask=mask)
    share, samples = sampler.share, sampler.num_samples
    if share.world > config.num_chains:
        raise ValueError(f"{share.world} processes share {config.num_chains} chains; start one a chain at most")
    if query_data is not None:
        samples = samples * num_samples(eval_data) // num_samples(read)
    if labels is not None:
        labels = sample_labels("labels", labels, samples)
    form = chosen(keep, samples, config.num_chains * config.num_draws)
    if form == "traces" and within_chain:
        raise ValueError("within_chain=True needs keep='covariance'; traces give the pooled estimate")
    directory = None if checkpoint_dir is None else Path(checkpoint_dir)
    meet = world > 1 or sampler.sharded
    dtype = torch.float32 if meet else trace_dtype  # rounded once, when the ranks' traces meet
    about = About(
        nbeta=config.nbeta,
        step_size=config.lr,
        stability_bound=sampler.stability_bound() if config.method == "sgld" else math.nan,
        num_train=len(sampler.train_data),
        config=dataclasses.asdict(config),
        fingerprint=sampler.fingerprint,
    )
    kind = f"traces in {str(trace_dtype).removeprefix('torch.')}" if form == "traces" else form
    whose = {**sampler.fingerprint, "keep": kind, "processes": str(share.world)}
    if query_data is not None:
        whose["query losses"] = str(sampler.num_samples - samples)  # behind the kernel's, in one evaluation data
    stored = Stored(directory, whose, share, sampler.group)
    collector = None

    def collector_in(path: Path | None) -> Collector:
        return Collector(
            config.num_chains,
            config.num_draws,
            sampler.initial_losses[:samples],
            sampler.num_samples,
            form,
            sampler.device,
            backend,
            path,
            dtype,
            stored.run,
        )

    def open_files() -> None:
        nonlocal collector
        collector = collector_in(directory / f"traces-{share.place}" if directory and form == "traces" else None)

    try:
        stored.led(open_files)
        collector = collector or collector_in(None)  # beside the process that writes, empty until all meet
        collect(sampler, collector, stored, checkpoint_seconds, progress)
        if meet:
            gather(collector, rank, world, directory, trace_dtype, stored.run)
    finally:  # also where a notebook keeps the frames of a call that was interrupted
        if collector is not None:
            collector.close()
        stored.close()
    collector.check()
    return LossKernel(
        collector.accumulator,
        collector.record,
        within_chain=within_chain,
        labels=labels,
        queries=collector.queries,
        about=about,
    )


def joined(first: Any, second: Any) -> Any:
    """The samples of two data sets, one after the other.

    Raises:
        TypeError: they are not of one form.
    """
    columns = (Tensor, tuple, dict)
    if isinstance(first, columns) and isinstance(second, columns):
        if tree_flatten(first)[1] == tree_flatten(second)[1]:
            return tree_map(lambda a, b: torch.cat([a, b]), first, second)
    elif not isinstance(first, (*columns, IterableDataset)) and not isinstance(second, (*columns, IterableDataset)):
        return ConcatDataset([first, second])
    raise TypeError(
        "query_data must have the form of eval_data (tensors alike, or map-style datasets), got"
        f" {type(second).__name__} for {type(first).__name__}"
    )


def num_samples(data: Any) -> int:
    """Samples of tensors or of a dataset."""
    return len(tree_leaves(data)[0] if isinstance(data, (Tensor, tuple, dict)) else data)
