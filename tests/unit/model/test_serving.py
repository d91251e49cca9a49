"""The notes on what vLLM and SGLang do not read of a class; docs/serving.md has the sources."""

import re
from dataclasses import replace

import pytest

from earthshine.model.config import ModelConfig, MoEConfig, RopeScaling
from earthshine.model.serving import lacks_bias, serving_notes

DENSE = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
ALL = MoEConfig(num_experts=4, intermediate_size=48, layers=(0, 1))
SHARED = replace(ALL, shared_intermediate_size=16)
MIXTRAL, QWEN2 = replace(DENSE, moe=ALL), replace(DENSE, moe=SHARED, qkv_bias=True)
QWEN3 = replace(DENSE, moe=ALL, qk_norm=True)


def some(config: ModelConfig) -> ModelConfig:
    return replace(config, moe=replace(config.moe, layers=(1,)))


@pytest.mark.parametrize("config", [DENSE, MIXTRAL, QWEN2, QWEN3, replace(QWEN3, head_dim=16)])
def test_what_is_read_by_both(config: ModelConfig) -> None:
    assert serving_notes(config) == [] and not lacks_bias(config)


@pytest.mark.parametrize(
    "config, expected",
    [
        (replace(MIXTRAL, head_dim=16), "SGLang's Mixtral takes head_dim to be hidden_size / num_attention_heads"),
        (replace(MIXTRAL, rope_scaling=RopeScaling(kind="llama3")), "does not read the rotary scaling 'llama3'"),
        (replace(MIXTRAL, tie_word_embeddings=True), "SGLang's copy of this class has an output matrix of its own"),
        (some(QWEN2), "SGLang's Qwen2-MoE has experts in every layer, this model in 1 of 2"),
        (some(QWEN3), "SGLang's Qwen3-MoE has experts in every layer, this model in 1 of 2"),
        (replace(QWEN2, head_dim=16), "vLLM's and SGLang's Qwen2-MoE take head_dim .* neither serves it"),
        (replace(QWEN2, qkv_bias=False), "vLLM's Qwen2-MoE reads a bias of q, k and v, which this model lacks"),
        (replace(QWEN2, tie_word_embeddings=True), "SGLang's copy of this class has an output matrix of its own"),
    ],
)
def test_what_is_not_read_has_a_note(config: ModelConfig, expected: str) -> None:
    (note,) = serving_notes(config)
    assert re.search(expected, note), note


def test_zeros_are_written_only_where_they_are_all_that_is_missing() -> None:
    assert lacks_bias(replace(QWEN2, qkv_bias=False))
    assert not lacks_bias(replace(QWEN2, qkv_bias=False, head_dim=16)) and not lacks_bias(MIXTRAL)
