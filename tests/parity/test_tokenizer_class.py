"""The class that transformers' AutoTokenizer takes, for every family and what their files declare."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from earthshine.checkpoint.tokenizer_class import class_of
from earthshine.model.hf_families import FAMILIES

DECLARED = ("", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", "TikTokenTokenizer")


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_our_rule_is_transformers(family: str | None, byte_level: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.utils.logging.set_verbosity_error()
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if family:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    for declared in DECLARED:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": declared} if declared else {}))
        theirs = type(transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)).__name__
        assert class_of(family, declared, byte_level) == theirs, (family, declared)
