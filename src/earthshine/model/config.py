"""`ModelConfig`: the architecture. How it is trained is in `model.training_options`. No torch import.

Fields have Hugging Face's names where it has one; `model.hf_config` reads and writes its `config.json`.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.hf_families import Family, families_of, obstacle

Gate = Literal["topk_softmax", "softmax_topk", "sigmoid_bias"]
# Beyond any real model: a config that asks for more is damaged or mistyped, and would be planned for minutes before it
# failed.
MAX_LAYERS = 4096
MAX_EXPERT_NETWORKS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond `original_max_position_embeddings`.

    "llama3" is Llama 3.1's rule, by wavelength bands: `low_freq_factor`, `high_freq_factor`.

    "yarn" (arXiv:2309.00071) blends by number of rotations, between `beta_slow` and `beta_fast`. With
    s(m) = 0.1 * m * ln(factor) + 1, cos and sin are scaled by `attention_factor`; where that is 0, by
    s(`mscale`) / s(`mscale_all_dim`); and where one of these is 0, by s(1). Multi-head latent attention also scales its
    logits by s(`mscale_all_dim`)^2, unless that is 0.
    """

    kind: Literal["none", "llama3", "yarn"] = "none"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434); `kv_lora_rank=0` means grouped-query attention.

    kv_lora_rank: width of the latent that keys and values are made of, and that the cache keeps.
    q_lora_rank: width of the queries' latent; 0 for one full projection.
    qk_nope_head_dim, qk_rope_head_dim: widths of each head's part without and with rotary positions.
    rope_interleaved: rotary pairs are neighbors (2i, 2i+1), as DeepSeek stores them, not halves (i, i + width/2).
    """

    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleaved: bool = True


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts (MoE) layers; `num_experts=0` means that there are none.

    layers: indices of the decoder layers whose feed-forward network is an MoE.
    gate: "topk_softmax" takes the k largest logits, then their softmax (Mixtral); "softmax_topk" takes a softmax over
        all experts, then its k largest values; "sigmoid_bias" chooses by sigmoid plus a bias and weights by the sigmoid
        alone (DeepSeek-V3, Moonlight).
    renormalize: divide the chosen weights by their sum ("topk_softmax" always does).
    routed_scaling: factor that the weights are then multiplied by (Moonlight: 2.446).
    num_groups, top_k_groups: "sigmoid_bias" first chooses `top_k_groups` of `num_groups` groups of experts
        (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    shared_intermediate_size: width of an always-active expert; 0 for none.
    shared_gated: that expert is behind a sigmoid gate (Qwen2-MoE), or not (DeepSeek-V3).
    """

    num_experts: int = 0
    top_k: int = 2
    intermediate_size: int = 0
    layers: tuple[int, ...] = ()
    gate: Gate = "topk_softmax"
    renormalize: bool = True
    routed_scaling: float = 1.0
    num_groups: int = 1
    top_k_groups: int = 1
    shared_intermediate_size: int = 0
    shared_gated: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are in elements; token ids of -1 mean "none".

    head_dim: width of a head's queries and keys; with latent attention, that of both parts together.
    qkv_bias: the projections to queries, keys and values have a bias (Qwen2). qk_norm: each head's queries and keys
        are RMS-normalized before rotation (Qwen3).
    init_std: standard deviation of the initial weights when training from scratch (`model.transformer.initialize`).
    model_type: the Hugging Face family to write, where several hold the architecture; "" for the usual one.
    Raises ConfigError where the fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    init_std: float = 0.02
    bos_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = -1
    model_type: Literal["", Family] = ""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ConfigError(f"model.num_hidden_layers={self.num_hidden_layers} must be at most {MAX_LAYERS}.")
        if self.intermediate_size < 1 and len(self.moe.layers) < self.num_hidden_layers:
            raise ConfigError(f"model.intermediate_size={self.intermediate_size} must be at least 1 for dense layers.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_key_value_heads={self.num_key_value_heads} must divide "
                f"model.num_attention_heads={self.num_attention_heads}."
            )
        if self.max_position_embeddings < 1:
            raise ConfigError(f"model.max_position_embeddings={self.max_position_embeddings} must be at least 1.")
        self._check_token_ids()
        self._check_numbers()
        self._check_attention()
        self._check_moe()
        self._check_gate()
        families = families_of(self)
        if self.model_type and self.model_type not in families:
            raise ConfigError(
                f"model.model_type={self.model_type!r} does not hold this architecture; "
                f"it is one of: {', '.join(families) or 'none'}."
            )

    def _check_token_ids(self) -> None:
        """transformers cannot build a model whose padding token has no row in the embedding."""
        tokens = {"bos_token_id": (self.bos_token_id,), "pad_token_id": (self.pad_token_id,)}
        for name, ids in (tokens | {"eos_token_ids": self.eos_token_ids}).items():
            for token_id in ids:
                if not -1 <= token_id < self.vocab_size:
                    raise ConfigError(
                        f"model.{name}={token_id} is not in the vocabulary: with model.vocab_size={self.vocab_size} "
                        f"ids are 0 to {self.vocab_size - 1}. Give that token's id, or leave the field out."
                    )

    def _check_numbers(self) -> None:
        scaling = self.rope_scaling
        positive = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        numbers = {"rope_theta": self.rope_theta, "moe.routed_scaling": self.moe.routed_scaling} | {
            f"rope_scaling.{name}": getattr(scaling, name) for name in (*positive, "beta_fast", "beta_slow")
        }
        for name, value in numbers.items():
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"model.{name}={value} must be a positive number.")
        numbers = {"rms_norm_eps": self.rms_norm_eps, "init_std": self.init_std}
        scales = ("mscale", "mscale_all_dim", "attention_factor")
        numbers |= {f"rope_scaling.{name}": getattr(scaling, name) for name in scales}
        for name, value in numbers.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"model.{name}={value} must be a number that is not negative.")

    def _check_attention(self) -> None:
        mla = self.mla
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            name = "mla.qk_rope_head_dim" if mla.kv_lora_rank else "head_dim"
            raise ConfigError(
                f"model.{name}={self.rotary_dim} must be even and positive: rotary embedding turns pairs of elements."
            )
        if not mla.kv_lora_rank:
            if mla != MLAConfig():
                raise ConfigError("model.mla has fields set, but model.mla.kv_lora_rank=0 turns it off.")
            return
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            if getattr(mla, name) < 1:
                raise ConfigError(f"model.mla.{name}={getattr(mla, name)} must be at least 1.")
        if mla.q_lora_rank < 0:
            raise ConfigError(
                f"model.mla.q_lora_rank={mla.q_lora_rank} must not be negative; 0 is one full projection."
            )
        if self.head_dim != mla.qk_nope_head_dim + mla.qk_rope_head_dim:
            raise ConfigError(
                f"model.head_dim={self.head_dim} must be model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim = "
                f"{mla.qk_nope_head_dim + mla.qk_rope_head_dim}."
            )
        if self.num_key_value_heads != self.num_attention_heads or self.qkv_bias or self.qk_norm:
            raise ConfigError(
                "model.mla has a key and a value for every head, no bias and no qk_norm: set model.num_key_value_heads "
                "to model.num_attention_heads, and model.qkv_bias and model.qk_norm to false."
            )

    def _check_moe(self) -> None:
        moe = self.moe
        if moe.num_experts == 0:
            if moe.layers:
                raise ConfigError(f"model.moe.layers={list(moe.layers)} need model.moe.num_experts > 0.")
            return
        if moe.num_experts < 1:
            raise ConfigError(f"model.moe.num_experts={moe.num_experts} must be positive, or 0 for a dense model.")
        if moe.intermediate_size < 1:
            raise ConfigError(f"model.moe.intermediate_size={moe.intermediate_size} must be the width of an expert.")
        if moe.shared_intermediate_size < 0:
            raise ConfigError(
                f"model.moe.shared_intermediate_size={moe.shared_intermediate_size} must not be negative."
            )
        if not 1 <= moe.top_k <= moe.num_experts:
            raise ConfigError(
                f"model.moe.top_k={moe.top_k} must be between 1 and model.moe.num_experts={moe.num_experts}: "
                f"a token cannot choose more experts than there are."
            )
        if not moe.layers or list(moe.layers) != sorted(set(moe.layers)):
            raise ConfigError(f"model.moe.layers={list(moe.layers)} must be a sorted list of distinct layers.")
        if moe.num_experts * len(moe.layers) > MAX_EXPERT_NETWORKS:
            raise ConfigError(
                f"model.moe.num_experts={moe.num_experts} in {len(moe.layers)} layers are "
                f"{moe.num_experts * len(moe.layers):,} expert networks: at most {MAX_EXPERT_NETWORKS:,} are possible, "
                f"each of them three tensors of a checkpoint. Lower the number of experts."
            )
        outside = [layer for layer in moe.layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ConfigError(
                f"model.moe.layers: {outside} do not exist; the model has layers 0 to {self.num_hidden_layers - 1}."
            )

    def _check_gate(self) -> None:
        moe = self.moe
        if moe.gate == "topk_softmax" and not moe.renormalize:
            raise ConfigError("model.moe.renormalize=false is for other gates: the softmax of topk_softmax sums to 1.")
        if (moe.num_groups, moe.top_k_groups) == (1, 1):
            return
        if moe.gate != "sigmoid_bias":
            raise ConfigError(f"model.moe.num_groups={moe.num_groups} is for gate='sigmoid_bias', not {moe.gate!r}.")
        if moe.num_groups < 1 or moe.num_experts % moe.num_groups or moe.num_experts < 2 * moe.num_groups:
            raise ConfigError(
                f"model.moe.num_groups={moe.num_groups} must divide model.moe.num_experts={moe.num_experts} into "
                f"groups of at least 2: a group is judged by its two best experts."
            )
        if not 1 <= moe.top_k_groups <= moe.num_groups:
            raise ConfigError(
                f"model.moe.top_k_groups={moe.top_k_groups} must be between 1 and "
                f"model.moe.num_groups={moe.num_groups}."
            )
        if moe.top_k > moe.top_k_groups * (moe.num_experts // moe.num_groups):
            raise ConfigError(
                f"model.moe.top_k={moe.top_k} experts do not fit in model.moe.top_k_groups={moe.top_k_groups} groups "
                f"of {moe.num_experts // moe.num_groups}."
            )

    @property
    def is_moe(self) -> bool:
        return self.moe.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that carries rotary positions."""
        return self.mla.qk_rope_head_dim if self.mla.kv_lora_rank else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.mla.v_head_dim if self.mla.kv_lora_rank else self.head_dim

    @property
    def family(self) -> Family:
        """The Hugging Face family that holds this architecture. Raises UnsupportedModelError when none does."""
        families = families_of(self)
        if not families:
            raise UnsupportedModelError(f"no Hugging Face class holds this architecture: {obstacle(self)}")
        return self.model_type or families[0]

    def dense(self) -> "ModelConfig":
        """This model with plain feed-forward networks everywhere."""
        return replace(self, moe=MoEConfig(), model_type="")
