"""Linear layers that hold several matrices are asked about, by name and shape, and only they."""

import re
from ast import literal_eval
from typing import Any

import pytest
import torch
from torch import nn

from earthshine.errors import ConfigError
from earthshine.optim.fused import expert_factors, parts_of
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon

D = 8


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("qkv qkv_proj Wqkv wqkv W_qkv query_key_value to_qkv toQKV qkvProj in_proj_qkv in_proj_qkvz", "q, k, v"),
        ("c_attn att_proj W_pack linear_qkv q_k_v_proj fused_qkv_a_proj_with_mqa", "q, k, v"),
        ("kv kv_proj to_kv wkv key_value linear_kv", "k, v"),
        ("qk index_qk_proj", "q, k"),
        ("gate_up_proj up_gate_proj gateUpProj gate_and_up gateup_proj ff_proj", "gate, up"),
        ("in_proj_ba", "b, a"),
        # what looks so and is not
        ("q_proj k_proj v_proj query key value Wq Wk Wv q k v q_lin query_proj to_q q_attn k_proj_v2", ""),
        ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj wkv_a wkv_b linear_kv_up_proj linear_kv_down_proj", ""),
        ("linear_q_up_proj gate up_proj gate_proj up down_proj upsample_gate vq_proj v_head value_head", ""),
        ("cross_attn_query_content_proj pos_key_proj shared_expert_gate per_layer_input_gate in_proj Wo dense", ""),
    ],
)
def test_names(names: str, parts: str) -> None:
    assert {name: parts_of(name) for name in names.split()} == dict.fromkeys(names.split(), parts)


class Attention(nn.Module):
    """heads, key_heads: when given, the module says them."""

    def __init__(self, name: str, rows: int, **sizes: int) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(D, rows))
        self.o_proj = nn.Linear(D, D)
        self.other = nn.Linear(D, D)
        for key, value in sizes.items():
            setattr(self, key, value)


def message(model: nn.Module, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        param_groups(model, **options)
    return str(caught.value)


@pytest.mark.parametrize("by", ["adamw", "matrices"])
def test_the_message_obeyed_once_is_enough(by: str) -> None:
    """For fused layers of every block, an output layer, and a parameter that no rule knows."""

    def make() -> nn.Module:
        parts = {"blocks": nn.ModuleList(Attention("qkv_proj", 12) for _ in range(3)), "out": nn.Linear(D, 5)}
        if by == "adamw":
            parts["rnn"] = nn.LSTM(D, D)
        return nn.ModuleDict(parts)

    text = message(make())
    assert "blocks.*.qkv_proj.weight [12, 8] (3 of them) seems to hold q, k, v in one weight" in text
    assert "out.weight [5, 8] may be the head" in text
    answer = literal_eval(re.search(rf"{by}=([\[{{].*?[\]}}])", text)[1])  # type: ignore[index]
    groups = param_groups(make(), **{by: answer})
    names = {name for g in groups if g["algorithm"] == by.replace("matrices", "muon") for name, _ in g["params"]}
    assert {"blocks.0.qkv_proj.weight", "blocks.2.qkv_proj.weight", "out.weight"} <= names


def test_what_is_declared_frozen_or_adamw_s_is_not_asked_about() -> None:
    class Declared(Attention):
        def logical_matrices(self) -> dict[str, Any]:
            return {}

    class Linear(nn.Linear):
        def logical_matrices(self) -> dict[str, Any]:
            return {"weight": ("rows", (8, 2, 2))}

    model = Attention("qkv_proj", 12)
    assert "qkv_proj" in message(Declared("qkv_proj", 12))
    model.qkv_proj = Linear(D, 12)
    assert ("rows", (8, 2, 2)) in param_groups(model)[0]["matrices"]
    param_groups(Attention("qkv_proj", 12), freeze=["qkv_proj.*"])
    param_groups(Attention("qkv_proj", 12), adamw=["*.weight"])
    param_groups(Attention("qkv_proj", 12), algorithm="adamw")


def test_rows_of_one_projection_are_one_matrix() -> None:
    """DeepSeek-V4's kv_proj makes one head that is keys and values; Reformer's query_key is both."""
    for name, rows, sizes in (
        ("kv_proj", 4, {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4}),
        ("kv_proj", 4, {"head_dim": 4}),
        ("query_key", 6, {"num_attention_heads": 2, "attention_head_size": 3}),
    ):
        param_groups(Attention(name, rows, **sizes))
    assert "kv_proj" in message(Attention("kv_proj", 8, num_heads=2, num_key_value_heads=1, head_dim=4))


@pytest.mark.parametrize("parts", [2, 3])
def test_two_layers_whose_first_makes_what_the_second_takes_several_times(parts: int) -> None:
    """Gate and up before down; q, k and v before the output: of any name."""

    def pair(first: int, second: int) -> nn.Module:
        return nn.ModuleList([nn.ModuleDict({"Wi": nn.Linear(D, first), "Wo": nn.Linear(second, D)})])

    assert f"0.Wi.weight [{parts * 6}, 8] seems to hold {parts} parts" in message(pair(parts * 6, 6))
    for first, second in ((6, 6), (4 * 6, 6), (6, parts * 6)):
        param_groups(pair(first, second))
    three = {"q": nn.Linear(D, 2 * D), "k": nn.Linear(D, D), "o": nn.Linear(2 * D, D)}
    param_groups(nn.ModuleList([nn.ModuleDict(three)]))


class Factors(nn.Module):
    """As PEFT's ParamWrapper: factors of rank R of a stack of experts."""

    E, R = 3, 2

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = self.E
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, self.E * self.R, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(self.E * self.R, 5, bias=False)})


def test_low_rank_factors_of_experts_are_a_matrix_each() -> None:
    """Each expert's factors move as they would alone."""
    torch.manual_seed(0)
    together, E, R = Factors(), Factors.E, Factors.R
    A, B = together.lora_A["default"].weight, together.lora_B["default"].weight
    alone = [nn.Parameter(part.detach().clone()) for part in (*A.view(E, R, 6), *B.view(5, R, E).permute(2, 0, 1))]
    grad_A, grad_B = torch.randn_like(A), torch.randn_like(B)
    A.grad, B.grad = grad_A.clone(), grad_B.clone()
    for p, g in zip(alone, (*grad_A.view(E, R, 6), *grad_B.view(5, R, E).permute(2, 0, 1)), strict=True):
        p.grad = g.clone()
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "ns_dtype": "float32"}
    Muon(param_groups(together), **options).step()
    Muon(alone, **options).step()
    moved = [*A.view(E, R, 6), *B.view(5, R, E).permute(2, 0, 1)]
    assert all(torch.equal(p, q) for p, q in zip(moved, alone, strict=True))
    with pytest.raises(ConfigError, match="divided by columns"):
        Muon(param_groups(Factors()), lr=0.1, normuon_beta2=0.9)


def test_factors_of_one_matrix_stay_whole() -> None:
    model = Factors()
    model.num_experts = 1
    assert expert_factors(model) == {}
