"""Bad input gets a typed error before any work; the message names the argument, what it was and the mend."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import harmonic_triton as ht
from harmonic_triton import _ops
from harmonic_triton._dispatch import resolve, unsupported_reasons

X, W, TARGET = torch.randn(6, 12), torch.randn(9, 12), torch.tensor([0, 3, 4, 8, 1, 2])

CALLS = [
    ((None, W, TARGET), {}, TypeError, "input must be a torch.Tensor, got None"),
    ((X, [1.0], TARGET), {}, TypeError, "linear_weight must be a torch.Tensor"),
    ((X, W, [1, 2]), {}, TypeError, "target must be a torch.Tensor"),
    ((X.long(), W, TARGET), {}, TypeError, r"input must be bfloat16.*shape \(6, 12\), torch.int64.*cast"),
    ((X, W.to(torch.complex64), TARGET), {}, TypeError, "linear_weight must be bfloat16"),
    ((X, W.double(), TARGET), {}, TypeError, "input is torch.float32 and linear_weight torch.float64; cast one"),
    ((X, W[0], TARGET), {}, ValueError, r"linear_weight must be \(V, D\).*shape \(12,\)"),
    ((X, W[:0], TARGET), {}, ValueError, r"linear_weight must be \(V, D\) with V, D >= 1"),
    ((X[:, :5], W, TARGET), {}, ValueError, r"D = 12 as in linear_weight \(9, 12\).*shape \(6, 5\)"),
    ((X.double(), W, TARGET), {}, TypeError, "linear_weight torch.float32; cast one of them$"),
    ((X.to("meta"), W.to("meta"), TARGET.to("meta")), {}, ValueError, "input is on meta and holds no values"),
    ((X, W.to("meta"), TARGET), {}, ValueError, "linear_weight is on meta and holds no values; give it some"),
    ((X, W, TARGET.to("meta")), {}, ValueError, "target is on meta and holds no values"),
    ((X, W, TARGET[:5]), {}, ValueError, r"target must have the shape of input.*\(6,\).*shape \(5,\)"),
    ((X, W, TARGET.float()), {}, TypeError, "target must be int64.*float32"),
    ((X, W, TARGET + 4), {}, ValueError, r"target holds 12, outside 0 ... 8 \(linear_weight has 9 rows\)"),
    ((X, W, TARGET - 3), {}, ValueError, "target holds -3.*ignore_index=-100"),
    ((X[0], W, TARGET[0]), {"shift": True}, ValueError, "shift=True needs a sequence"),
    ((X[:0], W, TARGET[:0]), {"shift": True}, ValueError, r"shift=True needs a sequence.*T >= 1, got.*shape \(0,\)"),
    ((X, W, TARGET), {"n": 0.0}, ValueError, "n must be a finite harmonic exponent > 0, got 0"),
    ((X, W, TARGET), {"n": -2}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": math.inf}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": math.nan}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": torch.tensor(-1.0)}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": torch.ones(2)}, ValueError, r"n must be a number or a 0-d floating tensor.*shape \(2,\)"),
    ((X, W, TARGET), {"n": "28"}, TypeError, "n must be a number, got '28'"),
    ((X, W, TARGET), {"eps": -1e-4}, ValueError, "eps must be finite and between 0 and 4.2"),
    ((X, W, TARGET), {"eps": None}, TypeError, "eps must be a number"),
    ((X, W, TARGET), {"uniform_mix": -0.1}, ValueError, "uniform_mix must be finite and at least 0"),
    ((X, W, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be finite and between 0 and 1"),
    ((X, W, TARGET), {"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    ((X, W, TARGET), {"num_items": 0}, ValueError, "num_items must be finite and > 0, got 0"),
    ((X, W, TARGET), {"num_items": math.nan}, ValueError, "num_items must be finite and > 0, got nan"),
    ((X, W, TARGET), {"num_items": math.inf}, ValueError, "num_items must be finite and > 0, got inf"),
    ((X, W, TARGET), {"num_items": "6"}, TypeError, "num_items must be a number, got '6'"),
    ((X, W, TARGET), {"num_items": 3, "reduction": "none"}, ValueError, "num_items divides the summed loss"),
    ((X, W, TARGET), {"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a 0-d tensor"),
    ((X, W, TARGET), {"num_items": torch.tensor([4])}, ValueError, r"a number or a 0-d tensor.*shape \(1,\)"),
    ((X, W, TARGET), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    ((X, W, TARGET), {"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ((X, W, TARGET), {"deterministic": "yes"}, TypeError, "deterministic must be True, False or None, got 'yes'"),
    ((X, W, TARGET), {"class_weight": torch.ones(8)}, ValueError, r"class_weight must be floating and of shape \(9,\)"),
    ((X, W, TARGET), {"class_weight": torch.ones(9, requires_grad=True)}, ValueError, "class_weight is a constant"),
    ((X, W, TARGET), {"memory_budget": -5}, ValueError, "memory_budget must be a positive number of bytes"),
    ((X, W, TARGET), {"memory_budget": 1e6}, ValueError, "memory_budget must be a positive number of bytes"),
    ((X, W, TARGET), {"process_group": object()}, ValueError, "process_group: vocabulary-parallel"),
    ((X, W, TARGET), {"backend": "cuda"}, ValueError, "backend is 'cuda'; it must be one of 'auto'"),
    ((X.double(), W.double(), TARGET), {"backend": "triton"}, ValueError, "cannot serve this call: .*float64 is computed"),
    ((X, W, TARGET), {"backend": "triton", "uniform_mix": 0.1, "label_smoothing": 0.1}, ValueError, "cannot serve.*together"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "text"), CALLS)
def test_linear_harmonic_loss_refuses(tensors, options, error, text, monkeypatch):
    for name in ("rows_forward", "reduced_forward"):
        monkeypatch.setattr(_ops.backend_module("torch"), name, lambda *_: pytest.fail("work began"))
    with pytest.raises(error, match=text):
        ht.linear_harmonic_loss(*tensors, **options)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_never_reads_out_of_bounds(backend, reduction):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("a device-side assert ends a process's use of the GPU: the next test")
    for bad in (9, -1, 2**40, -101):
        target = TARGET.clone()
        target[2] = bad
        with pytest.raises(ValueError, match=f"target holds {bad}"):
            ht.linear_harmonic_loss(X.clone().requires_grad_(), W, target, reduction=reduction, backend=backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_stops_a_process_on_a_gpu(reduction):
    program = f"""if True:
        import torch, harmonic_triton as ht
        x, w = (torch.randn(k, 12, device="cuda", requires_grad=True) for k in (6, 9))
        target = torch.tensor([0, 3, 9, 8, 1, 2], device="cuda")
        print(ht.linear_harmonic_loss(x, w, target, reduction={reduction!r}, backend="triton").sum().item())"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0 and not run.stdout
    assert "assert" in run.stderr


