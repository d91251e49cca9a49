"""What may make a model's output is asked about, wherever it stands, and the message obeyed once is enough."""

import re
from ast import literal_eval
from typing import Any

import pytest
from torch import nn

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups

V, D = 101, 16


def hidden(inner: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, inner), nn.GELU(), nn.Linear(inner, D))


class Swapped(nn.Module):
    """A block whose last layer is not the one that leaves it, and whose key heads are fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, 4), nn.Linear(D, D)
        self.w1, self.w2, self.w3 = nn.Linear(D, 3 * V), nn.Linear(3 * V, D), nn.Linear(D, 3 * V)


class Language(nn.Module):
    """Blocks between an embedding and a norm; what is given comes first, or last."""

    def __init__(self, first: dict[str, nn.Module] | None = None, positions: int = 0, **last: nn.Module) -> None:
        super().__init__()
        if positions:
            self.positions = nn.Embedding(positions, D)
        self.tokens = nn.Embedding(V, D)
        for name, module in (first or {}).items():
            self.add_module(name, module)
        self.layers = nn.ModuleList([hidden(), hidden(), Swapped()])
        self.norm = nn.LayerNorm(D)
        for name, module in last.items():
            self.add_module(name, module)


def head(rows: int = V) -> nn.Linear:
    return nn.Linear(D, rows, bias=False)


class Medusa(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)


def tied_by_config() -> Language:
    model = Language(output=head())
    model.config = type("Config", (), {"tie_word_embeddings": True})()
    return model


def two_directions() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(head(D), nn.Tanh(), head(3)), "b": nn.Sequential(head(D), head(5))})


MODELS: dict[str, tuple[Any, list[str]]] = {
    "last": (lambda: Language(output=head()), ["output"]),
    "before the blocks": (lambda: Language({"output": head()}), ["output"]),
    "a classifier before the blocks": (lambda: Language({"output": head(10)}), ["output"]),
    "before a value head": (lambda: Language(output=head(), value=head(1)), ["output"]),
    "a value head with a hidden layer": (
        lambda: Language(output=head(), v=nn.Sequential(head(D), head(1))),
        ["output"],
    ),
    "padded": (lambda: Language(output=head(128)), ["output"]),
    "smaller than the embedding": (lambda: Language(output=head(V - 1)), ["output"]),
    "among more positions than words": (lambda: Language(positions=512, output=head()), ["output"]),
    "several": (lambda: Language(heads=nn.ModuleList(map(head, [V] * 3))), ["heads.0", "heads.1", "heads.2"]),
    "beside a known head": (lambda: Language(lm_head=head(), extra=nn.ModuleList([head()])), ["extra.0"]),
    "multi-token, with hidden layers": (
        lambda: Language(lm_head=head(), medusa=nn.ModuleList(nn.Sequential(Medusa(), head()) for _ in range(2))),
        ["medusa.0.1", "medusa.1.1"],
    ),
    "at the end of a block of its own": (
        lambda: Language(
            lm_head=head(), ahead=nn.ModuleList(nn.ModuleDict({"block": Swapped(), "out": head()}) for _ in range(2))
        ),
        ["ahead.0.out", "ahead.1.out"],
    ),
    "in a sequence": (lambda: Language(to_logits=nn.Sequential(nn.LayerNorm(D), head())), ["to_logits.1"]),
    "called tied": (tied_by_config, ["output"]),
    "a classifier": (lambda: Language(classifier=head(10)), ["classifier"]),
    "a classifier of as many classes as an image has channels": (
        lambda: Language(pixels=nn.Conv2d(3, D, 4), classifier=head(3)),
        ["classifier"],
    ),
    "a classifier beside a known head": (lambda: Language(lm_head=head(), relation=head(2)), ["relation"]),
    "two classifiers, each with a hidden layer": (lambda: Language(both=two_directions()), ["both.a.2", "both.b.1"]),
    "start and end of an answer": (lambda: Language(qa_outputs=head(2)), ["qa_outputs"]),
    "a classifier of as many classes as an adapter has columns": (
        lambda: Language(more=nn.ModuleList([nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D))] * 2), score=head(4)),
        ["score"],
    ),
    "a classifier of as many classes as hidden layers have columns": (lambda: Language(score=head(32)), ["score"]),
    "a classifier of as many classes as there are coordinates": (
        lambda: Language(
            more=nn.ModuleList([nn.ModuleDict({"bias": nn.Linear(2, 30), "norm": nn.LayerNorm(D), "o": head(D)})]),
            score=head(2),
        ),
        ["score"],
    ),
    "after no linear layer": (
        lambda: nn.ModuleDict({"words": nn.Embedding(V, D), "conv": nn.Conv1d(D, D, 3), "fc": head(10)}),
        ["fc"],
    ),
    "wrapped": (lambda: nn.ModuleDict({"pretrained": Language(score=head(7)), "value": head(1)}), ["pretrained.score"]),
    "wrapped in a sequence": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 5))),
        ["1.1"],
    ),
    "two models": (
        lambda: nn.ModuleDict({"a": Language(output=head()), "b": Language(output=head(60))}),
        ["a.output", "b.output"],
    ),
    "no embedding": (lambda: nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)), ["2"]),
    "no embedding, in parts": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 12)), nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 4))
        ),
        ["1.1"],
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)),
        ["4"],
    ),
    "two outputs without blocks": (
        lambda: nn.ModuleDict({"trunk": nn.Linear(30, 20), "a": nn.Linear(20, 4), "b": nn.Linear(20, 6)}),
        ["a", "b"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("by", ["adamw", "matrices"])
def test_possible_output_layers_are_asked_about_once(case: str, by: str) -> None:
    make, layers = MODELS[case]
    wanted = {f"{layer}.weight" for layer in layers}
    with pytest.raises(ConfigError, match="may be the head") as caught:
        param_groups(make())
    answer = literal_eval(re.search(rf"{by}=([\[{{].*?[\]}}])", str(caught.value))[1])  # type: ignore[index]
    groups = param_groups(make(), **{by: answer})
    why = {
        name: (group["algorithm"], reason)
        for group in groups
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }
    asked = {name for name, (_, reason) in why.items() if reason == "asked for"}
    assert asked == wanted
    assert {why[name][0] for name in asked} == {"adamw" if by == "adamw" else "muon"}


def beside_each_other(*sizes: tuple[int, int], **more: nn.Module) -> nn.Module:
    linears = {f"l{i}": nn.Linear(*size) for i, size in enumerate(sizes)}
    return nn.ModuleDict(linears | more)


@pytest.mark.parametrize(
    "model",
    [
        # hidden layers that are in no container, up and down again, gated or not
        beside_each_other((D, 3 * V), (3 * V, D), embed=nn.Embedding(V, D), lm_head=head()),
        beside_each_other((D, 3 * V), (D, 3 * V), (3 * V, D), embed=nn.Embedding(V, D), lm_head=head()),
        # collections that are no network with an end
        beside_each_other((24, 1), (1, 24), (24, 3), (3, 4097)),
        beside_each_other((24, 40), (30, 50), (7, 9)),
        beside_each_other((64, 40), (40, 64)),
        beside_each_other((8, 16), users=nn.Embedding(20, 8), things=nn.Embedding(30, 8)),
        nn.ModuleDict({"experts": nn.ModuleList(map(head, [12] * 3)), "norm": nn.LayerNorm(D)}),
        nn.ModuleDict({"gating": head(4), "experts": nn.ModuleList([hidden(), hidden()])}),
        Language(lm_head=head()),
        Language(),  # what comes out are hidden states
        Language(pooler=nn.Sequential(head(D), nn.Tanh())),
        Language(value=head(1)),
        Language(output=nn.AdaptiveLogSoftmaxWithLoss(D, V, [20, 50])),
        nn.Linear(4, 6),
        Swapped(),
        nn.ModuleDict({"gate": head(4), "experts": nn.ModuleList([hidden(), hidden()])}),
        nn.Sequential(*(hidden() for _ in range(3))),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_that_raise_no_question(model: nn.Module) -> None:
    param_groups(model)


def test_known_output_layers_are_adamw_s() -> None:
    class Answering(Language):
        def get_output_embeddings(self) -> nn.Module:
            return self.get_submodule("codebooks")

    models = [
        Answering(codebooks=nn.ModuleList(map(head, [V] * 2))),
        nn.ModuleDict({"wrapped": Answering(codebooks=nn.ModuleList(map(head, [V] * 2)))}),
        Language(output=nn.AdaptiveLogSoftmaxWithLoss(D, V, [20, 50])),
    ]
    for model in models:
        muon = [name for name, _ in param_groups(model)[0]["params"]]
        assert all("layers" in name for name in muon), muon


def test_a_tied_layer_is_the_embedding() -> None:
    model = Language(output=head())
    model.output.weight = model.tokens.weight
    assert "tokens.weight" in {name for name, _ in param_groups(model)[1]["params"]}


def test_frozen_layers_are_not_asked_about() -> None:
    param_groups(Language(output=head()), freeze=["output.*"])
    model = Language(output=head())
    model.output.requires_grad_(False)
    param_groups(model)


def test_a_pattern_in_the_message_matches_nothing_else() -> None:
    """Where * would take in another layer, each name is given."""
    with pytest.raises(ConfigError) as caught:
        param_groups(Language(heads=nn.ModuleList([head(), head()]), other=head(D)))
    assert "adamw=['heads.*.weight']" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        param_groups(Language(heads=nn.ModuleList([head(), head(), hidden()])))
    assert "adamw=['heads.0.weight', 'heads.1.weight']" in str(caught.value)
    clash = nn.ModuleDict(
        {"0": nn.Embedding(V, D), "1": nn.ModuleDict({"x": head(), "0": head()}), "2": head(), "3": head()}
    )
    with pytest.raises(ConfigError) as caught:
        param_groups(clash)
    assert "adamw=['1.x.weight', '1.0.weight', '2.weight', '3.weight']" in str(caught.value)
