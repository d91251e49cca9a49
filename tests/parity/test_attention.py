"""Each attention module alone against transformers' class (eager, float32), and the rotary tables against theirs."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from earthshine.model.attention import make_attention, rope_table
from earthshine.model.config import MLAConfig, ModelConfig, RopeScaling

# One fp32 rounding is 6e-8; sums over tens of terms, in another order, compound some of them. Measured: below 1.6e-6.
RTOL = 1e-5
POSITIONS = 11
FAMILIES = {
    "llama": (transformers.LlamaConfig, LlamaAttention, LlamaRotaryEmbedding),
    "qwen2": (transformers.Qwen2Config, Qwen2Attention, Qwen2RotaryEmbedding),
    "qwen3": (transformers.Qwen3Config, Qwen3Attention, Qwen3RotaryEmbedding),
    "deepseek_v3": (transformers.DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding),
}
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16)
SCALINGS = {
    "none": RopeScaling(),
    "llama3": RopeScaling(kind="llama3", original_max_position_embeddings=16),
    "yarn": YARN,
    "yarn, factor below 1": RopeScaling(kind="yarn", factor=0.5, original_max_position_embeddings=4096),
    "yarn, no ramp": RopeScaling(kind="yarn", factor=40.0, original_max_position_embeddings=4),
    "yarn, DeepSeek-V3": RopeScaling(
        kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    ),
    "yarn, DeepSeek-V2-Lite": RopeScaling(
        kind="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
    ),
    "yarn, two scales": RopeScaling(
        kind="yarn", factor=8.0, original_max_position_embeddings=64, mscale=1.3, mscale_all_dim=0.6, beta_fast=16.0
    ),
    "yarn, scale for cos and sin only": RopeScaling(
        kind="yarn", factor=8.0, original_max_position_embeddings=64, mscale=0.7, beta_slow=2.0
    ),
    "yarn, scale for logits only": RopeScaling(
        kind="yarn", factor=8.0, original_max_position_embeddings=64, mscale_all_dim=0.7
    ),
    "yarn, attention_factor": RopeScaling(
        kind="yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.7, mscale_all_dim=0.5
    ),
}


def their_rope(config: ModelConfig) -> dict[str, object]:
    """`rope_parameters`; a number that is 0 here is a key that is absent there."""
    s = config.rope_scaling
    rope: dict[str, object] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if s.kind != "none":
        rope |= {"rope_type": s.kind, "factor": s.factor}
        rope["original_max_position_embeddings"] = s.original_max_position_embeddings
    if s.kind == "llama3":
        rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        scales = ("mscale", "mscale_all_dim", "attention_factor")
        rope |= {name: getattr(s, name) for name in scales if getattr(s, name)}
    return rope


def their_config(config: ModelConfig, family: str) -> transformers.PreTrainedConfig:
    fields: dict[str, object] = {"rms_norm_eps": config.rms_norm_eps, "rope_parameters": their_rope(config)}
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        fields[name] = getattr(config, name)
    mla = config.mla
    if family == "deepseek_v3":
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        fields |= {name: getattr(mla, name) for name in names}
        fields |= {"q_lora_rank": mla.q_lora_rank or None, "rope_interleave": mla.rope_interleaved}
    else:
        fields["head_dim"] = config.head_dim
    made: transformers.PreTrainedConfig = FAMILIES[family][0](**fields, attn_implementation="eager")
    return made


def our_config(family: str, heads: int, groups: int, scaling: RopeScaling, **mla: int | bool) -> ModelConfig:
    latent = MLAConfig(**mla)
    return ModelConfig(
        vocab_size=8,
        hidden_size=48,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads if latent.kv_lora_rank else groups,
        head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim or 8,
        max_position_embeddings=64,
        rms_norm_eps=0.1,  # large, so that a norm with another one is seen
        rope_scaling=scaling,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        mla=latent,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, ModelConfig]:
    family = draw(st.sampled_from(list(FAMILIES)))
    groups, per_group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    mla: dict[str, int | bool] = {}
    if family == "deepseek_v3":
        mla = {
            "kv_lora_rank": draw(st.sampled_from([3, 16])),
            "q_lora_rank": draw(st.sampled_from([0, 5, 16])),
            "qk_nope_head_dim": draw(st.sampled_from([1, 8])),
            "qk_rope_head_dim": draw(st.sampled_from([2, 8])),
            "v_head_dim": draw(st.sampled_from([3, 16])),
            "rope_interleaved": draw(st.booleans()),
        }
    scaling = draw(st.sampled_from(list(SCALINGS.values())))
    return family, our_config(family, groups * per_group, groups, scaling, **mla)


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    return ((got - want).norm() / want.norm().clamp_min(max(floor, 1e-30))).item()


def build_pair(family: str, config: ModelConfig) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Ours, theirs with the same weights, and their rotary tables."""
    _, attention, rotary = FAMILIES[family]
    hf = their_config(config, family)
    theirs, ours = attention(hf, 0), make_attention(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    renamed = {name.replace("_layernorm", "_norm"): p for name, p in theirs.state_dict().items()}
    ours.load_state_dict(renamed)  # strict: every name is ours, in the stored row order
    return ours, theirs, rotary(hf)(torch.empty(0), torch.arange(POSITIONS).unsqueeze(0))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_output_and_every_gradient_equal_transformers(case: tuple[str, ModelConfig]) -> None:
    family, config = case
    ours, theirs, rope = build_pair(family, config)
    x, direction = torch.randn(2, 2, POSITIONS, config.hidden_size, generator=torch.Generator().manual_seed(1))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    future = torch.full((POSITIONS, POSITIONS), torch.finfo(torch.float32).min).triu(1)[None, None]
    want = theirs(x_theirs, rope, future)[0]
    got = ours(x_ours, rope_table(config, torch.arange(POSITIONS)), None, None)
    assert relative_error(got, want) <= RTOL
    (want * direction).sum().backward()
    (got * direction).sum().backward()
    reference = {name.replace("_layernorm", "_norm"): p.grad for name, p in theirs.named_parameters()}
    reference["input"] = x_theirs.grad
    gradients = {name: p.grad for name, p in ours.named_parameters()} | {"input": x_ours.grad}
    assert gradients.keys() == reference.keys()
    # The floor is for gradients that are zero but for rounding: a bias of the keys moves all of a query's scores alike.
    floor = 1e-3 * torch.stack([g.norm() for g in reference.values()]).norm().item()
    errors = {name: relative_error(g, reference[name], floor) for name, g in gradients.items()}
    assert max(errors.values()) <= RTOL, errors


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_rotary_tables_equal_transformers(family: str, scaling: RopeScaling) -> None:
    """To the bit: the same operations in the same order. Theirs repeats the pairs' angles for both halves."""
    mla = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 64, "v_head_dim": 4}
    config = our_config(family, 2, 2, scaling, **(mla if family == "deepseek_v3" else {}))
    positions = torch.tensor([0, 1, 2, 17, 1000, 70000])
    theirs = FAMILIES[family][2](their_config(config, family))(torch.empty(0), positions.unsqueeze(0))
    for got, want in zip(rope_table(config, positions), theirs, strict=True):
        assert torch.equal(torch.cat((got, got), -1), want[0])


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_the_scale_of_latent_attention_equals_transformers(scaling: RopeScaling) -> None:
    """yarn's factor is in it only where `mscale_all_dim` asks for it. 1e-15: two roundings of a Python float."""
    mla = {"kv_lora_rank": 8, "qk_nope_head_dim": 5, "qk_rope_head_dim": 2, "v_head_dim": 4}
    config = our_config("deepseek_v3", 2, 2, scaling, **mla)
    theirs = DeepseekV3Attention(their_config(config, "deepseek_v3"), 0)
    assert make_attention(config, 0).scale == pytest.approx(theirs.scaling, rel=1e-15)
