"""Hugging Face tensor names per family, as data. Both directions, all shapes, and what may be missing follow from it.

{e} is an expert; a name of ours that several experts share is a stack over them. {s} is the plural s of DeepSeek's
names. Shape letters: V vocabulary, D model, H heads * query width, G key-value heads * query width, O heads * value
width, C query width, F dense width, E experts, M expert width, S width of the shared expert; of latent attention
(DeepSeek): Q and L the latents of queries and of keys and values, R that latent and the rotary key, B each head's key
without it and value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from earthshine.model.config import ModelConfig

_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": ("embed.weight", "VD"),
    "model.norm.weight": ("final_norm.weight", "D"),
    "lm_head.weight": ("head.weight", "VD"),
}
_NORMS = {
    "input_layernorm.weight": ("attn_norm.weight", "D"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "D"),
}
_ATTENTION = {
    "self_attn.q_proj.weight": ("attn.q_proj.weight", "HD"),
    "self_attn.k_proj.weight": ("attn.k_proj.weight", "GD"),
    "self_attn.v_proj.weight": ("attn.v_proj.weight", "GD"),
    "self_attn.o_proj.weight": ("attn.o_proj.weight", "DO"),
}
_QKV_BIAS = {
    "self_attn.q_proj.bias": ("attn.q_proj.bias", "H"),
    "self_attn.k_proj.bias": ("attn.k_proj.bias", "G"),
    "self_attn.v_proj.bias": ("attn.v_proj.bias", "G"),
}
_QK_NORM = {
    "self_attn.q_norm.weight": ("attn.q_norm.weight", "C"),
    "self_attn.k_norm.weight": ("attn.k_norm.weight", "C"),
}
_Q_FULL = {"self_attn.q_proj.weight": ("attn.q_proj.weight", "HD")}
_Q_LATENT = {
    "self_attn.q_a_proj.weight": ("attn.q_a_proj.weight", "QD"),
    "self_attn.q_a_layernorm.weight": ("attn.q_a_norm.weight", "Q"),
    "self_attn.q_b_proj.weight": ("attn.q_b_proj.weight", "HQ"),
}
_LATENT_ATTENTION = {
    "self_attn.kv_a_proj_with_mqa.weight": ("attn.kv_a_proj_with_mqa.weight", "RD"),
    "self_attn.kv_a_layernorm.weight": ("attn.kv_a_norm.weight", "L"),
    "self_attn.kv_b_proj.weight": ("attn.kv_b_proj.weight", "BL"),
    "self_attn.o_proj.weight": ("attn.o_proj.weight", "DO"),
}
_DENSE = {
    "mlp.gate_proj.weight": ("ffn.gate_proj.weight", "FD"),
    "mlp.up_proj.weight": ("ffn.up_proj.weight", "FD"),
    "mlp.down_proj.weight": ("ffn.down_proj.weight", "DF"),
}
_MIXTRAL = {
    "block_sparse_moe.gate.weight": ("moe.router.weight", "ED"),
    "block_sparse_moe.experts.{e}.w1.weight": ("moe.experts.w_gate_EFD", "MD"),
    "block_sparse_moe.experts.{e}.w3.weight": ("moe.experts.w_up_EFD", "MD"),
    "block_sparse_moe.experts.{e}.w2.weight": ("moe.experts.w_down_EDF", "DM"),
}
_MOE = {
    "mlp.gate.weight": ("moe.router.weight", "ED"),
    "mlp.gate.e_score_correction_bias": ("moe.router.bias_E", "E"),
    "mlp.experts.{e}.gate_proj.weight": ("moe.experts.w_gate_EFD", "MD"),
    "mlp.experts.{e}.up_proj.weight": ("moe.experts.w_up_EFD", "MD"),
    "mlp.experts.{e}.down_proj.weight": ("moe.experts.w_down_EDF", "DM"),
    "mlp.shared_expert{s}.gate_proj.weight": ("moe.shared.gate_proj.weight", "SD"),
    "mlp.shared_expert{s}.up_proj.weight": ("moe.shared.up_proj.weight", "SD"),
    "mlp.shared_expert{s}.down_proj.weight": ("moe.shared.down_proj.weight", "DS"),
    "mlp.shared_expert_gate.weight": ("moe.shared_gate.weight", "1D"),
}
_FLOAT32 = "moe.router.bias_E"  # moves by 1e-3 per step, which bfloat16 would round away
# How transformers 5 holds a layer's experts, and writes them when asked not to convert: one stack, gate before up.
_STACKED = {
    "moe.experts.w_gate_EFD": ("mlp.experts.gate_up_proj", 0, 2),
    "moe.experts.w_up_EFD": ("mlp.experts.gate_up_proj", 1, 2),
    "moe.experts.w_down_EDF": ("mlp.experts.down_proj", 0, 1),
}

# Buffers that transformers, old or new, and others saved and that are computed from the config.
IGNORED = re.compile(
    r"(model\.)?(layers\.\d+\.(self_attn\.)?)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)
LAYER = re.compile(r"model\.layers\.(\d+)\.")
TIED_COPY = {"lm_head.weight": "model.embed_tokens.weight"}


@dataclass(frozen=True)
class Location:
    """Where a tensor's values stand: all of a stored tensor, or rows of one expert in a stack (E, rows, columns)."""

    name: str
    shape: tuple[int, ...]
    expert: int = -1
    first_row: int = 0

    def within(self, rows: Sequence[slice]) -> tuple[slice, ...]:
        """Slices of the stored tensor that hold these slices of ours; of a stack they leave a first dimension of 1."""
        if self.expert < 0:
            return tuple(rows)
        first, *others = rows
        moved = slice(first.start + self.first_row, first.stop + self.first_row)
        return (slice(self.expert, self.expert + 1), moved, *others)


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor as we write it.

    hf, ours: its name, and that of our parameter or buffer.
    expert: which expert of that; -1 for all of it.
    float32: it is stored in float32 whatever the dtype of the model.
    locations: where a directory may have it, the usual one first.
    """

    hf: str
    ours: str
    expert: int
    shape: tuple[int, ...]
    float32: bool = False
    locations: tuple[Location, ...] = ()

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """The dtype in which it is stored in a model of the dtype `of_model`."""
        return torch.float32 if self.float32 else of_model


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model's Hugging Face directory, in the order in which it is written.

    The same matrix of all experts stands together, so that a source they share is read once.
    """
    sizes = _sizes(config)
    outside = dict(_OUTSIDE_LAYERS)
    if config.tie_word_embeddings:
        outside.pop("lm_head.weight")
    table = [_entry("model.embed_tokens.weight", *outside.pop("model.embed_tokens.weight"), sizes)]
    for layer in range(config.num_hidden_layers):
        for hf, (ours, letters) in _layer_table(config, layer).items():
            for expert in range(config.moe.num_experts) if "{e}" in hf else (-1,):
                table.append(_layer_entry(layer, hf.format(e=expert), ours, letters, sizes, expert))
    return [*table, *(_entry(hf, ours, letters, sizes) for hf, (ours, letters) in outside.items())]


