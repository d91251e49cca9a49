"""A path without a model, a tokenizer or weights: the message says what is there, and what to do."""

from pathlib import Path

import pytest

from earthshine.checkpoint.safetensors_store import Store
from earthshine.data.tokenizer import load_tokenizer
from earthshine.errors import ConfigError, WeightsError
from earthshine.model.hf_config import read_hf_config


@pytest.mark.parametrize(
    "files, says",
    [
        (["pytorch_model.bin"], r"but pytorch_model.bin: pickled weights are not read.*safetensors, with python -c"),
        (["pytorch_model-00001-of-00002.bin"], r"AutoModelForCausalLM as A; A.from_pretrained\(.*save_pretrained\("),
        (["consolidated.00.pth"], r"but consolidated.00.pth: pickled weights are not read. Fetch the model in"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], r"and 1 more: the index of these"),
        (["weights.safetensors"], r"but weights.safetensors: rename it to model.safetensors if it holds all weights"),
        (["adapter_model.safetensors"], r"but adapter_model.safetensors: an adapter is not a model. Merge it"),
        (["consolidated.safetensors"], r"but consolidated.safetensors, whose names are not Hugging Face's"),
        (["q4.gguf"], r"q4.gguf is a GGUF file: convert it"),
        ([], r"neither model.safetensors nor model.safetensors.index.json: no weights to read. Fetch them again"),
    ],
)
def test_what_is_there_instead(files: list[str], says: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=says):
        Store(tmp_path)


def test_what_is_not_a_model_directory_is_named(tmp_path: Path) -> None:
    gguf, other = tmp_path / "m.bin", tmp_path / "notes.txt"
    gguf.write_bytes(b"GGUF" + bytes(8))
    other.write_text("hello")
    holder = tmp_path / "holder"
    holder.mkdir()
    (holder / "q4.gguf").write_bytes(b"GGUF")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    for path, says in (
        (gguf, "m.bin is a GGUF file: convert it.*convert_gguf"),
        (holder, "q4.gguf is a GGUF file"),
        (other, "notes.txt is a file: give the directory of a model"),
        (tmp_path, "has no config.json: give the directory of a model"),
        (snapshot.parents[1], f"is a cache of the Hugging Face Hub: give .* {snapshot}"),
        (
            Path("meta-llama/Llama-3.2-1B"),
            "^meta-llama/Llama-3.2-1B/config.json does not exist.*hf download meta-llama/Llama-3.2-1B --local-dir",
        ),
        (tmp_path / "no" / "where", "does not exist: the directory of a model is needed"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_hf_config(path)


def test_a_tokenizer_is_looked_for_at_a_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds one. If it is a name on the Hugging Face Hub: hf download org/name"):
        load_tokenizer("org/name")
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF0000")
    with pytest.raises(ConfigError, match="m.gguf is a GGUF file: convert it to a Hugging Face directory first"):
        load_tokenizer(gguf)


def test_an_older_vocabulary_in_place_of_a_tokenizer_json(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="nor a folder that holds one.$"):  # transformers cannot tell whose it is
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"It holds vocab.json: make .* AutoTokenizer as A; A.from_pretrained\('"):
        load_tokenizer(tmp_path)
