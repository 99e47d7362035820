"""``pytest --pretend-gpu``: the suite as on a GPU, on a machine without one, to see which tensors would be where.

Every tensor knows whether it would be on the GPU: what is created there, moved there, or computed from what is there.
``Tensor.device`` says so, an operation on tensors of both kinds fails as it would, and so does a Triton kernel that is given
a tensor of the CPU. Numbers are the CPU's and the interpreter's; nothing is said about compiled kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from harmonic_triton.fused import ops as _ops
from harmonic_triton.losskernel.covariance import differentiable

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
TRUE_DEVICE = torch.Tensor.device.__get__
ANYWHERE = (
    "copy_",
    "_to_copy",
    "lift_fresh",
    "set_",
    "scatter_",
)  # take both kinds; the last is within F.one_hot's C++
CANNOT = {  # tests that need more of a GPU than is pretended
    "test_opcheck_of_triton": "fake tensors of a GPU need CUDA",
    "test_a_resumed_accumulator_goes_on_bitwise": "what torch.load reads has lost where it was",
    "test_a_target_out_of_range_stops_a_process_on_a_gpu": "needs a GPU",
    "test_captured_in_a_cuda_graph": "needs a GPU",
}


MARKS: dict[int, tuple[StorageWeakRef, bool]] = {}  # of storages; the reference keeps the address from being used again


def mark(tensor: Tensor, there: bool) -> None:
    storage = tensor.untyped_storage()
    MARKS[storage._cdata] = StorageWeakRef(storage), there


def unwrapped(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def on_gpu(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        tensor = unwrapped(tensor)
        if TRUE_DEVICE(tensor).type != "cpu" or tensor.layout != torch.strided:
            return False
        return MARKS.get(tensor.untyped_storage()._cdata, (None, False))[1]


def on_cpu(tensor: Tensor) -> bool:
    """Not so for what autograd's own formulas create, which goes where the first tensor it meets is."""
    return TRUE_DEVICE(tensor).type == "cpu" and tensor.untyped_storage()._cdata not in MARKS


def device(tensor: Tensor) -> torch.device:
    return CUDA if on_gpu(tensor) else TRUE_DEVICE(tensor)


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "harmonic_triton":
            with self:  # what it does inside is seen as well
                if name == "loss_covariance":
                    return differentiable._loss_covariance(*args, **kwargs)
                return _ops._operator(_ops._BODIES[name], _ops._RETURNS[name][0])(*args, **kwargs)
        there = any(map(on_gpu, tensors))
        indices = name.startswith(("index", "_unsafe_index")) and bool(tensors) and on_gpu(tensors[0])
        if there and name not in ANYWHERE and not indices:
            bad = [tuple(t.shape) for t in tensors if t.dim() and on_cpu(t)]
            if bad:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} has {bad} on the CPU")
        if there and name == "_assert_async" and not args[0].item():
            pytest.fail("a device-side assert would end this process's use of the GPU")
        wanted = kwargs.get("device")
        if (
            wanted is not None and torch.device(wanted).type == "cuda"
        ):  # "cpu" beside a tensor is what C++ takes from it
            there, kwargs = True, {**kwargs, "device": CPU}
            if not getattr(kwargs.get("generator"), "on_gpu", True):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and TRUE_DEVICE(leaf).type == "cpu"]
        for leaf in made:
            if there and (name != "copy_" or not on_cpu(leaf)):
                mark(leaf, True)
            elif not tensors and torch._C._current_autograd_node() is not None:
                mark(leaf, False)
        return out


class Generator(torch.Generator):
    """Counts on the CPU, whichever device it is for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.on_gpu = torch.device(device).type == "cuda"
        return made


class Move(torch.autograd.Function):
    """A copy on the other side."""

    @staticmethod
    def forward(ctx, tensor, to_gpu):
        with _disable_current_modes():
            out = tensor.detach().clone()
        if to_gpu:
            mark(out, True)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Move.apply(grad, not on_gpu(grad)), None


def moved(tensor: Tensor, where: torch.device) -> Tensor:
    if type(unwrapped(tensor)) not in (Tensor, torch.nn.Parameter) or (where.type == "cuda") == on_gpu(tensor):
        return tensor
    return Move.apply(tensor, where.type == "cuda")


def install() -> None:
    """For the rest of the process."""
    true_to, true_numpy, empty = Tensor.to, Tensor.numpy, ()

    def to(self, *args, **kwargs):
        where = kwargs.pop("device", None)
        if args and isinstance(args[0], (str, torch.device)):
            where, args = args[0], args[1:]
        elif args and isinstance(args[0], Tensor):
            where, args = args[0].device, (args[0].dtype, *args[1:])
        if where is None or torch.device(where).type not in ("cuda", "cpu") or TRUE_DEVICE(self).type != "cpu":
            return true_to(self, *(empty if where is None else (where,)), *args, **kwargs)
        return (
            true_to(moved(self, torch.device(where)), *args, **kwargs)
            if args or kwargs
            else moved(self, torch.device(where))
        )

    def numpy(self, *args, **kwargs):
        if on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return true_numpy(self, *args, **kwargs)

    true_one_hot = torch.nn.functional.one_hot

    def one_hot(tensor, num_classes=-1):  # its C++ creates what it returns from the tensor's true device
        made = true_one_hot(tensor, num_classes)
        if on_gpu(tensor):
            mark(made, True)
        return made

    torch.nn.functional.one_hot = one_hot
    true_tensor, true_new = torch.tensor, Tensor.new_tensor

    def tensor(data, *, device=None, requires_grad=False, **kwargs):
        made = true_tensor(data, **kwargs)
        return (made if device is None else moved(made, torch.device(device)).detach()).requires_grad_(requires_grad)

    torch.tensor = tensor
    Tensor.new_tensor = lambda self, *args, **kwargs: moved(true_new(self, *args, **kwargs), device(self))
    Tensor.device, Tensor.is_cpu = property(device), property(lambda self: device(self).type == "cpu")
    Tensor.to, Tensor.numpy, Tensor.__array__ = to, numpy, numpy
    Tensor.cpu = lambda self: to(self, "cpu")
    Tensor.cuda = lambda self, *_: to(self, "cuda")
    torch.Generator = Generator
    torch.compile = lambda function=None, **_: function  # its frames would be skipped: a mode of ours is on
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda._lazy_init = torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "pretended"
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        total_memory=2**36, multi_processor_count=1, name="pretended", major=9, minor=0
    )
    from triton.runtime import interpreter

    launch = interpreter.InterpretedFunction.run

    def run(kernel, *args, **options):
        for name, leaf in (*zip(kernel.arg_names, args, strict=False), *options.items()):
            if isinstance(leaf, Tensor) and not on_gpu(leaf):
                pytest.fail(
                    f"{kernel.fn.__name__}: Pointer argument {name} cannot be accessed from Triton (cpu tensor?)"
                )
        with _disable_current_modes():
            return launch(kernel, *args, **options)

    interpreter.InterpretedFunction.run = run
    Pretend().__enter__()
