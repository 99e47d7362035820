"""The loss-kernel examples: their data are what they say, their measures find what is there, their runs are whole."""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

for package in ("scipy", "sklearn", "matplotlib", "tokenizers", "tqdm", "safetensors"):
    pytest.importorskip(package)

from examples.loss_kernel import arithmetic, development, figures, gamma, gpt, hierarchies, mislabeled, modular, tokens  # noqa: E402
from examples.loss_kernel.__main__ import EXPERIMENTS, expectation, main  # noqa: E402
from examples.loss_kernel.experiment import Clock  # noqa: E402
from examples.train_gpt import train as train_gpt  # noqa: E402
from harmonic_triton.losskernel.kernel import LossKernel  # noqa: E402
from harmonic_triton.losskernel.sampling.config import SGLDConfig  # noqa: E402

ROOT = Path(__file__).parents[1]
FEW = {"num_chains": 2, "num_draws": 30, "num_burnin_steps": 5, "embedding": False}


# --- addition and division -------------------------------------------------------------------------------------------


def test_the_pairs_are_those_of_both_tasks():
    inputs, results, task = arithmetic.all_pairs()
    assert len(results) == 97 * 97 + 97 * 96 == 18721
    a, b = (inputs % 97).unbind(1)
    assert torch.equal(((a + b) % 97)[task == 0], results[task == 0])
    assert torch.equal((results * b % 97)[task == 1], a[task == 1])  # c = a/b means c b = a
    assert (b[task == 1] > 0).all()
    for values in (inputs, results):  # no token and no result belongs to both tasks
        assert values[task == 0].max() < 97 <= values[task == 1].min()
    assert len({tuple(pair) for pair in inputs.tolist()}) == 18721


def test_the_last_position_alone_is_what_the_whole_sequence_gives_there():
    torch.manual_seed(0)
    model = arithmetic.Transformer(modulus=7, width=16, heads=2, layers=3)
    inputs = torch.randint(14, (5, 2))
    x = model.tokens(inputs) + model.positions.weight
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model(inputs), model.head(model.norm(x))[:, -1])
    changed = inputs.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 14
    assert not torch.allclose(model(inputs), model(changed))  # the first position is seen


def test_checkpoints_are_of_the_steps_asked_for():
    pairs = arithmetic.all_pairs(5)

    def run(keep):
        torch.manual_seed(1)
        model = arithmetic.Transformer(modulus=5, width=8, heads=2, layers=1)
        start = model.state_dict()["head.weight"].clone()
        options = {"steps": 12, "lr": 1e-2, "weight_decay": 1.0, "batch_size": 8, "warmup": 2}
        return start, arithmetic.train(model, pairs.inputs, pairs.results, keep=keep, **options), model

    start, kept, model = run((0, 5, 12))
    assert sorted(kept) == [0, 5, 12]
    assert torch.equal(kept[0]["head.weight"], start)
    assert torch.equal(kept[12]["head.weight"], model.state_dict()["head.weight"])
    assert not torch.equal(kept[5]["head.weight"], kept[12]["head.weight"])
    assert torch.equal(kept[5]["head.weight"], run((5,))[1][5]["head.weight"])  # keeping changes nothing


def kernel_of_two_tasks(samples=40, draws=2000):
    """Losses that share a cause within each half of the samples and none across; pairs of one result share another."""
    generator = torch.Generator().manual_seed(0)
    task = torch.arange(samples) // (samples // 2)
    results = torch.arange(samples) % 5 + 5 * task
    causes, labels = torch.randn(draws, 2, generator=generator), torch.randn(draws, 10, generator=generator)
    noise = torch.randn(draws, samples, generator=generator)
    return LossKernel.from_losses(causes[:, task] + 2 * labels[:, results] + noise), task, results


def test_separation_finds_two_independent_tasks_and_leaves_pairs_of_one_result_out():
    kernel, task, results = kernel_of_two_tasks()
    found = modular.separation(kernel, task, results)
    assert found["pc1_auc"] == 1
    assert found["knn_purity"] == 1
    # variances 1 (task), 4 (result), 1 (noise); 2000 draws leave an error of about 1/sqrt(2000) a pair, less in the mean
    assert found["mean_rho"] == pytest.approx(
        {"addition": 1 / 6, "division": 1 / 6, "cross": 0, "same result": 5 / 6}, abs=0.03
    )
    shuffled = task[torch.randperm(len(task), generator=torch.Generator().manual_seed(1))]
    assert modular.separation(kernel, shuffled, results)["knn_purity"] < 0.8


