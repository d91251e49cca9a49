"""Which Hugging Face families hold an architecture, and what keeps it out of all of them. No torch import."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from earthshine.model.config import ModelConfig

Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
HF_CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
FAMILIES: tuple[Family, ...] = tuple(HF_CLASSES)


def families_of(c: "ModelConfig") -> tuple[Family, ...]:
    """All families that hold this architecture, the usual one first."""
    moe = c.moe
    if c.mla.kv_lora_rank:
        first_dense = c.num_hidden_layers - len(moe.layers)
        as_deepseek = (
            moe.layers == tuple(range(first_dense, c.num_hidden_layers))
            and (not c.is_moe or moe.gate == "sigmoid_bias")
            and (not moe.shared_intermediate_size or not moe.shared_gated)
            and moe.shared_intermediate_size % max(moe.intermediate_size, 1) == 0
        )
        return ("deepseek_v3",) if as_deepseek else ()
    if not c.is_moe:
        if c.qkv_bias:
            return () if c.qk_norm else ("qwen2",)
        if c.qk_norm:
            return ("qwen3",)
        whole_heads = c.hidden_size % c.num_attention_heads == 0  # transformers' LlamaConfig requires it
        return ("llama", "mistral") if whole_heads else ("mistral",)
    if moe.gate == "sigmoid_bias" or moe.routed_scaling != 1 or (moe.shared_intermediate_size and not moe.shared_gated):
        return ()
    if c.qk_norm:
        return () if c.qkv_bias or moe.shared_intermediate_size else ("qwen3_moe",)
    if moe.shared_intermediate_size:
        return ("qwen2_moe",)
    everywhere = len(moe.layers) == c.num_hidden_layers
    return ("mixtral",) if everywhere and moe.renormalize and not c.qkv_bias else ()


def obstacle(c: "ModelConfig") -> str:
    """What keeps this architecture out of every family, and what to change."""
    moe = c.moe
    if c.mla.kv_lora_rank:
        return (
            "latent attention (model.mla) needs gate='sigmoid_bias', dense layers before all MoE layers, and a "
            "shared expert without a gate whose width is a multiple of model.moe.intermediate_size (DeepSeek-V3)."
        )
    if c.qk_norm and c.qkv_bias:
        return "model.qk_norm (Qwen3) and model.qkv_bias (Qwen2) exclude each other."
    if moe.gate == "sigmoid_bias":
        return "model.moe.gate='sigmoid_bias' needs latent attention (model.mla), or take another gate."
    if moe.routed_scaling != 1:
        return f"model.moe.routed_scaling={moe.routed_scaling} needs latent attention (model.mla), or set it to 1."
    if moe.shared_intermediate_size and not moe.shared_gated:
        return "model.moe.shared_gated=false needs latent attention (model.mla), or set it to true."
    if c.qk_norm:
        return "with model.qk_norm (Qwen3-MoE) there is no shared expert: set model.moe.shared_intermediate_size=0."
    return (
        "experts in some layers only, qkv_bias=true or renormalize=false need a shared expert (Qwen2-MoE): set "
        "model.moe.shared_intermediate_size (with zero weights it contributes nothing)."
    )
