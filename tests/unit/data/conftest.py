"""A tiny tokenizer and shards made by hand, for the tests of data/."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.data.shards import ShardWriter

EOD = 0


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 290 tokens with GPT-2's pre-tokenizer; `<|end|>` (id 0) ends documents."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the moon is lit by the earth, and the earth by the sun\n    return self\n"] * 20, trainer
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return folder


ShardMaker = Callable[..., Path]


@pytest.fixture
def make_shards(tmp_path: Path) -> ShardMaker:
    """make_shards(name, documents, ...) -> folder; a document is a sequence of token ids, EOD is appended."""
    return lambda name, documents, **options: write_shards(tmp_path / name, documents, **options)


def write_shards(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 300,
    max_tokens_per_shard: int = 1 << 20,
    tokenizer_sha256: str = "0" * 64,
    eod: int = EOD,
    num_bytes: Sequence[int] | None = None,
) -> Path:
    """num_bytes: of each document's text; three for every token when absent."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocab_size=vocab_size, max_tokens_per_shard=max_tokens_per_shard)
    tokens = np.array([t for d in documents for t in (*d, eod)])
    lengths_N = np.array([len(d) + 1 for d in documents])
    writer.add(tokens, lengths_N, 3 * (lengths_N - 1) if num_bytes is None else np.array(num_bytes))
    writer.finish(tokenizer_sha256=tokenizer_sha256, eod=eod)
    return folder


@pytest.fixture
def counting_shards(make_shards: ShardMaker) -> Path:
    """30 documents of 1 to 40 tokens over several shards; every token but EOD is unlike every other."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 41, size=30).tolist()
    ids = iter(range(1, 2000))
    documents = [[next(ids) for _ in range(n)] for n in lengths]
    return make_shards("counting", documents, vocab_size=2000, max_tokens_per_shard=97)


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("sources")
    for name, documents in (("a", 20), ("b", 5)):
        texts = [rng.integers(1, 300, size=int(n)).tolist() for n in rng.integers(1, 60, size=documents)]
        write_shards(folder / name, texts, max_tokens_per_shard=120)
    return DataConfig(sources=(SourceConfig(path=f"{folder}/a", weight=3), SourceConfig(path=f"{folder}/b", weight=1)))
