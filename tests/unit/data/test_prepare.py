import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.data import prepare as module
from earthshine.data.documents import Task
from earthshine.data.prepare import Encoded, prepare, split_text
from earthshine.data.shards import ShardWriter, TokenShards
from earthshine.data.tokenizer import load_tokenizer
from earthshine.errors import ConfigError, DataError, DiskFullError, OutputExistsError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Text files, JSON lines and gzip with 120 documents, and three files that are none."""
    folder = tmp_path / "corpus"
    (folder / "more").mkdir(parents=True)
    for i in range(40):
        (folder / "more" / f"{i:02d}.py").write_text(f"def moon_{i}():\n    return {i}\n" * (i + 1))
    lines = [json.dumps({"text": f"the earth is number {i}, \u5730\u7403"}) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(reversed(lines)).encode()))
    (folder / "c.bin").write_bytes(b"\0" * 100)
    (folder / "d.txt").write_text("")
    (folder / "e.txt").write_bytes(b"\xff\xfe\xfd")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith((out.name, f".{out.name}"))]


def test_tokens_are_those_of_the_tokenizer(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    summary = prepare([corpus], tokenizer_dir, tmp_path / "out", workers=1)
    shards, t = TokenShards(tmp_path / "out", vocab_size=300), load_tokenizer(tokenizer_dir)
    assert shards.num_documents == summary["documents"] == 120
    assert summary["skipped"] == {"binary": 1, "empty": 1, "not UTF-8": 1}
    assert shards.tokenizer_sha256 == t.sha256
    assert shards.eod == 0
    got = [shards.document(i).tolist() for i in range(120)]
    assert all(d[-1] == 0 and 0 not in d[:-1] for d in got)
    assert t.decode(got[0][:-1]) == "the earth is number 0, \u5730\u7403"
    assert got[81] == [*t.encode((corpus / "more" / "01.py").read_text()), 0]
    assert shards.num_bytes == sum(len(t.decode(d).encode()) for d in got)


def test_output_does_not_depend_on_workers(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MIN_BYTES_PER_WORKER", 1000)
    monkeypatch.setattr("earthshine.data.documents.TASK_BYTES", 700)
    made = [
        prepare([corpus], tokenizer_dir, tmp_path / f"out{n}", workers=n, max_tokens_per_shard=4000) for n in (1, 2)
    ]
    assert [m["workers"] for m in made] == [1, 2]
    assert made[0]["shards"] > 2
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


def test_small_inputs_start_no_processes(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    assert prepare([corpus], tokenizer_dir, tmp_path / "out", workers=64)["workers"] == 1


def test_special_tokens_in_a_document_do_not_end_it(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.txt").write_text("one <|end|> two")
    prepare([tmp_path / "a.txt"], tokenizer_dir, tmp_path / "out")
    assert TokenShards(tmp_path / "out").document(0).tolist().count(0) == 1


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="ab1.\u5730 \n\t'", max_size=200), st.integers(2, 40))
def test_splitting_loses_nothing(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(p) <= limit for p in pieces) or pieces == [""]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(alphabet="moon earth.\t12", max_size=15), min_size=8, max_size=30), st.sampled_from(["\n", "\n\n"])
)
def test_splitting_at_lines_keeps_the_tokens(tokenizer_dir: Path, lines: list[str], mark: str) -> None:
    """Lines that start with a visible character: cut between them, the tokens are those of the whole text."""
    t = load_tokenizer(tokenizer_dir)
    text = mark.join(f"x{line}" for line in lines)
    pieces = split_text(text, 64)
    assert [i for p in pieces for i in t.encode(p, special=False)] == t.encode(text, special=False)


def test_long_documents_stay_one_document(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the moon is lit\n" * 50
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(module, "_PIECE_CHARS", 100)
    assert prepare([tmp_path / "a.txt"], tokenizer_dir, tmp_path / "out")["encoded_in_pieces"] == 1
    assert "1 documents of more than 100 characters were encoded in pieces" in capsys.readouterr().err
    assert TokenShards(tmp_path / "out").document(0).tolist() == [*load_tokenizer(tokenizer_dir).encode(text), 0]


def test_progress_and_skips_are_said(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([corpus], tokenizer_dir, tmp_path / "out")
    out, err = capsys.readouterr()
    assert out == ""
    assert f"skipped {corpus / 'c.bin'}: binary" in err
    assert "skipped in all: 1 binary, 1 empty, 1 not UTF-8." in err
    assert "120 documents" in err


class TestRefusals:
    """Each leaves nothing behind."""

    def test_output_exists(self, tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(OutputExistsError, match="out=.*/out exists; choose another folder"):
            prepare([corpus], tokenizer_dir, out)
        assert list(out.iterdir()) == []

    def test_output_that_appears_meanwhile(
        self, tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        monkeypatch.setattr(module, "sync_folder", lambda folder: out.mkdir())
        with pytest.raises(OutputExistsError, match="made by something else meanwhile"):
            prepare([corpus], tokenizer_dir, out)
        assert leftovers(out) == ["out"]

    def test_no_documents(self, tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
        with pytest.raises(DataError, match="hold no document: 2 files were read .1 binary, 1 empty."):
            prepare([corpus / "c.bin", corpus / "d.txt"], tokenizer_dir, tmp_path / "new" / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="hold no document: 0 files were read; name files with text"):
            prepare([tmp_path / "empty"], tokenizer_dir, tmp_path / "new" / "out")
        assert leftovers(tmp_path / "new" / "out") == []

    @pytest.mark.parametrize("workers", [1, 2])
    def test_damaged_input(
        self, tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, workers: int
    ) -> None:
        monkeypatch.setattr(module, "_MIN_BYTES_PER_WORKER", 1000)
        (corpus / "z.jsonl").write_text('{"text": "a"}\n{')
        with pytest.raises(DataError, match="z.jsonl, line 2 is not JSON"):
            prepare([corpus], tokenizer_dir, tmp_path / "out", workers=workers)
        assert leftovers(tmp_path / "out") == []

    def test_numbers_and_inputs(self, tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
        with pytest.raises(ConfigError, match="workers=0 must be at least 1"):
            prepare([corpus], tokenizer_dir, tmp_path / "out", workers=0)
        with pytest.raises(ConfigError, match="max_tokens_per_shard=0 must be at least 1"):
            prepare([corpus], tokenizer_dir, tmp_path / "out", max_tokens_per_shard=0)
        with pytest.raises(ConfigError, match="names nothing to read"):
            prepare([], tokenizer_dir, tmp_path / "out")
        with pytest.raises(ConfigError, match="does not exist"):
            prepare([tmp_path / "none"], tokenizer_dir, tmp_path / "out")
        with pytest.raises(ConfigError, match="neither a tokenizer.json nor"):
            prepare([corpus], tmp_path / "none", tmp_path / "out")
        assert leftovers(tmp_path / "out") == []

    @pytest.mark.parametrize("call", ["fsync", "mkdir"])
    def test_full_disk(
        self, tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "new").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(os if call == "fsync" else Path, call, full)
            with pytest.raises(DiskFullError, match="could not be written: the disk is full"):
                prepare([corpus], tokenizer_dir, tmp_path / "new" / "out")
        assert leftovers(tmp_path / "new" / "out") == []

    def test_interrupt(
        self, tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(ShardWriter, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer_dir, tmp_path / "out")
        assert leftovers(tmp_path / "out") == []


def test_remains_of_a_killed_run_are_named(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / ".out.partial-0123"
    stale.mkdir()
    prepare([corpus], tokenizer_dir, tmp_path / "out")
    assert f"{stale} is what a killed run left" in capsys.readouterr().err


def start(tmp_path: Path, tokenizer_dir: Path) -> "subprocess.Popen[str]":
    """A prepare of several seconds with two workers, begun; returns when it has written something."""
    source = tmp_path / "big"
    source.mkdir()
    (source / "0.txt").write_text("the moon is lit by the earth\n" * 1000)
    (source / "1.txt").write_text("the moon is lit by the earth\n" * 400_000)  # one long task, too long to wait for
    (source / "2.txt").write_text("the moon is lit by the earth\n" * 400_000)
    # Where the tests themselves run in the background of a shell, SIGINT is ignored, and a child inherits that.
    code = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from earthshine.data.prepare import prepare
prepare(sys.argv[1:2], *sys.argv[2:], workers=2)"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tokenizer_dir), str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*/shard-00000.bin")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def test_ctrl_c_ends_the_workers_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    process = start(tmp_path, tokenizer_dir)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # returns when every worker has closed stderr
    assert process.returncode not in (0, None)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "SpawnProcess" not in err  # workers say nothing
    assert leftovers(tmp_path / "out") == []


def test_killed_parent_takes_its_workers_along(tmp_path: Path, tokenizer_dir: Path) -> None:
    process = start(tmp_path, tokenizer_dir)
    process.kill()
    process.communicate(timeout=60)  # workers hold stderr open as long as they live
    assert not (tmp_path / "out").exists()


def test_results_come_in_order_and_few_are_held() -> None:
    """A slow first task holds back the others' results; meanwhile no more than `ahead` tasks are begun."""
    begun: list[Task] = []

    def submit(task: Task) -> "Future[Encoded]":
        begun.append(task)
        future: Future[Encoded] = Future()
        none = np.empty(0, dtype=np.int64)
        future.set_result(Encoded(task.input_bytes, none, none, none, (), 0))
        return future

    results = module._in_order(submit, (Task(i) for i in range(20)), ahead=4)
    for i, result in enumerate(results):
        assert result.input_bytes == i
        assert len(begun) <= i + 4
    assert len(begun) == 20
