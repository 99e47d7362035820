"""What the build of the documentation needs beside mkdocs.yml: the repository's other pages, docstrings, no network.

Pages link to files of the repository as its readers see them (``../CONTRIBUTING.md``). Those that ``BESIDE`` names become
part of the site under their path in the repository, and links between the two are rewritten.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "benchmarks/results/*",
    "examples/*/README.md",
)
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"' >]*", re.IGNORECASE)
SECTION = re.compile(r"(Args|Returns|Raises|Returns, Raises|Example)::?")
ENTRY = re.compile(r"([\w*.]+(?:,\s+[\w*.]+)*):\s+(.*)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's pages, and the pictures and data that they show."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            uri = "readme.md" if uri == "README.md" else uri  # under its own name it would be the front page
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to the repository and back, as the site has them."""
    uri = page.file.src_uri
    if (ROOT / "docs" / uri).exists():
        return markdown.replace("](../README.md", "](readme.md").replace("](../", "](")
    up = "../" * uri.count("/")
    return markdown.replace(f"]({up}docs/", f"]({up}")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load anything from a network."""
    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} asks the network: {found[0]}")
    return output


class Docstrings(Extension):
    """The package's docstrings as Markdown: roles as code, ``Args``, ``Returns`` and ``Raises`` as headings and lists."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring in the package's style, as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", docstring)
    spans = re.split(r"(`[^`]+`)", text)  # outside of code w* is no emphasis
    text = "".join(re.sub(r"(?<=w)\*", r"\\*", span) if i % 2 == 0 else span for i, span in enumerate(spans))
    parts: list[str] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if SECTION.fullmatch(line) is None:
            parts.append(re.sub(r"::$", ":", line))
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        parts += ["", f"**{line.rstrip(':')}**", "", _section(line, textwrap.dedent("\n".join(body)).strip("\n")), ""]
    return "\n".join(parts)


def _section(heading: str, body: str) -> str:
    if heading.startswith("Example"):
        return f"```python\n{body}\n```"
    entries = re.split(r"\n(?=\S)", body)
    if heading not in ("Args:", "Raises:") or not all(ENTRY.fullmatch(entry) for entry in entries[:1]):
        return body
    found = []
    for entry in entries:
        parsed = ENTRY.fullmatch(entry)
        if parsed is None:
            found.append(f"- {' '.join(entry.split())}")
            continue
        names = ", ".join(f"`{name}`" for name in re.split(r",\s+", parsed[1]))
        found.append(f"- {names}: {' '.join(parsed[2].split())}")
    return "\n".join(found)
