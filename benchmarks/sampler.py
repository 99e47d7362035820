"""Draws a second of the SGLD sampler on the mod-97 transformer, beside devinterp doing the same work.

    python -m benchmarks.sampler --devinterp-python PATH

PATH is the Python of an environment in which devinterp is installed; without it only our sampler is measured. A draw is
``steps`` SGLD steps of one chain and the losses of ``inputs`` pairs. Both samplers see the same model, pairs, batch size and
settings; the cost of a draw is the difference between a long and a short run, so that start-up counts for neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
    Case(batch=32, chains=16, steps=1, inputs=32, draws=10),
    Case(batch=32, chains=16, steps=1, inputs=1024, draws=4),
    Case(batch=32, chains=1, steps=1, inputs=32, draws=100),
    Case(batch=512, chains=4, steps=1, inputs=512, draws=8),
    Case(batch=512, chains=4, steps=1, inputs=10_240, draws=2),
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


def seconds_of_draw(run: Callable[[int], None], case: Case, repeats: int = 3) -> float:
    """Median of (long run - short run) / draws of all chains; the first of each warms up."""
    short = 2
    run(short)
    costs = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(short)
        middle = time.perf_counter()
        run(short + case.draws)
        costs.append((time.perf_counter() - middle - (middle - started)) / (case.draws * case.chains))
    return statistics.median(costs)


def ours(case: Case, method: str = "sgld", group: int | None = None) -> Callable[[int], None]:
    """The sampler of this package."""
    from harmonic_triton.losses import classification_loss
    from harmonic_triton.sgld import SGLDConfig, sample_losses

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
    from harmonic_triton import sgld

    parts = {"noise": (sgld._Streams, "noise"), "minibatch": (sgld._Streams, "minibatch"),
             "gradient": (sgld.Sampler, "_gradient"), "step": (sgld.Sampler, "_step"),
             "losses": (sgld.Sampler, "_losses")}  # fmt: skip
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


def measure_peer(python: str, case: Case, threads: int) -> dict[str, Any]:
    """devinterp's seconds for a draw, in its own environment."""
    command = [python, str(Path(__file__).resolve()), "--peer", json.dumps(case._asdict()), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Sampler: draws a second on the mod-97 transformer",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}, {facts['time']}."
        " A draw: the SGLD steps of one chain and the losses of the inputs. GPU: not measured.",
        "",
        "| batch | chains | steps a draw | inputs | ours, draws/s | one chain at a time | devinterp | ratio | where our time goes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        peer = r.get("devinterp", {})
        rate = f"{1 / peer['seconds']:.1f}" if "seconds" in peer else peer.get("failed", "–")
        ratio = f"{peer['seconds'] / r['seconds']:.2f}" if "seconds" in peer else "–"
        parts = ", ".join(f"{name} {share:.0%}" for name, share in sorted(r["profile"].items(), key=lambda p: -p[1]))
        lines.append(
            f"| {r['batch']} | {r['chains']} | {r['steps']} | {r['inputs']} | {1 / r['seconds']:.1f} |"
            f" {1 / r['loop_seconds']:.1f} | {rate} | {ratio} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devinterp-python", help="Python of an environment with devinterp")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peer:
        import importlib.metadata

        seconds = seconds_of_draw(devinterp(case := Case(**json.loads(arguments.peer))), case)
        print(json.dumps({"seconds": seconds, "version": importlib.metadata.version("devinterp")}))
        return
    from benchmarks.machine import describe

    facts, records = describe("cpu"), []
    for case in CASES:
        record: dict[str, Any] = case._asdict()
        record["seconds"] = seconds_of_draw(ours(case), case)
        record["loop_seconds"] = seconds_of_draw(ours(case, group=1), case)
        record["profile"] = profile(case)
        if arguments.devinterp_python:
            record["devinterp"] = measure_peer(arguments.devinterp_python, case, arguments.threads)
        print(json.dumps(record), file=sys.stderr)
        records.append(record)
    RESULTS.mkdir(exist_ok=True)
    stem = f"sampler-{facts['time'].replace(':', '').replace('-', '')}-cpu"
    (RESULTS / f"{stem}.json").write_text(json.dumps({"machine": facts, "probe": PROBE, "cases": records}, indent=1))
    (RESULTS / f"{stem}.md").write_text(table(records, facts))
    print(table(records, facts))


if __name__ == "__main__":
    main()
