"""python -m harmonic_triton loss-kernel: entry points found and checked, a run written, resumed and refused."""

import csv
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import fresh
import pytest
import torch
from torch import nn

from harmonic_triton.__main__ import main
from harmonic_triton.losskernel import cli, entry_point, tables
from harmonic_triton.losskernel.kernel import LossKernel
from harmonic_triton.losskernel.sampling.config import SGLDConfig

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
PROGRAM = fresh.module("harmonic_triton")
QUICK = [
    *("--num-chains", "2", "--num-draws", "30", "--num-burnin-steps", "5"),
    *("--batch-size", "16", "--num-steps-bw-draws", "1", "--quiet"),
]

ENTRY = """
import torch
from torch import nn
from harmonic_triton.losskernel.per_sample_losses import regression_loss

def data(seed="0", rows="12"):
    generator = torch.Generator().manual_seed(int(seed))
    x = torch.randn(64, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(64, generator=generator)
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 0.5]])); model[0].bias.zero_()
    return model, regression_loss, (x, y), (x[:int(rows)], y[:int(rows)])

def named(**arguments):
    keys = ("model", "per_sample_loss", "train_data", "eval_data")
    task = dict(zip(keys, data(**arguments)))
    count = len(task["eval_data"][1])
    return {**task, "labels": torch.arange(count) % 3, "names": [f"sample\\t{i}" for i in range(count)],
            "groups": torch.arange(count) // 4, "group_names": ["first", "second", "third"]}

def nothing(): return None
def three(): return data()[:3]
def no_data(): return {"model": data()[0], "per_sample_loss": regression_loss, "train_data": data()[2]}
def extra(): return {**named(), "batch": 3}
def not_a_model(): return (3, *data()[1:])
def not_a_loss(): return (data()[0], "cross_entropy", *data()[2:])
def mean_loss(): return (data()[0], lambda model, batch: regression_loss(model, batch).mean(), *data()[2:])
def failing_loss(): return (data()[0], lambda model, batch: model(batch), *data()[2:])
def float_labels(): return {**named(), "labels": torch.rand(12)}
def short_labels(): return {**named(), "labels": torch.arange(5)}
def few_names(): return {**named(), "group_names": ["one"]}
def raising(): raise FileNotFoundError("no weights.pt here")
value = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An entry-point module in the working directory."""
    (tmp_path / "entry_points.py").write_text(ENTRY)
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "wanting.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "entry_points", raising=False)
    return tmp_path


def command(entry, *more):
    return main(["loss-kernel", entry, *QUICK, "--no-report", *more])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("entry_points", "is no entry point: write package.module:function"),
        ("nowhere.at_all:function", "there is no module 'nowhere'"),
        ("wanting:f", "wanting needs 'not_installed_anywhere', which is not installed"),
        ("broken_module:f", "broken_module fails while it is imported: ZeroDivisionError: division by zero"),
        ("entry_points:absent", "entry_points has no 'absent'; it has data, extra"),
        ("entry_points:value", "entry_points:value is int, not a function"),
        ("entry_points:nothing", "returned NoneType, expected a dict with model (nn.Module), per_sample_loss"),
        ("entry_points:three", "returned tuple of 3, expected a dict with model"),
        ("entry_points:no_data", "returned a dict without eval_data; expected"),
        ("entry_points:extra", "returned a dict with batch; expected"),
        ("entry_points:not_a_model", "model is int, expected nn.Module"),
        ("entry_points:not_a_loss", "per_sample_loss is str, expected a function of (model, batch)"),
        ("entry_points:mean_loss", "per_sample_loss gives a tensor of shape () for one sample, expected (1,)"),
        (
            "entry_points:failing_loss",
            "per_sample_loss(model, batch) fails on the first sample of eval_data: TypeError",
        ),
        ("entry_points:float_labels", "labels is Tensor of shape (12,), torch.float32, expected (m,) integers"),
        ("entry_points:short_labels", "labels has 5 entries, but eval_data gives 12 losses"),
        ("entry_points:few_names", "groups hold 2, group_names has 1"),
        ("entry_points:raising", "entry_points:raising failed: FileNotFoundError: no weights.pt here"),
    ],
)
def test_an_entry_point_that_cannot_serve_is_one_line_that_says_what_was_expected(here, capsys, entry, message):
    assert command(entry, "--out", "out") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", shown.err)
    assert not (here / "out").exists()


