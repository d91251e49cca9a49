"""Who gets Muon: a small zoo of modules, refusals, freezing, and logical matrices that must fit."""

from typing import Any

import pytest
import torch
from torch import nn

from earthshine.errors import ConfigError
from earthshine.optim.groups import describe, logical_units, param_groups


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
    def __init__(self, *, vocab: int = 12, tied: bool = False, head: str = "lm_head") -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, 8)
        self.norm = nn.RMSNorm(8)
        self.router = nn.Linear(8, 4, bias=False)
        self.shared_gate = nn.Linear(8, 1, bias=False)
        self.up = nn.Linear(8, 12)
        self.add_module(head, nn.Linear(8, vocab, bias=False))
        if tied:
            getattr(self, head).weight = self.wte.weight


def chosen(model: nn.Module, **options: Any) -> dict[str, str]:
    return {n: g["algorithm"] for g in param_groups(model, **options) for n, _ in g["params"]}


def test_language_model() -> None:
    assert chosen(Language()) == {
        "router.weight": "muon",
        "up.weight": "muon",
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
    groups = param_groups(model)
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
    with pytest.raises(ConfigError, match=r"final\.weight \[12, 8\] may be the head.*adamw=\['final\.weight'\]"):
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
    assert set(chosen(model, freeze=["wte.*", "norm.weight", "up.*", "shared*"])) == {"router.weight"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["router.weight"]
    assert set(chosen(model)) == {"router.weight"}  # frozen before stays frozen
    with pytest.raises(ConfigError, match="freeze pattern 'blocks.*' matches none of the 7 parameters"):
        param_groups(Language(), freeze=["blocks.*"])
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        param_groups(Language(), freeze=["*"])


@pytest.mark.parametrize(
    ("shape", "spec", "matrices"),
    [
        ((4, 6), ("matrix",), [(0, 4, 4, 6)]),
        ((2, 4, 6), ("batch",), [(0, 1, 4, 6), (1, 2, 4, 6)]),
        ((2, 3, 4, 6), ("batch",), [(0, 1, 4, 6), (1, 2, 4, 6)]),  # three matrices to a unit
        ((6, 4), ("rows", (4, 2)), [(0, 4, 4, 4), (4, 6, 2, 4)]),
        ((6, 2, 3, 3), ("flatten", 2), [(0, 3, 3, 18), (3, 6, 3, 18)]),
    ],
)
def test_logical_units(shape: tuple[int, ...], spec: tuple[Any, ...], matrices: list[tuple[int, ...]]) -> None:
    assert [(u.start, u.stop, u.rows, u.cols) for u in logical_units(shape, spec)] == matrices


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((2, 4, 6), ("matrix",)),
        ((4, 6), ("batch",)),
        ((6, 4), ("rows", (4, 3))),
        ((6, 4), ("rows", (6, 0))),
        ((6, 4), ("rows", (8, -2))),
        ((6, 4), ("rows",)),
        ((5, 2, 3), ("flatten", 2)),
        ((4, 6), ("columns", (3, 3))),
        ((4, 6), ()),
    ],
)
def test_a_split_that_does_not_fit_is_an_error(shape: tuple[int, ...], spec: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="w of shape .* cannot be divided into logical matrices by"):
        logical_units(shape, spec, "w")


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
    assert "muon in all 4 152" in lines