@pytest.mark.slow
def test_modular_learns_and_writes_what_it_measured(tmp_path):
    settings = modular.Modular(
        modulus=7,
        width=32,
        train_batch_size=64,
        train_fraction=1.0,
        steps=250,
        train_lr=3e-3,
        weight_decay=0.0,
        eval_samples=60,
        batch_size=32,
        localization=3e4,
        lr=2e-5,
        **FEW,
    )
    measured = modular.run(settings, tmp_path, Clock())
    assert measured["train_accuracy"] > 0.98
    assert measured["draws"] == 60
    assert measured["excess_loss"] > 0  # a minimum: noise can only raise the loss
    kernel = LossKernel.load(tmp_path / "kernel.safetensors")
    pairs = arithmetic.all_pairs(7)
    chosen = modular.balanced(pairs, 60, settings.seed)
    assert [int((pairs.task[chosen] == task).sum()) for task in (0, 1)] == [30, 30]
    assert modular.separation(kernel, pairs.task[chosen], pairs.results[chosen])["pc1_auc"] == measured["pc1_auc"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"pc1.png", "heatmap.png", "correlations.png"}
    assert f"PC1 ROC-AUC {measured['pc1_auc']:.4f}" in modular.summary(measured)


@pytest.mark.slow
def test_development_takes_one_kernel_a_checkpoint(tmp_path):
    settings = development.Development(
        modulus=7, width=32, train_batch_size=64, train_fraction=0.9, steps=250, train_lr=3e-3, weight_decay=0.0,
        eval_samples=40, batch_size=32, localization=1e4, checkpoints=(0, 250), **FEW,
    )  # fmt: skip
    measured = development.run(settings, tmp_path, Clock())
    first, last = measured["checkpoints"]
    assert (first["step"], last["step"]) == (0, 250)
    assert first["train_accuracy"] < 0.4 < 0.9 < last["train_accuracy"]
    cka = torch.tensor(measured["cka"])
    torch.testing.assert_close(cka.diagonal(), torch.ones(2))
    torch.testing.assert_close(cka, cka.T)
    assert cka[0, 1] < 0.9  # the kernel of noise is not that of a trained network
    assert last["lr"] == pytest.approx(4 * settings.stability / 1e4, rel=0.5)  # γ is most of the curvature


# --- mislabelled digits ----------------------------------------------------------------------------------------------


def test_the_share_asked_for_is_flipped_and_nothing_else():
    from sklearn.datasets import load_digits

    _, labels, wrong = mislabeled.digits(0.1, 3)
    true = torch.tensor(load_digits().target)
    assert int(wrong.sum()) == 180
    assert torch.equal(labels != true, wrong)
    assert not torch.equal(wrong, mislabeled.digits(0.1, 4)[2])


@pytest.mark.slow
def test_the_variance_finds_flipped_labels_and_the_control_stands_beside_it(tmp_path):
    settings = replace(mislabeled.SETTINGS["quick"], width=64, steps=1500, num_chains=2, num_draws=25, embedding=False)
    measured = mislabeled.run(settings, tmp_path, Clock())
    assert measured["flipped"] == 180
    assert measured["accuracy_clean"] > 0.99
    assert measured["auc_variance"] > 0.93
    assert measured["auc_initial_loss"] > 0.9  # the loss alone finds most of them, which is why it is printed
    assert measured["variance_flipped"] > 5 * measured["variance_clean"]
    text = mislabeled.summary(measured)
    assert (
        f"{measured['auc_variance']:.4f}, control: of the loss at w* alone {measured['auc_initial_loss']:.4f}" in text
    )
    assert (tmp_path / "variance.png").exists()


# --- hierarchies -----------------------------------------------------------------------------------------------------