def test_arguments_reach_the_entry_point_and_wrong_ones_are_named(here, capsys):
    assert len(entry_point.load("entry_points:data", ["rows=7"]).eval_data[0]) == 7
    assert command("entry_points:data", "--entry-arg", "rows") == 2
    assert "--entry-arg 'rows': write name=value" in capsys.readouterr().err
    assert command("entry_points:data", "--entry-arg", "lines=7") == 2
    assert "unexpected keyword argument 'lines'" in capsys.readouterr().err


def test_a_run_writes_the_kernel_of_its_options(here, capsys):
    arguments = ("entry_points:named", "--out", "out", "--lr", "1e-3", "--nbeta", "50", "--localization", "10")
    assert command(*arguments, "--seed", "3", "--neighbors", "4", "--table", "5") == 0
    kernel = LossKernel.load(here / "out" / "kernel.safetensors")
    results = json.loads((here / "out" / "results.json").read_text())
    given = {"lr": 1e-3, "nbeta": 50, "localization": 10, "num_chains": 2, "num_draws": 30, "num_burnin_steps": 5}
    assert results["config"] == {**results["config"], **given, "batch_size": 16}
    assert (results["samples"], results["draws"], results["seed"]) == (12, 60, 3)
    assert results["mean_loss"] == pytest.approx(kernel.mean.mean().item())
    assert results["diagnostics"][0]["value"] == "2 of 2 alive"

    rows = list(csv.DictReader((here / "out" / "neighbors.tsv").open(), delimiter="\t"))
    assert len(rows) == 5 * 4
    assert {int(row["sample"]) for row in rows} == {0, 3, 6, 8, 11}
    for row in rows:
        i, j = int(row["sample"]), int(row["neighbor"])
        assert i % 3 != j % 3  # labels are left out
        assert row["neighbor_name"] == f"sample {j}"
        # a distance holds ρ to the rounding of 4 digits
        assert float(row["rho"]) == pytest.approx(kernel.correlation[i, j].item(), abs=6e-5)
    shown = capsys.readouterr().out
    assert "2 of 2 alive" in shown
    assert "groups whose mean losses move together" in shown
    assert [line.split("\t")[0] for line in (here / "out" / "groups.tsv").read_text().splitlines()[1:]] == [
        *("first", "second", "third")
    ]
    assert not (here / "out" / "report.html").exists()


