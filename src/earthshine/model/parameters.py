"""The trained parameters of a `ModelConfig`, by name and shape, without building the model. No torch import.

Parameters, FLOPs and the optimizer's costs are counted from this list; a test holds it to the built model of every
family and to how `optim.groups` divides it. Buffers are not in it.
"""

from dataclasses import dataclass
from typing import Literal

from earthshine.model.config import ModelConfig


@dataclass(frozen=True)
class ParameterShape:
    """A parameter as `count` matrices of rows x columns; a vector is one row.

    role: "experts" is a stack of which a token passes through the chosen ones; "matrix" any other matrix of the hidden
        layers; "embedding" the input table, which is the head as well where the two are tied.
    head_rows: how the rows of a projection divide into those of the heads, in parts (`Attention.query_key_heads`).
    """

    name: str
    rows: int
    columns: int
    count: int = 1
    role: Literal["embedding", "head", "vector", "matrix", "experts"] = "matrix"
    head_rows: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def is_router(self) -> bool:
        return self.name.endswith(".router.weight")

    @property
    def for_muon(self) -> bool:
        """Muon's division of `optim.groups`: hidden matrices, unless they have a single row or column."""
        return self.role in ("matrix", "experts") and min(self.rows, self.columns) > 1


def parameter_shapes(c: ModelConfig) -> list[ParameterShape]:
    """All trained parameters of `c`, named as in the built model."""
    width = c.hidden_size
    shapes = [ParameterShape("embed.weight", c.vocab_size, width, role="embedding")]
    for layer in range(c.num_hidden_layers):
        block = f"blocks.{layer}"
        shapes += [_vector(f"{block}.{norm}.weight", width) for norm in ("attn_norm", "ffn_norm")]
        shapes += (_latent_attention if c.mla.kv_lora_rank else _attention)(f"{block}.attn", c)
        if layer in c.moe.layers:
            shapes += _moe(f"{block}.moe", c)
        else:
            shapes += _feed_forward(f"{block}.ffn", width, c.intermediate_size)
    shapes.append(_vector("final_norm.weight", width))
    if not c.tie_word_embeddings:
        shapes.append(ParameterShape("head.weight", c.vocab_size, width, role="head"))
    return shapes


def router_biases(c: ModelConfig) -> dict[int, str]:
    """Each layer's bias of a "sigmoid_bias" gate: a buffer, which `Transformer.update_router_bias` moves."""
    return {layer: f"blocks.{layer}.moe.router.bias_E" for layer in c.moe.layers if c.moe.gate == "sigmoid_bias"}


def query_key_projections(c: ModelConfig) -> dict[int, tuple[str, ...]]:
    """The names of each layer's parameters that QK-Clip scales: `query` and `key` of `Attention.query_key_heads`."""
    names: tuple[str, ...] = ("q_proj.weight", "k_proj.weight")
    if c.mla.kv_lora_rank:
        names = ("q_b_proj.weight" if c.mla.q_lora_rank else "q_proj.weight", "kv_b_proj.weight")
    elif c.qkv_bias:
        names += ("q_proj.bias", "k_proj.bias")
    return {layer: tuple(f"blocks.{layer}.attn.{name}" for name in names) for layer in range(c.num_hidden_layers)}


def _vector(name: str, size: int) -> ParameterShape:
    return ParameterShape(name, 1, size, role="vector")


def _attention(where: str, c: ModelConfig) -> list[ParameterShape]:
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    into = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    shapes = [
        ParameterShape(f"{where}.{name}.weight", rows, c.hidden_size, head_rows=(c.head_dim,) * (rows // c.head_dim))
        for name, rows in into.items()
    ]
    if c.qkv_bias:
        shapes += [_vector(f"{where}.{name}.bias", rows) for name, rows in into.items()]
    if c.qk_norm:
        shapes += [_vector(f"{where}.{name}.weight", c.head_dim) for name in ("q_norm", "k_norm")]
    return [*shapes, ParameterShape(f"{where}.o_proj.weight", c.hidden_size, queries)]


def _latent_attention(where: str, c: ModelConfig) -> list[ParameterShape]:
    mla, heads, width = c.mla, c.num_attention_heads, c.hidden_size
    query_rows, value_rows = ((mla.qk_nope_head_dim, last) * heads for last in (mla.qk_rope_head_dim, mla.v_head_dim))
    if mla.q_lora_rank:
        shapes = [
            ParameterShape(f"{where}.q_a_proj.weight", mla.q_lora_rank, width),
            _vector(f"{where}.q_a_norm.weight", mla.q_lora_rank),
            ParameterShape(f"{where}.q_b_proj.weight", heads * c.head_dim, mla.q_lora_rank, head_rows=query_rows),
        ]
    else:
        shapes = [ParameterShape(f"{where}.q_proj.weight", heads * c.head_dim, width, head_rows=query_rows)]
    return [
        *shapes,
        ParameterShape(f"{where}.kv_a_proj_with_mqa.weight", mla.kv_lora_rank + mla.qk_rope_head_dim, width),
        _vector(f"{where}.kv_a_norm.weight", mla.kv_lora_rank),
        ParameterShape(f"{where}.kv_b_proj.weight", sum(value_rows), mla.kv_lora_rank, head_rows=value_rows),
        ParameterShape(f"{where}.o_proj.weight", width, heads * mla.v_head_dim),
    ]


def _feed_forward(where: str, width: int, intermediate: int) -> list[ParameterShape]:
    return [
        ParameterShape(f"{where}.gate_proj.weight", intermediate, width),
        ParameterShape(f"{where}.up_proj.weight", intermediate, width),
        ParameterShape(f"{where}.down_proj.weight", width, intermediate),
    ]


def _moe(where: str, c: ModelConfig) -> list[ParameterShape]:
    moe, width = c.moe, c.hidden_size
    shapes = [
        ParameterShape(f"{where}.router.weight", moe.num_experts, width),
        ParameterShape(f"{where}.experts.w_gate_EFD", moe.intermediate_size, width, moe.num_experts, "experts"),
        ParameterShape(f"{where}.experts.w_up_EFD", moe.intermediate_size, width, moe.num_experts, "experts"),
        ParameterShape(f"{where}.experts.w_down_EDF", width, moe.intermediate_size, moe.num_experts, "experts"),
    ]
    if moe.shared_intermediate_size:
        shapes += _feed_forward(f"{where}.shared", width, moe.shared_intermediate_size)
        if moe.shared_gated:
            shapes.append(ParameterShape(f"{where}.shared_gate.weight", 1, width))
    return shapes
