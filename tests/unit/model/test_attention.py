"""Attention by itself: cached decoding, what a cache holds, documents, the seam between ranks, and precision."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from earthshine.model.attention import Cache, LatentAttention, make_attention, make_cache, rope_table
from earthshine.model.config import MLAConfig, ModelConfig

P = 12
CONFIGS: dict[str, dict[str, object]] = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "biased": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "qkv_bias": True},
    "normalized": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4, "qk_norm": True},
    "latent": {"head_dim": 10, "mla": MLAConfig(kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)},
    "latent, queries too": {
        "head_dim": 10,
        "mla": MLAConfig(kv_lora_rank=5, q_lora_rank=7, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=3),
    },
}
every_attention = pytest.mark.parametrize("name", CONFIGS)


def config(name: str) -> ModelConfig:
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3} | CONFIGS[name]
    return ModelConfig(vocab_size=8, hidden_size=24, intermediate_size=8, num_hidden_layers=2, **sizes)


def build(name: str) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    """The attention of layer 1 with random weights, inputs (2, P, D), and the rotary table of all positions."""
    attention = make_attention(config(name), 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in attention.named_parameters():
            p.normal_(1.0 if "norm" in parameter_name else 0.0, 0.3, generator=generator)
    return attention, torch.randn(2, P, 24, generator=generator), rope_table(config(name), torch.arange(P))


def decode(attention: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache, ends: list[int]) -> Tensor:
    parts = []
    for end in ends:
        new = slice(cache.length, end)
        parts.append(attention(x[:, new], (rope[0][new], rope[1][new]), None, cache))
        cache.length = end
    return torch.cat(parts, 1)


@every_attention
@pytest.mark.parametrize("ends", [[5, 8, 9, 10, 11, 12], [1, 2, 12], [11, 12]], ids=["chunks", "long", "last"])
@torch.no_grad()
def test_cached_decoding_equals_one_pass(name: str, ends: list[int]) -> None:
    """4e-6: sums of tens of terms; many rows go through one wide product, few through three narrow ones."""
    attention, x, rope = build(name)
    cache = make_cache(config(name), 2, P, torch.float32, "cpu")
    whole = attention(x, rope, None, None)
    torch.testing.assert_close(decode(attention, x, rope, cache, ends), whole, atol=4e-6, rtol=1e-5)


@torch.no_grad()
def test_the_latent_cache_keeps_the_latent_and_the_shared_key_of_each_position_only() -> None:
    attention, x, rope = build("latent")
    cache = make_cache(config("latent"), 2, P, torch.bfloat16, "cpu")
    decode(attention.bfloat16(), x.bfloat16(), rope, cache, [7, 8])
    layers, batch, numbers, bytes_each = 2, 2, 16 + 4, 2
    tensors = [value for value in vars(cache).values() if isinstance(value, Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == layers * batch * P * numbers * bytes_each


@torch.no_grad()
def test_what_is_cached_is_the_normalized_latent_and_the_rotated_key() -> None:
    attention, x, rope = build("latent")
    cache = make_cache(config("latent"), 2, P, torch.float32, "cpu")
    decode(attention, x, rope, cache, [P])
    latent, key = attention.kv_a_proj_with_mqa(x).split((16, 4), -1)
    pairs = torch.view_as_complex(key.unflatten(-1, (2, 2))) * torch.complex(*rope)
    expected = torch.cat((attention.kv_a_norm(latent), torch.view_as_real(pairs).flatten(-2)), -1)
    torch.testing.assert_close(cache.rows[1, :, 0], expected)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 2), (1, 12), (2, 12), (4, 12), (5, 12), (6, 12), (11, 12)])
@torch.no_grad()
def test_latents_are_attended_to_where_that_takes_fewer_multiplications(num_queries: int, num_keys: int) -> None:
    """As counted by torch; 11 queries for 12 positions is nearly a prefill, one query is decoding."""
    attention, x, rope = build("latent")
    assert isinstance(attention, LatentAttention)
    q, rows = torch.randn(2, 3, num_queries, 10), torch.randn(2, num_keys, 20)

    def expanded() -> None:
        k, v = attention._expand(rows[..., :16], rows[..., 16:].unsqueeze(1))
        (q @ k.mT).softmax(-1) @ v

    flops = []
    for path in (lambda: attention._attend_to_latents(q, rows), expanded):
        with FlopCounterMode(display=False) as counter:
            path()
        flops.append(counter.get_total_flops())
    assert attention._absorbing_is_cheaper(num_queries, num_keys) == (flops[0] < flops[1])


@every_attention
@torch.no_grad()
def test_packed_documents_give_the_outputs_of_each_alone(name: str) -> None:
    attention, x, rope = build(name)
    documents = torch.tensor([[0] * 5 + [1] * 7] * 2)
    packed = attention(x, rope, documents, None)
    tables = [(rope[0][:5], rope[1][:5]), (rope[0][:7], rope[1][:7])]  # which positions, does not matter
    alone = torch.cat([attention(x[:, :5], tables[0], None, None), attention(x[:, 5:], tables[1], None, None)], 1)
    torch.testing.assert_close(packed, alone, atol=4e-6, rtol=1e-5)


class EarlierPositions:
    """The seam for ranks that share a sequence: what was gathered first comes before what is gathered now."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def gather(self, k_BGSC: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor]:
        if self.held is None:
            self.held = k_BGSC, v_BGSV
            return self.held
        return torch.cat((self.held[0], k_BGSC), 2), torch.cat((self.held[1], v_BGSV), 2)


@every_attention
@torch.no_grad()
def test_later_positions_with_gathered_keys_give_the_outputs_of_the_whole(name: str) -> None:
    attention, x, rope = build(name)
    whole = attention(x, rope, None, None)
    attention.key_value_gather = EarlierPositions()
    halves = [attention(x[:, at], (rope[0][at], rope[1][at]), None, None) for at in (slice(0, 6), slice(6, P))]
    torch.testing.assert_close(torch.cat(halves, 1), whole, atol=4e-6, rtol=1e-5)


@every_attention
def test_bfloat16_activations_meet_float32_parameters(name: str) -> None:
    """3 %: bf16 rounds by 0.4 %, some ten times on the way; gradients arrive in the parameters' float32."""
    attention, x, rope = build(name)
    want = attention(x, rope, None, None)
    got = attention(x.bfloat16(), rope, None, None)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.03
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attention.parameters())
