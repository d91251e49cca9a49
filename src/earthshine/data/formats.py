"""What is in a file, whatever its name says: decided by its first bytes, decompressed and decoded. Torch-free.

A name is heeded only where contents cannot tell: `.json` and `.csv` promise records, other text is a document.
"""

import bz2
import codecs
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from earthshine.config import parse_json
from earthshine.errors import DataError

HEAD_BYTES = 1 << 16
_CONFIG_BYTES = 1 << 26  # a single JSON object up to this size is read to see whether it is a record
_PACKED_BYTES = 1 << 14  # of input at once: what comes out may be thousands of times as much
_ZSTD_WINDOW = 1 << 31  # the largest that `zstd --ultra --long=31` makes; taken only where a frame asks for it

_LINES = {".jsonl", ".ndjson", ".jsonlines", ".jl"}
_TABLES = {".csv": "CSV", ".tsv": "TSV"}
_PACKED = {".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma"}
# What is binary under such a name is data in a form that is not read, and no picture or program.
_DATA = {".json", ".txt", ".md", ".text", ".html", ".xml", ".arrow", ".feather", ".tar", ".mds", ".tfrecord"}
_DATA |= {".tfrecords", ".br", ".lz4", ".snappy", *_LINES, *_TABLES}

_UNPACK = "unpack it"
_CONVERT = "convert it to JSON lines or parquet"
TO_UTF8 = "convert it to UTF-8, for example with iconv"
_REPAIR_JSON = "repair it, or name it .txt if it is a text"
# Where the bytes stand, what they are, its name, and what makes it readable.
_CONTAINERS: tuple[tuple[int, bytes, str, str], ...] = (
    (257, b"ustar", "tar archive", _UNPACK),
    (0, b"PK\x03\x04", "zip archive", _UNPACK),
    (0, b"PK\x05\x06", "zip archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "rar archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it, or use zstd"),
    (0, b"\xff\x06\x00\x00sNaPpY", "compressed with snappy", "decompress it, or use zstd"),
    (0, b"LZIP", "compressed with lzip", "decompress it, or use xz"),
    (0, b"\x1f\x9d", "compressed with compress", "decompress it, or use gzip"),
    (0, b"\x1f\x8b\x08", "compressed twice", "decompress it once"),
    (0, b"\x28\xb5\x2f\xfd", "compressed twice", "decompress it once"),
    (0, b"\xfd7zXZ\x00", "compressed twice", "decompress it once"),
    (0, b"PARE", "encrypted parquet", "decrypt it"),
    (0, b"ARROW1\x00\x00", "Arrow file", _CONVERT),
    (0, b"FEA1", "Feather file", _CONVERT),
    (0, b"\xff\xff\xff\xff", "Arrow stream", _CONVERT),
    (0, b"ORC", "ORC file", _CONVERT),
    (0, b"Obj\x01", "Avro file", _CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5 file", _CONVERT),
    (0, b"SQLite format 3\x00", "SQLite database", _CONVERT),
    (0, b"\x93NUMPY", "NumPy array", _CONVERT),
    (0, b"MMIDIDX\x00\x00", "Megatron index", "prepare the text it was made from"),
    (0, b"%PDF-", "PDF", "extract its text"),
    (0, b"WARC/", "WARC archive", "extract its text into JSON lines"),
    (0, b"<mediawiki", "MediaWiki dump", "extract its text into JSON lines"),
    (0, b"version https://git-lfs.github.com/spec/", "Git LFS pointer", "fetch the file it stands for: git lfs pull"),
)
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROL = re.compile(rb"[\x00-\x07\x0e-\x19\x1c-\x1f\x7f]")
_WORD = re.compile(rb"[A-Za-z\x80-\xff]{4}")
_OBJECT = re.compile(rb'(\[\s*)?\{\s*"')
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one that decoders step over


@dataclass(frozen=True)
class Format:
    """What is in a file: a text, JSON records (a line each, or one after another), parquet's rows, or nothing we read.

    reason: why nothing is read. fix: how it could be; empty where it does not look like data.
    """

    kind: Literal["text", "lines", "records", "rows", "none"]
    reason: str = ""
    fix: str = ""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what reading a file can raise into a DataError that names it."""
    try:
        yield
    except (EOFError, UnicodeDecodeError) as e:
        raise damaged(file, e) from e
    except OSError as e:
        raise DataError(f"{file} cannot be read ({e.strerror}); make it readable or name other inputs.") from e


def damaged(file: Path, e: Exception | str) -> DataError:
    return DataError(f"{file} is damaged ({e}); fetch it again, or leave it out.")


def plain(file: Path, stored: BinaryIO) -> BinaryIO:
    """What is in an open file, decompressed, and from its start: as UTF-8 when a byte order mark says UTF-16 or 32."""
    unpack = _unpacker(file, stored) or _same
    lead = unpack(stored).read(4)
    stored.seek(0)
    stream = unpack(stored)
    encoding = next((name for mark, name in _BOMS if lead.startswith(mark)), "")
    return _stream(_recoded(stream, encoding)) if encoding else stream


def _unpacker(file: Path, stored: BinaryIO) -> Callable[[BinaryIO], BinaryIO] | None:
    lead = stored.read(10)
    stored.seek(0)
    frame: Callable[[], Any]
    if lead.startswith(b"\x1f\x8b\x08"):
        frame = partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)
    elif _BZIP2.match(lead):
        frame = bz2.BZ2Decompressor
    elif lead.startswith(b"\xfd7zXZ\x00") or (lead.startswith(b"\x5d\x00\x00") and file.suffix.lower() == ".lzma"):
        frame = lzma.LZMADecompressor
    elif _ZSTD.match(lead):
        import zstandard

        frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
    else:
        return None
    return lambda packed: _stream(_unpacked(packed, frame))


def _same(stored: BinaryIO) -> BinaryIO:
    return stored


class _Chunks(io.RawIOBase):
    """A file of the bytes that an iterator gives."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        n = min(len(out), len(self._left))
        out[:n], self._left = self._left[:n], self._left[n:]
        return n


def _stream(chunks: Iterator[bytes]) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Chunks(chunks), HEAD_BYTES))


