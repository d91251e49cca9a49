"""What the presets are: published sizes are in test_counts; here that the small ones have the shape of the large."""

import pytest
import torch

from earthshine.model.presets import (
    PRESETS,
    llama3_8b,
    llama3_tiny,
    llama3_tiny_e8t2,
    mixtral_8x7b,
    moonlight_16b_a3b,
    moonlight_tiny,
)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_found_by_its_name_and_fits_a_hugging_face_class(name: str) -> None:
    families = {"moonlight": "deepseek_v3", "mixtral": "mixtral"}
    usual = "mixtral" if name.endswith("_e8t2") else "llama"
    assert PRESETS[name]().family == families.get(name.partition("_")[0], usual)


def test_small_presets_have_the_shape_of_the_large_ones() -> None:
    for small, large in ((llama3_tiny(), llama3_8b()), (llama3_tiny_e8t2(), mixtral_8x7b())):
        assert small.num_key_value_heads < small.num_attention_heads
        assert small.num_attention_heads * small.head_dim == small.hidden_size
        assert (small.moe.num_experts, small.moe.top_k) == (large.moe.num_experts, large.moe.top_k)
    small, large = moonlight_tiny(), moonlight_16b_a3b()
    ratios = [
        (
            c.intermediate_size / c.hidden_size,
            c.moe.intermediate_size / c.hidden_size,
            c.mla.kv_lora_rank / c.hidden_size,
            c.mla.qk_nope_head_dim / c.mla.qk_rope_head_dim,
            c.mla.v_head_dim / c.mla.qk_nope_head_dim,
            c.num_attention_heads * c.mla.v_head_dim / c.hidden_size,
            c.moe.top_k / c.moe.num_experts,
            c.moe.top_k * c.moe.intermediate_size / c.moe.shared_intermediate_size,
            min(c.moe.layers),
        )
        for c in (small, large)
    ]
    assert ratios[0] == ratios[1]


def gate_scaling(num_experts: int, top_k: int, num_samples: int = 1 << 17) -> float:
    """The factor that gives the routed experts' sum the size of one expert's output (Moonlight, arXiv:2502.16982,
    appendix C): the mean of 1/||p||_2 over random N(0, 1) logits, p being their `top_k` sigmoids, renormalized.

    2.446 for 64 experts, 6 of them chosen. A seeded mean of `num_samples`, so the same number in every call.
    """
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for samples in torch.arange(num_samples).split(1 << 14):  # bounds memory
        logits_TE = torch.randn(len(samples), num_experts, generator=generator)
        p_TK = logits_TE.topk(top_k, -1).values.sigmoid()
        total += float((p_TK.sum(-1) / p_TK.norm(dim=-1)).double().sum())
    return total / num_samples


@pytest.mark.parametrize(
    ("num_experts", "top_k", "published"),
    [(64, 6, 2.446), (8, 2, 1.409), (16, 2, 1.412), (16, 4, 1.991), (32, 4, 1.997), (64, 8, 2.823)],
)
def test_gate_scaling_is_moonlights(num_experts: int, top_k: int, published: float) -> None:
    """Three digits after the point, as printed, and the sampling error of 2^17 samples."""
    scaling = gate_scaling(num_experts, top_k)
    assert abs(scaling - published) < 0.001
    if (num_experts, top_k) == (64, 6):
        assert round(scaling, 3) == 2.446
        assert scaling == gate_scaling(num_experts, top_k)


@pytest.mark.parametrize("make", [moonlight_tiny, moonlight_16b_a3b])
def test_moonlights_gates_are_scaled_by_its_appendix_c(make) -> None:
    """Both are rounded to three decimals, as the published 2.446 is."""
    moe = make().moe
    assert moe.routed_scaling == pytest.approx(gate_scaling(moe.num_experts, moe.top_k), abs=5e-4)
