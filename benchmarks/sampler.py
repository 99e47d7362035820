"""Draws a second of the SGLD sampler on the mod-97 transformer, beside devinterp doing the same work.

    python -m benchmarks.sampler --devinterp-python PATH

PATH is the Python of an environment in which devinterp is installed; without it only our sampler is measured. A draw is
``steps`` SGLD steps of one chain and the losses of ``inputs`` pairs. Both samplers see the same model, pairs, batch size and
settings; the cost of a draw is the difference between a long and a short run, so that start-up counts for neither.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
MODULUS, WIDTH, HEADS, LAYERS = 97, 128, 4, 2
PROBE: dict[str, Any] = {"lr": 5e-8, "nbeta": 500.0, "localization": 6e6}


class Case(NamedTuple):
    """One line of the table."""

    batch: int
    chains: int
    steps: int  # for each draw
    inputs: int  # whose losses are read at each draw
    draws: int  # of each chain, beyond the short run's


CASES = [
    Case(batch=32, chains=16, steps=1, inputs=32, draws=40),
    Case(batch=32, chains=16, steps=1, inputs=1024, draws=10),
    Case(batch=32, chains=1, steps=1, inputs=32, draws=200),
    Case(batch=512, chains=4, steps=1, inputs=512, draws=20),
]


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
    from harmonic_triton.losskernel.per_sample_losses import classification_loss
    from harmonic_triton.losskernel.sampling.config import SGLDConfig
    from harmonic_triton.losskernel.sampling.stream import sample_losses

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
    """Share of our sampler's time, by part."""
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


def in_process(python: str, which: str, case: Case, threads: int) -> subprocess.Popen[str]:
    """A process that prints one sampler's seconds for a draw as JSON."""
    command = [
        python,
        str(Path(__file__).resolve()),
        "--only",
        which,
        json.dumps(case._asdict()),
        "--threads",
        str(threads),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, errors = process.communicate()
    return (
        {"failed": errors.strip().splitlines()[-1]} if process.returncode else json.loads(said.strip().splitlines()[-1])
    )


def measure(case: Case, threads: int, devinterp_python: str | None, rounds: int = 1) -> dict[str, Any]:
    """One line of the table: the samplers in turn, the best of each."""
    record: dict[str, Any] = {**case._asdict(), "profile": profile(case)}
    found: dict[str, list[float]] = {
        "seconds": [],
        "loop_seconds": [],
        "processes_seconds": [],
        "devinterp_seconds": [],
    }
    for _ in range(rounds):
        found["seconds"].append(seconds_of_draw(ours(case), case))
        found["loop_seconds"].append(seconds_of_draw(ours(case, group=1), case))
        if case.chains > 1:  # the chains shared out over single-threaded processes, as torchrun does
            share = case._replace(chains=case.chains // threads)
            each = [answer(p) for p in [in_process(sys.executable, "ours", share, 1) for _ in range(threads)]]
            found["processes_seconds"].append(sum(r["seconds"] for r in each) / threads**2)
        if devinterp_python:
            peer = answer(in_process(devinterp_python, "devinterp", case, threads))
            record["devinterp"] = peer.get("version", peer.get("failed"))
            found["devinterp_seconds"] += [peer["seconds"]] if "seconds" in peer else []
    return record | {name: min(values) for name, values in found.items() if values}


def table(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Sampler: draws a second on the mod-97 transformer",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, {facts['time']}."
        " Draws a second; a draw: the SGLD steps of one chain and the losses of the inputs. GPU: not measured.",
        "",
        "| batch | chains | steps a draw | inputs | ours | one chain at a time | a process a core | devinterp | ours / devinterp |"
        " where our time goes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        rates = [r.get(f"{name}seconds") for name in ("", "loop_", "processes_", "devinterp_")]
        cells = [f"{1 / seconds:.1f}" if seconds else "–" for seconds in rates]
        ratio = f"{r['devinterp_seconds'] / r['seconds']:.2f}" if rates[3] else str(r.get("devinterp", "–"))
        parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(r["profile"].items(), key=lambda p: -p[1]))
        lines.append(
            f"| {r['batch']} | {r['chains']} | {r['steps']} | {r['inputs']} | {' | '.join(cells)} | {ratio} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devinterp-python", help="Python of an environment with devinterp")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs=2, metavar=("SAMPLER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        which, case = arguments.only[0], Case(**json.loads(arguments.only[1]))
        seconds = seconds_of_draw(devinterp(case) if which == "devinterp" else ours(case), case)
        version = importlib.metadata.version("devinterp") if which == "devinterp" else None
        print(json.dumps({"seconds": seconds, "version": version}))
        return
    from benchmarks.machine import describe

    facts, records = describe("cpu"), []
    for case in CASES:
        records.append(measure(case, arguments.threads, arguments.devinterp_python))
        print(json.dumps(records[-1]), file=sys.stderr)
    RESULTS.mkdir(exist_ok=True)
    stem = f"sampler-{facts['time'].replace(':', '').replace('-', '')}-cpu"
    (RESULTS / f"{stem}.json").write_text(json.dumps({"machine": facts, "probe": PROBE, "cases": records}, indent=1))
    (RESULTS / f"{stem}.md").write_text(table(records, facts))
    print(table(records, facts))


if __name__ == "__main__":
    main()
