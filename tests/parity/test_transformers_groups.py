"""Muon's groups of transformers' own models: the flags and sizes that the rules read are there, and are right."""

import re
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from earthshine.errors import ConfigError
from earthshine.optim.groups import param_groups
from earthshine.optim.logical_matrices import logical_matrices

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4} | {
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}


def test_a_mixtral_layer_and_the_experts_of_gpt_oss() -> None:
    small = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
    with torch.device("meta"):
        mixtral, gpt_oss = MixtralSparseMoeBlock(MixtralConfig(**small)), GptOssExperts(GptOssConfig(**small))
    muon = param_groups(mixtral)[0]
    assert dict(zip([n for n, _ in muon["params"]], muon["matrices"], strict=True)) == {
        "gate.weight": ("matrix",),
        "experts.gate_up_proj": ("rows", (6, 6)),
        "experts.down_proj": ("batch",),
    }
    with pytest.raises(ConfigError, match=r"gate_up_proj \[3, 8, 12\] of GptOssExperts"):
        param_groups(gpt_oss)


def build(name: str, task: str = "ForCausalLM", **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes))
    return getattr(transformers, name + task)._from_config(config, attn_implementation="eager").eval()


def on_meta(name: str, task: str, **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, task, **sizes)


def answers(model: nn.Module) -> dict[str, Any]:
    """What the message says to pass as matrices, obeyed once, and then enough."""
    with pytest.raises(ConfigError) as caught:
        param_groups(model)
    assert "not known here" not in str(caught.value)
    given = literal_eval(re.search(r"matrices=(\{.*?\}) ", str(caught.value))[1])  # type: ignore[index]
    param_groups(model, matrices=given)
    param_groups(model, adamw=literal_eval(re.search(r"adamw=(\[.*?\])", str(caught.value))[1]))  # type: ignore[index]
    return given


@contextmanager
def without(weight: Tensor, spec: Any, part: int, bias: Tensor | None) -> Iterator[None]:
    """One of the logical matrices of a weight is zero, with its bias."""
    kept = [t.detach().clone() for t in (weight, bias) if t is not None]
    with torch.no_grad():
        for start, stop in logical_matrices(weight.shape, spec)[part].rows:
            for t in (weight, bias):
                if t is not None:
                    t[start:stop] = 0
    yield
    with torch.no_grad():
        for t, old in zip([t for t in (weight, bias) if t is not None], kept, strict=True):
            t.copy_(old)


MOE = GROUPED | {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8, "num_labels": 10}


