"""The GPT example: it trains what it says, a killed run goes on to the same bits, its report is whole."""

import base64
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
matplotlib = pytest.importorskip("matplotlib")

import harmonic_triton as ht  # noqa: E402
from examples.train_gpt import analysis, data, figures, head_cost, pace, report, train, trained  # noqa: E402
from examples.train_gpt.config import LOSSES, Config, from_arguments  # noqa: E402
from examples.train_gpt.model import GPT  # noqa: E402

ROOT = Path(__file__).parents[1]
CPU = train.Place(0, 1, torch.device("cpu"))
TINY = {
    **{"layers": 1, "heads": 2, "width": 16, "block": 16, "vocab_size": 300, "batch_size": 4, "micro_batch_size": 4},
    **{"steps": 40, "eval_every": 10, "eval_batches": 4, "checkpoint_every": 10, "samples": 2, "sample_tokens": 8},
    **{"init_std": 0.05, "measure_head": False, "device": "cpu"},
}
PLOTS = ("plot-loss", "plot-head", "plot-norm", "plot-embedding", "plot-parallelogram")


def arguments(**options):
    """TINY and the given options as a command line."""
    words = []
    for name, value in {**TINY, **options}.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def checkpoint(out, loss="harmonic"):
    return torch.load(Path(out) / loss / "checkpoint.pt", weights_only=True)


def environment(**extra):
    """For a child that computes as this process does: the same threads, the same package."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT), **extra}


def assert_same_state(one, other):
    """Weights, optimiser and history equal to the last bit; the time taken may differ."""
    assert one["identity"] == other["identity"]
    for a, b in zip(one["optimizer"]["param_groups"], other["optimizer"]["param_groups"], strict=True):
        assert {**a, "betas": [*a["betas"]]} == {**b, "betas": [*b["betas"]]}
    one, other = ({**state, "moments": state["optimizer"]["state"]} for state in (one, other))
    for key in ("model", "moments", "history", "step"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module", autouse=True)
def one_number_of_threads():
    """Runs here do not look for the fastest number of threads, and leave it as it was."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A directory of real text: this example's sources."""
    root = tmp_path_factory.mktemp("text")
    for path in (ROOT / "examples" / "train_gpt").glob("*.py"):
        (root / path.name).write_bytes(path.read_bytes())
    return root


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    return data.load(Config(**{**TINY, "data": (str(text),), "out": str(tmp_path_factory.mktemp("corpus"))}))


@pytest.fixture(scope="session")
def bins(corpus, tmp_path_factory):
    """nanoGPT's form of the same corpus: nothing but uint16 tokens."""
    root = tmp_path_factory.mktemp("bins")
    corpus.train.tofile(root / "train.bin")
    corpus.val.tofile(root / "val.bin")
    return root


# --- the whole run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run of both losses with its report, the head measured in real processes."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_cost, "PROCESSES", 1)
        assert train.main(arguments(data=str(text), out=out, measure_head=True)) == 0
    return out


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_falls_from_that_of_a_guess(finished, loss):
    state = checkpoint(finished, loss)
    steps, val = zip(*state["history"]["val"], strict=True)
    assert steps == (0, 10, 20, 30, 40)
    assert len(state["history"]["train"]) == len(state["history"]["grad_norm"]) == 40
    assert val[0] > math.log(300) - 0.1
    assert val[-1] < math.log(300) - 0.5
    assert np.mean(state["history"]["train"][-5:]) < np.mean(state["history"]["train"][:5]) - 0.5


def test_both_losses_begin_with_the_same_weights_but_the_gain_that_makes_x_as_long_as_w(corpus):
    config = Config(**{**TINY, "out": "unused"})
    harmonic, cross_entropy = (train.Trainer(config, corpus, CPU, loss).model for loss in LOSSES)
    x = harmonic.hidden(torch.arange(16)[None])
    assert x.norm(dim=-1).mean().item() == pytest.approx(harmonic.tokens.weight.norm(dim=-1).mean().item(), rel=0.05)
    for model in (harmonic, cross_entropy):
        assert model.norm.weight.unique().tolist() == [pytest.approx(0.05 if model is harmonic else 1.0)]
        del model.norm
    torch.testing.assert_close(harmonic.state_dict(), cross_entropy.state_dict(), rtol=0, atol=0)


def test_the_report_needs_no_network_and_every_plot_in_it_is_filled(finished):
    page = (finished / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', page)) == {"data:"}
    images = dict(re.findall(r'<img id="([^"]+)"[^>]*src="data:image/png;base64,([^"]+)"', page))
    assert tuple(images) == PLOTS
    for name, encoded in images.items():
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)))[..., :3]
        halves = np.array_split(pixels, 2, axis=1) if name in ("plot-loss", "plot-head", "plot-embedding") else [pixels]
        for half in halves:
            if name == "plot-embedding":  # dots coloured by frequency: many hues
                coloured = half.max(-1) - half.min(-1) > 0.2
                assert coloured.sum() > 500, name
                continue
            drawn = [
                (np.abs(half - matplotlib.colors.to_rgb(figures.COLORS[loss])).max(-1) < 0.03).sum() > 100
                for loss in LOSSES
            ]
            # at this size a pass may fit into memory that the process has already: a bar of no height
            assert any(drawn) if name == "plot-head" and half is halves[1] else all(drawn), (name, drawn)


