"""A Hugging Face directory as a model: every value in its place, and every way in which a directory can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from earthshine.checkpoint.load import load_model
from earthshine.checkpoint.name_tables import entries
from earthshine.errors import ConfigError, UnsupportedModelError, WeightsError
from earthshine.model.config import ModelConfig

Q = "model.layers.1.self_attn.q_proj.weight"


def test_experts_land_in_their_place(config: ModelConfig, hf_dir):
    source = hf_dir(config)
    tensors, state = load_file(source / "model.safetensors"), load_model(source).state_dict()
    for e in entries(config):
        ours = state[e.ours] if e.expert < 0 else state[e.ours][e.expert]
        assert torch.equal(ours, tensors[e.hf]), e.hf


def test_parameters_in_float64(dense, hf_dir):
    model = load_model(hf_dir(dense), dtype=torch.float64)
    assert model.compute_dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in model.parameters())


def poison(tensors, name, value):
    tensors[name][-1, -1] = value


def test_values_that_a_narrower_type_cannot_hold_are_refused(dense, hf_dir):
    source = hf_dir(dense, lambda t: poison(t, Q, 1e6), dtype=torch.bfloat16)
    assert load_model(source).blocks[1].attn.q_proj.weight[-1, -1] == torch.tensor(1e6).bfloat16()
    with pytest.raises(WeightsError, match=f"{Q} holds values that torch.float16 cannot"):
        load_model(source, dtype=torch.float16)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_config_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path)


def test_an_unknown_family(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        load_model(tmp_path)


def test_shards_are_read_like_one_file(dense, hf_dir):
    source = hf_dir(dense)
    expected = load_model(source).state_dict()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({n: tensors[n] for n in part}, source / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{i}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    state = load_model(source).state_dict()
    assert all(torch.equal(state[n], t) for n, t in expected.items())


def test_settings_without_effect_are_logged(
    hf_dir: Callable[..., Path], dense: ModelConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = hf_dir(dense)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pretraining_tp": 2}))
    load_model(directory)
    assert f"{directory}/config.json: pretraining_tp=2 changes nothing" in capfd.readouterr().err
