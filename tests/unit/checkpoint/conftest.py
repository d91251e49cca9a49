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
from earthshine.model.config import MLAConfig, ModelConfig, MoEConfig
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
SOME = MoEConfig(num_experts=4, top_k=2, intermediate_size=20, layers=(1, 2))
SHARED = replace(SOME, layers=(1,), shared_intermediate_size=8)
SIGMOID = replace(SOME, gate="sigmoid_bias", shared_intermediate_size=40, shared_gated=False)
MLA = MLAConfig(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
DEEPSEEK = replace(DENSE, num_key_value_heads=4, head_dim=10, mla=MLA, moe=SIGMOID)
MODELS = {
    "llama": DENSE,
    "llama_tied": replace(DENSE, tie_word_embeddings=True),
    "mistral": replace(DENSE, model_type="mistral"),
    "qwen2": replace(DENSE, qkv_bias=True),
    "qwen3": replace(DENSE, qk_norm=True),
    "mixtral": replace(DENSE, moe=replace(SOME, intermediate_size=24, layers=(0, 1, 2))),
    "qwen2_moe": replace(DENSE, moe=SHARED),
    "qwen2_moe_bias": replace(DENSE, qkv_bias=True, moe=SHARED),
    "qwen3_moe": replace(DENSE, qk_norm=True, moe=SOME),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_q_lora": replace(DEEPSEEK, mla=replace(MLA, q_lora_rank=10)),
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
        tensors = {e.hf: torch.randn(e.shape, generator=generator).to(e.dtype(dtype)) for e in entries(config)}
        change(tensors)
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf(config, str(dtype).removeprefix("torch."))))
        return folder

    return write


@pytest.fixture
def deepseek() -> ModelConfig:
    return DEEPSEEK


@pytest.fixture
def models() -> dict[str, ModelConfig]:
    return MODELS
