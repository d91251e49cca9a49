"""The list of weights against the built model, and its division against the optimizer's."""

from dataclasses import replace

import pytest
import torch

from earthshine.model.config import ModelConfig
from earthshine.model.parameters import parameter_shapes
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer
from earthshine.optim.groups import describe, param_groups
from earthshine.optim.logical_matrices import logical_matrices


def built(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def assert_the_list_is_the_model(config: ModelConfig) -> None:
    """Names, sizes, who goes to Muon, and as which matrices."""
    model = built(config)
    expected = {name: ("adamw", p.numel()) for name, p in model.named_parameters()}
    for group in param_groups(model):
        if group["algorithm"] == "muon":
            for (name, p), spec in zip(group["params"], group["matrices"], strict=True):
                matrices = logical_matrices(p.shape, spec)
                assert len({(m.M, m.N) for m in matrices}) == 1
                expected[name] = ("muon", len(matrices), matrices[0].M, matrices[0].N)
    listed = {
        w.name: ("muon", w.count, w.rows, w.columns) if w.for_muon else ("adamw", w.elements)
        for w in parameter_shapes(config)
    }
    assert listed == expected
    assert len(listed) == len(parameter_shapes(config))


def test_every_family(architecture: ModelConfig) -> None:
    assert_the_list_is_the_model(architecture)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset(name: str) -> None:
    assert_the_list_is_the_model(PRESETS[name]())


def test_the_optimizers_table_of_latent_attention_and_a_biased_gate() -> None:
    """Whole stored matrices to Muon; norms to AdamW; the gate's bias is a buffer, which no optimizer sees."""
    model = built(PRESETS["moonlight_tiny"]())
    lines = [" ".join(line.split()) for line in describe(param_groups(model), model).splitlines()]
    assert "muon blocks.*.attn.kv_a_proj_with_mqa.weight 3 18,432 1 of 48 x 128 linear layer (Linear)" in lines
    assert "muon blocks.*.attn.kv_b_proj.weight 3 24,576 1 of 256 x 32 linear layer (Linear)" in lines
    assert "muon blocks.*.moe.experts.w_down_EDF 2 720,896 32 of 128 x 88 declared by Experts" in lines
    assert "adamw blocks.*.attn.kv_a_norm.weight 3 96 32 norm (RMSNorm)" in lines
    assert "blocks.1.moe.router.bias_E" in model.state_dict() and "bias_E" not in "".join(lines)


def test_the_optimizers_table_of_biases_and_of_norms_of_heads() -> None:
    for changes, line in (
        ({"qkv_bias": True}, "adamw blocks.*.attn.k_proj.bias 3 144 48 vector or scalar"),
        ({"qk_norm": True}, "adamw blocks.*.attn.k_norm.weight 3 72 24 norm (RMSNorm)"),
    ):
        table = describe(param_groups(built(replace(PRESETS["llama3_tiny"](), **changes))))
        assert line in [" ".join(found.split()) for found in table.splitlines()]
