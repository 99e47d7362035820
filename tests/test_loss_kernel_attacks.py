"""What broke the loss kernel when somebody tried to break it, a test for each."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_files import CONFIG, kernel, posix, same
from test_sgld import classes, network
from torch import nn

import harmonic_triton as ht
from harmonic_triton import LossKernel, LossTraces, SGLDConfig, StreamingCovariance
from harmonic_triton.__main__ import main
from harmonic_triton._common import files
from harmonic_triton._common.claims import Claim, InUseError
from harmonic_triton.losskernel import checkpoint, cli
from harmonic_triton.losskernel.per_sample_losses import classification_loss
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stream import sample_losses
from harmonic_triton.losskernel.traces import store


def twice(model, batch):
    return 2 * classification_loss(model, batch)


twice.__qualname__ = classification_loss.__qualname__  # as two lambdas, or an edited function, have one name


def main_options(arguments):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


# --- what a directory holds --------------------------------------------------------------------------------------------


def test_a_kernel_whose_draws_were_replaced_says_so(tmp_path):
    """It keeps means and scales, and read whatever draws lay in the directory: correlations beyond 1.5 off."""
    first = kernel(tmp_path / "run")
    assert first.correlation.isfinite().all()
    shutil.rmtree(tmp_path / "run")
    data = classes()
    ht.loss_kernel(
        network(), classification_loss, data, data, CONFIG, seed=6, keep="traces", checkpoint_dir=tmp_path / "run",
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="damaged: rows 0 to"):
        first.accumulator.correlation(slice(None))


def test_a_reader_goes_on_while_draws_are_added(tmp_path):
    writer, draws = LossTraces(3, path=tmp_path), torch.randn(8, 3)
    writer.update(draws[:4])
    reader = LossTraces(3, path=tmp_path)
    before = reader.covariance(slice(None))
    writer.update(draws[4:])
    assert torch.equal(reader.covariance(slice(None)), before) and reader.count == 4


@pytest.mark.parametrize("keep", ["traces", "covariance"])
def test_another_loss_of_the_same_name_is_not_taken_for_the_run_s(tmp_path, keep):
    """Lambdas, partials and edited functions have one name; a stored kernel came back for another loss."""
    kernel(tmp_path, keep)
    with pytest.raises(ValueError, match="losses at the trained weights"):
        kernel(tmp_path, keep, loss=twice)


def test_another_forward_pass_of_the_same_weights_is_not_taken_for_the_run_s(tmp_path):
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    def draws(model):
        data = classes()
        return list(
            sample_losses(
                model, classification_loss, data, data, CONFIG, seed=5, checkpoint_dir=tmp_path, progress=False
            )
        )

    draws(network())
    with pytest.raises(ValueError, match="losses at the trained weights"):
        draws(Doubled(*network()))


def test_last_digits_of_losses_do_not_make_another_run():
    """Threads and devices add in another order."""
    data = classes()
    sampler = Sampler(network(), classification_loss, data, data, CONFIG, seed=5)
    state = sampler.state_dict()
    state["initial_losses"] = state["initial_losses"] * (1 + 1e-5)
    sampler.load_state_dict(state)
    del state["initial_losses"]  # of an earlier version
    sampler.load_state_dict(state)


def test_an_interruption_in_the_checksum_leaves_traces_whole(tmp_path, monkeypatch):
    """Ctrl-C while the checksum of a block was taken: the next update wrote a state that no longer fitted its draws."""
    traces, draws = LossTraces(4, path=tmp_path), torch.randn(30, 4)
    traces.update(draws[:10])
    real = zlib.crc32

    def interrupted(*arguments):
        monkeypatch.setattr(zlib, "crc32", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(zlib, "crc32", interrupted)
    with pytest.raises(KeyboardInterrupt):
        traces.update(draws[10:20])
    traces.update(draws[10:20])
    traces.update(draws[20:])
    traces.close()
    read = LossTraces(4, path=tmp_path)
    assert read.count == 30
    torch.testing.assert_close(read.covariance(slice(None)), torch.cov(draws.T), rtol=0.02, atol=0.02)


@posix
@pytest.mark.parametrize("where", ["ftruncate", "write"])
def test_an_interruption_while_a_directory_is_claimed(tmp_path, monkeypatch, where):
    """The lock stayed for as long as the process: the cell that was run again was told of "another process"."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as kept:
        patched.setattr(os, where, interrupted)
        Claim(tmp_path / "lock")
    Claim(tmp_path / "lock").release()
    assert kept.value is not None


