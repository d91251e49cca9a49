"""What a run's checkpoints say of its data is there for whoever uses its model, and older ones are still read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.checkpoint import manifest as manifests
from earthshine.checkpoint import run_store
from earthshine.checkpoint.run_rule import run_rule
from earthshine.data.tokenization import Tokenization
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig

RULE = Tokenization(tokenizer_sha256="a" * 64, eod=3, bos_ids=(1,), special_spellings="tokens")


def save(run: Path, model: ModelConfig, step: int, rule: Tokenization | None, **data: Any) -> Path:
    tensors = {"model.x": torch.zeros(1)}
    job = {"data": data}
    return run_store.save(run, step=step, tensors=tensors, state={}, model=model, job=job, keep=0, tokenization=rule)


def test_it_comes_back_from_the_newest_checkpoint(dense: ModelConfig, tmp_path: Path) -> None:
    save(tmp_path, dense, 1, None)
    folder = save(tmp_path, dense, 2, RULE, document_attention=False)
    for path in (tmp_path, folder):
        rule = run_rule(path)
        assert rule and (rule.tokenization, rule.document_attention) == (RULE, False)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint and checkpoint.tokenization == RULE
    (folder / "manifest.json").write_text("{")
    older = run_rule(tmp_path)
    assert older and (older.tokenization, older.document_attention) == (None, True)
    assert run_rule(tmp_path / "nothing") is None


def test_another_tokenizer_is_refused_with_both_hashes_and_the_fix(
    dense: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, dense, 1, RULE)
    rule = run_rule(tmp_path)
    assert rule
    rule.require_tokenizer("a" * 64, "t", "fix")
    with pytest.raises(ConfigError, match="^t has the sha256 b{64}, but .* sha256 a{64}: .* Give the right one."):
        rule.require_tokenizer("b" * 64, "t", "Give the right one.")
    assert capsys.readouterr().err == ""
    replace(rule, tokenization=None).require_tokenizer("b" * 64, "t", "fix")
    assert "does not record the tokenizer of its data (older checkpoints do not): t is used" in capsys.readouterr().err


def test_a_rule_that_makes_no_sense_is_a_damaged_manifest(dense: ModelConfig, tmp_path: Path) -> None:
    file = save(tmp_path, dense, 1, RULE) / "manifest.json"
    body = json.loads(file.read_text())
    del body["signature"], body["sha256"]
    body["tokenization"] = {"boundaries": "marks"}
    body["key"] = "another"
    file.write_text(json.dumps(body | {"sha256": manifests._digest(body), "signature": ""}))
    assert run_rule(tmp_path) is None
