"""A small model of every family, large enough that what is not a matrix product does not count."""

from dataclasses import replace

import pytest

from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig

_DENSE = ModelConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
_FINE = MoEConfig(num_experts=8, top_k=3, intermediate_size=64, layers=(1,), gate="softmax_topk")
_MLA = MLAConfig(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24)
_DEEPSEEK = replace(
    _DENSE,
    num_key_value_heads=4,
    head_dim=24,
    mla=_MLA,
    moe=replace(_FINE, gate="sigmoid_bias", routed_scaling=1.7, shared_intermediate_size=128, shared_gated=False),
)
ARCHITECTURES: dict[str, ModelConfig] = {
    "llama": _DENSE,
    "llama, tied": replace(_DENSE, tie_word_embeddings=True),
    "mistral": replace(_DENSE, model_type="mistral"),
    "qwen2": replace(_DENSE, qkv_bias=True),
    "qwen3": replace(_DENSE, qk_norm=True, head_dim=32),
    "mixtral": replace(_DENSE, moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=192, layers=(0, 1))),
    "qwen2_moe": replace(_DENSE, qkv_bias=True, moe=replace(_FINE, renormalize=False, shared_intermediate_size=96)),
    "qwen3_moe": replace(_DENSE, qk_norm=True, moe=_FINE),
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v3, q LoRA": replace(
        _DEEPSEEK, mla=replace(_MLA, q_lora_rank=48), moe=replace(_DEEPSEEK.moe, num_groups=4, top_k_groups=2)
    ),
}


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> ModelConfig:
    """One of every family, and the variants that change which parameters there are."""
    config = ARCHITECTURES[request.param]
    assert config.family == request.param.partition(",")[0]
    return config