def test_the_same_command_goes_on_and_another_is_refused(here, capsys):
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 0
    first = LossKernel.load(here / "out" / "kernel.safetensors")
    assert command(*arguments) == 0
    again = LossKernel.load(here / "out" / "kernel.safetensors")
    assert torch.equal(first.covariance, again.covariance)
    capsys.readouterr()
    assert command(*arguments, "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err
    assert command(*arguments, "--seed", "1", "--no-resume") == 0
    assert not torch.equal(first.covariance, LossKernel.load(here / "out" / "kernel.safetensors").covariance)


def test_an_interrupted_run_goes_on_to_the_same_bits(here, monkeypatch, capsys):
    from harmonic_triton.losskernel import per_sample_losses

    plain, calls, stop = per_sample_losses.regression_loss, [], math.inf

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return plain(model, batch)

    import entry_points

    interrupted.__qualname__ = plain.__qualname__
    monkeypatch.setattr(entry_points, "regression_loss", interrupted)
    assert command("entry_points:data", "--out", "whole") == 0
    needed = len(calls)
    stop = needed + needed * 3 // 4
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (here / "out" / "kernel.safetensors").exists()
    before = len(calls)
    assert command(*arguments) == 0
    whole, resumed = (LossKernel.load(here / out / "kernel.safetensors") for out in ("whole", "out"))
    assert torch.equal(whole.covariance, resumed.covariance)
    assert torch.equal(whole.mean, resumed.mean)
    assert len(calls) - before < needed * 3 // 4  # it did not start over


def test_the_probe_is_taken_from_the_curvature_where_it_is_not_given(here):
    """A linear model's Hessian is known: nbeta λmax(H) is the localization, 0.15 · 4/(2 nbeta λmax) the step size."""
    options = parsed("entry_points:data", "--batch-size", "64", "--nbeta", "40")
    task = entry_point.load("entry_points:data", [])
    config = cli.configured(options, task)
    x = torch.cat([task.train_data[0], torch.ones(64, 1)], 1)
    curvature = 40 * torch.linalg.eigvalsh(x.T @ x / 64).max().item()
    # power iterations come from below and are within a few per cent after twelve
    assert config.localization == pytest.approx(curvature, rel=0.1)
    assert config.lr == pytest.approx(cli.STABILITY * 4 / (2 * curvature), rel=0.1)
    chosen = cli.configured(parsed("entry_points:data", "--lr", "1e-4", "--localization", "3"), task)
    assert (chosen.lr, chosen.localization) == (1e-4, 3)
    assert chosen.nbeta == pytest.approx(64 / torch.tensor(64.0).log().item())


def test_the_tuner_chooses_what_is_not_given(here, capsys):
    tune = ("--tune", "--target-excess", "0.01", "--num-chains", "2", "--num-draws", "20", "--quiet")
    task = entry_point.load("entry_points:data", [])
    config = cli.configured(parsed("entry_points:data", *tune, "--nbeta", "64", "--batch-size", "64"), task)
    assert (config.nbeta, config.batch_size, config.num_chains, config.num_draws) == (64, 64, 2, 20)
    # of a quadratic loss the excess is half the trace of H (nbeta H + gamma)^-1
    x = torch.cat([task.train_data[0], torch.ones(64, 1)], 1)
    h = torch.linalg.eigvalsh(x.T @ x / 64)
    excess = (h / (64 * h + config.localization)).sum() / 2
    assert excess.item() == pytest.approx(0.01, rel=0.6)  # the tuner takes a localization within a factor
    assert command("entry_points:data", "--tune", "--lr", "1e-3") == 2
    assert "leave --lr, --num-burnin-steps, --num-steps-bw-draws out" in capsys.readouterr().err


def parsed(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def test_every_field_of_the_configuration_is_an_option():
    values = {"lr": 0.5, "nbeta": 2.0, "localization": 3.0, "method": "rmsprop", "rmsprop_decay": 0.5}
    values |= {"rmsprop_eps": 0.25, "sgnht_friction": 0.75}
    for name in SGLDConfig.__dataclass_fields__:
        value = values.get(name, 7)
        options = parsed("a:b", "--" + name.replace("_", "-"), str(value))
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value)


def test_groups_correlate_as_the_covariance_of_their_mean_standardised_losses(tmp_path):
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(2, 200, 9, generator=generator)
    losses[..., 3:6] += losses[..., :3]
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 3])
    for keep in ("covariance", "traces"):
        kernel = LossKernel.from_losses(losses, keep=keep)
        found = tables.group_correlation(kernel, groups)
        flat = losses.flatten(0, 1).double()
        z = (flat - flat.mean(0)) / flat.std(0)
        means = torch.stack([z[:, groups == g].mean(1) for g in (0, 1, 3)], 1)
        # traces are stored in bfloat16, which moves a correlation by a few 1e-4
        torch.testing.assert_close(found[[0, 1, 3]][:, [0, 1, 3]], torch.corrcoef(means.T), atol=2e-3, rtol=0)
        assert not found[2].any()
    lines = tables.write_groups(tmp_path / "groups.tsv", found, ["a", "b", "empty", "c"])
    assert len(lines) == 4
    assert lines[1].startswith("a\tb 0.")
    assert "empty" not in "".join(lines)


