"""Grouped-query attention with rotary positions, and the cache of keys and values for generation.

Shapes: B batch, S positions, D model width, H query heads, G key-value heads, C head width.
"""

import math

import torch
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.layers import Linear
from earthshine.model.protocols import KeyValueGather, LocalKeyValueGather
from earthshine.ops.attention import causal_attention, rotate


class KeyValueCache:
    """Keys and values of all layers for up to `max_positions` positions; `length` of them are filled."""

    def __init__(
        self, config: ModelConfig, batch: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_positions, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k_BGSC: Tensor, v_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new positions; returns that layer's keys and values so far. `length` moves with the last.

        Raises ConfigError beyond `max_positions`.
        """
        end, room = self.length + k_BGSC.shape[2], self.keys.shape[3]
        if end > room:  # a single position past the end would be stored nowhere, without an error
            raise ConfigError(f"the cache has room for {room} positions, not for {end}: make a larger one.")
        self.keys[layer, :, :, self.length : end] = k_BGSC
        self.values[layer, :, :, self.length : end] = v_BGSC
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) in Hugging Face's weight layout."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.key_value_gather: KeyValueGather = LocalKeyValueGather()

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], documents_BS: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        q, k, v = (
            proj(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        k, v = self.key_value_gather.gather(k, v)
        out_BHSC = causal_attention(q, k, v, documents_BS)
        result: Tensor = self.o_proj(out_BHSC.transpose(1, 2).flatten(2))
        return result


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Inverse wavelengths, float32, shape (C/2,), with Llama 3.1's scaling where asked for.

    That scaling divides long wavelengths by `factor`, keeps short ones, and blends between (Llama 3.1's reference
    code, `apply_scaling`).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return frequencies
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, between)
    return torch.where(wavelength < shortest, frequencies, scaled)


def rope_table(config: ModelConfig, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles, float32, (S, C), for positions (S,)."""
    angles = positions_S.float().unsqueeze(-1) * rope_frequencies(config).to(positions_S.device)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()
