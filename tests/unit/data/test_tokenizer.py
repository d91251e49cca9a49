import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from earthshine.data.tokenizer import load_tokenizer, warn_of_missing_rows, warn_of_other_tokenizer
from earthshine.errors import ConfigError
from earthshine.files import sha256_file


def test_facts(tokenizer_dir: Path) -> None:
    t = load_tokenizer(tokenizer_dir)
    assert (t.vocab_size, t.eod) == (290, 0)
    assert t.sha256 == sha256_file(tokenizer_dir / "tokenizer.json")
    assert load_tokenizer(tokenizer_dir / "tokenizer.json").eod == 0  # the file's neighbors count too


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60))
def test_round_trip(tokenizer_dir: Path, text: str) -> None:
    t = load_tokenizer(tokenizer_dir)
    assert t.decode(t.encode(text, special=False)) == text


def test_special_tokens_are_text_in_documents(tokenizer_dir: Path) -> None:
    t = load_tokenizer(tokenizer_dir)
    assert t.encode("a<|end|>")[-1] == 0
    plain = t.encode("a<|end|>", special=False)
    assert 0 not in plain
    assert t.decode(plain) == "a<|end|>"
    assert t.encode("a<|end|>")[-1] == 0  # the choice does not stick
    assert t.decode([0]) == ""
    assert t.decode([0], skip_special=False) == "<|end|>"


def test_nothing_is_added_or_cut(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A file may ask for truncation, padding and a template; documents must not change by them."""
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 1), ("<|end|>", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the moon is lit by the earth"
    assert load_tokenizer(tmp_path).encode(text) == load_tokenizer(tokenizer_dir).encode(text)


@pytest.mark.parametrize(
    ("name", "content", "eod"),
    [
        ("tokenizer_config.json", {"eos_token": "<|user|>"}, 1),
        ("tokenizer_config.json", {"eos_token": {"content": "<|user|>", "special": True}}, 1),
        ("special_tokens_map.json", {"eos_token": "<|user|>"}, 1),
        ("config.json", {"eos_token_id": 7}, 7),
        ("config.json", {"eos_token_id": [9, 7]}, 9),
    ],
)
def test_declared_end_token(tokenizer_dir: Path, tmp_path: Path, name: str, content: object, eod: int) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eod == eod


@pytest.mark.parametrize(("given_eod", "eod"), [("<|user|>", 1), (5, 5), ("5", 5)])
def test_given_end_token(tokenizer_dir: Path, given_eod: str | int, eod: int) -> None:
    assert load_tokenizer(tokenizer_dir, given_eod).eod == eod


def test_unknown_end_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    t = load_tokenizer(tmp_path)
    assert t.encode("a")  # only asking for the end token needs it
    with pytest.raises(ConfigError, match=r"eod is not known for .*--eod\); its special tokens: <\|end\|>"):
        t.eod  # noqa: B018
    with pytest.raises(ConfigError, match=r"eod='<\|ende\|>' is not a token of .* Did you mean '<\|end\|>'"):
        load_tokenizer(tmp_path, "<|ende|>")
    with pytest.raises(ConfigError, match="eod=290 is not an id of .*: ids are 0 to 289"):
        load_tokenizer(tmp_path, 290)


def test_bad_files(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a tokenizer.json nor a folder that holds one"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": 1}')
    with pytest.raises(ConfigError, match="is not a tokenizer.json that can be read"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(models.BPE()).save(str(file))
    with pytest.raises(ConfigError, match="has an empty vocabulary"):
        load_tokenizer(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer.json", file)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not readable JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "$A"])
def test_a_prompt_begins_with_the_beginning_token_once_and_never_ends(tmp_path: Path, template: str) -> None:
    words = {"<bos>": 0, "<eos>": 1, "a": 2, "b": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<bos>", "<eos>"])
    special = [("<bos>", 0), ("<eos>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    beginning = [0] if template.startswith("<bos>") else []
    assert tokenizer.encode_prompt("a b") == [*beginning, 2, 3]
    assert tokenizer.encode_prompt("<bos> a b") == [0, 2, 3]
    assert tokenizer.encode("a b") == [2, 3]


def test_shards_of_another_tokenizer_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    warn_of_other_tokenizer(tmp_path, "shards", hashlib.sha256(b"{}").hexdigest())
    warn_of_other_tokenizer(tmp_path / "elsewhere", "shards", "other")
    assert capsys.readouterr().err == ""
    warn_of_other_tokenizer(tmp_path, "shards", "other")
    assert "shards was not made with" in capsys.readouterr().err


def _word_level(**changes: object) -> dict:
    fields = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    base = {"version": "1.0", "added_tokens": []} | dict.fromkeys(fields)
    base["model"] = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    return base | changes


_NO_TRIE = {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAAA"}
_SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    "content, message",
    [
        (_word_level(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "cannot|can be read"),
        (_word_level(normalizer=_NO_TRIE), "cannot encode"),
        (_word_level(pre_tokenizer=_SLOW), "cannot encode"),
        (_word_level(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}), "can be read"),
        (_word_level(model={"type": "Unigram", "unk_id": None, "vocab": [["b", 0.0]]}), "cannot encode"),
        (
            _word_level(post_processor=_TEMPLATE | {"single": [{"SpecialToken": {"id": "X", "type_id": 0}}]}),
            "cannot|read",
        ),
        (_word_level(model={"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}), "token id 4294967295"),
    ],
    ids=["charsmap", "trie", "regex", "merge", "no unknown", "template", "id"],
)
def test_a_file_that_makes_the_library_panic_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    """A panic is a BaseException: it would pass every `except Exception`, that of the command line too."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        tokenizer = load_tokenizer(path, eod=0)
        tokenizer.encode("a" * 40 + "b")
        tokenizer.encode_prompt("a b")


def test_more_ids_than_the_model_beside_has_rows_is_reported(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tokenizer_dir / "tokenizer.json", folder)
    tokenizer = load_tokenizer(folder)
    for config in (None, "{", "[]", '{"vocab_size": "many"}', f'{{"vocab_size": {tokenizer.vocab_size}}}'):
        if config is not None:
            (folder / "config.json").write_text(config)
        warn_of_missing_rows(tokenizer)
    assert capsys.readouterr().err == ""
    (folder / "config.json").write_text(f'{{"vocab_size": {tokenizer.vocab_size - 1}}}')
    warn_of_missing_rows(tokenizer)
    assert f"the config.json beside it {tokenizer.vocab_size - 1} rows" in capsys.readouterr().err
