"""Whether vLLM and SGLang serve an exported MoE: what their own model classes do not read. No torch import.

By reading their source, not by running it; `docs/serving.md` names the files and commits.
"""

from earthshine.model.config import ModelConfig

SERVED = "vLLM and SGLang read all that this class holds"


def serving_notes(config: ModelConfig) -> list[str]:
    """What of a model the serving programs do not read, a sentence each; none for a dense model.

    Their copies of a Hugging Face class hard-code what its usual models have in common: a bias on q, k and v, the width
    of a head, which layers have experts, an untied output matrix.
    """
    if not config.is_moe:
        return []
    family, usual_heads = config.family, _usual_heads(config)
    some_layers = len(config.moe.layers) < config.num_hidden_layers
    notes = []
    if lacks_bias(config):
        notes.append(
            "vLLM's Qwen2-MoE reads a bias of q, k and v, which this model lacks: `earthshine export` writes zeros"
        )
    if family == "qwen2_moe" and not usual_heads:
        notes.append(
            f"vLLM's and SGLang's Qwen2-MoE take head_dim to be hidden_size / num_attention_heads, but it is "
            f"{config.head_dim}: neither serves it"
        )
    if family == "mixtral" and not usual_heads:
        notes.append(
            f"SGLang's Mixtral takes head_dim to be hidden_size / num_attention_heads, but it is "
            f"{config.head_dim}: serve it with vLLM"
        )
    if family == "mixtral" and config.rope_scaling.kind != "none":
        notes.append(
            f"SGLang's Mixtral does not read the rotary scaling {config.rope_scaling.kind!r}: serve it with vLLM"
        )
    if family in ("qwen2_moe", "qwen3_moe") and some_layers:
        family_name = {"qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE"}[family]
        notes.append(
            f"SGLang's {family_name} has experts in every layer, this model in {len(config.moe.layers)} of "
            f"{config.num_hidden_layers}: serve it with vLLM"
        )
    if family == "deepseek_v3" and not config.mla.rope_interleaved:
        notes.append(
            "vLLM's and SGLang's DeepSeek-V3 rotate neighboring elements as pairs, this model those half a head apart: "
            "neither serves it"
        )
    if config.tie_word_embeddings:
        program = "vLLM's DeepSeek-V3" if family == "deepseek_v3" else "SGLang's copy of this class"
        notes.append(f"{program} has an output matrix of its own, where this model's is tied to the embedding")
    return notes


def lacks_bias(config: ModelConfig) -> bool:
    """Whether a bias of zeros on q, k and v, which changes nothing, is all that vLLM's Qwen2-MoE needs."""
    return config.family == "qwen2_moe" and not config.qkv_bias and _usual_heads(config)


def _usual_heads(config: ModelConfig) -> bool:
    return config.head_dim * config.num_attention_heads == config.hidden_size
