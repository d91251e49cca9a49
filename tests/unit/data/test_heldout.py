"""Held-out windows in file order, and what is refused or said of held-out text beside a run's data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.heldout import HeldOut, check_beside_training
from earthshine.data.loader import Loader
from earthshine.data.shards import TokenShards
from earthshine.errors import ConfigError, DataError
from token_documents import document_tokens

ShardMaker = Callable[..., Path]


def test_file_order_and_limits(counting_shards: Path) -> None:
    shards = TokenShards(counting_shards)
    stream = np.concatenate([document_tokens(shards, i) for i in range(shards.num_documents)])
    heldout = HeldOut(counting_shards, seq_len=16)
    whole = list(heldout.batches(4))
    tokens = torch.cat([b.tokens_BS for b in whole]).numpy().ravel()
    assert np.array_equal(tokens, stream[: len(tokens)])
    assert len(stream) - len(tokens) <= 16
    assert heldout.num_sequences == len(tokens) // 16
    limited = HeldOut(counting_shards, seq_len=16, max_sequences=5)
    first_five = list(limited.batches(4))
    assert [len(b.sample_ids) for b in first_five] == [4, 1]
    assert limited.num_sequences == 5
    for name in ("tokens_BS", "targets_BS", "documents_BS"):
        all_rows = torch.cat([getattr(b, name) for b in whole])
        assert torch.equal(torch.cat([getattr(b, name) for b in first_five]), all_rows[:5])
    assert [i for b in first_five for i in b.sample_ids] == [(0, 0, i) for i in range(5)]


def test_vocabulary(counting_shards: Path) -> None:
    with pytest.raises(DataError, match="the vocabulary has 50 ids"):
        HeldOut(counting_shards, seq_len=16, vocab_size=50)


def test_numbers(counting_shards: Path) -> None:
    with pytest.raises(ConfigError, match="batch=0 must be at least 1"):
        list(HeldOut(counting_shards, seq_len=16).batches(0))
    with pytest.raises(ConfigError, match="seq_len=0 must be at least 1"):
        HeldOut(counting_shards, seq_len=0)
    with pytest.raises(ConfigError, match="max_sequences=-1 must not be negative"):
        HeldOut(counting_shards, seq_len=16, max_sequences=-1)


def test_beside_what_is_trained_on(
    two_sources: DataConfig, make_shards: ShardMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = Loader(two_sources, seq_len=16, sequences_per_step=3, seed=5, vocab_size=300)
    other = make_shards("heldout", [[7] * 40])
    assert check_beside_training(str(other), loader) == TokenShards(other).fingerprint
    assert capsys.readouterr().err == ""
    check_beside_training(two_sources.sources[1].path, loader)
    assert "is training data: its loss says nothing about other text" in capsys.readouterr().err
    foreign = make_shards("foreign", [[7] * 40], tokenizer_sha256="f" * 64)
    with pytest.raises(DataError, match="prepared with different tokenizers"):
        check_beside_training(str(foreign), loader)
    with pytest.raises(DataError, match="has 16 tokens, a sample of seq_len=16 needs 17"):
        check_beside_training(str(make_shards("short", [[7] * 15])), loader)


def test_prepared_in_another_way(make_shards: ShardMaker, capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"boundaries": "lengths", "special_spellings": "tokens", "bos_ids": [3]}
    trained, alike = (str(make_shards(name, [[i] * 40], tokenization=rule)) for i, name in ((1, "a"), (2, "b")))
    config = DataConfig(sources=(SourceConfig(path=trained),))
    loader = Loader(config, seq_len=16, sequences_per_step=3, seed=5, vocab_size=300)
    check_beside_training(alike, loader)
    assert capsys.readouterr().err == ""
    check_beside_training(str(make_shards("c", [[3] * 40], tokenization=rule | {"bos_ids": []})), loader)
    assert "c was not prepared like the training data: its documents begin with the ids []" in capsys.readouterr().err
