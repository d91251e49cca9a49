"""A model's architecture from and to a Hugging Face `config.json`. No torch import.

Fields that a file leaves out have transformers' defaults; only the sizes below are required. A setting that would
change the function and is not implemented is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from earthshine.advice import instead_of_model
from earthshine.config import decode, read_json
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import MAX_LAYERS, ModelConfig
from earthshine.model.hf_families import FAMILIES, HF_CLASSES, Family
from earthshine.model.hf_settings import (
    in_hf_names,
    integer,
    is_linear_by_one,
    list_of,
    refuse,
    refuse_window,
    settings_without_effect,
)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# transformers' defaults. None: computed from other fields, or turned off.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "sliding_window": None,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096}
_QWEN_MOE = _QWEN | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
_FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": _MISTRAL | {"sliding_window": 4096},
    "qwen2": _QWEN | {"num_key_value_heads": 32},
    "qwen3": _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    "mixtral": _MISTRAL | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8},
    "qwen2_moe": _QWEN_MOE
    | {
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": _QWEN_MOE
    | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "deepseek_v3": {
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
}
_ALIASES: dict[Family, tuple[str, str]] = {  # transformers takes either; version 5 writes the second for a Qwen3-MoE
    "mixtral": ("num_local_experts", "num_experts"),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "deepseek_v3": ("n_routed_experts", "num_local_experts"),
}
# Numbers of each kind of rotary scaling: those that must be there, and those with a default (in `RopeScaling`).
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")),
}


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """The parsed `config.json` of a model's directory. Raises ConfigError when there is none or it is not an object."""
    path = Path(directory) / "config.json"
    try:
        hf = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ConfigError(instead_of_model(Path(directory))) from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not a readable Hugging Face config: {e}.") from e
    if not isinstance(hf, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(hf).__name__}.")
    return hf


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a parsed Hugging Face `config.json`.

    A renormalized softmax over all experts is the softmax over the chosen ones, so `norm_topk_prob` is read as the gate
    "topk_softmax". `num_nextn_predict_layers` (multi-token prediction) is not read: those layers stand beside the model
    and do not change its logits; transformers leaves them out as well. Their tensors: see `checkpoint.accounting`.

    Raises UnsupportedModelError for a `model_type` that is not in `FAMILIES`, or a feature that would change the
    function and is not implemented; ConfigError for a missing or contradictory field.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(f"model_type={family!r} is not a known family; known: {', '.join(FAMILIES)}.")
    values = _DEFAULTS | _FAMILY_DEFAULTS[family] | hf
    name, alias = _ALIASES.get(family, ("", ""))
    if alias in hf:
        values[name] = hf[alias]
        if name in hf and hf[name] != hf[alias]:
            raise ConfigError(f"config.json gives the number of experts twice: {name}={hf[name]}, {alias}={hf[alias]}.")
    for key in _SIZES:
        if hf.get(key) is None:
            raise ConfigError(f"config.json has no field '{key}', which model_type={family!r} needs.")
    refuse(family, hf)
    refuse_window(family, hf, values)
    try:
        config = decode(ModelConfig, _fields(family, hf, values), "config.json")  # checks every type
    except ConfigError as e:
        raise type(e)(in_hf_names(family, _ALIASES.get(family, ("num_experts", ""))[0], str(e))) from e
    usual = config.family
    degenerate = family in ("qwen2_moe", "qwen3_moe") and not config.is_moe  # all its layers are dense
    return config if usual == family or degenerate else replace(config, model_type=family)


def without_effect(hf: dict[str, Any]) -> list[str]:
    """What a `config.json` that `from_hf` accepts sets to an unusual value without effect, a sentence each."""
    return settings_without_effect(hf, _DEFAULTS | _FAMILY_DEFAULTS[hf["model_type"]] | hf)


