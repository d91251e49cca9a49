"""Pieces of a long text have the tokens of the whole, whatever the tokenizer's kind."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data.long_text import encode_in_pieces
from earthshine.data.tokenizer import Tokenizer, load_tokenizer

TokenizerMaker = Callable[[str], Path]
KINDS = ["gpt2", "llama3", "llama2", "metaspace", "metaspace_always", "unigram", "word_level", "not_special"]


def words(seed: int, joint: str) -> str:
    draw = random.Random(seed)
    known = ["the", "moon", "is", "lit", "by", "earth.", "12345", "caf\u00e9", "\u5730\u7403", "</s>", "return"]
    return joint.join(draw.choice(known) + draw.choice(["", "", " ", "\n", "\n\n", "\n    "]) for _ in range(1500))


TEXTS = {
    "words": words(0, " "),
    "lines": words(1, "\n"),
    "no spaces": words(2, "").replace(" ", "").replace("\n", ""),
    "digits": "".join(random.Random(3).choice("0123456789") for _ in range(6000)),
    "one letter": "a" * 6001,
    "one line again and again": "the moon is lit\n" * 400,
    "empty lines": "the\n\nmoon\n\n" * 500,
    "spaces": "the" + " " * 3000 + "moon" + "\n" * 3000,
}


def check(t: Tokenizer, text: str, limit: int) -> int:
    pieces = encode_in_pieces(text, limit, lambda texts: t.encode_batch(texts, special=False))
    assert [i for p in pieces for i in p] == t.encode(text, special=False)
    return len(pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_are_the_whole(tokenizer_of: TokenizerMaker, kind: str, text: str) -> None:
    pieces = check(load_tokenizer(tokenizer_of(kind)), text, 1000)
    if text in (TEXTS["words"], TEXTS["lines"], TEXTS["one line again and again"]):
        assert pieces >= len(text) // 1000


@settings(deadline=None, max_examples=40)
@given(text=st.text(alphabet="the moon.\u5730\u0301 \n\t12'", max_size=900), limit=st.integers(20, 200))
def test_any_text(tokenizer_of: TokenizerMaker, text: str, limit: int) -> None:
    for kind in ("gpt2", "llama3", "llama2"):
        check(load_tokenizer(tokenizer_of(kind)), text, limit)


def test_without_a_confirmed_cut_a_text_is_encoded_whole() -> None:
    """A tokenizer whose every token depends on the length of the text."""
    assert (
        encode_in_pieces("abcdef" * 50, 100, lambda texts: [[len(t)] * len(t) for t in texts])[0].tolist()
        == [300] * 300
    )