def test_samples_that_share_a_deeper_ancestor_are_closer():
    data = hierarchies.synthetic_tree(depth=3, branching=2, per_class=20, noise=0.5)
    assert len(data.names) == 8
    means = torch.stack([data.features[data.labels == c].mean(0) for c in range(8)])
    ancestors = torch.stack([data.ancestors[data.labels == c][0] for c in range(8)])
    shared = (ancestors[:, None] == ancestors).sum(2)  # 1: the root alone, 4: the same class
    distance = torch.cdist(means, means)
    by_depth = [distance[shared == depth].mean().item() for depth in (1, 2, 3)]
    assert by_depth[0] > by_depth[1] > by_depth[2]
    assert set(shared.flatten().tolist()) == {1, 2, 3, 4}
    assert [int(data.train[data.labels == c].sum()) for c in range(8)] == [10] * 8


def test_the_standard_librarys_tree_is_its_directories():
    data = hierarchies.standard_library(per_file=4, buckets=64)
    assert len(data.names) > 40
    assert len(data.labels) == len(data.features) == len(data.ancestors)
    assert torch.allclose(data.features.norm(dim=1), torch.ones(len(data.features)), atol=1e-5)
    by_name = {name: data.ancestors[data.labels == c][0].tolist() for c, name in enumerate(data.names)}
    sax, minidom = by_name["xml/sax/handler.py"], by_name["xml/dom/minidom.py"]
    assert sax[:2] == minidom[:2]  # root and xml
    assert sax[2] != minidom[2]
    assert sax[2] == by_name["xml/sax/xmlreader.py"][2]
    assert by_name["asyncio/tasks.py"][3] == -1
    assert by_name["asyncio/tasks.py"][1] == by_name["asyncio/streams.py"][1] != sax[1]
    leaves = [max(row) for row in by_name.values()]
    assert len(set(leaves)) == len(leaves)


def test_lift_is_one_for_neighbours_by_chance_and_its_largest_for_the_same_branch():
    data = hierarchies.synthetic_tree(depth=2, branching=3, per_class=10)
    ancestors, labels = data.ancestors, data.labels
    branch = ancestors[:, 1]
    other_class = labels[:, None] != labels
    same_branch = torch.where((branch[:, None] == branch) & other_class, 1.0, 0.0).topk(5).indices
    # of the 80 samples of other classes 20 are of the same branch
    assert gamma.lift_by_depth(same_branch, ancestors, labels) == {"1": pytest.approx(4.0)}
    random = (
        torch.rand(90, 90, generator=torch.Generator().manual_seed(0)).masked_fill(~other_class, -1).topk(40).indices
    )
    assert gamma.lift_by_depth(random, ancestors, labels)["1"] == pytest.approx(1.0, abs=0.1)
    near = gamma.nearest_inputs(data.features, labels, 5)
    assert (labels[near] != labels[:, None]).all()


def test_the_sweep_measures_every_localization_and_its_control(tmp_path):
    settings = gamma.Gamma(
        nbeta=20, batch_size=32, num_chains=2, num_draws=30, num_burnin_steps=10, gammas=(100.0, 1e5), steps=150,
        eval_samples=120, width=32, neighbors=5,
    )  # fmt: skip
    data = hierarchies.synthetic_tree(depth=3, branching=3, per_class=16, noise=0.5)
    measured = gamma.sweep("synthetic tree", data, settings, tmp_path, Clock())
    low, high = measured["rows"]
    assert (low["gamma"], high["gamma"]) == (100.0, 1e5)
    assert low["lr"] > 10 * high["lr"]  # the stable step is about 4/γ
    assert abs(low["excess_loss"]) > 10 * abs(high["excess_loss"])  # and the excess loss about 1/γ
    assert set(low["lift_opposite"]) == set(low["lift"])
    assert high["lift_opposite"]["2"] > 1.5 > high["lift"]["2"]  # siblings compete: what helps one harms the other
    assert set(low["lift"]) == set(measured["control_lift"]) == {"1", "2"}
    assert measured["control_lift"]["1"] > 1.3  # the inputs are hierarchical
    assert measured["eval_accuracy"] > 0.5
    assert measured["cka"][0][0] == pytest.approx(1)


# --- GPT -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of examples/train_gpt on its own sources, with both losses."""
    out = tmp_path_factory.mktemp("run")
    options = {
        "data": str(ROOT / "examples" / "train_gpt"), "out": out, "layers": 1, "heads": 2, "width": 16, "block": 16,
        "vocab-size": 300, "batch-size": 8, "steps": 30, "eval-every": 30, "eval-batches": 1, "checkpoint-every": 30,
        "samples": 1, "sample-tokens": 4, "device": "cpu", "init-std": 0.05, "uniform-mix": 0.01,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in ("--" + name, str(value))]
    assert train_gpt.main([*words, "--no-measure-head"]) == 0
    return out


