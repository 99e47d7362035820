"""The benchmark suite measures what it says; nothing here asserts a time."""

import copy
import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    UsageError,
    covariance,
    covariance_methods,
    gpu,
    growth,
    head,
    head_figures,
    head_report,
    inner_loops,
    machine,
    plots,
    readme,
    report,
    runs,
    sampler,
    static_cost,
    workers,
)
from benchmarks.__main__ import SUITES, main, parse_arguments, write
from benchmarks.baselines import REGISTRY, Baseline, register
from benchmarks.gate import Gate, Truth
from benchmarks.head_memory import measure_in_fresh_process
from benchmarks.measure import Plan, Products, announcement, expected_seconds, has_turn, run
from benchmarks.workloads import MODELS, Workload, make_inputs
from harmonic_triton.tools.memory import peak_beyond

LOSSES = ("harmonic", "cross_entropy")
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
    assert "cuda" in REGISTRY["cce"].unavailable("cpu")
    assert "fp32" in REGISTRY["keops"].unavailable("cpu", "bf16")


def test_triton_is_not_offered_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("ours_triton", "ours_lce_triton", "liger"):
        assert "GPU" in REGISTRY[name].unavailable("cpu")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register("cross_entropy", "cross_entropy", "again")(lambda x, w, t, n: x.sum())
    with pytest.raises(ValueError, match="the gate knows"):
        register("hinge", "hinge", "another loss")(lambda x, w, t, n: x.sum())
    assert "hinge" not in REGISTRY


def both(workload):
    return {loss: make_inputs(workload, loss) for loss in LOSSES}


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


@pytest.mark.parametrize("loss", LOSSES)
def test_solved_inputs_have_true_losses_near_1e_20(loss):
    """To a factor of 30 at D = 256: the classes' distances and scores scatter about their means."""
    made = make_inputs(Workload("quick", 32, inputs="solved"), loss)
    assert 1e-20 / 30 < Truth(made, loss, 16.0).loss < 1e-20 * 30


def test_trained_inputs_of_the_cross_entropy_go_from_solved_to_undecided():
    made = make_inputs(Workload("quick", 50, inputs="trained"), "cross_entropy")
    nll = Truth(made, "cross_entropy", 16.0).rows.nll.reshape(10, 5).mean(0)
    assert nll[0] < 1e-15
    assert (nll.diff() > 0).all()
    assert nll[-1] > 1


def test_a_baseline_that_does_not_fit_or_takes_too_long_says_so():
    large = Workload("gpt2", 8192)
    dense, slow = REGISTRY["authors_dense"], REGISTRY["keops"]
    assert "8.0 GB are free" in dense.too_big(large, 8 * 10**9)
    assert dense.too_big(large, 10**12) is None
    assert dense.too_big(large, None) is None
    assert REGISTRY["ours_torch"].too_big(large, 10**9) is None
    assert "--baselines keops" in slow.too_large(large)
    assert slow.too_large(Workload("tiny", 32)) is None


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["harmonic", "cross_entropy"])
@pytest.mark.parametrize("inputs", ["random", "trained"])
def test_the_gates_truth_is_autograd_on_direct_differences(loss, inputs):
    made = make_inputs(Workload("tiny", 48, inputs=inputs), loss)
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
    checks = Gate(both(workload), workload).check(REGISTRY[name])
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
    checks = Gate(both(workload), workload).check(_wrong(name, fault))
    assert caught >= {check.quantity for check in checks if not check.passed}
    assert not all(check.passed for check in checks)