@pytest.mark.parametrize(
    ("name", "task", "sizes"),
    [
        ("Llama", "ForCausalLM", GROUPED),
        ("Llama", "ForCausalLM", GROUPED | {"tie_word_embeddings": True}),
        ("Llama", "Model", GROUPED),
        ("Qwen3Moe", "ForCausalLM", MOE),
        ("Mixtral", "ForCausalLM", MOE),
        ("DeepseekV3", "ForCausalLM", MOE | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
        ("Gemma", "ForCausalLM", GROUPED | {"head_dim": 8}),
        ("OPT", "ForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
        ("Bert", "ForMaskedLM", {}),
        ("Bert", "Model", {}),
        ("T5", "ForConditionalGeneration", T5),
        ("T5", "ForConditionalGeneration", T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
        ("Bart", "ForConditionalGeneration", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
        ("MusicgenDecoder", "MusicgenForCausalLM", {"num_codebooks": 3, "ffn_dim": 48}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_raise_no_question(name: str, task: str, sizes: dict[str, Any]) -> None:
    if task.startswith(name[:4]):
        with torch.device("meta"):
            config = getattr(transformers, f"{name}Config")(**(SIZES | sizes))
            model = getattr(transformers, task)(config)
    else:
        model = on_meta(name, task, **sizes)
    muon = [n for n, _ in param_groups(model)[0]["params"]]
    assert muon and not any("head" in n for n in muon)


@pytest.mark.parametrize(
    ("name", "task", "sizes", "wanted"),
    [
        ("Llama", "ForSequenceClassification", GROUPED, ["score"]),
        ("Llama", "ForTokenClassification", GROUPED, ["score"]),
        ("Llama", "ForQuestionAnswering", GROUPED, ["qa_outputs"]),
        ("Bert", "ForSequenceClassification", {"num_labels": 3}, ["classifier"]),
        ("Bert", "ForPreTraining", {}, ["cls.seq_relationship"]),
        ("Roberta", "ForSequenceClassification", {}, ["classifier.out_proj"]),
        ("T5", "ForSequenceClassification", T5, ["classification_head.out_proj"]),
        ("ConvNext", "ForImageClassification", IMAGE | {"hidden_sizes": [8, 16], "depths": [1, 1]}, ["classifier"]),
        (
            "ResNet",
            "ForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [2]} | IMAGE,
            ["classifier.1"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_classifiers_are_asked_about(name: str, task: str, sizes: dict[str, Any], wanted: list[str]) -> None:
    assert list(answers(on_meta(name, task, **sizes))) == [f"{layer}.weight" for layer in wanted]


def test_an_image_classifier_with_bare_parameters() -> None:
    """Its positions are in no module that says what they are; the message names them, and the classifier, at once."""
    with pytest.raises(ConfigError, match="position_embeddings.*classifier.weight .* may be the head") as caught:
        param_groups(on_meta("ViT", "ForImageClassification", **IMAGE))
    names = literal_eval(re.search(r"adamw=(\[.*?\])", str(caught.value))[1])  # type: ignore[index]
    assert len(names) == 2
    param_groups(on_meta("ViT", "ForImageClassification", **IMAGE), adamw=names)


def test_several_fused_layers_and_a_classifier_in_one_message() -> None:
    given = answers(on_meta("ModernBert", "ForSequenceClassification"))
    assert given == {
        "model.layers.0.attn.Wqkv.weight": ("rows", (32, 32, 32)),
        "model.layers.0.mlp.Wi.weight": ("rows", (48, 48)),
        "classifier.weight": ("matrix",),
    }
    gpt2 = answers(on_meta("GPT2", "ForSequenceClassification", **HEADS))
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == ("cols", (32, 32, 32))
    assert gpt2["score.weight"] == gpt2["transformer.h.0.mlp.c_fc.weight"] == ("matrix",)


def test_qwen3_next() -> None:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    sizes = MOE | linear | {"linear_value_head_dim": 4, "layer_types": ["linear_attention"]}
    given = answers(on_meta("Qwen3Next", "ForCausalLM", **sizes))
    assert given == {
        "model.layers.0.linear_attn.in_proj_qkvz.weight": ("interleaved", 2, (8, 8, 8, 8)),
        "model.layers.0.linear_attn.in_proj_ba.weight": ("interleaved", 2, (2, 2)),
    }


HEADS = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 32, "n_inner": 48, "rotary_dim": 4}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi3": ("qkv_proj", GROUPED),
    "GPTNeoX": ("query_key_value", {}),
    "GPTNeoXJapanese": ("query_key_value", {"intermediate_multiple_size": 2}),
    "Bloom": ("query_key_value", {"n_layer": 1, "n_head": 4}),
    "Mpt": ("Wqkv", {"d_model": 32, "n_heads": 4, "n_layers": 1}),
    "Persimmon": ("query_key_value", {"qk_layernorm": False}),
    "CodeGen": ("qkv_proj", HEADS),
    "GPTBigCode": ("c_attn", HEADS),
    "GPTBigCode of many": ("c_attn", HEADS | {"multi_query": False}),
    "Falcon": ("query_key_value", {"multi_query": True, "new_decoder_architecture": False}),
    "Falcon of many": ("query_key_value", {"multi_query": False, "new_decoder_architecture": False}),
    "Falcon of groups": ("query_key_value", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


@pytest.mark.parametrize("case", FUSED)
def test_the_parts_of_a_fused_projection_are_where_the_message_says(case: str) -> None:
    """Without its values attention has no output; without its queries, or its keys, the same one: all alike."""
    local, sizes = FUSED[case]
    model = build(case.partition(" ")[0], **sizes)
    (name,) = (n for n in answers(model) if local in n)
    spec = answers(model)[name]
    projection = model.get_submodule(name.removesuffix(".weight"))
    attention = model.get_submodule(name.removesuffix(f".{local}.weight"))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)  # large logits, biases that are not zero
    out: list[Tensor] = []
    last = [m for m in attention.modules() if isinstance(m, nn.Linear) and m is not projection][-1]
    last.register_forward_hook(lambda _, inputs, __: out.append(inputs[0].detach()))
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))

    def run() -> Tensor:
        with torch.no_grad():
            model(tokens)
        return out.pop()

    whole = run()
    number = len(logical_matrices(projection.weight.shape, spec))
    assert number == 3
    parts = []
    for part in range(3):
        with without(projection.weight, spec, part, projection.bias):
            parts.append(run())
    (empty,) = (i for i, x in enumerate(parts) if not x.any())
    one, other = (x for i, x in enumerate(parts) if i != empty)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one, whole, atol=1e-3)
