"""What the presets are: published sizes are in test_counts; here that the small ones have the shape of the large."""

import pytest

from earthshine.errors import ConfigError
from earthshine.model.presets import (
    PRESETS,
    llama3_8b,
    llama3_tiny,
    llama3_tiny_e8t2,
    mixtral_8x7b,
    moonlight_16b_a3b,
    moonlight_tiny,
    preset,
)
from earthshine.ops.routing import gate_scaling


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_found_by_its_name_and_fits_a_hugging_face_class(name: str) -> None:
    families = {"moonlight": "deepseek_v3", "mixtral": "mixtral"}
    usual = "mixtral" if name.endswith("_e8t2") else "llama"
    assert preset(name).family == families.get(name.partition("_")[0], usual)


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


@pytest.mark.parametrize("make", [moonlight_tiny, moonlight_16b_a3b])
def test_moonlights_gates_are_scaled_by_its_appendix_c(make) -> None:
    """Both are rounded to three decimals, as the published 2.446 is."""
    moe = make().moe
    assert moe.routed_scaling == pytest.approx(gate_scaling(moe.num_experts, moe.top_k), abs=5e-4)


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llama3_tiny'"):
        preset("lama3_tiny")
