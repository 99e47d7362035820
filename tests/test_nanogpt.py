"""The README's change to nanoGPT, applied to a model of its shape: training, stopping, going on, compiling and sampling."""

import math
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIFF = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
TEXT = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "harmonic_triton").rglob("*.py")))
CHARACTERS = sorted(set(TEXT))
DATA = torch.tensor(list(map({character: i for i, character in enumerate(CHARACTERS)}.get, TEXT)))
HELD_OUT = len(DATA) // 10


def changed(without: str = "") -> str:
    """The model's source after the README's change, but for a hunk whose new lines hold ``without``."""
    source = (ROOT / "tests" / "small_gpt.py").read_text(encoding="utf-8")
    for hunk in re.split(r"^@@ .* @@\n", DIFF, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= {" ", "+", "-"}
        old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert source.count(old) == 1, f"the README's change does not fit: {old}"
        if not without or without not in new:
            source = source.replace(old, new)
    return source


def model_of(source: str) -> torch.nn.Module:
    module = types.ModuleType("small_gpt")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(source, module.__dict__)
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(len(CHARACTERS)))


def batch(generator: torch.Generator, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    at = torch.randint(start, end - 33, (8, 1), generator=generator) + torch.arange(33)
    return DATA[at][:, :-1].contiguous(), DATA[at][:, 1:].contiguous()


def trained(source: str, steps: int) -> tuple[torch.nn.Module, float]:
    """The model after some steps of nanoGPT's own settings for characters, and its loss on text held out."""
    model = model_of(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*batch(generator, HELD_OUT, len(DATA)))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return model, sum(model(*batch(generator, 0, HELD_OUT))[1].item() for _ in range(8)) / 8


@pytest.fixture(scope="module")
def briefly():
    return trained(changed(), 60)


def test_what_the_changed_model_samples_from_is_what_it_was_trained_on(briefly):
    model, loss = briefly
    idx, targets = batch(torch.Generator().manual_seed(1), 0, HELD_OUT)
    targets[0, :5] = -1  # nanoGPT's mark of a token that does not count
    with torch.no_grad():
        logits = torch.cat([model(idx[:, : end + 1])[0] for end in range(idx.shape[1])], dim=1)
        wanted = model(idx, targets)[1]
    torch.testing.assert_close(logits.exp().sum(2), torch.ones(idx.shape), rtol=0, atol=1e-5)
    under_sampling = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(under_sampling, wanted, rtol=1e-5, atol=0)
    torch.manual_seed(0)
    sampled = model.generate(idx[:1], 50, temperature=0.8, top_k=20)
    assert sampled.shape == (1, 82) and torch.equal(sampled[:, :32], idx[:1])
    assert loss < math.log(len(CHARACTERS)) - 1  # it has learnt something


def test_the_initialisation_of_the_change_helps(briefly):
    """The whole gap after 60 steps is about a nat; see the slow test for how long it lasts."""
    assert briefly[1] < trained(changed(without="init_last_norm_"), 60)[1] - 0.5


def test_the_state_of_the_changed_model_holds_n_and_eps(briefly):
    state = briefly[0].state_dict()
    model_of(changed()).load_state_dict(state)
    with pytest.raises(RuntimeError, match="lm_head._extra_state"):
        model_of((ROOT / "tests" / "small_gpt.py").read_text(encoding="utf-8")).load_state_dict(state)
    other = model_of(changed().replace("n=settings.n", "n=3"))
    with pytest.raises(
        RuntimeError, match=r"weights of lm_head were trained with n = 1\d\.\d+ and eps = 0, and .* n = 3"
    ):
        other.load_state_dict(state)


@pytest.mark.slow
def test_the_changed_model_trains_as_cross_entropy_does():
    """300 steps: a quarter of a nat better than without its initialisation, and at least as good as before the change."""
    (_, loss), (_, plain) = (trained(changed(without), 300) for without in ("", "init_last_norm_"))
    _, before = trained((ROOT / "tests" / "small_gpt.py").read_text(encoding="utf-8"), 300)
    assert loss < plain - 0.15
    assert loss < before + 0.05


# --- stopping, going on and compiling, in processes of their own ------------------------------------------------------

LOOP = """
import os, sys
import torch
from model import GPT, GPTConfig

out, steps, options = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
torch.manual_seed(0)
data, first = torch.load("data.pt"), 0
model = GPT(GPTConfig(int(data.max()) + 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
if "resume" in options:
    checkpoint = torch.load(out)
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()})
    optimizer.load_state_dict(checkpoint["optimizer"])
    first = checkpoint["step"]
run = torch.compile(model) if "compile" in options else model
for step in range(first, steps):
    at = torch.randint(len(data) - 33, (8, 1), generator=torch.Generator().manual_seed(step)) + torch.arange(33)
    _, loss = run(data[at][:, :-1].contiguous(), data[at][:, 1:].contiguous())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item(), flush=True)
    if step % 5 == 4:
        state = {"model": run.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, out + ".new")
        os.replace(out + ".new", out)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The changed model beside a loop with nanoGPT's checkpoints."""
    folder = tmp_path_factory.mktemp("nanogpt")
    (folder / "model.py").write_text(changed(), encoding="utf-8")
    (folder / "loop.py").write_text(LOOP)
    torch.save(DATA, folder / "data.pt")
    return folder


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "loop.py", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(folder: Path, *arguments: object) -> dict[int, float]:
    """The losses by step of a program that ends well."""
    with start(folder, *arguments) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    return {int(step): float(loss) for step, loss in map(str.split, out.splitlines())}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(folder):
    whole = losses(folder, "whole.pt", 30)
    process = start(folder, "killed.pt", 1000)
    while not (folder / "killed.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    first = torch.load(folder / "killed.pt")["step"]
    rest = losses(folder, "killed.pt", max(30, first + 5), "resume")
    assert {step: rest[step] for step in rest if step < 30} == {step: whole[step] for step in whole if step >= first}
    if max(rest) == 29:
        states = (torch.load(folder / name)["model"] for name in ("whole.pt", "killed.pt"))
        mine, theirs = states
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_it_compiles_and_its_checkpoint_serves_without(folder):
    eager, compiled = losses(folder, "eager.pt", 10), losses(folder, "compiled.pt", 10, "compile")
    assert list(compiled) == list(range(10))
    for step, loss in eager.items():  # rounding grows from step to step
        assert compiled[step] == pytest.approx(loss, rel=1e-3), step
    assert losses(folder, "compiled.pt", 12, "resume").keys() == {10, 11}
    state = torch.load(folder / "compiled.pt")["model"]
    assert all(name.startswith("_orig_mod.") for name in state)
    model = model_of(changed())
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in state.items()})
    with torch.no_grad():
        logits = model(DATA[:32][None])[0]
    torch.testing.assert_close(logits.exp().sum(2), torch.ones(1, 1), rtol=0, atol=1e-5)
