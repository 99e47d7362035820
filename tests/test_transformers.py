"""``integrations.transformers``: loss, gradients, sampling and files of patched models."""

import copy
import functools
import json
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from oracle import oracle  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers_models import SIZES, D, V, assert_close, batch, build, dense, gradients, hidden_states  # noqa: E402

from harmonic_triton.integrations.transformers import (  # noqa: E402
    apply_harmonic_loss,
    harmonic_class,
    remove_harmonic_loss,
)

N, EPS, UPSTREAM = 7.0, 1e-3, 3.0
# Each is a case of its own: tied, untied, grouped heads, scaled embeddings, a mixture of experts, buffers made anew.
KINDS = ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "mixtral", "falcon_h1"]
CHANGES = {"gemma2": {"final_logit_softcapping": None}}


@pytest.fixture(autouse=True)
def quiet():
    """What ``transformers`` prints about tiny models is not what is tested."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def patched(name, **changes):
    return apply_harmonic_loss(build(name, **{**CHANGES.get(name, {}), **changes}), n=N, eps=EPS)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_every_gradient(name):
    given = batch()
    reference = build(name, **CHANGES.get(name, {}))
    wanted, log_p, _ = dense(reference, given["labels"], n=N, eps=EPS, input_ids=given["input_ids"])
    (UPSTREAM * wanted).backward()
    model = patched(name)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in ("gpt2", "qwen2", "gemma2", "gemma3"))
    output = model(**given)
    (UPSTREAM * output.loss).backward()
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=0)
    assert_close(gradients(model), gradients(reference), 1e-5)
    torch.testing.assert_close(model(input_ids=given["input_ids"]).logits.double(), log_p, rtol=1e-5, atol=1e-5)


def test_bfloat16_within_derived_bounds():
    """The head's two gradients; what lies behind them is the model's own backward pass."""
    model, given, kept = patched("llama").bfloat16(), batch(3, 11), []

    def keep(_, args):
        args[0].retain_grad()
        kept.append(args[0])

    model.get_output_embeddings().register_forward_pre_hook(keep)
    output = model(**given)
    (UPSTREAM * output.loss).backward()
    x, w, target = kept[0], model.get_output_embeddings().weight, given["labels"][:, 1:].flatten()
    weight = torch.where(target == -100, 0.0, UPSTREAM / (target != -100).sum()).double()
    flat = x.detach()[:, :-1].flatten(0, 1)
    valid = target != -100
    truth = oracle(flat[valid], w.detach(), target[valid], weight[valid], n=N, eps=EPS)
    mean = truth.loss.mean()
    assert abs(output.loss - mean) <= truth.loss_bound.mean() + 1e-6 * mean
    truth.check_rows("dX", x.grad[:, :-1].flatten(0, 1)[valid], truth.dx, truth.dx_bound)
    truth.check_rows("dW", w.grad, truth.dw, truth.dw_bound)


@pytest.mark.parametrize("how", ["shift_labels", "num_items", "num_items of a tensor", "ignore_index"])
def test_arguments_of_the_loss(how):
    """As ``transformers`` means them: F.cross_entropy over the log-probabilities says the same."""
    model, given = patched("llama"), batch()
    log_p = model(input_ids=given["input_ids"]).logits
    labels, more, items = given["labels"], {}, None
    target = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if how == "shift_labels":
        target = target.roll(1, 0)  # which no shift of the labels gives
        more = {"shift_labels": target}
    elif how == "ignore_index":
        labels = labels.masked_fill(labels == -100, 4)
        target = target.masked_fill(target == -100, 4)
        more = {"ignore_index": 4}
    else:
        items = 29
        more = {"num_items_in_batch": torch.tensor([items]) if how.endswith("tensor") else items}
    wanted = nn.functional.cross_entropy(
        log_p.flatten(0, 1), target.flatten(), ignore_index=more.get("ignore_index", -100), reduction="sum"
    )
    if how == "ignore_index":
        target[:, -1] = 4
        count = (target != 4).sum()
        wanted = nn.functional.cross_entropy(log_p.flatten(0, 1), target.flatten(), ignore_index=4, reduction="sum")
    else:
        count = (target != -100).sum() if items is None else items
    loss = model(input_ids=given["input_ids"], labels=labels, **more).loss
    torch.testing.assert_close(loss, wanted / count, rtol=1e-5, atol=0)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_all_labels_ignored_is_zero(items):
    model, ids = patched("gpt2"), batch()["input_ids"]
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0 and all((g == 0).all() for g in gradients(model).values())


def test_no_token_is_lost_in_an_empty_count():
    """A count of 0 with tokens to count is the caller's mistake, and does not pass for a sum."""
    with pytest.raises(ValueError, match="num_items must be finite and > 0"):
        patched("gpt2")(**batch(), num_items_in_batch=torch.tensor(0))


