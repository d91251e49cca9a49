"""Architectures by name; any other comes from a Hugging Face `config.json`. No torch import."""

from dataclasses import replace

from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig


def llama3_tiny() -> ModelConfig:
    """A Llama of 0.5 M parameters over a 2,048-entry vocabulary, for a first run and for tests."""
    return ModelConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def llama3_tiny_e8t2() -> ModelConfig:
    """`llama3_tiny` with 8 experts, top-2, in all layers: a Mixtral of 2 M parameters."""
    return _with_experts(llama3_tiny(), num_experts=8, top_k=2)


def moonlight_tiny() -> ModelConfig:
    """Moonlight at 3 M parameters: latent attention, a dense layer, two with 32 experts, top-3, and one shared."""
    return ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=48,
        max_position_embeddings=512,
        rope_theta=50000.0,
        mla=MLAConfig(kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
        moe=MoEConfig(
            num_experts=32,
            top_k=3,
            intermediate_size=88,
            layers=(1, 2),
            gate="sigmoid_bias",
            routed_scaling=1.730,  # Moonlight's appendix C for (32, 3), recomputed in its test
            shared_intermediate_size=88,
            shared_gated=False,
        ),
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2-135M, a small Llama (HuggingFaceTB, Apache-2.0)."""
    return ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    )


def smollm2_135m_e8t2() -> ModelConfig:
    """SmolLM2-135M upcycled to 8 experts, top-2, in all 30 layers."""
    return _with_experts(smollm2_135m(), num_experts=8, top_k=2)


def llama3_8b() -> ModelConfig:
    """Llama 3 8B (Meta)."""
    return ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def llama3_8b_e8t2() -> ModelConfig:
    """Llama 3 8B upcycled to 8 experts, top-2, in all 32 layers (arXiv:2412.09952)."""
    return _with_experts(llama3_8b(), num_experts=8, top_k=2)


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B (Mistral AI, arXiv:2401.04088)."""
    dense = replace(
        llama3_8b(),
        vocab_size=32000,
        max_position_embeddings=32768,
        rope_theta=1e6,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return _with_experts(dense, num_experts=8, top_k=2)


def moonlight_16b_a3b() -> ModelConfig:
    """Moonlight-16B-A3B: latent attention, 64 experts, top-6, and two shared (arXiv:2502.16982)."""
    return ModelConfig(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=192,
        max_position_embeddings=8192,
        rope_theta=50000.0,
        mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MoEConfig(
            num_experts=64,
            top_k=6,
            intermediate_size=1408,
            layers=tuple(range(1, 27)),
            gate="sigmoid_bias",
            routed_scaling=2.446,
            shared_intermediate_size=2 * 1408,
            shared_gated=False,
        ),
        bos_token_id=163584,
        eos_token_ids=(163585,),
    )


def _with_experts(dense: ModelConfig, *, num_experts: int, top_k: int) -> ModelConfig:
    """`dense` with that many experts, of the width of its feed-forward networks, in all layers."""
    layers = tuple(range(dense.num_hidden_layers))
    experts = MoEConfig(num_experts=num_experts, top_k=top_k, intermediate_size=dense.intermediate_size, layers=layers)
    return replace(dense, moe=experts)


PRESETS = {
    f.__name__: f
    for f in (
        llama3_tiny,
        llama3_tiny_e8t2,
        moonlight_tiny,
        smollm2_135m,
        smollm2_135m_e8t2,
        llama3_8b,
        llama3_8b_e8t2,
        mixtral_8x7b,
        moonlight_16b_a3b,
    )
}
