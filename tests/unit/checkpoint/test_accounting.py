"""Every tensor of a directory is matched once, and every way in which one does not fit is named."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from earthshine.checkpoint.export import export
from earthshine.checkpoint.load import load_model
from earthshine.checkpoint.name_tables import entries
from earthshine.checkpoint.safetensors_store import Store
from earthshine.errors import WeightsError
from earthshine.model.config import ModelConfig

Q = "model.layers.1.self_attn.q_proj.weight"


def stacked(config: ModelConfig, tensors: dict[str, torch.Tensor], layers: tuple[int, ...]) -> None:
    """The experts of some layers as transformers 5 holds them: [E, 2F, D], gate before up, and [E, D, F]."""
    for layer in layers:
        at, mixtral = f"model.layers.{layer}.mlp.", config.family == "mixtral"
        old = f"model.layers.{layer}.block_sparse_moe." if mixtral else at
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        stack = [
            [tensors.pop(f"{old}experts.{e}.{matrix}.weight") for e in range(config.moe.num_experts)]
            for matrix in (gate, up, down)
        ]
        tensors[f"{at}gate.weight"] = tensors.pop(f"{old}gate.weight")
        tensors[f"{at}experts.gate_up_proj"] = torch.cat([torch.stack(stack[0]), torch.stack(stack[1])], 1)
        tensors[f"{at}experts.down_proj"] = torch.stack(stack[2])


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("all_layers", [True, False])
def test_stacked_experts_are_read_expert_by_expert(models, hf_dir, family, all_layers, tmp_path, monkeypatch):
    """Also where only some layers are stacked; what is read at a time is at most one expert's matrix."""
    config = models[family]
    layers = config.moe.layers if all_layers else config.moe.layers[:1]
    one_by_one = load_model(hf_dir(config, name="a")).state_dict()
    source, read, sizes = hf_dir(config, lambda t: stacked(config, t, layers), name="b"), Store.read, []

    def watched(self, name, slices=None):
        part = read(self, name, slices)
        if name.endswith(("gate_up_proj", "down_proj")):
            sizes.append(part.numel())
        return part

    monkeypatch.setattr(Store, "read", watched)
    state = load_model(source).state_dict()
    assert set(state) == set(one_by_one)
    assert all(torch.equal(state[n], t) for n, t in one_by_one.items())
    assert len(sizes) == 3 * len(layers) * config.moe.num_experts
    assert max(sizes) == config.hidden_size * config.moe.intermediate_size
    export(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == {e.hf for e in entries(config)}, "only the per-expert layout is written"
    for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(written[name], tensor), name


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({GATE_UP: t[GATE_UP][:, 1:].contiguous()}), f"{GATE_UP} has shape .*demands .4, 40, 16."),
        (lambda t: t.pop(GATE_UP), r"no tensor model.layers.1.mlp.experts.0.gate_proj.weight"),
        (lambda t: t.update({GATE_UP: t[GATE_UP] * float("inf")}), f"{GATE_UP} holds"),
        (lambda t: t.update({GATE_UP: t[GATE_UP].to(torch.int16)}), f"{GATE_UP} is torch.int16"),
        (
            lambda t: t.update(
                {f"model.layers.1.mlp.experts.{e}.up_proj.weight": torch.ones(20, 16) for e in range(4)}
            ),
            f"has parts of tensor {GATE_UP} a second time",
        ),
    ],
)
def test_stacks_that_do_not_fit_are_named(models, hf_dir, change, message):
    config = models["qwen3_moe"]

    def damaged(tensors):
        stacked(config, tensors, config.moe.layers)
        change(tensors)

    with pytest.raises(WeightsError, match=message):
        load_model(hf_dir(config, damaged))


def test_layers_for_multi_token_prediction_are_left_out_and_reported(hf_dir, deepseek, capsys):
    """As in DeepSeek-V3, whose layer 61 is one; transformers leaves it out as well."""

    def with_mtp(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = tensors[name] + 1
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(16, 32)
        tensors["model.layers.3.shared_head.head.weight"] = torch.ones(40, 16)

    source = hf_dir(deepseek, with_mtp)
    assert load_model(source).config == deepseek
    log = capsys.readouterr().err
    assert "more left out: of a layer for multi-token prediction" in log and log.count("\n") == 1
    with pytest.raises(WeightsError, match=r"holds the tensor model.layers.3.input_layernorm.weight, which nothing"):
        load_model(hf_dir(deepseek, lambda t: (with_mtp(t), t.pop("model.layers.3.eh_proj.weight")), name="b"))


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


def poison(tensors, name, value):
    tensors[name][-1, -1] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"no tensor {Q}"),
        (lambda t: t.pop("lm_head.weight"), "no tensor lm_head.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "tensor extra, which nothing"),
        (lambda t: rename(t, Q, Q.replace("q_proj", "q_prj")), f"q_prj.*Did you mean '{Q}'"),
        (lambda t: t.update({Q: torch.ones(24, 17)}), re.escape("shape [24, 17]") + ".*" + re.escape("[24, 16]")),
        (lambda t: t.update({Q: t[Q].mT.contiguous()}), "shape"),
        (lambda t: t.update({Q: t[Q].to(torch.int32)}), "int32"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), "float8"),
        (lambda t: poison(t, Q, float("nan")), f"{Q} holds a NaN"),
        (lambda t: poison(t, Q, float("inf")), f"{Q} holds"),
    ],
)
def test_tensors_that_do_not_fit_are_named(dense, hf_dir, change, message):
    with pytest.raises(WeightsError, match=message):
        load_model(hf_dir(dense, change))


def test_old_buffers_and_a_tied_copy_are_left_out_and_reported(hf_dir, dense, capsys):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load_model(hf_dir(replace(dense, tie_word_embeddings=True), change))
    assert model.head is None
    log = capsys.readouterr().err
    assert "inv_freq left out: computed" in log
    assert "lm_head.weight left out: a copy of the tied" in log


def test_a_tied_copy_that_differs_is_refused(hf_dir, dense):
    config = replace(dense, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(hf_dir(config, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})))


def test_a_config_that_claims_more_than_there_is_is_refused_before_memory_is_taken(dense, hf_dir):
    source = hf_dir(dense)
    hf = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(hf | {"vocab_size": 10**12}))
    with pytest.raises(WeightsError, match="demands .1000000000000, 16."):
        load_model(source)


def test_tensors_without_elements_are_left_out_and_reported(hf_dir, deepseek, capsys):
    """transformers writes them for a DeepSeek without a shared expert."""
    bare = replace(deepseek, moe=replace(deepseek.moe, shared_intermediate_size=0, shared_gated=True))
    name = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    model = load_model(hf_dir(bare, lambda t: t.update({name: torch.empty(0, 16)})))
    assert model.config == bare
    assert f"{name} left out: without elements" in capsys.readouterr().err


def test_only_the_output_matrix_is_missing(hf_dir: Callable[..., Path], dense: ModelConfig) -> None:
    def untie(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]

    directory = hf_dir(dense, untie)
    with pytest.raises(WeightsError, match="no tensor lm_head.weight.*set tie_word_embeddings to true in config.json"):
        load_model(directory)


@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.rotary_emb.inv_freq",
    ],
)
def test_rotary_tables_of_any_version_are_left_out(
    name: str, hf_dir: Callable[..., Path], dense: ModelConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    load_model(hf_dir(dense, lambda tensors: tensors.update({name: torch.ones(3)})))
    assert f"{name} left out: computed from the config." in capfd.readouterr().err
