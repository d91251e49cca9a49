"""Files are what their contents say: under other names, compressed, in other encodings, in forms that are not read."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from earthshine.data import documents, formats
from earthshine.data.documents import Document, Skipped, find_files, make_tasks, texts
from earthshine.data.formats import recognize
from earthshine.data.prepare import prepare
from earthshine.errors import DataError

ROWS = [{"text": f"Story {i}, gr\u00fcn \u5730\u7403.", "url": f"https://example.org/{i}"} for i in range(50)]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()
ARRAY = json.dumps(ROWS).encode()
PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
STREAM = "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()


def zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda raw: lzma.compress(raw, format=lzma.FORMAT_ALONE),
}


def found(*inputs: Path) -> list[Document | Skipped]:
    files, _ = find_files(inputs)
    return [d for task in make_tasks(files, "text") for d in texts(task, "text")]


def read(*inputs: Path) -> list[str]:
    return [d.text for d in found(*inputs) if isinstance(d, Document)]


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "part-00000", "a.txt", "A.JSON", "a.json.1"])
@pytest.mark.parametrize("raw", [LINES, ARRAY, PRETTY, STREAM], ids=["lines", "array", "pretty", "stream"])
def test_records_under_any_name(tmp_path: Path, name: str, raw: bytes) -> None:
    assert read(write(tmp_path / name, raw)) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a"])
def test_compressed_records(tmp_path: Path, name: str, suffix: str) -> None:
    assert read(write(tmp_path / (name + suffix), PACKERS[suffix](LINES))) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_under_a_plain_name_and_in_several_parts(tmp_path: Path, suffix: str) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    parts = PACKERS[suffix](LINES[:half]) + PACKERS[suffix](LINES[half:])
    assert read(write(tmp_path / "a.jsonl", parts)) == TEXTS
    assert read(write(tmp_path / "a.txt", PACKERS[suffix](b"The Moon.\n"))) == ["The Moon.\n"]


def test_a_zstd_file_of_pzstd_begins_with_a_frame_to_step_over(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstd(LINES))) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_compressed_file_that_is_cut_short(tmp_path: Path, name: str, suffix: str) -> None:
    packed = PACKERS[suffix](LINES * 40)
    for damaged in (packed[: len(packed) // 2], packed[:-3], b""):
        file = write(tmp_path / (name + suffix), damaged)
        with pytest.raises(DataError, match=f"{file.name} is damaged"):
            found(file)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_what_follows_a_compressed_part_is_another_or_damage(tmp_path: Path, suffix: str) -> None:
    """Not, as for the libraries of bz2 and lzma, the end of the file."""
    part = PACKERS[suffix](LINES)
    for rest in (b"and more", part[:4] + b"damaged!" + part[12:], part[:-9] + b"\xff" * 9):
        file = write(tmp_path / f"a.jsonl{suffix}", part + rest)
        with pytest.raises(DataError, match=r"a.jsonl\S+ is damaged"):
            found(file)
    assert read(write(tmp_path / f"a.jsonl{suffix}", part + bytes(512))) == TEXTS


def test_a_large_zstd_window(tmp_path: Path) -> None:
    """That of `zstd --long=31`; by default the library stops at 2**27."""
    long = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=long).compressobj()
    assert read(write(tmp_path / "a.jsonl.zst", packed.compress(LINES) + packed.flush())) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("raw", [LINES, PRETTY], ids=["lines", "pretty"])
def test_a_byte_order_mark_is_heeded(tmp_path: Path, encoding: str, raw: bytes) -> None:
    coded = raw.decode().encode(encoding)
    assert read(write(tmp_path / "a.json", coded)) == TEXTS
    assert read(write(tmp_path / "a.json.gz", gzip.compress(coded))) == TEXTS
    assert read(write(tmp_path / "b.txt", "gr\u00fcn".encode(encoding))) == ["gr\u00fcn"]


def test_parquet_under_other_names(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    for name, compression in (("a.gz.parquet", "gzip"), ("b.parquet", "zstd"), ("c", "snappy"), ("d.bin", "none")):
        pq.write_table(table, tmp_path / name, compression=compression)
        assert read(tmp_path / name) == TEXTS
    packed = write(tmp_path / "e.parquet.zst", zstd((tmp_path / "b.parquet").read_bytes()))
    assert recognize(packed, "text").reason == "compressed parquet"


def tar(*names: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 5
            archive.addfile(entry, io.BytesIO(b"hello"))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "hello")
    return out.getvalue()


def arrow(form: str) -> bytes:
    out = io.BytesIO()
    table = pa.table({"text": TEXTS})
    if form == "stream":
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.feather.write_feather(table, out)
    return out.getvalue()


UNREAD = {
    "a.tar": (tar("0.txt", "0.json"), "tar archive"),
    "a.tar.gz": (gzip.compress(tar("a.txt")), "tar archive"),
    "a.tgz": (gzip.compress(tar("a.txt")), "tar archive"),
    "a.tar.zst": (zstd(tar("a.txt")), "tar archive"),
    "a.zip": (zipped(), "zip archive"),
    "a.docx": (zipped(), "zip archive"),
    "a.arrow": (arrow("stream"), "Arrow stream"),
    "a.feather": (arrow("file"), "Arrow file"),
    "b.feather": (b"FEA1\0\0\0\0", "Feather file"),
    "a.csv": (b"id,text\n1,hello\n", "CSV"),
    "a.csv.gz": (gzip.compress(b"id,text\n1,hello\n"), "CSV"),
    "a.tsv": (b"id\ttext\n1\thello\n", "TSV"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n\0", "PDF"),
    "a.lz4": (b"\x04\x22\x4d\x18\0\0", "compressed with lz4"),
    "a.gz.gz": (gzip.compress(gzip.compress(LINES)), "compressed twice"),
    "a.txt": ("gr\u00fcne Wiese".encode("latin-1"), "not UTF-8"),
    "a.gb": ("\u5730\u7403\u548c\u6708\u4eae".encode("gb18030"), "not UTF-8"),
    "a.utf16": ("a text of several words".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "b.txt": (b"a text\0\0\0\0", "binary"),
    "a.tfrecord": (b"\x05\0\0\0\0\0\0\0", "binary"),
    "lfs.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
    "package.json": (
        json.dumps({"name": "a", "scripts": {"x": "y"}}, indent=2).encode(),
        "JSON without the key 'text'",
    ),
    "config.json": (b'{"vocab_size": 5}', "JSON without the key 'text'"),
    "large.json": (json.dumps({f"k{i}": i for i in range(9999)}, indent=1).encode(), "JSON without the key 'text'"),
    "ids.json": (b"[1, 2, 3]", "JSON without records"),
    "tsconfig.json": (b'{\n  // a comment\n  "a": 1\n}\n', "not JSON"),
    "page.json": (b"<html>not found</html>", "not JSON"),
    "wet.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"), "WARC archive"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_looks_like_data_and_is_not_read(tmp_path: Path, name: str) -> None:
    raw, reason = UNREAD[name]
    form = recognize(write(tmp_path / name, raw), "text")
    assert (form.kind, form.reason) == ("none", reason)
    assert form.fix


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0"),
        ("a.bin", bytes(100)),
        ("a.o", b"\x7fELF\x02\x01\x01\0"),
        ("a.dat", b"\xff\xfe\xfd"),
        ("a.raw", b"\x01\x02\x90\xff" * 30),
        ("b.json", b"[ ]\n"),
    ],
)
def test_what_is_not_data(tmp_path: Path, name: str, raw: bytes) -> None:
    form = recognize(write(tmp_path / name, raw), "text")
    assert (form.kind, form.fix) == ("none", "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "[a link](https://example.org) and {braces}\n"),
        ("a.py", "{'a': 1}\n{'b': 2}\n"),
        ("a.ipynb", json.dumps({"cells": [], "text": 5}, indent=1)),
        ("a.geojson", '{"type": "Feature"}\n'),
        ("a.txt", "PARTS and ORCHIDS\n"),
        ("b.txt", "BZh91 is how a bzip2 file begins\n"),
        ("a.ini", "[section]\nkey = 1\n"),
        ("a.csvx", "a,b\n"),
        ("c.txt", '[{"name": "a list without the key"}]'),
    ],
)
def test_texts_that_begin_like_data(tmp_path: Path, name: str, text: str) -> None:
    assert read(write(tmp_path / name, text.encode())) == [text]


def test_one_record_in_a_file_of_its_own(tmp_path: Path) -> None:
    for name, indent in (("a.json", 2), ("b.json", None), ("c.txt", None)):
        assert read(write(tmp_path / name, json.dumps(ROWS[3], indent=indent).encode())) == TEXTS[3:4]


@pytest.mark.parametrize("name", ["a.json", "part-00000"])
def test_a_first_line_longer_than_what_is_looked_at(tmp_path: Path, name: str) -> None:
    rows = [{"id": i, "text": "long " * 40_000} for i in range(3)]
    for raw in ("\n".join(map(json.dumps, rows)), json.dumps(rows), json.dumps(rows[0], indent=1)):
        assert set(read(write(tmp_path / name, raw.encode()))) == {rows[0]["text"]}


def test_a_second_line_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    rows = [{"body": "short"}, {"body": "long " * 40_000}]
    with pytest.raises(DataError, match="has no key 'text'"):
        found(write(tmp_path / "part-00000", "\n".join(map(json.dumps, rows)).encode()))


def test_a_long_text_that_begins_like_json_stays_a_text(tmp_path: Path) -> None:
    for text in ('{"a": 1, ' * 20_000, "{% raw %}\n" * 20_000, json.dumps({"cells": ["x" * 99] * 2_000}, indent=1)):
        assert read(write(tmp_path / "a.md", text.encode())) == [text]


def test_how_deep_a_record_nests_beside_its_text_does_not_matter(tmp_path: Path) -> None:
    line = '{"text": "a", "meta": ' + "[" * 300 + "]" * 300 + "}\n"
    assert read(write(tmp_path / "a.jsonl", 2 * line.encode())) == ["a", "a"]


def test_records_are_cut_into_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", 100)
    file = write(tmp_path / "a.json", PRETTY)
    tasks = list(make_tasks([file], "text"))
    assert len(tasks) > 5
    assert [d.text for task in tasks for d in texts(task, "text") if isinstance(d, Document)] == TEXTS
    assert sum(task.input_bytes for task in tasks) == file.stat().st_size


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (PRETTY[:-2], "is damaged .the array that it holds is not closed"),
        (PRETTY[:-9], "record 50 is not JSON"),
        (b'[{"text": "a"}, {"txt": "b"}]', "record 2 has no key 'text' .text_key.. Did you mean 'txt'"),
        (b'[{"text": "a"}, {"text": 5}]', "record 2: 'text' .text_key. is a int, not text"),
        (b'[{"text": "a"}, {"text": "b" "c"}]', "record 2 is not JSON"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "record 2 is nested too deeply"),
        (b'{"text": "a"}\n{"text": "b"\n{"text": "c"}', "line 2 is not JSON"),
        (b'{"text": "a"}\n{"text": ' + b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"text": "a"\n{"text": "b"}\n', "line 1 is not JSON"),
    ],
)
def test_damaged_json(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"a.json,? {message}"):
        found(write(tmp_path / "a.json", raw))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("data/own.txt", "disk/part/far.txt", "disk/part/deep/er.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data" / "part").symlink_to("../disk/part")
    (tmp_path / "data" / "part2").symlink_to("../disk/part")
    (tmp_path / "disk" / "part" / "up").symlink_to("..")
    (tmp_path / "disk" / "part" / "self").symlink_to(".")
    files, aside = find_files([tmp_path / "data"])
    assert [str(f.relative_to(tmp_path / "data")) for f in files] == ["own.txt", "part/far.txt", "part/deep/er.txt"]
    assert dict(aside) == {"folder reached twice": 3}


def test_prepare_refuses_to_leave_data_out_unless_told(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "README.md").write_text("What this data set is.\n")
    for name, (raw, _) in list(UNREAD.items())[:7]:
        write(folder / name, raw)
    (folder / "0.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"0.jsonl .unreadable: .*a.arrow .Arrow stream: convert it.*; and 3 more") as e:
        prepare([folder], tokenizer_dir, tmp_path / "out")
    assert "--skip-unreadable" in str(e.value)
    assert not (tmp_path / "out").exists()
    summary = prepare([folder], tokenizer_dir, tmp_path / "out", skip_unreadable=True)
    assert summary["documents"] == 1
    assert summary["skipped"] == {"Arrow stream": 1, "tar archive": 4, "unreadable": 1, "zip archive": 2}
    assert f"skipped {folder / 'a.zip'}: zip archive" in capsys.readouterr().err


def test_what_is_found_unreadable_only_late_is_refused_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = write(tmp_path / "a.txt", b"word " * 20_000 + "gr\u00fcn".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt .not UTF-8: convert it to UTF-8"):
        prepare([file], tokenizer_dir, tmp_path / "out")
    good = write(tmp_path / "b.txt", b"word")
    summary = prepare([file, good], tokenizer_dir, tmp_path / "out", skip_unreadable=True)
    assert (summary["documents"], summary["skipped"]) == (1, {"not UTF-8": 1})


def test_no_more_of_an_object_is_read_than_a_record_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes that begins as an object under another name is not held in memory to see what it is."""
    monkeypatch.setattr(formats, "_CONFIG_BYTES", 1000)
    stream = io.BytesIO(b"1, " * 10_000)
    assert formats._json_unnamed(b'{"a": [', stream, False, "text") is None
    assert stream.tell() == 1000
