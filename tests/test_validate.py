"""Bad input gets a typed error before any work; the message names the argument, what it was and the mend."""

import importlib.util
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import harmonic_triton as ht
from harmonic_triton._common.dispatch import resolve, unsupported_reasons
from harmonic_triton.fused import ops as _ops
from harmonic_triton.integrations.classifiers import replace_classifier
from harmonic_triton.losskernel.per_sample_losses import classification_loss, per_sample_cross_entropy
from harmonic_triton.losskernel.sampling.sampler import Sampler

X, W, TARGET = torch.randn(6, 12), torch.randn(9, 12), torch.tensor([0, 3, 4, 8, 1, 2])
NESTED = torch.nested.nested_tensor([[1.0, 2.0], [3.0]], layout=torch.jagged)

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
    ((X, W, TARGET[:5]), {}, ValueError, r"target must have the shape of input.*\(6,\).*shape \(5,\).*one class for each token$"),
    ((X, W, TARGET.float()), {}, TypeError, r"target must be int64.*float32.*use target.long\(\)$"),
    ((X, W, TARGET.to(torch.uint8)), {}, TypeError, r"target must be int64.*uint8.*use target.long\(\)$"),
    ((X, W, torch.eye(9)[TARGET]), {}, TypeError, r"target must be int64.*target.argmax\(-1\): probabilities are not served$"),
    ((X, W, torch.eye(9).long()[TARGET]), {}, ValueError, r"target must have the shape.*one-hot rows pass target.argmax\(-1\)$"),
    ((X, W, TARGET[:, None]), {}, ValueError, r"target must have the shape.*use target.reshape\(\(6,\)\)$"),
    ((X.view(2, 3, 12), W, TARGET), {}, ValueError, r"target must have the shape.*use target.reshape\(\(2, 3\)\)$"),
    ((X.view(2, 3, 12), W, TARGET.view(2, 3)[:, 1:]), {}, ValueError, "target must have the shape.*all tokens.*shift=True$"),
    ((X, W.t(), TARGET), {}, ValueError, r"D = 9.*\(6, 12\).*if linear_weight is \(D, V\), pass linear_weight.t\(\)$"),
    ((W, X, TARGET), {}, ValueError, "target must have the shape.*are input and linear_weight swapped.*order is input, lin"),
    ((W, X.view(2, 3, 12), TARGET.view(2, 3)), {}, ValueError, "linear_weight must be.*are input and linear_weight swapped"),
    ((X, TARGET, W), {}, TypeError, "linear_weight must be bfloat16.*int64.*class indices go into target"),
    ((X, W, TARGET.where(TARGET > 1, -1)), {}, ValueError, "target holds -1, outside.*pass ignore_index=-1 .it is -100 now"),
    ((X, W, TARGET.where(TARGET > 1, -100)), {"ignore_index": -1}, ValueError, "holds -100.*pass ignore_index=-100 .it is -1 now"),
    ((X, W, TARGET + 4), {}, ValueError, r"target holds 12, outside 0 ... 8 \(linear_weight has 9 rows\)"),
    ((X, W, TARGET - 3), {}, ValueError, "target holds -3.*ignore_index=-100"),
    ((X[0], W, TARGET[0]), {"shift": True}, ValueError, "shift=1 needs a sequence"),
    ((X[:0], W, TARGET[:0]), {"shift": True}, ValueError, r"shift=1 needs a sequence.*T >= shift, got.*shape \(0,\)"),
    ((X, W, TARGET), {"shift": 7}, ValueError, r"shift=7 needs a sequence.*T >= shift, got.*shape \(6,\)"),
    ((X, W, TARGET), {"shift": 2**70}, ValueError, "shift must be below 2.63"),
    ((X, W, TARGET), {"shift": -1}, ValueError, "shift must be at least 0, got -1"),
    *(((X, W, TARGET), {"shift": shift}, TypeError, f"shift must be True, False or a number of tokens, got {shift!r}")
      for shift in ("no", 0.5, 1.0, None)),
    ((X, W, TARGET), {"shift": torch.tensor(1)}, TypeError, "shift must be True, False or .* got Tensor of shape"),
    *(((X, W, TARGET), {"return_stats": value}, TypeError, f"return_stats must be True or False, got {value!r}")
      for value in ("no", 0, 1, None)),
    ((X, W, TARGET), {"n": 0.0}, ValueError, "n must be a finite harmonic exponent > 0, got 0.0; the paper.*sqrt.D"),
    ((X, W, TARGET), {"n": -2}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": math.inf}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": math.nan}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": torch.tensor(-1.0)}, ValueError, "n must be a finite"),
    ((X, W, TARGET), {"n": torch.ones(2)}, ValueError, r"n must be a number or a floating tensor of shape.*shape \(2,\)"),
    ((X, W, TARGET), {"n": torch.ones(1, 1)}, ValueError, r"n must be .* of shape \(\) or \(1,\), got .*shape \(1, 1\)"),
    ((X, W, TARGET), {"n": torch.tensor(2)}, ValueError, r"n must be a number or a floating tensor.*int64.*use n.float\(\)$"),
    ((X, W, TARGET), {"n": torch.tensor(2.0, device="meta")}, ValueError, "n is on meta and holds no values"),
    ((X, W, TARGET), {"n": torch.ones(1).to_sparse()}, TypeError, "n must be dense.*n.to_dense()"),
    *(((X, W, TARGET), {"n": n}, ValueError, f"n must be a number that fp32 holds.*got {text}")
      for n, text in ((1e300, "1e.300"), (1e-60, "1e-60"), (10**400, "int of 1329 bits"))),
    ((X, W, TARGET), {"n": "28"}, TypeError, "n must be a number, got '28'"),
    ((X, W, TARGET), {"eps": -1e-4}, ValueError, "eps must be finite and between 0 and 4.2"),
    ((X, W, TARGET), {"eps": None}, TypeError, "eps must be a number"),
    ((X, W, TARGET), {"uniform_mix": -0.1}, ValueError, "uniform_mix must be finite and between 0 and 4.2"),
    ((X, W, TARGET), {"uniform_mix": 1e300}, ValueError, "uniform_mix must be finite and between 0.*got 1e.300"),
    ((X, W, TARGET), {"uniform_mix": 10**400}, ValueError, "uniform_mix must be finite.*got int of 1329 bits"),
    ((X, W, TARGET), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be finite and between 0 and 1"),
    ((X, W, TARGET), {"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    ((X, W, TARGET), {"num_items": 0}, ValueError, "num_items must be finite and > 0 .*got 0"),
    ((X, W, TARGET), {"num_items": math.nan}, ValueError, "num_items must be finite and > 0 .*got nan"),
    ((X, W, TARGET), {"num_items": math.inf}, ValueError, "num_items must be finite and > 0 .*got inf"),
    *(((X, W, TARGET), {"num_items": torch.tensor(value)}, ValueError, f"num_items must be finite and > 0 .*got {value}")
      for value in (0, -2, 0.0, math.nan, math.inf)),
    *(((X, W, TARGET), {"num_items": items}, ValueError, "num_items must be a number that fp32 holds")
      for items in (1e-60, 1e300, 10**400)),
    *(((X, W, TARGET), {"num_items": torch.tensor(items)}, ValueError, "num_items must be a number or a 0-d tensor")
      for items in (True, 3j)),
    ((X, W, TARGET), {"num_items": torch.tensor(3, device="meta")}, ValueError, "num_items is on meta"),
    ((X, W, TARGET), {"num_items": "6"}, TypeError, "num_items must be a number, got '6'"),
    ((X, W, TARGET), {"num_items": 3, "reduction": "none"}, ValueError, "num_items divides the summed loss"),
    ((X, W, TARGET), {"num_items": torch.ones(2)}, ValueError, "num_items must be a number or a 0-d tensor"),
    ((X, W, TARGET), {"num_items": torch.tensor([4])}, ValueError, r"a number or a 0-d tensor.*shape \(1,\)"),
    ((X, W, TARGET), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
    *(((X, W, TARGET), {"ignore_index": index}, ValueError, "ignore_index must be") for index in (2**63, -(2**63) - 1)),
    ((X, W, TARGET), {"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ((X, W, TARGET), {"deterministic": True}, TypeError, "has no option 'deterministic' .*bitwise the same"),
    ((X, W, TARGET), {"backend": "cuda"}, ValueError, "backend is 'cuda'; it must be one of 'auto', 'triton', 'torch'"),
    ((X, W, TARGET), {"class_weight": torch.ones(9).to_sparse()}, TypeError, "class_weight must be dense"),
    ((X, W, TARGET), {"class_weight": torch.ones(8)}, ValueError, r"class_weight must be floating and of shape \(9,\)"),
    ((X, W, TARGET), {"class_weight": torch.ones(9, requires_grad=True)}, ValueError, "class_weight is a constant"),
    ((X, W, TARGET), {"memory_budget": -5}, ValueError, "memory_budget must be a positive number of bytes"),
    ((X, W, TARGET), {"memory_budget": 1e6}, ValueError, "memory_budget must be a positive number of bytes"),
    ((X, W, TARGET), {"memory_budget": 2**63}, ValueError, "memory_budget must be a positive number of bytes below 2.63"),
    ((X, W, TARGET), {"memory_budget": True}, ValueError, "memory_budget must be a positive number of bytes"),
    *(((value, W, TARGET), {}, TypeError, f"input must be dense, got layout torch.sparse_{name}.*use input.to_dense")
      for value, name in ((X.to_sparse(), "coo"), (X.to_sparse_csr(), "csr"))),
    ((X.to_mkldnn(), W, TARGET), {}, TypeError, "input must be dense, got layout torch._mkldnn"),
    ((X, W.to_sparse_csr(), TARGET), {}, TypeError, "linear_weight must be dense.*use linear_weight.to_dense"),
    ((X, W, TARGET.to_sparse()), {}, TypeError, "target must be dense"),
    ((NESTED, W, TARGET), {}, TypeError, "input is a nested tensor; pad it"),
    ((X, W, NESTED), {}, TypeError, "target is a nested tensor; pad it"),
    ((X, torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), TARGET), {}, TypeError, "linear_weight must not be quantized.*deq"),
    ((X.numpy(), W, TARGET), {}, TypeError, r"input must be .*ndarray of shape \(6, 12\), float32; use torch.as_tensor\(input\)$"),
    ((X, W, TARGET), {"n": np.ones((3, 4))}, TypeError, r"n must be a number, got ndarray of shape \(3, 4\), float64$"),
    ((X, W, TARGET), {"reduction": np.array(["sum", "mean"])}, ValueError, r"reduction must be.*got ndarray of shape \(2,\)"),
    ((X, list(range(10**6)), TARGET), {}, TypeError, r"got .{1,60}; use torch.as_tensor\(linear_weight\)$"),
    ((X.tolist(), W, TARGET), {}, TypeError, r"input must be a torch.Tensor, got list of length 6; use torch.as_tensor\(input\)$"),
    ((X, torch.nn.Linear(12, 9), TARGET), {}, TypeError, "got Linear.*pass its parameter, linear_weight.weight$"),
    ((X, W, "a" * 10**6), {}, TypeError, r"target must be a torch.Tensor, got .{1,250}$"),
    ((X, W, TARGET), {"process_group": object()}, TypeError, "process_group must be None or a torch.distributed.ProcessGroup"),
    ((X, W, TARGET), {"backend": "cuda"}, ValueError, "backend is 'cuda'; it must be one of 'auto'"),
    ((X.double(), W.double(), TARGET), {"backend": "triton"}, ValueError, "cannot serve this call: .*float64 is computed"),
    ((X, W, TARGET), {"backend": "triton", "uniform_mix": 0.1, "label_smoothing": 0.1}, ValueError, "cannot serve.*together"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "error", "text"), CALLS)
def test_linear_harmonic_loss_refuses(tensors, options, error, text, monkeypatch):
    for name in ("forward", "forward_backward"):
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
    for bad in (TARGET, X.abs().to(torch.float8_e4m3fn), X.to(torch.complex64)):
        with pytest.raises(TypeError, match="distances must be bfloat16.*cast them"):
            ht.harmax(bad, 2.0)
    for bad in (X.abs().to_sparse(), NESTED):
        with pytest.raises(TypeError, match="distances (must be dense|is a nested tensor)"):
            ht.log_harmax(bad, 2.0)
    for dim in (True, 1.0, "1", None, (0, 1)):
        with pytest.raises(TypeError, match="dim must be an int, got"):
            ht.harmax(X.abs(), 2.0, dim)
    for dim, tensor in ((2, X), (-3, X), (1, X[0, 0])):
        with pytest.raises(ValueError, match=f"dim must be between .* got {dim}"):
            ht.log_harmax(tensor.abs(), 2.0, dim)
    for value in ("no", 1, None):
        with pytest.raises(TypeError, match="normalize must be True or False, got"):
            ht.harmonic_logits(X, W, normalize=value)
    for k in (True, "3", None, 2.0):
        with pytest.raises(TypeError, match="k must be an int, got"):
            ht.harmonic_topk(X, W, k)
    for k in (0, -1, 2**70):
        with pytest.raises(ValueError, match="k must be"):
            ht.harmonic_topk(X, W, k)


FLAGS = {  # every other flag of the package, by what it does nothing with
    "within_chain": (lambda value: kernel(within_chain=value), lambda value: kernel().estimate(value),
                     lambda value: accumulator().compute(value), lambda value: accumulator().correlation(value),
                     lambda value: accumulator().variance(value),
                     lambda value: ht.loss_kernel(*RUN, seed=0, within_chain=value)),
    "correlation": (lambda value: kernel().block(torch.arange(2), correlation=value),
                    lambda value: ht.loss_covariance(LOSSES[0], correlation=value),
                    lambda value: traces().matvec(torch.ones(5), correlation=value),
                    lambda value: traces().linear_operator(correlation=value)),
    "centered": (lambda value: traces().matvec(torch.ones(5), centered=value),
                 lambda value: traces().linear_operator(centered=value)),
    "progress": (lambda value: ht.loss_kernel(*RUN, seed=0, progress=value),
                 lambda value: ht.sample_losses(*RUN, seed=0, progress=value),
                 lambda value: traces().neighbors(2, progress=value)),
    "verbose": (lambda value: ht.tune(*RUN[:3], seed=0, max_trials=1, num_draws=2, verbose=value),),
    "check_step_size": (lambda value: next(Sampler(*RUN, seed=0).run(check_step_size=value)),),
    "learnable_n": (lambda value: ht.HarmonicHead(3, 4, learnable_n=value),),
}  # fmt: skip
LOSSES = torch.rand(2, 6, 5)
DATA = (torch.randn(8, 3), torch.randint(2, (8,)))
RUN = (
    torch.nn.Linear(3, 2), classification_loss, DATA, DATA,
    ht.SGLDConfig(lr=1e-4, nbeta=4, localization=10, batch_size=4, num_chains=1, num_draws=2),
)  # fmt: skip


def kernel(**options):
    return ht.LossKernel.from_losses(LOSSES, **options)


def filled(sums):
    sums.update(LOSSES[0])
    return sums


def accumulator():
    return filled(ht.StreamingCovariance(5))


def traces():
    return filled(ht.LossTraces(5))


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in FLAGS.items() for call in calls])
def test_a_flag_is_true_or_false(name, call):
    for value in ("no", 0.5, 1, None, np.bool_(True)):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got"):
            call(value)
    try:
        call(False)
    except ImportError:  # linear_operator looks at the flag first, and then for the package of an extra
        if importlib.util.find_spec("scipy"):
            raise


RUN_WITH = {  # what a new user passes, by the name of the argument and the mend that the message must hold
    "arrays for tensors": (lambda: ht.loss_kernel(*RUN[:2], tuple(map(np.asarray, DATA)), *RUN[3:], seed=0), TypeError,
                           "train_data holds arrays that are no tensors; pass each as torch.as_tensor"),
    "no samples": (lambda: ht.loss_kernel(*RUN[:3], (DATA[0][:0], DATA[1][:0]), RUN[4], seed=0), ValueError,
                   "eval_data has no samples"),
    "floats for classes": (lambda: classification_loss(RUN[0], (DATA[0], DATA[1].float())), ValueError,
                           r"target must be int64.*use target.long\(\)$"),
    "classes out of range": (lambda: classification_loss(RUN[0], (DATA[0], DATA[1] + 5)), ValueError,
                             r"target holds [56], outside 0 ... 1 \(logits have 2 classes\)"),
    "a dict for a config": (lambda: ht.stability_bound(*RUN[:3], {"lr": 1e-4}, seed=0), TypeError,
                            "config must be an SGLDConfig, got {'lr': 0.0001}"),
    "a list for a model": (lambda: replace_classifier([RUN[0]]), TypeError, "model must be an nn.Module, got"),
}  # fmt: skip


@pytest.mark.parametrize("what", RUN_WITH)
def test_the_loss_kernel_and_classifiers_refuse(what):
    call, error, text = RUN_WITH[what]
    with pytest.raises(error, match=text):
        call()


def test_a_mark_outside_the_classes_is_no_class():
    logits, target = torch.randn(3, 2), torch.tensor([0, -100, 1])
    assert per_sample_cross_entropy(logits, target)[1] == 0
    assert per_sample_cross_entropy(logits, target.where(target >= 0, 7), ignore_index=7)[1] == 0


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
        plain, other = (  # fp32's share of a ninth is not fp64's
            ht.linear_harmonic_loss(x.double(), W.double(), TARGET, reduction=reduction, backend=backend, **options)
            for options in (numbers, wrapped)
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
