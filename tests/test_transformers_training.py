"""Patched models in the programs that train them: Trainer, PEFT, compilers, checkpointing, wrappers."""

import copy
import json
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")
from transformers_models import D, V, assert_close, batch, build, gradients  # noqa: E402

from harmonic_triton.integrations.transformers import apply_harmonic_loss  # noqa: E402

N, EPS = 7.0, 1e-3
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def patched(name, **changes):
    return apply_harmonic_loss(build(name, **changes), n=N, eps=EPS)


# Trainer.


def texts(rows=48, length=10):
    """Samples of very different numbers of labels, which a mean of means would weigh wrongly."""
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + row % (length - 1)] = -100
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def trained(folder, model, *, batch_size, accumulation, steps, rows=48, **more):
    """The losses that a Trainer logged, one for each step, and the Trainer."""
    pytest.importorskip("accelerate")
    settings = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        max_steps=steps, logging_steps=1, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, max_grad_norm=0.0, dataloader_pin_memory=False,
        **{"save_strategy": "no", **more},
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=texts(rows), eval_dataset=texts(6))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def compare_accumulation(tmp_path, steps, model_of):
    curves = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = model_of().double()
        losses, _ = trained(tmp_path, model, batch_size=size, accumulation=accumulation, steps=steps)
        curves.append(torch.tensor(losses, dtype=torch.float64))
        assert len(losses) == steps
    torch.testing.assert_close(*curves, rtol=1e-6, atol=0)  # fp64; what Trainer logs has been through fp32
    return curves[0]


def test_accumulated_steps_are_those_of_one_batch(tmp_path):
    curve = compare_accumulation(tmp_path, 6, lambda: patched("gpt2"))
    wanted = patched("gpt2").double()(**torch.utils.data.default_collate(texts())).loss
    assert abs(curve[0] - wanted) < 0.2 * wanted


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["harmonic", "cross_entropy"])
def test_two_hundred_accumulated_steps(tmp_path, mode):
    curve = compare_accumulation(
        tmp_path,
        200,
        lambda: apply_harmonic_loss(build("llama"), **({"n": N} if mode == "harmonic" else {"mode": mode})),
    )
    assert curve[-20:].mean() < curve[:20].mean() - 0.3


def test_a_trainer_evaluates_saves_and_goes_on(tmp_path):
    """compute_metrics gets the log-probabilities; a stopped run goes on with the losses of one that was not."""

    def rows_of(prediction):
        return {"sums": float(torch.as_tensor(prediction.predictions).exp().sum(-1).mean())}

    whole, _ = trained(tmp_path / "whole", patched("gpt2"), batch_size=4, accumulation=1, steps=4)
    half, trainer = trained(
        tmp_path / "half", patched("gpt2"), batch_size=4, accumulation=1, steps=2, save_strategy="steps", save_steps=2
    )
    trainer.compute_metrics = rows_of
    metrics = trainer.evaluate()
    assert metrics["eval_sums"] == pytest.approx(1.0, abs=1e-5)
    labels = torch.utils.data.default_collate(texts(6))
    assert metrics["eval_loss"] == pytest.approx(trainer.model.eval()(**labels).loss.item(), rel=1e-5)
    checkpoint = tmp_path / "half" / "checkpoint-2"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "harmonic_triton"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(loaded(**labels).loss, trainer.model(**labels).loss)
    trainer.args.max_steps, trainer.args.save_strategy = 4, "no"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    rest = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert rest[-4:] == pytest.approx(whole, rel=1e-6) and half == pytest.approx(whole[:2], rel=1e-6)