def _unpacked(packed: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """The contents of all frames, or members, of a compressed file, with zeros for padding between them.

    The libraries' own files are not used: zstandard's hides that one is cut short, and those of bz2 and lzma take a
    damaged one after the first for no part of the file.
    """
    frame: Any = None
    while data := packed.read(_PACKED_BYTES):
        while data:
            if frame is None:
                data = data.lstrip(b"\0")
                frame = new_frame() if data else None
                continue
            try:
                plain_bytes = frame.decompress(data)
            except Exception as e:  # each library has its own kind
                raise EOFError(str(e)) from e
            yield plain_bytes
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of its compressed data")


def _recoded(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    while data := stream.read(HEAD_BYTES):
        yield decoder.decode(data).encode()
    yield decoder.decode(b"", final=True).encode()


def recognize(file: Path, text_key: str) -> Format:
    """What is in a file. Raises DataError for one that is damaged already at its start, or whose disk is."""
    try:
        stored = open(file, "rb")  # noqa: SIM115 - closed below; only the opening is tried
    except OSError:
        return Format("none", "unreadable", "make it readable, or restore what it links to")
    with stored, reading(file):
        packed = _unpacker(file, stored) is not None
        try:
            stream = plain(file, stored)
            head = stream.read(HEAD_BYTES)
        except UnicodeDecodeError:  # a byte order mark, and then no such text
            stored.seek(0)
            return _not_utf8(stored.read(HEAD_BYTES))
        return _of_head(file, head, stream, packed, text_key)


def _of_head(file: Path, head: bytes, stream: BinaryIO, packed: bool, text_key: str) -> Format:
    suffixes = [s.lower() for s in file.suffixes]
    inner = next((s for s in reversed(suffixes) if s not in _PACKED), "")
    complete, binary = len(head) < HEAD_BYTES, b"\0" in head
    for at, magic, name, fix in _CONTAINERS:
        if head.startswith(magic, at) and (binary or not magic.isalnum()):  # a text may begin with such letters
            return Format("none", name, fix)
    if binary and head.startswith(b"PAR1"):
        return Format("none", "compressed parquet", "decompress it") if packed else Format("rows")
    if inner == ".parquet":
        return Format("rows")  # pyarrow says what is wrong with it
    head = head.removeprefix(codecs.BOM_UTF8)
    if suffixes[-1:] and suffixes[-1] in _PACKED and not packed and not head.lstrip().startswith((b"{", b"[")):
        raise damaged(file, f"its name ends in {suffixes[-1]}, but its contents are not compressed")
    if binary:
        if _is_utf16(head):
            return Format("none", "UTF-16 without a byte order mark", TO_UTF8)
        return Format("none", "binary", "fetch it again: its name promises other contents" if inner in _DATA else "")
    json_format = _json(head, stream, complete, inner, text_key)
    if json_format:
        return json_format
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=complete)
    except UnicodeDecodeError:
        return _not_utf8(head)
    if inner in _TABLES and head.strip():
        return Format("none", _TABLES[inner], _CONVERT)
    return Format("text")


def _not_utf8(head: bytes) -> Format:
    """A text in another encoding is data; what has control characters, or not even a word, is none."""
    return Format("none", "not UTF-8", "" if _CONTROL.search(head) or not _WORD.search(head) else TO_UTF8)


def _is_utf16(head: bytes) -> bool:
    """Whether half of the bytes are zero, and always the same half, as in Latin text."""
    even, odd = head[::2], head[1::2]
    zeros = sorted((even.count(0) / max(len(even), 1), odd.count(0) / max(len(odd), 1)))
    return len(head) >= 16 and zeros[0] < 0.02 and zeros[1] > 0.5 and not _CONTROL.search(head.replace(b"\0", b""))


def _json(head: bytes, stream: BinaryIO, complete: bool, inner: str, text_key: str) -> Format | None:
    """The kind of JSON; None for what is none, or is text that happens to be JSON (a notebook)."""
    body = head.lstrip()
    if inner in _LINES:
        line = body.partition(b"\n")[0].rstrip()
        return Format("records" if re.match(rb"\[\s*\{", body) or line.endswith((b"{", b"[", b",")) else "lines")
    if inner != ".json":
        return _json_unnamed(body, stream, complete, text_key)
    if not body:
        return Format("text")
    if body.startswith(b"["):
        if re.match(rb"\[\s*\{", body):
            return Format("records")
        empty = re.fullmatch(rb"\[\s*\]\s*", body)
        return Format("none", *(("empty",) if empty else ("JSON without records", "make it an array of objects")))
    if not body.startswith(b"{"):
        return Format("none", "not JSON", _REPAIR_JSON)
    line, newline, following = body.partition(b"\n")
    if newline and following.strip() and isinstance(_parsed(line), dict):
        return Format("lines")
    if newline and not line.rstrip().endswith((b"{", b"[", b",")) and following.lstrip().startswith(b"{"):
        return Format("lines")  # the first line is damaged; reading says how
    if not newline and not complete:
        return Format("records")  # a line longer than the head
    return _json_object(body if complete else body + stream.read(_CONFIG_BYTES), complete, text_key)


def _json_object(body: bytes, complete: bool, text_key: str) -> Format:
    """An object over several lines: a record, the first of several, or a config, which is no text."""
    try:
        text = body.decode()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        if not complete and len(body) >= _CONFIG_BYTES:
            return Format("records")
        return Format("none", "not JSON", _REPAIR_JSON)
    if text_key in value or text[end:].strip():
        return Format("records")
    return Format(
        "none",
        f"JSON without the key '{text_key}'",
        "give --text-key if its text has another key, or name it .txt if the JSON is the text",
    )


def _json_unnamed(body: bytes, stream: BinaryIO, complete: bool, text_key: str) -> Format | None:
    """JSON under another name: only what cannot well be anything else."""
    if not body.startswith((b"{", b"[")):
        return None
    lines = [line for line in body.split(b"\n") if line.strip()]
    first = _parsed(lines[0])
    if isinstance(first, dict):
        second = _parsed(lines[1]) if len(lines) > 1 else None
        cut = len(lines) == 2 and not complete and _OBJECT.match(lines[1])
        if isinstance(second, dict) or cut or (len(lines) == 1 and text_key in first):
            return Format("lines")
        return None
    start = re.match(rb"\[?\s*(?=\{)", body)
    try:
        value, _ = json.JSONDecoder().raw_decode(body[start.end() :].decode(errors="replace")) if start else (None, 0)
    except (ValueError, RecursionError):
        if complete or len(body) >= _CONFIG_BYTES or not _OBJECT.match(body):
            return None
        more = stream.read(_CONFIG_BYTES)  # a record may be longer than the head
        return _json_unnamed(body + more, stream, len(more) < _CONFIG_BYTES, text_key) if more else None
    return Format("records") if isinstance(value, dict) and isinstance(value.get(text_key), str) else None


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None
