"""Documents out of files: which files, what is in them, and in what pieces they go to workers. Torch-free.

A `.jsonl` (or `.ndjson`) file holds a document a line, a `.parquet` file a document a row, any other file is one
document; each may be gzipped. The order is that of the arguments, folders sorted by name. Files in folders that are
hidden, binary, empty or unreadable are skipped, and so are they when named: counted, and said by the caller.
"""

import gzip
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from earthshine.config import nearest, parse_json
from earthshine.errors import ConfigError, DataError, MissingDependencyError

TASK_BYTES = 1 << 19  # of input in one task: half a second of work or less, so that workers end together
_TASK_FILES = 256
_BINARY_PROBE_BYTES = 8192
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True)
class Task:
    """What a worker tokenizes at once. One of: files (whole, a document each), lines (of a JSON-lines file), rows.

    name: the file, for messages. first: number of its first line or row, from 1. input_bytes: how much of the input,
    as it lies on disk, is done when this is.
    """

    input_bytes: int
    name: str = ""
    first: int = 1
    files: tuple[str, ...] = ()
    lines: bytes = b""
    rows: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Document:
    """A text, and the file, line or row it is from."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file, line or row that is no document, and why."""

    name: str
    reason: str


def find_files(inputs: Sequence[str | Path]) -> tuple[list[Path], Counter[str]]:
    """The files to read, in order, and what was left aside: hidden ones in folders, and ones named twice.

    Raises ConfigError for an input that does not exist.
    """
    found: list[Path] = []
    seen: set[str] = set()
    aside: Counter[str] = Counter()
    for given in map(Path, inputs):
        if not given.exists():
            raise ConfigError(f"input={given} does not exist; give files or folders of text, .jsonl or .parquet.")
        for file in _walk(given, aside) if given.is_dir() else [given]:
            real = os.path.realpath(file)
            if real in seen:
                aside["named twice"] += 1
            elif file.is_file() or not file.exists():  # a dangling link is reported later, as unreadable
                seen.add(real)
                found.append(file)
            else:
                aside["not a regular file"] += 1
    return found, aside


