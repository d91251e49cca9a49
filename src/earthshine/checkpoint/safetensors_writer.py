"""Write directories of safetensors files as a stream: each tensor's rows are made when their turn has come.

Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, data without holes).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

import torch

from earthshine.checkpoint.safetensors_store import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, as_bytes
from earthshine.files import atomic_write, naming_full_disk, sha256_file, sync_folder

FLUSH_BYTES = 128 << 20  # written bytes after which the disk is told to begin


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written. rows: called when its turn has come; yields its rows in order, in its dtype."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """A written file: its size in bytes and the SHA-256 of its contents."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One file to be written: its header, then its tensors' bytes in this order."""

    file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for t in self.tensors:
            offsets = [end, end + t.num_bytes]
            entries[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
            end += t.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data section is aligned
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(t.num_bytes for t in self.tensors)


def lay_out(tensors: Iterable[OutputTensor], max_shard_bytes: int) -> list[Shard]:
    """Pack tensors into files of at most `max_shard_bytes` of data (a larger tensor gets its own), in the given order.

    Within a file wider dtypes come first, so that every tensor is aligned to its own size.
    """
    groups: list[list[OutputTensor]] = []
    size = 0
    for t in tensors:
        if not groups or (groups[-1] and size + t.num_bytes > max_shard_bytes):
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += t.num_bytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    return [
        Shard(name, tuple(sorted(group, key=lambda t: -t.dtype.itemsize)))
        for name, group in zip(names, groups, strict=True)
    ]


class WriteOptions(TypedDict, total=False):
    """Options of `write_sharded`, for callers that pass them on."""

    max_shard_bytes: int
    on_bytes: Callable[[int], None]
    after_shard: Callable[[Path], None]


def write_sharded(
    directory: Path,
    tensors: Sequence[OutputTensor],
    *,
    max_shard_bytes: int = 2 << 30,
    on_bytes: Callable[[int], None] = lambda count: None,
    after_shard: Callable[[Path], None] = lambda path: None,
) -> dict[str, FileRecord]:
    """Write `tensors` into `directory` as a stream.

    Each file is written under another name, synced, and renamed beside a `.sha256` of its contents; files already
    there that match theirs are kept, so that a killed writer resumes where it was. Returns the record of every file.

    Args:
        max_shard_bytes: of tensors in one file.
        on_bytes: called with the number of bytes just written, or found written.
        after_shard: called with the path of each file that was completed.
    Raises DiskFullError when the disk is full.
    """
    shards = lay_out(tensors, max_shard_bytes)
    records = {}
    for shard in shards:
        path = directory / shard.file
        record = _finished_shard(path, shard.num_bytes)
        if record is None:
            record = _write_shard(path, shard, on_bytes)
            after_shard(path)
        else:
            on_bytes(record.bytes)
        records[shard.file] = record
    if len(shards) > 1:
        weight_map = {t.name: s.file for s in shards for t in s.tensors}
        total = sum(t.num_bytes for s in shards for t in s.tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=1)
        records[INDEX_FILE] = write_recorded(directory / INDEX_FILE, text)
    for shard in shards:
        _sidecar(directory / shard.file).unlink(missing_ok=True)
    return records


def write_recorded(path: Path, data: str | bytes) -> FileRecord:
    """Write a small file durably and return its record."""
    raw = data.encode() if isinstance(data, str) else data
    atomic_write(path, raw)
    return FileRecord(len(raw), sha256(raw).hexdigest())


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _finished_shard(path: Path, num_bytes: int) -> FileRecord | None:
    """The record of a file that an earlier, killed writer completed; None when it must be written (again)."""
    if not path.is_file() or not _sidecar(path).is_file() or path.stat().st_size != num_bytes:
        return None
    digest = sha256_file(path)
    return FileRecord(num_bytes, digest) if digest == _sidecar(path).read_text() else None


def _write_shard(path: Path, shard: Shard, on_bytes: Callable[[int], None]) -> FileRecord:
    temporary = path.with_name(path.name + ".tmp")
    with naming_full_disk(path):
        fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        try:
            with _HashingFile(fd) as out:
                out.write(shard.header)
                for tensor in shard.tensors:
                    _write_tensor(out, tensor, on_bytes)
                record = out.finish()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
    atomic_write(_sidecar(path), record.sha256)
    temporary.rename(path)
    sync_folder(path.parent)
    return record


def _write_tensor(out: "_HashingFile", tensor: OutputTensor, on_bytes: Callable[[int], None]) -> None:
    remaining = tensor.num_bytes
    for block in tensor.rows():
        assert block.dtype == tensor.dtype, f"{tensor.name}: {block.dtype} for {tensor.dtype}"
        if block.numel():
            data = as_bytes(block.detach().contiguous())
            out.write(data)
            remaining -= len(data)
            on_bytes(len(data))
    assert remaining == 0, f"{tensor.name}: {remaining} bytes too few"


class _HashingFile:
    """A file written in order, whose digest and whose flushing to the disk run beside the writing, in two threads.

    Without the second, up to a tenth of the machine's memory collects as dirty pages and the disk idles until the
    final sync. Blocks handed in must not change afterwards; at most two are in flight, which bounds memory.
    """

    def __init__(self, fd: int) -> None:
        self._fd, self._unflushed, self._count = fd, 0, 0
        self._digest = sha256()
        self._threads = ThreadPoolExecutor(2)
        self._hashing: Future[None] | None = None
        self._flushing: Future[None] | None = None

    def __enter__(self) -> "_HashingFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(wait=True)

    def write(self, data: bytes | memoryview) -> None:
        if self._hashing:
            self._hashing.result()
        self._hashing = self._threads.submit(self._digest.update, data)
        self._count += len(data)
        self._unflushed += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        if self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing:
                self._flushing.result()  # raises the disk's error, if there was one
            self._unflushed = 0
            self._flushing = self._threads.submit(getattr(os, "fdatasync", os.fsync), self._fd)  # macOS: fsync only

    def finish(self) -> FileRecord:
        """Wait for both threads, sync the whole file, and return its record."""
        for pending in (self._hashing, self._flushing):
            if pending:
                pending.result()
        os.fsync(self._fd)
        return FileRecord(self._count, self._digest.hexdigest())