def test_the_report_shows_what_was_measured(finished):
    page = (finished / "report.html").read_text()
    for loss in LOSSES:
        assert f"{checkpoint(finished, loss)['history']['val'][-1][1]:.4f}" in page
    measured = json.loads((finished / "head_cost.json").read_text())
    assert measured["shape"]["tokens"] == 4 * 16
    for head in ("harmonic", "cross_entropy", "authors"):
        assert f'<td class="number">{measured["heads"][head]["ms"]:.1f}</td>' in page
    assert page.count("<pre>") == 4
    assert all(sample.startswith("def") for sample in re.findall("<pre>(.*?)</pre>", page, re.DOTALL))


def test_a_failed_report_leaves_the_training_and_the_next_run_writes_it(text, tmp_path, monkeypatch):
    options = arguments(data=str(text), out=tmp_path, loss="harmonic", steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(report, "norm_section", lambda runs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(options)
    assert not (tmp_path / "report.html").exists()
    before = (tmp_path / "harmonic" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train.Trainer, "update", lambda *a: pytest.fail("trained again"))
    assert train.main(options) == 0
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "harmonic" / "checkpoint.pt").read_bytes() == before


# --- pictures and words ----------------------------------------------------------------------------------------------


def ended(loss, final, seed):
    """A run that ended at a validation loss."""
    vectors = torch.randn(300, 16, generator=torch.Generator().manual_seed(seed)) * (1 + 2 * seed)
    history = {"val": [[0, 6.0], [40, final]], "train": [6.0, 5.0, final], "weight_norm": [[0, 1.0], [40, 1.1]]}
    return trained.Trained(loss, history, 1.0, vectors, [], analysis.principal_components(vectors))


BOTH = [ended("harmonic", 4.0, 0), ended("cross_entropy", 4.25, 1)]


def drawn_lines(axis):
    """Style by label of the lines with a name in the legend."""
    return {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def test_lines_are_told_apart_without_colour_and_a_guess_is_drawn():
    for axis in figures.losses(BOTH, math.log(300)).axes:
        lines = drawn_lines(axis)
        assert list(lines) == ["harmonic", "cross-entropy", "a guess, ln V = 5.70"]
        assert len({line.get_linestyle() for line in lines.values()}) == 3
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)
        assert set(lines["a guess, ln V = 5.70"].get_ydata()) == {math.log(300)}
    marks = [line.get_marker() for line in drawn_lines(figures.losses(BOTH, 5.7).axes[1]).values()]
    assert marks == ["o", "s", "None"]
    (axis,) = figures.norms(BOTH).axes
    assert len({line.get_linestyle() for line in drawn_lines(axis).values()}) == 2
    values = [torch.rand(30), torch.rand(30)]
    (axis,) = figures.parallelograms(BOTH, values, values).axes
    assert list(drawn_lines(axis)) == [
        "harmonic, related pairs", "cross-entropy, related pairs", "harmonic, random tokens", "cross-entropy, random tokens"
    ]  # fmt: skip
    kinds = {(line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1])) for line in axis.lines}
    assert len(kinds) == 4
    figures.plt.close("all")


