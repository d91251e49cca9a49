"""Hugging Face configs both ways, and what is refused."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest

from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from earthshine.model.hf_config import from_hf, to_hf, without_effect
from earthshine.model.hf_families import FAMILIES
from earthshine.model.presets import PRESETS

DENSE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SOME = MoEConfig(num_experts=4, top_k=2, intermediate_size=16, layers=(1, 2))
MLA = MLAConfig(kv_lora_rank=12, q_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
DEEPSEEK_MOE = replace(
    SOME, num_experts=8, gate="sigmoid_bias", routed_scaling=2.5, num_groups=4, top_k_groups=2, shared_gated=False,
    shared_intermediate_size=32,
)  # fmt: skip
MODELS = {
    "llama": DENSE,
    "mistral": replace(DENSE, model_type="mistral"),
    "qwen2": replace(DENSE, qkv_bias=True),
    "qwen3": replace(DENSE, qk_norm=True),
    "mixtral": replace(DENSE, moe=replace(SOME, intermediate_size=48, layers=(0, 1, 2))),
    "qwen2_moe": replace(DENSE, qkv_bias=True, moe=replace(SOME, shared_intermediate_size=8)),
    "qwen3_moe": replace(DENSE, qk_norm=True, moe=replace(SOME, gate="softmax_topk", renormalize=False)),
    "deepseek_v3": replace(DENSE, num_key_value_heads=4, head_dim=10, mla=MLA, moe=DEEPSEEK_MOE),
}
# The file of Moonlight-16B-A3B-Instruct, but for `auto_map`.
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trips(name: str) -> None:
    config = PRESETS[name]()
    assert from_hf(to_hf(config)) == config


def variants(family: str) -> list[ModelConfig]:
    """A family's config, and with the other values of what it may choose."""
    config = MODELS[family]
    configs = [config, replace(config, tie_word_embeddings=True, eos_token_ids=(3, 5), bos_token_id=1, pad_token_id=0)]
    for kind in ("llama3", "yarn"):
        configs.append(replace(config, rope_scaling=RopeScaling(kind=kind, original_max_position_embeddings=16)))
    full = RopeScaling(kind="yarn", mscale=0.7, mscale_all_dim=0.9, beta_fast=16, beta_slow=2, attention_factor=1.25)
    configs.append(replace(config, rope_scaling=full))
    if family == "deepseek_v3":
        configs.append(replace(config, mla=replace(MLA, q_lora_rank=0, rope_interleaved=False)))
        bare = replace(SOME, gate="sigmoid_bias", renormalize=False, layers=(0, 1, 2))
        configs.append(replace(config, moe=bare))
        configs.append(config.dense())
    if family == "qwen2_moe":
        configs.append(replace(config, qkv_bias=False, moe=replace(config.moe, gate="softmax_topk", renormalize=False)))
    return configs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_and_is_read_by_transformers(family: str) -> None:
    """Through transformers' own class and back as well: what version 5 writes (no scoring_func, other places)."""
    transformers = pytest.importorskip("transformers")
    for config in variants(family):
        hf = to_hf(config)
        assert hf["model_type"] == family
        assert from_hf(hf) == config
        theirs = transformers.AutoConfig.for_model(**hf)
        assert type(theirs).__name__.removesuffix("Config") in hf["architectures"][0]
        assert from_hf(theirs.to_dict()) == config


def test_heads_that_transformers_refuses_in_a_llama_are_written_as_a_mistral() -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(DENSE, num_attention_heads=6)
    hf = to_hf(config)
    assert hf["model_type"] == "mistral" and from_hf(hf) == config
    assert transformers.AutoConfig.for_model(**hf).num_attention_heads == 6


def test_moonlight_is_read() -> None:
    assert from_hf(MOONLIGHT) == replace(PRESETS["moonlight_16b_a3b"](), eos_token_ids=(163586,))


def test_multi_token_prediction_stands_beside_the_model() -> None:
    assert from_hf(MOONLIGHT | {"num_nextn_predict_layers": 1}) == from_hf(MOONLIGHT)


