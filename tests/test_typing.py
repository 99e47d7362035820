"""What editors and type checkers see of the options."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import harmonic_triton as ht
from harmonic_triton.fused import options

CALLS = Path(__file__).with_name("typed_calls.py")


def test_the_type_checker_refuses_the_wrong_calls_and_no_others():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", "pyproject.toml", str(CALLS)]
    out = subprocess.run(command, cwd=CALLS.parent.parent, capture_output=True, text=True)
    assert out.returncode in (0, 1), out.stderr
    found = {int(line) for line in re.findall(rf"{CALLS.name}:(\d+): error", out.stdout)}
    wrong = {i for i, line in enumerate(CALLS.read_text().splitlines(), 1) if "# WRONG" in line}
    assert len(wrong) == 15
    assert found == wrong, out.stdout


def test_the_typed_options_are_those_that_a_call_takes():
    """The dictionaries that type checkers read name each option once more: same names, same types, nothing forgotten."""
    every = {
        field.name: kind
        for field, kind in zip(fields(options.Options), get_type_hints(options.Options).values(), strict=True)
    }
    typed = {"return_lse": bool}  # of no module: it decides the type of a call's result
    for kind in (options.ModuleOptions, options.HeadOptions, options.CrossEntropyOptions):
        hints = get_type_hints(kind)
        assert all(every[name] == hint for name, hint in hints.items())
        typed |= hints
    assert typed == every


@pytest.mark.parametrize(("function", "names"), [
    (ht.linear_harmonic_loss, options.HARMONIC), (ht.linear_cross_entropy, options.CROSS_ENTROPY),
])  # fmt: skip
def test_help_shows_every_option_with_its_default(function, names):
    shown = inspect.signature(function).parameters
    assert tuple(shown)[3:] == names
    defaults = {field.name: field.default for field in fields(options.Options)}
    assert all(shown[name].default == defaults[name] for name in names)
    assert all(f"{name}" in function.__doc__ for name in names)


@pytest.mark.parametrize(("call", "words"), [
    (lambda *a: ht.linear_harmonic_loss(*a, reducton="sum"), "linear_harmonic_loss has no option 'reducton'.*reduction"),
    (lambda *a: ht.linear_harmonic_loss(*a, z_loss=0.1), "has no option 'z_loss' .HarMax has no logits"),
    (lambda *a: ht.linear_harmonic_loss(*a, softcap=30.0), "has no option 'softcap' .HarMax has no logits to cap"),
    (lambda *a: ht.linear_harmonic_loss(*a, return_lse=True), "has no option 'return_lse' .a common factor"),
    (lambda *a: ht.linear_harmonic_loss(*a, bias=False), "has no option 'bias' .distances have none.*leave bias= out"),
    (lambda *a: ht.linear_cross_entropy(*a, n=3.0), "linear_cross_entropy has no option 'n'"),
    (lambda *a: ht.HarmonicHead(4, 5, bias=False), "HarmonicHead has no option 'bias' .distances have none.*leave bias= out"),
    (lambda *a: ht.LinearHarmonicLoss(smoothing=0.1), "LinearHarmonicLoss has no option 'smoothing'.*label_smoothing"),
])  # fmt: skip
def test_an_unknown_option_is_named_with_those_that_there_are(call, words):
    x = [None, None, None]
    with pytest.raises(TypeError, match=words):
        call(*x)
