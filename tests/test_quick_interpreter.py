"""The quickened interpreter computes what Triton's own does."""

import os

import fresh
import pytest

PROGRAM = """
    import hashlib, sys, torch
    if sys.argv[1] == "quick":
        sys.path.insert(0, "tests")
        import quick_interpreter
        quick_interpreter.install()
    import harmonic_triton as ht
    digest, generator = hashlib.sha256(), torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 17, generator=generator).bfloat16().requires_grad_() for rows in (5, 70))
    for function, reduction in ((ht.linear_harmonic_loss, "none"), (ht.linear_cross_entropy, "mean")):
        loss = function(x, w, torch.arange(5), reduction=reduction, backend="triton", label_smoothing=0.1)
        (loss * torch.linspace(0.3, 1.2, 5)).sum().backward()
        for tensor in (loss.detach(), x.grad, w.grad):
            digest.update(tensor.float().numpy().tobytes())
    print(digest.hexdigest())
"""


def test_the_same_bits():
    """In processes of their own: the interpreter of this one is quickened."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    plain, quick = (fresh.run(PROGRAM, how, env=environment) for how in ("plain", "quick"))
    assert plain.returncode == quick.returncode == 0, plain.stderr + quick.stderr
    assert plain.stdout == quick.stdout != ""
