"""A few kernels as compiled, in the fast suite; ``make emulate`` has all of them (tests/emulate).

In a process of its own: in this one the kernels may belong to Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "emulate"))
import emulation  # noqa: E402  from there

COMPILING = {**os.environ, "TRITON_INTERPRET": "0"}


def test_a_few_kernels():
    """Every kernel once, executed as compiled for sm_90; and that copies are fenced, for which no emulator is needed."""
    pytest.importorskip("triton")
    chosen = [
        "tests/emulate/test_small.py",
        "tests/emulate/test_fences.py",
        "-k",
        "small or missing or 90 and (split or bf16 and not transposed)",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=HERE.parent, env=COMPILING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    last = done.stdout.splitlines()[-1]
    assert " passed" in last, done.stdout[-3000:]
    if emulation.find() is None:
        pytest.skip(f"the emulator of compiled kernels is not there: see {emulation.VARIABLE} in CONTRIBUTING.md")
    assert " skipped" not in last, done.stdout[-3000:]


def test_an_absent_emulator_is_named(tmp_path, monkeypatch):
    """``make emulate`` ends with a message and a status; tests are skipped with the reason."""
    monkeypatch.setenv(emulation.VARIABLE, str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "tests/emulate/emulation.py"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{emulation.VARIABLE}={tmp_path}" in done.stdout
    assert emulation.missing() == done.stdout.strip()


def test_the_interpreter_is_told_apart(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1" in emulation.missing()
