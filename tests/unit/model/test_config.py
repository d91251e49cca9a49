"""Hugging Face configs both ways, and what is refused."""

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import from_hf, to_hf
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
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat object"),
    ],
)
def test_what_would_change_the_function_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf({**to_hf(preset("llama3_tiny")), **change})


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_type twice: 'llama3', and 'default' in rope_param"),
        ({"rope_theta": 500.0}, "rope_theta twice: 500.0, and 10000.0"),
        (
            {
                "original_max_position_embeddings": 8,
                "rope_scaling": {"type": "llama3", **LLAMA3},
                "rope_parameters": None,
            },
            "original_max_position_embeddings twice",
        ),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be an integer"),
        ({"num_hidden_layers": None}, "no field 'num_hidden_layers'"),
        ({"vocab_size": 2048.0}, "vocab_size=2048.0 must be of type int"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be of type bool"),
        ({"rope_theta": 0.0, "rope_parameters": None}, "rope_theta=0.0 must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ],
)
def test_what_can_be_read_in_two_ways_or_in_none_is_refused(change: dict, message: str) -> None:
    """transformers 4 and 5, and we, would each take rotary settings from another place."""
    with pytest.raises(ConfigError, match=message):
        from_hf({**to_hf(preset("llama3_tiny")), **change})


@pytest.mark.parametrize("name", ["llama3_tiny", "llama3_tiny_e8t2"])
def test_what_a_config_leaves_out_is_what_transformers_takes(name: str) -> None:
    """Llama 2's own files have no rope_theta."""
    transformers = pytest.importorskip("transformers")
    absent = ("rope_theta", "rope_parameters", "rope_scaling", "rms_norm_eps", "tie_word_embeddings", "head_dim")
    hf = {k: v for k, v in to_hf(preset(name)).items() if k not in absent}
    ours, theirs = from_hf(hf), transformers.AutoConfig.for_model(**hf)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)


def test_a_missing_field_is_named() -> None:
    hf = to_hf(preset("llama3_tiny"))
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
    data = encode(preset("llama3_tiny_e8t2"))
    data["moe"] |= change
    with pytest.raises(ConfigError, match=message):
        decode(ModelConfig, data)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llama3_tiny'"):
        preset("lama_tiny")
