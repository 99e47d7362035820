"""Checkpoints survive a kill at any moment, and are refused where they do not belong."""

import copy
import itertools
import os
import textwrap

import fresh
import pytest
import torch
from test_sgld import classes, draws, network, settings

from harmonic_triton.losskernel import checkpoint
from harmonic_triton.losskernel.per_sample_losses import classification_loss, regression_loss
from harmonic_triton.losskernel.sampling.config import METHODS
from harmonic_triton.losskernel.sampling.sampler import Sampler
from harmonic_triton.losskernel.sampling.stream import sample_losses

# The parent imports, then forks and kills its children with SIGKILL at random moments. It runs no torch operation itself
# before the last fork, so that forking is safe. Each child goes on from what its predecessors left on the disk.
KILLED = textwrap.dedent("""
    import os, random, signal, sys, time, torch
    sys.path.insert(0, "tests")
    from test_checkpoint import kill_settings
    from test_sgld import classes, network
    from harmonic_triton.losskernel.per_sample_losses import classification_loss
    from harmonic_triton.losskernel.sampling.stream import sample_losses
    torch.set_num_threads(1)
    method, kills, directory, longest = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    begun = sys.argv[5] == "begun"  # a child is killed some time after it has added a draw, not after its start
    chance = random.Random(0)

    def stream():
        data = classes()
        torch.save(torch.cat(list(sample_losses(
            network(), classification_loss, data, data, kill_settings(method), seed=0, progress=False,
            checkpoint_dir=directory, checkpoint_seconds=0.0))), f"{directory}/all.pt")

    def stored():
        path = f"{directory}/draws.f32"
        return os.path.getsize(path) if os.path.exists(path) else 0

    survived = 0
    for _ in range(kills):
        before = stored()
        child = os.fork()
        if child == 0:
            stream()
            os._exit(0)
        while begun and stored() <= before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        survived += os.WIFEXITED(os.waitpid(child, 0)[1])
    stream()
    print(survived)
""")


def kill_settings(method):
    return settings(
        lr=1e-4, nbeta=50.0, num_chains=4, num_draws=60, num_burnin_steps=5, method=method, chain_group_size=2
    )


