"""Which settings of a Hugging Face `config.json` are refused, and which change nothing. No torch import."""

import re
from typing import Any

from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import MAX_LAYERS
from earthshine.model.hf_families import FAMILIES, Family

# Keys that change the computation and are implemented at these values only, transformers' defaults among them.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
# Of these, the keys that only these families' classes read. In any other family the key changes nothing: the class
# decides whether there is a bias, and `checkpoint.accounting` refuses a tensor that the class does not have.
READ_BY: dict[str, tuple[Family, ...]] = {
    "attention_bias": ("llama", "qwen3", "qwen3_moe", "deepseek_v3"),
    "mlp_bias": ("llama",),
    "scoring_func": ("deepseek_v3",),
    "topk_method": ("deepseek_v3",),
    "moe_layer_freq": ("deepseek_v3",),
}
TENSOR_SLICES = "pretraining_tp"  # once a way to compute the same matmul in slices; no class reads it any more


def settings_without_effect(hf: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What an accepted `config.json` sets to an unusual value without effect, a sentence each.

    values: the config with the defaults filled in.
    """
    family, lines = hf["model_type"], []
    if hf.get(TENSOR_SLICES) not in (None, 1):
        lines.append(f"{TENSOR_SLICES}={hf[TENSOR_SLICES]!r} changes nothing: the same function, computed in slices.")
    for key in READ_BY:
        if not _is_read(family, key) and key in hf and hf[key] not in REQUIRED[key]:
            lines.append(f"{key}={hf[key]!r} changes nothing: a {family} does not read it.")
    window = values["sliding_window"]
    if hf.get("use_sliding_window") and window is not None and not _layers_with_window(family, values):
        lines.append(f"sliding_window={window!r} changes nothing: it applies to no layer.")
    if is_linear_by_one(hf.get("rope_scaling") or hf.get("rope_parameters")):
        lines.append("rope_scaling by a factor of 1 changes nothing.")
    return lines


def _is_read(family: Family, key: str) -> bool:
    return family in READ_BY.get(key, FAMILIES)


def refuse(family: Family, hf: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for a setting that changes the computation and is not implemented."""
    for key, allowed in REQUIRED.items():
        if (family, key) == ("qwen2_moe", "qkv_bias"):  # a field of ours
            continue
        if key in hf and hf[key] not in allowed and _is_read(family, key):
            raise UnsupportedModelError(
                f"config.json {key} is {hf[key]!r}: only {' or '.join(map(repr, allowed))} is implemented for {family}."
            )


def _layers_with_window(family: Family, values: dict[str, Any]) -> list[int]:
    """The layers that `sliding_window` applies to, if there is one; as transformers decides."""
    layers = range(integer(values, "num_hidden_layers", most=MAX_LAYERS))
    if family.startswith("qwen") and not values["use_sliding_window"]:
        return []
    if family not in ("qwen2", "qwen3", "qwen2_moe"):
        return list(layers)
    kinds = values.get("layer_types")
    if isinstance(kinds, list | tuple) and len(kinds) == len(layers):
        return [i for i in layers if kinds[i] != "full_attention"]
    first = values.get("max_window_layers")
    first = 28 if type(first) is not int else first
    if family == "qwen2_moe":
        return [i for i in layers if i % 2 == 0 and i < first]
    return [i for i in layers if i >= first]


def refuse_window(family: Family, hf: dict[str, Any], values: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for a sliding window shorter than the longest sequence, in any layer.

    A window at least as long hides nothing, and a Qwen's may apply to no layer.
    """
    window = values["sliding_window"] if _layers_with_window(family, values) else None
    longest = integer(values, "max_position_embeddings")
    if window is not None and (type(window) is not int or window < longest):
        origin = "" if "sliding_window" in hf else ", the default where a config does not give it"
        raise UnsupportedModelError(
            f"config.json sliding_window is {window}{origin}: windows shorter than max_position_embeddings="
            f"{longest} are not implemented. Where no sequence will be longer than the window, lower "
            f"max_position_embeddings to it."
        )
    kinds = set(list_of(hf, "layer_types", str)) - {"full_attention"}
    if kinds - {"sliding_attention"} or (kinds and window is None):
        raise UnsupportedModelError(
            f"config.json layer_types is {hf['layer_types']}: only full attention is implemented."
        )


def in_hf_names(family: Family, experts: str, message: str) -> str:
    """A message about fields of `ModelConfig`, with the names that they have in a family's `config.json`.

    experts: the family's name for the number of experts.
    """
    names = {
        "moe.num_experts": experts,
        "moe.top_k": "num_experts_per_tok",
        "moe.intermediate_size": "intermediate_size" if family == "mixtral" else "moe_intermediate_size",
        "moe.shared_intermediate_size": "shared_expert_intermediate_size",
        "moe.routed_scaling": "routed_scaling_factor",
        "moe.renormalize": "norm_topk_prob",
        "moe.num_groups": "n_group",
        "moe.top_k_groups": "topk_group",
        "eos_token_ids": "eos_token_id",
        "init_std": "initializer_range",
    }

    def hf_name(match: re.Match[str]) -> str:
        field = match[2]
        return "config.json " * (not match.start()) + names.get(field, field.removeprefix("mla."))

    return re.sub(r"\b(model|config\.json)\.((?:moe\.|mla\.|rope_scaling\.)?[a-z_]+)", hf_name, message)


def integer(values: dict[str, Any], key: str, least: int = 1, most: int = 2**63) -> int:
    """`values[key]`, which other fields are computed from. Raises ConfigError unless it is from `least` to `most`."""
    value = values[key]
    if type(value) is not int or not least <= value <= most:
        to = f" and at most {most}" if most < 2**63 else ""
        raise ConfigError(f"config.json {key}={value!r} must be an integer of at least {least}{to}.")
    return value


def list_of(values: dict[str, Any], key: str, kind: type) -> list[Any]:
    """`values[key]`, or [] where it is absent or null. Raises ConfigError unless it is a list of `kind`."""
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
        raise ConfigError(f"config.json {key}={value!r} must be a list of {kind.__name__}.")
    return list(value)


def is_linear_by_one(scaling: Any) -> bool:
    """Whether a rotary scaling is linear by a factor of 1: positions divided by 1."""
    if not isinstance(scaling, dict):
        return False
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling.get("factor")
    return kind == "linear" and type(factor) in (int, float) and factor == 1