@pytest.mark.parametrize("loss", ["harmonic", "cross_entropy"])
def test_the_token_losses_are_those_the_gpt_was_trained_on(run, loss):
    task = gpt.from_checkpoint(run=str(run), loss=loss, tokens="160")
    windows, model = task["eval_data"], task["model"]
    assert windows.shape == (10, 17)
    with torch.no_grad():
        losses = task["per_sample_loss"](model, windows)
        expected = model.gpt(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        by_window = gpt.window_losses(model, windows)
    assert losses.shape == (10, 16)
    torch.testing.assert_close(losses.mean(), expected)
    torch.testing.assert_close(by_window, losses.mean(1))
    assert torch.equal(task["labels"], windows[:, 1:].flatten())
    assert task["train_data"].shape[1] == 17
    assert torch.equal(task["train_data"][:-1, -1], task["train_data"][1:, 0])  # every token is predicted once


def test_tokens_are_named_by_file_and_context(run):
    task = gpt.from_checkpoint(run=str(run), data=str(ROOT / "examples" / "train_gpt"), tokens="320")
    assert all(name.endswith((".py", ".md")) for name in task["group_names"])
    vocabulary = gpt.open_corpus(str(run), *identity(run))[0].vocabulary
    for name, label, group in zip(task["names"][::7], task["labels"][::7], task["groups"][::7], strict=True):
        title, _, shown = name.partition(": ")
        assert title == task["group_names"][group]
        assert shown[shown.rindex("⟦") + 1 : -1] == gpt.visible(vocabulary.decode([int(label)]))
    unnamed = gpt.from_checkpoint(run=str(run), tokens="320")  # these files are not the standard library
    assert all(name.startswith("document ") for name in unnamed["group_names"])
    windows = gpt.from_checkpoint(run=str(run), per="window", tokens="320", split="train")
    assert windows["labels"] is None
    assert len(windows["names"]) == len(windows["groups"]) == 20


def identity(run):
    state = torch.load(run / "harmonic" / "checkpoint.pt", weights_only=True)["identity"]
    return state.pop("data"), state, ""


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "mse"}, ValueError, "loss='mse': choose one of harmonic, cross_entropy"),
        ({"per": "file"}, ValueError, "per='file': choose one of token, window"),
        ({"tokens": "many"}, ValueError, "tokens='many': give a number of tokens"),
        ({"tokens": "10000000"}, ValueError, "the split has"),
        ({"run": "nowhere"}, FileNotFoundError, "train one with python -m examples.train_gpt --out nowhere"),
    ],
)
def test_what_the_entry_point_cannot_serve_is_named(run, options, error, message):
    with pytest.raises(error, match=message):
        gpt.from_checkpoint(**{"run": str(run), **options})


def test_kinds_of_tokens():
    texts = {" ": 0, "\n    ": 0, " def": 1, "return": 1, " self": 2, "_x": 2, "42": 3, "):": 4, ' "': 4}
    assert [tokens.kind_of(text) for text in texts] == list(texts.values())


@pytest.mark.slow
def test_both_token_kernels_are_measured_and_compared(run, tmp_path):
    settings = tokens.Tokens(
        run=str(run), tokens=400, batch_size=4, nbeta=200, localization=1e4, num_steps_bw_draws=1, neighbors=5, **FEW
    )
    measured = tokens.run(settings, tmp_path, Clock())
    for loss in ("harmonic", "cross_entropy"):
        assert measured[loss]["samples"] == 400
        assert measured[loss]["draws"] == 60
        assert 3 < measured[loss]["initial_loss"] < 7  # log 300 is 5.7
        assert (tmp_path / loss / "neighbors.tsv").read_text().count("\n") == 1 + 5 * tokens.SHOWN
        assert 0 < measured[loss]["lift_kind"] < 10
    assert -0.1 < measured["cka_between_losses"] < 1
    assert 0.05 < measured["peak_memory_gib"] < 16


def test_lift_of_a_grouping_leaves_pairs_of_one_label_out():
    groups, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    same_group = torch.tensor([[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]])
    # of the 4 samples with another label 2 are of the same group
    assert tokens.lift(same_group, groups, labels) == pytest.approx(2.0)