def test_as_a_program_with_a_report(here):
    arguments = ["entry_points:named", *QUICK, "--out", "out", "--entry-arg", "rows=12", "--embedding", "pca"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = fresh.run(PROGRAM, "loss-kernel", *arguments, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr
    page = (here / "out" / "report.html").read_text()
    assert "Loss kernel of entry_points:named" in page
    assert "sample 11" in page or "sample\t11" in page
    assert done.stdout.rstrip().endswith("report.html")


def test_missing_packages_are_named_before_any_work(here, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "umap" else real(name, *more))
    assert main(["loss-kernel", "entry_points:data", *QUICK, "--out", "out"]) == 2
    assert (
        "umap not installed: pip install 'harmonic-triton[analysis]' (from a clone: pip install '.[analysis]'),"
        " or leave the report out" in capsys.readouterr().err
    )
    assert command("entry_points:data", "--out", "out") == 0


def test_the_flat_loss_asks_for_a_localization(here):
    task = entry_point.Task(
        nn.Linear(1, 1), lambda model, batch: 0 * model(batch[0]).flatten(), *([(torch.ones(4, 1),)] * 2)
    )
    with pytest.raises(ValueError, match="give --localization"):
        cli.configured(parsed("a:b"), task)


# --- a run goes on as it began, and says beforehand how long it takes --------------------------------------------------


def test_a_run_goes_on_with_the_settings_it_began_with(here, monkeypatch, capsys):
    """Estimates move in the last digits with the number of threads; the run's own values are in its checkpoint."""
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 0
    first = LossKernel.load(here / "out" / "kernel.safetensors")
    began = json.loads((here / "out" / "results.json").read_text())["config"]

    def other_threads(*given, **options):
        raise AssertionError("a run that goes on estimates nothing")

    monkeypatch.setattr(cli, "stability_bound", other_threads)
    capsys.readouterr()
    assert command(*arguments) == 0, capsys.readouterr().err
    assert "goes on from" in capsys.readouterr().out
    assert json.loads((here / "out" / "results.json").read_text())["config"] == began
    assert torch.equal(first.covariance, LossKernel.load(here / "out" / "kernel.safetensors").covariance)
    # what is given otherwise is refused by name, and the settings stay
    assert command(*arguments, "--lr", "1e-5") == 2
    assert re.search(r"\blr\b", capsys.readouterr().err)
    assert command(*arguments, "--num-draws", "31") == 2
    assert "num_draws" in capsys.readouterr().err
    assert command(*arguments) == 0
    # the same value given by name is the same run
    assert command(*arguments, "--lr", repr(began["lr"]), "--nbeta", repr(began["nbeta"])) == 0


@pytest.mark.slow
def test_another_estimate_is_no_reason_to_refuse_a_checkpoint(here, capsys):
    """Another number of threads, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["loss-kernel", "entry_points:data", *QUICK, "--no-report", "--out", "out"]
    for threads in ("1", "2", "1"):
        done = fresh.run(PROGRAM, *words, env={**environment, "OMP_NUM_THREADS": threads}, cwd=here)
        assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stdout


@pytest.mark.parametrize("content", ["{", '{"lr": 1}', "[]", '{"lr": 1, "speed": 2}'])
def test_settings_that_cannot_be_read_are_an_error_that_says_what_to_do(here, capsys, content):
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 0
    (here / "out" / "checkpoint" / cli.PROBE_FILE).write_text(content)
    capsys.readouterr()
    assert command(*arguments) == 2
    assert re.search(r"probe\.json holds no settings of a run .*--no-resume", capsys.readouterr().err)
    assert command(*arguments, "--no-resume") == 0


def test_settings_without_a_checkpoint_are_estimated_anew(here):
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 0
    for path in (here / "out" / "checkpoint").glob("kernel-*.pt"):
        path.unlink()
    assert command(*arguments, "--nbeta", "100") == 0
    config = json.loads((here / "out" / "results.json").read_text())["config"]
    task = entry_point.load("entry_points:data", [])
    anew = cli.configured(parsed("entry_points:data", *QUICK, "--nbeta", "100"), task)
    assert config["lr"] == pytest.approx(anew.lr) and config["localization"] == pytest.approx(anew.localization)


SLOW = """
import time
from entry_points import data
from harmonic_triton.losskernel.per_sample_losses import regression_loss

def slow_loss(model, batch):
    time.sleep(0.01)
    return regression_loss(model, batch)

def slow(): return (data()[0], slow_loss, *data()[2:])
"""


def test_the_expected_time_is_said_before_it_passes(here, capsys, monkeypatch):
    """Every pass takes 10 ms: a step is one of a minibatch, a reading one of the 12 samples."""
    (here / "slow_entry.py").write_text(SLOW)
    monkeypatch.delitem(sys.modules, "slow_entry", raising=False)
    options = parsed("slow_entry:slow", "--chain-group-size", "1", "--num-chains", "3", "--num-draws", "40",
                     "--num-burnin-steps", "10", "--num-steps-bw-draws", "2", "--lr", "1e-4", "--localization", "10",
                     "--batch-size", "16")  # fmt: skip
    task = entry_point.load("slow_entry:slow", [])
    config = cli.configured(options, task)
    expected = 3 * ((10 + 40 * 2) * 0.01 + 40 * 0.01)
    assert expected / 1.5 < cli.expected_seconds(options, task, config) < 4 * expected  # a busy machine is slower
    words = ["loss-kernel", "entry_points:data", *QUICK[:-1], "--no-report", "--out", "out"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"sampling takes less than a minute on this machine: 2 chains of 35 steps and 30 draws, each of 12 losses", said
    )
    assert said.index("sampling takes") < said.index("alive")
    assert main(words) == 0
    assert "sampling takes" not in capsys.readouterr().out  # it goes on: the progress bar knows better


def test_announcements_grow_with_the_time():
    config = SGLDConfig(lr=1, nbeta=1, localization=1, batch_size=1, num_chains=2, num_draws=5)
    said = {seconds: cli.announcement(seconds, config, 1000) for seconds in (5, 200, 1200, 9000)}
    assert "less than a minute" in said[5] and "about 3 minutes" in said[200]
    assert "about 20 minutes" in said[1200] and "about 2.5 hours" in said[9000]
    assert ["--quick" in text for text in said.values()] == [False, False, True, True]


def test_quick_is_a_setting_that_single_options_overrule(here, capsys):
    task = entry_point.load("entry_points:data", [])
    config = cli.configured(parsed("entry_points:data", "--quick", "--num-draws", "7"), task)
    found = {name: getattr(config, name) for name in cli.QUICK}
    assert found == {**cli.QUICK, "num_draws": 7}
    options = parsed("entry_points:data", "--quick", "--tune", "--target-excess", "0.01", "--quiet")
    assert cli.configured(options, task).num_draws == cli.QUICK["num_draws"]


def test_both_estimates_come_from_one(here, monkeypatch):
    """lr and localization need one largest curvature; two estimates are twice two dozen gradients of a large model."""
    real, calls = cli.stability_bound, []
    monkeypatch.setattr(cli, "stability_bound", lambda *given, **options: calls.append(1) or real(*given, **options))
    task = entry_point.load("entry_points:data", [])
    for given in ([], ["--lr", "1e-4"], ["--localization", "3"], ["--lr", "1e-4", "--localization", "3"]):
        calls.clear()
        cli.configured(parsed("entry_points:data", *given), task)
        assert len(calls) == (len(given) < 4)


@pytest.mark.parametrize(("option", "value"), [("--neighbors", "0"), ("--neighbors", "-3"), ("--table", "-1")])
def test_tables_of_no_size_are_refused_before_any_work(here, capsys, option, value):
    assert command("entry_points:data", "--out", "out", option, value) == 2
    assert f"{option} must be at least" in capsys.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize("rows", ["1", "2"])
def test_kernels_of_one_and_two_samples_are_written(here, rows):
    words = ["loss-kernel", "entry_points:data", *QUICK, "--out", "out", "--entry-arg", f"rows={rows}"]
    assert main(words) == 0
    lines = (here / "out" / "neighbors.tsv").read_text().splitlines()
    assert len(lines) == 1 + (2 if rows == "2" else 0)
    assert (here / "out" / "report.html").exists()


def test_negative_groups_are_refused(here, capsys):
    (here / "negative.py").write_text(
        "from entry_points import named\nimport torch\ndef groups(): return {**named(), 'groups': torch.arange(12) % 3 - 1}\n"
    )
    assert command("negative:groups", "--out", "out") == 2
    assert "groups hold -1; number them from 0 on" in capsys.readouterr().err


def test_draws_kept_in_float32(here):
    assert command("entry_points:data", "--out", "out", "--keep", "traces", "--trace-dtype", "float32") == 0
    assert LossKernel.load(here / "out" / "kernel.safetensors").accumulator.dtype == torch.float32


RANKED = """
import atexit, os, torch
from entry_points import data

def ranked():
    meeting, rank = "file://" + os.environ["MEETING"], int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    atexit.register(torch.distributed.destroy_process_group)  # an older PyTorch aborts where nobody does
    return data()
"""


def test_two_processes_start_over_together(here):
    """One of them removes the checkpoint, and none begins before it is gone."""
    (here / "ranked_entry.py").write_text(RANKED)
    words = ["loss-kernel", "ranked_entry:ranked", *QUICK, "--no-report", "--lr", "1e-4", "--localization", "10",
             "--out", "out"]  # fmt: skip
    path = os.pathsep.join([str(here), str(ROOT)])
    for attempt in range(2):
        environment = {**os.environ, "PYTHONPATH": path, "MEETING": str(here / f"meeting-{attempt}"),
                       "OMP_NUM_THREADS": "1"}  # fmt: skip
        more = ["--no-resume"] if attempt else []
        started = [
            fresh.Started(PROGRAM, *words, *more, cwd=here, env={**environment, "RANK": str(rank)}) for rank in range(2)
        ]
        ended = [process.wait(timeout=120) for process in started]
        assert [done.returncode for done in ended] == [0, 0], ended
