"""What is on the disk: one run's and no other's, whole after a kill at any write, and no damage without an error."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from test_sgld import classes, network, settings

import harmonic_triton as ht
from harmonic_triton import LossKernel, LossTraces
from harmonic_triton.losskernel.per_sample_losses import classification_loss
from harmonic_triton.losskernel.sampling.stream import sample_losses

CONFIG = settings(lr=1e-4, num_chains=4, num_draws=8, num_burnin_steps=2, chain_group_size=2)
posix = pytest.mark.skipif(os.name != "posix", reason="links and locks as on POSIX")


def other_model() -> torch.nn.Module:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    return model


def kernel(directory: Path | None = None, keep: str = "traces", *, model=None, loss=classification_loss, seconds=1e9):
    """A run that keeps a checkpoint at its end, or every so many seconds."""
    data = classes()
    return ht.loss_kernel(
        model or network(), loss, data, data, CONFIG, seed=5, keep=keep, checkpoint_dir=directory,
        checkpoint_seconds=seconds, progress=False,
    )  # fmt: skip


def stream(directory: Path | None = None, seconds: float = 0.0, seed: int = 5):
    data = classes()
    return sample_losses(
        network(), classification_loss, data, data, CONFIG, seed=seed, checkpoint_dir=directory,
        checkpoint_seconds=seconds, progress=False,
    )  # fmt: skip


def same(one: LossKernel, other: LossKernel) -> None:
    """Bitwise."""
    assert one.num_draws == other.num_draws
    assert torch.equal(one.correlation, other.correlation) and torch.equal(one.mean, other.mean)
    assert torch.equal(one.variance, other.variance)


class Interrupted(Exception):  # noqa: N818
    """In the place of a kill, where the process is to live."""


def interrupted_at(call: int):
    """classification_loss that raises at its n-th call."""
    calls = itertools.count(1)

    def loss(model, batch):
        if next(calls) == call:
            raise Interrupted
        return classification_loss(model, batch)

    loss.__qualname__ = classification_loss.__qualname__
    return loss


@functools.cache
def calls_of_a_run() -> int:
    """How often a whole run asks for losses: the estimate of the stability bound takes one or two dozen pairs of them."""
    calls = []

    def loss(model, batch):
        calls.append(None)
        return classification_loss(model, batch)

    kernel(loss=loss)
    return len(calls)


# --- draws belong to one run, and count once ---------------------------------------------------------------------------


def interrupt_after_first_group(directory: Path) -> None:
    """Its draws have reached the traces by then, and there is no checkpoint."""
    for call in range(50, 90, 10):
        with pytest.raises(Interrupted):
            kernel(directory, loss=interrupted_at(call))
        if (directory / "traces-0").exists() and LossTraces.open(directory / "traces-0").count:
            break
    assert LossTraces.open(directory / "traces-0").count == 16 and not (directory / "kernel-0.pt").exists()


def test_draws_that_no_checkpoint_counts_are_drawn_again(tmp_path):
    interrupt_after_first_group(tmp_path)
    again = kernel(tmp_path)
    assert again.num_draws == 32
    same(again, kernel())


def test_a_run_begins_anew_without_its_checkpoint(tmp_path):
    """As the message about a damaged one advises; also where the draws of the earlier end are still in use."""
    plain, first = kernel(), kernel(tmp_path)
    (tmp_path / "kernel-0.pt").unlink()
    again = kernel(tmp_path)
    assert again.num_draws == 32
    for found in (again, first):
        same(found, plain)


def test_traces_of_another_model_are_not_mixed_in(tmp_path):
    first = kernel(tmp_path)
    (tmp_path / "kernel-0.pt").unlink()
    with pytest.raises(ValueError, match="traces-0.*holds the draws of another run"):
        kernel(tmp_path, model=other_model())
    assert LossTraces.open(tmp_path / "traces-0").count == 32
    same(first, kernel())


def test_traces_without_a_name_are_not_taken_for_a_run_s(tmp_path):
    LossTraces(90, path=tmp_path / "traces-0").update(torch.randn(3, 90))
    with pytest.raises(ValueError, match="another run"):
        kernel(tmp_path)
    assert LossTraces.open(tmp_path / "traces-0").count == 3


def test_traces_are_of_one_run(tmp_path):
    losses = torch.randn(6, 5)
    traces = LossTraces(5, path=tmp_path, run="one")
    traces.update(losses)
    traces.close()
    assert LossTraces(5, path=tmp_path, run="one").count == LossTraces(5, path=tmp_path).count == 6
    with pytest.raises(ValueError, match=r"another run \(one, this is two\)"):
        LossTraces(5, path=tmp_path, run="two")
    state = traces.state_dict()
    traces.reset()
    assert traces.count == LossTraces.open(tmp_path).count == 0
    other = losses.clone()
    other[4, 2] += 1.0
    traces.update(other[:3])  # other draws than the state's, with its reference's first batch
    traces.update(other[3:])
    with pytest.raises(ValueError, match="draws of another run than the state's"):
        traces.load_state_dict(state)


@pytest.mark.parametrize("keep", ["covariance", "traces"])
def test_a_cell_is_run_again_after_an_interruption(tmp_path, keep):
    """A notebook keeps the exception, with it the frames and all they hold."""
    with pytest.raises(Interrupted) as kept:
        kernel(tmp_path, keep, loss=interrupted_at(calls_of_a_run() - 18), seconds=0.0)
    assert (tmp_path / "kernel-0.pt").exists()
    first, again = kernel(tmp_path, keep), kernel(tmp_path, keep)
    same(first, kernel(keep=keep))
    same(again, first)
    assert kept.value is not None


# --- replayed draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "short", "zeroed", "flipped"])
def test_damaged_draws_are_not_replayed(tmp_path, damage):
    want = list(stream())
    list(stream(tmp_path))
    path = tmp_path / "draws.f32"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data = data[:-1] if damage == "short" else data
        if damage == "zeroed":
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        if damage == "flipped":
            data[len(data) // 2 + 10] ^= 4
        path.write_bytes(data)
    got = []
    with pytest.raises(ValueError, match=r"draws\.f32 is damaged.*by removing it"):
        got.extend(stream(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False))  # and none that is wrong before
    assert damage in ("missing", "short") or len(got) in (8, 9)


def test_draws_without_a_state_are_not_overwritten(tmp_path):
    list(stream(tmp_path))
    (tmp_path / "state.pt").unlink()
    before = (tmp_path / "draws.f32").read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt, which says of what run, is gone"):
        stream(tmp_path, seed=6)
    assert (tmp_path / "draws.f32").read_bytes() == before


# --- one at a time -----------------------------------------------------------------------------------------------------


def test_a_later_call_takes_over_and_the_earlier_says_so(tmp_path):
    """As a cell run again while the iterator of the first time is still there."""
    first = stream(tmp_path)
    begun = list(itertools.islice(first, 3))
    second = stream(tmp_path)
    again = list(itertools.islice(second, 5))
    with pytest.raises(RuntimeError, match="a later call in this process has taken"):
        next(first)
    again += second
    assert all(torch.equal(a, b) for a, b in zip(again, stream(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(begun, again, strict=False))


CHILD = textwrap.dedent("""
    import sys, torch
    sys.path.insert(0, "tests")
    torch.set_num_threads(1)
    from pathlib import Path
    import test_files
    for call in (lambda: test_files.stream(Path(sys.argv[1])), lambda: test_files.kernel(Path(sys.argv[2]))):
        try:
            call()
        except RuntimeError as error:
            print(error)