def test_embeddings_have_one_scale_a_colour_bar_and_names_that_do_not_collide():
    names = [(token, f"a long name {token}") for token in range(60)]
    figure = figures.embeddings(BOTH, torch.arange(300), names)
    left, right, bar = figure.axes
    assert bar.get_ylabel() == "times in the training text"
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert left.get_aspect() == right.get_aspect() == 1.0
    figure.canvas.draw()
    for axis, run in ((left, BOTH[0]), (right, BOTH[1])):
        assert 3 < len(axis.texts) <= figures.LABELS
        boxes = [matplotlib.text.Text.get_window_extent(note) for note in axis.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        for note in axis.texts:
            token = int(note.get_text().removeprefix("a long name "))
            assert note.xy == pytest.approx(run.principal.points[token].tolist())
    figures.plt.close("all")


@pytest.mark.parametrize(
    ("finals", "steps", "words"),
    [
        (
            (4.0, 4.25),
            1200,
            r"harmonic ends 0.250 nats a token lower than cross-entropy \(4.000 and 4.250\); .*ln V = 5.70.*noth",
        ),
        (
            (4.5, 4.25),
            40,
            r"cross-entropy ends 0.250 nats a token lower than harmonic .*40 steps are a first look: not which",
        ),
        ((4.25, 4.25), 1200, "Both end equally low"),
        ((5.8, 4.25), 1200, "harmonic has learned nothing yet: its validation loss is not below ln V = 5.70"),
        ((4.5,), 40, r"The harmonic loss ends at 4.500 nats a token, 1.20 below a guess. 40 steps are a first look\."),
    ],
)
def test_the_report_says_what_to_conclude(finals, steps, words):
    runs = [ended(loss, final, 0) for loss, final in zip(LOSSES, finals, strict=False)]
    corpus = types.SimpleNamespace(vocab_size=300)
    assert re.search(words, report.conclusion(Config(**{**TINY, "steps": steps}), corpus, runs))


def test_the_report_has_a_guess_beside_the_loss_before_training(finished):
    page = (finished / "report.html").read_text()
    assert f"validation loss before training (a guess: ln V = {math.log(300):.3f})" in page
    assert page.count("<b>In short:</b>") == 1


def test_parallelograms_are_held_beside_chance():
    words = report.beside_chance(
        BOTH, [torch.tensor([1.0]), torch.tensor([0.5])], [torch.tensor([1.05]), torch.tensor([1.0])]
    )
    assert (
        words
        == "Medians of related pairs and random tokens: harmonic 1.00 against 1.05, no better than chance; "
        + ("cross-entropy 0.50 against 1.00.")
    )


# --- threads and time ------------------------------------------------------------------------------------------------


def test_threads_that_stand_in_their_own_way_are_not_taken():
    assert pace.chosen({1: 0.45, 2: 8.0}) == 1
    assert pace.chosen({1: 1.0, 2: 0.55, 4: 0.53}) == 2  # four are no faster to speak of
    assert pace.chosen({1: 1.0, 2: 0.95}) == 1
    calls = []

    def seconds(threads):
        calls.append(threads)
        return {1: 0.45, 2: 8.0}[threads]

    assert pace.fastest([1, 2], seconds) == {1: 0.45, 2: 8.0}
    assert calls.count(2) == 1  # eight seconds tell enough


def test_an_explicit_number_of_threads_wins_then_the_runs_own_then_the_environment(monkeypatch):
    config, now = Config(**TINY), torch.get_num_threads()
    assert pace.candidates(replace(config, threads=3), CPU, 2) == ([3], "as --threads says")
    assert pace.candidates(config, CPU, 2)[0] == [2]
    assert pace.candidates(config, CPU, None) == ([now], "as OMP_NUM_THREADS says")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert pace.candidates(config, train.Place(0, 2, torch.device("cpu")), None)[0] == [now]
    assert pace.candidates(config, train.Place(0, 1, torch.device("cuda")), None)[0] == [now]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert pace.candidates(config, CPU, None) == ([1, 2, 4, 6], "")


def test_a_run_says_how_long_it_takes_and_goes_on_with_its_threads(text, tmp_path, capsys, monkeypatch):
    now = [1]  # in name alone: on a machine as busy as those this is about, two real threads take a minute
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    options = {"data": str(text), "out": tmp_path, "loss": "harmonic", "steps": 2, "eval_batches": 1, "samples": 0}
    assert train.main(arguments(**options, threads=3)) == 0
    said = capsys.readouterr().out
    assert "3 threads, as --threads says" in said
    assert re.search(
        r"training takes less than a minute here: 2 steps \(harmonic\) of \d+\.\d\d s; the report follows", said
    )
    assert checkpoint(tmp_path)["threads"] == now[0] == 3
    assert pace.steps_left(Config(**{**TINY, "out": str(tmp_path), "loss": "harmonic", "steps": 2})) == 0
    now[0], state = 1, checkpoint(tmp_path)
    torch.save({**state, "step": 1}, tmp_path / "harmonic" / "checkpoint.pt")
    assert train.main(arguments(**options)) == 0
    assert "3 threads, as this run began" in capsys.readouterr().out and now[0] == 3


def test_a_long_run_names_a_shorter_one():
    found = pace.Pace(2, 0.5, "as --threads says")
    said = pace.announcement(Config(), found, 2400)
    assert "takes about 2" in said and "minutes here: 2,400 steps (harmonic and cross_entropy) of 0.50 s" in said
    assert said.endswith("a first look: --preset quick, or fewer --steps")
    assert "hours" in pace.announcement(Config(), found, 24000)
    quick = from_arguments(["--preset", "quick"])
    assert quick.steps * 6 == Config().steps and quick.out != Config().out
    for bad in ("0", "-1"):
        with pytest.raises(ValueError, match="--threads is .*: it must be at least 1"):
            from_arguments(["--threads", bad]).validate()


# --- stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_and_an_interrupted_run_go_on_to_the_same_bits(text, tmp_path, monkeypatch):
    """SIGKILL at a random moment, then SIGINT, then the end: weights and history of a run that nothing stopped."""
    options = {"data": str(text), "loss": "harmonic", "steps": 300, "checkpoint_every": 5, "dropout": 0.1}
    by_path = "import runpy; runpy.run_path('examples/train_gpt', run_name='__main__')"
    ends = ((fresh.module("examples.train_gpt"), signal.SIGKILL), (by_path, signal.SIGINT))
    path, stopped_at = tmp_path / "stopped" / "harmonic" / "checkpoint.pt", 0
    for program, end in ends:
        child = fresh.Started(program, *arguments(**options, out=tmp_path / "stopped"), env=environment())
        try:
            waiting = time.monotonic() + 240
            while not path.exists() or checkpoint(path.parent.parent)["step"] == stopped_at:
                assert child.process.is_alive(), child.wait().stderr
                assert time.monotonic() < waiting
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.2))
            os.kill(child.process.pid, end)
            ended = child.wait(timeout=240)
        finally:
            child.process.kill()
        message = ended.stderr
        assert ended.returncode == (130 if end == signal.SIGINT else -end), message
        before, stopped_at = stopped_at, checkpoint(path.parent.parent)["step"]
        assert before < stopped_at < 300
        assert end == signal.SIGKILL or ("go on from the last checkpoint" in message and "Traceback" not in message)

    updates = []
    update = train.Trainer.update

    def counted(self, model):
        updates.append(self.step)
        return update(self, model)

    monkeypatch.setattr(train.Trainer, "update", counted)
    assert train.main(arguments(**options, out=tmp_path / "stopped")) == 0
    assert updates == list(range(stopped_at, 300))
    assert train.main(arguments(**options, out=tmp_path / "whole")) == 0
    assert_same_state(checkpoint(tmp_path / "stopped"), checkpoint(tmp_path / "whole"))