def test_old_and_new_places_of_rope_are_read() -> None:
    yarn = RopeScaling(kind="yarn", factor=4.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=16)
    for config in (PRESETS["llama3_8b"](), replace(DENSE, rope_scaling=yarn)):
        hf = to_hf(config)
        for drop in ("rope_parameters", "rope_theta"):
            assert from_hf({k: v for k, v in hf.items() if k != drop}) == config
    old = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    assert from_hf({**to_hf(DENSE), "rope_parameters": None, "rope_scaling": old}).rope_scaling == yarn
    del old["original_max_position_embeddings"]  # then transformers takes the model's longest sequence
    configs = from_hf({**to_hf(DENSE), "rope_parameters": None, "rope_scaling": old}).rope_scaling
    assert configs == replace(yarn, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"model_type": "gpt2"}, "'gpt2' is not a known family; known: " + ", ".join(FAMILIES)),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"qkv_bias": True}, "qkv_bias is True"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"quantization_config": {"fmt": "e4m3"}}, "quantization_config is"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": None}, "rope_type='linear'"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}, "rope_parameters": None},
            "truncate of its rotary positions must be True",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}, "rope_parameters": None},
            r"mrope_section=\[1, 1, 2\] is not implemented for rope_type='default'",
        ),
        ("llama", {"sliding_window": 32}, "sliding_window is 32: windows shorter than max_position_embeddings=64"),
        ("mixtral", {"sliding_window": 32}, "sliding_window is 32"),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window is 32"),
        ("qwen2_moe", {"sliding_window": 32, "use_sliding_window": True}, "sliding_window is 32"),
        (
            "qwen3_moe",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 9},
            "sliding_window is 32",
        ),
        ("llama", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
        ("llama", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor of"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat object"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    ],
)
def test_what_would_change_the_function_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_hf({**to_hf(MODELS[family]), **change})


def test_a_sliding_window_counts_only_where_it_is_in_force() -> None:
    mistral = to_hf(MODELS["mistral"])
    del mistral["sliding_window"]  # transformers' default is 4096: nothing for 64 positions
    assert from_hf(mistral) == MODELS["mistral"]
    with pytest.raises(UnsupportedModelError, match="sliding_window is 4096, the default where a config does not"):
        from_hf(mistral | {"max_position_embeddings": 8192})
    qwen = to_hf(MODELS["qwen3"])
    assert from_hf(qwen | {"sliding_window": 8}) == MODELS["qwen3"]
    layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    windowed = {"use_sliding_window": True, "sliding_window": 64, "layer_types": layer_types}
    assert from_hf(qwen | windowed) == MODELS["qwen3"]


