"""What the tour does between its stages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from earthshine import tour


def test_the_marks_of_its_chat_are_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i + 2 for i, c in enumerate(letters)} | {"<|im_start|>": 0, "<|im_end|>": 1}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    given: list[Sequence[int]] = []

    def generate(model: Any, prompt_ids: Sequence[int], **_: Any) -> list[int]:
        given.append(prompt_ids)
        return [letters.index("A") + 2]

    monkeypatch.setattr("earthshine.checkpoint.hf.load_model", lambda path: None)
    monkeypatch.setattr("earthshine.evaluate.generate.generate", generate)
    tour._sample(tmp_path / "samples.json", "dense", tmp_path, tmp_path)
    assert [i for i in given[0] if i < 2] == [0, 1, 0]
    assert [s["text"] for s in json.loads((tmp_path / "samples.json").read_text())["samples"]] == ["A", "A"]
