"""The README's snippets are executed, and what it names exists."""

import importlib.util
import re
from pathlib import Path

import fresh
import pytest

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


DIFF = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]


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
    "examples/recommend/README.md",
    "examples/train_gpt/README.md",
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_images_commands_and_make_targets_exist(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", prose):
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
