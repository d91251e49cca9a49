"""The proof of an upcycling holds for what is right, and fails for what was broken on purpose."""

import json
from pathlib import Path

import pytest
import torch

from earthshine.checkpoint.hf import save_model
from earthshine.checkpoint.load import load_model
from earthshine.errors import ConfigError
from earthshine.files import to_json
from earthshine.model.config import ModelConfig
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import upcycle
from earthshine.verify.huggingface import verify_huggingface
from earthshine.verify.measure import comparison_tokens, logits_of
from earthshine.verify.upcycled import verify_upcycle


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


def test_an_expert_that_no_token_reaches_is_proved_by_the_hashes(dense: Path, tmp_path: Path) -> None:
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
    other = PRESETS["llama3_tiny_e8t2"]()
    other = ModelConfig(**{**vars(other), "vocab_size": 100})
    model = Transformer(other)
    initialize(model, 0)
    save_model(model, other, tmp_path / "other")
    with pytest.raises(ConfigError, match="was not made from this model"):
        verify_upcycle(dense, tmp_path / "other")


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