# --- command line ----------------------------------------------------------------------------------------------------


def test_the_papers_settings_are_those_of_its_table():
    chosen = {name: module.SETTINGS["paper"] for name, module in (("a", modular), ("b", mislabeled))}
    table = {
        "a": {"batch_size": 512, "num_chains": 30, "num_draws": 800, "num_burnin_steps": 200, "nbeta": 500},
        "b": {"batch_size": 256, "num_chains": 8, "num_draws": 1000, "num_burnin_steps": 100, "nbeta": 20},
    }
    for name, fields in table.items():
        assert {key: getattr(chosen[name], key) for key in fields} == fields
    assert (chosen["a"].localization, chosen["b"].localization) == (30_000, 4_000)
    assert chosen["a"].eval_samples == 10_000
    assert chosen["a"].weight_decay == 0
    assert isinstance(chosen["a"].probe(lr=1.0), SGLDConfig)
    assert chosen["a"].probe(lr=1.0).lr == 1.0


def test_options_override_a_setting_and_results_say_what_ran(tmp_path, capsys):
    pytest.importorskip("umap")
    arguments = [
        "mislabeled",
        "--width",
        "16",
        "--steps",
        "40",
        "--num-chains",
        "1",
        "--num-draws",
        "8",
        "--no-embedding",
        "--flipped",
        "0.05",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["experiment"], results["setting"]) == ("mislabeled", "quick")
    assert results["settings"]["flipped"] == 0.05
    assert results["settings"]["localization"] == mislabeled.SETTINGS["quick"].localization
    assert results["measured"]["flipped"] == 90
    assert results["seconds"]["all"] >= results["seconds"]["sampling"] > 0
    assert results["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "control: of the loss at w* alone" in shown


def test_a_setting_that_cannot_serve_is_one_line(tmp_path, capsys):
    assert main(["tokens", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "train one with python -m examples.train_gpt" in capsys.readouterr().err


def test_cross_entropy_of_the_examples_is_precise_where_torchs_is_zero():
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[40.0], [0.0]]))
    batch = (torch.ones(1, 1), torch.tensor([0]))
    assert F.cross_entropy(model(batch[0]), batch[1]).item() == 0
    assert modular.classification_loss(model, batch).item() == pytest.approx(4.248e-18, rel=1e-3)  # exp(-40)


# --- pictures and time -------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch):
    """The figures as they are when they would be written."""
    plt = pytest.importorskip("matplotlib.pyplot")
    found = []
    monkeypatch.setattr(figures, "save", lambda path: found.append(plt.gcf()))
    yield found
    plt.close("all")


def test_groups_differ_without_colour(kept):
    groups = torch.arange(90) % 3
    figures.histogram(Path("-"), torch.randn(90) + groups, groups, ["a", "b", "c"], "x", "")
    figures.densities(Path("-"), [torch.randn(90) for _ in range(3)], ["a", "b", "c"], "x", "")
    for figure in kept:
        (axis,) = figure.axes
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b", "c"]
        assert len({patch.get_linestyle() for patch in axis.patches}) == 3, [p.get_linestyle() for p in axis.patches]
    _, axis = figures.plt.subplots()
    figures.scatter(axis, torch.randn(90, 2).numpy(), torch.arange(90) % 9, [str(i) for i in range(9)], "")
    assert len({dots.get_paths()[0].vertices.tobytes() for dots in axis.collections}) == 9


def test_no_line_lies_over_a_map(kept):
    figures.heatmap(Path("-"), torch.eye(40), [10, 25], "")
    axis = kept[0].axes[0]
    assert not axis.lines and axis.get_xticks().tolist() == axis.get_yticks().tolist() == [9.5, 24.5]


def test_every_experiment_says_how_long_it_takes():
    for name in EXPERIMENTS:
        settings = import_module(f"examples.loss_kernel.{name}").SETTINGS
        said = expectation(name, settings["quick"], settings["quick"])
        assert re.match(r"takes \d+ (seconds|minutes) or so, by its steps", said)
        longer = replace(settings["quick"], num_draws=1000 * settings["quick"].num_draws)
        assert "hours or so" in expectation(name, longer, settings["quick"]) and "--setting quick" in expectation(
            name, longer, settings["quick"]
        )
