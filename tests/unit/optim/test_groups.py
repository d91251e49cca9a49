"""Who gets Muon: a small zoo of modules, refusals, freezing, heads, routers and Scion's part."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from earthshine.errors import ConfigError
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer
from earthshine.optim.groups import describe, param_groups


class Experts(nn.Module):
    """A stack and a fused projection that say what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.w_EFD = nn.Parameter(torch.zeros(3, 6, 4))
        self.qkv = nn.Parameter(torch.zeros(8, 4))
        self.thin_EF1 = nn.Parameter(torch.zeros(3, 6, 1))
        self.scale = nn.Parameter(torch.zeros(3))

    def logical_matrices(self) -> dict[str, tuple[Any, ...]]:
        return {"w_EFD": ("batch",), "qkv": ("rows", (4, 2, 2)), "thin_EF1": ("batch",)}


class Bare(nn.Module):
    """A matrix that nobody explains."""

    def __init__(self) -> None:
        super().__init__()
        self.mystery = nn.Parameter(torch.zeros(4, 4))


class Adapted(nn.Linear):
    """A linear layer with more matrices than its weight."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_a = nn.Parameter(torch.zeros(2, 4))


class Language(nn.Module):
    def __init__(self, *, vocab: int = 40, tied: bool = False, head: str = "lm_head") -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, 8)
        self.norm = nn.RMSNorm(8)
        self.router = nn.Linear(8, 4, bias=False)
        self.shared_gate = nn.Linear(8, 1, bias=False)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.add_module(head, nn.Linear(8, vocab, bias=False))
        if tied:
            getattr(self, head).weight = self.wte.weight


def chosen(model: nn.Module, **options: Any) -> dict[str, str]:
    return {n: g["algorithm"] for g in param_groups(model, **options) for n, _ in g["params"]}


def test_language_model() -> None:
    assert chosen(Language()) == {
        "router.weight": "muon",
        "up.weight": "muon",
        "down.weight": "muon",
        "wte.weight": "adamw",
        "norm.weight": "adamw",
        "shared_gate.weight": "adamw",  # one row
        "up.bias": "adamw",
        "lm_head.weight": "adamw",
    }


def test_tied_head_is_one_parameter_on_adamw() -> None:
    got = chosen(Language(tied=True))
    assert got["wte.weight"] == "adamw"
    assert "lm_head.weight" not in got
    got = chosen(Language(tied=True, head="anything"))
    assert got["wte.weight"] == "adamw"
    assert "anything.weight" not in got


def test_declared_matrices() -> None:
    muon, adamw = param_groups(Experts())
    assert [n for n, _ in muon["params"]] == ["w_EFD", "qkv"]
    assert muon["matrices"] == (("batch",), ("rows", (4, 2, 2)))
    assert [n for n, _ in adamw["params"]] == ["thin_EF1", "scale"]


def test_convolutions_norms_and_plain_linears() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise: every kernel is one row
        nn.GroupNorm(2, 8),
        nn.PReLU(),
        nn.Linear(8, 5),
    )
    groups = param_groups(model, matrices={"6.weight": ("matrix",)})  # the last layer is asked about
    assert dict(zip([n for n, _ in groups[0]["params"]], groups[0]["matrices"], strict=True)) == {
        "0.weight": ("flatten", 1),
        "2.weight": ("flatten", 2),
        "6.weight": ("matrix",),
    }
    assert "3.weight" in dict(groups[1]["params"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bare(), r"mystery \[4, 4\] of Bare needs.*logical_matrices\(\).*adamw=\['mystery'\]"),
        (Adapted(), r"lora_a \[2, 4\] of Adapted"),
        (nn.MultiheadAttention(8, 2), "in_proj_weight"),
        (nn.LSTM(4, 4), "weight_ih_l0"),
        (nn.Bilinear(3, 4, 5), r"weight \[5, 3, 4\] of Bilinear"),
        (nn.ConvTranspose2d(3, 8, 3), "ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrizations.weight.original1"),
    ],
)
def test_the_undecidable_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        param_groups(model)


def test_a_refusal_can_be_answered() -> None:
    assert chosen(Bare(), adamw=["mystery"]) == {"mystery": "adamw"}
    assert chosen(Bare(), matrices={"*": ("rows", (1, 3))}) == {"mystery": "muon"}
    attention = nn.MultiheadAttention(8, 2)
    groups = param_groups(attention, matrices={"in_proj_weight": ("rows", (8, 8, 8))})
    assert groups[0]["matrices"] == (("rows", (8, 8, 8)), ("matrix",))


def test_a_head_without_a_heads_name_is_refused_not_guessed() -> None:
    with pytest.raises(ConfigError, match=r"final\.weight \[40, 8\] may be the head.*adamw=\['final\.weight'\]"):
        param_groups(Language(head="final"))
    assert chosen(Language(head="final"), adamw=["final.weight"])["final.weight"] == "adamw"
    assert chosen(Language(head="final"), matrices={"final.weight": ("matrix",)})["final.weight"] == "muon"


def test_transformers_own_answer_names_the_head() -> None:
    class Answering(Language):
        def get_output_embeddings(self) -> nn.Module:
            return self.get_submodule("classifier")

    assert chosen(Answering(head="classifier"))["classifier.weight"] == "adamw"


def test_adamw_takes_everything_without_questions() -> None:
    groups = param_groups(nn.LSTM(4, 4), algorithm="adamw")
    assert [g["algorithm"] for g in groups] == ["adamw"]
    with pytest.raises(ConfigError, match="algorithm='sgd'"):
        param_groups(nn.Linear(2, 2), algorithm="sgd")


def test_freezing_by_pattern() -> None:
    model = Language(tied=True)
    assert set(chosen(model, freeze=["wte.*", "norm.weight", "up.*", "down.*", "shared*"])) == {"router.weight"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["router.weight"]
    assert set(chosen(model)) == {"router.weight"}  # frozen before stays frozen
    with pytest.raises(ConfigError, match="freeze pattern 'blocks.*' matches none of the 8 parameters"):
        param_groups(Language(), freeze=["blocks.*"])
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        param_groups(Language(), freeze=["*"])


def test_the_table_says_who_gets_what_and_why() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), Experts())
    text = describe(param_groups(model, freeze=["2.scale"]), model)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "algorithm parameter tensors elements each holds why"
    assert "muon *.weight 2 48 1 of 6 x 4 linear layer (Linear)" in lines
    assert "muon *.qkv 1 32 1 of 4 x 4 + 2 of 2 x 4 declared by Experts" in lines
    assert "muon *.w_EFD 1 72 3 of 6 x 4 declared by Experts" in lines
    assert "adamw *.thin_EF1 1 18 3 x 6 x 1 matrix of one row or column" in lines
    assert "frozen *.scale 1 3 3 not trained" in lines
    assert "muon total 4 152" in lines


def test_what_scion_takes_from_adamw() -> None:
    model = nn.ModuleDict({"a": Language(), "b": Language(tied=True), "c": Language(tied=True, head="anything")})
    muon, scion, adamw = param_groups(model, non_matrix="scion", adamw=["c.norm.weight"])
    assert [g["algorithm"] for g in (muon, scion, adamw)] == ["muon", "scion", "adamw"]
    assert "lmo" not in muon and "lmo" not in adamw and "matrices" not in scion
    assert [n for n, _ in adamw["params"]] == ["c.norm.weight"]  # asked for
    lmos = dict(zip([n for n, _ in scion["params"]], scion["lmo"], strict=True))
    assert {n: lmo for n, lmo in lmos.items() if n.startswith("a.")} == {
        "a.wte.weight": "row_rms",
        "a.norm.weight": "rms",
        "a.shared_gate.weight": "rms",
        "a.up.bias": "rms",
        "a.lm_head.weight": "sign",
    }
    assert lmos["b.wte.weight"] == lmos["c.wte.weight"] == "sign"  # an embedding that is the head too
    lines = [" ".join(line.split()) for line in describe([muon, scion, adamw], model).splitlines()]
    assert "scion b.wte.weight 1 320 40 x 8, sign embedding (Embedding), tied" in lines
    assert "scion total 12 1,356" in lines
    with pytest.raises(ConfigError, match="non_matrix='scion' leaves nothing to algorithm='adamw'"):
        param_groups(model, non_matrix="scion", algorithm="adamw")
    with pytest.raises(ConfigError, match="non_matrix='sgd' must be one of adamw, scion"):
        param_groups(model, non_matrix="sgd")


@pytest.mark.parametrize("tied", [True, False])
def test_scion_s_rule_for_the_embedding_of_our_own_models(tied: bool) -> None:
    """Where it is the head as well there is no second module that would show it."""
    with torch.device("meta"):
        model = Transformer(replace(PRESETS["llama3_tiny"](), tie_word_embeddings=tied))
    for whole in (model, nn.ModuleDict({"wrapped": model})):
        scion = next(g for g in param_groups(whole, non_matrix="scion") if g["algorithm"] == "scion")
        lmos = {
            name.removeprefix("wrapped."): lmo for (name, _), lmo in zip(scion["params"], scion["lmo"], strict=True)
        }
        assert lmos["embed.weight"] == ("sign" if tied else "row_rms")
        assert lmos.get("head.weight", "sign") == "sign"


def test_scion_s_rule_for_an_embedding_that_a_model_names_as_its_output() -> None:
    class Tied(Language):
        def __init__(self) -> None:
            super().__init__()
            del self.lm_head

        def get_output_embeddings(self) -> nn.Module:
            return self.wte

    scion = next(g for g in param_groups(Tied(), non_matrix="scion") if g["algorithm"] == "scion")
    assert dict(zip([n for n, _ in scion["params"]], scion["lmo"], strict=True))["wte.weight"] == "sign"


class TopRouter(nn.Module):
    """As transformers': a bare weight of one row per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.zeros(4, 8))
        self.bias = nn.Parameter(torch.zeros(4))


