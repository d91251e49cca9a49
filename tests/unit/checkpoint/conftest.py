"""Tiny models as Hugging Face directories."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from earthshine.checkpoint.name_tables import entries
from earthshine.model.config import ModelConfig, MoEConfig
from earthshine.model.hf_config import to_hf

DENSE = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
MODELS = {
    "llama": DENSE,
    "llama_tied": replace(DENSE, tie_word_embeddings=True),
    "mixtral": replace(DENSE, moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24, layers=(0, 1, 2))),
    "qwen2_moe": replace(
        DENSE,
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=20, layers=(1,), shared_intermediate_size=8),
    ),
}


@pytest.fixture(params=list(MODELS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture
def dense() -> ModelConfig:
    return DENSE


@pytest.fixture
def hf_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a model's directory with the safetensors library; `change` edits its tensors first."""

    def write(
        config: ModelConfig,
        change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
        dtype: torch.dtype = torch.float32,
        name: str = "model",
    ) -> Path:
        generator = torch.Generator().manual_seed(1)
        tensors = {e.hf: torch.randn(e.shape, generator=generator).to(dtype) for e in entries(config)}
        change(tensors)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf(config, str(dtype).removeprefix("torch."))))
        return folder

    return write
