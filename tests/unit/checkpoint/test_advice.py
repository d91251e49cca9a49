"""A directory without weights: the message says what is there, and what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from earthshine.checkpoint.safetensors_store import INDEX_FILE, Store
from earthshine.errors import WeightsError
from earthshine.model.config import ModelConfig


@pytest.mark.parametrize(
    "files, says",
    [
        (["pytorch_model.bin"], r"but pytorch_model.bin: pickled weights are not read.*safetensors, with python -c"),
        (["pytorch_model-00001-of-00002.bin"], r"AutoModelForCausalLM as A; A.from_pretrained\(.*save_pretrained\("),
        (["consolidated.00.pth"], r"but consolidated.00.pth: pickled weights are not read. Fetch the model in"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], r"and 1 more: the index of these"),
        (["adapter.safetensors"], r"but adapter.safetensors: rename it to model.safetensors if it holds all weights"),
        ([], r"neither model.safetensors nor model.safetensors.index.json: no weights to read. Fetch them again"),
    ],
)
def test_what_is_there_instead(files: list[str], says: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=says):
        Store(tmp_path)


def test_a_stale_index(hf_dir: Callable[..., Path], dense: ModelConfig) -> None:
    directory = hf_dir(dense)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    (directory / INDEX_FILE).write_text('{"weight_map": {"model.embed_tokens.weight": "a.safetensors"}}')
    with pytest.raises(WeightsError, match=f"a.safetensors holds lm_head.weight, but {INDEX_FILE} does not list it"):
        Store(directory)
