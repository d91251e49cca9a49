"""Sampling: greedy equals uncached argmax, seeds decide, ends stop, and bad prompts are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.errors import ConfigError, TrainingDivergedError
from earthshine.evaluate.generate import generate, stop_ids
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize


@pytest.fixture(scope="module", params=["llama3_tiny_e8t2", "moonlight_tiny"])
def model(request: pytest.FixtureRequest) -> Transformer:
    built = Transformer(PRESETS[request.param]())
    initialize(built, seed=0)
    return built


def test_greedy_with_a_cache_equals_argmax_without(model: Transformer) -> None:
    ids = [5, 17, 99]
    out = generate(model, ids, max_new_tokens=6, eos_ids=())
    for n in range(6):
        with torch.no_grad():
            assert int(model.eval()(torch.tensor([ids + out[:n]]))[0, -1].argmax()) == out[n]


def test_the_seed_decides_and_top_k_of_one_is_greedy(model: Transformer) -> None:
    sample = [generate(model, [1], max_new_tokens=8, temperature=1.0, seed=s, eos_ids=()) for s in (3, 3, 4)]
    assert sample[0] == sample[1] != sample[2]
    one = generate(model, [1], max_new_tokens=8, temperature=1.0, top_k=1, eos_ids=())
    assert one == generate(model, [1], max_new_tokens=8, eos_ids=())


def test_the_coldest_temperature_is_greedy(model: Transformer) -> None:
    assert generate(model, [1], max_new_tokens=3, temperature=1e-300) == generate(model, [1], max_new_tokens=3)


def test_stops_at_an_end_token_without_returning_it(model: Transformer) -> None:
    whole = generate(model, [1], max_new_tokens=5, eos_ids=())
    assert generate(model, [1], max_new_tokens=5, eos_ids=(whole[2],)) == whole[: whole.index(whole[2])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_nothing(
    temperature: float, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """argmax would take the NaN's id, and a greedy text of broken weights would look like a text."""
    broken = Transformer(PRESETS["llama3_tiny"]())
    initialize(broken, seed=0)
    broken.train()
    right, calls = broken.next_token_logits, []

    def wrong_at_last(*args: Any) -> torch.Tensor:
        calls.append(args)
        logits_BV = right(*args)
        logits_BV[0, 7] = bad if len(calls) == 3 else logits_BV[0, 7]
        return logits_BV

    with monkeypatch.context() as patch:
        patch.setattr(broken, "next_token_logits", wrong_at_last)
        with pytest.raises(TrainingDivergedError, match=r"after position 5 \(3 tokens of the prompt and 2 new ones\)"):
            generate(broken, [5, 17, 99], max_new_tokens=4, temperature=temperature, eos_ids=())
    assert broken.training
    with torch.no_grad():
        broken.final_norm.weight[0] = bad
    with pytest.raises(TrainingDivergedError, match="after position 1 "):
        generate(broken, [5], temperature=temperature)


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([], {}, "no tokens"),
        ([2048], {}, "2048 is outside the model's vocabulary of 2048"),
        ([1], {"max_new_tokens": 512}, "exceed the model's 512 positions; lower max_new_tokens to at most 511"),
        ([1] * 512, {"max_new_tokens": 1}, "its 512 tokens leave no room .*; shorten it to at most 511"),
        ([1], {"temperature": -1.0}, "temperature=-1.0 must be a finite number of at least 0"),
        ([1], {"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ([1], {"temperature": float("nan")}, "temperature=nan"),
        ([1], {"seed": 2**70}, "seed="),
    ],
)
def test_bad_requests_are_refused(model: Transformer, ids: list[int], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, ids, **options)


def test_the_generation_config_adds_ids_that_end_a_text(tmp_path: Path) -> None:
    config = replace(PRESETS["llama3_tiny"](), eos_token_ids=(3,))
    assert stop_ids(tmp_path, config) == (3,)
    path = tmp_path / "generation_config.json"
    for text, ids in (('{"eos_token_id": [3, 7]}', (3, 7)), ('{"eos_token_id": 9}', (3, 9)), ("{}", (3,))):
        path.write_text(text)
        assert stop_ids(tmp_path, config) == ids
    path.write_text("[")
    with pytest.raises(ConfigError, match="not a readable generation config"):
        stop_ids(tmp_path, config)


@pytest.mark.parametrize("eos", ["2", True, {"a": 1}, [[1]], [None], 2.0, [1, "2"], -1])
def test_an_end_token_of_another_type_is_refused(tmp_path: Path, eos: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ConfigError, match="eos_token_id=.* must be a token id or a list of them"):
        stop_ids(tmp_path, PRESETS["llama3_tiny"]())