def killed_run(tmp_path, method, kills, longest, when="any"):
    """(the whole stream after so many kills, how many children had finished before theirs)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = fresh.run(KILLED, method, kills, tmp_path, longest, when, env=environment)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "all.pt"), int(done.stdout)


def uninterrupted(method):
    data, config = classes(), kill_settings(method)
    every = draws(network(), classification_loss, data, data, config)
    return every.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 2)  # groups of two chains, draw by draw


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_three_kills(tmp_path):
    got, _ = killed_run(tmp_path, "sgld", 3, 0.1, "begun")
    assert torch.equal(got, uninterrupted("sgld"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("method", METHODS)
def test_fifty_kills(tmp_path, method):
    got, survived = killed_run(tmp_path, method, 50, 0.12)
    assert torch.equal(got, uninterrupted(method))
    print(f"{method}: 50 kills, {survived} after the run had finished")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_left_behind_goes_on_bitwise(tmp_path, method, size):
    data = classes()
    config = settings(lr=1e-4, num_chains=3, num_draws=6, num_burnin_steps=2, method=method, chain_group_size=size)
    run = lambda **options: sample_losses(
        network(), classification_loss, data, data, config, seed=5, progress=False, **options
    )
    whole = list(run())
    for stop in (0, 1, 5, 6, 7, 11):
        partial = run(checkpoint_dir=tmp_path / f"{stop}", checkpoint_seconds=0.0)
        first = list(itertools.islice(partial, stop))
        del partial
        again = list(run(checkpoint_dir=tmp_path / f"{stop}"))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))
        assert len(again) == len(whole) and all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    third = list(run(checkpoint_dir=tmp_path / "0"))  # a finished run comes from the disk alone
    assert all(torch.equal(a, b) for a, b in zip(third, whole, strict=True))


def test_draws_after_the_last_checkpoint_are_drawn_again(tmp_path):
    """The file of draws may be longer than the state says, also by part of a draw."""
    data, config = classes(), settings(lr=1e-4)
    run = lambda: sample_losses(
        network(), classification_loss, data, data, config, seed=0, progress=False, checkpoint_dir=tmp_path,
        checkpoint_seconds=0.0,
    )  # fmt: skip
    stream = run()
    list(itertools.islice(stream, 4))
    del stream
    with open(tmp_path / "draws.f32", "ab") as file:
        file.write(b"half a draw")
    config_whole = draws(network(), classification_loss, data, data, config).transpose(0, 1).flatten(0, 1)
    assert torch.equal(torch.cat(list(run())), config_whole)


def test_the_state_is_taken_between_any_two_draws():
    data, config = classes(), settings(lr=1e-4, num_chains=3, num_draws=4, chain_group_size=2)
    make = lambda: Sampler(network(), classification_loss, data, data, config, seed=0)
    whole = list(make().run())
    one = make()
    assert one.remaining == 12
    for i, block in enumerate(one.run(), start=1):
        state = copy.deepcopy(one.state_dict())
        assert one.remaining == 12 - sum(len(b.losses) for b in whole[:i])
        other = make()
        other.load_state_dict(state)
        rest = list(other.run())
        assert len(rest) == len(whole) - i
        for a, b in zip(rest, whole[i:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(block.losses, whole[i - 1].losses)


def other_model():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    return model


def other_buffer():
    model = network()
    model[1].running_mean[0] += 1e-3
    return model


def other_data():
    x, y = classes()
    x[50, 2] += 1e-3
    return x, y


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": other_model()}, "model: "),
        ({"model": other_buffer()}, "model: "),
        ({"per_sample_loss": lambda m, b: regression_loss(m, (b[0], m(b[0])))}, "per-sample loss: classification_loss"),
        ({"train_data": other_data()}, "train data: 90 samples"),
        ({"eval_data": other_data()}, "evaluation data: 90 samples"),
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"config": settings(lr=2e-4)}, "lr: 0.0001 there, 0.0002 here"),
        ({"config": settings(lr=1e-4, num_draws=11)}, "num_draws: 10 there, 11 here"),
        ({"config": settings(lr=1e-4, num_chains=4)}, "chains: 0 1 2 there, 0 1 2 3 here"),
        ({"mask": "4.*"}, "sampled parameters: "),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(tmp_path, changes, words):
    base = {
        "model": network(), "per_sample_loss": classification_loss, "train_data": classes(), "eval_data": classes(),
        "config": settings(lr=1e-4), "seed": 5, "mask": None,
    }  # fmt: skip

    def start(arguments):
        arguments = dict(arguments)
        positional = [arguments.pop(name) for name in list(base)[:5]]
        return sample_losses(*positional, checkpoint_dir=tmp_path, checkpoint_seconds=0.0, progress=False, **arguments)

    stream = start(base)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        start({**base, **changes})
    assert words in str(refused.value)
    assert len(list(start(base))) == 10  # and the directory is as good as it was


def test_dead_chains_are_remembered(tmp_path):
    calls = [0]

    def loss(model, batch):
        calls[0] += 1
        return torch.where(model.bias.sum() == 0, 0.0, torch.inf) * (1 + model.bias.sum()) + batch[:, 0]

    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.bias)
    run = lambda: sample_losses(
        model, loss, torch.zeros(40, 2), torch.zeros(40, 2), settings(lr=1e-4, chain_group_size=1, num_draws=50), seed=0,
        checkpoint_dir=tmp_path, checkpoint_seconds=0.0, progress=False,
    )  # fmt: skip
    stream = run()
    with pytest.warns(UserWarning, match="diverged"):
        list(itertools.islice(stream, 70))
    del stream
    with pytest.warns(UserWarning, match="chain 2 diverged") as caught:
        assert len(list(run())) == 150
    assert len(caught) == 1


# --- the file itself -------------------------------------------------------------------------------------------------


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"a": torch.arange(3), "b": {"c": [1, "x", None]}})
    assert torch.equal(checkpoint.load(path)["a"], torch.arange(3)) and checkpoint.load(path)["b"] == {
        "c": [1, "x", None]
    }

    class Unsavable:
        def __reduce__(self):
            raise RuntimeError("not to be saved")

    with pytest.raises(RuntimeError, match="not to be saved"):
        checkpoint.save(path, {"a": torch.zeros(1000), "b": Unsavable()})
    assert torch.equal(checkpoint.load(path)["a"], torch.arange(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    checkpoint.save(path, {"a": 2})
    assert checkpoint.load(path) == {"a": 2}


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.load(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="has no checksum at its end"):
        checkpoint.load(path)


def test_digest_sees_every_kind_of_change():
    base = {"w": torch.randn(10, 10), "n": torch.arange(4)}
    seen = {checkpoint.digest(base)}
    assert checkpoint.digest(copy.deepcopy(base)) in seen
    changed = base["w"].clone()
    changed[3, 3] = torch.nextafter(changed[3, 3], torch.tensor(9.0))
    for other in (
        {**base, "w": changed},
        {**base, "w": base["w"].T},
        {**base, "w": base["w"].view(100)},
        {**base, "w": base["w"].double()},
        {**base, "n": base["n"].int()},
        {"v": base["w"], "n": base["n"]},
        {"w": base["w"]},
    ):
        found = checkpoint.digest(other)
        assert found not in seen
        seen.add(found)
    large = torch.zeros(3 * 2**20)
    one, two = large.clone(), large.clone()
    one[1], two[2**21 + 1] = 1.0, 2.0  # neither is among the entries sampled
    assert len({checkpoint.digest({"w": t}) for t in (large, one, two)}) == 3
    assert checkpoint.digest({"w": torch.zeros(0)}) and checkpoint.digest({"w": torch.zeros(3, dtype=torch.bfloat16)})
