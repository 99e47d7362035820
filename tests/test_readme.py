"""The README's snippets are executed, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme, runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


PRINTED = (r"\d+\.\d\d nats, \d+% right, entropy \d+\.\d\d\n", r"torch\.Size\(\[200, 200\]\) -?\d+\.\d+\n")


@pytest.mark.parametrize(("snippet", "printed"), zip(SNIPPETS, PRINTED, strict=True))
def test_snippet_runs(snippet, printed):
    run = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(printed, run.stdout)


def test_the_two_lines_of_the_diff_run():
    """The lines that the README adds to nanoGPT, on a model that has what nanoGPT's has."""
    import torch

    import harmonic_triton as ht

    added = [line[2:] for line in re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines() if line[0] == "+"]

    class Model:
        lm_head = torch.nn.Linear(32, 50, bias=False)

    scope = {"self": Model(), "x": torch.randn(2, 6, 32), "targets": torch.randint(50, (2, 6)), "ht": ht}
    scope["targets"][0, :3] = -1
    exec("\n".join(added), scope)
    assert scope["loss"].item() > 0
    assert scope["logits"].shape == (2, 1, 50)


def test_it_has_a_table_a_plot_and_no_placeholder():
    assert "@@" not in README
    assert re.search(r"^\|-", README, re.MULTILINE)
    assert re.search(r"^!\[.+\]\(.+\.png\)", README, re.MULTILINE)


def test_its_figures_are_what_the_report_command_writes():
    """Between the markers stands, word for word, what ``python -m benchmarks report --readme RUN`` makes of the run."""
    (block,) = readme.BLOCK.finditer(README)
    run = runs.load(runs.RESULTS / f"{block[1]}.jsonl")
    assert block[0] == readme.block(run)
    tables = block[0].count("|---") and len(re.findall(r"^\|-", block[0], re.MULTILINE))
    assert block[0].count(readme.where(run)) == tables + 1 >= 2  # every table and the plot name the machine


def test_files_images_and_make_targets_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:harmonic_triton|benchmarks|examples)/[\w/.]*)`", README
    ):
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))
    assert targets
    for target in (a or b for a, b in targets):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_public_names_are_documented():
    import harmonic_triton as ht

    for name in ht.__all__:
        assert getattr(ht, name).__doc__, name


def test_the_loss_kernel_command_is_the_makefiles_and_can_be_parsed():
    """Every option is known, the entry point takes its arguments, and the environment that runs it holds the extra."""
    import argparse
    import inspect
    import shlex

    from harmonic_triton import kernel_cli

    (command,) = re.findall(r"^\.venv/bin/python -m harmonic_triton (loss-kernel .*)$", README, re.MULTILINE)
    parser = argparse.ArgumentParser()
    kernel_cli.add_arguments(parser)
    options = parser.parse_args(shlex.split(command)[1:])
    assert options.quick
    given = dict(argument.split("=") for argument in options.entry_arg)
    pytest.importorskip("tokenizers")
    assert set(given) <= set(inspect.signature(kernel_cli.resolve(options.entry)).parameters)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    recipe = re.search(
        r"^kernel: \$\(VENV\)/analysis.*\n\t\$\(BIN\)/python -m harmonic_triton (.*) \$\(ARGS\)$",
        makefile,
        re.MULTILINE,
    )
    assert shlex.split(recipe[1]) == shlex.split(command)
    assert re.search(r"^\$\(VENV\)/analysis: .*\n\t\$\(PIP\) -e '\.\[examples,analysis\]'", makefile, re.MULTILINE)
    assert README.index("pip install '.[analysis]'") < README.index(command)