def test_no_matrix_of_all_classes_is_formed(monkeypatch):
    """Not in training and not in evaluation, and the scores that an output holds are formed once, when used."""
    model, given, calls = patched("llama"), batch(), []
    head = model.get_output_embeddings()
    score = type(head).scores
    monkeypatch.setattr(type(head), "scores", lambda self, x: calls.append(1) or score(self, x))
    for mode in (True, False):
        output = model.train(mode)(**given)
        assert output.logits.shape == (2, 9, V) and output.logits.dtype == torch.float32 and len(output.logits) == 2
        assert not calls and "formed when used" in repr(output.logits)
    wanted = model(input_ids=given["input_ids"]).logits
    calls.clear()
    assert torch.equal(output.logits, wanted) and torch.equal(output.logits.argmax(-1), wanted.argmax(-1))
    assert len(calls) == 1


def test_lazy_logits_have_their_gradient():
    """Also when they were looked at without one before: distillation reads them beside the loss."""
    model, given = patched("llama"), batch()
    output = model(**given)
    with torch.no_grad():
        accuracy = (output.logits.argmax(-1) == given["labels"]).float().mean()
    (output.logits.square().mean() + accuracy).backward()
    got = gradients(model)
    other = patched("llama")
    other(input_ids=given["input_ids"]).logits.square().mean().backward()
    assert_close(got, gradients(other), 1e-6)


def test_logits_of_other_weights_are_refused():
    """After a step, or outside of functional_call, they would be those of no forward pass."""
    model, given = patched("llama").train(), batch()
    output, early = model(**given), model(**given)
    wanted = model(input_ids=given["input_ids"]).logits
    formed = early.logits.detach().clone()
    output.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        output.logits.argmax(-1)
    assert torch.equal(formed, wanted) and torch.equal(early.logits, wanted)
    weights = {name: value.detach() + 1.0 for name, value in model.named_parameters()}
    outside = torch.func.functional_call(model, weights, kwargs=given)
    with pytest.raises(RuntimeError, match="no longer those"):
        outside.logits.sum()


def test_positions_of_the_output():
    model, given = patched("gpt2"), batch()
    output = model(**given)
    loss, logits, *_ = model(**given, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output[1]) and output.past_key_values is not None
    assert model(**given, output_hidden_states=True).hidden_states[-1].shape == (2, 9, D)
    assert len(model(given["input_ids"], use_cache=False).logits) == 2
    assert model(given["input_ids"], logits_to_keep=2).logits.shape == (2, 2, V)
    by_place = model(given["input_ids"], None, None, None, None, None, None, None, given["labels"])
    assert torch.equal(by_place.loss, output.loss) and "formed when used" in repr(by_place.logits)
    with pytest.raises(ValueError, match="shape of input without its last dimension"):
        model(**given, logits_to_keep=2)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min-p": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.3},
    "beam": {"num_beams": 3, "length_penalty": 0.5},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_is_that_of_a_dense_model(mode):
    """A model whose head gives dense fp64 log-probabilities: the same tokens, from the same random numbers."""

    class Dense(nn.Linear):
        def forward(self, x):
            squared = (x.double()[..., None, :] - self.weight.double()).square().sum(-1) + EPS
            return (-0.5 * N * squared.log()).log_softmax(-1).float()

    other = build("llama")
    other.lm_head.__class__ = Dense
    prompt, tokens = batch()["input_ids"][:, :4], []
    for model in (patched("llama"), other):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            tokens.append(model.generate(prompt, max_new_tokens=8, min_new_tokens=8, **MODES[mode]))
    assert torch.equal(*tokens) and tokens[0].shape == (2, 12)
    plain = build("llama").generate(prompt, max_new_tokens=8, min_new_tokens=8)
    assert mode != "greedy" or not torch.equal(tokens[0], plain)


