"""A GGUF file made here from a known Llama comes back bit for bit, and a strange one is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from earthshine.checkpoint.gguf import convert_gguf
from earthshine.checkpoint.load import load_model
from earthshine.errors import OutputExistsError, UnsupportedModelError, WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize
from tiny_gguf import write

CONFIG = ModelConfig(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1234567.0, tie_word_embeddings=True,
    bos_token_id=256, eos_token_ids=(257,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    built = Transformer(CONFIG)
    initialize(built, seed=0)
    return built


def test_weights_config_and_tokenizer_come_back(model: Transformer, tmp_path: Path) -> None:
    config = convert_gguf(write(tmp_path / "m.gguf", model), tmp_path / "hf")
    assert config == CONFIG
    back = load_model(tmp_path / "hf")
    assert back.config == CONFIG
    for (name, p), (_, q) in zip(back.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert (tmp_path / "hf" / "tokenizer.json").is_file() and (tmp_path / "hf" / "generation_config.json").is_file()
    with pytest.raises(OutputExistsError):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_strange_files_are_refused(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="architecture='gpt2'"):
        convert_gguf(write(tmp_path / "a.gguf", model, architecture="gpt2"), tmp_path / "a")
    with pytest.raises(
        UnsupportedModelError, match=r"scaled rotary positions \(Llama 3.1 and later; .*rope_freqs.weight"
    ):
        convert_gguf(write(tmp_path / "b.gguf", model, extra=True), tmp_path / "b")
    (tmp_path / "c.gguf").write_bytes(b"GGUFgarbage and more of it, long enough to look")
    with pytest.raises(WeightsError, match="not a readable GGUF"):
        convert_gguf(tmp_path / "c.gguf", tmp_path / "c")
    with pytest.raises(WeightsError, match="is not a file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "d")
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".gguf"]


TEXT = "x = 100    42,\n  7 12345 it's"
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(
    "pre, rule",
    [*((name, DIGITS) for name in ("smollm", "starcoder", "command-r", "minerva-7b")), ("gpt-2", GPT2), ("olmo", GPT2)],
)
def test_texts_are_cut_as_the_file_says(pre: str, rule: Any, model: Transformer, tmp_path: Path) -> None:
    convert_gguf(write(tmp_path / "m.gguf", model, pre=pre), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert tokenizer.pre_tokenizer.pre_tokenize_str(TEXT) == rule.pre_tokenize_str(TEXT)


def test_how_others_cut_is_transformers_table(model: Transformer, tmp_path: Path) -> None:
    convert_gguf(write(tmp_path / "m.gguf", model, pre="llama-bpe"), tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a 12345")] == ["a", "\u0120", "123", "45"]
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["ignore_merges"] is True


def test_an_unknown_cut_is_refused_and_none_is_reported(
    model: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer.ggml.pre='gpt-9' is not known: texts would be cut into"):
        convert_gguf(write(tmp_path / "a.gguf", model, pre="gpt-9"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for number, pre in enumerate(("", "default")):
        convert_gguf(write(tmp_path / f"{number}.gguf", model, pre=pre), tmp_path / f"{number}")
        assert "does not say how texts are cut" in capsys.readouterr().err


def test_ends_of_turns_and_scaling_that_scales_nothing(model: Transformer, tmp_path: Path) -> None:
    def more(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        w.add_eot_token_id(258)

    assert convert_gguf(write(tmp_path / "m.gguf", model, more=more), tmp_path / "hf") == CONFIG
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": [257, 258]}

    def linear(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(4.0)

    with pytest.raises(UnsupportedModelError, match="scaled rotary positions .*here llama.rope.scaling.type='linear'"):
        convert_gguf(write(tmp_path / "b.gguf", model, more=linear), tmp_path / "b")
    with pytest.raises(WeightsError, match="eot_token_id is not in its vocabulary of 260 tokens"):
        convert_gguf(write(tmp_path / "c.gguf", model, more=lambda w: w.add_eot_token_id(260)), tmp_path / "c")


def test_a_weight_beyond_float32_is_refused(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    initialize(model, seed=0)
    model.double()
    with torch.no_grad():
        model.state_dict()["blocks.1.ffn_norm.weight"].fill_(1e300)
    with pytest.raises(WeightsError, match="tensor blk.1.ffn_norm.weight holds values that torch.float32 cannot"):
        convert_gguf(write(tmp_path / "m.gguf", model), tmp_path / "hf")
