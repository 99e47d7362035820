"""The sampler suite: draws a second of the SGLD sampler on the mod-97 transformer, beside devinterp doing the same work.

A draw is ``steps`` SGLD steps of one chain and the losses of ``inputs`` pairs. Both samplers see the same model, pairs,
batch size and settings; the cost of a draw is the difference between a long and a short run, so that start-up counts for
neither. devinterp is measured where ``--devinterp-python`` names the Python of an environment that has it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import workers
from benchmarks.machine import OtherWork
from benchmarks.report import markdown_table
from benchmarks.runs import Record, Run, blank, median, ratio, summary
from benchmarks.suite import Request, Say, Suite

MODULUS, WIDTH, HEADS, LAYERS = 97, 128, 4, 2
PROBE: dict[str, Any] = {"lr": 5e-8, "nbeta": 500.0, "localization": 6e6}
SAYS = {
    "ours": "our chains in groups",
    "ours_loop": "ours, one chain at a time",
    "ours_processes": "ours, the chains shared out over single-threaded processes, as torchrun does",
    "devinterp": "devinterp's sample",
}


class Case(NamedTuple):
    """One workload."""

    batch: int
    chains: int
    steps: int  # for each draw
    inputs: int  # whose losses are read at each draw
    draws: int  # of each chain, beyond the short run's


CASES = (
    Case(batch=32, chains=16, steps=1, inputs=32, draws=40),
    Case(batch=32, chains=16, steps=1, inputs=1024, draws=10),
    Case(batch=32, chains=1, steps=1, inputs=32, draws=200),
    Case(batch=512, chains=4, steps=1, inputs=512, draws=20),
)


class Block(nn.Module):
    """Causal attention and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """(b, 2) tokens to (b, classes) logits; addition and division have separate vocabularies."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(2 * MODULUS, WIDTH), nn.Embedding(2, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * MODULUS, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(inputs) + self.positions.weight)[:, -1]))


def pairs() -> Tensor:
    """(18721, 3) tokens of a and b and the result."""
    rows = [(a, b, (a + b) % MODULUS) for a in range(MODULUS) for b in range(MODULUS)]
    for a in range(MODULUS):
        rows += [(a + MODULUS, b + MODULUS, a * pow(b, -1, MODULUS) % MODULUS + MODULUS) for b in range(1, MODULUS)]
    return torch.tensor(rows)


def seconds_of_draw(run: Callable[[int], None], case: Case, repeats: int = 2) -> float:
    """(best long run - best short run) / draws of all chains; a run before warms up."""
    short = 2
    run(short)
    times: dict[int, list[float]] = {short: [], short + case.draws: []}
    for draws in [*times] * repeats:
        started = time.perf_counter()
        run(draws)
        times[draws].append(time.perf_counter() - started)
    return (min(times[short + case.draws]) - min(times[short])) / (case.draws * case.chains)


def ours(case: Case, method: str = "sgld", group: int | None = None) -> Callable[[int], None]:
    """The sampler of this package."""
    from harmonic_triton import SGLDConfig, sample_losses
    from harmonic_triton.losskernel import classification_loss

    torch.manual_seed(0)
    model, rows = Transformer(), pairs()
    data = (rows[:, :2], rows[:, 2])
    some = tuple(column[torch.randperm(len(rows))[: case.inputs]] for column in data)

    def run(draws: int) -> None:
        config = SGLDConfig(
            **PROBE, batch_size=case.batch, num_chains=case.chains, num_draws=draws, num_steps_bw_draws=case.steps,
            method=method, num_burnin_steps=int(method == "rmsprop"), chain_group_size=group,
        )  # fmt: skip
        for losses in sample_losses(model, classification_loss, data, some, config, seed=0, progress=False):
            assert losses.isfinite().all()

    return run


def devinterp(case: Case) -> Callable[[int], None]:
    """devinterp's ``sample``: rows as token sequences, the loss of the last token, the other column zero."""
    from devinterp.slt.sampling import sample

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, rows = Transformer(), pairs()

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        last = F.cross_entropy(model(tokens[:, :2]), tokens[:, 2], reduction="none")
        return torch.stack([torch.zeros_like(last), last], 1)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": rows[i]}

    def run(draws: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            sample(
                model, Rows(), {"pairs": (Rows(), case.inputs // case.batch)}, lr=PROBE["lr"], n_beta=2 * PROBE["nbeta"],
                localization=PROBE["localization"], num_chains=case.chains, num_draws=draws, batch_size=case.batch,
                num_steps_bw_draws=case.steps, num_init_loss_batches=1, match_sampling_input_ids_across_chains=False,
                device="cpu", output_path=Path(folder) / "draws.zarr", loss_fn=loss,
            )  # fmt: skip

    return run


def profile(case: Case) -> dict[str, float]:
    """Share of our sampler's time, by part; no public name bounds these parts."""
    from harmonic_triton.losskernel.sampling import sampler
    from harmonic_triton.losskernel.sampling.rng import CounterRNG

    parts = {"noise": (CounterRNG, "noise"), "minibatch": (CounterRNG, "minibatch"),
             "gradient": (sampler.Sampler, "_gradient"), "step": (sampler.Sampler, "_step"),
             "losses": (sampler.Sampler, "_losses")}  # fmt: skip
    spent = dict.fromkeys(parts, 0.0)
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in parts.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = originals[name](*arguments)
            spent[name] += time.perf_counter() - started
            return result

        return call

    for name, (owner, attribute) in parts.items():
        setattr(owner, attribute, timed(name))
    try:
        ours(case)(2 + case.draws)
    finally:
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, originals[name])
    spent["forward and backward"] = spent.pop("gradient") - spent["minibatch"]
    spent["update"] = spent.pop("step") - spent["forward and backward"] - spent["minibatch"] - spent["noise"]
    total = sum(spent.values())
    return {name: round(value / total, 3) for name, value in spent.items()}


# --- measurement ---------------------------------------------------------------------------------------------------------


def measure(case: Case, threads: int, devinterp_python: str | None, repeats: int = 1) -> list[Record]:
    """The samplers in turn, at one workload."""
    records = {name: blank(name, case._asdict(), says=says) for name, says in SAYS.items()}
    records["ours"]["profile"] = profile(case)
    found: dict[str, list[float]] = {name: [] for name in SAYS}
    if case.chains < max(2, threads):
        records["ours_processes"].update(status="skipped", reason="a chain alone, or fewer chains than processes")
    if not devinterp_python:
        reason = "name an environment that has it by --devinterp-python"
        records["devinterp"].update(status="skipped", reason=reason)
    others = OtherWork()
    for _ in range(repeats):
        found["ours"].append(seconds_of_draw(ours(case), case))
        found["ours_loop"].append(seconds_of_draw(ours(case, group=1), case))
        if records["ours_processes"]["status"] == "planned":
            share = case._replace(chains=case.chains // threads)
            begun = [_worker("ours", share, 1) for _ in range(threads)]
            each = [_seconds(worker, records["ours_processes"]) for worker in begun]
            found["ours_processes"] += [sum(each) / threads**2] if all(each) else []
        if records["devinterp"]["status"] == "planned":
            took = _seconds(_worker("devinterp", case, threads, devinterp_python), records["devinterp"])
            found["devinterp"] += [took] if took else []
    busy = others.cores()
    for name, values in found.items():
        if values and records[name]["status"] == "planned":
            records[name].update(status="ok", seconds={"draw": summary(values)}, other_work_cores=busy)
    return list(records.values())


def _worker(which: str, case: Case, threads: int, python: str | None = None) -> workers.Worker:
    asked = {"which": which, "case": case._asdict(), "threads": threads}
    return workers.Worker("sampler", asked, threads, python or sys.executable)


def _seconds(worker: workers.Worker, record: Record) -> float:
    """Seconds of a draw; 0 where the process failed, and the record says why."""
    answer, reason = worker.answer()
    if answer is None:
        record.update(status="failed", reason=reason)
        return 0.0
    record["version"] = answer["version"]
    return float(answer["seconds"])


def _work(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a draw of one sampler, in this process."""
    torch.set_num_threads(asked["threads"])
    case, peer = Case(**asked["case"]), asked["which"] == "devinterp"
    seconds = seconds_of_draw(devinterp(case) if peer else ours(case), case)
    return {"seconds": seconds, "version": importlib.metadata.version("devinterp") if peer else None}


# --- report --------------------------------------------------------------------------------------------------------------


COLUMNS = (
    "batch", "chains", "steps a draw", "inputs", "ours", "one chain at a time", "a process a core", "devinterp",
    "ours / devinterp", "where our time goes",
)  # fmt: skip


def sections(run: Run) -> list[str]:
    """A row for each workload."""
    found: dict[Case, dict[str, Record]] = {}
    for record in run.records:
        found.setdefault(Case(**record["workload"]), {})[record["baseline"]] = record
    rows, notes = [], []
    for case, records in found.items():
        seconds = {name: median(record, "draw") for name, record in records.items()}
        faster = ratio(seconds["devinterp"], seconds["ours"])
        profile = sorted(records["ours"]["profile"].items(), key=lambda part: -part[1])
        rows.append([
            *(str(value) for value in case[:4]),
            *("-" if not one else f"{1 / one:.1f}" for one in (seconds[name] for name in SAYS)),
            "-" if faster is None else f"{faster:.2f}",
            ", ".join(f"{name} {share:.0%}" for name, share in profile),
        ])  # fmt: skip
        notes += [f"- {r['baseline']}: {r['status']}: {r['reason']}" for r in records.values() if r["status"] != "ok"]
    legend = "Draws a second; a draw: the SGLD steps of one chain and the losses of the inputs. Not measured on a GPU."
    return [markdown_table(COLUMNS, rows), *(["\n".join(dict.fromkeys(notes))] if notes else []), legend]


# --- command line --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devinterp-python", metavar="PATH", help="Python of an environment with devinterp")


def request(arguments: argparse.Namespace) -> Request:
    threads, repeats = arguments.threads or torch.get_num_threads(), arguments.repeats or 1

    def records(say: Say) -> Iterator[Record]:
        for case in CASES:
            for record in measure(case, threads, arguments.devinterp_python, repeats):
                found = median(record, "draw")
                outcome = f"{1 / found:.1f} draws a second" if found else f"{record['status']}: {record['reason']}"
                say(f"{record['baseline']} at {case}: {outcome}")
                yield record

    return Request("mod97", "cpu", threads, {"repeats": repeats, "probe": PROBE}, records)


SUITE = Suite(
    name="sampler",
    describe="draws a second of the SGLD sampler beside devinterp",
    add_arguments=add_arguments,
    request=request,
    sections=sections,
)


if __name__ == "__main__":
    workers.reply(_work(workers.order()))