def test_a_repetition_penalty_makes_repetition_less_likely():
    """Scores are log-probabilities: never positive, which the penalty multiplies."""
    model, prompt = patched("llama"), batch()["input_ids"][:, :4]
    common = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    free = model.generate(prompt, **common).scores[0].log_softmax(-1)
    held = model.generate(prompt, repetition_penalty=1.5, **common).scores[0].log_softmax(-1)
    assert (held.gather(1, prompt) < free.gather(1, prompt)).all()


@pytest.mark.parametrize("name", KINDS)
def test_files_bring_the_loss_back(name, tmp_path):
    model, given = patched(name), batch()
    apply_harmonic_loss(model, n=N, eps=EPS)  # the same once more is nothing
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "harmonic_triton" and stored["architectures"] == ["Harmonic" + type(model).__name__]
    transformers.PreTrainedConfig.from_json_file(tmp_path / "config.json")  # as Trainer does when it goes on
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)]
    loaded.append(harmonic_class(type(build(name))).from_pretrained(tmp_path))
    wanted = model(**given)
    for other in loaded:
        assert torch.equal(other(**given).loss, wanted.loss) and torch.equal(other(**given).logits, wanted.logits)
        assert type(other) is type(model) and other.config.to_dict()["vocab_size"] == V
        assert other.state_dict().keys() == model.state_dict().keys()
    loaded[0].save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == {**stored, "dtype": "float32"}
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(**given).loss, wanted.loss)