def test_a_dtensor_among_tensors_is_named():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="linear_weight: DTensor is not supported.*to_local"):
        ht.linear_harmonic_loss(X, W.as_subclass(DTensor), TARGET)


def test_other_functions_refuse_too():
    with pytest.raises(ValueError, match="D = 12"):
        ht.harmonic_logits(X[:, :4], W)
    with pytest.raises(ValueError, match="k must be between 1 and V = 9"):
        ht.harmonic_topk(X, W, 10)
    with pytest.raises(TypeError, match="k must be an int"):
        ht.harmonic_topk(X, W, 2.0)
    for bad, text in ((X[0, 0], r"input must be \(..., D\)"), (X[:, :4], "D = 12")):
        with pytest.raises(ValueError, match=text):
            ht.harmonic_topk(bad, W, 2)
    with pytest.raises(ValueError, match=r"linear_weight must be \(V, D\)"):
        ht.harmonic_topk(X, W[0], 2)
    with pytest.raises(ValueError, match="input is on meta"):
        ht.harmonic_logits(X.to("meta"), W.to("meta"))
    with pytest.raises(TypeError, match="n must be a number"):
        ht.log_harmax(X.abs(), None)
    with pytest.raises(TypeError, match="distances must be floating"):
        ht.harmax(TARGET, 2.0)


def test_only_auto_falls_back(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve("auto", cpu, torch.float32) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert unsupported_reasons("torch", cpu) == []
    (reason,) = unsupported_reasons("triton", cpu)
    assert "Triton kernels need a GPU" in reason
    with pytest.raises(ValueError, match="need a GPU.*backend='auto' falls back"):
        ht.linear_harmonic_loss(X, W, TARGET, backend="triton")


def test_int32_targets_serve():
    assert torch.equal(ht.linear_harmonic_loss(X, W, TARGET.int()), ht.linear_harmonic_loss(X, W, TARGET))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_numpy_scalars_are_numbers(backend):
    numbers = {"n": 4.0, "eps": 0.25, "uniform_mix": 0.5, "label_smoothing": 0.125, "num_items": 7, "ignore_index": 3}
    wrapped = {name: (np.int64 if isinstance(value, int) else np.float32)(value) for name, value in numbers.items()}
    for reduction in ("sum", "mean"):
        x = X.clone().requires_grad_()
        plain, other = (
            ht.linear_harmonic_loss(x, W, TARGET, reduction=reduction, backend=backend, **options)
            for options in (numbers, {**wrapped, "memory_budget": np.int64(2**20)})
        )
        assert torch.equal(plain, other)
    assert torch.equal(ht.harmonic_topk(X, W, np.int64(3), n=np.float64(2))[1], ht.harmonic_topk(X, W, 3, n=2)[1])
    with pytest.raises(TypeError, match="eps must be a number"):
        ht.linear_harmonic_loss(X, W, TARGET, eps=np.bool_(True))


def test_mixed_dtypes_inside_autocast_are_told_to_cast():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="cast one of them$"):
        ht.linear_harmonic_loss(X.double(), W, TARGET)


@pytest.mark.parametrize("bad", [-3.0, 0.0, math.inf, math.nan])
def test_the_value_of_a_tensor_exponent_is_checked(bad):
    n = torch.tensor(bad)
    calls = (
        lambda: ht.harmonic_logits(X, W, n=n),
        lambda: ht.harmonic_topk(X, W, 2, n=n),
        lambda: ht.log_harmax(X.abs(), n),
        lambda: ht.harmax(X.abs(), n),
    )
    for call in calls:
        with pytest.raises(ValueError, match="n must be a finite harmonic exponent > 0, got"):
            call()
