"""Models that PEFT has changed: who gets Muon, and that what is trained moves as it should."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tiny_training import MUON, batches, tiny

from earthshine import Muon, param_groups

pytestmark = [
    pytest.mark.skipif(find_spec("peft") is None, reason="needs peft: pip install 'earthshine[trainers]'"),
    # PEFT asks transformers in a way that it has deprecated, and warns of tied weights.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:Model has .tie_word"),
]


def adapted(model: Any, **options: Any) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options))


def who(model: Any, **options: Any) -> dict[str, tuple[str, Any]]:
    """Name, without what PEFT puts before it -> algorithm and, for Muon, what the parameter holds."""
    got: dict[str, tuple[str, Any]] = {}
    for group in param_groups(model, **options):
        specs = group.get("matrices", (None,) * len(group["params"]))
        for (name, _), spec in zip(group["params"], specs, strict=True):
            got[name.removeprefix("base_model.model.").removeprefix("model.")] = group["algorithm"], spec
    return got


def test_low_rank_factors_are_a_matrix_each_and_one_step_moves_them() -> None:
    model = adapted(tiny(), target_modules=["q_proj", "v_proj"])
    assert set(who(model).values()) == {("muon", ("matrix",))}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Muon(param_groups(model), **(MUON | {"weight_decay": 0.0}))
    model(**batches(2)[0]).loss.backward()
    optimizer.step()
    # B is zero at first, and so A's gradient: B moves at once, A from the second step on.
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora_B" in name}


def test_magnitudes_are_adamw_s() -> None:
    got = who(adapted(tiny(), target_modules=["q_proj"], use_dora=True))
    assert {name: algorithm for name, (algorithm, _) in got.items() if "magnitude" in name} == {
        "layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight": "adamw"
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_of_the_head_and_the_embedding_are_adamw_s(tied: bool, saved: list[str]) -> None:
    model = adapted(tiny(tie_word_embeddings=tied), target_modules=["q_proj"], modules_to_save=saved)
    got = who(model)
    copies = {name: algorithm for name, (algorithm, _) in got.items() if "modules_to_save" in name}
    assert len(copies) == len(saved) and set(copies.values()) == {"adamw"}


def test_factors_of_the_head_are_the_head() -> None:
    got = who(adapted(tiny(), target_modules=["q_proj", "lm_head"]))
    assert {algorithm for name, (algorithm, _) in got.items() if "lm_head" in name} == {"adamw"}


def test_a_copied_classifier_is_asked_about() -> None:
    from earthshine.errors import ConfigError

    def make() -> Any:
        return adapted(tiny(task="ForSequenceClassification"), target_modules=["q_proj"], task_type="SEQ_CLS")

    with pytest.raises(ConfigError, match=r"score\.modules_to_save\.default\.weight \[2, 16\] may be the head"):
        param_groups(make())
    got = who(make(), adamw=["*.score.modules_to_save.default.weight"])
    assert got["score.modules_to_save.default.weight"][0] == "adamw"


def test_a_fused_layer_with_factors_is_no_question() -> None:
    """The fused weight is frozen; its factors are PEFT's."""
    names = who(adapted(tiny("Phi3"), target_modules=["qkv_proj", "gate_up_proj"]))
    assert names and all("lora" in name for name in names)


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
def test_factors_of_a_stack_of_experts_are_a_matrix_per_expert(which: str) -> None:
    """The matrices that param_groups names in a factor of several experts are the factors of the single ones."""
    from peft.tuners.lora.layer import ParamWrapper

    model = adapted(tiny("Qwen3Moe"), target_modules=["q_proj"], target_parameters=[f"mlp.experts.{which}"])
    (wrapper,) = (m for m in model.modules() if isinstance(m, ParamWrapper))
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    got = who(model)
    assert got["layers.0.mlp.experts.lora_A.default.weight"] == ("muon", ("heads", 4))
    assert got["layers.0.mlp.experts.lora_B.default.weight"] == ("muon", ("interleaved_cols", 4))
    expert = 2
    with torch.no_grad():
        A.normal_()
        B.zero_()
        B[:, expert::4] = 1.0
        whole = wrapper.get_delta_weight("default")
        A.view(4, 2, -1)[[0, 1, 3]] = 0.0
    assert [bool(delta.any()) for delta in whole] == [i == expert for i in range(4)]
    assert torch.equal(whole, wrapper.get_delta_weight("default"))