""")


def test_two_processes_do_not_write_to_one_directory(tmp_path):
    """The second is told of the first; a third, when those are gone, finds whole runs."""
    first = stream(tmp_path / "draws")
    list(itertools.islice(first, 3))
    said = []

    def loss(model, batch):  # asks from within the run
        if not said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            said.append(fresh.run(CHILD, tmp_path / "draws", tmp_path / "kernel", env=environment))
        return classification_loss(model, batch)

    loss.__qualname__ = classification_loss.__qualname__
    from harmonic_triton.losskernel import collector

    held = collector.Stored(tmp_path / "kernel", {})
    loss(network(), classes())
    held.close()
    lines = said[0].stdout.splitlines()
    assert len(lines) == 2, said[0].stderr
    for line, where in zip(lines, ("draws", "kernel"), strict=True):
        assert f"{tmp_path / where} is being written by process {os.getpid()} on " in line
    rest = list(first)
    assert all(torch.equal(a, b) for a, b in zip(rest, list(stream())[3:], strict=True))
    same(kernel(tmp_path / "kernel"), kernel())


@posix
def test_a_lock_dies_with_its_process_and_not_with_its_children(tmp_path):
    """Children such as data loaders outlive a killed parent for a while."""
    from harmonic_triton._common.claims import Claim, InUseError

    ready, go = os.pipe(), os.pipe()
    parent = os.fork()
    if parent == 0:
        claim = Claim(tmp_path / "lock")
        if os.fork() == 0:
            os.read(go[0], 1)
            os._exit(0)
        os.write(ready[1], b"x")
        signal.pause()
        claim.release()
    os.read(ready[0], 1)
    with pytest.raises(InUseError, match=f"process {parent} on"):
        Claim(tmp_path / "lock")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    Claim(tmp_path / "lock").release()
    os.write(go[1], b"x")
    with pytest.raises(InUseError, match="another object or thread of this process"):
        held = Claim(tmp_path / "lock"), Claim(tmp_path / "lock")
        del held


# --- damage ------------------------------------------------------------------------------------------------------------


def flips(path: Path, count: int, seed: int = 0):
    """The file with one bit flipped after the other: of so many bytes at random."""
    data, chance = path.read_bytes(), np.random.default_rng(seed)
    for byte in chance.choice(len(data), min(count, len(data)), replace=False).tolist():
        bit = 1 << int(chance.integers(8))
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(bytes([data[byte] ^ bit]))
        yield byte, bit
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(data[byte : byte + 1])
    assert path.read_bytes() == data


def cuts(path: Path, count: int):
    """The file with its end cut off."""
    data = path.read_bytes()
    for length in (0, 1, *range(2, len(data) - 1, 2 * len(data) // count), len(data) - 1):
        path.write_bytes(data[:length])
        yield -length
    path.write_bytes(data)


def refused(call, path: Path, name: str, count: int) -> None:
    """Every damage raises ValueError with the file's name, and without damage it is read again."""
    for where in itertools.chain(flips(path, count), cuts(path, count)):
        with pytest.raises(ValueError) as error:
            call()
        assert name in str(error.value), (where, str(error.value))
        assert any(mend in str(error.value) for mend in ("remov", "copy", "no loss kernel")), where
    call()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with every kind of file."""
    folder = tmp_path_factory.mktemp("stored")
    kernel(folder / "traces").save(folder / "traces.safetensors")
    kernel(folder / "sums", "covariance").save(folder / "sums.safetensors")
    list(stream(folder / "draws"))
    return folder


def read_traces(path: Path) -> None:
    LossTraces.open(path).correlation(slice(0, 3))


READERS = {
    "traces/kernel-0.pt": lambda folder: kernel(folder / "traces"),
    "sums/kernel-0.pt": lambda folder: kernel(folder / "sums", "covariance"),
    "traces/traces-0/state.pt": lambda folder: read_traces(folder / "traces" / "traces-0"),
    "traces/traces-0/draws.bin": lambda folder: read_traces(folder / "traces" / "traces-0"),
    "draws/state.pt": lambda folder: list(stream(folder / "draws")),
    "draws/draws.f32": lambda folder: list(stream(folder / "draws")),
    "traces.safetensors": lambda folder: LossKernel.load(folder / "traces.safetensors"),
    "sums.safetensors": lambda folder: LossKernel.load(folder / "sums.safetensors"),
}


@pytest.mark.parametrize("name", READERS)
def test_no_damage_goes_unnoticed(stored, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    refused(lambda: READERS[name](stored), stored / name, Path(name).name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_flips_are_noticed(stored, name):
    """And half as many cuts; read as their readers do it, but without the run around it."""
    from harmonic_triton._common import files
    from harmonic_triton.losskernel import checkpoint, collector
    from harmonic_triton.losskernel.sampling import stream

    def draws():
        blocks = files.Blocks(stored / name, 4 * 90, "by removing it")
        blocks.load_state_dict(checkpoint.load(stored / "draws" / "state.pt", stream.KIND)["draws"])
        assert blocks.count == 32 and sum(map(len, blocks)) == 32 * 360

    readers = {
        "draws/draws.f32": draws,
        "traces/kernel-0.pt": lambda: checkpoint.load(stored / name, collector.KIND),
        "sums/kernel-0.pt": lambda: checkpoint.load(stored / name, collector.KIND),
        "draws/state.pt": lambda: checkpoint.load(stored / name, stream.KIND),
    }
    refused(readers.get(name, lambda: READERS[name](stored)), stored / name, Path(name).name, 3000)


def test_damage_is_noticed_before_a_run_goes_on(tmp_path):
    """Not hours later, when the draws are read."""
    with pytest.raises(Interrupted):  # in the second of two groups
        kernel(tmp_path, loss=interrupted_at(calls_of_a_run() - 8), seconds=0.0)
    path = tmp_path / "traces-0" / "draws.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"draws\.bin is damaged: rows 0 to 7 have changed"):
        kernel(tmp_path, loss=interrupted_at(1000))
    shutil.rmtree(tmp_path / "traces-0")
    with pytest.raises(ValueError, match=r"traces-0.*holds 0 draws, the state counts 16.*remove"):
        kernel(tmp_path)
    (tmp_path / "kernel-0.pt").unlink()
    same(kernel(tmp_path), kernel())


@pytest.mark.parametrize("keep", ["covariance", "traces"])
def test_a_file_of_somebody_else_is_no_checkpoint(tmp_path, keep):
    torch.save({"model": torch.zeros(3), "step": 7}, tmp_path / "kernel-0.pt")
    with pytest.raises(ValueError, match=r"kernel-0\.pt has no checksum at its end.*remove it"):
        kernel(tmp_path, keep)
    list(stream(tmp_path / "draws"))
    shutil.copy(tmp_path / "draws" / "state.pt", tmp_path / "kernel-0.pt")
    with pytest.raises(ValueError, match=r"kernel-0\.pt holds the state of draws, not the checkpoint of a loss kernel"):
        kernel(tmp_path, keep)


# --- written beside, renamed -------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", ["kernel-0.lock", "traces-0/draws.bin", "traces-0/lock", ".kernel-0.pt.PID.tmp"])
def test_a_planted_link_is_not_followed(tmp_path, name):
    """In the place of locks and growing files, and under the name that temporary files once had, which does no harm."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "run" / name.replace("PID", str(os.getpid()))
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    with contextlib.nullcontext() if "PID" in name else pytest.raises(OSError, match=name):
        kernel(tmp_path / "run")
    assert victim.read_text() == "precious"


