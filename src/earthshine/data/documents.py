"""Documents out of files: which files, what is in them, and in what pieces they go to workers. Torch-free.

JSON holds one document per line or record, parquet one per row, any other file is one document; `formats` recognizes
them by their contents, compressed or not. The order is that of the arguments, folders sorted by name, links followed.
Files that are hidden (in folders), binary or empty are skipped and counted; the caller logs them. `Skipped.fix` marks
what looks like data and is not read.
"""

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from earthshine.data.formats import TO_UTF8, Format, damaged, plain, reading, recognize
from earthshine.errors import ConfigError, DataError, MissingDependencyError, nearest

TASK_BYTES = 1 << 19  # of input in one task: half a second of work or less, so that workers end together
_TASK_FILES = 256
_BETWEEN_RECORDS = re.compile(r"[\s,]*")
_NAMED = 5  # files in one message


@dataclass(frozen=True)
class Document:
    """A text, and the file, line or row it is from."""

    name: str
    text: str


@dataclass(frozen=True)
class Skipped:
    """A file, line or row that is not a document, and why; and where it looks like data, how it could be read."""

    name: str
    reason: str
    fix: str = ""


@dataclass(frozen=True)
class EncodingTask:
    """What a worker tokenizes at once. One of: files (whole, a document each), lines (of a JSON-lines file), rows.

    name: the file, for messages. first: number of its first line or row, from 1. unit: what a row is. input_bytes: how
    much of the input, as it lies on disk, is done when this is.
    """

    input_bytes: int
    name: str = ""
    first: int = 1
    files: tuple[str | Skipped, ...] = ()
    lines: bytes = b""
    rows: tuple[str | None, ...] = ()
    unit: str = "row"


def find_files(inputs: Sequence[str | Path]) -> tuple[list[Path], Counter[str]]:
    """The files to read, in order, and what was left aside: hidden ones in folders, and ones reached twice.

    Raises ConfigError for an input that does not exist.
    """
    files: list[Path] = []
    seen: set[str] = set()  # real paths, of folders too: links may lead in a circle
    aside: Counter[str] = Counter()
    for given in map(Path, inputs):
        if not given.exists():
            raise ConfigError(f"input={given} does not exist; give files or folders of text, JSON or parquet.")
        for file in _walk(given, aside, seen) if given.is_dir() else [given]:
            real = os.path.realpath(file)
            if real in seen:
                aside["named twice"] += 1
            elif file.is_file() or not file.exists():  # a dangling link is reported later, as unreadable
                seen.add(real)
                files.append(file)
            else:
                aside["not a regular file"] += 1
    return files, aside


def _walk(folder: Path, aside: Counter[str], seen: set[str]) -> Iterator[Path]:
    """Files below a folder: a folder's own, sorted by name, and then its subfolders' in the same way.

    Links to folders are followed, each folder once. Raises DataError for a folder that cannot be listed.
    """

    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename} cannot be listed ({e.strerror}); make it readable or name other inputs.") from e

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            aside["folder reached twice"] += 1
            folders.clear()
            continue
        seen.add(real)
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


def refuse_unreadable(files: Sequence[Path], formats: Sequence[Format]) -> None:
    """Raise DataError, which names some and how each could be read, when there are files of data that are not read."""
    refuse([Skipped(str(f), form.reason, form.fix) for f, form in zip(files, formats, strict=True) if form.fix])


def refuse(skipped: Sequence[Skipped]) -> None:
    """Raise DataError when something that looks like data would be left out."""
    fixable = [s for s in skipped if s.fix]
    if not fixable:
        return
    shown = "; ".join(f"{s.name} ({s.reason}: {s.fix})" for s in fixable[:_NAMED])
    more = f"; and {len(fixable) - _NAMED} more" if len(fixable) > _NAMED else ""
    raise DataError(
        f"input that looks like data cannot be read as it is: {shown}{more}. Do that, name other inputs, or leave "
        f"such files out with --skip-unreadable."
    )


def make_tasks(files: Sequence[Path], text_key: str, formats: Iterable[Format] | None = None) -> Iterator[EncodingTask]:
    """Cut the files' contents into tasks, in order; holds one task's input at a time.

    formats: of the files, where they were recognized before. Raises DataError for a damaged file.
    """
    group: list[str | Skipped] = []
    group_bytes = 0
    for file, form in zip(files, formats or (recognize(f, text_key) for f in files), strict=True):
        if form.kind in ("text", "none"):
            size = size_of(file)
            if group and (group_bytes + size > TASK_BYTES or len(group) == _TASK_FILES):
                yield EncodingTask(group_bytes, files=tuple(group))
                group, group_bytes = [], 0
            group.append(str(file) if form.kind == "text" else Skipped(str(file), form.reason, form.fix))
            group_bytes += size
            continue
        if group:
            yield EncodingTask(group_bytes, files=tuple(group))
            group, group_bytes = [], 0
        match form.kind:
            case "lines":
                yield from _line_tasks(file)
            case "records":
                yield from _record_tasks(file, text_key)
            case "rows":
                yield from _row_tasks(file, text_key)
    if group:
        yield EncodingTask(group_bytes, files=tuple(group))


