"""What the tools offer other programs: peak memory where it can be measured, and what is said where it cannot."""

import os
from pathlib import Path

import pytest
import torch

from harmonic_triton import tools
from harmonic_triton.tools import memory

SIZE = 64 << 20


def test_a_peak_that_cannot_be_set_back_is_said_to_be(monkeypatch, tmp_path):
    """As where there is no /proc: a figure beside its name for a report, an error for a benchmark."""
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    peak = memory.Peak()
    assert peak.method == "the largest resident set so far"
    assert "clear_refs cannot be written" in peak.reason
    assert peak.beyond() < memory.so_far()  # the level of before is not in it
    with pytest.raises(memory.NoMemoryFigureError, match="clear_refs cannot be written"):
        memory.peak_beyond(lambda: None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the same figure from two sources: Linux's")
def test_the_largest_so_far_is_what_the_system_counts(monkeypatch):
    held = torch.ones(SIZE // 4)
    by_status = memory.so_far()
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    by_usage = memory.so_far()
    assert by_status >= held.nbytes
    assert by_usage >= 0.9 * by_status  # which also counts what was before this program


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "results.json"
    tools.write_text(path, "old")
    with pytest.raises(OSError, match="no space"), tools.replacing(path) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise OSError("no space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]
