"""init_last_norm_ and recommend: hidden states as long as class vectors, whatever the norm, and the exponent."""

import math

import pytest
import torch
from torch import nn

import harmonic_triton as ht


class Scale(nn.Module):
    """nanoGPT's LayerNorm, or Gemma's RMSNorm: a gain of its own, stored as it is or as its difference from 1."""

    def __init__(self, width, stored_from=0.0, bias=True):
        super().__init__()
        self.stored_from = stored_from
        self.weight = nn.Parameter(torch.full((width,), 1 - stored_from))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        out = nn.functional.layer_norm(x, self.weight.shape) * (self.weight + self.stored_from)
        return out if self.bias is None else out + self.bias


def test_the_exponent_is_the_papers_where_classes_are_few():
    assert ht.recommend(128, 2).n == pytest.approx(128**0.5)
    assert ht.recommend(4096, 50304).n == pytest.approx(64)
    assert ht.recommend(128, 2048) == (pytest.approx(3.5 * math.log(2048)), pytest.approx(2e-3))
    assert ht.recommend(768, 50257) == (28, pytest.approx(2e-3 / 6))
    assert ht.HarmonicHead(1, 1, n=ht.recommend(1, 1).n).n == 1  # never 0


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 5), ValueError, "width must be at least 1"),
        ((128.0, 5), TypeError, "width must be an int"),
        ((128, -1), ValueError, "num_classes must be at least 1"),
        ((128, True), TypeError, "num_classes must be an int"),
    ],
)
def test_sizes_are_checked(sizes, error, message):
    with pytest.raises(error, match=message):
        ht.recommend(*sizes)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(48),
    "RMSNorm": lambda: nn.RMSNorm(48),
    "nanoGPT": lambda: Scale(48, bias=False),
    "Gemma": lambda: Scale(48, stored_from=1.0),
}


def length(x):
    return x.detach().double().square().mean().sqrt().item()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("std", [0.02, 1.0, 3.0])
