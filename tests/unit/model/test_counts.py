"""Counts against built models, torch's FLOP counter and published sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig
from earthshine.model.counts import (
    attention_flops_per_token,
    backward_flops_per_token,
    count_parameters,
    forward_flops_per_token,
    recomputed_flops_per_token,
    train_flops_per_token,
)
from earthshine.model.parameters import parameter_shapes
from earthshine.model.presets import PRESETS, llama3_8b
from earthshine.model.training_options import TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from earthshine.ops import attention

BATCH, SEQ = 1, 64


def assert_stored_elements(config: ModelConfig) -> None:
    """A state dict holds the parameters, and the bias of a sigmoid gate: as published sizes count."""
    with torch.device("meta"):
        model = Transformer(config)
    assert count_parameters(config).total == sum(t.numel() for t in model.state_dict().values())


def test_totals_of_every_family(architecture: ModelConfig) -> None:
    assert_stored_elements(architecture)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_totals_of_every_preset(name: str) -> None:
    assert_stored_elements(PRESETS[name]())


PUBLISHED = {
    "llama3_8b": (8_030_261_248, 8_030_261_248),
    "llama3_8b_e8t2": (47_491_321_856, 13_668_454_400),
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "moonlight_16b_a3b": (15_960_110_208, 2_914_776_192),
    "smollm2_135m": (134_515_008, 134_515_008),
    "smollm2_135m_e8t2": (692_036_928, 214_279_488),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes(name: str) -> None:
    counts = count_parameters(PRESETS[name]())
    assert (counts.total, counts.active) == PUBLISHED[name]


def test_moonlight_without_embeddings() -> None:
    """15.29 B and 2.24 B in arXiv:2502.16982, section 3.3."""
    counts = count_parameters(PRESETS["moonlight_16b_a3b"]())
    assert (counts.total_non_embedding, counts.active_non_embedding) == (15_289_021_568, 2_243_687_552)


def every_layer(count: int, **fields: Any) -> MoEConfig:
    return MoEConfig(layers=tuple(range(count)), gate="softmax_topk", **fields)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (replace(llama3_8b(), vocab_size=32000, bos_token_id=1, eos_token_ids=(2,)), 7_241_732_096),  # Mistral 7B
        (
            replace(
                llama3_8b(),
                vocab_size=152064,
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                qkv_bias=True,
            ),
            7_615_616_512,  # Qwen2.5 7B
        ),
        (
            replace(llama3_8b(), vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, qk_norm=True),
            8_190_735_360,  # Qwen3 8B
        ),
        (
            replace(
                llama3_8b(),
                vocab_size=151936,
                hidden_size=2048,
                num_hidden_layers=48,
                num_key_value_heads=4,
                qk_norm=True,
                moe=every_layer(48, num_experts=128, top_k=8, intermediate_size=768),
            ),
            30_532_122_624,  # Qwen3 30B-A3B
        ),
        (
            replace(
                llama3_8b(),
                vocab_size=151936,
                hidden_size=2048,
                num_hidden_layers=24,
                num_attention_heads=16,
                num_key_value_heads=16,
                qkv_bias=True,
                moe=every_layer(24, num_experts=60, top_k=4, intermediate_size=1408, shared_intermediate_size=5632),
            ),
            14_315_784_192,  # Qwen1.5-MoE A2.7B
        ),
        (
            replace(
                llama3_8b(),
                vocab_size=129280,
                hidden_size=7168,
                intermediate_size=18432,
                num_hidden_layers=61,
                num_attention_heads=128,
                num_key_value_heads=128,
                head_dim=192,
                mla=MLAConfig(
                    kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
                ),
                moe=MoEConfig(
                    num_experts=256,
                    top_k=8,
                    intermediate_size=2048,
                    layers=tuple(range(3, 61)),
                    gate="sigmoid_bias",
                    shared_intermediate_size=2048,
                    shared_gated=False,
                ),
            ),
            671_026_419_200,  # DeepSeek-V3 without its module for multi-token prediction
        ),
    ],
    ids=["Mistral", "Qwen2.5", "Qwen3", "Qwen3-MoE", "Qwen1.5-MoE", "DeepSeek-V3"],
)
def test_published_sizes_of_the_other_families(config: ModelConfig, total: int) -> None:
    assert count_parameters(config).total == total


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """The counter sees products as they are dispatched: `mm`, `addmm`, `bmm`, also those inside an autograd function.

    It does not see those inside one kernel that it has no formula for, as the CPU's fused attention and its grouped
    product: the first is replaced by its unfused form here, the second by the loop over experts.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def counted(config: ModelConfig, **options: Any) -> tuple[float, float]:
    """FLOPs of a forward and of a backward pass, per token."""
    model = Transformer(config, experts_backend="loop", training=TrainingOptions(**options))
    initialize(model, seed=0)
    tokens_BS = torch.randint(0, config.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    with counting() as counter:
        logits = model(tokens_BS)
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward / tokens_BS.numel(), (counter.get_total_flops() - forward) / tokens_BS.numel()


def assert_the_forms_hold(config: ModelConfig, *, causal: bool) -> None:
    """Within 1 %: the counter also sees the weighted sum of a token's experts, which is done by `bmm` (0.2 % here)."""
    forward, backward = counted(config)
    assert forward == pytest.approx(forward_flops_per_token(config, SEQ, causal=causal), rel=0.01)
    assert backward == pytest.approx(backward_flops_per_token(config, SEQ, causal=causal), rel=0.01)


def test_flops_are_the_counters(architecture: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfused attention computes the whole square and masks half of it."""
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("sdpa", ""))
    assert_the_forms_hold(architecture, causal=False)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"], indirect=True)
def test_the_causal_half_is_what_attention_by_single_rows_computes(
    architecture: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("blocks", ""))
    monkeypatch.setattr(attention, "_block_rows", lambda _: 1)
    assert_the_forms_hold(architecture, causal=True)


def test_attention_is_a_part_of_the_count_that_one_per_cent_would_show(architecture: ModelConfig) -> None:
    assert attention_flops_per_token(architecture, SEQ) > 0.03 * forward_flops_per_token(architecture, SEQ)


def test_training_is_forward_and_backward() -> None:
    config = PRESETS["llama3_tiny_e8t2"]()
    both = forward_flops_per_token(config, SEQ) + backward_flops_per_token(config, SEQ)
    assert train_flops_per_token(config, SEQ) == both == 3 * forward_flops_per_token(config, SEQ)


FROZEN = {
    "nothing": (),
    "embedding": ("embed.weight",),
    "head": ("head.weight",),
    "all but the last block": ("embed.weight", "blocks.0.*", "blocks.1.*"),
    "lower blocks": ("embed.weight", "blocks.0.*"),
    "upper blocks and head": ("blocks.1.*", "blocks.2.*", "final_norm.weight", "head.weight"),
    "all but the head": ("embed.weight", "blocks.*", "final_norm.weight"),
    "all but norms": ("embed.weight", "head.weight", "*_proj*", "*.w_*", "*.router.*", "*shared_gate*"),
    "all but the final norm": ("embed.weight", "blocks.*", "head.weight"),
    "all but routers": ("embed.weight", "*norm*", "*_proj*", "*.w_*", "*shared*", "head.weight"),
    "routers": ("*.router.weight",),
    "experts": ("*.w_gate_EFD", "*.w_up_EFD", "*.w_down_EDF"),
    "all but down": ("embed.weight", "*norm*", "*.attn.*", "*gate*", "*up*", "*router*", "head.weight"),
    "all but values": ("embed.weight", "*norm*", "*.q_*", "*.k_*", "*.kv_a*", "*.o_*", "*.ffn.*", "*.moe.*", "head.*"),
    "queries": ("embed.weight", "*.q_*", "*norm*"),
}


def frozen_names(config: ModelConfig, patterns: tuple[str, ...]) -> set[str]:
    return {w.name for w in parameter_shapes(config) if any(fnmatchcase(w.name, pattern) for pattern in patterns)}


def counted_training(config: ModelConfig, frozen: set[str], **options: Any) -> float:
    """FLOPs per token of a training pass, loss included, with those parameters frozen."""
    model = Transformer(config, experts_backend="loop", training=TrainingOptions(**options))
    initialize(model, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    tokens_BS = torch.randint(0, config.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    with counting() as counter:
        sum(model.train().losses(tokens_BS, tokens_BS.roll(-1, 1))).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():  # the walk knows exactly who gets a gradient
        assert (parameter.grad is not None) == (name not in frozen), name
    return counter.get_total_flops() / tokens_BS.numel()


def assert_frozen_counts_hold(config: ModelConfig, pattern: str, *, causal: bool) -> None:
    """Within 1 %, as above."""
    frozen = frozen_names(config, FROZEN[pattern])
    if len(frozen) < len(parameter_shapes(config)):  # a dense model has no router to train
        expected = train_flops_per_token(config, SEQ, causal=causal, frozen=frozen)
        assert counted_training(config, frozen) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama, tied", "qwen3", "qwen2_moe", "deepseek_v3, q LoRA"], indirect=True)
@pytest.mark.parametrize("pattern", FROZEN)
def test_frozen_parameters_are_counted_as_they_are_computed(
    architecture: ModelConfig, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what lies below, above and between what is trained."""
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("sdpa", ""))
    assert_frozen_counts_hold(architecture, pattern, causal=False)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3"], indirect=True)
@pytest.mark.parametrize("pattern", ["lower blocks", "all but values", "queries"])
def test_row_blocks_compute_no_gradient_that_is_not_needed(
    architecture: ModelConfig, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("blocks", ""))
    monkeypatch.setattr(attention, "_block_rows", lambda _: 1)
    assert_frozen_counts_hold(architecture, pattern, causal=True)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "llama, tied"], indirect=True)
def test_what_is_computed_again_are_the_blocks_that_the_backward_pass_reaches(
    architecture: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose_backend", lambda *_, **__: ("blocks", ""))
    monkeypatch.setattr(attention, "_block_rows", lambda _: 1)
    head = 2.0 * architecture.vocab_size * architecture.hidden_size
    everything = forward_flops_per_token(architecture, SEQ) - head
    assert recomputed_flops_per_token(architecture, SEQ) == pytest.approx(everything)
    assert recomputed_flops_per_token(architecture, SEQ, frozen=frozen_names(architecture, ("embed*", "blocks*"))) == 0
    for pattern in ("nothing", "lower blocks"):
        frozen = frozen_names(architecture, FROZEN[pattern])
        again = counted_training(architecture, frozen, recompute=True) - counted_training(architecture, frozen)
        assert again == pytest.approx(recomputed_flops_per_token(architecture, SEQ, frozen=frozen), rel=0.01)
