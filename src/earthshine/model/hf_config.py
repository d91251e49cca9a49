"""A model's architecture from and to a Hugging Face `config.json`. No torch."""

from typing import Any

from earthshine.config import decode, encode
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import FAMILIES, HF_CLASSES, Family, ModelConfig, MoEConfig, RopeScaling

# Keys of a Hugging Face config that change the computation and that we hold only at these values.
_REQUIRED_HF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
    "norm_topk_prob": (True,),
}
# A missing key means the family's default, which is not one of the values above.
_REQUIRED_PRESENT: dict[Family, tuple[str, ...]] = {
    "llama": (),
    "mixtral": (),
    "qwen2_moe": ("norm_topk_prob", "qkv_bias"),
}
# What transformers takes where a config says nothing.
_DEFAULT_EPS: dict[Family, float] = {"llama": 1e-6, "mixtral": 1e-5, "qwen2_moe": 1e-6}
_DEFAULT_THETA: dict[Family, float] = {"llama": 1e4, "mixtral": 1e6, "qwen2_moe": 1e4}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed Hugging Face `config.json`.

    Raises UnsupportedModelError for a `model_type` outside llama, mixtral and qwen2_moe, or for a feature that would
    change the function and that is not implemented; ConfigError for a missing or contradictory field.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(f"model_type={family!r} is not a known family; known: {', '.join(FAMILIES)}.")
    required = dict(_REQUIRED_HF)
    if family == "qwen2_moe":  # its sliding_window is only in force with use_sliding_window
        required.pop("sliding_window")
    for key, allowed in required.items():
        absent = key not in hf
        if (absent and key in _REQUIRED_PRESENT[family]) or (not absent and hf[key] not in allowed):
            got = "absent (so the family's default)" if absent else repr(hf[key])
            raise UnsupportedModelError(
                f"config.json {key} is {got}: only {' or '.join(map(repr, allowed))} is implemented for {family}."
            )
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        raise UnsupportedModelError(
            f"config.json layer_types is {hf['layer_types']}: only full attention is implemented."
        )
    try:
        return _from_hf_fields(family, {key: value for key, value in hf.items() if value is not None})
    except KeyError as e:
        raise ConfigError(f"config.json has no field {e}, which model_type={family!r} needs.") from e


def _from_hf_fields(family: Family, hf: dict[str, Any]) -> ModelConfig:
    layers, heads, width = (_whole(hf, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    eos = hf.get("eos_token_id", ())
    moe = MoEConfig()
    if family == "mixtral":
        moe = MoEConfig(
            num_experts=hf["num_local_experts"],
            top_k=hf["num_experts_per_tok"],
            intermediate_size=hf["intermediate_size"],
            layers=tuple(range(layers)),
        )
    elif family == "qwen2_moe":
        plain, step = hf.get("mlp_only_layers", ()), _whole(hf, "decoder_sparse_step", 1)
        if hf["shared_expert_intermediate_size"] == 0:
            raise UnsupportedModelError("config.json shared_expert_intermediate_size is 0: a Qwen2-MoE has one.")
        moe = MoEConfig(
            num_experts=hf["num_experts"],
            top_k=hf["num_experts_per_tok"],
            intermediate_size=hf["moe_intermediate_size"],
            layers=tuple(i for i in range(layers) if i not in plain and (i + 1) % step == 0),
            shared_intermediate_size=hf["shared_expert_intermediate_size"],
        )
    theta, scaling = _rope_from_hf(family, hf)
    fields = {
        "vocab_size": hf["vocab_size"],
        "hidden_size": width,
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": hf.get("num_key_value_heads", heads),
        "head_dim": hf.get("head_dim", width // heads),
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
        "rms_norm_eps": hf.get("rms_norm_eps", _DEFAULT_EPS[family]),
        "rope_theta": theta,
        "rope_scaling": encode(scaling),
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "moe": encode(moe),
        "init_std": hf.get("initializer_range", 0.02),
        "bos_token_id": hf.get("bos_token_id", -1),
        "eos_token_ids": eos if isinstance(eos, list | tuple) else (eos,),
        "pad_token_id": hf.get("pad_token_id", -1),
    }
    return decode(ModelConfig, fields, "config.json")  # which checks every type


def _whole(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    """A count that others are computed from, at least 1. Raises KeyError when it is missing and has no default."""
    value = hf[key] if default is None else hf.get(key, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json {key}={value!r} must be an integer of at least 1.")
    return value


def _rope_from_hf(family: Family, hf: dict[str, Any]) -> tuple[float, RopeScaling]:
    """Theta and scaling from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    Which place wins depends on who reads the file, so one that contradicts itself is refused.
    """
    places = {
        "config.json": {k: hf[k] for k in ("rope_theta", "original_max_position_embeddings") if k in hf},
        "rope_scaling": hf.get("rope_scaling", {}),
        "rope_parameters": hf.get("rope_parameters", {}),
    }
    merged: dict[str, Any] = {}
    for place, values in places.items():
        if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
            raise UnsupportedModelError(f"config.json {place} is {values!r}: only one flat object is implemented.")
        for name, value in values.items():
            key = "rope_type" if name == "type" else name  # before transformers 4.43
            if merged.setdefault(key, value) != value:
                raise ConfigError(f"config.json gives {key} twice: {merged[key]!r}, and {value!r} in {place}.")
    if merged.get("partial_rotary_factor") not in (None, 1):
        partial = merged["partial_rotary_factor"]
        raise UnsupportedModelError(f"config.json partial_rotary_factor is {partial!r}: only 1 is implemented.")
    theta = merged.get("rope_theta", _DEFAULT_THETA[family])
    kind = merged.get("rope_type", "default")
    if kind == "default":
        return theta, RopeScaling()
    if kind != "llama3":
        raise UnsupportedModelError(f"config.json rope_type={kind!r}: only 'default' and 'llama3' are implemented.")
    return theta, RopeScaling(
        kind="llama3",
        factor=merged["factor"],
        low_freq_factor=merged["low_freq_factor"],
        high_freq_factor=merged["high_freq_factor"],
        original_max_position_embeddings=merged["original_max_position_embeddings"],
    )


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The Hugging Face `config.json` of a model; `rope_theta` is written in the old and the new place.

    Raises UnsupportedModelError when no known class holds the architecture.
    """
    family, moe = config.family, config.moe
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling.kind == "llama3":
        s = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    hf: dict[str, Any] = {
        "architectures": [HF_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": moe.intermediate_size if family == "mixtral" else config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling.kind == "none" else scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None if config.bos_token_id < 0 else config.bos_token_id,
        "eos_token_id": _eos_to_hf(config.eos_token_ids),
        "pad_token_id": None if config.pad_token_id < 0 else config.pad_token_id,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family == "llama":
        hf |= {"attention_bias": False, "mlp_bias": False}
    elif family == "mixtral":
        hf |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k, "sliding_window": None}
    else:
        hf |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            "shared_expert_intermediate_size": moe.shared_intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in moe.layers],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": False,
        }
    return hf


def _eos_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