def test_hidden_states_are_as_long_as_class_vectors(norm, dtype, std):
    norm, head = NORMS[norm]().to(dtype), ht.HarmonicHead(48, 100, std=std, dtype=dtype)
    assert ht.init_last_norm_(norm, head) is norm
    x = 7 * torch.randn(500, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    # a gain of 0.02 stored from 1 is off by up to half of bfloat16's 2^-8 there
    rounding = 2**-9 / std if dtype == torch.bfloat16 else 0.0
    assert length(norm(x)) == pytest.approx(length(head.weight), rel=1e-3 + rounding + 0.01 * (dtype == torch.bfloat16))
    assert norm.weight.requires_grad and norm.weight.grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_again_it_changes_nothing(norm):
    norm, head = NORMS[norm](), ht.HarmonicHead(48, 100)
    first = ht.init_last_norm_(norm, head).weight.clone()
    torch.testing.assert_close(ht.init_last_norm_(norm, head).weight, first, rtol=1e-6, atol=1e-8)


def test_a_trained_norm_keeps_its_pattern():
    norm, head = nn.LayerNorm(48), ht.HarmonicHead(48, 100)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.normal_(generator=generator)
    weight, bias = norm.weight.clone(), norm.bias.clone()
    ht.init_last_norm_(norm, head)
    by = norm.weight[0] / weight[0]
    torch.testing.assert_close(norm.weight, weight * by)
    torch.testing.assert_close(norm.bias, bias * by)
    x = torch.randn(2000, 48, generator=generator)
    assert length(norm(x)) == pytest.approx(length(head.weight), rel=0.02)


def test_it_draws_no_random_numbers_of_the_program():
    """nanoGPT draws its residual projections after it; a seed gives the same model with it and without."""
    norm, head = nn.LayerNorm(48), ht.HarmonicHead(48, 100)
    state = torch.get_rng_state()
    ht.init_last_norm_(norm, head)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_default_device_does_not_matter():
    """Some programs build their model within ``with torch.device("cuda")``."""
    norm, head = nn.LayerNorm(48), ht.HarmonicHead(48, 100)
    with torch.device("meta"):
        ht.init_last_norm_(norm, head)
    assert length(norm.weight) == pytest.approx(length(head.weight), rel=1e-3)


def test_a_tied_embedding_and_a_linear_layer_are_heads():
    for head in (nn.Embedding(100, 48), nn.Linear(48, 100, bias=False)):
        assert length(ht.init_last_norm_(nn.LayerNorm(48), head).weight) == pytest.approx(length(head.weight), rel=1e-3)


class Stubborn(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape)


@pytest.mark.parametrize(
    ("norm", "head", "error", "message"),
    [
        (nn.LayerNorm(48, elementwise_affine=False), ht.HarmonicHead(48, 9), TypeError, r"norm must have a weight.*std=1\.0"),
        (torch.ones(48), ht.HarmonicHead(48, 9), TypeError, "norm must be a module, got Tensor of shape"),
        (nn.LayerNorm(48), torch.ones(9, 48), TypeError, "head must be a module"),
        (ht.HarmonicHead(48, 9), nn.LayerNorm(48), ValueError, r"norm must be \(D,\).*norm comes first, then head"),
        (nn.LayerNorm(24), ht.HarmonicHead(48, 9), ValueError, "norm has 24 features and head 48"),
        (nn.LayerNorm(48), ht.HarmonicHead(48, 9, std=0.0), ValueError, "class vectors of head are of size 0"),
        (nn.LayerNorm(48), ht.HarmonicHead(48, 9, device="meta"), ValueError, "the weight of head is on meta"),
        (nn.LayerNorm(48, device="meta"), ht.HarmonicHead(48, 9), ValueError, "the weight of norm is on meta"),
        (Stubborn(48), ht.HarmonicHead(48, 9), ValueError, "output of Stubborn is not proportional to its weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_scaled_is_refused(norm, head, error, message):
    with pytest.raises(error, match=message):
        ht.init_last_norm_(norm, head)
    if isinstance(norm, nn.LayerNorm) and norm.weight is not None and not norm.weight.is_meta:
        assert torch.equal(norm.weight, torch.ones(norm.weight.shape[0])) and not norm.bias.any()


def test_zeros_and_nans_are_refused():
    norm = nn.LayerNorm(48)
    nn.init.zeros_(norm.weight)
    with pytest.raises(ValueError, match="output is of size 0"):
        ht.init_last_norm_(norm, ht.HarmonicHead(48, 9))
    head = ht.HarmonicHead(48, 9)
    nn.init.constant_(head.weight, math.nan)
    with pytest.raises(ValueError, match="of size nan"):
        ht.init_last_norm_(nn.LayerNorm(48), head)


def test_probing_leaves_no_trace():
    """Neither on running statistics, nor on the generator that a dropout draws from, nor on a part's mode."""

    class Dropped(nn.LayerNorm):
        def __init__(self, width):
            super().__init__(width)
            self.drop, self.off = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, x):
            return self.off(self.drop(super().forward(x)))

    norm, statistics, head = Dropped(48), nn.BatchNorm1d(48), ht.HarmonicHead(48, 9)
    random = torch.get_rng_state()
    ht.init_last_norm_(norm, head)
    ht.init_last_norm_(statistics, head)
    assert torch.equal(random, torch.get_rng_state())
    assert norm.training and norm.drop.training and not norm.off.training and statistics.training
    assert not statistics.running_mean.any() and not statistics.num_batches_tracked
    assert length(norm.weight) == pytest.approx(length(head.weight), rel=1e-5)


def test_a_norm_of_another_form_is_refused():
    class Pair(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x), x

    norm = Pair(48)
    with pytest.raises(TypeError, match=r"norm must map \(N, D\) to a tensor of that shape, Pair gave"):
        ht.init_last_norm_(norm, ht.HarmonicHead(48, 9))
    assert torch.equal(norm.weight, torch.ones(48)) and norm.training


def test_a_sharded_model_is_refused():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        head = fully_shard(ht.HarmonicHead(48, 9), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            TypeError, match="head is spread over processes; call init_last_norm_ before the model is shard"
        ):
            ht.init_last_norm_(nn.LayerNorm(48), head)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
def test_models_of_transformers(name):
    """Before or after they are patched; Gemma stores its gain as the difference from 1, GPT-2's norm has a bias."""
    transformers = pytest.importorskip("transformers")
    from harmonic_triton.integrations.transformers import apply_harmonic_loss

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    elif name == "Gemma2":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": None}
    config = getattr(transformers, f"{name}Config")(vocab_size=100, bos_token_id=0, eos_token_id=0, **sizes)
    model = apply_harmonic_loss(transformers.AutoModelForCausalLM.from_config(config))
    norm = model.transformer.ln_f if name == "GPT2" else model.model.norm
    head = model.get_output_embeddings()
    ht.init_last_norm_(norm, head)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    hidden = model.base_model(input_ids=ids).last_hidden_state
    assert length(hidden) == pytest.approx(length(head.weight), rel=1e-2)