def _line_tasks(file: Path) -> Iterator[EncodingTask]:
    """Whole lines, about TASK_BYTES a task; a longer line is a task of its own."""
    first, seen, unfinished = 1, 0, bytearray()
    with reading(file), open(file, "rb") as raw:
        stream = plain(file, raw)
        while block := stream.read(TASK_BYTES):
            ended, newline, tail = block.rpartition(b"\n")
            if not newline:
                unfinished += block
                continue
            lines, unfinished = b"".join((unfinished, ended, newline)), bytearray(tail)
            yield EncodingTask(raw.tell() - seen, name=str(file), first=first, lines=lines)
            first, seen = first + lines.count(b"\n"), raw.tell()
        yield EncodingTask(raw.tell() - seen, name=str(file), first=first, lines=bytes(unfinished))


def _record_tasks(file: Path, text_key: str) -> Iterator[EncodingTask]:
    """The texts of records that may span lines. They are parsed here: where one ends is known only then."""
    first, size, seen = 1, 0, 0
    rows: list[str | None] = []
    with reading(file), open(file, "rb") as raw:
        for record in _records(file, plain(file, raw)):
            rows.append(_text_of(record, f"{file}, record {first + len(rows)}", text_key))
            size += len(rows[-1] or "")
            if size >= TASK_BYTES:
                yield EncodingTask(raw.tell() - seen, name=str(file), first=first, rows=tuple(rows), unit="record")
                first, seen, size, rows = first + len(rows), raw.tell(), 0, []
        yield EncodingTask(raw.tell() - seen, name=str(file), first=first, rows=tuple(rows), unit="record")


def _records(file: Path, stream: BinaryIO) -> Iterator[Any]:
    """JSON values one after another, or the items of an array of them; holds one longest value's text."""
    decode = json.JSONDecoder().raw_decode
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    text, at, number, ended, in_array = "", 0, 1, False, False
    while True:
        at = between.end() if (between := _BETWEEN_RECORDS.match(text, at)) else at
        mark = text[at : at + 1]
        if mark == ("]" if in_array else "["):
            at, in_array = at + 1, not in_array
            continue
        if mark:
            try:
                value, at = decode(text, at)
            except RecursionError as e:
                raise DataError(f"{file}, record {number} is nested too deeply to be read.") from e
            except json.JSONDecodeError as e:
                if ended or not (e.pos >= len(text) - 12 or e.msg.startswith("Unterminated string")):
                    raise DataError(
                        f"{file}, record {number} is not JSON ({e.msg}); fetch it again, or leave it out."
                    ) from e
            else:
                number += 1
                yield value
                continue
        elif ended:
            break
        # Twice as much each time, so that a long value is not parsed often.
        block = stream.read(max(TASK_BYTES, len(text) - at))
        ended = not block
        text, at = text[at:] + utf8.decode(block, final=ended), 0
    if in_array:
        raise damaged(file, "the array that it holds is not closed")


def _row_tasks(file: Path, text_key: str) -> Iterator[EncodingTask]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as e:
        raise MissingDependencyError(
            f"{file} is a parquet file, and reading one needs pyarrow: pip install pyarrow (or 'earthshine[parquet]')."
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
                    input_bytes = round((first - 1 + len(rows)) * per_row) - counted
                    yield EncodingTask(input_bytes, name=str(file), first=first, rows=rows)
                    first, counted = first + len(rows), counted + input_bytes
    except (pyarrow.ArrowException, OSError) as e:
        raise damaged(file, e) from e


def _split_rows(rows: list[str | None]) -> Iterator[tuple[str | None, ...]]:
    start = size = 0
    for i, row in enumerate(rows):
        size += len(row or "")
        if size >= TASK_BYTES:
            yield tuple(rows[start : i + 1])
            start, size = i + 1, 0
    if start < len(rows):
        yield tuple(rows[start:])


def texts(task: EncodingTask, text_key: str) -> Iterator[Document | Skipped]:
    """The documents of a task, in order. Raises DataError for one that is damaged."""
    if task.files:
        for file in task.files:
            yield file if isinstance(file, Skipped) else _read_text(Path(file))
    elif task.rows:
        for number, row in enumerate(task.rows, start=task.first):
            yield _usable(row, f"{task.name}, {task.unit} {number}")
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
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which is not a character
        return Skipped(where, "not Unicode")
    return Document(where, text)


def _parse_line(line: bytes, where: str, text_key: str) -> str | None:
    try:
        data = json.loads(line)  # `parse_json` would walk all of a record, of which nothing but the text is used
    except RecursionError as e:
        raise DataError(f"{where} is nested too deeply to be read.") from e
    except ValueError as e:
        raise DataError(f"{where} is not JSON ({e}); each line must be an object with the key '{text_key}'.") from e
    return _text_of(data, where, text_key)


def _text_of(data: Any, where: str, text_key: str) -> str | None:
    """The text of a parsed record."""
    if not isinstance(data, dict) or text_key not in data:
        hint = nearest(text_key, data) if isinstance(data, dict) else " It is not an object."
        raise DataError(f"{where} has no key '{text_key}' (text_key).{hint}")
    text = data[text_key]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: '{text_key}' (text_key) is a {type(text).__name__}, not text.")
    return text


def _read_text(file: Path) -> Document | Skipped:
    try:
        stored = open(file, "rb")  # noqa: SIM115 - closed below; only the opening is tried
    except OSError:
        return Skipped(str(file), "unreadable", "make it readable")
    with stored, reading(file):
        raw = plain(file, stored).read()
    if not raw.strip():
        return Skipped(str(file), "empty")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Skipped(str(file), "not UTF-8", TO_UTF8)
    return _usable(text, str(file))
