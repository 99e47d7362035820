"""Tests of the compiled kernels, by ``make emulate``; elsewhere this directory holds no tests (see ``tests/test_emulated.py``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tools")]
os.environ["HARMONIC_TRITON_TILES"] = os.devnull + ".none"  # the stored tiles, not those that somebody measured here
import emulation  # noqa: E402  what lies beside this file

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "0" else ["test_*.py"]
if emulation.missing() is None:
    emulation.load()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = emulation.missing()
    for item in items:
        if reason is not None and HERE in item.path.parents and item.path.name != "test_fences.py":
            item.add_marker(pytest.mark.skip(reason))
