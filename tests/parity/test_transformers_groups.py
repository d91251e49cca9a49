"""Muon's groups of transformers' own modules: the flags and sizes that the rules read are there."""

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups


def test_a_mixtral_layer_and_the_experts_of_gpt_oss() -> None:
    small = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
    with torch.device("meta"):
        mixtral, gpt_oss = MixtralSparseMoeBlock(MixtralConfig(**small)), GptOssExperts(GptOssConfig(**small))
    muon = param_groups(mixtral)[0]
    assert dict(zip([n for n, _ in muon["params"]], muon["matrices"], strict=True)) == {
        "gate.weight": ("matrix",),
        "experts.gate_up_proj": ("rows", (6, 6)),
        "experts.down_proj": ("batch",),
    }
    with pytest.raises(ConfigError, match=r"gate_up_proj \[3, 8, 12\] of GptOssExperts"):
        param_groups(gpt_oss)
