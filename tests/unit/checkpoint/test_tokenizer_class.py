"""Who reads a tokenizer's files under another `model_type`; tests/parity compares the rule with transformers."""

import json

import pytest

from earthshine.checkpoint.tokenizer_class import Reading, class_of, keep_class, num_ids, warn_of_ids_beyond

PIECES, BYTES = b'{"decoder": {"type": "Metaspace"}}', b'{"decoder": {"type": "ByteLevel"}}'


def kept(tokenizer: bytes, source: str | None, target: str, declared: str = "", **settings: object) -> Reading:
    """Who reads the files after the change; checks that it is so, and that nothing but tokenizer_class was touched."""
    stated = settings | ({"tokenizer_class": declared} if declared else {})
    files = {"tokenizer.json": tokenizer, "LICENSE": b"x"}
    files |= {"tokenizer_config.json": json.dumps(stated).encode()} if stated else {}
    after, reading = keep_class(files, source, target)  # type: ignore[arg-type]
    assert reading is not None
    config = json.loads(after.get("tokenizer_config.json", b"{}"))
    assert config == stated | ({"tokenizer_class": reading.written} if reading.written else {})
    assert {k: v for k, v in after.items() if k != "tokenizer_config.json"} == {
        "tokenizer.json": tokenizer,
        "LICENSE": b"x",
    }
    assert reading.written or after == files
    assert class_of(target, config.get("tokenizer_class", ""), tokenizer is BYTES) == reading.after or reading.own_code
    return reading


@pytest.mark.parametrize(
    "tokenizer, source, target, declared, reader, written",
    [
        (PIECES, "llama", "qwen2_moe", "", "TokenizersBackend", "PreTrainedTokenizerFast"),
        (PIECES, "mistral", "qwen2_moe", "LlamaTokenizer", "TokenizersBackend", "PreTrainedTokenizerFast"),
        (BYTES, "llama", "qwen2_moe", "GPT2Tokenizer", "GPT2Tokenizer", ""),
        (BYTES, "llama", "qwen2_moe", "LlamaTokenizerFast", "TokenizersBackend", ""),  # ByteLevel: Llama 3's clothes
        (PIECES, "llama", "qwen2_moe", "LlamaTokenizer", "LlamaTokenizer", ""),
        (PIECES, "llama", "mixtral", "", "TokenizersBackend", ""),
        (BYTES, "llama", "mixtral", "PreTrainedTokenizerFast", "TokenizersBackend", ""),
        (PIECES, "mistral", "mixtral", "LlamaTokenizer", "TokenizersBackend", ""),
        (BYTES, "qwen2", "qwen2_moe", "Qwen2Tokenizer", "Qwen2Tokenizer", ""),
        (BYTES, "qwen2", "qwen2_moe", "", "Qwen2Tokenizer", ""),
        (BYTES, "qwen2", "qwen2_moe", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2Tokenizer"),
        (BYTES, "qwen3", "qwen3_moe", "PreTrainedTokenizerFast", "TokenizersBackend", ""),
        (BYTES, "deepseek_v3", "deepseek_v3", "LlamaTokenizerFast", "TokenizersBackend", ""),
        (BYTES, None, "qwen2_moe", "", "TokenizersBackend", "PreTrainedTokenizerFast"),  # a folder with no config.json
    ],
)
def test_the_class_is_kept(tokenizer, source, target, declared, reader, written) -> None:
    reading = kept(tokenizer, source, target, declared, eos_token="</s>")
    assert (reading.before, reading.after, reading.written) == (reader, reader, written)
    assert f"reads the tokenizer with {reader}, as before" in reading.sentence
    assert not written or f"tokenizer_class={written} was written" in reading.sentence


@pytest.mark.parametrize("source, declared", [("llama", "LlamaTokenizer"), ("llama", "GPT2Tokenizer")])
def test_a_class_that_cannot_be_kept_is_reported(source: str, declared: str) -> None:
    """Whatever the files declare, a Mixtral's are read as they stand."""
    reading = kept(PIECES, source, "mixtral", declared)
    assert (reading.before, reading.after, reading.written) == (declared, "TokenizersBackend", "")
    assert reading.sentence.startswith(
        f"warning: transformers reads the tokenizer with TokenizersBackend, where it took {declared}"
    )


def test_a_vocabulary_that_only_the_old_class_reads_is_reported() -> None:
    files = {"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'}
    _, reading = keep_class(files, "llama", "mixtral")
    assert reading is not None and "that needs a tokenizer.json, and there is none. To make one" in reading.sentence
    _, reading = keep_class(files, "llama", "qwen2_moe")
    assert reading is not None and reading.sentence.endswith("with GPT2Tokenizer, as before")


def test_a_class_that_only_config_json_declares_is_written() -> None:
    files, reading = keep_class({"tokenizer.json": PIECES}, "llama", "qwen2_moe", "LlamaTokenizer")
    assert reading is not None and reading.after == "LlamaTokenizer"
    assert json.loads(files["tokenizer_config.json"]) == {"tokenizer_class": "LlamaTokenizer"}


def test_own_code_is_named_and_left_alone() -> None:
    reading = kept(PIECES, "llama", "qwen2_moe", "X", auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", None]})
    assert reading.own_code == "tokenization_x.XTokenizer" and not reading.written
    assert "its own code, tokenization_x.XTokenizer" in reading.sentence


@pytest.mark.parametrize("broken", [b"{", b"[1]", b'{"tokenizer_class": 3}'])
def test_settings_that_cannot_be_read_travel_as_they_are_unless_a_class_is_needed(broken: bytes) -> None:
    files = {"tokenizer.json": PIECES, "tokenizer_config.json": broken}
    assert keep_class(files, "llama", "mixtral")[0] == files
    assert keep_class({"LICENSE": b""}, "llama", "qwen2_moe") == ({"LICENSE": b""}, None)


def test_ids_without_a_row_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    bpe = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<think>"}]}
    unigram = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    assert [num_ids(json.dumps(t).encode()) for t in (bpe, unigram, {"a": 1}, [])] == [3, 2, 0, 0]
    assert num_ids(b"") == 0
    files = {"tokenizer.json": json.dumps(bpe).encode()}
    warn_of_ids_beyond(files, 3, "m")
    assert capsys.readouterr().err == ""
    warn_of_ids_beyond(files, 2, "m")
    assert "the tokenizer of m has 3 ids and the model 2 rows" in capsys.readouterr().err
