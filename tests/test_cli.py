"""The command line: doctor says what serves, verify prints errors beside bounds and fails when one is broken."""

import os
import subprocess
import sys

import pytest
import torch

from harmonic_triton.__main__ import main
from harmonic_triton.tools import verify

TINY = ["verify", "--shape", "6x200x30"]  # n = 14: the rounding of bf16 inputs leaves a loss of 1e-20 near there


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert "reference serves" in shown
    assert "backend='auto' takes 'torch' here" in shown or torch.cuda.is_available()


def test_doctor_gives_the_reason(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        main(["doctor"])
        assert "triton    does not serve: tensors are on 'cpu'" in capsys.readouterr().out


@pytest.mark.triton
def test_verify_passes_and_prints_bounds(capsys):
    assert main([*TINY, "--dtype", "fp32", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("lines within their bounds (error/bound).")
    for backend in ("reference", "torch", "triton"):
        for dtype in ("float32", "bfloat16"):
            for kind in ("harmonic", "entropy"):
                shown = [line for line in lines if line.split()[:2] == [kind, backend] and dtype in line]
                assert any("loss 1e-20" in line and float(line.split()[12]) < 3e-20 for line in shown)
            assert all("/" in line and "FAILED" not in line for line in shown)


@pytest.mark.parametrize("broken", ["loss", "dX", "dW", "dn"])
def test_verify_fails_when_a_backend_is_wrong(broken, capsys, monkeypatch):
    """A relative error of 2e-4 in one output, in the worst row only, is found."""
    from harmonic_triton.fused.pytorch import backend

    forward, backward = backend.forward, backend.backward

    def wrong_forward(*args):
        results = forward(*args)
        results.nll[1] *= 1 + 2e-4 * (broken == "loss")
        results.score_mean.mul_(1 + 2e-4 * (broken == "dn"))
        return results

    def wrong_backward(*args):
        dx, dw, db = backward(*args)
        dx[1] *= 1 + 2e-4 * (broken == "dX")
        dw[3] *= 1 + 2e-4 * (broken == "dW")
        return dx, dw, db

    monkeypatch.setattr(backend, "forward", wrong_forward)
    monkeypatch.setattr(backend, "backward", wrong_backward)
    assert main([*TINY, "--dtype", "fp32", "--backend", "torch"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_bounds_are_those_promised():
    for dtype, gradient in (("fp32", 5e-5), ("bf16", 8e-3), ("fp16", 8e-3)):
        assert verify.GRADIENT_BOUND[verify.DTYPES[dtype]] == gradient
    assert verify.LOSS_BOUND == 1e-5
    assert verify.Case("torch", "none", torch.float32, (1, 784, 3), None, "far").growth == 1
    assert verify.Case("torch", "none", torch.float32, (1, 784, 3), 56.0, "far").growth == 2


def test_a_shape_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--shape", "12x0x5"])
    assert stop.value.code == 2
    assert "must be positive" in capsys.readouterr().err


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "harmonic_triton", "--version"], capture_output=True, text=True,
                         env={**os.environ}, check=True)  # fmt: skip
    from harmonic_triton import __version__

    assert run.stdout.strip() == __version__
