"""The README's snippets are executed, and what it names exists."""

import importlib.util
import math
import re
import sys
import types
from pathlib import Path

import fresh
import pytest
import torch
import torch.nn.functional as F

from benchmarks import readme, runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


PRINTED = (
    r"\d+\.\d\d nats, \d+% right, entropy \d+\.\d\d\n",
    r"HarmonicLinear 8.0 \(4, 12\)\n",
    r"torch\.Size\(\[200, 200\]\) -?\d+\.\d+\n",
)


@pytest.mark.parametrize(("snippet", "printed"), list(zip(SNIPPETS, PRINTED, strict=True)))
def test_snippet_runs(snippet, printed):
    run = fresh.run(snippet)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(printed, run.stdout)


# --- the change to nanoGPT, applied to a model of its shape ----------------------------------------------------------

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
    assert briefly[1] < trained(changed(without="ln_f.weight"), 60)[1] - 0.5


def test_the_state_of_the_changed_model_holds_n_and_eps(briefly):
    state = briefly[0].state_dict()
    model_of(changed()).load_state_dict(state)
    with pytest.raises(RuntimeError, match="lm_head._extra_state"):
        model_of((ROOT / "tests" / "small_gpt.py").read_text(encoding="utf-8")).load_state_dict(state)
    other = model_of(changed().replace("ignore_index=-1", "n=3, ignore_index=-1"))
    with pytest.raises(RuntimeError, match="weights of lm_head were trained with n = 8 and eps = 0, and .* n = 3"):
        other.load_state_dict(state)


@pytest.mark.slow
def test_the_changed_model_trains_as_cross_entropy_does():
    """300 steps: half a nat better than without its initialisation, and at least as good as before the change."""
    (_, loss), (_, plain) = (trained(changed(without), 300) for without in ("", "ln_f.weight"))
    _, before = trained((ROOT / "tests" / "small_gpt.py").read_text(encoding="utf-8"), 300)
    assert loss < plain - 0.3
    assert loss < before + 0.05


def test_it_has_a_table_a_plot_and_no_placeholder():
    assert "@@" not in README.replace(DIFF, "")
    assert re.search(r"^\|-", README, re.MULTILINE)
    assert re.search(r"^!\[.+\]\(.+\.png\)", README, re.MULTILINE)


def test_its_figures_are_what_the_report_command_writes():
    """Between the markers stands, word for word, what ``python -m benchmarks report --readme RUN`` makes of the run."""
    (block,) = readme.BLOCK.finditer(README)
    run = runs.load(runs.RESULTS / f"{block[1]}.jsonl")
    assert block[0] == readme.block(run)
    tables = block[0].count("|---") and len(re.findall(r"^\|-", block[0], re.MULTILINE))
    assert block[0].count(readme.where(run)) == tables + 1 >= 2  # every table and the plot name the machine


DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").glob("*.md"))),
    "examples/loss_kernel/README.md",
    "examples/train_gpt/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_images_commands_and_make_targets_exist(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / name).exists(), name
    for name in re.findall(r"`((?:harmonic_triton|benchmarks|examples|tests|\.github)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python -m ((?:harmonic_triton|benchmarks|examples)[\w.]*)", text):
        assert importlib.util.find_spec(name), name
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", text, re.MULTILINE))
    assert targets or document != "README.md"
    for target in (a or b for a, b in targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_citation_is_of_this_version():
    import harmonic_triton as ht

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {ht.__version__}\n" in citation
    for title in ("Harmonic Loss Trains Interpretable AI Models", "The Loss Kernel"):
        assert title in citation and title in " ".join(README.split())


def test_the_public_names_are_documented():
    import harmonic_triton as ht

    for name in ht.__all__:
        assert getattr(ht, name).__doc__, name


def test_the_loss_kernel_command_is_the_makefiles_and_can_be_parsed():
    """Every option is known, the entry point takes its arguments, and the environment that runs it holds the extra."""
    import argparse
    import inspect
    import shlex

    from harmonic_triton.losskernel import cli, entry_point

    guide = (ROOT / "docs" / "loss-kernel.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\.venv/bin/python -m harmonic_triton (loss-kernel .*)$", guide, re.MULTILINE)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    options = parser.parse_args(shlex.split(command)[1:])
    assert options.quick
    given = dict(argument.split("=") for argument in options.entry_arg)
    pytest.importorskip("tokenizers")
    assert set(given) <= set(inspect.signature(entry_point.resolve(options.entry)).parameters)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = re.search(
        r"^kernel: \$\(VENV\)/analysis.*\n\t\$\(BIN\)/python -m harmonic_triton (.*) \$\(ARGS\)$",
        makefile,
        re.MULTILINE,
    )
    assert shlex.split(recipe[1]) == shlex.split(command)
    assert re.search(r"^\$\(VENV\)/analysis: .*\n\t\$\(PIP\) -e '\.\[examples,analysis\]'", makefile, re.MULTILINE)
    assert guide.index("pip install '.[analysis]'") < guide.index(command)
