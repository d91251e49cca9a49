"""The proofs hold for what is right, and fail for what was broken on purpose."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earthshine.checkpoint.hf import save_model
from earthshine.checkpoint.load import load_model
from earthshine.errors import ConfigError
from earthshine.files import to_json
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig
from earthshine.model.hf_families import HF_CLASSES
from earthshine.model.presets import preset
from earthshine.model.transformer import Transformer, initialize
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle
from earthshine.verify.huggingface import verify_huggingface
from earthshine.verify.measure import comparison_tokens, logits_of, mean_kl, relative_difference, row
from earthshine.verify.upcycled import verify_upcycle


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(preset("llama3_tiny"))
    initialize(model, seed=0)
    out = tmp_path_factory.mktemp("models") / "dense"
    save_model(model, model.config, out)
    return out


def broken_copy(moe: Path, out: Path, name: str, scale: float) -> Path:
    model = load_model(moe)
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(scale)
    save_model(model, model.config, out)
    return out


@pytest.mark.parametrize("layers", [(), (1,)], ids=["all layers: Mixtral", "one layer: Qwen2-MoE"])
def test_an_upcycled_model_is_the_dense_one_and_a_damaged_one_is_not(dense: Path, layers, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", UpcycleConfig(experts=4, layers=layers))
    proof = verify_upcycle(dense, tmp_path / "moe", tokens=32, fp64=True, bf16=True)
    assert proof["ok"] and len(proof["rows"]) == 5, proof
    # A random tiny model is also equal in absolute terms (its largest logit is below 1).
    assert proof["rows"][0]["measured"] <= 1e-5
    assert verify_huggingface(tmp_path / "moe", tokens=32)["ok"]
    bad = broken_copy(tmp_path / "moe", tmp_path / "bad", "blocks.1.moe.experts.w_down_EDF", 1.01)
    proof = verify_upcycle(dense, bad, tokens=32)
    assert not proof["ok"] and not any(r["ok"] for r in proof["rows"])


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
    model = Transformer(replace(preset("llama3_tiny"), **FAMILIES[family]))  # type: ignore[arg-type]
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


def test_an_expert_that_no_token_reaches_is_proved_by_the_manifest(dense: Path, tmp_path: Path) -> None:
    """Two tokens reach at most four of sixteen experts in a layer: logits alone would let the damage pass."""
    from safetensors.torch import load_file, save_file

    upcycle(dense, tmp_path / "moe", UpcycleConfig(experts=16))
    file = tmp_path / "moe" / "model.safetensors"
    tensors = load_file(file)
    model, reached = load_model(tmp_path / "moe"), set()
    model.blocks[2].moe.router.register_forward_hook(
        lambda module, args, out: reached.update(out[1].flatten().tolist())
    )
    proof = verify_upcycle(dense, tmp_path / "moe", tokens=2)
    logits_of(model, comparison_tokens(dense, model.config, 2)[0])  # the same tokens: they depend on nothing else
    assert proof["ok"] and proof["rows"][-1]["note"] == "2 files"
    unreached = min(set(range(16)) - reached)
    tensors[f"model.layers.2.block_sparse_moe.experts.{unreached}.w1.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    proof = verify_upcycle(dense, tmp_path / "moe", tokens=2)
    assert [r["ok"] for r in proof["rows"]] == [True, True, False]


def test_models_that_do_not_belong_together_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a dense model and an MoE"):
        verify_upcycle(dense, dense)
    other = preset("llama3_tiny_e8t2")
    other = ModelConfig(**{**vars(other), "vocab_size": 100})
    model = Transformer(other)
    initialize(model, 0)
    save_model(model, other, tmp_path / "other")
    with pytest.raises(ConfigError, match="was not made from this model"):
        verify_upcycle(dense, tmp_path / "other")
    with pytest.raises(ConfigError, match="tokens=100000 must be between 2 and the model's 512"):
        verify_huggingface(dense, tokens=100_000)


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


def test_the_measures() -> None:
    a, b = torch.tensor([[[100.0, 0.0]]]), torch.tensor([[[101.0, 0.0]]])
    assert relative_difference(a, b) == pytest.approx(1 / 101)
    assert mean_kl(b, b) == 0 and mean_kl(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])) == pytest.approx(
        0.1201, abs=1e-4
    )
    assert row("x", 1.0, 1.0)["ok"] and not row("x", float("nan"), 1.0)["ok"]


@pytest.mark.parametrize("measured", [math.nan, math.inf])
@pytest.mark.parametrize("tolerance", [1.0, math.nan, math.inf])
def test_nothing_holds_by_numbers_that_are_not_finite(measured: float, tolerance: float) -> None:
    """An infinite difference is not within an infinite tolerance."""
    failed = row("x", measured, tolerance, "of nothing")
    assert not failed["ok"] and failed["note"].startswith(f"measured is {measured}, so nothing was shown; ")
    assert failed["note"].endswith("; of nothing")
    assert not row("x", 0.0, math.inf)["ok"]


def test_a_proof_that_failed_by_overflow_says_so_in_json(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", UpcycleConfig(experts=4))
    moe = load_model(tmp_path / "moe")
    with torch.no_grad():
        for weight in (moe.blocks[0].moe.experts.w_down_EDF, moe.blocks[0].moe.experts.w_up_EFD):
            weight.mul_(1e38)
    save_model(moe, moe.config, tmp_path / "bad")
    proof = verify_upcycle(dense, tmp_path / "bad", tokens=8)
    assert not proof["ok"] and not any(r["ok"] for r in proof["rows"][:2])
    first = json.loads(to_json(proof))["rows"][0]
    assert first["measured"] is None and first["note"].startswith("measured is nan, so nothing was shown")
