"""Hugging Face configs both ways, and what is refused."""

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import ModelConfig, from_hf, to_hf
from earthshine.model.presets import PRESETS, preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trips(name: str) -> None:
    config = preset(name)
    assert from_hf(to_hf(config)) == config
    assert decode(ModelConfig, encode(config)) == config


def test_old_and_new_places_of_rope_are_read() -> None:
    hf = to_hf(preset("llama3_8b"))
    for drop in ("rope_parameters", "rope_theta"):
        assert from_hf({k: v for k, v in hf.items() if k != drop}) == preset("llama3_8b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "'gpt2' is not a known family; known: llama, mixtral, qwen2_moe"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None}, "rope_type='yarn'"),
        ({"sliding_window": 128}, "sliding_window is 128"),
    ],
)
def test_what_would_change_the_function_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf({**to_hf(preset("llama_tiny")), **change})


def test_a_missing_field_is_named() -> None:
    hf = to_hf(preset("llama_tiny"))
    del hf["num_hidden_layers"]
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        from_hf(hf)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_k": 9}, "top_k=9 must be between 1 and model.moe.num_experts=8"),
        ({"layers": [0, 7]}, r"\[7\] do not exist; the model has layers 0 to 2"),
        ({"layers": [1, 0]}, "sorted list"),
        ({"num_expert": 4}, "no field 'num_expert'. Did you mean 'num_experts'"),
        ({"top_k": "2"}, "must be of type int, not str"),
        ({"gate": "top_softmax"}, "not one of 'topk_softmax'"),
    ],
)
def test_contradictions_are_named(change: dict, message: str) -> None:
    data = encode(preset("mixtral_tiny"))
    data["moe"] |= change
    with pytest.raises(ConfigError, match=message):
        decode(ModelConfig, data)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llama_tiny'"):
        preset("lama_tiny")
