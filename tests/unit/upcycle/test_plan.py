"""The plan decides everything from headers alone, and its ledger accounts for every tensor."""

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earthshine.checkpoint.name_tables import entries
from earthshine.errors import ConfigError, UnsupportedModelError, WeightsError
from earthshine.model.config import MLAConfig
from earthshine.model.counts import count_parameters
from earthshine.model.presets import smollm2_135m, smollm2_135m_e8t2
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.plan import plan_upcycle, upcycled_config
from earthshine.upcycle.tensor_rules import Copy, Normal, Zeros

GATE = "model.layers.1.mlp.gate_proj.weight"


def test_smollm2_becomes_what_its_preset_says():
    config = upcycled_config(smollm2_135m(), UpcycleConfig(experts=8, top_k=2))
    assert config == smollm2_135m_e8t2()
    counts = count_parameters(config)
    assert (counts.total, counts.active) == (692_036_928, 214_279_488)


def test_only_headers_are_read(dense_dir, monkeypatch):
    source = dense_dir()
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("the plan read weights"))
    plan_upcycle(source).table()


def test_all_layers_give_a_mixtral(dense_dir):
    plan = plan_upcycle(dense_dir(dtype=torch.bfloat16), UpcycleConfig(experts=4))
    assert plan.target_config.family == "mixtral"
    rules = {t.entry.hf: t.rule for t in plan.targets}
    for e in range(4):
        at = f"model.layers.1.block_sparse_moe.experts.{e}."
        for matrix, source in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            assert rules[f"{at}{matrix}.weight"] == Copy(f"model.layers.1.mlp.{source}_proj.weight")
    router = rules["model.layers.1.block_sparse_moe.gate.weight"]
    assert router == Normal((4, 32), torch.bfloat16, 0.02, 0, 1, "router")
    assert plan.num_bytes == 2 * count_parameters(plan.target_config).total


def test_some_layers_give_a_qwen2_moe_with_a_zero_shared_expert(dense_dir):
    plan = plan_upcycle(dense_dir(), UpcycleConfig(layers=(2, 0), shared_intermediate_size=8))
    assert plan.target_config.family == "qwen2_moe"
    assert plan.target_config.moe.layers == (0, 2)
    rules = {t.entry.hf: t.rule for t in plan.targets}
    assert rules[GATE] == Copy(GATE)
    assert rules["model.layers.0.mlp.shared_expert.up_proj.weight"] == Zeros((8, 32), torch.float32)
    assert rules["model.layers.0.mlp.shared_expert_gate.weight"] == Zeros((1, 32), torch.float32)


SHARED = "model.layers.1.mlp.shared_expert.up_proj.weight"


@pytest.mark.parametrize(
    ("fields", "layers", "family", "shared"),
    [
        ({"model_type": "mistral"}, (), "mixtral", False),
        ({"model_type": "mistral"}, (1,), "qwen2_moe", True),
        ({"qkv_bias": True}, (), "qwen2_moe", True),
        ({"qkv_bias": True}, (1,), "qwen2_moe", True),
        ({"qk_norm": True}, (), "qwen3_moe", False),
        ({"qk_norm": True}, (1,), "qwen3_moe", False),
    ],
)
def test_each_dense_family_has_its_target(dense_dir, fields, layers, family, shared):
    """The attention is copied with its biases or norms; a shared expert only where the class demands one."""
    plan = plan_upcycle(dense_dir(**fields), UpcycleConfig(experts=4, layers=layers))
    target = plan.target_config
    assert (target.family, target.moe.gate, target.moe.layers) == (family, "topk_softmax", layers or (0, 1, 2))
    assert target.dense() == replace(plan.source_config, model_type="")
    rules = {t.entry.hf: t.rule for t in plan.targets}
    for name in plan.store.names():
        if "self_attn" in name:
            assert rules[name] == Copy(name)
    assert isinstance(rules.get(SHARED), Zeros) == shared
    assert f"{target.moe.num_experts} experts, top-2" in plan.table()


MLA = MLAConfig(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)


def test_a_dense_deepseek_is_refused(dense_dir):
    source = dense_dir(mla=MLA, head_dim=10, num_key_value_heads=4)
    with pytest.raises(UnsupportedModelError, match="a deepseek_v3 cannot be upcycled.*Take a dense Llama, Mistral"):
        plan_upcycle(source)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 2)), st.integers(2, 9))