def test_options_come_back_too(tmp_path):
    model = apply_harmonic_loss(build("llama"), n=N, uniform_mix=0.02, label_smoothing=0.1, backend="reference")
    model.save_pretrained(tmp_path)
    other, given = AutoModelForCausalLM.from_pretrained(tmp_path), batch()
    assert other.get_output_embeddings().loss_options == {"uniform_mix": 0.02, "label_smoothing": 0.1}
    torch.testing.assert_close(other(**given).loss, model(**given).loss, rtol=1e-5, atol=0)
    assert not torch.allclose(other(**given).loss, apply_harmonic_loss(build("llama"), n=N)(**given).loss, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_plain_class_refuses_the_files(name, tmp_path):
    patched(name).save_pretrained(tmp_path)
    plain = type(build(name))
    for load in (plain.from_pretrained, plain.config_class.from_pretrained):
        with pytest.raises(Exception, match="trained with the harmonic loss"):
            load(tmp_path)
    state = patched(name).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*_extra_state"):
        build(name).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        patched(name).load_state_dict(build(name).state_dict())
    with pytest.raises(ValueError, match=r"trained with n = 7 and eps = 0.001, and this head has n = 9"):
        apply_harmonic_loss(build(name), n=9.0).load_state_dict(state)
    with pytest.raises(ValueError, match="plain llama model|plain gpt2 model"):
        build(name).save_pretrained(tmp_path / "plain")
        harmonic_class(plain).from_pretrained(tmp_path / "plain")


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="older versions of it compute the loss themselves, which is refused",
)
def test_a_model_of_pictures_and_text(tmp_path):
    """Its text model's configuration lies within its own, and other classes load it."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 50, "boi_token_index": 49, "eoi_token_index": 48}
    config = transformers.Gemma3Config(text_config={**SIZES, "head_dim": 8}, vision_config=vision, **tokens)
    plain = transformers.Gemma3ForConditionalGeneration(config).eval()
    given = {key: value.clamp(max=47) for key, value in batch().items()}
    wanted, _, _ = dense(plain, given["labels"], n=N, input_ids=given["input_ids"])
    model = apply_harmonic_loss(plain, n=N)
    torch.testing.assert_close(model(**given).loss.double(), wanted, rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        assert torch.equal(auto.from_pretrained(tmp_path)(**given).loss, model(**given).loss)
    with pytest.raises(Exception, match="trained with the harmonic loss"):
        transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path)


def test_without_this_package_the_files_do_not_load(tmp_path):
    """In a process that has not imported it."""
    patched("gpt2").save_pretrained(tmp_path)
    program = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0 and "model type `harmonic_triton`" in run.stderr


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_unpatching_restores(name):
    plain, model, given = build(name), patched(name), batch()
    assert remove_harmonic_loss(model) is model and type(model) is type(plain)
    assert model.config.to_dict() == plain.config.to_dict() and type(model.config) is type(plain.config)
    assert model.base_model.config is model.config and type(model.get_output_embeddings()) is nn.Linear
    got, wanted = model(**given), plain(**given)
    assert torch.equal(got.loss, wanted.loss) and torch.equal(got.logits, wanted.logits)
    assert model.state_dict().keys() == plain.state_dict().keys() and vars(model).keys() == vars(plain).keys()
    with pytest.raises(ValueError, match="not patched"):
        remove_harmonic_loss(model)


def test_models_of_one_configuration_stay_apart():
    config = build("llama").config
    one, two = (transformers.LlamaForCausalLM(config) for _ in range(2))
    apply_harmonic_loss(one)
    assert not hasattr(config, "harmonic_loss") and two.config is config and one.config is one.model.config
    assert one.get_output_embeddings().n == D**0.5 and "n=4, eps=0" in repr(one)
    one.config.use_cache = False
    assert not one.model.layers[0].self_attn.config.use_cache and config.use_cache


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [V + 11, V - 7])
def test_resized_embeddings(name, size, tmp_path):
    model, given = patched(name), batch()
    given = {key: value.clamp(max=40) for key, value in given.items()}
    model.resize_token_embeddings(size, mean_resizing=False)
    head = model.get_output_embeddings()
    assert head.weight.shape == (size, D)
    assert (head.weight is model.get_input_embeddings().weight) == (name == "gpt2")
    reference = remove_harmonic_loss(copy.deepcopy(model))
    assert type(reference.get_output_embeddings()) is nn.Linear
    wanted, _, _ = dense(reference, given["labels"], n=N, eps=EPS, input_ids=given["input_ids"])
    torch.testing.assert_close(model(**given).loss.double(), wanted, rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**given).loss, model(**given).loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_apart(copied):
    model, given = patched("gpt2"), batch()
    other = copied(model)
    assert type(other) is type(model) and type(other.config) is type(model.config)
    assert torch.equal(other(**given).loss, model(**given).loss)
    head = other.get_output_embeddings()
    assert head.weight is other.get_input_embeddings().weight and head is not model.get_output_embeddings()
    remove_harmonic_loss(other)
    assert not torch.equal(other(**given).loss, model(**given).loss)


# Cross-entropy: the model's own loss.


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2", "granite", "cohere", "phi"])
def test_cross_entropy_is_the_model_itself(name):
    """With soft caps, scales and a bias too; the files are those of the plain model."""
    plain, given = build(name), batch()
    wanted = plain(**given)
    (UPSTREAM * wanted.loss).backward()
    model = apply_harmonic_loss(build(name), mode="cross_entropy", memory_budget=3 * 4 * V)
    output = model(**given)
    (UPSTREAM * output.loss).backward()
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-5, atol=0)
    assert_close(gradients(model), gradients(plain), 1e-5)
    torch.testing.assert_close(output.logits, wanted.logits, rtol=1e-6, atol=1e-7)  # scaled by what was measured
    assert torch.equal(model(input_ids=given["input_ids"]).logits, wanted.logits)
    assert model.state_dict().keys() == plain.state_dict().keys() and model.config.to_dict() == plain.config.to_dict()


def test_the_cap_and_the_scale_are_felt():
    """Else the test above would compare models that do nothing."""
    for name, change in (("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0})):
        assert not torch.allclose(build(name)(**batch()).loss, build(name, **change)(**batch()).loss, rtol=1e-4)


def test_options_of_cross_entropy():
    model = apply_harmonic_loss(build("gemma2"), mode="cross_entropy", z_loss=0.01, label_smoothing=0.1)
    other = apply_harmonic_loss(
        build("gemma2", final_logit_softcapping=None), mode="cross_entropy", z_loss=0.01, label_smoothing=0.1
    )
    for m in (model, other):  # with the cap, and without
        given, target = batch(), nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].flatten()
        logits = m(input_ids=given["input_ids"]).logits.flatten(0, 1)
        wanted = nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
        wanted += 0.01 * logits.logsumexp(-1)[target != -100].square().mean()
        torch.testing.assert_close(m(**given).loss, wanted, rtol=1e-5, atol=0)


# Refused.


@pytest.mark.parametrize(
    ("name", "shown"), [("gemma2", r"0.5 tanh\(v/0.5\)"), ("granite", "0.166667 v"), ("cohere", "0.25 v")]
)
def test_what_a_model_does_to_logits_is_refused(name, shown):
    """Measured with labels, seen without."""
    model, given = apply_harmonic_loss(build(name)), batch()
    with pytest.raises(ValueError, match=shown):
        model(**given)
    with pytest.raises(ValueError, match="switch it off first"):
        model.generate(given["input_ids"], max_new_tokens=1)
    if name == "granite":
        model.config.logits_scaling = 1.0  # as the message says
        model(**given).loss.backward()
        assert torch.equal(model(**given).logits, model(input_ids=given["input_ids"]).logits)


class Strange(transformers.LlamaForCausalLM):
    """Changes logits as no cap and no scale does."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        x = self.model(input_ids).last_hidden_state
        logits = self.lm_head(x) + 1.0
        loss = self.loss_function(logits, labels, self.vocab_size) if labels is not None else None
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class InPlace(Strange):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state).mul_(2.0).add_(1.0)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Twice(Strange):
    def forward(self, input_ids=None, labels=None, **kwargs):
        x = self.model(input_ids).last_hidden_state
        logits = self.lm_head(x), self.lm_head(x)
        return transformers.modeling_outputs.CausalLMOutput(
            loss=self.loss_function(logits[0], labels, self.vocab_size), logits=logits[1]
        )


