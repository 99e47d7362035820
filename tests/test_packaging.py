"""What an installation needs: few imports, no Triton, a wheel and an sdist that hold what they should."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fresh
import pytest

ROOT = Path(__file__).parents[1]


def test_the_import_brings_nothing_but_torch_and_pythons_own():
    """Counted and not timed: no package of an extra, no Triton, no compiler of PyTorch's, and few modules of Python's library."""
    run = fresh.run("""
        import sys
        before = set(sys.modules)
        import harmonic_triton
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"harmonic_triton"}
        print(*sorted(new - sys.stdlib_module_names), *(n for n in ("torch._dynamo", "torch._inductor") if n in sys.modules))
        print(len(new))
    """)
    assert run.returncode == 0, run.stderr
    others, own = run.stdout.splitlines()
    assert set(others.split()) <= {"numpy", "typing_extensions"}  # which torch has imported as a rule
    assert int(own) <= 20


WITHOUT_TRITON = """
    import sys
    sys.modules["triton"] = None  # as where it is not installed
    import torch
    import harmonic_triton as ht
    from harmonic_triton.__main__ import main

    main(["doctor"])
    x, w, target = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True), torch.arange(5)
    for loss in (ht.linear_harmonic_loss, ht.linear_cross_entropy):
        loss(x, w, target).backward()
        loss(x, w, target, reduction="none").sum().backward()
        try:
            loss(x, w, target, backend="triton")
        except ValueError as error:
            print(error)
    ht.harmonic_topk(x, w, 2)
    kernel = ht.StreamingCovariance(3)
    traces = ht.LossTraces(3)
    for draw in torch.randn(4, 3):
        kernel.update(draw[None])
        traces.update(draw[None])
    assert kernel.compute().covariance.isfinite().all()
    print(sorted(name for name in sys.modules if name.startswith("triton") and sys.modules[name] is not None))
"""


def test_without_triton():
    """As on macOS and Windows: the torch backend serves, doctor and an error say why the other does not."""
    run = fresh.run(WITHOUT_TRITON)
    assert run.returncode == 0, run.stderr[-2000:]
    reason = "triton is not installed"
    assert re.search(rf"triton +does not serve: {reason}", run.stdout)
    assert "backend='auto' takes 'torch' here" in run.stdout
    assert len(re.findall(rf"^backend='triton' cannot serve this call: {reason}", run.stdout, re.MULTILINE)) == 2
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Built by setup.py's backend, of what git holds: no stray file of this checkout."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77 or not (ROOT / ".git").exists():
        pytest.skip("needs setuptools >= 77 and a checkout")
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "x", "-C", source], input=files, check=True)
    built = subprocess.run([sys.executable, "-c", (
        "import setuptools.build_meta as b; print(); print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    )], cwd=source, capture_output=True, text=True, check=False)  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    (sdist,), (wheel,) = source.glob("dist/*.tar.gz"), source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        (name,) = (name for name in inside if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    assert {path.parts[0] for path in map(Path, inside)} == {"harmonic_triton", Path(name).parts[0]}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "harmonic_triton").rglob("*.py")}
    assert modules | {"harmonic_triton/py.typed"} <= inside
    assert f"{Path(name).parts[0]}/licenses/LICENSE" in inside
    assert 'Requires-Dist: triton>=3.6; sys_platform == "linux"' in metadata
    assert "Requires-Python: >=3.10" in metadata and "License-Expression: MIT" in metadata
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {"tests/oracle.py", "docs/design.md", "Makefile", ".ci/matrix", "LICENSE", "README.md"} <= names
    assert not [name for name in names if "/__pycache__/" in name or name.startswith((".git/", "runs/"))]
    assert sdist.stat().st_size < 2**22 and wheel.stat().st_size < 2**20
