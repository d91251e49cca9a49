import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data.shards import ShardWriter, TokenShards, token_dtype
from earthshine.errors import DataError
from token_documents import document_tokens


@settings(deadline=None, max_examples=15)
@given(
    batches=st.lists(st.lists(st.lists(st.integers(1, 299), max_size=9), max_size=6), min_size=1, max_size=4),
    max_tokens=st.integers(1, 30),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[list[int]]], max_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, vocab_size=300, max_tokens_per_shard=max_tokens)
    documents = [[*d, 0] for batch in batches for d in batch]
    for batch in batches:
        tokens = np.array([t for d in batch for t in (*d, 0)], dtype=np.int64)
        writer.add(tokens, np.array([len(d) + 1 for d in batch], dtype=np.int64), np.arange(len(batch)))
    index = writer.finish(tokenizer_sha256="", eod=0)
    if not documents:
        assert index["shards"] == []
        return
    shards = TokenShards(folder)
    assert [document_tokens(shards, i).tolist() for i in range(shards.num_documents)] == documents
    assert shards.lengths().tolist() == [len(d) for d in documents]
    assert shards.num_tokens == sum(map(len, documents))
    assert shards.num_bytes == sum(i for batch in batches for i in range(len(batch)))
    assert shards.document_bytes(shards.num_documents) == shards.num_bytes
    for shard in shards.index["shards"]:
        assert shard["tokens"] <= max_tokens or shard["documents"] == 1
    out = np.empty(shards.num_tokens, dtype=np.int64)
    every = np.arange(len(documents))
    shards.read(every, np.zeros_like(every), shards.lengths().astype(np.int64), out)
    assert out.tolist() == [t for d in documents for t in d]


@pytest.mark.parametrize(("vocab_size", "name"), [(65536, "uint16"), (65537, "uint32")])
def test_token_type(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name


def test_large_vocabularies_keep_their_ids(make_shards: Callable[..., Path]) -> None:
    shards = TokenShards(make_shards("large", [[65536, 128255]], vocab_size=128256))
    assert document_tokens(shards, 0).tolist() == [65536, 128255, 0]
    assert shards.index["dtype"] == "uint32"


def test_shards_stay_on_disk(counting_shards: Path) -> None:
    """Reading goes through a memory map, not a copy of the shard."""
    views = TokenShards(counting_shards)._tokens
    assert views
    assert all(isinstance(view.base, np.memmap) and not view.flags.writeable for view in views)


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00001.idx"])
class TestDamage:
    def test_short(self, counting_shards: Path, name: str) -> None:
        file = counting_shards / name
        file.write_bytes(file.read_bytes()[:-2])
        with pytest.raises(DataError, match=rf"{name} has \d+ bytes, the index says \d+"):
            TokenShards(counting_shards, verify=False)

    def test_missing(self, counting_shards: Path, name: str) -> None:
        (counting_shards / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            TokenShards(counting_shards, verify=False)

    def test_altered(self, counting_shards: Path, name: str) -> None:
        file = counting_shards / name
        raw = bytearray(file.read_bytes())
        raw[9] ^= 1
        file.write_bytes(raw)
        with pytest.raises(DataError, match=f"{name} is damaged: its sha256"):
            TokenShards(counting_shards)


def test_offsets_that_do_not_rise_are_found_without_hashes(counting_shards: Path) -> None:
    file = counting_shards / "shard-00000.idx"
    idx = np.fromfile(file, dtype="<i8")
    idx[2] = 0
    idx.tofile(file)
    with pytest.raises(DataError, match="offsets do not rise"):
        TokenShards(counting_shards, verify=False).lengths()


def test_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no readable index.json"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this program reads"),
        ({"format": "other"}, "is of format 'other'"),
        ({"tokens": 1}, "contradicts itself"),
        ({"dtype": "float32"}, "contradicts itself"),
        ({"eod": "0"}, "is not the index of token shards"),
        ({"shards": 3}, "is not the index of token shards"),
        ({"shards": []}, "contradicts itself"),
        ({"tokenization": []}, "is not the index of token shards"),
        ({"tokenization": {"boundaries": "marks"}}, "is not the index of token shards"),
        ({"tokenization": {"bos_ids": [2000]}}, "bos_ids=.2000. are not ids"),
        ({"unknown_tokens": "many"}, "contradicts itself"),
    ],
)
def test_wrong_index(counting_shards: Path, change: dict[str, object], message: str) -> None:
    file = counting_shards / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        TokenShards(counting_shards)


def test_index_that_is_not_json_or_leaves_the_folder(counting_shards: Path) -> None:
    file = counting_shards / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["file"] = "../shard-00000.bin"
    file.write_text(json.dumps(index))
    with pytest.raises(DataError, match="contradicts itself"):
        TokenShards(counting_shards)
    file.write_text("{")
    with pytest.raises(DataError, match="is not the index of token shards"):
        TokenShards(counting_shards)


def test_token_beyond_the_models_vocabulary(counting_shards: Path) -> None:
    with pytest.raises(DataError, match=r"shard-00000.bin holds token id \d+, but the vocabulary has 50 ids"):
        TokenShards(counting_shards, vocab_size=50)


def test_token_that_the_index_hides_is_found_when_read(counting_shards: Path) -> None:
    file = counting_shards / "shard-00000.bin"
    tokens = np.fromfile(file, dtype="<u2")
    tokens[5] = 60000
    tokens.tofile(file)
    shards = TokenShards(counting_shards, verify=False)
    lengths = shards.lengths().astype(np.int64)
    every = np.arange(4)
    out = np.empty(int(lengths[:4].sum()), dtype=np.int64)
    with pytest.raises(DataError, match=r"shard-00000.bin holds token id 60000, but the vocabulary has 2000 ids"):
        shards.read(every, np.zeros_like(every), lengths[:4], out)