class Around(Strange):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = nn.functional.linear(self.model(input_ids).last_hidden_state, self.lm_head.weight)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Forgets(Strange):
    """Takes labels, and calls its loss function where something else is asked for."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, self.vocab_size) if kwargs.get("return_loss") else None
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Beside(Strange):
    """Looks at what another patched model's head says of the same hidden states."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        x = self.model(input_ids).last_hidden_state
        other = self.others[0].lm_head(x)
        assert other.shape == (*x.shape[:-1], V)
        logits = self.lm_head(x)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class Alone(Strange):
    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("mode", ["harmonic", "cross_entropy"])
@pytest.mark.parametrize(
    ("model_class", "error", "why"),
    [
        (Strange, ValueError, "neither a scale"),
        (InPlace, ValueError, "neither a scale"),
        (Twice, TypeError, "more than once"),
        (Around, TypeError, "not come from"),
    ],
)
def test_strange_models_are_refused_at_the_first_step(model_class, error, why, mode):
    model = apply_harmonic_loss(model_class(build("llama").config), mode=mode)
    with pytest.raises(error, match=why):
        model(**batch())
    if mode == "harmonic" and model_class is not Twice:
        with pytest.raises((ValueError, TypeError), match="switch it off first|does not call its output embedding"):
            model(input_ids=batch()["input_ids"])


def test_labels_that_a_model_does_not_use():
    """What stands for logits may not leave the model."""
    model = apply_harmonic_loss(Forgets(build("llama").config))
    with pytest.raises(TypeError, match="does not call self.loss_function"):
        model(**batch())
    assert model(**batch(), return_loss=True).loss > 0


def test_another_head_within_a_forward_pass():
    model = apply_harmonic_loss(Beside(build("llama").config), n=N, eps=EPS)
    model.load_state_dict(patched("llama").state_dict())
    model.others = [patched("llama")]
    torch.testing.assert_close(model.eval()(**batch()).loss, patched("llama")(**batch()).loss)


class OtherConfig(transformers.LlamaConfig):
    pass


class Bare(transformers.LlamaModel):
    pass


def masked_model():
    """The labels of its loss are not shifted: to shift them would be another loss, and none would notice."""
    return transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(**SIZES))


