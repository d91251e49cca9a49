"""What vLLM's and SGLang's own model files make of an MoE's class. No torch.

Read in their source, not run; `docs/serving.md` names the files and commits.
"""

from earthshine.model.config import ModelConfig

SERVED = "vLLM and SGLang read all that this class holds"


def serving_notes(config: ModelConfig) -> list[str]:
    """What of a model the serving programs do not read, a sentence each; none for a dense model.

    Their copies of a class fix what its usual models have in common: a bias on q, k and v, the width of a head, which
    layers have experts, an output matrix of its own.
    """
    if not config.is_moe:
        return []
    family, usual_heads = config.family, _usual_heads(config)
    some_layers = len(config.moe.layers) < config.num_hidden_layers
    notes = []
    if lacks_bias(config):
        notes.append("vLLM's Qwen2-MoE has a bias on q, k and v, which is not here: `earthshine export` writes zeros")
    if family == "qwen2_moe" and not usual_heads:
        notes.append(
            f"vLLM's and SGLang's Qwen2-MoE take head_dim for hidden_size / num_attention_heads, and here it is "
            f"{config.head_dim}: neither serves it"
        )
    if family == "mixtral" and not usual_heads:
        notes.append(
            f"SGLang's Mixtral takes head_dim for hidden_size / num_attention_heads, and here it is "
            f"{config.head_dim}: serve it with vLLM"
        )
    if family == "mixtral" and config.rope_scaling.kind != "none":
        notes.append(
            f"SGLang's Mixtral does not read the rotary scaling {config.rope_scaling.kind!r}: serve it with vLLM"
        )
    if family in ("qwen2_moe", "qwen3_moe") and some_layers:
        family_name = {"qwen2_moe": "Qwen2-MoE", "qwen3_moe": "Qwen3-MoE"}[family]
        notes.append(
            f"SGLang's {family_name} has experts in every layer, here {len(config.moe.layers)} of "
            f"{config.num_hidden_layers} have: serve it with vLLM"
        )
    if family == "deepseek_v3" and not config.mla.rope_interleaved:
        both = "vLLM's and SGLang's DeepSeek-V3"
        notes.append(f"{both} rotate neighboring pairs, and here the pairs are of halves: neither serves it")
    if config.tie_word_embeddings:
        who = "vLLM's DeepSeek-V3" if family == "deepseek_v3" else "SGLang's copy of this class"
        notes.append(f"{who} does not tie the output matrix to the embedding, as here")
    return notes


def lacks_bias(config: ModelConfig) -> bool:
    """Whether a bias of zeros on q, k and v, which changes nothing, is all that vLLM's Qwen2-MoE needs."""
    return config.family == "qwen2_moe" and not config.qkv_bias and _usual_heads(config)


def _usual_heads(config: ModelConfig) -> bool:
    return config.head_dim * config.num_attention_heads == config.hidden_size
