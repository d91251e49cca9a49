"""Named architectures. Anything else comes from a Hugging Face `config.json`."""

from dataclasses import replace

from earthshine.config import nearest
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig, MoEConfig


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


def llama_tiny() -> ModelConfig:
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


def mixtral_tiny() -> ModelConfig:
    """`llama_tiny` with 8 experts, top-2, in every layer."""
    dense = llama_tiny()
    return replace(dense, moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=256, layers=(0, 1, 2)))


def smollm2_135m_e8t2() -> ModelConfig:
    """SmolLM2-135M upcycled to 8 experts, top-2, in all 30 layers."""
    dense = smollm2_135m()
    return replace(dense, moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=1536, layers=tuple(range(30))))


def llama3_8b_e8t2() -> ModelConfig:
    """Llama 3 8B upcycled to 8 experts, top-2, in all 32 layers (arXiv:2412.09952)."""
    dense = llama3_8b()
    return replace(dense, moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=14336, layers=tuple(range(32))))


PRESETS = {
    f.__name__: f for f in (llama_tiny, mixtral_tiny, smollm2_135m, smollm2_135m_e8t2, llama3_8b, llama3_8b_e8t2)
}


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises ConfigError, with the nearest name, when there is none."""
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}' is not known.{nearest(name, PRESETS)}")
    return PRESETS[name]()
