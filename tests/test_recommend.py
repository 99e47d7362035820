"""The runs behind recommend: what the documentation shows is what they gave, and a killed search goes on."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from examples.recommend import __main__ as command
from examples.recommend import nanogpt, report, runs, waves

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples" / "recommend" / "results.jsonl"
RECORDS = report.load(RESULTS)


def test_every_run_of_the_plan_has_been_made():
    planned = {run for wave in waves.WAVES.values() for run in wave}
    assert command.known(RESULTS) == planned
    assert len(RECORDS) == len(planned)


@pytest.mark.parametrize("title", report.tables(RECORDS))
def test_the_documentation_has_their_tables(title):
    assert report.tables(RECORDS)[title] in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_settings_reported_are_those_recommended():
    """On seeds that the search has not seen."""
    import harmonic_triton as ht

    for record in RECORDS:
        if record["seed"] in waves.FRESH and record["loss"] == "harmonic":
            settings = ht.recommend(record["width"], runs.BPE_SIZE if record["model"] == "llama" else waves.CHARACTERS)
            assert (record["n"], record["lr"], record["ratio"]) == (settings.n, settings.lr, 1.0)
    assert waves.TUNING not in waves.FRESH


def test_a_line_that_was_cut_short_is_trained_again(tmp_path):
    run = runs.Run("gpt", "harmonic", 1e-3, 1, 28.0, 1.0)
    line = json.dumps({**asdict(run), "val": [[0, 4.0]]})
    path = tmp_path / "results.jsonl"
    assert command.known(path) == set()
    path.write_text(f"{line}\n{line[:40]}")
    assert command.known(path) == {run}
    assert path.read_text() == f"{line}\n"


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(RECORDS, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1e4


def test_the_change_to_nanogpt_is_the_readmes():
    assert nanogpt.change().startswith("--- a/model.py\n+++ b/model.py\n@@")
    assert nanogpt.change().endswith("\n")