@posix
def test_what_killed_saves_left_is_removed(tmp_path):
    from harmonic_triton._common.files import replacing

    for name in (".kernel-0.pt.1234.tmp", ".kernel-0.pt.00ff00ff00ff00ff.tmp"):
        (tmp_path / name).write_bytes(b"half a checkpoint")
    (tmp_path / ".kernel-0.pt.notes.tmp").write_text("not ours")
    with replacing(tmp_path / "kernel-0.pt") as other:  # of a process that is alive
        before = set(tmp_path.iterdir())
        kernel(tmp_path, "covariance")
        assert Path(other.name) in before and Path(other.name).exists()
    assert {path.name for path in tmp_path.glob(".*")} == {".kernel-0.pt.notes.tmp"}


def test_a_failed_write_leaves_the_former_file(tmp_path):
    from harmonic_triton._common import files

    files.write_text(tmp_path / "a", "first")
    with pytest.raises(Interrupted), files.replacing(tmp_path / "a") as file:
        file.write(b"second")
        raise Interrupted
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "first"


@posix
def test_what_is_no_file_is_not_replaced(tmp_path):
    """A report to /dev/null by root would make a file of it, and break every program of the machine."""
    from harmonic_triton._common import files

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(ValueError, match="no regular file"):
            files.write_text(tmp_path / name, "a report")
    assert (tmp_path / "pipe").is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["directory", "pipe"]


