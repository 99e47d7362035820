"""Every Python block of docs/ is executed, every command of a shell block exists with its options, every page is in the menu.

The blocks of a page are one program, in the order of the page, in a folder of its own. A ```` ```text ```` block that follows one
holds what that block prints, word for word. A block that cannot run stands behind ``<!-- not run: REASON -->``.
"""

import ast
import functools
import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import fresh
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("**/*.md"))
DOCUMENTS = (
    "README.md",
    *PAGES,
    "CONTRIBUTING.md",
    *(f"examples/{name}/README.md" for name in ("loss_kernel", "recommend", "train_gpt")),
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: *(.*?) *-->\s*\Z", re.DOTALL)
MARK = "\x1d"  # printed between the blocks of a page
SPEAKS_FOR_ITSELF = ("cd", "git", "source")


class Block(NamedTuple):
    language: str
    text: str
    reason: str | None  # why it is not run
    line: int


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        mark = NOT_RUN.search(text, 0, fence.start())
        body = "".join(line.removeprefix(fence[1]) for line in fence[3].splitlines(keepends=True))
        found.append(Block(fence[2], body, mark and mark[1], text.count("\n", 0, fence.start()) + 2))
    return found


def program(document: str) -> tuple[str, list[str | None]]:
    """The blocks of a page that run, as one program, and what each prints where the page says so."""
    everything, lines, printed = blocks(document), [], []
    for i, block in enumerate(everything):
        if block.language != "python" or block.reason is not None:
            continue
        follows = everything[i + 1] if i + 1 < len(everything) else None
        printed.append(follows.text if follows is not None and follows.language == "text" else None)
        # compiled apart, so that a traceback names the line of the page
        source = "\n" * (block.line - 1) + block.text
        lines.append(f"exec(compile({source!r}, {document!r}, 'exec'), globals())\nprint({MARK!r})\n")
    return "".join(lines), printed


@pytest.mark.parametrize("page", [page for page in PAGES if program(page)[1]])
def test_the_blocks_of_a_page_run(page, tmp_path):
    if "transformers" in (ROOT / page).read_text(encoding="utf-8"):
        pytest.importorskip("transformers")
    source, printed = program(page)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = fresh.Started(source, cwd=tmp_path, env=environment).wait(timeout=300)
    assert run.returncode == 0, run.stderr
    said = run.stdout.split(MARK + "\n")
    assert len(said) == len(printed) + 1
    for wanted, output in zip(printed, said, strict=False):
        assert wanted is None or output == wanted


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_does_not_run_says_why_and_can_be_parsed(document):
    for block in blocks(document):
        if block.language == "python":
            ast.parse(block.text)
        assert block.reason is None or len(block.reason) > 10, f"{document}:{block.line}: say why it is not run"
        assert block.language in ("python", "bash", "text", "diff", "bibtex", "yaml", ""), f"{document}:{block.line}"


def test_the_test_sees_what_it_should(tmp_path):
    """A block that fails, a reason, a print, an indented block, an option that there is not."""
    page = tmp_path / "page.md"
    parts = (
        "<!-- not run: it is wrong -->\n```python\n1 +\n```\n",
        "- a\n\n    ```python\n    x = 1\n    ```\n",
        "```python\nprint(x)\n```\n```text\n1\n```\n",
    )
    page.write_text("".join(parts))
    first, second, third, fourth = blocks(str(page))
    assert (first.reason, first.text, first.line) == ("it is wrong", "1 +\n", 3)
    assert (second.reason, second.text, third.text, fourth.language) == (None, "x = 1\n", "print(x)\n", "text")
    source, printed = program(str(page))
    assert printed == [None, "1\n"]
    done = fresh.run(source)
    assert done.stdout == f"{MARK}\n1\n{MARK}\n"
    with pytest.raises(AssertionError, match="--quickly"):
        check("python -m harmonic_triton loss-kernel x:y --quickly")
    for wrong in ("make cake", "python -m harmonic_triton sing", "pip install '.[cake]'", "frobnicate"):
        with pytest.raises(AssertionError):
            check(wrong)


# --- shell blocks --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The lines of a shell block without comments, continued ones joined, ``&&`` apart."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [command for line in stripped for command in line.split(" && ") if command]


@functools.cache
def usage(module: str, *words: str) -> str:
    run = fresh.run(fresh.module(module), *words, "--help")
    assert run.returncode == 0, f"python -m {module} {' '.join(words)} --help: {run.stderr}"
    return run.stdout


def extras() -> set[str]:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return set(re.findall(r'^    "([\w-]+)": \[', text, re.MULTILINE))


def check(command: str) -> None:
    """Raise an AssertionError for a command, a module, an option, a target or an extra that there is not."""
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):  # variables of the environment
        words.pop(0)
    if not words or words[0] in SPEAKS_FOR_ITSELF:
        return
    tool = Path(words[0]).name
    if tool == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
    elif tool == "pip" or words[1:3] == ["-m", "pip"]:
        for named in re.findall(r"\.\[([\w,-]+)\]", command):
            assert set(named.split(",")) <= extras(), command
    elif tool == "harmonic-triton":
        check(f"python -m harmonic_triton {shlex.join(words[1:])}")
    elif tool.startswith("python") or tool == "torchrun":
        assert "-m" in words, command
        module, *rest = words[words.index("-m") + 1 :]
        assert importlib.util.find_spec(module), command
        if module.partition(".")[0] not in ("harmonic_triton", "benchmarks", "examples"):
            return
        chosen = rest[: bool(rest) and not rest[0].startswith("-")]
        if "--suite" in rest:
            chosen += rest[rest.index("--suite") :][:2]
        shown = usage(module, *chosen)
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert re.search(rf"{option}(?![\w-])", shown), f"{command}: {option}"
    else:
        raise AssertionError(f"{command}: this test does not know how to check it")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_shell_blocks_exist_with_their_options(document):
    for block in blocks(document):
        if block.language == "bash" and block.reason is None:
            for command in commands(block.text):
                check(command)


# --- the site ------------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"- (?:[^:\n]+: )?([\w/.-]+\.md)$", menu, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {page.removeprefix("docs/") for page in PAGES} <= set(named)
    for name in named:
        assert (ROOT / "docs" / name).exists() or (ROOT / name).exists(), name


def test_every_public_name_is_in_the_reference():
    import harmonic_triton as ht

    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "api-loss-kernel.md"))
    shown = set(re.findall(r"^::: harmonic_triton\.(\w+)$", text, re.MULTILINE))
    assert set(ht.__all__) <= shown


def test_the_build_is_strict():
    """mkdocs counts the warnings that it prints: with --quiet a broken link passes."""
    (recipe,) = re.findall(r"^docs: .*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert "mkdocs build --strict" in recipe and not {"-q", "--quiet"} & set(recipe.partition("#")[0].split())
    assert "docs" in re.search(r"^make lint (.*) VENV", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[1].split()


def test_the_tools_of_the_build_are_an_extra_with_versions():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for package in ("mkdocs-material", "mkdocstrings"):
        assert re.search(rf'^    "docs": \[.*"{package}', setup, re.MULTILINE)
        assert re.search(rf"^{package}==", constraints, re.MULTILINE)
