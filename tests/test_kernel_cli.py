"""python -m harmonic_triton loss-kernel: entry points found and checked, a run written, resumed and refused."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harmonic_triton import kernel_cli
from harmonic_triton.__main__ import main
from harmonic_triton.loss_kernel import LossKernel
from harmonic_triton.sgld import SGLDConfig

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[1]
QUICK = [
    *("--num-chains", "2", "--num-draws", "30", "--num-burnin-steps", "5"),
    *("--batch-size", "16", "--num-steps-bw-draws", "1", "--quiet"),
]

ENTRY = """
import torch
from torch import nn
from harmonic_triton.losses import regression_loss

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
    assert len(kernel_cli.load("entry_points:data", ["rows=7"]).eval_data[0]) == 7
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
    assert command("entry_points:data", "--out", "whole") == 0
    from harmonic_triton import losses

    plain, calls = losses.regression_loss, []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 120:
            raise KeyboardInterrupt
        return plain(model, batch)

    import entry_points

    interrupted.__qualname__ = plain.__qualname__
    monkeypatch.setattr(entry_points, "regression_loss", interrupted)
    arguments = ("entry_points:data", "--out", "out", "--checkpoint-seconds", "0")
    assert command(*arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (here / "out" / "kernel.safetensors").exists()
    before = len(calls)
    assert command(*arguments) == 0
    whole, resumed = (LossKernel.load(here / out / "kernel.safetensors") for out in ("whole", "out"))
    assert torch.equal(whole.covariance, resumed.covariance)
    assert torch.equal(whole.mean, resumed.mean)
    assert len(calls) - before < before + 60  # it did not start over: a whole run takes more than 120 calls


def test_the_probe_is_taken_from_the_curvature_where_it_is_not_given(here):
    """A linear model's Hessian is known: nbeta λmax(H) is the localization, 0.15 · 4/(2 nbeta λmax) the step size."""
    options = parsed("entry_points:data", "--batch-size", "64", "--nbeta", "40")
    task = kernel_cli.load("entry_points:data", [])
    config = kernel_cli.configured(options, task)
    x = torch.cat([task.train_data[0], torch.ones(64, 1)], 1)
    curvature = 40 * torch.linalg.eigvalsh(x.T @ x / 64).max().item()
    # power iterations come from below and are within a few per cent after twelve
    assert config.localization == pytest.approx(curvature, rel=0.1)
    assert config.lr == pytest.approx(kernel_cli.STABILITY * 4 / (2 * curvature), rel=0.1)
    chosen = kernel_cli.configured(parsed("entry_points:data", "--lr", "1e-4", "--localization", "3"), task)
    assert (chosen.lr, chosen.localization) == (1e-4, 3)
    assert chosen.nbeta == pytest.approx(64 / torch.tensor(64.0).log().item())


def test_the_tuner_chooses_what_is_not_given(here, capsys):
    tune = ("--tune", "--target-excess", "0.01", "--num-chains", "2", "--num-draws", "20", "--quiet")
    task = kernel_cli.load("entry_points:data", [])
    config = kernel_cli.configured(parsed("entry_points:data", *tune, "--nbeta", "64", "--batch-size", "64"), task)
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
    kernel_cli.add_arguments(parser)
    return parser.parse_args(arguments)


def test_every_field_of_the_configuration_is_an_option():
    values = {"lr": 0.5, "nbeta": 2.0, "localization": 3.0, "method": "rmsprop", "rmsprop_decay": 0.5}
    values |= {"rmsprop_eps": 0.25, "sgnht_friction": 0.75}
    for name in SGLDConfig.__dataclass_fields__:
        value = values.get(name, 7)
        options = parsed("a:b", "--" + name.replace("_", "-"), str(value))
        assert getattr(options, name) == value
        assert type(getattr(options, name)) is type(value)


def test_groups_correlate_as_the_covariance_of_their_mean_standardised_losses():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(2, 200, 9, generator=generator)
    losses[..., 3:6] += losses[..., :3]
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 3])
    for keep in ("covariance", "traces"):
        kernel = LossKernel.from_losses(losses, keep=keep)
        found = kernel_cli.group_correlation(kernel, groups)
        flat = losses.flatten(0, 1).double()
        z = (flat - flat.mean(0)) / flat.std(0)
        means = torch.stack([z[:, groups == g].mean(1) for g in (0, 1, 3)], 1)
        # traces are stored in bfloat16, which moves a correlation by a few 1e-4
        torch.testing.assert_close(found[[0, 1, 3]][:, [0, 1, 3]], torch.corrcoef(means.T), atol=2e-3, rtol=0)
        assert not found[2].any()
    lines = kernel_cli.write_groups(Path(os.devnull), found, ["a", "b", "empty", "c"])
    assert len(lines) == 4
    assert lines[1].startswith("a\tb 0.")
    assert "empty" not in "".join(lines)


def test_as_a_program_with_a_report(here):
    arguments = ["entry_points:named", *QUICK, "--out", "out", "--entry-arg", "rows=12", "--embedding", "pca"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "harmonic_triton", "loss-kernel", *arguments],
        capture_output=True, text=True, env=environment, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (here / "out" / "report.html").read_text()
    assert "Loss kernel of entry_points:named" in page
    assert "sample 11" in page or "sample\t11" in page
    assert done.stdout.rstrip().endswith("report.html")


def test_missing_packages_are_named_before_any_work(here, capsys, monkeypatch):
    real = kernel_cli.importlib.util.find_spec
    monkeypatch.setattr(
        kernel_cli.importlib.util, "find_spec", lambda name, *more: None if name == "umap" else real(name, *more)
    )
    assert main(["loss-kernel", "entry_points:data", *QUICK, "--out", "out"]) == 2
    assert (
        "umap not installed: pip install 'harmonic-triton[analysis]', or leave the report out"
        in capsys.readouterr().err
    )
    assert command("entry_points:data", "--out", "out") == 0


def test_the_flat_loss_asks_for_a_localization(here):
    task = kernel_cli.Task(
        nn.Linear(1, 1), lambda model, batch: 0 * model(batch[0]).flatten(), *([(torch.ones(4, 1),)] * 2)
    )
    with pytest.raises(ValueError, match="give --localization"):
        kernel_cli.configured(parsed("a:b"), task)
