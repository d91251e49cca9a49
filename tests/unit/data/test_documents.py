import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data import documents
from earthshine.data.documents import Document, Skipped, find_files, make_tasks, texts
from earthshine.errors import ConfigError, DataError, MissingDependencyError


def read(*inputs: Path, text_key: str = "text") -> list[Document | Skipped]:
    files, _ = find_files(inputs)
    return [found for task in make_tasks(files, text_key) for found in texts(task, text_key)]


def read_texts(*inputs: Path, text_key: str = "text") -> list[str]:
    return [d.text for d in read(*inputs, text_key=text_key) if isinstance(d, Document)]


def test_order_is_of_arguments_then_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "b/a/1.py", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_texts(tmp_path / "b", tmp_path / "a.txt") == ["b/10.txt", "b/2.txt", "b/a/1.py", "a.txt"]


def test_hidden_and_repeated_files_are_left_aside(tmp_path: Path) -> None:
    for name in (".git/config", ".secret", "a.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    files, aside = find_files([tmp_path, tmp_path / "b.txt"])
    assert [f.name for f in files] == ["a.txt", "b.txt"]
    assert dict(aside) == {"hidden": 2, "named twice": 2}


def test_what_is_not_a_document(tmp_path: Path) -> None:
    contents = {
        "a.txt": b"text",
        "b.bin": b"\x00\x01",
        "c.txt": b" \n\t",
        "d.txt": "gr\u00fcn".encode("latin-1"),
        "e.txt": b"\xef\xbb\xbfwith a byte order mark",
    }
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "f.txt").symlink_to(tmp_path / "nowhere")
    results = [(d.name.rpartition("/")[2], d.text if isinstance(d, Document) else d) for d in read(tmp_path)]
    assert [(n, d if isinstance(d, str) else d.reason) for n, d in results] == [
        ("a.txt", "text"),
        ("b.bin", "binary"),
        ("c.txt", "empty"),
        ("d.txt", "not UTF-8"),
        ("e.txt", "with a byte order mark"),
        ("f.txt", "unreadable"),
    ]


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="input=.*/none does not exist"):
        find_files([tmp_path / "none"])


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert find_files([tmp_path]) == ([], {"not a regular file": 1})


def test_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one document\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n{"text": "y"}'))
    assert read_texts(tmp_path) == ["one document\n", "x", "y"]
    for name in ("a.txt.gz", "b.jsonl.gz"):
        raw = (tmp_path / name).read_bytes()
        for damaged in (raw[:-9], b"no gzip at all"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(DataError, match=f"{name} is damaged"):
                read(tmp_path / name)


@settings(deadline=None, max_examples=20)
@given(
    lines=st.lists(st.text(min_size=1, max_size=40).filter(str.strip), max_size=20),
    blank=st.lists(st.integers(0, 20), max_size=4),
    task_bytes=st.integers(1, 200),
    end=st.booleans(),
)
def test_every_line_is_read_once_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], blank: list[int], task_bytes: int, end: bool
) -> None:
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    raw = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(lines)]
    for at in blank:
        raw.insert(at, "")
    file.write_bytes("\n".join(raw).encode() + (b"\n" if end else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TASK_BYTES", task_bytes)
        tasks = list(make_tasks([file], "text"))
        results = [d for task in tasks for d in texts(task, "text")]
    assert [d.text for d in results if isinstance(d, Document)] == lines
    assert sum(t.input_bytes for t in tasks) == file.stat().st_size
    numbers = [int(d.name.rpartition(" ")[2]) for d in results]
    assert numbers == [i for i, line in enumerate(raw, start=1) if line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "a.jsonl, line 3 is not JSON"),
        ('{"txt": "a"}', "a.jsonl, line 3 has no key 'text' .text_key.. Did you mean 'txt'"),
        ('["a"]', "a.jsonl, line 3 has no key 'text' .text_key.. It is not an object"),
        ('{"text": 5}', "a.jsonl, line 3: 'text' .text_key. is a int, not text"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read(file)


def test_lines_without_text_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_text('{"text": null}\n{"text": " "}\n{"text": "\\ud800"}\n{"text": "\\ud83c\\udf19"}\n')
    results = read(file)
    assert [d.reason if isinstance(d, Skipped) else d.text for d in results] == [
        "empty",
        "empty",
        "not Unicode",
        "\U0001f319",
    ]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    wanted = [f"row {i}" for i in range(1500)]
    pq.write_table(pa.table({"text": [*wanted, None, ""], "id": list(range(1502))}), file, row_group_size=700)
    results = read(file)
    assert [d.text for d in results if isinstance(d, Document)] == wanted
    assert [d for d in results if isinstance(d, Skipped)] == [
        Skipped(f"{file}, row 1501", "empty"),
        Skipped(f"{file}, row 1502", "empty"),
    ]
    assert sum(t.input_bytes for t in make_tasks([file], "text")) == file.stat().st_size


def test_large_parquet_rows_are_split_into_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "TASK_BYTES", 10)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 6] * 5}), file)
    assert [t.rows for t in make_tasks([file], "text")] == [("x" * 6,) * 2, ("x" * 6,) * 2, ("x" * 6,)]


def test_bad_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), file)
    with pytest.raises(DataError, match="column 'text' .text_key. is int64, not text"):
        read(file)
    with pytest.raises(DataError, match="has no column 'bodi' .text_key.. Did you mean 'body'"):
        read(file, text_key="bodi")
    assert read_texts(file, text_key="body") == ["a", "b"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="needs pyarrow: pip install pyarrow"):
        read(file)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet is damaged"):
        read(file)
