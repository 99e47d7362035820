"""The benchmark suite measures what it says; nothing here asserts a time."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import UsageError, gpu, report
from benchmarks.__main__ import main, make_plan, parser
from benchmarks.baselines import REGISTRY, Baseline, register
from benchmarks.gate import Gate, Truth
from benchmarks.measure import Plan, run
from benchmarks.memory import measure_in_fresh_process, peak_beyond
from benchmarks.workloads import MODELS, Workload, make_inputs

DENSE = ("authors_dense", "harmonic_dense", "cross_entropy")
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks on a CPU are read from Linux's /proc"
)


# --- registry and workloads ------------------------------------------------------------------------------------------


def test_every_baseline_says_what_it_is_and_whether_it_serves():
    for name, baseline in REGISTRY.items():
        assert baseline.name == name
        assert baseline.describe
        for device in ("cpu", "cuda"):
            reason = baseline.unavailable(device, "fp32")
            assert reason is None or len(reason) > 10
    assert all(REGISTRY[name].unavailable("cpu") is None for name in DENSE)
    assert "cuda" in REGISTRY["liger"].unavailable("cpu")
    assert "fp32" in REGISTRY["keops"].unavailable("cpu", "bf16")


def test_triton_is_not_offered_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "GPU" in REGISTRY["ours_triton"].unavailable("cpu")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register("cross_entropy", "cross_entropy", "again")(lambda x, w, t, n: x.sum())
    with pytest.raises(ValueError, match="the gate knows"):
        register("hinge", "hinge", "another loss")(lambda x, w, t, n: x.sum())
    assert "hinge" not in REGISTRY


@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_inputs_have_the_shapes_and_distances_they_claim(inputs):
    made = make_inputs(Workload("tiny", 50, inputs=inputs))
    assert (made.x.shape, made.w.shape, made.target.shape) == ((50, 64), (500, 64), (50,))
    distance = (made.x - made.w[made.target]).norm(dim=1) / made.w[made.target].norm(dim=1)
    if inputs == "trained":
        expected = torch.tensor([0.1, 0.3, 1.0, 1.5, 2.0]).repeat(10)
        assert ((distance / expected - 1).abs() < 0.4).all()  # a random vector of 64 has length 8 within 9 % (1 sigma)
    else:
        assert (distance > 20).all()


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["harmonic", "cross_entropy"])
@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_the_gates_truth_is_autograd_on_direct_differences(loss, inputs):
    made = make_inputs(Workload("tiny", 48, inputs=inputs))
    x, w = (t.detach().double().requires_grad_() for t in (made.x, made.w))
    scores = x @ w.T if loss == "cross_entropy" else -4.0 * (x[:, None] - w).square().sum(dim=2).log()
    value = F.cross_entropy(scores, made.target)
    truth = Truth(made, loss, 8.0)
    exact = Baseline("oracle", loss, "", REGISTRY["cross_entropy"].function)
    for check in truth.check(exact, value, *torch.autograd.grad(value, (x, w))):
        assert check.error < 1e-12, check


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_right_baselines_pass(name, inputs):
    workload = Workload("tiny", 64, inputs=inputs)
    checks = Gate(make_inputs(workload), workload).check(REGISTRY[name])
    assert [check.quantity for check in checks] == ["loss", "dX", "dW"]
    assert all(check.passed for check in checks), checks


def _wrong(name, fault):
    """A right dense baseline with one fault: in the value, in one gradient, or a NaN."""

    def function(x, w, target, exponent):
        if fault == "dX":
            x = x + 1e-2 * (x - x.detach())
        if fault == "dW":
            w = w + 1e-2 * (w - w.detach())
        if fault == "exponent":
            exponent = exponent * 1.001
        loss = REGISTRY[name].function(x, w, target, exponent)
        return loss * float("nan") if fault == "nan" else loss + 1e-3 if fault == "loss" else loss

    return Baseline("wrong", REGISTRY[name].loss, "deliberately wrong", function)


@pytest.mark.parametrize(
    ("name", "fault", "caught"),
    [
        ("cross_entropy", "loss", {"loss"}),
        ("cross_entropy", "dX", {"dX"}),
        ("cross_entropy", "dW", {"dW"}),
        ("harmonic_dense", "loss", {"loss"}),
        ("harmonic_dense", "dX", {"dX"}),
        ("harmonic_dense", "dW", {"dW"}),
        ("harmonic_dense", "exponent", {"loss", "dX", "dW"}),
        ("harmonic_dense", "nan", {"loss", "dX", "dW"}),
    ],
)
def test_a_wrong_baseline_is_caught_where_it_is_wrong(name, fault, caught):
    workload = Workload("tiny", 64)
    checks = Gate(make_inputs(workload), workload).check(_wrong(name, fault))
    assert caught >= {check.quantity for check in checks if not check.passed}
    assert not all(check.passed for check in checks)


def test_a_baseline_that_fails_the_gate_gets_no_time(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.measure_in_fresh_process", lambda *_: (1, None))

    def broken(x, w, target, exponent):
        raise RuntimeError("no kernel for this shape")

    raising = Baseline("raising", "harmonic", "", broken)
    workload = Workload("tiny", 32)
    plan = Plan([workload], [_wrong("harmonic_dense", "dW"), raising, REGISTRY["harmonic_dense"]], True, 2, 1)
    records = {record["baseline"]: record for record in run(plan, lambda line: None)}
    assert records["wrong"]["status"] == "failed the gate"
    assert records["wrong"]["seconds"] is None
    assert "dW" in records["wrong"]["reason"]
    assert records["raising"]["status"] == "failed"
    assert "no kernel" in records["raising"]["reason"]
    good = records["harmonic_dense"]
    assert good["status"] == "ok"
    assert len(good["seconds"]["both"]["values"]) == 2
    assert good["share_of_floor"] == pytest.approx(
        records["products"]["seconds"]["both"]["median"] / good["seconds"]["both"]["median"]
    )


# --- memory ----------------------------------------------------------------------------------------------------------


@linux
def test_the_peak_sees_a_known_allocation():
    size = 256 << 20

    def call():
        held = torch.ones(size // 4)  # freed before the call returns: only a peak sees it
        return held.sum()

    assert peak_beyond(call) == pytest.approx(size, rel=0.1)
    assert peak_beyond(lambda: None) < 0.02 * size  # the peak of an earlier call is forgotten


@linux
def test_a_fresh_process_measures_the_dense_scores():
    workload = Workload("quick", 1024)
    found, reason = measure_in_fresh_process(REGISTRY["cross_entropy"], workload, threads=1)
    assert reason is None
    scores = 4 * workload.tokens * workload.classes
    assert 1.9 * scores - workload.gradient_bytes < found < 4 * scores  # scores and their log-softmax live at once


def test_a_baseline_that_dies_in_its_process_is_reported():
    found, reason = measure_in_fresh_process(REGISTRY["liger"], Workload("tiny", 8), threads=1)
    assert found is None
    assert reason.startswith("exit status")


# --- reports ---------------------------------------------------------------------------------------------------------

HEADER = {
    "cpu": "Some CPU",
    "cores": 2,
    "threads": 2,
    "torch": "2.13",
    "triton": None,
    "harmonic_triton": "0",
    "commit": "ab" * 20,
    "dirty": True,
    "time": "2026-01-01T00:00:00Z",
    "load_before": 0.1,
}


def _record(name, seconds, memory, workload):
    timing = {
        phase: {"median": seconds, "q20": seconds, "q80": seconds, "values": [seconds]}
        for phase in ("forward", "backward", "both")
    }
    check = {"error": 1e-7, "bound": 1e-5, "passed": True}
    loss = REGISTRY[name].loss if name in REGISTRY else "none"
    return {
        "kind": "measurement",
        "baseline": name,
        "loss": loss,
        "workload": workload.as_dict(),
        "status": "ok",
        "reason": None,
        "memory_bytes": memory,
        "memory_reason": None,
        "checks": dict.fromkeys(("loss", "dX", "dW"), check),
        "seconds": timing,
        "tflops": 0.1,
        "share_of_floor": 0.5,
    }


def _records(workload):
    skipped = {"status": "skipped", "reason": "serves cuda only", "seconds": None, "checks": None}
    return [
        _record("products", 1.0, None, workload) | {"checks": None},
        _record("ours_torch", 2.0, 4_000_000, workload),
        _record("authors_dense", 5.0, 20_000_000, workload),
        _record("cross_entropy", 2.5, 16_000_000, workload),
        _record("liger", 0, None, workload) | skipped,
    ]


def test_lines_come_back_as_the_same_table(tmp_path):
    workload = Workload("gpt2", 2048)
    saved = report.save(tmp_path / "run.jsonl", HEADER, iter(_records(workload)))
    loaded = report.load(tmp_path / "run.jsonl")
    assert (loaded.header, loaded.records) == (saved.header, saved.records)
    table = report.text(loaded)
    assert table == report.text(saved)
    row = next(line for line in table.splitlines() if line.startswith("| authors_dense"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["5000", "5000-5000", "2.50"]
    assert cells[8:10] == ["20", "5.00"]
    assert "- liger: skipped: serves cuda only" in table
    assert "Some CPU, 2 cores, 2 threads" in table
    assert "abababababab + changes" in table
    assert "not quiet" not in table
    assert "not quiet: load 3.0" in report.text(report.Run("busy", {**HEADER, "load_before": 3.0}))


def test_the_verdicts_follow_the_figures():
    workload = Workload("gpt2", 2048)
    records = _records(workload)
    lines = report.verdicts(workload, records)
    assert [line.split()[0] for line in lines] == ["PASS", "PASS", "PASS"]
    assert [float(line.split(": ")[1].split()[0]) for line in lines] == [0.8, 0.25, 2.5]
    slow = copy.deepcopy(records)
    slow[1] = _record("ours_torch", 2.6, 9_000_000, workload)
    assert [line.split()[0] for line in report.verdicts(workload, slow)] == ["FAIL", "FAIL", "FAIL"]
    gone = [
        *records[:2],
        records[2] | {"status": "failed the gate", "reason": "dX 1e-1", "seconds": None},
        *records[3:],
    ]
    assert report.verdicts(workload, gone)[2].startswith("NOT MEASURED")
    assert report.verdicts(Workload("tiny", 2048), records) == []


def test_plots_are_drawn_for_each_workload_and_against_n(tmp_path):
    pytest.importorskip("matplotlib")
    records = [*_records(Workload("tiny", 32)), *_records(Workload("tiny", 64))]
    made = report.plot(report.save(tmp_path / "run.jsonl", HEADER, records), tmp_path)
    assert [path.name for path in made] == [
        "run-tiny-32-random.png",
        "run-tiny-64-random.png",
        "run-tiny-against-n-random.png",
    ]
    assert all(path.stat().st_size > 5000 for path in made)


@pytest.mark.parametrize(("content", "says"), [("", "header"), ("{}\n", "header"), ('{"kind": "run"}\n{"ki', "line 2")])
def test_a_file_that_is_no_run_is_named(tmp_path, content, says):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UsageError, match=f"x.jsonl.*{says}"):
        report.load(tmp_path / "x.jsonl")


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workload", "gpt5"], "--workload 'gpt5' is not known: choose from tiny"),
        (["--dtype", "int8"], "--dtype 'int8' is not known: choose from fp32"),
        (["--inputs", "zeros"], "--inputs 'zeros' is not known: choose from random, trained"),
        (["--n", "0"], "--n 0 "),
        (["--repeats", "0"], "--repeats 0 "),
        (["--threads", "0"], "--threads 0 "),
        (["--baselines", "apex"], "--baselines 'apex' is not registered: choose from ours_torch"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--quick", "--n", "64"], "--quick chooses --n itself"),
    ],
)
def test_a_bad_request_is_refused_before_any_work(words, says, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.run", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UsageError, match=says):
        make_plan(parser().parse_args(words))
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_request_becomes_a_plan():
    plan = make_plan(parser().parse_args(["--n", "1024", "2048", "--inputs", "trained", "random", "--device", "cpu"]))
    assert [(w.model, w.inputs, w.tokens) for w in plan.workloads] == [
        ("gpt2", "trained", 1024),
        ("gpt2", "trained", 2048),
        ("gpt2", "random", 1024),
        ("gpt2", "random", 2048),
    ]
    assert plan.repeats == 5
    assert (plan.workloads[0].dim, plan.workloads[0].classes) == (768, 50257)
    assert {"gpt2", "gpt2-xl", "llama-3.2-1b", "llama-3-8b", "gemma-2-2b"} <= MODELS.keys()


@linux
def test_one_command_measures_and_another_makes_the_table_again(tmp_path, capsys):
    words = [
        "--workload",
        "tiny",
        "--n",
        "32",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--baselines",
        "harmonic_dense",
        "cross_entropy",
    ]
    assert main([*words, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (stored,) = tmp_path.glob("*.jsonl")
    header = json.loads(stored.read_text().splitlines()[0])
    assert header["command"].split() == ["python", "-m", "benchmarks", *words]
    assert {"torch", "triton", "harmonic_triton", "commit", "dirty", "cores", "cpu"} <= header.keys()
    for row in ("| products", "| harmonic_dense", "| cross_entropy"):
        assert row in printed
    stored.with_suffix(".md").unlink()
    assert main(["report", str(stored)]) == 0
    assert capsys.readouterr().out == printed
    assert stored.with_suffix(".md").is_file()


def test_the_gpu_script_needs_a_gpu_or_tiny(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_the_gpu_scripts_limits_fit_one_call(tmp_path):
    for tiny in (False, True):
        planned = gpu.steps(tiny, tmp_path)
        assert sum(step.seconds for step in planned) <= gpu.BUDGET_SECONDS < 600
        assert [step.name for step in planned if step.name in ("verify", "memcheck")] == ["verify", "memcheck"]


def test_a_gpu_step_that_fails_or_hangs_is_recorded(tmp_path):
    failing = gpu.Step("failing", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 20)
    failed = gpu.run_step(failing, tmp_path, 100)
    assert (failed["status"], failed["reason"]) == ("exit status 3", "why")
    assert (tmp_path / "failing.log").read_text() == "why\n"
    hanging = gpu.Step("hanging", (sys.executable, "-c", "import time; time.sleep(60)"), 1)
    assert gpu.run_step(hanging, tmp_path, 100)["status"] == "stopped after 1 s"
    assert gpu.run_step(hanging, tmp_path, 0)["status"] == "skipped"