WINDOW = {"use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    "family, change, expected",
    [
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2 changes nothing"),
        ("deepseek_v3", {"pretraining_tp": 4}, "pretraining_tp=4 changes nothing"),
        ("qwen2", {"attention_bias": True}, "attention_bias=True changes nothing: a qwen2 does not read it"),
        ("mistral", {"attention_bias": True}, "attention_bias=True changes nothing"),
        ("qwen2_moe", {"attention_bias": True}, "attention_bias=True changes nothing"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True changes nothing"),
        ("llama", {"scoring_func": "softmax", "moe_layer_freq": 2}, "scoring_func='softmax' changes nothing"),
        ("qwen2", WINDOW | {"max_window_layers": 3}, "sliding_window=16 changes nothing: it applies to no layer"),
        ("qwen3", WINDOW | {"layer_types": ["full_attention"] * 3, "max_window_layers": 0}, "sliding_window=16"),
        ("qwen2_moe", WINDOW | {"max_window_layers": 0}, "sliding_window=16 changes nothing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_parameters": None}, "by a factor of 1"),
    ],
)
def test_what_changes_nothing_is_accepted_and_reported(family: str, change: dict[str, Any], expected: str) -> None:
    """transformers 5.23 gives the same logits with and without each of them."""
    hf = to_hf(MODELS[family])
    assert without_effect(hf) == []
    assert from_hf(hf | change) == MODELS[family]
    assert expected in " ".join(without_effect(hf | change))


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("mixtral", {"num_experts_per_tok": 6}, r"^config.json num_experts_per_tok=6 must be between 1 and num_local"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"^config.json num_experts_per_tok=9 must be between 1 and num_exp"),
        ("deepseek_v3", {"topk_group": 9}, r"^config.json topk_group=9 must be between 1 and n_group"),
        ("llama", {"num_key_value_heads": 3}, r"^config.json num_key_value_heads=3 must divide num_attention_heads"),
        ("llama", {"pad_token_id": 4096}, r"^config.json pad_token_id=4096 is not in the vocabulary: with vocab_size="),
        ("mixtral", {"eos_token_id": [1, 4096]}, r"^config.json eos_token_id=4096 is not in the vocabulary"),
        ("qwen2", {"bos_token_id": 4096}, r"^config.json bos_token_id=4096 is not in the vocabulary"),
    ],
)
def test_a_message_has_the_names_of_the_file(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf(to_hf(MODELS[family]) | change)


def test_the_number_of_experts_has_two_names() -> None:
    hf = to_hf(MODELS["mixtral"])
    hf["num_experts"] = hf.pop("num_local_experts")
    assert from_hf(hf) == MODELS["mixtral"]
    with pytest.raises(ConfigError, match="number of experts twice: num_local_experts=5, num_experts=4"):
        from_hf(hf | {"num_local_experts": 5})


def test_an_moe_without_moe_layers_is_dense() -> None:
    plain = {"mlp_only_layers": [0, 1, 2]}
    assert from_hf(to_hf(MODELS["qwen3_moe"]) | plain) == MODELS["qwen3"]
    assert from_hf(to_hf(MODELS["qwen2_moe"]) | {"num_experts": 0}) == MODELS["qwen2"]
    assert from_hf(to_hf(MODELS["deepseek_v3"]) | {"first_k_dense_replace": 3}) == MODELS["deepseek_v3"].dense()
    every_second = {"mlp_only_layers": None, "decoder_sparse_step": 2}
    assert from_hf(to_hf(MODELS["qwen3_moe"]) | every_second).moe.layers == (1,)


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
        ({"rope_parameters": {"rope_type": "yarn"}}, "no field 'factor', which rope_type='yarn' needs"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be an integer"),
        ({"num_hidden_layers": None}, "no field 'num_hidden_layers'"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings='64' must be an integer"),
        ({"vocab_size": 2048.0}, "vocab_size=2048.0 must be of type int"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be of type bool"),
        ({"rope_theta": 0.0, "rope_parameters": None}, "rope_theta=0.0 must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ],
)
def test_what_can_be_read_in_two_ways_or_in_none_is_refused(change: dict[str, Any], message: str) -> None:
    """transformers 4 and 5, and we, would each take rotary settings from another place."""
    with pytest.raises(ConfigError, match=message):
        from_hf({**to_hf(DENSE), **change})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    """Llama 2's own files have no rope_theta. Each key alone, so that no absence hides another's."""
    transformers = pytest.importorskip("transformers")
    hf = {k: v for k, v in to_hf(MODELS[family]).items() if k not in ("rope_theta", "rope_scaling")}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    # Their numbers of heads do not divide ours of 4, so these are looked at below.
    for key in set(hf) - {*sizes, "model_type", "num_key_value_heads"}:
        less = {k: v for k, v in hf.items() if k != key}
        try:
            theirs = transformers.AutoConfig.for_model(**less).to_dict()
            expected = from_hf(theirs)
        except (ConfigError, UnsupportedModelError) as e:  # what they take is refused: then that must be said
            with pytest.raises(type(e)):
                from_hf(less)
        else:
            assert from_hf(less) == expected, key
    few = {k: v for k, v in hf.items() if k != "num_key_value_heads"} | {"num_attention_heads": 128, "hidden_size": 128}
    assert from_hf(few) == from_hf(transformers.AutoConfig.for_model(**few).to_dict())


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_size_is_named(field: str) -> None:
    hf = to_hf(DENSE)
    del hf[field]
    with pytest.raises(ConfigError, match=field):
        from_hf(hf)


def test_what_would_be_planned_for_minutes_is_refused_at_once() -> None:
    """A config.json of 500 bytes: 100,000 layers, a million experts."""
    hf = to_hf(PRESETS["llama3_tiny"]())
    for layers in (4097, 10**5, 3 * 10**6, 10**300):
        with pytest.raises(ConfigError, match=r"num_hidden_layers=\d+ must be an integer .* at most 4096"):
            from_hf(hf | {"num_hidden_layers": layers})
    with pytest.raises(ConfigError, match="expert networks"):
        from_hf(to_hf(PRESETS["llama3_tiny_e8t2"]()) | {"num_local_experts": 10**6})


ODD = [None, True, -1, 0, 2**70, 10**400, 1.5, math.nan, math.inf, "", "2", [], [1], [[1]], [None], {}, {"a": 1}, [{}]]
ODD += [{"rope_type": []}, {"rope_type": "yarn", "factor": "2"}, {"type": {}, "factor": [1]}]


@pytest.mark.parametrize("name", ["llama3_tiny", "llama3_tiny_e8t2", "moonlight_tiny"])
def test_a_config_with_a_value_of_any_type_is_read_or_refused(name: str) -> None:
    """Never a bare TypeError: each key in turn has each odd value."""
    hf = to_hf(PRESETS[name]())
    keys = {*hf, "layer_types", "mlp_only_layers", "rope_parameters", "rope_scaling", "sliding_window", "num_experts"}
    for key in sorted(keys):
        for value in ODD:
            with contextlib.suppress(ConfigError):
                from_hf(hf | {key: value})
            if key != "model_type":
                with contextlib.suppress(ConfigError):
                    from_hf(hf | {"model_type": "qwen3_moe", key: value})
