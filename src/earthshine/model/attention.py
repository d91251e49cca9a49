"""Attention with rotary positions, grouped-query and latent, in Hugging Face's weight layout; and the cache of both.

Shapes: B batch, S new positions, P all positions so far, D model width, H query heads, G key-value heads, C width of a
head's queries and keys, V of its values, R rotated pairs. Of latent attention: L width of the latent of keys and
values, N width of a head's part without rotation (C = N + 2R).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthshine.device import to_device
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.layers import Linear, RMSNorm, at_least_float32, to_compute
from earthshine.model.protocols import KeyValueGather, LocalKeyValueGather
from earthshine.ops.attention import Mask, causal_attention
from earthshine.ops.rotary import rotate

# DeepSeek's code, and so transformers', leaves the latents' norms at this default, whatever `rms_norm_eps` is.
_LATENT_NORM_EPS = 1e-6


class Cache:
    """What attention keeps of up to `max_positions` positions, in all layers; `length` of them are filled.

    One row of numbers per layer, sequence, head and position: see `make_cache`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # (layers, B, G, max_positions, width)
        self.length = 0

    def append(self, layer: int, *parts_BGS: Tensor) -> Tensor:
        """Store a layer's new positions, the parts side by side; returns that layer's rows so far, (B, G, P, width).

        `length` is moved by the model, after its last layer. Raises ConfigError beyond `max_positions`.
        """
        end, room = self.length + parts_BGS[0].shape[2], self.rows.shape[3]
        if end > room:  # a single position past the end would be stored nowhere, without an error
            raise ConfigError(f"the cache has room for {room} positions, not for {end}: make a larger one.")
        column = 0
        for part in parts_BGS:
            width = part.shape[-1]
            self.rows[layer, :, :, self.length : end, column : column + width] = part
            column += width
        return self.rows[layer, :, :, :end]