def _layer_table(config: ModelConfig, layer: int) -> dict[str, tuple[str, str]]:
    """The tensors of one decoder layer: Hugging Face name -> (our name, shape letters)."""
    if config.mla.kv_lora_rank:
        attention = (_Q_LATENT if config.mla.q_lora_rank else _Q_FULL) | _LATENT_ATTENTION
    else:
        attention = _ATTENTION | (_QKV_BIAS if config.qkv_bias else {}) | (_QK_NORM if config.qk_norm else {})
    moe = config.moe
    if layer not in moe.layers:
        return _NORMS | attention | _DENSE
    if config.family == "mixtral":
        return _NORMS | attention | _MIXTRAL
    absent = [] if moe.gate == "sigmoid_bias" else ["e_score_correction_bias"]
    absent += [] if moe.shared_intermediate_size else ["shared_expert"]
    absent += [] if moe.shared_gated else ["shared_expert_gate"]
    plural = "s" if config.family == "deepseek_v3" else ""
    sparse = {hf.replace("{s}", plural): to for hf, to in _MOE.items() if not any(part in hf for part in absent)}
    return _NORMS | attention | sparse


def _sizes(config: ModelConfig) -> dict[str, int]:
    mla, heads = config.mla, config.num_attention_heads
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": heads * config.head_dim,
        "G": config.num_key_value_heads * config.head_dim,
        "O": heads * config.value_dim,
        "C": config.head_dim,
        "Q": mla.q_lora_rank,
        "L": mla.kv_lora_rank,
        "R": mla.kv_lora_rank + mla.qk_rope_head_dim,
        "B": heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        "F": config.intermediate_size,
        "E": config.moe.num_experts,
        "M": config.moe.intermediate_size,
        "S": config.moe.shared_intermediate_size,
        "1": 1,
    }


def _entry(hf: str, ours: str, letters: str, sizes: dict[str, int]) -> Entry:
    shape = tuple(sizes[letter] for letter in letters)
    return Entry(hf, ours, -1, shape, locations=(Location(hf, shape),))


def _layer_entry(layer: int, hf: str, ours: str, letters: str, sizes: dict[str, int], expert: int) -> Entry:
    at, shape = f"model.layers.{layer}.", tuple(sizes[letter] for letter in letters)
    names = dict.fromkeys((hf, hf.replace("block_sparse_moe.", "mlp.")))  # transformers 5 calls a Mixtral's MoE mlp
    locations = [Location(at + name, shape) for name in names]
    if ours in _STACKED:
        name, part, parts = _STACKED[ours]
        stack = (sizes["E"], parts * shape[0], shape[1])
        locations.append(Location(at + name, stack, expert, part * shape[0]))
    return Entry(at + hf, f"blocks.{layer}.{ours}", expert, shape, ours == _FLOAT32, tuple(locations))
