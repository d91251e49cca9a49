"""A GGUF file made here from a known Llama comes back bit for bit, and a strange one is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

from earthshine.checkpoint.gguf import convert_gguf
from earthshine.checkpoint.hf import load_model
from earthshine.errors import OutputExistsError, UnsupportedModelError, WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize

CONFIG = ModelConfig(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rope_theta=1234567.0, tie_word_embeddings=True,
    bos_token_id=256, eos_token_ids=(257,),
)  # fmt: skip
NAMES = {
    "attn_norm": "attn_norm", "attn.q_proj": "attn_q", "attn.k_proj": "attn_k", "attn.v_proj": "attn_v",
    "attn.o_proj": "attn_output", "ffn_norm": "ffn_norm", "ffn.gate_proj": "ffn_gate", "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}  # fmt: skip


def write(
    path: Path,
    model: Transformer,
    *,
    architecture: str = "llama",
    extra: bool = False,
    pre: str = "smollm",
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """As llama.cpp writes a Llama: rows of q and k with rotary pairs side by side (its convert script's `permute`).

    pre: how texts are cut, "" to leave it out. more: writes further fields.
    """
    w = gguf.GGUFWriter(path, architecture)
    c = model.config
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_tokenizer_model("gpt2")
    if pre:
        w.add_tokenizer_pre(pre)
    more(w)
    alphabet = [chr(b) if 33 <= b < 127 else chr(256 + b) for b in range(256)]
    w.add_token_list([*alphabet, "<s>", "</s>", "<pad>", "ab"])
    w.add_token_types([1] * 256 + [3] * 3 + [1])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(257)
    for name, p in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            inner = NAMES[".".join(parts[2:-1])]
            target = f"blk.{parts[1]}.{inner}.weight"
            if inner in ("attn_q", "attn_k"):
                p = p.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        else:
            target = {"embed.weight": "token_embd.weight", "final_norm.weight": "output_norm.weight"}[name]
        w.add_tensor(target, p.contiguous().numpy())
    if extra:
        w.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


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


def test_an_unknown_cut_is_refused_and_none_is_said(
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
    wide = Transformer(CONFIG)
    initialize(wide, seed=0)
    wide.double()
    with torch.no_grad():
        wide.state_dict()["blocks.1.ffn_norm.weight"].fill_(1e300)
    with pytest.raises(WeightsError, match="tensor blk.1.ffn_norm.weight holds values that torch.float32 cannot"):
        convert_gguf(write(tmp_path / "m.gguf", wide), tmp_path / "hf")