class Stack(nn.Module):
    """As transformers': experts in stacks, and the flags that say how they are stored."""

    def __init__(self, gate_up: tuple[int, ...], down: tuple[int, ...], **flags: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(gate_up))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(gate_up[0], 12))
        self.down_proj = nn.Parameter(torch.zeros(down))
        for name, value in flags.items():
            setattr(self, name, value)


FLAGS = {"has_gate": True, "is_transposed": False, "is_concatenated": True}


@pytest.mark.parametrize(
    ("gate_up", "down", "flags", "spec"),
    [
        ((3, 12, 8), (3, 8, 6), {}, ("rows", (6, 6))),
        ((3, 12, 6), (3, 6, 6), {}, ("rows", (6, 6))),
        ((3, 12, 8), (3, 8, 6), {"is_concatenated": False}, ("interleaved", 6, (1, 1))),
        ((3, 8, 12), (3, 6, 8), {"is_transposed": True}, ("cols", (6, 6))),
    ],
)
def test_expert_stacks_that_say_how_they_are_stored(
    gate_up: tuple[int, ...], down: tuple[int, ...], flags: dict[str, bool], spec: tuple[Any, ...]
) -> None:
    muon, adamw = param_groups(Stack(gate_up, down, **(FLAGS | flags)))
    assert [n for n, _ in muon["params"]] == ["gate_up_proj", "down_proj"]
    assert muon["matrices"] == (spec, ("batch",))
    assert [n for n, _ in adamw["params"]] == ["gate_up_proj_bias"]


