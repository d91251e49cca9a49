"""Closed forms against built models and torch's own FLOP counter, and against published sizes."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from earthshine.model.counts import count_parameters, forward_flops_per_token, train_flops_per_token
from earthshine.model.presets import PRESETS, preset
from earthshine.model.transformer import Transformer

TINY = ["llama3_tiny", "llama3_tiny_e8t2"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_totals_equal_the_built_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = Transformer(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_published_sizes() -> None:
    assert count_parameters(preset("llama3_8b")).total == 8_030_261_248
    e8t2 = count_parameters(preset("llama3_8b_e8t2"))
    assert (e8t2.total, e8t2.active) == (47_491_321_856, 13_668_454_400)
    small = count_parameters(preset("smollm2_135m_e8t2"))
    assert (small.total, small.active) == (692_036_928, 214_279_488)


@pytest.mark.parametrize("name", TINY)
def test_flops_within_one_per_cent_of_the_counter(name: str) -> None:
    """The counter counts whole attention squares where the closed form counts the causal half: added back here."""
    config, seq = preset(name), 64
    model = Transformer(config, experts_backend="loop")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    tokens = torch.randint(0, config.vocab_size, (2, seq))
    # The counter does not know the CPU's fused attention; the unfused one is counted, as whole squares.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        forward = counter.get_total_flops()
        logits.backward(torch.ones_like(logits))
    total = counter.get_total_flops()
    upper = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * (seq - (seq + 1) / 2)
    assert (forward_flops_per_token(config, seq) + upper) * tokens.numel() == pytest.approx(forward, rel=0.01)
    assert (train_flops_per_token(config, seq) + 3 * upper) * tokens.numel() == pytest.approx(total, rel=0.01)