def test_a_model_that_accelerate_gives_back():
    """Without its wrapper for 16 bits it has its own forward, and the loss with it."""
    accelerate = pytest.importorskip("accelerate")
    model, given = patched("llama"), batch()
    wanted = model(**given).loss
    forget = accelerate.state.AcceleratorState._reset_state  # a process has one precision, once and for all
    forget(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert torch.allclose(prepared(**given).loss, wanted, rtol=0.05)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    forget(reset_partial_state=True)
    assert torch.equal(model(**given).loss, wanted)


def test_a_label_smoother_shifts(tmp_path):
    """Trainer's own smoothing takes the logits and decides by the class's name whether labels are to be shifted."""
    pytest.importorskip("accelerate")
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[]
    )
    model, given = patched("llama"), batch()
    trainer = transformers.Trainer(model=model, args=settings)
    got = trainer.compute_loss(model, dict(given))
    assert torch.allclose(
        got, apply_harmonic_loss(build("llama"), n=N, eps=EPS, label_smoothing=0.1)(**given).loss, rtol=1e-5
    )


# PEFT.


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def steps(model, count=8):
    """Losses before and after some steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = model(**batch()).loss.detach()
    for _ in range(count):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, model(**batch()).loss.detach()


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]}])
def test_adapters_of_the_body_train(options, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(patched("llama"), **options)
    first, last = steps(model)
    torch.testing.assert_close(first, patched("llama")(**batch()).loss, rtol=1e-6, atol=0)
    assert last < first - 0.05
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).loss, first, rtol=1e-6, atol=0)
    lazy, full = model(**batch()).logits, model(input_ids=batch()["input_ids"]).logits
    assert torch.equal(lazy, full)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(patched("llama"), tmp_path)
    torch.testing.assert_close(again(**batch()).loss, last, rtol=1e-6, atol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).loss, last, rtol=1e-5, atol=0)
    assert merged.get_output_embeddings().n == N


@pytest.mark.parametrize("mode", ["harmonic", "cross_entropy"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"target_modules": ["q_proj", "lm_head"]}),
     ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]})],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_of_the_head_are_refused(name, options, mode):
    """With and without labels: what they add to log-probabilities means nothing."""
    model = adapted(apply_harmonic_loss(build(name), mode=mode), **options)
    with pytest.raises(TypeError, match="leave it out of target_modules"):
        model(**batch())
    if mode == "harmonic":
        with pytest.raises(TypeError, match="leave it out of target_modules"):
            model.generate(batch()["input_ids"], max_new_tokens=2)


def test_an_adapter_is_not_put_on_the_plain_model(tmp_path):
    """One that was trained on a converted checkpoint names no base; one on a saved harmonic model names that."""
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = apply_harmonic_loss(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), n=N, eps=EPS
        )
        adapted(converted).save_pretrained(tmp_path / "adapter")
        with pytest.raises(Exception, match="now harmonic"):
            peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    patched("llama").save_pretrained(tmp_path / "harmonic")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "harmonic"))
    model.save_pretrained(tmp_path / "good")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "good")
    torch.testing.assert_close(again(**batch()).loss, patched("llama")(**batch()).loss, rtol=1e-6, atol=0)


# Compilers, checkpointing, wrappers, casts.


class Shallow(transformers.LlamaForCausalLM):
    """No body: what is compiled is the patch."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model.embed_tokens(input_ids))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: apply_harmonic_loss(Shallow(build("llama").config), n=N, eps=EPS), id="patch"),
        pytest.param(lambda: patched("gpt2"), id="gpt2", marks=pytest.mark.slow),
        pytest.param(lambda: patched("llama"), id="llama", marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_break(make):
    """No second compilation for another length. Beside a loss there are no logits."""
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for given in (batch(), batch(3, 12)):
        output, wanted = compiled(**given), model(**given)
        torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-6, atol=0)
        assert output.logits is None
    output.loss.backward()
    got = {key: value.clone() for key, value in gradients(model).items()}
    model.zero_grad()
    wanted.loss.backward()
    assert_close(got, gradients(model), 1e-6)
    ids = batch()["input_ids"]
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    model, given = patched("llama").train(), batch()
    model(**given).loss.backward()
    wanted = {key: value.clone() for key, value in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**given, use_cache=False).loss.backward()
    assert_close(gradients(model), wanted, 1e-6)
    if not reentrant:  # the whole pass formed again, the head's too
        model.zero_grad()
        loss = torch.utils.checkpoint.checkpoint(lambda: model(**given, use_cache=False).loss, use_reentrant=False)
        loss.backward()
        assert_close(gradients(model), wanted, 1e-6)