def test_an_interruption_while_traces_are_claimed(tmp_path, monkeypatch):
    traces, real, calls = LossTraces(2, path=tmp_path), store.stamp, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(store, "stamp", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        traces.update(torch.ones(2, 2))
    traces.close()  # as loss_kernel does it
    LossTraces(2, path=tmp_path).update(torch.ones(2, 2))
    assert kept.value is not None


def test_the_order_of_large_data_is_in_its_fingerprint():
    """A row of a power of two began with the same token everywhere, and that column alone was looked at."""
    tokens = torch.randint(0, 50, (2**16, 64)).repeat(17, 1)
    tokens[:, 0] = 1
    assert checkpoint.digest({"x": tokens[: 2**20]}) != checkpoint.digest({"x": tokens[: 2**20].flip(0)})


def test_saved_kernels_have_any_buffer(tmp_path):
    losses = torch.randn(1, 20, 4)
    sums = StreamingCovariance(4, buffer_size=8)
    sums.update(losses[0])
    saved = LossKernel(sums, LossKernel.from_losses(losses).record)
    same(LossKernel.load(saved.save(tmp_path / "k.safetensors")), saved)


def test_numpy_numbers_in_the_settings(tmp_path):
    """They came through a run and failed when its kernel was saved; and 20 was another run than 20.0."""
    given = replace(CONFIG, lr=np.float32(1e-4), num_chains=np.int64(2), num_draws=np.int32(3), nbeta=20)
    assert type(given.lr) is float and type(given.num_chains) is int and type(given.nbeta) is float
    assert repr(given.nbeta) == repr(SGLDConfig(lr=1.0, nbeta=20.0, localization=0.0, batch_size=1).nbeta)
    data = classes()
    found = ht.loss_kernel(network(), classification_loss, data, data, given, seed=0, progress=False)
    same(LossKernel.load(found.save(tmp_path / "k.safetensors")), found)


@posix
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """torch.save made "unexpected pos" of it."""
    import resource

    checkpoint.save(tmp_path / "state.pt", {"x": torch.ones(3)})
    former = (tmp_path / "state.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 6000, 20000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                checkpoint.save(tmp_path / "state.pt", {str(i): torch.randn(1000) for i in range(100)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "state.pt").read_bytes() == former and len(list(tmp_path.iterdir())) == 1


def test_an_interruption_of_a_save_stays_one(tmp_path):
    """A notebook, and the command's "stopped", were given torch.save's RuntimeError."""

    checkpoint.save(tmp_path / "state.pt", {"x": 1})
    writes = files.replacing

    @contextlib.contextmanager
    def interrupted(path):
        with writes(path) as file:
            yield Interrupting(file)

    class Interrupting(io.RawIOBase):
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls == 20:
                raise KeyboardInterrupt
            return self.file.write(data)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "replacing", interrupted)
        checkpoint.save(tmp_path / "state.pt", {str(i): torch.randn(1000) for i in range(100)})
    assert checkpoint.load(tmp_path / "state.pt") == {"x": 1}


def test_settings_are_kept_where_draws_lie_before_the_first_checkpoint(tmp_path):
    """Estimated anew on other threads they were another run's, and the draws were refused."""
    options = main_options(["entry:f"])
    cli.write_probe(tmp_path, CONFIG)
    assert cli.resumed(options, tmp_path) is None  # nothing has begun
    LossTraces(3, path=tmp_path / "traces-0").update(torch.randn(2, 3))
    assert cli.resumed(options, tmp_path) == CONFIG


@pytest.mark.parametrize("keep", ["traces", "covariance"])
def test_another_share_of_queries_is_another_run(tmp_path, keep):
    """The samples and queries lie in one data set, whose hash does not say where the queries begin."""
    (x, y), settings = classes(), replace(CONFIG, num_chains=2, num_draws=2)

    def run(first, last):
        return ht.loss_kernel(
            network(), classification_loss, (x, y), (x[:first], y[:first]), settings, seed=0, keep=keep,
            query_data=(x[first:last], y[first:last]), checkpoint_dir=tmp_path, progress=False,
        )  # fmt: skip

    run(10, 14)
    with pytest.raises(ValueError, match="query losses: 4 there, 2 here"):
        run(12, 14)


# --- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["traces", "covariance"])
def test_huge_draws_are_counted_as_the_record_says(keep):
    """The sums looked at a draw's norm and left it out, the diagnostics at single losses and knew nothing of it.

    Both look at single losses now: a draw of losses below 2^52 counts, however large its norm.
    """
    losses = torch.randn(4, 10, 4).double() + 3
    losses[0, 3] = 2**52.1
    losses[1, 5:] = 2**52.1
    losses[2, 1] = 2**51.7
    found = LossKernel.from_losses(losses, keep=keep)
    assert found.record.dead == {1: 5} and found.record.skipped == {0: 1}
    assert found.num_draws == 29
    assert found.accumulator.dead == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_sums_about_two_references(dtype):
    """In float64 the other's triangle was changed on the way, in memory that both halves share: K was wrong by its size."""
    losses = torch.randn(40, 9, dtype=torch.float64) + 3
    one, other = (StreamingCovariance(9, dtype=dtype, buffer_size=4) for _ in range(2))
    one.update(losses[:11])
    other.update(losses[11:])
    before = other.state_dict()
    one.merge(other)
    assert torch.equal(other.state_dict()["second_moment"], before["second_moment"])
    tolerance = 20 * torch.finfo(dtype).eps
    want = torch.cov(losses.T).to(dtype)
    torch.testing.assert_close(one.compute().covariance, want, rtol=0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("buffer_size", [4, 512])
def test_sums_of_losses_under_inference_mode(buffer_size):
    losses = torch.randn(12, 5)
    sums = StreamingCovariance(5, buffer_size=buffer_size)
    with torch.inference_mode():
        sums.update(losses[:7] * 1.0)
        sums.variance()
    sums.update(losses[7:])
    other = StreamingCovariance(5, buffer_size=buffer_size)
    with torch.inference_mode():
        other.load_state_dict(sums.state_dict())
    other.merge(sums)
    other.update(losses)
    torch.testing.assert_close(sums.compute().covariance, torch.cov(losses.T))
    torch.testing.assert_close(other.compute().covariance, torch.cov(losses.repeat(3, 1).T))


def test_traces_of_losses_under_inference_mode():
    losses = torch.randn(12, 5)
    with torch.inference_mode():
        traces = LossTraces(5, dtype=torch.float32, capacity=20)
        traces.update(losses[:7] * 1.0)
    traces.update(losses[7:])
    torch.testing.assert_close(traces.covariance(slice(None)), torch.cov(losses.T))


def test_losses_without_a_gradient_are_told():
    data = classes()

    def detached(model, batch):
        return classification_loss(model, batch).detach()

    with pytest.raises(ValueError, match="per_sample_loss gives losses without a gradient"):
        ht.loss_kernel(network(), detached, data, data, CONFIG, seed=0, progress=False)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.inference_mode forbids"):
        kernel()


def test_a_kernel_keeps_its_own_labels_and_losses():
    initial, labels = torch.ones(3), torch.arange(3)
    found = LossKernel.from_losses(torch.randn(2, 5, 3), initial_losses=initial, labels=labels)
    initial.zero_()
    labels.zero_()
    assert found.initial_losses.tolist() == [1, 1, 1] and found.labels.tolist() == [0, 1, 2]


def test_initial_losses_that_are_no_tensor():
    with pytest.raises(TypeError, match="initial_losses must be a torch.Tensor"):
        LossKernel.from_losses(torch.randn(2, 5, 3), initial_losses=[1.0, 2.0, 3.0])


# --- the command -------------------------------------------------------------------------------------------------------


def test_starting_over_waits_for_a_run_without_a_checkpoint(tmp_path):
    """Before its first checkpoint a run with traces lost them to --no-resume."""
    (tmp_path / "traces-0").mkdir()
    (tmp_path / "traces-0" / "draws.bin").write_bytes(b"draws")
    (tmp_path / cli.PROBE_FILE).write_text("{}")
    held = Claim(tmp_path / "kernel-0.lock")
    with pytest.raises(InUseError):
        cli.clear(tmp_path)
    with pytest.raises(InUseError):
        cli.write_probe(tmp_path, CONFIG)
    assert (tmp_path / "traces-0" / "draws.bin").exists() and (tmp_path / cli.PROBE_FILE).read_text() == "{}"
    held.release()
    cli.clear(tmp_path)
    assert not (tmp_path / "traces-0").exists() and not (tmp_path / cli.PROBE_FILE).exists()


@posix
def test_the_settings_do_not_follow_a_planted_link(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / "run").mkdir()
    os.symlink(tmp_path / "precious", tmp_path / "run" / (cli.PROBE_FILE + ".tmp"))
    cli.write_probe(tmp_path / "run", CONFIG)
    assert (tmp_path / "precious").read_text() == "data"


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "entry_for_attack.py").write_text(
        "from test_sgld import classes, network\n"
        "from harmonic_triton.losskernel.per_sample_losses import classification_loss\n"
        "def f(): return network(), classification_loss, classes(), classes()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "file").write_text("")
    more = ["--out", str(tmp_path / "file"), "--lr", "1e-4", "--localization", "50", "--no-report", "--quiet"]
    assert main(["loss-kernel", "entry_for_attack:f", *more]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno ")


# --- the report --------------------------------------------------------------------------------------------------------


def test_the_report_of_a_few_samples_says_what_it_shows(tmp_path):
    """Three samples are laid out by their components, whatever was asked for; sentences end."""
    pytest.importorskip("matplotlib")
    found = LossKernel.from_losses(torch.randn(2, 6, 3) + 3)
    page = found.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Right: the first two principal components" in page and "UMAP" not in page
    assert "with one another.<" in page


def test_label_names_that_matplotlib_would_hide(tmp_path):
    pytest.importorskip("matplotlib")
    found = LossKernel.from_losses(torch.randn(2, 6, 8) + 3)
    names = ["_", "_private", "", "a" * 23 + "$"]
    figure = found.plot(labels=torch.arange(8) % 4, label_names=names, method="pca")
    shown = [text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    assert shown == [" _", " _private", "–", "a" * 23 + r"\$"]


@pytest.mark.slow
def test_an_embedding_leaves_the_threads_as_they_are():
    """umap-learn set them anew, and what was sampled behind it had other last digits."""
    pytest.importorskip("umap")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        LossKernel.from_losses(torch.randn(2, 20, 30) + 3).embed("umap")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
