"""transformers and we compute the same logits; what it raises does not hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earthshine.checkpoint.hf import save_model
from earthshine.errors import ConfigError
from earthshine.model.config import MLAConfig, MoEConfig
from earthshine.model.hf_families import HF_CLASSES
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle
from earthshine.verify.huggingface import verify_huggingface
from earthshine.verify.upcycled import verify_upcycle

MLA = MLAConfig(kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=32, layers=(1, 2))
FAMILIES = {
    "mistral": {"model_type": "mistral"},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"moe": replace(MOE, layers=(0, 1, 2))},
    "qwen2_moe": {"qkv_bias": True, "moe": replace(MOE, shared_intermediate_size=16)},
    "qwen3_moe": {"qk_norm": True, "moe": replace(MOE, gate="softmax_topk", renormalize=False)},
    "deepseek_v3": {
        "mla": MLA,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "moe": replace(MOE, gate="sigmoid_bias", shared_intermediate_size=64, shared_gated=False),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_means_the_same_to_transformers(family: str, tmp_path: Path) -> None:
    model = Transformer(replace(PRESETS["llama3_tiny"](), **FAMILIES[family]))  # type: ignore[arg-type]
    initialize(model, seed=0)
    assert model.config.family == family
    with torch.no_grad():  # what `initialize` leaves at zero could be lost unseen
        for name, tensor in model.state_dict().items():
            if name.endswith(("bias", "bias_E")):
                tensor.normal_(0, 0.1)
    save_model(model, model.config, tmp_path / "model")
    proof = verify_huggingface(tmp_path / "model", tokens=32)
    assert proof["ok"] and proof["subject"]["class"] == HF_CLASSES[model.config.family], proof
    if not model.config.is_moe:
        upcycle(tmp_path / "model", tmp_path / "moe", UpcycleConfig(experts=4))
        proof = verify_upcycle(tmp_path / "model", tmp_path / "moe", tokens=32)
        assert proof["ok"], proof


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rms_norm_eps": 1}, "Field 'rms_norm_eps' expected float"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "attention_dropout": "much"},
            "attention_dropout",
        ),
    ],
)
def test_what_transformers_raises_is_a_check_that_does_not_hold(dense: Path, tmp_path: Path, change, words) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    proof = verify_huggingface(model, tokens=8)
    assert not proof["ok"] and proof["rows"][0]["name"] == "errors of transformers", proof
    assert words in proof["rows"][0]["note"] and "\n" not in proof["rows"][0]["note"]


def test_more_tokens_than_positions_are_refused(dense: Path) -> None:
    with pytest.raises(ConfigError, match="tokens=100000 must be between 2 and the model's 512"):
        verify_huggingface(dense, tokens=100_000)