def test_a_baseline_that_fails_the_gate_gets_no_time(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.measure_in_fresh_process", lambda *_: (1, None))

    def broken(x, w, target, exponent):
        raise RuntimeError("no kernel for this shape")

    raising = Baseline("raising", "harmonic", "", broken)
    workload = Workload("tiny", 32)
    plan = Plan([workload], [_wrong("harmonic_dense", "dW"), raising, REGISTRY["harmonic_dense"]], True, 2, 1)
    assert plan.patience == float("inf")
    records = {record["baseline"]: record for record in run(plan, lambda line: None)}
    assert records["wrong"]["status"] == "failed the gate"
    assert records["wrong"]["seconds"] is None
    assert "dW" in records["wrong"]["reason"]
    assert records["raising"]["status"] == "failed"
    assert "no kernel" in records["raising"]["reason"]
    good = records["harmonic_dense"]
    assert good["status"] == "ok"
    assert len(good["seconds"]["both"]["values"]) == 2
    assert good["solved_loss"]["error"] == pytest.approx(1)  # fp32 rounds the target's probability to 1
    assert records["products"]["copy_bytes_per_second"] > 1e8
    assert good["share_of_floor"] == pytest.approx(
        records["products"]["seconds"]["both"]["median"] / good["seconds"]["both"]["median"]
    )


@pytest.mark.parametrize("name", ["ours_torch", "ours_lce_torch"])
@pytest.mark.parametrize("model", ["tiny", "quick"])
def test_ours_are_right_where_the_true_loss_is_near_1e_20(name, model):
    workload = Workload(model, 32, inputs="solved")
    checks = Gate(both(workload), workload).check(REGISTRY[name])
    assert all(check.passed for check in checks), checks
    assert checks[0].bound <= 1e-5


@pytest.mark.parametrize(("affordable", "turns"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_a_slow_baseline_gets_fewer_repeats_evenly_spread(affordable, turns):
    plan = Plan([], [], False, 5, 1, patience=10.0)
    samples = [{"both": 10.0 / affordable - 1e-9}]
    assert [turn for turn in range(5) if has_turn("any", samples if turn else [], turn, plan)] == turns
    once = dataclasses.replace(plan, once=frozenset({"any"}))
    assert [turn for turn in range(5) if has_turn("any", samples if turn else [], turn, once)] == [0]


@pytest.mark.parametrize("rows", [40, 7])
@pytest.mark.parametrize("block", [0, 512, 100])
def test_the_bare_products_are_the_products(rows, block):
    made = make_inputs(Workload("tiny", 40))
    bare = Products(made, "cpu")
    bare.rows, bare.block = rows, block
    assert bare.time()["both"] > 0
    scores = (made.x @ made.w.T).double()
    torch.testing.assert_close(bare.dx.double(), scores @ made.w.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bare.dw.double(), scores.T @ made.x.double(), rtol=1e-5, atol=1e-3)


@linux
def test_work_of_other_processes_is_seen():
    own = machine.OtherWork()
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        pass
    alone = own.cores()
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        others = machine.OtherWork()
        time.sleep(1.0)
        assert others.cores() > 0.3  # a whole core, or its share of a crowded machine
    finally:
        busy.kill()
        busy.wait()
    assert alone >= 0


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
    found, reason = measure_in_fresh_process(REGISTRY["cce"], Workload("tiny", 8), threads=1)
    assert found is None
    assert reason.startswith("exit status")


# --- reports ---------------------------------------------------------------------------------------------------------

HEADER = {
    "suite": "head",
    "command": "python -m benchmarks",
    "settings": {"repeats": 5},
    "device": "cpu",
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


def text_of(run):
    return report.text(run, SUITES[run.header["suite"]].sections(run))


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
        "solved_loss": {"truth": 1.1e-20, "error": 2e-6},
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
    saved = runs.save(tmp_path / "run.jsonl", HEADER, iter(_records(workload)))
    loaded = runs.load(tmp_path / "run.jsonl")
    assert (loaded.header, loaded.records) == (saved.header, saved.records)
    table = text_of(loaded)
    assert table == text_of(saved)
    row = next(line for line in table.splitlines() if line.startswith("| authors_dense"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:7] == ["5000", "5000-5000", "1", "2.50"]
    assert cells[9:11] == ["20", "5.00"]
    assert cells[-1] == "2.0e-06"
    assert "- liger: skipped: serves cuda only" in table
    assert "Some CPU, 2 cores, 2 threads" in table
    assert "abababababab + changes" in table
    assert "not quiet" not in table
    assert "load before the run was 3.0 on 2 cores" in text_of(runs.Run("busy", {**HEADER, "load_before": 3.0}))
    measured = [record | {"other_work_cores": 0.4, "copy_bytes_per_second": 1e10} for record in loaded.records]
    assert "0.40 of 2 cores busy" in text_of(runs.Run("busy", HEADER, measured))


def test_the_verdicts_follow_the_figures():
    workload = Workload("gpt2", 2048)
    records = _records(workload)
    lines = head_report.verdicts(workload, records)
    assert [line.split()[0] for line in lines] == ["PASS", "PASS", "PASS"]
    assert [float(line.split(": ")[1].split()[0]) for line in lines] == [0.8, 0.25, 0.4]
    slow = copy.deepcopy(records)
    slow[1] = _record("ours_torch", 2.6, 9_000_000, workload)
    assert [line.split()[0] for line in head_report.verdicts(workload, slow)] == ["FAIL", "FAIL", "FAIL"]
    gone = [
        *records[:2],
        records[2] | {"status": "failed the gate", "reason": "dX 1e-1", "seconds": None},
        *records[3:],
    ]
    assert head_report.verdicts(workload, gone)[2].startswith("NOT MEASURED")
    assert head_report.verdicts(Workload("tiny", 2048), records) == []
    assert head_report.verdicts(Workload("gpt2", 2048, v=100), records) == []


def test_the_verdicts_at_8192_ask_for_the_floor_and_for_every_cpu_baseline():
    workload = Workload("gpt2", 8192)
    lines = head_report.verdicts(workload, _records(workload))
    share = next(line for line in lines if "3U floor" in line)
    assert share.startswith("FAIL") and ": 0.500 (wanted >= 0.93)" in share
    for name in ("authors_dense", "harmonic_dense", "keops", "cross_entropy_compiled", "torch_chunked", "cce_compiled"):
        assert any(f"time of ours / {name}: " in line for line in lines)
    assert not any("liger" in line for line in lines)


def test_a_run_says_beforehand_how_long_it_takes():
    def plan(tokens, repeats=5, once=()):
        return Plan([Workload("small", tokens)], [REGISTRY["cross_entropy"]], True, repeats, 1, once=frozenset(once))

    said = []
    next(run(plan(16, repeats=1), said.append))
    assert re.search(r"this takes a minute or two here, if nothing else runs; workloads: 1, repeats: 1$", said[0])
    long = announcement(plan(10**7))
    assert re.search(
        r"this takes roughly [\d,]+ minutes here.*; --quick, fewer --repeats, --n or --baselines take less$", long
    )
    assert expected_seconds(plan(10**7)) > expected_seconds(plan(10**7, once=["cross_entropy"]))


def test_plots_are_drawn_for_each_workload(tmp_path):
    pytest.importorskip("matplotlib")
    records = [*_records(Workload("tiny", 32)), *_records(Workload("tiny", 64))]
    records[0]["copy_bytes_per_second"] = 1e10
    made = plots.draw(runs.save(tmp_path / "run.jsonl", HEADER, records), tmp_path)
    assert [path.name for path in made] == [
        "run-tiny-32-random.png",
        "run-tiny-32-random-error.png",
        "run-tiny-64-random.png",
        "run-tiny-64-random-error.png",
        "run-roofline.png",
    ]
    assert all(path.stat().st_size > 5000 for path in made)


INTERNAL = re.compile(r"ours_|lce_|_dense|cross_entropy_compiled|torch_chunked|cce_|3U|floor|^products$")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figures of a run by file name, as they are when they are written."""
    plt = pytest.importorskip("matplotlib.pyplot")
    found = {}
    monkeypatch.setattr(plt, "close", lambda figure: found.__setitem__(len(found), figure))

    def draw(run):
        found.clear()
        return dict(zip((path.name for path in plots.draw(run, tmp_path)), found.values(), strict=True))

    yield draw
    monkeypatch.undo()
    plt.close("all")


def texts_of(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_pictures_are_in_the_readers_words_and_units(drawn):
    """Of every baseline that there is, on a run whose products took ten seconds."""
    known = [
        name for name, one in REGISTRY.items() if one.function.__module__ == "benchmarks.baselines"
    ]  # no test's own
    records = [
        _record(name, 10.736 - 0.1 * i, 313_000_000 * (i + 1), Workload("tiny", 32)) for i, name in enumerate(known)
    ]
    records = [
        _record("products", 10.9, None, Workload("tiny", 32)) | {"checks": None, "copy_bytes_per_second": 1e10},
        *records,
    ]
    found = drawn(runs.Run("run", HEADER, records))
    assert len(found) == 3
    for figure in found.values():
        assert not [text for text in texts_of(figure) if INTERNAL.search(text)]
    bars = texts_of(found["run-tiny-32-random.png"])
    assert (
        "ht.linear_harmonic_loss" in bars
        and "three matrix products alone" in bars
        and "this library, harmonic loss" in bars
    )
    assert "10.7 s" in bars and "313 MB" in bars and "time, forward and backward (s)" in bars
    names = [text.get_text() for text in found["run-tiny-32-random.png"].axes[0].get_yticklabels()]
    assert len(names) == len(set(names)) == len(records)  # also where two backends stand side by side
    errors = found["run-tiny-32-random-error.png"].axes[0]
    assert len({line.get_marker() for line in errors.lines if line.get_linestyle() == "None"}) == len(known)


@pytest.mark.parametrize(
    ("value", "units", "text"),
    [(10.736, "SECONDS", "10.7 s"), (0.2, "SECONDS", "200 ms"), (3.25e-3, "SECONDS", "3.25 ms"), (2e-7, "SECONDS", "0.200 µs"),
     (13.006e9, "BYTES", "13.0 GB"), (313e6, "BYTES", "313 MB"), (math.nan, "BYTES", "–")],
)  # fmt: skip
def test_figures_are_shown_with_three_digits_and_a_unit(value, units, text):
    assert head_figures.shown(value, getattr(head_figures, units)) == text


def test_lines_of_growth_differ_without_colour(drawn):
    records = [
        record | {"baseline": name}
        for name in ("ours_torch", "ours_lce_torch", "cross_entropy")
        for record in _growing()
    ]
    for figure in drawn(runs.Run("run", HEADER, records)).values():
        assert not [text for text in texts_of(figure) if INTERNAL.search(text)]
        lines = [line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")]
        assert [line.get_label() for line in lines] == [
            "ht.linear_harmonic_loss", "ht.linear_cross_entropy", "F.cross_entropy(x @ W.T)"
        ]  # fmt: skip
        assert len({line.get_linestyle() for line in lines}) == len({line.get_marker() for line in lines}) == 3
        assert figure.legends and not figure.axes[0].get_legend()  # beside the lines, not over them


def _growing():
    """Times 1 + 0.5 N and 3 + 0.25 V, memory flat in N and 8 bytes a class."""
    records = []
    for n in (16, 32, 64, 128):
        records.append(_record("ours_torch", 1 + 0.5 * n, 5_000_000, Workload("tiny", n)))
    for v in (100, 200, 400):
        records.append(_record("ours_torch", 5 + 0.008 * v, 4_996_000 + 8 * v, Workload("tiny", 16, v=v)))
    return records


def test_growth_is_fitted_along_each_axis(tmp_path):
    made = runs.Run("run", HEADER, _growing())
    along_n, along_v = growth.series(made)
    assert (along_n.axis, along_v.axis) == ("N", "V")
    for one, time_line, memory_line in ((along_n, (1, 0.5), (5e6, 0)), (along_v, (5, 0.008), (4.996e6, 8))):
        for figure, line in ((runs.median, time_line), (runs.memory, memory_line)):
            found = growth.fit(one.curve("ours_torch", figure))
            assert found == pytest.approx((*line, 0), rel=1e-9, abs=1e-6)
    assert growth.rows(along_v)[0] == ["ours_torch", "5e+03", "8000", "0.0%", "5", "8", "0.0%", "5, 5"]
    text = text_of(made)
    assert "## Growth with N: tiny V=500 D=64 fp32 random on cpu" in text
    bent = _growing()
    bent[1]["seconds"]["both"]["median"] *= 1.5
    assert float(growth.rows(growth.series(runs.Run("run", HEADER, bent))[0])[0][3].rstrip("%")) > 10
    pytest.importorskip("matplotlib")
    assert [path.name for path in plots.draw(made, tmp_path)] == [
        "run-tiny-v500-random-against-n.png",
        "run-tiny-n16-random-against-v.png",
    ]


def test_the_readme_block_is_the_runs(tmp_path):
    workload = Workload("gpt2", 2048)
    made = runs.Run("run", HEADER, _records(workload))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- figures of old -->\nold\n<!-- end of figures -->\nafter\n")
    readme.rewrite(made, page)
    text = page.read_text()
    assert text == "before\n" + readme.block(made) + "after\n"
    row = next(line for line in text.splitlines() if "linear_harmonic_loss" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        "2.00 s (1)",
        "1.00",
        "0.50",
        "4 MB",
        "1e-07",
        "2e-06",
    ]
    assert text.count("Some CPU") == 2  # the table and the plot name their machine
    assert "`liger`: serves cuda only." in text
    assert "Not measured on a GPU" in text
    page.write_text("no block")
    with pytest.raises(UsageError, match="no one block"):
        readme.rewrite(made, page)


@pytest.mark.parametrize(("content", "says"), [("", "header"), ("{}\n", "header"), ('{"kind": "run"}\n{"ki', "line 2")])
def test_a_file_that_is_no_run_is_named(tmp_path, content, says):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UsageError, match=f"x.jsonl.*{says}"):
        runs.load(tmp_path / "x.jsonl")


# --- the other suites, one format ------------------------------------------------------------------------------------


def test_stored_runs_are_in_one_format_and_their_reports_are_what_the_writer_makes():
    """Of every suite there is one; header and rows have the same keys in all."""
    found = [runs.load(path) for path in sorted(runs.RESULTS.glob("*.jsonl"))]
    assert {one.header["suite"] for one in found} == set(SUITES)
    rows = [record for one in found for record in one.records]
    assert set.intersection(*(set(one.header) for one in found)) >= set(HEADER)
    assert set.intersection(*map(set, rows)) == set(runs.blank("any", {}))
    assert {row["status"] for row in rows} <= {"ok", "checked", "skipped", "failed", "failed the gate"}
    for stored in found:
        assert (runs.RESULTS / f"{stored.name}.md").read_text().startswith(text_of(stored))


def test_results_have_one_naming_scheme_and_an_index():
    """Of what is stored for good; a run of one's own may lie beside it unlisted."""
    index = (runs.RESULTS / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)]+)\)", index)
    assert linked and all((runs.RESULTS / name).is_file() for name in linked)
    git = subprocess.run(["git", "ls-files", "."], cwd=runs.RESULTS, capture_output=True, text=True)
    for name in set(git.stdout.split()) - {"README.md"}:
        stem = re.match(r"[a-z0-9]+-(?:cpu|cuda)-[\w.+-]+-\d{8}T\d{6}Z", name)
        assert stem, name
        assert stem[0] in index, name


def test_the_covariance_suite_measures_in_processes_of_its_own(tmp_path, capsys):
    sizes = {"samples": 60, "draws": 300, "buffer": 128, "rounds": 1, "repeats": 2, "threads": 1}
    words = ["--suite", "covariance", *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]
    words += ["--baselines", "ours_panels", "devinterp"]
    assert main([*words, "--devinterp-python", "/no/such/python", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("covariance-*.jsonl")
    run = runs.load(stored)
    assert run.header["command"].endswith("devinterp --devinterp-python PATH")
    assert run.header["settings"] == {"repeats": 2, "rounds": 1}
    by_name = {record["baseline"]: record for record in run.records}
    assert by_name["ours_panels"]["error"] < 1e-6
    assert {len(seconds["values"]) for seconds in by_name["ours_panels"]["seconds"].values()} == {2}
    assert by_name["devinterp"]["status"] == "failed"
    assert "/no/such/python does not run" in by_name["devinterp"]["reason"]
    assert "NOT MEASURED  peak memory, ours / devinterp: ours was not in this run" in capsys.readouterr().out


def test_a_worker_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_SECONDS", 0.01)
    worker = workers.Worker("head_memory", {})
    assert worker.answer() == (None, "it took longer than 0.01 s")


def test_the_covariance_methods_agree():
    pytest.importorskip("scipy")
    losses = covariance_methods.make_losses(50, 300)
    truth = torch.corrcoef(torch.from_numpy(losses).double().T)
    for name, method in covariance_methods.METHODS.items():
        if name in ("ours_panels", "devinterp"):  # the one leaves its process without SciPy, the other is not installed
            continue
        first, whole, rho = method(losses, 128)
        assert 0 <= first <= whole
        torch.testing.assert_close(torch.as_tensor(rho).double(), truth, rtol=0, atol=2e-6)


def test_the_covariance_targets_follow_the_figures():
    def record(name, seconds, memory):
        timing = {step: runs.summary([seconds]) for step in ("second_moment", "correlation")}
        return runs.blank(name, {}) | {"status": "ok", "seconds": timing, "memory_bytes": memory}

    records = {name: record(name, *figures) for name, figures in
               {"ours": (1.0, 10), "scipy_ssyrk": (0.8, 5), "torch_addmm": (2.0, 5), "devinterp": (9.0, 90)}.items()}  # fmt: skip
    lines = [target.judge(records) for target in covariance.TARGETS]
    assert [line.split()[0] for line in lines] == ["FAIL", "FAIL", "PASS", "PASS", "PASS"]
    records["devinterp"] |= {"status": "skipped", "reason": "not installed"}
    assert covariance.TARGETS[-1].judge(records).endswith("devinterp skipped: not installed")


@pytest.mark.slow
def test_the_sampler_suite_measures_its_own_sampler(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "CASES", (sampler.Case(batch=4, chains=2, steps=1, inputs=4, draws=2),))
    assert main(["--suite", "sampler", "--threads", "1", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("sampler-*.jsonl")
    by_name = {record["baseline"]: record for record in runs.load(stored).records}
    assert {name: record["status"] for name, record in by_name.items()} == {
        "ours": "ok", "ours_loop": "ok", "ours_processes": "ok", "devinterp": "skipped",
    }  # fmt: skip
    assert sum(by_name["ours"]["profile"].values()) == pytest.approx(1, abs=0.01)
    assert "| 4     |      2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "heads"], "--suite 'heads' is not known: choose from head, covariance, sampler"),
        (["--suite", "covariance", "--draws", "0"], "--draws 0: give an integer of at least 1"),
        (["--suite", "covariance", "--baselines", "keops"], "--baselines 'keops' is not a method of this suite"),
        (["--suite", "sampler", "--repeats", "0"], "--repeats 0 measures nothing"),
    ],
)
def test_a_bad_request_of_a_suite_is_refused(words, says, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_run_of_no_known_suite_is_refused():
    with pytest.raises(UsageError, match="x: the header's suite '' is not known: choose from head"):
        write(runs.Run("x", {"kind": "run"}), runs.RESULTS)


# --- static cost -----------------------------------------------------------------------------------------------------

SASS = """
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_2:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R103], desc[UR14][R16.64], P3 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/               @P1 LDGSTS.E.BYPASS.128 [R103], desc[UR14][R16.64] ;
        /*0040*/                   IADD3 R8, P2, R26, UR6, RZ ;
        /*0050*/              @!P5 BRA `(.L_x_1) ;
        /*0060*/                   FFMA R1, R2, R3, R4 ;
        /*0070*/              @!P0 MUFU.EX2 R1, R1 ;
        /*0080*/                   FSETP.GT.AND P0, PT, R1, RZ, PT ;
        /*0090*/              @!P5 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP ;
"""


def test_inner_loops_are_found_and_counted():
    found = inner_loops.read(SASS, block_d=64, entries=32)
    assert found.step == {"matrix": 1, "special": 0, "fp32": 0, "memory": 1, "other": 2}
    assert found.tile == {"matrix": 0, "special": 1, "fp32": 2, "memory": 1, "other": 1}
    assert found.per_entry(130) == {
        "matrix": 3 / 32,
        "special": 1 / 32,
        "fp32": 2 / 32,
        "memory": 4 / 32,
        "other": 7 / 32,
    }
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)  # one tile, all features at once
    alone = inner_loops.read(straight, 64, 32)
    assert sum(alone.step.values()) == 0
    assert alone.tile == {"matrix": 1, "special": 1, "fp32": 2, "memory": 4, "other": 1}


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        *((name, "matrix") for name in ("HGMMA", "HMMA", "QGMMA", "DMMA", "UTCHMMA")),
        *((name, "fp32") for name in ("FADD", "FMNMX", "FSEL", "F2FP", "HFMA2", "I2F")),
        *((name, "memory") for name in ("LDG", "LDS", "LDSM", "STG", "STS", "SHFL", "UTMALDG", "RED", "ATOMG")),
        *((name, "other") for name in ("IMAD", "ISETP", "BAR", "SEL", "WARPGROUP", "FENCE", "EXIT")),
        ("MUFU", "special"),
    ],
)
def test_every_instruction_has_its_class(opcode, kind):
    assert inner_loops.classify(opcode) == kind


def test_predictions_follow_counts_and_limits():
    loops = inner_loops.Loops(dict.fromkeys(inner_loops.CLASSES, 0), dict.fromkeys(inner_loops.CLASSES, 0), 64, 1)
    loops.tile["special"] = 2
    machine_ = inner_loops.Machine(products=1e12, copy=1e12, special=1e9, issue=1e10)
    strategy = inner_loops.Strategy("one", (inner_loops.Pass("k", "", 1, 4),))
    best, worst = inner_loops.predict(strategy, "dot", {("k", "dot"): loops}, (1000, 500, 2000), machine_)
    unit = 2 * 1000 * 500 * 2000 / 1e12
    special = 2 * 1000 * 2000 / 1e9
    rest = (8 * (1000 + 2000) * 500 + 2 * 2000 * 500) / 1e12 + inner_loops.LAUNCHES
    assert best == pytest.approx(
        2 * unit + special + rest
    )  # the special functions take 4 ms, one product 2 ms, memory 8 us
    assert worst == pytest.approx(3 * unit + special + rest)
    slow = inner_loops.Machine(
        products=1e12, copy=1e12, cache=1e9, special=1e9, issue=1e10
    )  # operands of tiles of 128 x 256 come from the L2 cache
    loads = 2 * 500 * 1000 * 2000 * (1 / 128 + 1 / 256) / 1e9
    assert inner_loops.predict(strategy, "dot", {("k", "dot"): loops}, (1000, 500, 2000), slow)[1] == pytest.approx(
        2 * unit + loads + special + rest
    )


def test_occupancy_is_what_registers_and_shared_memory_leave():
    assert static_cost.occupancy("sm90", registers=176, shared=73728, warps=8) == 8 / 64  # 45056 of 65536 registers
    assert static_cost.occupancy("sm90", registers=32, shared=0, warps=8) == 1.0
    assert static_cost.occupancy("sm80", registers=64, shared=80 * 1024, warps=4) == 8 / 64  # two programs of 81 KiB


# --- command line ----------------------------------------------------------------------------------------------------


def plan_of(words):
    suite, arguments = parse_arguments(words)
    assert suite is head.SUITE
    return head.make_plan(arguments)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workload", "gpt5"], "--workload 'gpt5' is not known: choose from tiny"),
        (["--dtype", "int8"], "--dtype 'int8' is not known: choose from fp32"),
        (["--inputs", "zeros"], "--inputs 'zeros' is not known: choose from random, trained, solved"),
        (["--n", "0"], "--n 0 "),
        (["--repeats", "0"], "--repeats 0 "),
        (["--threads", "0"], "--threads 0 "),
        (["--baselines", "apex"], "--baselines 'apex' is not registered: choose from ours_torch"),
        (["--once", "apex"], "--once 'apex' is not registered"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--v", "0"], "--v 0 "),
        (["--patience", "0"], "--patience 0.0 "),
        (["--quick", "--n", "64"], "--quick chooses --n itself"),
        (["--growth", "--v", "64"], "--growth chooses --v itself"),
        (["--growth", "--quick"], "drop one"),
    ],
)
def test_a_bad_request_is_refused_before_any_work(words, says, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.head.run", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UsageError, match=says):
        plan_of(words)
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_a_request_becomes_a_plan():
    plan = plan_of(["--n", "1024", "2048", "--inputs", "trained", "random", "--device", "cpu"])
    assert [(w.model, w.inputs, w.tokens) for w in plan.workloads] == [
        ("gpt2", "trained", 1024),
        ("gpt2", "trained", 2048),
        ("gpt2", "random", 1024),
        ("gpt2", "random", 2048),
    ]
    assert plan.repeats == 5
    assert (plan.workloads[0].dim, plan.workloads[0].classes) == (768, 50257)
    assert {"gpt2", "gpt2-xl", "llama-3.2-1b", "llama-3-8b", "gemma-2-2b"} <= MODELS.keys()


def test_growth_varies_n_at_one_v_and_v_at_one_n():
    shapes = [(w.tokens, w.classes) for w in plan_of(["--growth", "--device", "cpu"]).workloads]
    assert len({n for n, v in shapes if v == 16384}) >= growth.POINTS
    assert len({v for n, v in shapes if n == 2048}) >= growth.POINTS
    assert len(set(shapes)) == len(shapes)


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
        assert sum(step.seconds for step in planned if not step.optional) <= gpu.BUDGET_SECONDS < 600
        assert [step.name for step in planned][:4] == ["doctor", "compile", "verify", "tests"]
        assert {step.name for step in planned if step.optional} == {"counters", "memcheck"}


def test_the_gpu_scripts_benchmarks_are_requests_that_can_be_served(tmp_path):
    measured = [
        step.command for tiny in (False, True) for step in gpu.steps(tiny, tmp_path) if "benchmarks" in step.command
    ]
    assert len(measured) == 5
    for command in measured:
        suite, arguments = parse_arguments(command[2:])
        arguments.device = "cpu"
        assert suite is head.SUITE
        assert arguments.out == tmp_path
        assert head.make_plan(arguments).workloads


def python_step(name, program, seconds=20, **options):
    return gpu.Step(name, (sys.executable, "-c", program), seconds, **options)


def test_a_gpu_step_that_fails_hangs_or_dies_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 2)
    failed = gpu.run_step(python_step("failing", "print('why'); raise SystemExit(3)"), tmp_path, 100)
    assert (failed["status"], failed["reason"], failed["tail"]) == ("exit status 3", "why", ["why"])
    dead = gpu.run_step(python_step("dying", "import os; os.kill(os.getpid(), 11)"), tmp_path, 100)
    assert (dead["status"], dead["reason"]) == ("killed by signal 11", "it printed nothing")
    # asked to end first, so that it can say what it has seen; then made to
    late = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('seen'); time.sleep(60)"
    stopped = gpu.run_step(python_step("hanging", late, 1), tmp_path, 100)
    assert (stopped["status"], stopped["reason"]) == ("stopped after 1 s", "seen")
    absent = gpu.run_step(gpu.Step("absent", ("/no/such/program",), 5), tmp_path, 100)
    assert absent["status"] == "failed" and "/no/such/program" in absent["reason"]
    assert gpu.run_step(python_step("late", "pass"), tmp_path, 1)["status"] == "not reached"
    assert gpu.run_step(python_step("late", "pass", optional=True), tmp_path, 1)["status"] == "skipped"
    assert gpu.run_step(python_step("none", "pass", skip="no such tool"), tmp_path, 100)["reason"] == "no such tool"
    log = (tmp_path / "log.txt").read_text()
    assert log.index("=== failing") < log.index("why\n") < log.index("=== dying")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_gpu_run_that_is_ended_leaves_its_record(number, tmp_path):
    """At the second of three steps: what was done, what was running, and what was not reached."""
    program = f"""if True:
        import signal, sys
        from pathlib import Path
        from benchmarks import gpu
        signal.signal(signal.SIGTERM, gpu.stop)
        one, two = "print('done')", "import time; print('half', flush=True); time.sleep(20)"
        planned = [gpu.Step(str(k), (sys.executable, "-c", words), 50) for k, words in enumerate((one, two, one))]
        gpu.run_all(planned, Path({str(tmp_path)!r}), {{"machine": "here"}}, 100)"""
    run = subprocess.Popen([sys.executable, "-c", program], cwd=machine.ROOT)
    log = tmp_path / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.exists() and "half" in log.read_text().split("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(number)
    run.wait(timeout=30)
    summary = json.loads((tmp_path / "summary.json").read_text())
    last = "stopped" if number == signal.SIGTERM else "running"
    assert [step["status"] for step in summary["steps"]] == ["ok", last, "not reached"]
    assert summary["machine"] == "here" and summary["steps"][0]["tail"] == ["done"]
