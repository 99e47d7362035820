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
import emulation

COMPILING = {**os.environ, "TRITON_INTERPRET": "0"}


def test_small_cases():
    """Every kernel of the package, compiled for sm_90 and executed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/emulate/test_small.py"]
    if emulation.find() is None:
        pytest.skip(f"the emulator of compiled kernels is not there ({emulation.VARIABLE})")
    run = subprocess.run(command, cwd=HERE.parent, env=COMPILING, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]


def test_an_absent_emulator_is_named(tmp_path):
    """``make emulate`` ends with a message and a status; tests are skipped with the reason."""
    environment = {**COMPILING, emulation.VARIABLE: str(tmp_path)}
    found = [sys.executable, "tests/emulate/emulation.py"]
    run = subprocess.run(found, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"{emulation.VARIABLE}={tmp_path}" in run.stdout
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/emulate/test_small.py"]
    run = subprocess.run(tests, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{emulation.VARIABLE}={tmp_path}" in run.stdout and "7 skipped" in run.stdout