def test_a_save_that_fails_leaves_the_former_checkpoint(corpus, tmp_path, monkeypatch):
    trainer = train.Trainer(Config(**{**TINY, "out": str(tmp_path)}), corpus, CPU, "harmonic")
    trainer.save()
    before = trainer.path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        trainer.save()
    assert trainer.path.read_bytes() == before


def test_a_save_follows_no_link_that_was_planted(corpus, tmp_path):
    """Another user of a shared directory could guess a fixed temporary name."""
    trainer = train.Trainer(Config(**{**TINY, "out": str(tmp_path)}), corpus, CPU, "harmonic")
    trainer.path.parent.mkdir(parents=True)
    treasure = tmp_path / "treasure"
    treasure.write_text("mine")
    for name in (trainer.path.with_suffix(".tmp"), trainer.path.with_name(trainer.path.name + ".tmp")):
        name.symlink_to(treasure)
    trainer.save()
    assert treasure.read_text() == "mine"
    assert not trainer.path.is_symlink()


def test_the_checkpoint_of_another_run_is_refused_with_what_differs(text, tmp_path, capsys):
    options = {"data": str(text), "out": tmp_path / "run", "loss": "harmonic", "steps": 2, "samples": 0}
    assert train.main(arguments(**options)) == 0
    path = tmp_path / "run" / "harmonic" / "checkpoint.pt"
    before = path.read_bytes()
    (tmp_path / "other.txt").write_text((text / "model.py").read_text())
    for changed, message in (
        ({"lr_harmonic": 0.001, "n": 3.0}, r"--lr-harmonic was None, is 0.001; --n was 28.0, is 3.0"),
        ({"data": str(tmp_path / "other.txt")}, r"--data was \w{16}, is \w{16}\."),
    ):
        capsys.readouterr()
        assert train.main(arguments(**{**options, **changed})) == 2
        shown = capsys.readouterr()
        assert re.fullmatch(f"error: .*{message}.*--no-resume\n", shown.err)
        assert path.read_bytes() == before

    assert train.main(arguments(**{**options, "micro_batch_size": 2, "temperature": 1.0})) == 0  # free to change
    path.write_bytes(before[: len(before) // 2])
    assert train.main(arguments(**options)) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    assert train.main(arguments(**options, n=3.0, resume=False)) == 0
    assert checkpoint(tmp_path / "run")["identity"]["n"] == 3.0


# --- the same training by other means --------------------------------------------------------------------------------


LAYOUTS = {"ddp": (2, {}), "fsdp": (2, {"fsdp": True}), "tensor": (2, {"tensor_parallel": 2}),
           "both": (4, {"fsdp": True, "tensor_parallel": 2})}  # fmt: skip


@pytest.mark.parametrize(
    "layout", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "tensor", "both"))]
)
def test_torchrun_with_several_processes_follows_one_process(text, tmp_path, layout):
    """Same losses, gradient norms and weights up to rounding; micro-batches of 2 against one batch of 8. Each goes on from
    the other's checkpoint."""
    world, spread = LAYOUTS[layout]
    options = {"data": str(text), "steps": 8, "batch_size": 8, "eval_every": 4, "samples": 0, "uniform_mix": 0.01}
    options["loss"] = "harmonic" if "tensor_parallel" in spread else "both"

    def several(**more):
        launch = ["--standalone", "--nproc-per-node", world, "-m", "examples.train_gpt"]
        words = arguments(**options, **spread, out=tmp_path / "several", micro_batch_size=2, **more)
        torchrun = fresh.Started(
            fresh.module("torch.distributed.run"), *launch, *words, env=environment(OMP_NUM_THREADS="1")
        )
        done = torchrun.wait(timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report: ") == done.stdout.count("training and") == 1

    several()
    assert train.main(arguments(**options, out=tmp_path / "one", micro_batch_size=8)) == 0
    for loss in LOSSES if options["loss"] == "both" else [options["loss"]]:
        one, others = (checkpoint(tmp_path / name, loss) for name in ("one", "several"))
        torch.testing.assert_close(others["history"], one["history"], rtol=1e-4, atol=0)
        torch.testing.assert_close(others["model"], one["model"], rtol=0, atol=1e-3)
    if spread:  # complete runs: each reads the whole state of the other, and writes the report alone
        for name in ("one", "several"):
            (tmp_path / name / "report.html").unlink()
        (tmp_path / "one").rename(tmp_path / "kept")
        (tmp_path / "several").rename(tmp_path / "one")
        (tmp_path / "kept").rename(tmp_path / "several")
        several()
        assert train.main(arguments(**options, out=tmp_path / "one", micro_batch_size=8)) == 0


@pytest.mark.parametrize("mix", [0.0, 0.01])
@pytest.mark.parametrize("loss", LOSSES)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(corpus, tmp_path, loss, mix):
    histories = []
    for micro in (1, 2, 4):
        config = Config(**{**TINY, "out": str(tmp_path / str(micro)), "micro_batch_size": micro, "uniform_mix": mix})
        trainer = train.Trainer(replace(config, steps=3), corpus, CPU, loss)
        trainer.train()
        histories.append(trainer.history)
    for history in histories[:-1]:
        torch.testing.assert_close(history, histories[-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_autocast_trains_as_float32_does_up_to_its_precision(corpus, tmp_path, loss):
    """The same weights have the same loss to a rounding, 2^-8; each step's gradient is off by one, and so is what is learnt."""
    val, steps = {}, 10
    for dtype in ("float32", "bfloat16"):
        config = Config(**{**TINY, "out": str(tmp_path / dtype), "dtype": dtype, "steps": steps})
        trainer = train.Trainer(config, corpus, CPU, loss)
        trainer.train()
        assert trainer.model.tokens.weight.dtype == torch.float32
        val[dtype] = [value for _, value in trainer.history["val"]]
    (start, end), (exact_start, exact_end) = val["bfloat16"], val["float32"]
    assert start == pytest.approx(exact_start, rel=2**-8)
    assert start - end == pytest.approx(exact_start - exact_end, rel=steps * 2**-8)
    assert end != exact_end


# --- the model -------------------------------------------------------------------------------------------------------


def model_and_batch(corpus, loss, **options):
    config = Config(**{**TINY, **options})
    torch.manual_seed(1)
    return GPT(config, 300, loss), *corpus.batch("train", 16, corpus.offsets("train", config, 3), CPU.device)


@pytest.mark.parametrize("mix", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_the_probabilities_it_samples_from(corpus, loss, mix):
    model, x, y = model_and_batch(corpus, loss, uniform_mix=mix)
    p = torch.stack([model.next_token(x[:, : i + 1]) for i in range(16)], dim=1).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 16))
    expected = -((p.gather(2, y.unsqueeze(2)) + mix / 300) / (1 + mix)).log()
    torch.testing.assert_close(model(x, y), expected.mean())
    torch.testing.assert_close(model(x, y, num_items=7), expected.sum() / 7)


@pytest.mark.parametrize("loss", LOSSES)
def test_temperature_divides_the_log_probabilities(corpus, loss):
    model, x, _ = model_and_batch(corpus, loss)
    plain = model.next_token(x)
    torch.testing.assert_close(model.next_token(x, 0.5), (2 * plain).log_softmax(-1))
    cold = model.generate(x[:2, :20], 5, 1e-4, torch.Generator().manual_seed(0))
    assert torch.equal(cold[:, 16], plain[:2].argmax(-1))
    assert cold.shape == (2, 21)
    assert model.training


def test_no_token_sees_those_after_it(corpus):
    model, x, _ = model_and_batch(corpus, "harmonic", layers=2)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 300
    torch.testing.assert_close(model.hidden(x)[:, :9], model.hidden(changed)[:, :9], rtol=0, atol=0)
    assert not torch.equal(model.hidden(x)[:, 9:], model.hidden(changed)[:, 9:])


def test_attention_is_scaled_by_the_layer_where_asked(corpus):
    plain, scaled = (
        [b.attention.scale for b in GPT(Config(**{**TINY, "layers": 3, **o}), 300, "harmonic").blocks]
        for o in ({}, {"scale_attention_by_layer": True})
    )
    assert plain == [8**-0.5] * 3
    assert scaled == pytest.approx([8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3])


def test_the_gpt2_preset_is_the_papers(capsys):
    config = from_arguments(["--preset", "gpt2"])
    config.validate()
    assert (config.layers, config.width, config.vocab_size, config.exponent) == (12, 768, 50304, 28)
    rates = {loss: [config.lr(loss, step) for step in (0, 999, 1000, 1999, 2000, 9999)] for loss in LOSSES}
    assert rates["harmonic"][:3] == pytest.approx([6e-6, 6e-3, 6e-3])
    assert rates["cross_entropy"][0] == pytest.approx(3e-7)
    assert rates["cross_entropy"][3:5] == pytest.approx([6e-4, 6e-4])
    assert [rates[loss][-1] for loss in LOSSES] == pytest.approx([3e-4, 3e-5], rel=1e-4)
    with torch.device("meta"):
        model = GPT(config, config.vocab_size, "harmonic")
    assert sum(p.numel() for p in model.parameters()) == 50304 * 768 + 1024 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768
    head = torch.randn(50304, 768).mul_(config.initial_std).requires_grad_()
    loss = ht.linear_harmonic_loss(torch.randn(8, 768), head, torch.arange(8), n=config.exponent, uniform_mix=0.01)
    loss.backward()
    assert abs(loss.item() - math.log(50304)) < 0.5
    assert head.grad.isfinite().all()
    with pytest.raises(SystemExit) as exit:
        train.main(["--preset", "gpt2", "--help"])
    assert exit.value.code == 0
    assert "gpt2: 50304" in capsys.readouterr().out


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_split_is_by_file_and_the_tokens_give_the_text_back(text, corpus):
    splits = data.split_files(data.text_files([str(text)]), 0.1)
    assert [len(splits[split]) for split in ("val", "train")] == [1, len(list(text.iterdir())) - 1]
    assert not {*splits["val"]} & {*splits["train"]}
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        expected = "".join(path.read_text() + data.SEPARATOR for path in splits[name])
        assert corpus.vocabulary.decode(tokens.tolist()) == expected


def test_one_file_is_split_at_its_end(tmp_path):
    content = "".join(f"{i} bottles of ginger beer\n" for i in range(2000))
    (tmp_path / "one.txt").write_text(content)
    made = data.load(Config(**{**TINY, "data": (str(tmp_path / "one.txt"),), "out": str(tmp_path / "out")}))
    cut = int(len(content) * 0.9)
    assert made.vocabulary.decode(made.train.tolist()) == content[:cut] + data.SEPARATOR
    assert made.vocabulary.decode(made.val.tolist()) == content[cut:] + data.SEPARATOR


def test_a_batch_depends_on_seed_and_step_alone_and_targets_are_the_next_tokens(corpus):
    config = Config(**TINY)
    first = corpus.offsets("train", config, 5)
    assert np.array_equal(first, corpus.offsets("train", replace(config, micro_batch_size=1), 5))
    for other in (corpus.offsets("train", config, 6), corpus.offsets("train", replace(config, seed=2), 5)):
        assert not np.array_equal(first, other)
    x, y = corpus.batch("train", 16, first, CPU.device)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert x[2].tolist() == corpus.train[first[2] : first[2] + 16].tolist()
    short = replace(corpus, val=corpus.val[:20])
    assert set(short.offsets("val", replace(config, eval_batches=50), 0)) == {0, 1, 2, 3}  # 3 + 16 is the last token


def test_the_default_text_is_the_standard_library():
    names = [name for name, _ in data.text_files(())]
    assert len(names) > 300
    assert "argparse.py" in names
    assert not [name for name in names if "site-packages" in name or "/test" in name]


def test_nanogpts_files_train_without_a_vocabulary(bins, corpus, tmp_path):
    options = arguments(data=str(bins), out=tmp_path / "out", loss="cross_entropy", steps=4, prompt="ignored")
    assert train.main(options) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    start = "".join(f"&lt;{i}&gt;" for i in corpus.val[:8])
    assert page.count(f"<pre>{start}") == 2
    assert "No relation" in page
    assert not (tmp_path / "out" / "data").exists()
    from_bins = checkpoint(tmp_path / "out", "cross_entropy")["history"]
    trainer = train.Trainer(Config(**{**TINY, "steps": 4, "out": str(tmp_path)}), corpus, CPU, "cross_entropy")
    trainer.train()
    assert trainer.history == from_bins  # the same tokens by either way


def test_tokens_above_the_range_of_int16_are_read_as_they_are(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(65500, 65536, dtype=np.uint16).tofile(tmp_path / name)
    made = data.load(Config(**{**TINY, "data": (str(tmp_path),), "vocab_size": 65536}))
    x, y = made.batch("val", 16, np.array([3]), CPU.device)
    assert x[0].tolist() == list(range(65503, 65519))
    assert y[0, -1] == 65519


def test_gpt2s_vocabulary_serves_where_tiktoken_has_it(text, tmp_path, monkeypatch, capsys):
    options = {"data": str(text), "out": tmp_path / "out", "tokenizer": "gpt2", "vocab_size": 50304, "steps": 1}
    options = arguments(**options, loss="cross_entropy")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert train.main(options) == 2
    assert "tiktoken cannot give GPT-2's vocabulary" in capsys.readouterr().err

    class Encoding:  # bytes in the place of GPT-2's merges, which need a network
        n_vocab, eot_token = 50257, 50256

        def encode(self, text, allowed_special):
            return list(text.encode())

        def encode_ordinary_batch(self, texts):
            return [list(text.encode()) for text in texts]

        def decode(self, ids):
            return bytes(i for i in ids if i < 256).decode(errors="replace")

    names = []
    stand_in = types.SimpleNamespace(get_encoding=lambda name: names.append(name) or Encoding())
    monkeypatch.setitem(sys.modules, "tiktoken", stand_in)
    assert train.main(options) == 0
    assert names == ["gpt2"]
    assert checkpoint(tmp_path / "out", "cross_entropy")["model"]["tokens.weight"].shape == (50304, 16)
    assert "<pre>def" in (tmp_path / "out" / "report.html").read_text()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "--width is 30, not a multiple of --heads 4: try --width 32"),
        ({"batch_size": 6, "micro_batch_size": 4}, "--batch-size is 6, not a multiple of --micro-batch-size 4"),
        ({"vocab_size": 100}, "--vocab-size is 100: a byte-level BPE needs at least 257"),
        ({"tokenizer": "gpt2"}, "--vocab-size is 300: GPT-2's vocabulary needs 50257"),
        ({"vocab_size": 70000}, "--vocab-size is 70000: tokens are stored as uint16"),
        ({"n": -1.0}, "--n is -1.0: it must be greater than 0"),
        ({"lr_harmonic": "nan"}, "--lr-harmonic is nan: give a finite number"),
        ({"steps": 0}, "--steps is 0: it must be at least 1"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0: it must be in [0, 1)"),
        ({"seed": 2**31}, "--seed is 2147483648: it must be below"),
        ({"device": "tpu"}, "--device is 'tpu': choose auto, cpu"),
        ({"device": "cuda:99"}, "--device is cuda:99 but torch"),
        ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
        ({"data": "nowhere"}, "--data nowhere: no such file or directory"),
        ({"data": "EMPTY"}, "no files in it"),
        ({"data": "BINARY"}, "is not text (it holds zero bytes)"),
        ({"data": "SHORT"}, "tokens, --block 16 needs 17: give more text or a shorter --block"),
        ({"data": "ODD"}, "val.bin has 41 bytes; uint16 tokens need an even number"),
        ({"data": "BEYOND"}, "the train data hold token 300, beyond --vocab-size 300: give at least --vocab-size 301"),
        ({"data": "HALF"}, "train.bin is there but val.bin is not"),
        ({"out": "FILE"}, "is a file: name a directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_serve_is_one_line_before_any_work(options, message, tmp_path, capsys, monkeypatch):
    for name, files in {
        "EMPTY": {},
        "BINARY": {"a.bin": b"\1\0\2\0"},
        "SHORT": {"a.txt": b"a few words", "b.txt": b"and more"},
        "ODD": {"train.bin": bytes(80), "val.bin": bytes(41)},
        "BEYOND": {"train.bin": np.full(40, 300, np.uint16).tobytes(), "val.bin": bytes(80)},
        "HALF": {"train.bin": bytes(80)},
    }.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "Trainer", lambda *a: pytest.fail("work began"))
    assert train.main(arguments(**{"out": "out", "data": str(ROOT / "examples" / "train_gpt"), **options})) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", shown.err)


def test_a_vocabulary_larger_than_the_model_is_refused(bins, corpus, tmp_path, capsys):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes((bins / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(corpus.vocabulary.tokenizer.to_str())
    assert train.main(arguments(data=str(tmp_path), out=tmp_path / "out", vocab_size=299)) == 2
    assert "tokenizer.json has 300 tokens" in capsys.readouterr().err
    options = arguments(data=str(tmp_path), out=tmp_path / "out", loss="harmonic", steps=1)
    assert train.main(options) == 0
    assert "<pre>def" in (tmp_path / "out" / "report.html").read_text()


def test_a_loss_that_is_not_finite_stops_with_the_mend_and_is_not_stored(text, tmp_path, capsys):
    options = {"data": str(text), "out": tmp_path, "loss": "cross_entropy", "lr_cross_entropy": 1e30}
    assert train.main(arguments(**options)) == 1
    assert "try a smaller --lr-cross-entropy" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch, capsys):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("examples.train_gpt", run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: tqdm, matplotlib not installed: pip install tqdm matplotlib\n"


# --- what the report measures ----------------------------------------------------------------------------------------


def test_parallelogram_loss_is_equation_3_of_the_paper():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    quadruples = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])  # a square, and one corner moved by 1
    sigma = math.sqrt((0 + 1 + 1 + 2 + 5) / 5)
    expected = torch.tensor([0.0, 1 / sigma])
    torch.testing.assert_close(analysis.parallelogram_loss(points, quadruples), expected)
    torch.testing.assert_close(analysis.parallelogram_loss(7 * points, quadruples), expected)


def test_principal_components_are_those_of_the_singular_values():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    points, share = analysis.principal_components(vectors)
    centred = vectors.double() - vectors.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(torch.tensor(share, dtype=torch.float64), (s**2 / (s**2).sum())[:2])
    torch.testing.assert_close(points.abs(), (u * s)[:, :2].abs())


def test_nearest_tokens_are_nearest_by_distance_and_not_the_token_itself():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [10.0, 10.0]])
    assert analysis.nearest_tokens(vectors, [0, 3], 2) == [
        [(2, 1.0), (1, 3.0)],
        [(2, pytest.approx(math.sqrt(181))), (1, pytest.approx(math.sqrt(149)))][::-1],
    ]


def test_a_relation_takes_words_of_one_token_after_a_space_where_it_can():
    ids = {" get": 1, " set": 2, "get": 3, "set": 4, "open": 5, "close": 6, " read": 7, "write": 8}
    words = types.SimpleNamespace(encode=lambda text: [ids[text]] if text in ids else [0, 0])
    (found,) = analysis.find_parallelograms(words)
    assert found.relation == "opposites"
    assert found.pairs == [("get", "set"), ("open", "close")]
    assert found.quadruples.tolist() == [[1, 2, 5, 6]]


def test_a_head_that_cannot_be_measured_is_named_with_its_error(monkeypatch):
    monkeypatch.setattr(head_cost, "PROCESSES", 1)
    monkeypatch.setattr(head_cost, "HEADS", {"unknown": None})
    assert head_cost.compare({"device": "cpu", "threads": 1}) == {"unknown": {"error": "KeyError: 'unknown'"}}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks on a CPU are read from Linux's /proc")
def test_a_dense_head_holds_at_least_its_logits():
    spec = {"head": "cross_entropy", "tokens": 1024, "width": 16, "classes": 4096, "n": 28.0, "dtype": "float32"}
    program = """if True:
        import json, sys
        from examples.train_gpt import head_cost
        print(json.dumps(head_cost.measure(json.loads(sys.argv[1]))))"""
    spec |= {"device": "cpu", "threads": torch.get_num_threads()}
    run = subprocess.run([sys.executable, "-c", program, json.dumps(spec)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr  # a process of its own: memory that earlier tests freed would hide the peak
    cost = json.loads(run.stdout)
    assert cost["ms"] > 0
    assert 1024 * 4096 * 4 < cost["bytes"] < 6 * 1024 * 4096 * 4


# --- texts and files that are not as they should be -----------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": null}', b"\xff\xfe\0"])
def test_a_damaged_tokenizer_is_one_line_with_the_mend(content, bins, corpus, text, tmp_path, capsys):
    """Beside nanoGPT's files and in the run's own data folder."""
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes((bins / name).read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert train.main(arguments(data=str(tmp_path), out=tmp_path / "out", steps=1)) == 2
    found = capsys.readouterr().err
    assert re.fullmatch(r"error: .*tokenizer\.json cannot be read as a tokenizer \(.*\): .*remove it.*\n", found)

    config = replace(Config(), **TINY, data=(str(text),), out=str(tmp_path / "own"))
    data.load(config)
    (path,) = (tmp_path / "own" / "data").glob("*/tokenizer.json")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json cannot be read .*: remove .* to have the text tokenised again"
    ):
        data.load(config)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", b""),
        ("meta.json", b"[1]"),
        ("meta.json", b'{"bytes": 3}'),
        ("train.bin", b""),
        ("val.bin", b"abc"),
    ],
)
def test_a_damaged_data_folder_is_named_with_the_mend(name, content, text, tmp_path):
    config = replace(Config(), **TINY, data=(str(text),), out=str(tmp_path))
    whole = data.load(config)
    (path,) = (tmp_path / "data").glob(f"*/{name}")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is .*: remove .* to have the text tokenised again"):
        data.load(config)
    shutil.rmtree(path.parent)
    assert data.load(config).fingerprint == whole.fingerprint


def test_three_megabytes_of_one_character_are_tokenised_in_seconds(tmp_path):
    """In time that grows with the text: a word's pairs are merged in time quadratic in its length, and this is one word.

    Processor time, for the machine may be busy.
    """
    seconds = {}
    for size in (300_000, 3_000_000):
        path = tmp_path / f"{size}.txt"
        path.write_text("é" * (size // 2))
        config = replace(Config(), **TINY, data=(str(path),), out=str(tmp_path / str(size)))
        start = time.process_time()
        corpus = data.load(config)
        seconds[size] = time.process_time() - start
        ids = corpus.val[:50].tolist() + corpus.val[-50:-1].tolist()
        assert set(corpus.vocabulary.decode(ids)) <= {"é", "\ufffd"}
        assert corpus.vocabulary.decode(corpus.vocabulary.encode("aé" * 700)) == "aé" * 700
    assert seconds[3_000_000] < 40 * max(seconds[300_000], 0.1) and seconds[3_000_000] < 40


def test_ordinary_words_are_whole(corpus):
    """Only words beyond 512 bytes come in pieces."""
    split = corpus.vocabulary.tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for word, _ in split("return a_rather_long_name + " + "x" * 512)][-2:] == ["Ġ" + "x" * 511, "x"]
    assert [len(word) for word, _ in split("y" * 1100)] == [512, 512, 76]
    assert [word for word, _ in split("return value\n")] == ["return", "Ġvalue", "Ċ"]
