"""The one report writer: title, machine, command and warnings of a run, then what its suite makes of the records."""

from collections.abc import Sequence

from benchmarks.runs import Record, Run, machine_line


def text(run: Run, sections: Sequence[str]) -> str:
    """The whole run as Markdown; ``sections`` come from its suite."""
    made_by = f"`{run.header['command']}`" if run.header["command"] else None
    parts = [f"# {run.name}", machine_line(run.header), made_by, _quiet(run.header, run.records), *sections]
    return "\n\n".join(filter(None, parts)) + "\n"


def verdict(says: str, found: float, limit: float, at_least: bool = False) -> str:
    """PASS or FAIL of one target that the project set itself."""
    good, sign = (found >= limit, ">=") if at_least else (found <= limit, "<=")
    return f"{'PASS' if good else 'FAIL'}  {says}: {found:.3f} (wanted {sign} {limit:.4g})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads in a terminal and renders as markdown."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1 + (i == 0)) + ("" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def _quiet(header: Record, records: Sequence[Record]) -> str | None:
    """A warning where something else was running during the timing, or may have been."""
    others = [record["other_work_cores"] for record in records if record.get("other_work_cores") is not None]
    load, cores = header["load_before"], header["cores"]
    again = "Measure again before quoting a time."
    if others and max(others) > 0.05 * cores:
        busy = f"other processes kept up to {max(others):.2f} of {cores} cores busy during the timing"
        return f"The machine was not quiet: {busy}. {again}"
    if not others and load is not None and load > 0.25 * cores:
        return f"Other processes were not watched, and the load before the run was {load} on {cores} cores. {again}"
    return None