def _fields(family: Family, hf: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelConfig`, not yet checked. `hf` is the file as written; `values` includes the defaults."""
    layers = integer(hf, "num_hidden_layers", most=MAX_LAYERS)
    heads, width = (integer(hf, key) for key in ("num_attention_heads", "hidden_size"))
    eos = values["eos_token_id"]
    mla = _mla(values) if family == "deepseek_v3" else {}
    head_dim = values["head_dim"]
    if mla:
        head_dim = integer(values, "qk_nope_head_dim") + integer(values, "qk_rope_head_dim")
    theta, scaling = _rope_from_hf(values, hf)
    return {
        "vocab_size": hf["vocab_size"],
        "hidden_size": width,
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        "head_dim": width // heads if head_dim is None else head_dim,
        "max_position_embeddings": values["max_position_embeddings"],
        "rms_norm_eps": values["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": values["tie_word_embeddings"],
        "qkv_bias": values["qkv_bias"] if family == "qwen2_moe" else family == "qwen2",
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "mla": mla,
        "moe": _moe(family, values, layers),
        "init_std": values["initializer_range"],
        "bos_token_id": -1 if values["bos_token_id"] is None else values["bos_token_id"],
        "eos_token_ids": () if eos is None else eos if isinstance(eos, list | tuple) else (eos,),
        "pad_token_id": -1 if values["pad_token_id"] is None else values["pad_token_id"],
    }


def _mla(values: dict[str, Any]) -> dict[str, Any]:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = {name: integer(values, name) for name in names}
    q_lora_rank = 0 if values["q_lora_rank"] is None else values["q_lora_rank"]
    return {**sizes, "q_lora_rank": q_lora_rank, "rope_interleaved": values["rope_interleave"]}


def _moe(family: Family, values: dict[str, Any], layers: int) -> dict[str, Any]:
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return _softmax_moe(family, values, layers)
    if family != "deepseek_v3":
        return {}
    sparse = tuple(range(integer(values, "first_k_dense_replace", least=0), layers))
    if not sparse:
        return {}
    width = integer(values, "moe_intermediate_size")
    shared = 0 if values["n_shared_experts"] is None else integer(values, "n_shared_experts", least=0)
    return {
        "num_experts": integer(values, "n_routed_experts"),
        "top_k": values["num_experts_per_tok"],
        "intermediate_size": width,
        "layers": sparse,
        "gate": "sigmoid_bias",
        "renormalize": values["norm_topk_prob"],
        "routed_scaling": values["routed_scaling_factor"],
        "num_groups": values["n_group"],
        "top_k_groups": values["topk_group"],
        "shared_intermediate_size": shared * width,
        "shared_gated": not shared,
    }


def _softmax_moe(family: Family, values: dict[str, Any], layers: int) -> dict[str, Any]:
    if family == "mixtral":
        sparse, experts = tuple(range(layers)), integer(values, "num_local_experts")
        width, renormalize = values["intermediate_size"], True
    else:
        plain, step = list_of(values, "mlp_only_layers", int), integer(values, "decoder_sparse_step")
        experts = integer(values, "num_experts", least=0)
        sparse = tuple(i for i in range(layers) if i not in plain and (i + 1) % step == 0) if experts else ()
        width, renormalize = values["moe_intermediate_size"], values["norm_topk_prob"]
    if not sparse:
        return {}
    if family == "qwen2_moe" and values["shared_expert_intermediate_size"] == 0:
        raise UnsupportedModelError("config.json shared_expert_intermediate_size is 0: a Qwen2-MoE has one.")
    return {
        "num_experts": experts,
        "top_k": values["num_experts_per_tok"],
        "intermediate_size": width,
        "layers": sparse,
        "gate": "topk_softmax" if renormalize else "softmax_topk",
        "renormalize": renormalize,
        "shared_intermediate_size": values["shared_expert_intermediate_size"] if family == "qwen2_moe" else 0,
    }


def _rope_from_hf(values: dict[str, Any], hf: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Theta and scaling from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before).

    Which place wins depends on who reads the file, so one that contradicts itself is refused.
    """
    places = {
        "config.json": {k: hf[k] for k in ("rope_theta", "original_max_position_embeddings") if k in hf},
        "rope_scaling": hf.get("rope_scaling") or {},
        "rope_parameters": hf.get("rope_parameters") or {},
    }
    merged: dict[str, Any] = {}
    for place, rope in places.items():
        if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
            raise UnsupportedModelError(f"config.json {place} is {rope!r}: only one flat object is implemented.")
        for name, value in rope.items():
            key = "rope_type" if name == "type" else name  # before transformers 4.43
            if value is not None and merged.setdefault(key, value) != value:
                raise ConfigError(f"config.json gives {key} twice: {merged[key]!r}, and {value!r} in {place}.")
    theta, kind = merged.pop("rope_theta", values["rope_theta"]), merged.pop("rope_type", "default")
    if is_linear_by_one(merged | {"rope_type": kind}):
        kind = "default"
        del merged["factor"]
    if kind not in tuple(_SCALINGS):
        raise UnsupportedModelError(f"config.json rope_type={kind!r}: only {', '.join(_SCALINGS)} are implemented.")
    original = merged.pop("original_max_position_embeddings", values["max_position_embeddings"])
    for key, only in (("partial_rotary_factor", 1), ("truncate", True)):
        if merged.pop(key, only) != only:
            raise UnsupportedModelError(f"config.json {key} of its rotary positions must be {only}, or absent.")
    required, optional = _SCALINGS[kind]
    for key in merged:
        if key not in (*required, *optional):
            raise UnsupportedModelError(f"config.json {key}={merged[key]!r} is not implemented for rope_type={kind!r}.")
    for key in required:
        if key not in merged:
            raise ConfigError(f"config.json has no field '{key}', which rope_type={kind!r} needs.")
    if kind == "default":
        return theta, {}
    numbers = {key: value for key, value in merged.items() if value or key in required}  # 0 means the default
    return theta, {"kind": kind, "original_max_position_embeddings": original, **numbers}


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The Hugging Face `config.json` of a model; rotary settings are written in the old and the new place.

    Raises UnsupportedModelError when no known class holds the architecture.
    """
    family, moe = config.family, config.moe
    rope = _rope_to_hf(config)
    hf: dict[str, Any] = {
        "architectures": [HF_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": moe.intermediate_size if family == "mixtral" else config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if len(rope) > 2 else None,
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
    return hf | (_deepseek_to_hf(config) if family == "deepseek_v3" else _grouped_query_to_hf(config, family))


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return {"rope_theta": config.rope_theta, "rope_type": "default"}
    required, optional = _SCALINGS[scaling.kind]
    numbers = {name: getattr(scaling, name) for name in (*required, *optional)}
    return {
        "rope_theta": config.rope_theta,
        "rope_type": scaling.kind,
        **{name: value for name, value in numbers.items() if value},  # a 0 would not mean the default to everyone
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _grouped_query_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of one family beyond those that all have; DeepSeek-V3's are in `_deepseek_to_hf`."""
    moe = config.moe
    hf: dict[str, Any] = {"head_dim": config.head_dim}
    if family in ("llama", "qwen3", "qwen3_moe"):
        hf |= {"attention_bias": False}
    if family == "llama":
        hf |= {"mlp_bias": False}
    else:
        hf |= {"sliding_window": None}
    if family.startswith("qwen"):
        hf |= {"use_sliding_window": False}
    if family == "mixtral":
        hf |= {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k}
    if family in ("qwen2_moe", "qwen3_moe"):
        hf |= {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(config.num_hidden_layers) if i not in moe.layers],
            "norm_topk_prob": moe.renormalize,
        }
    if family == "qwen2_moe":
        hf |= {"shared_expert_intermediate_size": moe.shared_intermediate_size, "qkv_bias": config.qkv_bias}
    return hf


def _deepseek_to_hf(config: ModelConfig) -> dict[str, Any]:
    """DeepSeek-V3's keys. No `head_dim`: transformers means the width of the rotary part by it."""
    moe, mla = config.moe, config.mla
    hf: dict[str, Any] = {
        "attention_bias": False,
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank or None,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_interleave": mla.rope_interleaved,
        "first_k_dense_replace": config.num_hidden_layers - len(moe.layers),
        "num_nextn_predict_layers": 0,
    }
    if not config.is_moe:
        return hf
    return hf | {
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": moe.routed_scaling,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _eos_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)
