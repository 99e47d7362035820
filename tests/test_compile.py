"""Whole programs under PyTorch's compilers: training steps, exported models, what a CUDA graph could not hold.

The operators by themselves are the business of test_ops.py.
"""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_ops import compiled_equals_eager, fresh_dynamo, inputs, relative  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import harmonic_triton as ht
from harmonic_triton.fused.ops import _BODIES as BODIES
from harmonic_triton.fused.ops import backend_module
from harmonic_triton.fused.problem import Finishing, Operands, Problem, Wanted
from harmonic_triton.fused.results import TokenWeights, Upstream

COUNTERS = torch._dynamo.utils.counters


class Model(nn.Module):
    """An embedding, a layer, and a head that is tied to the embedding."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = ht.HarmonicHead(16, 40, n=4.0, std=1.0, **options)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, target=None, **options):
        return self.head(self.layer(self.embedding(tokens)).tanh(), target, **options)


def tokens(batch: int, length: int = 6) -> torch.Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(batch))


# --- training steps


def trained(step, scaler=None) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and weights of six steps with five sizes of batch."""
    model, losses = Model(learnable_n=True, label_smoothing=0.1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in (8, 5, 3, 7, 9, 8):
        optimizer.zero_grad()
        loss = step(model, tokens(batch))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("how", "backend"), [
    ("plain", "aot_eager"), ("checkpointed", "aot_eager"), ("autocast", "aot_eager"),
    pytest.param("re-entrant", "aot_eager", marks=pytest.mark.slow),
    pytest.param("plain", "inductor", marks=pytest.mark.slow),
])  # fmt: skip
def test_training_step(how, backend):
    """Compiled as eager: one graph a shape class, no break, nothing compiled after the second batch size. A tied head, a learnable n.

    The same operators run on both routes. fp32: what is compiled sums in another order, a few roundings of 2^-24 a step, which six
    steps of Adam (whose steps are of size lr whatever the gradient is) pass on; under autocast the operands' rounding decides, and is
    the same on both routes up to those roundings, which move one of 2^8 values a step by 2^-8.
    """

    def step(model, ids):
        if how == "checkpointed" or how == "re-entrant":
            hidden = model.layer(model.embedding(ids))
            head = lambda hidden: model.head(hidden.tanh(), ids, shift=True)
            return checkpoint(head, hidden, use_reentrant=how == "re-entrant")
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return model(ids, ids, shift=True)

    wanted_losses, wanted = trained(step)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    losses, weights = trained(compiled)
    assert not COUNTERS["graph_break"]
    assert COUNTERS["stats"]["unique_graphs"] == 2
    bound = 1e-3 if how == "autocast" else 1e-5
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses), rtol=bound, atol=0)
    for mine, value in zip(weights, wanted, strict=True):
        assert (mine - value).norm() <= 10 * bound * value.norm()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_gradient_scaler(dtype):
    """A factor of 2^8 times the loss, exact in every format, changes no weight; one that overflows skips the step."""

    def step(model, ids):
        with torch.autocast("cpu", dtype):
            return model(ids, ids, shift=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    wanted_losses, wanted = trained(step)
    losses, weights = trained(step, scaler)
    assert scaler.get_scale() == 2.0**8
    # gradients of 16 bits are rounded where they are scaled: equal but for those that are subnormal without the factor
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted_losses), rtol=2e-3, atol=0)
    assert all((mine - value).norm() <= 1e-2 * value.norm() for mine, value in zip(weights, wanted, strict=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    model = Model()
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler.scale(1e3 * step(model, tokens(4))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model.head.weight, before) and scaler.get_scale() == 2.0**126


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_at_most_one_more_graph_where_the_tokens_leave_one_chunk(reduction):
    """In chunks of ten tokens a mean keeps other things than in one: a graph for each, and none after that."""
    loss = lambda x, w, target: ht.linear_harmonic_loss(x, w, target, reduction=reduction, memory_budget=9 * 4 * 10)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (7, 5, 33, 9, 64, 10, 11):
        compiled_equals_eager(loss, compiled, list(inputs(count, dtype=torch.float32)[:3]), 1e-6)
    assert COUNTERS["stats"]["unique_graphs"] == 1 + (reduction == "mean")


# --- torch.export


def exported(model: nn.Module, *arguments: torch.Tensor) -> nn.Module:
    """After a round trip through a file, for any number of rows."""
    program = torch.export.export(model, arguments, dynamic_shapes=[{0: torch.export.Dim.AUTO}] * len(arguments))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_exported_for_inference():
    model = Model(learnable_n=True)
    loaded = exported(model, tokens(3))
    for batch in (3, 5):
        assert relative(loaded(tokens(batch)), model(tokens(batch))) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_with_its_loss(reduction):
    """The exported program trains: it has the model's gradients. Statistics come as they do from the model."""
    model = Model(learnable_n=True, reduction=reduction, return_stats=True)
    loaded = exported(model, tokens(3), tokens(3))
    for batch in (3, 5):
        (mine, stats), (wanted, expected) = (run(tokens(batch), tokens(batch)) for run in (loaded, model))
        assert type(stats) is ht.HarmonicStats
        assert relative(mine, wanted) < 1e-6
        assert all(torch.equal(*pair) for pair in zip(stats, expected, strict=True))
        leaves = {name: dict(run.named_parameters())[name] for run in (loaded,) for name in ("layer.weight", "head.n")}
        got = torch.autograd.grad((0.7 * mine).sum(), list(leaves.values()))
        value = torch.autograd.grad((0.7 * wanted).sum(), [model.layer.weight, model.head.n])
        assert all(relative(*pair) < 1e-5 for pair in zip(got, value, strict=True))


# --- CUDA graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real one records them in the next test")
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch has no operators for CUDA")
@pytest.mark.parametrize("tokens_of_call", [7, 30000])
@pytest.mark.parametrize("backend", ["triton"])
def test_no_operator_reads_a_value_of_a_gpu(backend, tokens_of_call, monkeypatch):
    """On tensors of a GPU that hold nothing reading is an error: what a CUDA graph records may not. Kernels are not launched."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched = []
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(backend_module("triton"), "_on_device", lambda tensor: nullcontext())
    product = lambda a, b, out, add: out.addmm_(a.float(), b.float())  # fake tensors know no out_dtype
    monkeypatch.setattr(backend_module("triton"), "_product", product)
    properties = SimpleNamespace(major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    gpu = torch.device("cuda", 0)
    problem, wanted = Problem(0.0, 0.0, -100, True, backend, 0), Wanted(True, True, True)
    for dtype, smoothing in ((torch.bfloat16, False), (torch.float32, True)):
        with FakeTensorMode():
            x, w = (torch.empty(count, 64, device=gpu, dtype=dtype) for count in (tokens_of_call, 50))
            token, classes = (torch.empty(count, device=gpu) for count in (tokens_of_call, 50))
            target, n = torch.empty(tokens_of_call, device=gpu, dtype=torch.int64), torch.empty((), device=gpu)
            operands = Operands(x, w, target, n, classes if smoothing else None)
            smooth = token if smoothing else None
            results = BODIES["forward"](operands, problem)
            out = BODIES["backward"](operands, results, Upstream(token, smooth, None), problem, wanted)
            if not smoothing:  # one pass takes bfloat16 without smoothing
                weights = TokenWeights(token, smooth, None)
                _, _, unfinished, results = BODIES["forward_backward"](operands, weights, problem, wanted)
                finishing = Finishing(results.rival, torch.empty((), device=gpu), True)
                out = *out, *BODIES["finish"](operands, unfinished, finishing, problem, wanted)
        assert all(value.device == gpu for value in (*results, *out))
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty((), device=gpu).item()  # so that the test can fail
    assert launched


@pytest.mark.triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_graphs(dtype, reduction):
    """A recorded step gives bitwise what the step gives; ``mode="reduce-overhead"`` declines nothing."""
    w = torch.randn(1000, 64, device="cuda", dtype=dtype, requires_grad=True)
    n = torch.tensor(8.0, device="cuda", requires_grad=True)

    def step(x, target):
        loss = ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, (x, w, n), 0.7 * torch.ones_like(loss))

    batches = [(torch.randn(256, 64, device="cuda", dtype=dtype, requires_grad=True),
                torch.randint(1000, (256,), device="cuda")) for _ in range(3)]  # fmt: skip
    wanted = [step(*batch) for batch in batches]
    x, target = (tensor.detach().clone() for tensor in batches[0])
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(x, target)
    for batch, expected in zip(batches, wanted, strict=True):
        with torch.no_grad():
            x.copy_(batch[0])
            target.copy_(batch[1])
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))
    compiled = torch.compile(lambda x, target: ht.linear_harmonic_loss(x, w, target, n=n, reduction=reduction),
                             fullgraph=True, mode="reduce-overhead")  # fmt: skip
    for batch, (_, *expected) in zip(batches * 2, wanted * 2, strict=True):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*batch)
        got = torch.autograd.grad(loss, (batch[0], w, n), 0.7 * torch.ones_like(loss))
        assert all(relative(*pair) < 1e-2 for pair in zip(got, expected, strict=True))
    assert not COUNTERS["inductor"]["cudagraph_skips"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_names_the_version_of_its_operators(reduction):
    """By which a compiler's cache on disk tells it from the graph of another version's operators of the same names."""
    graphs = []

    def record(graph, arguments):
        graphs.append("".join(module.code for module in graph.modules() if hasattr(module, "code")))
        return graph.forward

    x, w, target, _ = inputs(dtype=torch.float32)
    torch.compile(lambda x, w: ht.linear_harmonic_loss(x, w, target, reduction=reduction), backend=record)(x, w)
    (code,) = graphs
    assert code.count("torch.ops.harmonic_triton.") == code.count(f"'{ht.__version__}'") == 2