def _walk(folder: Path, aside: Counter[str]) -> Iterator[Path]:
    """Files below a folder: a folder's own, sorted by name, and then its subfolders' in the same way.

    Links to folders are not followed. Raises DataError when a folder is closed to us.
    """

    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename} cannot be listed ({e.strerror}); make it readable or name other inputs.") from e

    for parent, folders, files in os.walk(folder, onerror=refuse):
        hidden = sum(name.startswith(".") for name in [*folders, *files])
        if hidden:
            aside["hidden"] += hidden
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def size_of(file: Path) -> int:
    """Bytes on disk; 0 when that cannot be known (a dangling link)."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def make_tasks(files: Sequence[Path], text_key: str) -> Iterator[Task]:
    """Cut the files' contents into tasks, in order; holds one task's input at a time.

    Raises DataError for a damaged file.
    """
    group: list[str] = []
    group_bytes = 0
    for file in files:
        kind = _kind(file)
        if kind == "text":
            size = size_of(file)
            if group and (group_bytes + size > TASK_BYTES or len(group) == _TASK_FILES):
                yield Task(group_bytes, files=tuple(group))
                group, group_bytes = [], 0
            group.append(str(file))
            group_bytes += size
            continue
        if group:
            yield Task(group_bytes, files=tuple(group))
            group, group_bytes = [], 0
        yield from _line_tasks(file) if kind == "lines" else _row_tasks(file, text_key)
    if group:
        yield Task(group_bytes, files=tuple(group))


def _kind(file: Path) -> str:
    suffixes = [s.lower() for s in file.suffixes]
    inner = suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:]
    if inner in ([".jsonl"], [".ndjson"]):
        return "lines"
    return "rows" if suffixes[-1:] == [".parquet"] else "text"


def _line_tasks(file: Path) -> Iterator[Task]:
    """Whole lines, about TASK_BYTES a task; a longer line is a task of its own."""
    first, seen, rest = 1, 0, bytearray()
    try:
        with open(file, "rb") as raw:
            stream = _plain(file, raw)
            while block := stream.read(TASK_BYTES):
                whole, newline, tail = block.rpartition(b"\n")
                if not newline:
                    rest += block
                    continue
                lines, rest = b"".join((rest, whole, newline)), bytearray(tail)
                yield Task(raw.tell() - seen, name=str(file), first=first, lines=lines)
                first, seen = first + lines.count(b"\n"), raw.tell()
            yield Task(raw.tell() - seen, name=str(file), first=first, lines=bytes(rest))
    except _DAMAGED as e:
        raise _damaged(file, e) from e
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror}); make it readable or name other inputs.") from e


def _plain(file: Path, stored: BinaryIO) -> BinaryIO:
    """What is in an open file, decompressed when its name says that it is gzipped."""
    return cast(BinaryIO, gzip.GzipFile(fileobj=stored)) if file.suffix.lower() == ".gz" else stored


def _row_tasks(file: Path, text_key: str) -> Iterator[Task]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as e:
        raise MissingDependencyError(
            f"{file} is a parquet file, and reading one needs pyarrow: pip install pyarrow (or 'earthshine[hf]')."
        ) from e
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if text_key not in table.schema_arrow.names:
                hint = nearest(text_key, table.schema_arrow.names)
                raise DataError(f"{file} has no column '{text_key}' (text_key).{hint}")
            kind = table.schema_arrow.field(text_key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{file}: column '{text_key}' (text_key) is {kind}, not text; name a column of text.")
            rows_total = max(table.metadata.num_rows, 1)
            per_row = size_of(file) / rows_total
            first, counted = 1, 0
            for batch in table.iter_batches(batch_size=512, columns=[text_key]):
                for rows in _split_rows(batch.column(0).to_pylist()):
                    share = round((first - 1 + len(rows)) * per_row) - counted
                    yield Task(share, name=str(file), first=first, rows=rows)
                    first, counted = first + len(rows), counted + share
    except (pyarrow.ArrowException, OSError) as e:
        raise _damaged(file, e) from e


def _split_rows(rows: list[str | None]) -> Iterator[tuple[str | None, ...]]:
    start = size = 0
    for i, row in enumerate(rows):
        size += len(row or "")
        if size >= TASK_BYTES:
            yield tuple(rows[start : i + 1])
            start, size = i + 1, 0
    if start < len(rows):
        yield tuple(rows[start:])


def texts(task: Task, text_key: str) -> Iterator[Document | Skipped]:
    """The documents of a task, in order. Raises DataError for one that is damaged."""
    if task.files:
        for file in task.files:
            yield _read_text(Path(file))
    elif task.rows:
        for number, row in enumerate(task.rows, start=task.first):
            yield _usable(row, f"{task.name}, row {number}")
    else:
        for number, line in enumerate(task.lines.split(b"\n"), start=task.first):
            if line.strip():
                where = f"{task.name}, line {number}"
                yield _usable(_parse_line(line, where, text_key), where)


def _usable(text: str | None, where: str) -> Document | Skipped:
    if text is None or not text.strip():
        return Skipped(where, "empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which is no character
        return Skipped(where, "not Unicode")
    return Document(where, text)


def _parse_line(line: bytes, where: str, text_key: str) -> str | None:
    try:
        data: Any = parse_json(line)
    except ValueError as e:
        raise DataError(f"{where} is not JSON ({e}); each line must be an object with the key '{text_key}'.") from e
    if not isinstance(data, dict) or text_key not in data:
        hint = nearest(text_key, data) if isinstance(data, dict) else " It is no object."
        raise DataError(f"{where} has no key '{text_key}' (text_key).{hint}")
    text = data[text_key]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: '{text_key}' (text_key) is a {type(text).__name__}, not text.")
    return text


def _read_text(file: Path) -> Document | Skipped:
    try:
        with open(file, "rb") as stored:
            stream = _plain(file, stored)
            raw = stream.read(_BINARY_PROBE_BYTES)
            if b"\0" in raw:
                return Skipped(str(file), "binary")
            raw += stream.read()
    except _DAMAGED as e:
        raise _damaged(file, e) from e
    except (PermissionError, FileNotFoundError):
        return Skipped(str(file), "unreadable")
    except OSError as e:
        raise _damaged(file, e) from e
    if not raw.strip():
        return Skipped(str(file), "empty")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Skipped(str(file), "not UTF-8")
    return _usable(text, str(file))


def _damaged(file: Path, e: Exception) -> DataError:
    return DataError(f"{file} is damaged ({e}); get it again, or leave it out.")
