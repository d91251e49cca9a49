"""`ModelConfig`: the architecture; `BalanceConfig` and `CapacityConfig`: how its routers are trained. No torch.

Field names are those of Hugging Face where it has one. `model.hf_config` translates from and to its `config.json`.
"""

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from earthshine.errors import ConfigError, UnsupportedModelError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"]
Gate = Literal["topk_softmax", "softmax_topk", "sigmoid_bias"]
HF_CLASSES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
FAMILIES: tuple[Family, ...] = tuple(HF_CLASSES)
# Beyond any model; what asks for more is damage or a slip, and would be planned and named for minutes before it failed.
MAX_LAYERS = 4096
MAX_EXPERT_NETWORKS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond `original_max_position_embeddings`.

    "llama3" is Llama 3.1's rule, by wavelength bands: `low_freq_factor`, `high_freq_factor`. "yarn" (arXiv:2309.00071)
    blends by number of rotations, between `beta_slow` and `beta_fast`; it scales cos and sin by `attention_factor`, or,
    when that is 0, by the ratio of 0.1 * m * ln(factor) + 1 at m = `mscale` and at m = `mscale_all_dim` (by that at
    m = 1 if either is 0); and multi-head latent attention scales its logits by the square of that at
    m = `mscale_all_dim` (0: not at all).
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
    rope_interleaved: rotary pairs are neighbours (2i, 2i+1), as DeepSeek stores them, not halves (i, i + width/2).
    """

    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleaved: bool = True


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers; `num_experts=0` means that there are none.

    layers: indices of the decoder layers whose feed-forward network is a mixture.
    gate: "topk_softmax" takes the k largest logits and then their softmax (Mixtral); "softmax_topk" a softmax over all
        experts and then its k largest values; "sigmoid_bias" chooses by sigmoid plus a bias and weighs by the sigmoid
        (DeepSeek-V3, Moonlight).
    renormalize: divide the chosen weights by their sum ("topk_softmax" always does).
    routed_scaling: the weights are then multiplied by this (Moonlight: 2.446).
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
class BalanceConfig:
    """What keeps experts evenly loaded while training. `ops.routing` has each formula.

    loss: "sequence" is DeepSeek-V3's loss of every sequence by itself, additive over micro-batches and ranks;
        "switch" the Switch Transformer's; "none" for neither. Both are 1 per layer at uniform routing.
    coefficient: of that loss, averaged over the step's sequences and summed over the layers.
    scope: what the Switch loss takes its expert fractions over: each sequence, each micro-batch (the gradient then
        depends on the size of the micro-batches), or the whole step (one more routing pass, without gradient). It must
        be chosen with loss="switch" and is "none" otherwise.
    z_coefficient: of the router z-loss, averaged over the step's tokens and summed over the layers (ST-MoE,
        arXiv:2202.08906).
    bias: how the bias of a "sigmoid_bias" gate moves after each step, by `bias_rate`: "deepseek" by the sign of the
        load's deficit, "moonlight" by that sign less its mean; "none" not at all.
    Raises ConfigError where the fields contradict each other.
    """

    loss: Literal["none", "sequence", "switch"] = "sequence"
    coefficient: float = 1e-3
    scope: Literal["none", "sequence", "micro_batch", "step"] = "none"
    z_coefficient: float = 0.0
    bias: Literal["none", "moonlight", "deepseek"] = "moonlight"
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("coefficient", "z_coefficient", "bias_rate"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"balance.{name}={getattr(self, name)} must be a number that is not negative.")
        if self.loss == "switch" and self.scope == "none":
            raise ConfigError(
                "balance.loss='switch' needs balance.scope: 'sequence', 'micro_batch' or 'step'. The loss is a product "
                "of two averages, so its gradient depends on what they are taken over."
            )
        if self.loss != "switch" and self.scope != "none":
            raise ConfigError(f"balance.scope={self.scope!r} is for balance.loss='switch', not {self.loss!r}.")
        if self.loss == "none" and self.coefficient != BalanceConfig.coefficient:
            raise ConfigError(
                f"balance.coefficient={self.coefficient} has no effect with balance.loss='none': choose one."
            )
        if self.bias == "none" and self.bias_rate != BalanceConfig.bias_rate:
            raise ConfigError(f"balance.bias_rate={self.bias_rate} has no effect with balance.bias='none': choose one.")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many tokens of a micro-batch an expert takes while training; evaluation and exported models drop nothing.

    factor: 0 for no limit. Else, for T tokens, E experts and k experts per token, an expert takes at most
        ceil(T * k / E * factor) ("per_assignment", Megatron's meaning) or ceil(T / E * factor) ("per_token", as printed
        in arXiv:2412.09952).
    exact_factor: numerator and denominator of the decimal fraction that was written, the shortest one that is this
        float.
    drop: which tokens stay: those with the largest gate weight ("probability"), or the first ("position").
    """

    factor: float = 0.0
    meaning: Literal["per_assignment", "per_token"] = "per_assignment"
    drop: Literal["probability", "position"] = "probability"
    # Integers made here, because torch.compile traces their use and could not trace how they are made.
    exact_factor: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.factor >= 0 and math.isfinite(self.factor)):
            raise ConfigError(f"capacity.factor={self.factor} must be 0 (dropless) or a positive number.")
        object.__setattr__(self, "exact_factor", Fraction(str(float(self.factor))).as_integer_ratio())
        unset = (CapacityConfig.meaning, CapacityConfig.drop)
        if self.factor == 0 and (self.meaning, self.drop) != unset:
            raise ConfigError(
                f"capacity.meaning={self.meaning!r} and capacity.drop={self.drop!r} have no effect with "
                f"capacity.factor=0, which drops nothing: set the factor, or leave them out."
            )

    def tokens_per_expert(self, num_tokens: int, num_experts: int, top_k: int) -> int:
        """The capacity C, at most `num_tokens`, which is what an expert can get; 0 when dropless.

        Exact: in floats, 200 * 1.1 / 4 is a little more than 55, and would be rounded up to 56.
        """
        if self.factor == 0:
            return 0
        rows = num_tokens * (top_k if self.meaning == "per_assignment" else 1)
        numerator, denominator = self.exact_factor
        return min(num_tokens, max(1, -(-rows * numerator // (denominator * num_experts))))

    def can_drop(self, num_experts: int, top_k: int) -> bool:
        """Whether any routing could exceed the capacity (but for rounding up)."""
        numerator, denominator = self.exact_factor
        return 0 < numerator * (top_k if self.meaning == "per_assignment" else 1) < denominator * num_experts


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a model is told of its training; nothing of it changes what it computes in evaluation.

    recompute: keep only each block's input, and compute the block again in the backward pass.
    """

    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are in elements; token ids of -1 mean "none".

    head_dim: width of a head's queries and keys; with latent attention, that of both parts together.
    qkv_bias: the projections to queries, keys and values have a bias (Qwen2). qk_norm: each head's queries and keys
        are RMS-normalised before rotation (Qwen3).
    init_std: standard deviation of normally drawn weights when training from scratch (`model.transformer`).
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
        if self.model_type and self.model_type not in self._families():
            raise ConfigError(
                f"model.model_type={self.model_type!r} does not hold this architecture; "
                f"it is one of: {', '.join(self._families()) or 'none'}."
            )

    def _check_token_ids(self) -> None:
        """transformers cannot build a model whose padding token has no row in the embedding."""
        tokens = {"bos_token_id": (self.bos_token_id,), "pad_token_id": (self.pad_token_id,)}
        for name, ids in (tokens | {"eos_token_ids": self.eos_token_ids}).items():
            for one in ids:
                if not -1 <= one < self.vocab_size:
                    raise ConfigError(
                        f"model.{name}={one} is not in the vocabulary: with model.vocab_size={self.vocab_size} ids are "
                        f"0 to {self.vocab_size - 1}. Give the id of the token that is meant, or leave the field out."
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
            raise ConfigError(f"model.{name}={self.rotary_dim} must be even and positive: rotary embedding pairs it.")
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
                "model.mla has a key and a value for every head: set model.num_key_value_heads to "
                "model.num_attention_heads; and model.qkv_bias and model.qk_norm to false, which it does not have."
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
        found = self._families()
        if not found:
            raise UnsupportedModelError(f"no Hugging Face class holds this architecture: {self._obstacle()}")
        return self.model_type or found[0]

    def _families(self) -> tuple[Family, ...]:
        """All families that hold this architecture, the usual one first."""
        moe = self.moe
        if self.mla.kv_lora_rank:
            first_dense = self.num_hidden_layers - len(moe.layers)
            as_deepseek = (
                moe.layers == tuple(range(first_dense, self.num_hidden_layers))
                and (not self.is_moe or moe.gate == "sigmoid_bias")
                and (not moe.shared_intermediate_size or not moe.shared_gated)
                and moe.shared_intermediate_size % max(moe.intermediate_size, 1) == 0
            )
            return ("deepseek_v3",) if as_deepseek else ()
        if not self.is_moe:
            if self.qkv_bias:
                return () if self.qk_norm else ("qwen2",)
            if self.qk_norm:
                return ("qwen3",)
            whole_heads = self.hidden_size % self.num_attention_heads == 0  # transformers' LlamaConfig demands it
            return ("llama", "mistral") if whole_heads else ("mistral",)
        if (
            moe.gate == "sigmoid_bias"
            or moe.routed_scaling != 1
            or (moe.shared_intermediate_size and not moe.shared_gated)
        ):
            return ()
        if self.qk_norm:
            return () if self.qkv_bias or moe.shared_intermediate_size else ("qwen3_moe",)
        if moe.shared_intermediate_size:
            return ("qwen2_moe",)
        everywhere = len(moe.layers) == self.num_hidden_layers
        return ("mixtral",) if everywhere and moe.renormalize and not self.qkv_bias else ()

    def _obstacle(self) -> str:
        """What keeps this architecture out of every family, and what to change."""
        moe = self.moe
        if self.mla.kv_lora_rank:
            return (
                "latent attention (model.mla) goes with gate='sigmoid_bias', dense layers before all mixtures, and a "
                "shared expert without a gate whose width is a multiple of model.moe.intermediate_size (DeepSeek-V3)."
            )
        if self.qk_norm and self.qkv_bias:
            return "model.qk_norm (Qwen3) and model.qkv_bias (Qwen2) exclude each other."
        if moe.gate == "sigmoid_bias":
            return "model.moe.gate='sigmoid_bias' needs latent attention (model.mla), or take another gate."
        if moe.routed_scaling != 1:
            return f"model.moe.routed_scaling={moe.routed_scaling} needs latent attention (model.mla), or set it to 1."
        if moe.shared_intermediate_size and not moe.shared_gated:
            return "model.moe.shared_gated=false needs latent attention (model.mla), or set it to true."
        if self.qk_norm:
            return "with model.qk_norm (Qwen3-MoE) there is no shared expert: set model.moe.shared_intermediate_size=0."
        return (
            "experts in some layers, with qkv_bias or without renormalize need a shared expert (Qwen2-MoE): set "
            "model.moe.shared_intermediate_size (zeros in it change nothing)."
        )

    def dense(self) -> "ModelConfig":
        """This model with plain feed-forward networks everywhere."""
        return replace(self, moe=MoEConfig(), model_type="")
