"""Writing directories as a stream, resumed after a kill. The safetensors library is the reference."""

import errno
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from earthshine.checkpoint import safetensors_writer
from earthshine.checkpoint.safetensors_store import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Store,
    row_blocks,
)
from earthshine.checkpoint.safetensors_writer import OutputTensor, lay_out, write_sharded
from earthshine.errors import DiskFullError
from earthshine.files import sha256_file


def of_every_dtype() -> dict[str, Tensor]:
    values = torch.arange(24).reshape(4, 6)
    return {name: (values % 2 if name == "BOOL" else values).to(dtype) for name, dtype in DTYPES.items()}


def bits(x: Tensor) -> Tensor:
    """For comparing bit for bit, whatever the type."""
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def stream(tensors: dict[str, Tensor], block_bytes: int = 64) -> list[OutputTensor]:
    """These tensors as `write_sharded` takes them."""

    def rows_of(tensor: Tensor) -> Iterator[Tensor]:
        for rows in row_blocks(tensor.shape, tensor.dtype.itemsize, block_bytes):
            yield tensor[rows]

    return [OutputTensor(n, t.dtype, tuple(t.shape), partial(rows_of, t)) for n, t in tensors.items()]


def test_the_library_reads_what_we_write(tmp_path):
    tensors = of_every_dtype() | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    write_sharded(tmp_path, stream(tensors))
    read = load_file(tmp_path / SINGLE_FILE)
    assert set(read) == set(tensors)
    assert all(torch.equal(bits(read[n]), bits(t)) for n, t in tensors.items())


def test_shards_index_and_hashes(tmp_path):
    tensors = {f"t{i}": torch.randn(8, 8) for i in range(10)}
    records = write_sharded(tmp_path, stream(tensors), max_shard_bytes=3 * 256)
    assert sorted(records) == sorted(p.name for p in tmp_path.iterdir())
    assert [f for f in records if f != INDEX_FILE] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    for name, record in records.items():
        path = tmp_path / name
        assert (record.bytes, record.sha256) == (path.stat().st_size, sha256_file(path))
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 10 * 256
    store = Store(tmp_path)
    assert store.names() == sorted(index["weight_map"]) == sorted(tensors)
    assert all(torch.equal(store.read(n), t) for n, t in tensors.items())


@given(st.lists(st.tuples(st.sampled_from(["F64", "BF16", "U8"]), st.integers(0, 9)), max_size=20), st.integers(1, 60))
def test_lay_out_loses_nothing_and_aligns(kinds, limit):
    infos = [OutputTensor(f"t{i}", DTYPES[d], (n,), list) for i, (d, n) in enumerate(kinds)]
    shards = lay_out(infos, limit)
    assert sorted(t.name for s in shards for t in s.tensors) == sorted(t.name for t in infos)
    for shard in shards:
        assert len(shard.tensors) == 1 or sum(t.num_bytes for t in shard.tensors) <= limit or limit < 1
        at = len(shard.header)
        for t in shard.tensors:
            assert at % t.dtype.itemsize == 0
            at += t.num_bytes
        assert at == shard.num_bytes


def test_a_killed_writer_resumes_and_a_damaged_file_is_written_again(tmp_path):
    tensors = {f"t{i}": torch.randn(8, 8) for i in range(4)}

    class Killed(BaseException):
        pass

    def kill(path: Path) -> None:
        if path.name.startswith("model-00003"):
            raise Killed

    with pytest.raises(Killed):
        write_sharded(tmp_path, stream(tensors), max_shard_bytes=256, after_shard=kill)
    first = tmp_path / "model-00001-of-00004.safetensors"
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    written: list[str] = []
    again = write_sharded(tmp_path, stream(tensors), max_shard_bytes=256, after_shard=lambda p: written.append(p.name))
    assert written == [first.name, "model-00004-of-00004.safetensors"]
    clean = tmp_path / "clean"
    clean.mkdir()
    assert write_sharded(clean, stream(tensors), max_shard_bytes=256) == again
    assert not list(tmp_path.glob("*.sha256"))


@pytest.mark.parametrize("call", ["write", "fdatasync", "fsync"])
def test_a_full_disk_while_writing(tmp_path, monkeypatch, call):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(safetensors_writer, "FLUSH_BYTES", 100)
    tensors = {"x": torch.zeros(1000)}
    with pytest.raises(DiskFullError, match=SINGLE_FILE):
        write_sharded(tmp_path, stream(tensors))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["posix_fadvise", "fdatasync"])
def test_what_macos_lacks_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delattr(os, missing)
    monkeypatch.setattr(safetensors_writer, "FLUSH_BYTES", 1)
    tensor = torch.arange(6.0)
    write_sharded(tmp_path, [OutputTensor("a", tensor.dtype, tuple(tensor.shape), lambda: [tensor[:3], tensor[3:]])])
    store = Store(tmp_path)
    store.read_ahead("a")
    assert torch.equal(store.read("a"), tensor)
