"""The name tables describe our modules, and what transformers writes."""

import math

import torch
from safetensors import safe_open

from earthshine.checkpoint.name_tables import entries
from earthshine.model.config import ModelConfig
from earthshine.model.counts import count_parameters
from earthshine.model.hf_config import to_hf
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer


def test_sizes_add_up_to_the_closed_form():
    for make in PRESETS.values():
        config = make()
        assert sum(math.prod(e.shape) for e in entries(config)) == count_parameters(config).total, make.__name__


def test_names_are_unique_and_cover_our_model(config: ModelConfig):
    listed = entries(config)
    assert len({e.hf for e in listed}) == len(listed)
    shapes: dict[str, tuple[int, ...]] = {}
    for e in listed:
        stack = sum(o.ours == e.ours for o in listed)
        assert e.expert in ({-1} if stack == 1 else range(stack))
        shapes[e.ours] = e.shape if e.expert < 0 else (stack, *e.shape)
    with torch.device("meta"):
        model = Transformer(config)
    assert shapes == {n: tuple(t.shape) for n, t in model.state_dict().items()}


def test_the_same_matrix_of_all_experts_stands_together(config: ModelConfig):
    order = [e.ours for e in entries(config)]
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(runs) == len(set(runs))


def test_names_and_shapes_are_those_that_transformers_saves(config: ModelConfig, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = to_hf(config)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf.pop("model_type"), **hf))
    theirs.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        saved = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (no iterator)
    assert saved == {e.hf: e.shape for e in entries(config)}