def test_starting_over_removes_a_run_s_files_alone(tmp_path):
    """And nothing while the run goes on in another process."""
    from harmonic_triton._common.claims import Claim, InUseError
    from harmonic_triton.losskernel import cli

    kernel(tmp_path)
    (tmp_path / "traces-of-mine").mkdir()
    (tmp_path / "traces-of-mine" / "thesis.tex").write_text("mine")
    held = Claim(tmp_path / "kernel-0.lock")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InUseError):
        cli.clear(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    held.release()
    cli.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kernel-0.lock", "thesis.tex", "traces-of-mine"]


# --- zarr --------------------------------------------------------------------------------------------------------------


def test_zarr_replaces_its_own_groups_alone(tmp_path):
    zarr = pytest.importorskip("zarr")
    found = LossKernel.from_losses(torch.randn(2, 9, 12))
    path = tmp_path / "precious"
    path.mkdir()
    found.to_zarr(path)  # an empty directory may go
    LossKernel.from_losses(torch.randn(2, 9, 7)).to_zarr(path)
    assert zarr.open_group(str(path), mode="r")["mean"].shape == (7,)
    (path / "notes.txt").write_text("mine")
    zarr.open_group(str(tmp_path / "others"), mode="w").create_array("mean", data=np.zeros(3))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    if os.name == "posix":
        (tmp_path / "link").symlink_to(path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("precious", "others", "file", "folder", *(["link"] if os.name == "posix" else [])):
        with pytest.raises(FileExistsError, match=f"{name}.*is not, or not only, what to_zarr wrote"):
            found.to_zarr(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


# --- earlier formats ---------------------------------------------------------------------------------------------------


def first_format(path: Path, losses: torch.Tensor) -> None:
    """Traces as they were before there were checksums."""
    path.mkdir()
    reference = losses.double().mean(0)
    shifted = losses.double() - reference
    (path / "draws.bin").write_bytes(shifted.bfloat16().view(torch.uint8).numpy().tobytes() + b"left over")
    np.savez(path / "state-1.npz", reference=reference.numpy(), sums=torch.stack([shifted.sum(0), shifted.square().sum(0)]).numpy(),
             chains=np.zeros(len(losses), np.int64))  # fmt: skip
    header = {"format": 1, "num_samples": losses.shape[1], "dtype": "torch.bfloat16", "count": len(losses),
              "dead": {"3": 1}, "state": "state-1.npz"}  # fmt: skip
    (path / "header.json").write_text(json.dumps(header))


def test_traces_of_the_first_format_are_read_with_a_warning(tmp_path):
    losses = 2 + 0.1 * torch.randn(10, 6)
    first_format(tmp_path / "traces", losses[:7])
    with pytest.warns(RuntimeWarning, match="before draws had checksums"):
        traces = LossTraces.open(tmp_path / "traces")
    want = LossTraces(6)
    want.update(losses[:7])
    assert traces.count == 7 and torch.equal(traces.draws(), want.draws()) and traces.dead == {3: 1}
    for part in (losses[7:9], losses[9:]):
        traces.update(part)
        want.update(part)
    again = LossTraces.open(tmp_path / "traces")
    assert torch.equal(again.draws(), want.draws())
    torch.testing.assert_close(again.variance(), want.variance(), rtol=1e-12, atol=0.0)  # sums in another order
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == ["draws.bin", "lock", "state.pt"]
    first_format(tmp_path / "short", losses)
    os.truncate(tmp_path / "short" / "draws.bin", 50)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="draws.bin is damaged"):
        LossTraces.open(tmp_path / "short")
    (tmp_path / "short" / "state-1.npz").unlink()
    with pytest.raises(ValueError, match="short is damaged or holds no traces.*state-1.npz"):
        LossTraces.open(tmp_path / "short")


def test_kernels_of_the_first_format_are_read_with_a_warning(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    from harmonic_triton.losskernel import storage

    found = LossKernel.from_losses(torch.randn(2, 9, 12))
    found.save(tmp_path / "new")
    state = storage.load(tmp_path / "new")
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(storage.flatten(state, tensors, "state"))
    save_file(tensors, tmp_path / "old", metadata={"format": "1", "loss_kernel": text})
    with pytest.warns(RuntimeWarning, match="before kernels had checksums"):
        same(LossKernel.load(tmp_path / "old"), found)


# --- killed at every write ---------------------------------------------------------------------------------------------

KILLED = textwrap.dedent("""
    import builtins, os, sys, torch
    sys.path.insert(0, "tests")
    torch.set_num_threads(1)
    from pathlib import Path
    import test_files
    from harmonic_triton._common import files
    folder, points, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

    class Counted:  # of a module or a file: what changes the disk (of writes every sixth); at the given one it is over
        def __init__(self, inner): self.__dict__["inner"] = inner
        def __getattr__(self, name):
            found = getattr(self.inner, name)
            return self.counted(found) if name in NAMES else found
        def counted(self, call):
            def counting(*arguments):
                writes = getattr(call, "__name__", "") == "write" and not isinstance(arguments[0], int)
                WRITES[0] += writes
                COUNT[0] += not writes or WRITES[0] % 6 == 1
                if COUNT[0] == COUNT[1] and (not writes or WRITES[0] % 6 == 1):
                    if writes:
                        data = memoryview(arguments[0]).cast("B")
                        call(data[:len(data) // 2])
                        self.inner.flush()
                    os._exit(9)
                if getattr(call, "__name__", "") != "fsync":  # a kill needs none, and they take most of the time
                    return call(*arguments)
            return counting
        def __enter__(self): self.inner.__enter__(); return self
        def __exit__(self, *reason): return self.inner.__exit__(*reason)

    NAMES = ("open", "write", "fsync", "replace", "rename", "ftruncate", "unlink")
    COUNT, WRITES = [0, 0], [0]

    def warm():  # what a run imports on its way, once instead of in each child
        if os.fork() == 0:
            for kind in kinds:
                test_files.tiny(kind, None)
            (folder / "imported").write_text(" ".join(sys.modules))
            os._exit(0)
        os.wait()
        for name in (folder / "imported").read_text().split():
            try:
                __import__(name)
            except ImportError:
                pass

    def run(kind, point):
        directory = folder / f"{kind}-{point}"
        child = os.fork()
        if child == 0:
            COUNT[:], WRITES[:] = (0, point), (0,)
            torch.save(test_files.tiny(kind, directory), f"{directory}.pt")
            Path(f"{directory}.count").write_text(str(COUNT[0]))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    warm()
    files.os = Counted(os)
    files.open = lambda *arguments, **options: Counted(builtins.open(*arguments, **options))
    killed = []
    for kind in kinds:
        assert run(kind, 0) == 0
        last = int((folder / f"{kind}-0.count").read_text())
        for point in range(1, last + 1) if points == "all" else range(1, last + 1, max(1, last // int(points))):
            assert run(kind, point) == 9, point
            killed.append((kind, point, last))
    COUNT[1] = 0
    for kind, point, last in killed:  # no fork from here on
        torch.save(test_files.tiny(kind, folder / f"{kind}-{point}"), folder / f"{kind}-{point}.pt")
        print(kind, point, last)
""")


def tiny(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    """A run of a dozen draws with a checkpoint at each; None for a directory gives what it must be."""
    config = settings(lr=1e-4, num_chains=4, num_draws=3, num_burnin_steps=1, chain_group_size=2, batch_size=10)
    x, y = classes()
    data = (x[:20], y[:20])
    options = {"seed": 5, "checkpoint_dir": directory, "checkpoint_seconds": 0.0, "progress": False}
    if kind == "draws":
        return {"losses": torch.cat(list(sample_losses(network(), classification_loss, data, data, config, **options)))}
    found = ht.loss_kernel(network(), classification_loss, data, data, config, keep=kind, **options)
    return {
        "correlation": found.correlation,
        "mean": found.mean,
        "variance": found.variance,
        "mean_loss": found.record.mean_loss,
    }


KINDS = ("draws", "covariance", "traces")


def kill_at(points: str, folder: Path) -> int:
    """Kill tiny runs, let each go on to its end, compare; how many."""
    run = fresh.run(KILLED, folder, points, *KINDS, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    killed = [line.split() for line in run.stdout.splitlines()]
    for kind, point, last in killed:
        whole, found = torch.load(folder / f"{kind}-0.pt"), torch.load(folder / f"{kind}-{point}.pt")
        assert all(torch.equal(found[name], whole[name]) for name in whole), (kind, point)
        if int(point) < 0.8 * int(last):  # a later save has removed what the killed one left
            assert not list((folder / f"{kind}-{point}").rglob(".*.tmp")), (kind, point)
    assert {kind for kind, _, _ in killed} == set(KINDS)
    return len(killed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_a_few_writes(tmp_path):
    assert kill_at("5", tmp_path) >= 15


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_write(tmp_path):
    assert kill_at("all", tmp_path) >= 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_tiny_run_is_that_without_a_disk(tmp_path):
    for kind in KINDS:
        plain, stored = tiny(kind, None), tiny(kind, tmp_path / kind)
        assert all(torch.equal(stored[name], plain[name]) for name in plain)