@pytest.mark.parametrize(
    ("gate_up", "down", "flags"),
    [
        ((3, 8, 12), (3, 6, 8), {"is_transposed": True, "is_concatenated": False}),  # gpt-oss
        ((3, 8, 12), (3, 6, 8), {}),  # stored otherwise than it says
        ((3, 12, 8), (3, 8, 6), {"is_transposed": True}),
        ((3, 12, 8), (2, 8, 6), {}),
        ((3, 12, 8), (3, 8, 6), {"is_concatenated": None}),  # Llama 4: does not say
    ],
)
def test_other_expert_stacks_are_refused(
    gate_up: tuple[int, ...], down: tuple[int, ...], flags: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"cannot tell which optimizer gate_up_proj \[3, .* of Stack needs"):
        param_groups(Stack(gate_up, down, **(FLAGS | flags)))


def test_routers() -> None:
    class Declared(nn.Linear):
        is_router = True

    class Block(nn.Module):
        def __init__(self, router: nn.Module) -> None:
            super().__init__()
            self.gate = router
            self.experts = Stack((4, 12, 8), (4, 8, 6), **FLAGS)

    model = nn.ModuleDict(
        {"a": Block(TopRouter()), "b": Block(nn.Linear(8, 4)), "c": Declared(8, 4), "gate": nn.Linear(8, 4)}
    )
    routers = {"a.gate.weight", "b.gate.weight", "c.weight"}
    assert {n for n, a in chosen(model).items() if a == "muon"} >= routers | {"gate.weight"}
    groups = param_groups(model, router="adamw", non_matrix="scion")
    assert {n for n, _ in groups[2]["params"]} == routers and groups[2]["algorithm"] == "adamw"
    assert {"a.gate.bias", "b.gate.bias", "c.bias"} <= {n for n, _ in groups[1]["params"]}  # vectors like any other
    with pytest.raises(ConfigError, match=r"router='adamw' finds no router in Bare: .*is_router = True"):
        param_groups(Bare(), router="adamw")
    assert set(chosen(model, router="adamw", algorithm="adamw").values()) == {"adamw"}


def test_heads_by_themselves() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.kv_b_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(6, 10), nn.Linear(8, 8)

        def query_key_heads(self) -> dict[str, Any]:
            rows = {"q_proj.weight": (4, (2,)), "q_proj.bias": (4, (2,)), "kv_b_proj.weight": (2, (2, 3))}
            return {"kind": "gqa", "rows": rows}

    model = nn.ModuleList([Attention(), nn.Linear(8, 8)])
    groups = param_groups(model, heads="split", matrices={"1.weight": ("cols", [4, 4])})
    names = [n for n, _ in groups[0]["params"]]
    assert dict(zip(names, groups[0]["matrices"], strict=True)) == {
        "0.q_proj.weight": ("heads", 4),
        "0.kv_b_proj.weight": ("heads", 2, (2, 3)),
        "0.o_proj.weight": ("matrix",),
        "1.weight": ("cols", (4, 4)),
    }
    lines = [" ".join(line.split()) for line in describe(groups).splitlines()]
    assert "muon *.q_proj.weight 1 64 4 of 2 x 8 by heads (Attention)" in lines
    assert "muon *.kv_b_proj.weight 1 60 2 of 2 x 6 + 2 of 3 x 6 by heads (Attention)" in lines
    assert set(param_groups(model)[0]["matrices"]) == {("matrix",)}
    with pytest.raises(ConfigError, match="heads='split' finds no heads in Linear: .*query_key_heads"):
        param_groups(nn.Linear(2, 2), heads="split")