def test_ledger_conserves_tensors(dense_dir, tmp_path, layers, experts):
    source = tmp_path / "dense"
    if not source.exists():
        dense_dir()
    plan = plan_upcycle(source, UpcycleConfig(experts=experts, layers=tuple(layers)))
    ledger = plan.ledger()
    assert sorted(s for row in ledger for s in row["sources"]) == plan.store.names()
    assert sorted(t for row in ledger for t in row["targets"]) == sorted(e.hf for e in entries(plan.target_config))
    assert sum(row["num_bytes"] for row in ledger) == plan.num_bytes
    assert json.loads(json.dumps(ledger)) == ledger


def test_the_check_sees_a_lost_and_a_doubled_tensor(dense_dir):
    plan = plan_upcycle(dense_dir(), UpcycleConfig(experts=2))
    with pytest.raises(WeightsError, match="lm_head.weight is accounted for 0 times"):
        replace(plan, targets=plan.targets[:-1]).check()
    with pytest.raises(WeightsError, match="target tensor lm_head.weight is accounted for 2 times"):
        replace(plan, targets=(*plan.targets, plan.targets[-1])).check()
    swapped = replace(plan.targets[-1], rule=Copy("model.norm.weight"))
    with pytest.raises(WeightsError, match="source tensor .* is accounted for"):
        replace(plan, targets=(*plan.targets[:-1], swapped)).check()
    with pytest.raises(WeightsError, match="source tensor ghost is not one"):
        replace(plan, unused={"ghost": "?"}).check()


def test_tied_embeddings_stay_tied(dense_dir):
    def with_copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    plan = plan_upcycle(dense_dir(with_copy, tie_word_embeddings=True))
    assert plan.target_config.tie_word_embeddings
    assert "lm_head.weight" not in {t.entry.hf for t in plan.targets}
    unused = [row for row in plan.ledger() if not row["targets"]]
    assert [row["sources"] for row in unused] == [["lm_head.weight"]]


def test_a_layer_that_does_not_exist(dense_dir):
    source = dense_dir()
    with pytest.raises(ConfigError, match=r"upcycle.layers: \[3, 40\] do not exist; the model has layers 0 to 2"):
        plan_upcycle(source, UpcycleConfig(layers=(1, 3, 40)))
    with pytest.raises(ConfigError, match=r"\[-1\] do not exist"):
        plan_upcycle(source, UpcycleConfig(layers=(-1,)))


@pytest.mark.parametrize(("dtype", "std"), [(torch.float32, 1e300), (torch.float16, 1e-6), (torch.float16, 1e4)])
def test_a_router_that_its_type_cannot_hold(dense_dir, dtype, std):
    with pytest.raises(ConfigError, match=r"upcycle.router_std=.* gives zeros or infinities in torch.float"):
        plan_upcycle(dense_dir(dtype=dtype), UpcycleConfig(router_std=std))


def test_not_a_dense_llama(dense_dir):
    source = dense_dir()
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(hf | {"model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        plan_upcycle(source)
    moe = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    (source / "config.json").write_text(json.dumps(hf | moe))
    with pytest.raises(UnsupportedModelError, match="already"):
        plan_upcycle(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"no tensor {GATE}"),
        (lambda t: t.update({GATE + "_scale": torch.ones(1)}), f"{GATE}_scale, which nothing"),
        (lambda t: t.update({GATE: torch.ones(48, 31)}), f"{GATE} has shape"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), f"{GATE} is torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(dense_dir, change, message):
    with pytest.raises(WeightsError, match=message):
        plan_upcycle(dense_dir(change))


def test_the_table_gives_sizes_and_gathers_layers(dense_dir):
    text = plan_upcycle(dense_dir(), UpcycleConfig(experts=4, layers=(0, 2))).table()
    assert "Qwen2MoeForCausalLM" in text
    line = next(row for row in text.splitlines() if "w_gate_EFD" in row)
    assert line.split()[:5] == [
        "model.layers.*.mlp.gate_proj.weight",
        "copy",
        "blocks.*.moe.experts.w_gate_EFD",
        "2",
        "8",
    ]
