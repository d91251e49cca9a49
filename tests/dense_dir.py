"""Tiny dense models as Hugging Face directories, written with the safetensors library."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from earthshine.checkpoint.name_tables import entries
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import to_hf


@pytest.fixture
def dense_dir(tmp_path: Path) -> Callable[..., Path]:
    """Writes a directory of random weights of about unit gain.

    `change` edits its tensors before they are saved; `fields` are further ones of its config: a Llama's without any.
    """

    def write(
        change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
        *,
        dtype: torch.dtype = torch.float32,
        **fields: object,
    ) -> Path:
        config = replace(
            ModelConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=64,
                eos_token_ids=(2,),
            ),
            **fields,
        )
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for e in entries(config):
            drawn = torch.randn(e.shape, generator=generator)
            tensors[e.hf] = (1 + 0.1 * drawn if len(e.shape) == 1 else drawn * e.shape[-1] ** -0.5).to(dtype)
        change(tensors)
        folder = tmp_path / "dense"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf(config, str(dtype).removeprefix("torch."))))
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
        (folder / "README.md").write_text("another model's card")
        return folder

    return write