def test_casts_and_autocast():
    """bfloat16 rounds weights and hidden states by 2^-9 each; n stays what it was."""
    model, given = patched("llama"), batch()
    wanted = model(**given).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**given)
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and model.lm_head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(output.loss, wanted, rtol=1e-2, atol=0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert abs(model(**given).loss - wanted) < 1e-2 and model.lm_head.n == N
    with torch.inference_mode():
        output = model(**given)
        assert output.logits.exp().sum(-1).allclose(torch.ones(()))


def test_replicas():
    """As DataParallel makes them: their heads are their own."""
    model = patched("gpt2")
    replica = model._replicate_for_data_parallel()
    replica._modules = dict(model._modules, lm_head=model.lm_head._replicate_for_data_parallel())
    replica.lm_head.weight = torch.randn(V, D)
    assert not torch.equal(replica(**batch()).loss, model(**batch()).loss)


def test_threads_share_a_model():
    """Two forward passes at once, one for a loss and one for logits: the one that began first also ends first."""
    model, given, got = patched("gpt2"), batch(), {}
    wanted = model(**given)
    began, joined, ended = (threading.Event() for _ in range(3))

    def in_the_body(*_):
        if threading.current_thread().name == "loss":
            began.set()
            joined.wait(60)
        else:
            joined.set()
            ended.wait(60)

    model.transformer.register_forward_hook(in_the_body)

    def run(name, inputs):
        got[name] = model(**inputs)

    first = threading.Thread(target=run, args=("loss", given), name="loss")
    second = threading.Thread(target=run, args=("logits", {"input_ids": given["input_ids"]}))
    first.start()
    began.wait(60)
    second.start()
    first.join()
    ended.set()
    second.join()
    assert torch.equal(got["loss"].loss, wanted.loss) and torch.equal(got["logits"].logits, wanted.logits)


def test_per_sample_gradients():
    model, given = patched("llama"), batch()

    def loss(parameters, ids, labels):
        inputs = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    got = torch.func.grad(loss)(dict(model.named_parameters()), given["input_ids"][0], given["labels"][0])
    model(input_ids=given["input_ids"][:1], labels=given["labels"][:1]).loss.backward()
    assert_close(got, gradients(model), 1e-6)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_distributed_data_parallel(options):
    model, other = patched("gpt2"), patched("gpt2")
    other(**batch()).loss.backward()
    wrapped = DistributedDataParallel(model, **options)
    wrapped(**batch()).loss.backward()
    assert_close(gradients(model), gradients(other), 1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("head_alone", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view")
def test_fully_sharded(head_alone):
    """The head within the model's unit, or a unit of its own: its weight is read in its own forward alone."""
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    model, other = patched("llama"), patched("llama")
    for part in (*model.model.layers, *([model.lm_head] if head_alone else []), model):
        fully_shard(part)
    model(**batch()).loss.backward()
    other(**batch()).loss.backward()
    assert_close({k: g.full_tensor() for k, g in gradients(model).items()}, gradients(other), 1e-6)
    ids = batch()["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)
    with pytest.raises(TypeError, match="sharded"):
        sharded = build("llama")
        sharded.config_class = type(sharded.config)
        fully_shard(sharded)
        apply_harmonic_loss(sharded)


def test_deep_copies_train_apart():
    """A reference model, as preference training makes one."""
    model = patched("llama")
    other = copy.deepcopy(model)
    before = other(**batch()).loss
    steps(model, 2)
    assert torch.equal(other(**batch()).loss, before) and not torch.equal(model(**batch()).loss, before)