def replaced(model, name, module):
    setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda: Alone(build("llama").config), TypeError, "computes its loss within its forward pass"),
        (lambda: build("phi"), ValueError, "has a bias"),
        (lambda: Bare(build("llama").config), TypeError, "must be an nn.Linear, got NoneType"),
        (
            lambda: transformers.LlamaForCausalLM(OtherConfig(**SIZES)),
            TypeError,
            "must be a LlamaConfig, got OtherConfig",
        ),
        (lambda: nn.Linear(2, 3), TypeError, "must be a PreTrainedModel"),
        (lambda: nn.parallel.DataParallel(build("llama")), TypeError, "before it is wrapped"),
        (lambda: replaced(build("llama"), "lm_head", nn.Embedding(3, 2)), TypeError, "got Embedding"),
        (lambda: replaced(build("llama"), "loss_function", print), TypeError, "has been given a loss function"),
        (lambda: replaced(build("llama"), "forward", print), TypeError, "forward has been replaced"),
        (lambda: replaced(build("llama"), "_tp_size", 2), TypeError, "without tp_plan"),
        (masked_model, TypeError, "ForMaskedLMLoss, which does not shift"),
        (lambda: patched("llama"), ValueError, "is patched already, otherwise"),
        (lambda: apply_harmonic_loss(build("llama"), mode="cross_entropy"), ValueError, "is patched already"),
    ],
)
def test_models_that_cannot_be_patched(make, error, why):
    with pytest.raises(error, match=why):
        apply_harmonic_loss(make(), n=3.0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"n": -1.0}, "n must be"), ({"n": torch.tensor(3.0)}, "n must be a number"), ({"eps": -1.0}, "eps"),
        ({"mode": "kl"}, "mode must be"), ({"mode": "cross_entropy", "n": 3.0}, "options of the harmonic loss"),
        ({"z_loss": 0.1}, "cross-entropy"), ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"memory_budget": 0}, "memory_budget"), ({"uniform_mix": -1.0}, "uniform_mix"),
        ({"backend": "cuda"}, "backend"),
    ],
)  # fmt: skip
def test_wrong_arguments_leave_the_model_alone(options, why):
    model = build("llama")
    with pytest.raises((TypeError, ValueError), match=why):
        apply_harmonic_loss(model, **options)
    assert type(model) is transformers.LlamaForCausalLM and type(model.lm_head) is nn.Linear


def test_a_head_that_is_exchanged():
    model, given = patched("llama"), batch()
    model.set_output_embeddings(nn.Linear(D, V, bias=False))
    assert model(**given).loss > 0 and model.get_output_embeddings().n == N
    model.lm_head = nn.Linear(D, V, bias=False)
    with pytest.raises(TypeError, match="has become a torch.nn.modules.linear.Linear"):
        model(**given)
    with pytest.raises(TypeError, match="only models that call"):
        harmonic_class(transformers.LlamaModel)
    with pytest.raises(TypeError, match="remove_harmonic_loss"):
        patched("llama").loss_function = print
    with pytest.raises(TypeError, match="without tp_plan"):
        replaced(patched("llama"), "_tp_size", 2)(**given)
    with pytest.raises(TypeError, match="ForMaskedLMLoss"):
        config = harmonic_class(transformers.EuroBertForMaskedLM).config_class(**SIZES)
        config.harmonic_loss = {"n": N}
        harmonic_class(transformers.EuroBertForMaskedLM)(config)


@pytest.mark.parametrize("mode", ["harmonic", "cross_entropy"])
def test_a_forward_that_takes_the_loss_away_is_refused(mode):
    """As Liger's kernels put it on a model when Trainer is told to use them. One that wraps the model's own may stand."""
    model, given = apply_harmonic_loss(build("llama"), mode=mode), batch()
    wanted = model(**given).loss

    def other(self, input_ids=None, labels=None, **_):
        return type(self).patched_from.forward(self, input_ids=input_ids)

    with pytest.raises(TypeError, match="use_liger_kernel=False"):
        model.forward = types.MethodType(other, model)
    assert torch.equal(model(**given).loss, wanted)
    own = type(model).forward
    model.forward = types.MethodType(functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs)), model)
    model.forward = functools.update_wrapper(functools.partial(own, model), model.forward)
    assert torch.equal(model(**given).loss, wanted)


def test_weights_of_cross_entropy_warn(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="were trained with cross-entropy.*compare it with log"):
        apply_harmonic_loss(model)
    assert model.name_or_path == model.config.name_or_path == f"{tmp_path} (now harmonic)"
    remove_harmonic_loss(model)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_harmonic_loss(build("llama"))  # never trained
        apply_harmonic_loss(model, mode="cross_entropy")


def test_hidden_states_are_the_head_s_input():
    """The helper of these tests looks where the patch does."""
    model, given = build("gpt2"), batch()
    x, output = hidden_states(model, input_ids=given["input_ids"])
    assert torch.equal(nn.functional.linear(x, model.lm_head.weight), output.logits)
