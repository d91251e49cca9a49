"""A special token's spelling inside a text is text, whatever the tokenizer's kind; no id ends a document by itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from earthshine.data.control_tokens import spelling_pattern
from earthshine.data.tokenizer import load_tokenizer

TokenizerMaker = Callable[[str], Path]
KINDS = [
    "gpt2", "llama3", "llama2", "metaspace", "metaspace_always", "unigram", "unigram_unmarked", "word_level",
    "word_piece", "not_special", "merged", "ignoring_merges",
]  # fmt: skip
TEXTS = ["</s>", "a</s>a", "the </s> moon", "the moon</s>", "</s></s> </s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_never_becomes_a_special_token(tokenizer_of: TokenizerMaker, kind: str) -> None:
    t = load_tokenizer(tokenizer_of(kind))
    special = set(t.control) - {t.unknown_id}
    for text in TEXTS:
        ids = t.encode(text, special=False)
        assert ids and special.isdisjoint(ids), text
        if kind not in ("word_level", "word_piece", "unigram_unmarked"):  # which cannot spell it otherwise
            assert "".join(t.decode(ids, skip_special=False).split()) == "".join(text.split())
    assert t.eod in t.encode("the </s> moon")  # and still does where that is asked for


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_keep_their_ids(tokenizer_of: TokenizerMaker, kind: str) -> None:
    folder = tokenizer_of(kind)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    t = load_tokenizer(folder)
    for text in ("the moon is lit", "moon  the\n\n is 12345 lit.", " the <s", "\u5730\u7403 caf\u00e9"):
        assert t.encode(text, special=False) == plain.encode(text, add_special_tokens=False).ids


def test_an_end_token_that_texts_need_stays_and_ids_are_kept(tokenizer_of: TokenizerMaker, tmp_path: Path) -> None:
    """`--eod` may name any entry; a letter without which texts cannot be spelled is not taken from them."""
    t = load_tokenizer(tokenizer_of("gpt2"), "!")
    assert t.encode("hi!", special=False)[-1] == t.eod
    unmarked = load_tokenizer(tokenizer_of("unigram_unmarked"), "</s>")
    assert unmarked.eod not in unmarked.encode("a </s> b", special=False)
    words = {f"w{i}": i for i in range(3)} | {"<eod>": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<eod>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, "<eod>").encode("w1 w2 what", special=False) == [1, 2, 3]


def test_a_special_token_without_another_spelling_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """WordLevel without an unknown token refuses what it does not hold: the text would be refused with it."""
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, "</s>").encode("a </s> a", special=False) == [1, 0, 1]
    assert "can spell '</s>' only as that token" in capsys.readouterr().err


def test_tokens_that_the_files_beside_name_are_special(tokenizer_of: TokenizerMaker, tmp_path: Path) -> None:
    shutil.copy(tokenizer_of("not_special") / "tokenizer.json", tmp_path)
    end = load_tokenizer(tmp_path, "</s>").eod
    assert load_tokenizer(tmp_path).encode("</s>", special=False) == [end]  # nobody says what it is
    for name, content in (
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "</s>"}]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"end": "</s>"}}),
        ("tokenizer_config.json", {"pad_token": {"content": "</s>"}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert end not in load_tokenizer(tmp_path, 5).encode("</s>", special=False)
        (tmp_path / name).unlink()


def test_first_spelling(tokenizer_of: TokenizerMaker) -> None:
    t = load_tokenizer(tokenizer_of("llama3"))
    assert [t.spelled(text) for text in ("the moon", "a </s> and <s>", "<s")] == ["", "</s>", ""]


def test_the_longest_spelling_is_found_and_shared_beginnings_are_tried_once() -> None:
    """A thousand `<SPECIAL_7>`, as Mistral has, side by side would each be tried at every `<` of a text."""
    contents = [*(f"<SPECIAL_{i}>" for i in range(1000)), "<s>", "[INST]", "a", "ab", "a.c", "ab" * 500]
    pattern = spelling_pattern(contents)
    for content in contents:
        match = re.search(pattern, f"<x {content} y")
        assert match is not None and match.group() == content
    assert re.search(pattern, "<SPECIAL_> [INS <SPECIAL_1000>") is None
    assert pattern.count("<SPECIAL_") == 0 and pattern.count("SPECIAL_") == 1
    deep = ["a" * i for i in range(1, 1500)]  # no deeper in parentheses than `re` can go
    match = re.search(spelling_pattern(deep), "b" + "a" * 900)
    assert match is not None and len(match.group()) == 900
