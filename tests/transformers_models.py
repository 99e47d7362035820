"""Small causal language models of ``transformers``, each of a kind that patches have broken on, and their dense loss."""

from __future__ import annotations

import copy
import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network

import torch
import transformers

V, D = 53, 16
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS = {  # class, what its configuration has beside SIZES
    "gpt2": ("GPT2LMHeadModel", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),  # tied
    "llama": ("LlamaForCausalLM", {}),  # not tied
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 0.5}),  # scaled embeddings, tied
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 6}),
    "mixtral": ("MixtralForCausalLM", {**EXPERTS, "num_local_experts": 3}),  # an auxiliary loss
    "falcon_h1": ("FalconH1ForCausalLM", MAMBA),  # buffers that are not saved
    "granite": ("GraniteForCausalLM", {"logits_scaling": 6.0}),  # logits divided
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),  # logits multiplied
    "phi": ("PhiForCausalLM", {}),  # a head with a bias
}


@functools.cache
def _built(name: str, changes: tuple[tuple[str, object], ...]) -> torch.nn.Module:
    class_name, more = MODELS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**SIZES, **{**more, **dict(changes)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():  # norms of 1 and weights of 0.02 would leave most of the model out
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build(name: str, **changes: object) -> torch.nn.Module:
    """A model of its own; ``changes`` are of the configuration."""
    return copy.deepcopy(_built(name, tuple(changes.items())))


def batch(rows: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Tokens, and labels some of which are ignored."""
    generator = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(3, V, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 3:5] = -100
    return {"input_ids": ids, "labels": labels}


def hidden_states(model: torch.nn.Module, **inputs: torch.Tensor) -> tuple[torch.Tensor, object]:
    """What a model's head is given, and the output of the forward pass."""
    given = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    output = model(**inputs)
    handle.remove()
    return given[0], output


def dense(model: torch.nn.Module, labels: torch.Tensor, *, n: float, eps: float = 0.0, **inputs: torch.Tensor):
    """Loss in fp64 from the hidden states of a plain model by the formula, log-probabilities, and the model's own output."""
    x, output = hidden_states(model, **inputs)
    w = model.get_output_embeddings().weight
    squared = (x.double()[..., None, :] - w.double()).square().sum(-1) + eps
    log_p = (-0.5 * n * squared.log()).log_softmax(-1)
    loss = torch.nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + model.router_aux_loss_coef * output.aux_loss
    return loss, log_p, output


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those of every parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float) -> None:
    """Every gradient, relative to its largest entry; what cancels to nothing (a key's bias) to the largest of all."""
    assert got.keys() == wanted.keys() and got
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        error = float((got[name].detach() - gradient).abs().max())
        assert error <= rtol * scale, f"{name}: {error:.1e} of {scale:.1e}"
