"""Hugging Face tensor names per family, as data. Both directions, all shapes, and what may be missing follow from it.

{l} is a layer, {e} an expert; a name of ours that several experts share is a stack over them. Shape letters: V
vocabulary, D model, H heads * head width, G key-value heads * head width, F dense width, E experts, M expert width,
S width of the shared expert.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from earthshine.model.config import Family, ModelConfig

_AROUND = {
    "model.embed_tokens.weight": ("embed.weight", "VD"),
    "model.norm.weight": ("final_norm.weight", "D"),
    "lm_head.weight": ("head.weight", "VD"),
}
_EVERY_LAYER = {
    "model.layers.{l}.input_layernorm.weight": ("blocks.{l}.attn_norm.weight", "D"),
    "model.layers.{l}.self_attn.q_proj.weight": ("blocks.{l}.attn.q_proj.weight", "HD"),
    "model.layers.{l}.self_attn.k_proj.weight": ("blocks.{l}.attn.k_proj.weight", "GD"),
    "model.layers.{l}.self_attn.v_proj.weight": ("blocks.{l}.attn.v_proj.weight", "GD"),
    "model.layers.{l}.self_attn.o_proj.weight": ("blocks.{l}.attn.o_proj.weight", "DH"),
    "model.layers.{l}.post_attention_layernorm.weight": ("blocks.{l}.ffn_norm.weight", "D"),
}
_DENSE_LAYER = {
    "model.layers.{l}.mlp.gate_proj.weight": ("blocks.{l}.ffn.gate_proj.weight", "FD"),
    "model.layers.{l}.mlp.up_proj.weight": ("blocks.{l}.ffn.up_proj.weight", "FD"),
    "model.layers.{l}.mlp.down_proj.weight": ("blocks.{l}.ffn.down_proj.weight", "DF"),
}
_MOE_LAYER: dict[Family, dict[str, tuple[str, str]]] = {
    "llama": {},
    "mixtral": {
        "model.layers.{l}.block_sparse_moe.gate.weight": ("blocks.{l}.moe.router.weight", "ED"),
        "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight": ("blocks.{l}.moe.experts.w_gate_EFD", "MD"),
        "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight": ("blocks.{l}.moe.experts.w_up_EFD", "MD"),
        "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight": ("blocks.{l}.moe.experts.w_down_EDF", "DM"),
    },
    "qwen2_moe": {
        "model.layers.{l}.mlp.gate.weight": ("blocks.{l}.moe.router.weight", "ED"),
        "model.layers.{l}.mlp.experts.{e}.gate_proj.weight": ("blocks.{l}.moe.experts.w_gate_EFD", "MD"),
        "model.layers.{l}.mlp.experts.{e}.up_proj.weight": ("blocks.{l}.moe.experts.w_up_EFD", "MD"),
        "model.layers.{l}.mlp.experts.{e}.down_proj.weight": ("blocks.{l}.moe.experts.w_down_EDF", "DM"),
        "model.layers.{l}.mlp.shared_expert.gate_proj.weight": ("blocks.{l}.moe.shared.gate_proj.weight", "SD"),
        "model.layers.{l}.mlp.shared_expert.up_proj.weight": ("blocks.{l}.moe.shared.up_proj.weight", "SD"),
        "model.layers.{l}.mlp.shared_expert.down_proj.weight": ("blocks.{l}.moe.shared.down_proj.weight", "DS"),
        "model.layers.{l}.mlp.shared_expert_gate.weight": ("blocks.{l}.moe.shared_gate.weight", "1D"),
    },
}

# Buffers that old transformers saved and that are computed from the config.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
TIED_COPY = {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor: its name, our parameter, which expert of that (-1: all of it), and its shape."""

    hf: str
    ours: str
    expert: int
    shape: tuple[int, ...]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model's Hugging Face directory, in the order in which it is written.

    The same matrix of all experts stands together, so that a source they share is read once.
    """
    around = dict(_AROUND)
    if config.tie_word_embeddings:
        around.pop("lm_head.weight")
    found = list(_expand({"model.embed_tokens.weight": around.pop("model.embed_tokens.weight")}, config, -1))
    for layer in range(config.num_hidden_layers):
        sparse = layer in config.moe.layers
        found += _expand(_EVERY_LAYER | (_MOE_LAYER[config.family] if sparse else _DENSE_LAYER), config, layer)
    return [*found, *_expand(around, config, -1)]


def _expand(table: dict[str, tuple[str, str]], config: ModelConfig, layer: int) -> Iterator[Entry]:
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": config.num_attention_heads * config.head_dim,
        "G": config.num_key_value_heads * config.head_dim,
        "F": config.intermediate_size,
        "E": config.moe.num_experts,
        "M": config.moe.intermediate_size,
        "S": config.moe.shared_intermediate_size,
        "1": 1,
    }
    for hf, (ours, letters) in table.items():
        shape = tuple(sizes[letter] for letter in letters)
        for expert in range(config.moe.num_experts) if "{e}" in hf else (-1,):
            yield Entry(hf.format(l=layer, e=expert), ours.format(l=layer), expert, shape)