def make_cache(
    config: ModelConfig, batch: int, max_positions: int, dtype: torch.dtype, device: torch.device | str
) -> Cache:
    """An empty cache. A position is a key and a value for each key-value head, or, with latent attention, the
    normalized latent and the rotated key that all heads share: `kv_lora_rank + qk_rope_head_dim` numbers.
    """
    mla = config.mla
    heads, width = config.num_key_value_heads, 2 * config.head_dim
    if mla.kv_lora_rank:
        heads, width = 1, mla.kv_lora_rank + mla.qk_rope_head_dim
    shape = (config.num_hidden_layers, batch, heads, max_positions, width)
    return Cache(torch.empty(shape, dtype=dtype, device=device))


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245); with biases in Qwen2, normalized queries and keys in Qwen3."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_width, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_width, config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.key_value_gather: KeyValueGather = LocalKeyValueGather()
        self.max_logits_H: Tensor | None = None  # raised by training forwards: `optim.qk_clip`

    def query_key_heads(self) -> dict[str, Any]:
        """How the rows of the projections divide into heads, for code that treats each head by itself (QK-Clip).

        kind: "gqa" (query head h uses key head h // (heads / key_heads)) or "mla" (each head has its own key, beside
            one that all share).
        heads, key_heads: how many.
        rows: local parameter name -> (n, sizes): n equal blocks of rows, each of them rows of these sizes that belong
            to one head. For "mla" the sizes are (without, with rotation) of queries and (keys, values) of `kv_b_proj`.
        query, key: names in `rows` that a logit is linear in, through one head's query and key; of "mla"'s key, the
            first of its sizes.
        normalized: queries and keys are normalized per head after the projection, so its scale does not reach them.
        """
        heads, key_heads = (proj.out_features // self.head_dim for proj in (self.q_proj, self.k_proj))
        counts = {"q_proj": heads, "k_proj": key_heads, "v_proj": key_heads}
        kinds = ("weight",) if self.q_proj.bias is None else ("weight", "bias")
        return {
            "kind": "gqa",
            "heads": heads,
            "key_heads": key_heads,
            "rows": {f"{name}.{kind}": (n, (self.head_dim,)) for name, n in counts.items() for kind in kinds},
            "query": tuple(f"q_proj.{kind}" for kind in kinds),
            "key": tuple(f"k_proj.{kind}" for kind in kinds),
            "normalized": self.q_norm is not None or self.k_norm is not None,
        }

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], documents_BS: Tensor | Mask | None, cache: Cache | None
    ) -> Tensor:
        """documents_BS: as in `ops.attention.causal_attention`."""
        q_BSHC, k_BSGC, v_BSGC = (part.unflatten(-1, (-1, self.head_dim)) for part in self._project(x_BSD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        q_BHSC, k_BGSC = rotate(q_BSHC, *rope), rotate(k_BSGC, *rope)
        v_BGSC = v_BSGC.transpose(1, 2)
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(self.layer, k_BGSC, v_BGSC).chunk(2, -1)
        k_BGSC, v_BGSC = self.key_value_gather.gather(k_BGSC, v_BGSC)
        largest_H = _logit_maxima(self, q_BHSC.shape[1])
        out_BHSC = causal_attention(q_BHSC, k_BGSC, v_BGSC, documents_BS, max_logits_H=largest_H)
        result: Tensor = self.o_proj(out_BHSC.transpose(1, 2).flatten(2))
        return result

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, S, width) each.

        One matmul where there are many rows: it runs faster than three narrow ones, forward and backward, by more than
        the copy costs that puts the weights together. Three where there are few, or where some of the weights are
        frozen: one matmul has one gradient.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        all_or_none_trained = len({proj.weight.requires_grad for proj in projections}) == 1
        if not all_or_none_trained or x_BSD.shape[0] * x_BSD.shape[1] < x_BSD.shape[2]:
            return tuple(proj(x_BSD) for proj in projections)
        weight = torch.cat([to_compute(proj.weight, x_BSD) for proj in projections])
        bias = None
        if self.q_proj.bias is not None:
            bias = torch.cat([to_compute(proj.bias, x_BSD) for proj in projections])
        return F.linear(x_BSD, weight, bias).split([proj.out_features for proj in projections], -1)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), as DeepSeek-V3 and Moonlight have it.

    Keys and values of all heads are linear in one normalized latent per position; beside it, all heads share one key
    with rotary positions. Weights are as DeepSeek stores them: rows of `q_proj` (or `q_b_proj`) are, head by head, N
    without and 2R with rotation; those of `kv_a_proj_with_mqa` the latent and the shared key; those of `kv_b_proj`,
    head by head, keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mla, heads = config.mla, config.num_attention_heads
        self.layer = layer
        self.head_dim = config.head_dim
        self.latent_widths = (mla.kv_lora_rank, mla.qk_rope_head_dim)
        self.key_value_widths = (mla.qk_nope_head_dim, mla.v_head_dim)
        self.interleaved = mla.rope_interleaved
        self.scale = _latent_scale(config)
        self.q_proj: Linear | None = None
        self.q_a_proj: Linear | None = None
        self.q_a_norm: RMSNorm | None = None
        self.q_b_proj: Linear | None = None
        if mla.q_lora_rank:
            self.q_a_proj = Linear(config.hidden_size, mla.q_lora_rank)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, heads * config.head_dim)
        else:
            self.q_proj = Linear(config.hidden_size, heads * config.head_dim)
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, sum(self.latent_widths))
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = Linear(mla.kv_lora_rank, heads * sum(self.key_value_widths))
        self.o_proj = Linear(heads * mla.v_head_dim, config.hidden_size)
        self.key_value_gather: KeyValueGather = LocalKeyValueGather()
        self.max_logits_H: Tensor | None = None  # raised by training forwards: `optim.qk_clip`

    def query_key_heads(self) -> dict[str, Any]:
        """As `Attention.query_key_heads`, of kind "mla"."""
        last = "q_proj" if self.q_proj is not None else "q_b_proj"
        heads = self.kv_b_proj.out_features // sum(self.key_value_widths)
        query_rows = (self.key_value_widths[0], self.latent_widths[1])
        return {
            "kind": "mla",
            "heads": heads,
            "key_heads": heads,
            "rows": {f"{last}.weight": (heads, query_rows), "kv_b_proj.weight": (heads, self.key_value_widths)},
            "query": (f"{last}.weight",),
            "key": ("kv_b_proj.weight",),
            "normalized": False,  # the norm between kv_a and kv_b comes before the rows of kv_b_proj
        }

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], documents_BS: Tensor | Mask | None, cache: Cache | None
    ) -> Tensor:
        """documents_BS: as in `ops.attention.causal_attention`."""
        q_BSHC = self._queries(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BHSC = rotate(q_BSHC, *rope, interleaved=self.interleaved)
        # A single split of the projection's output: autograd then writes one gradient, where two slices would each make
        # a full tensor of zeros and add them.
        latent_BSL, shared_key_BS = self.kv_a_proj_with_mqa(x_BSD).split(self.latent_widths, -1)
        latent_B1SL = self.kv_a_norm(latent_BSL).unsqueeze(1)
        shared_key_B1S = rotate(shared_key_BS.unsqueeze(2), *rope, interleaved=self.interleaved)
        if cache is not None:
            rows_B1P = cache.append(self.layer, latent_B1SL, shared_key_B1S)
            if self._absorbing_is_cheaper(q_BHSC.shape[2], rows_B1P.shape[2]):
                return self._output(self._attend_to_latents(q_BHSC, rows_B1P.squeeze(1)))
            latent_B1SL, shared_key_B1S = rows_B1P.split(self.latent_widths, -1)
        # The latent and the shared key are what ranks exchange, as they are what a cache keeps.
        shared_key_B1S, latent_B1SL = self.key_value_gather.gather(shared_key_B1S, latent_B1SL)
        k_BHPC, v_BHPV = self._expand(latent_B1SL.squeeze(1), shared_key_B1S)
        largest_H = _logit_maxima(self, q_BHSC.shape[1])
        out_BHSV = causal_attention(q_BHSC, k_BHPC, v_BHPV, documents_BS, scale=self.scale, max_logits_H=largest_H)
        return self._output(out_BHSV)

    def _queries(self, x_BSD: Tensor) -> Tensor:
        """The queries of all heads, side by side, not yet rotated."""
        last, x = self.q_proj, x_BSD
        if self.q_a_proj is not None and self.q_a_norm is not None:
            last, x = self.q_b_proj, self.q_a_norm(self.q_a_proj(x_BSD))
        assert last is not None
        result: Tensor = last(x)
        return result

    def _expand(self, latent_BPL: Tensor, shared_key_B1P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head.

        The concatenation is the only place where the shared key is repeated for each head: kernels want a head's key in
        one row, and one matmul over C costs less than adding the scores of two, over N and 2R. It also brings the keys
        into the order (B, H, P, C); values stay a view of the projection's output.
        """
        kv_BHP = self.kv_b_proj(latent_BPL).unflatten(-1, (-1, sum(self.key_value_widths))).transpose(1, 2)
        k_BHPN, v_BHPV = kv_BHP.split(self.key_value_widths, -1)
        return torch.cat((k_BHPN, shared_key_B1P.expand(-1, k_BHPN.shape[1], -1, -1)), -1), v_BHPV

    def _absorbing_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Whether `_attend_to_latents` takes fewer multiplications per head than expanding all P latents first.

        With S queries: S (N+V) L + S P (2L+2R)  <  P (N+V) L + S P (C+V). At Moonlight's widths, for S below about 170.
        """
        rank, expanded = self.latent_widths[0], sum(self.key_value_widths)
        return num_queries * (expanded * rank + num_keys * (2 * rank - expanded)) < num_keys * expanded * rank

    def _attend_to_latents(self, q_BHSC: Tensor, rows_BP: Tensor) -> Tensor:
        """Attention for decoding: the cache's rows are the keys, their latents the values, of all heads; (B, H, S, V).

        A head's part of `kv_b_proj` moves to the query's and to the output's side, (W k) q = k (W^T q), so that nothing
        is computed for each cached position and head but its score (arXiv:2405.04434, section 2.1.2). Queries of all
        heads are rows of one matmul; `causal_attention` would not do that with its mask, and would repeat the rows.
        """
        (_, heads, num_queries, _), num_keys = q_BHSC.shape, rows_BP.shape[1]
        weight_HEL = to_compute(self.kv_b_proj.weight, q_BHSC).unflatten(0, (heads, -1))
        to_key_HNL, to_value_HVL = weight_HEL.split(self.key_value_widths, 1)
        q_BHSN, q_rotated = q_BHSC.split((self.key_value_widths[0], self.latent_widths[1]), -1)
        q_BHS = torch.cat((q_BHSN @ to_key_HNL, q_rotated), -1)
        scores_BHSP = (q_BHS.flatten(1, 2) @ rows_BP.mT).unflatten(1, (heads, num_queries))
        scores_BHSP = at_least_float32(scores_BHSP) * self.scale
        if num_queries > 1:
            position_P = torch.arange(num_keys, device=q_BHSC.device)
            scores_BHSP.masked_fill_(position_P > position_P[-num_queries:].unsqueeze(1), -math.inf)
        weights_BHSP = scores_BHSP.softmax(-1).to(q_BHSC.dtype)
        latent_BPL = rows_BP[..., : self.latent_widths[0]]
        out_BHSL = (weights_BHSP.flatten(1, 2) @ latent_BPL).unflatten(1, (heads, num_queries))
        return out_BHSL @ to_value_HVL.mT

    def _output(self, out_BHSV: Tensor) -> Tensor:
        result: Tensor = self.o_proj(out_BHSV.transpose(1, 2).flatten(2))
        return result


def _logit_maxima(attention: Attention | LatentAttention, num_heads: int) -> Tensor | None:
    """The maxima that this forward raises, one per head; None where it records none: in evaluation, and in a routing
    pass, which has no gradients and sees the same tokens a second time."""
    if attention.max_logits_H is None or not (attention.training and torch.is_grad_enabled()):
        return None
    return attention.max_logits_H[:num_heads]


def attention_widths(config: ModelConfig) -> tuple[int, int]:
    """C and V: the widths of a head's queries and keys, and of its values."""
    return config.head_dim, config.mla.v_head_dim if config.mla.kv_lora_rank else config.head_dim


def make_attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    """The attention of decoder layer `layer`."""
    return LatentAttention(config, layer) if config.mla.kv_lora_rank else Attention(config, layer)


def _latent_scale(config: ModelConfig) -> float:
    """1/sqrt(C), with yarn times s(`mscale_all_dim`)^2 where that is not 0 (DeepSeek-V3); s as in `RopeScaling`."""
    scaling = config.rope_scaling
    stretch = 1.0
    if scaling.kind == "yarn" and scaling.mscale_all_dim:
        stretch = _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return stretch * stretch / math.sqrt(config.head_dim)


def rope_table(config: ModelConfig, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair's angles, float32, (S, R) each, for positions (S,); with yarn also scaled."""
    angles_SR = positions_S.float().unsqueeze(-1) * to_device(rope_frequencies(config), positions_S.device)
    scale = _rope_scale(config)
    return angles_SR.cos() * scale, angles_SR.sin() * scale


class RopeTables:
    """`rope_table` of all positions from 0, cached between forward passes; grows on demand, on one device."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: tuple[Tensor, Tensor] | None = None

    def rows(self, start: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The tables of positions start to end, on the device of `like`, and fake if that is."""
        tables = self._tables
        if (
            tables is None
            or len(tables[0]) < end
            or tables[0].device != like.device
            or type(tables[0]) is not type(like)
        ):
            # They grow by doubling, so that decoding token by token does not make them anew each time. Outside of
            # inference mode: its tensors could not be saved for the backward pass of a later forward.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(1 << (end - 1).bit_length(), device=like.device)
                tables = self._tables = rope_table(self._config, positions)
        return tables[0][start:end], tables[1][start:end]


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair, float32, shape (R,), stretched as `rope_scaling` says."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device="cpu").float() / config.rotary_dim
    wavelengths = config.rope_theta**exponents
    kind = config.rope_scaling.kind
    if kind == "yarn":
        return _yarn_frequencies(config, wavelengths)
    frequencies = 1.0 / wavelengths
    return _llama3_frequencies(config, frequencies) if kind == "llama3" else frequencies


def _llama3_frequencies(config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a blend between (Llama 3.1's code, `apply_scaling`)."""
    scaling = config.rope_scaling
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, between)
    return torch.where(wavelength < shortest, frequencies, scaled)


def _yarn_frequencies(config: ModelConfig, wavelengths: Tensor) -> Tensor:
    """Pairs with more than `beta_fast` rotations within the original length are kept, those with fewer than `beta_slow`
    are divided by `factor`, with a ramp between (arXiv:2309.00071, section 3.2; pair indices rounded as in its code).
    """
    scaling = config.rope_scaling

    def pair_that_rotates(times: float) -> float:
        ratio = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return config.rotary_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_rotates(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_rotates(scaling.beta_slow)), config.rotary_dim - 1)
    width = high - low or 0.001  # a step, not 0/0
    ramp = ((torch.arange(len(wavelengths), dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    unscaled = 1 - ramp
    return 1.0 / (scaling.factor * wavelengths) * (1 - unscaled) + 1.0 / wavelengths * unscaled


def _rope_scale(config: ModelConfig) -> float:
    """What cos and sin are multiplied by; see `RopeScaling`."""
    scaling = config.rope_scaling
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_mscale(scaling.factor, scaling.mscale) / _yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_mscale(scaling.factor, 1.0)


def _yarn_mscale(factor: float, multiple: float) -> float:
    """s(m) of `RopeScaling` at m = `multiple`: how much sharper attention is for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * multiple * math.log(factor) + 1.0
