"""A tiny dense model as a Hugging Face directory."""

from pathlib import Path

import pytest

from earthshine.checkpoint.hf import save_model
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Transformer(PRESETS["llama3_tiny"]())
    initialize(model, seed=0)
    out = tmp_path_factory.mktemp("models") / "dense"
    save_model(model, model.config, out)
    return out
