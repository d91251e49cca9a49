import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from earthshine.data import prepare as module
from earthshine.data.documents import EncodingTask
from earthshine.data.prepare import Encoded, prepare
from earthshine.data.shards import ShardWriter, TokenShards
from earthshine.data.tokenizer import load_tokenizer
from earthshine.errors import ConfigError, DataError, DiskFullError, OutputExistsError
from earthshine.staging import staging_path
from token_documents import document_tokens


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
    got = [document_tokens(shards, i).tolist() for i in range(120)]
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


KINDS = ["gpt2", "llama3", "llama2", "metaspace", "unigram", "unigram_unmarked", "word_level", "not_special", "merged"]


def prepared(folder: Path, tokenizer: Path, *texts: str, **options: Any) -> TokenShards:
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([lines], tokenizer, folder / "out", workers=1, **options)
    return TokenShards(folder / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_in_a_document_does_not_end_it(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], kind: str
) -> None:
    shards = prepared(tmp_path, tokenizer_of(kind), "the moon </s> is lit", "</s>the moon")
    documents = [document_tokens(shards, i).tolist() for i in range(2)]
    assert [d.count(shards.eod) for d in documents] == [1, 1]
    assert all(d[-1] == shards.eod for d in documents)
    assert shards.tokenization.recorded and shards.tokenization.special_spellings == "text"


def test_spellings_become_tokens_where_that_is_asked_for(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in chats that are written out with their marks: an end inside is a token, and no end of the document."""
    t = load_tokenizer(tokenizer_of("llama3"))
    text = "<s>the moon</s> is lit</s>"
    shards = prepared(tmp_path, tokenizer_of("llama3"), text, "the sun", special_tokens=True)
    assert document_tokens(shards, 0).tolist() == t.encode(text)  # neither its beginning nor its end is doubled
    assert document_tokens(shards, 1).tolist() == [*t.bos_ids, *t.encode("the sun"), t.eod]
    assert shards.lengths().tolist() == [len(t.encode(text)), len(t.encode("the sun")) + 2]
    assert shards.tokenization.special_spellings == "tokens"
    err = capsys.readouterr().err
    assert "1 documents spell special tokens, which became the tokens" in err
    assert "1 tokens inside the texts are the end token" in err


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_begin_as_the_tokenizer_begins_a_text(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "_MIN_BYTES_PER_WORKER", 10)
    tokenizer = tokenizer_of("llama3")
    (tmp_path / "a.txt").write_text("the moon </s>")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", workers=workers)
    shards, t = TokenShards(tmp_path / "out"), load_tokenizer(tokenizer)
    assert t.bos_ids == shards.tokenization.bos_ids != ()
    assert document_tokens(shards, 0).tolist() == [*t.encode_prompt("the moon </s>", special=False), t.eod]
    assert TokenShards(tmp_path / "out").num_bytes == len("the moon </s>")


def test_what_a_tokenizer_cannot_spell_is_counted_and_reported(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = prepared(tmp_path, tokenizer_of("word_level"), "the moon shines", "the unheard of moon")
    assert shards.index["unknown_tokens"] == 3 and "33.33% of the tokens are unknown" in shards.lost()
    assert "33.33% of the tokens (3) are the unknown token <unk> (id 0)" in capsys.readouterr().err


def test_characters_that_vanish_are_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BPE without bytes and without an unknown token leaves out what it lacks, and says nothing."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0, "a": 1, "b": 2}, []))
    backend.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    shards = prepared(tmp_path, tmp_path / "t" / "tokenizer.json", "abc\u0441ab", "cab", "ab", eod="</s>")
    assert shards.index["dropped_characters"] == 3 and "3 characters were left out" in shards.lost()
    assert "3 characters were left out" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["word_level", "unigram"])
def test_a_tokenizer_without_an_unknown_token_takes_what_it_can_spell(tmp_path: Path, model: str) -> None:
    models = tokenizers.models
    words = models.WordLevel({"</s>": 0, "moon": 1, "sun": 2})
    pieces = models.Unigram([("</s>", 0.0), *((c, -1.0) for c in "mosun ")])
    backend = tokenizers.Tokenizer(words if model == "word_level" else pieces)
    if model == "word_level":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    (tmp_path / "t").mkdir()
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    shards = prepared(tmp_path, tmp_path / "t", "moon sun moon", eod="</s>")
    assert shards.num_tokens == (4 if model == "word_level" else 14) and shards.lost() == ""
    with pytest.raises(ConfigError, match="cannot encode this text"):
        load_tokenizer(tmp_path / "t", "</s>").encode("earth")


def test_nothing_lost_is_nothing_reported(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("gpt2", "llama2"):
        (tmp_path / kind).mkdir()
        shards = prepared(tmp_path / kind, tokenizer_of(kind), "the moon \u5730\u7403 <unknown>")
        assert shards.lost() == ""
    assert "warning" not in capsys.readouterr().err


def test_an_end_token_that_texts_hold_is_reported(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = prepared(tmp_path, tokenizer_of("gpt2"), "oh! my!", eod="!")
    assert shards.num_documents == 1 and shards.index["end_tokens_inside"] == 2
    assert "2 tokens inside the texts are the end token" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama2", "metaspace", "unigram", "llama3"])
def test_pieces_of_a_long_document_have_its_tokens(
    tmp_path: Path, tokenizer_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where a tokenizer puts a space before every text, only the document's first piece has it."""
    monkeypatch.setattr(module, "_PIECE_CHARS", 600)
    text = "the moon is lit\nby the earth. " * 100
    shards, t = prepared(tmp_path, tokenizer_of(kind), text), load_tokenizer(tokenizer_of(kind))
    assert document_tokens(shards, 0).tolist() == [*t.encode_prompt(text, special=False), t.eod]


def test_long_documents_stay_one_document(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the moon is lit\n" * 50
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(module, "_PIECE_CHARS", 100)
    assert prepare([tmp_path / "a.txt"], tokenizer_dir, tmp_path / "out")["encoded_in_pieces"] == 1
    assert "1 documents of more than 100 characters were encoded in pieces" in capsys.readouterr().err
    assert document_tokens(TokenShards(tmp_path / "out"), 0).tolist() == [
        *load_tokenizer(tokenizer_dir).encode(text),
        0,
    ]


def test_progress_and_skips_are_reported(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([corpus], tokenizer_dir, tmp_path / "out")
    out, err = capsys.readouterr()
    assert out == ""
    assert f"skipped {corpus / 'c.bin'}: binary" in err
    assert "prepare: skipped 1 binary, 1 empty, 1 not UTF-8." in err and ": empty" not in err
    assert "120 documents" in err


class TestRefusals:
    """Each leaves nothing behind."""

    def test_output_exists(self, tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(OutputExistsError, match="/out exists: choose another output folder"):
            prepare([corpus], tokenizer_dir, out)
        assert list(out.iterdir()) == []

    def test_output_that_appears_meanwhile(
        self, tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        monkeypatch.setattr("earthshine.staging.sync_folder", lambda folder: out.mkdir())
        with pytest.raises(OutputExistsError, match="appeared while it was being written"):
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


def test_what_a_killed_run_left_goes_at_the_next(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    staging_path(out).mkdir()
    (staging_path(out) / "shard-00000.bin").write_bytes(b"half")
    prepare([corpus], tokenizer_dir, out)
    assert not staging_path(out).exists()
    assert TokenShards(out).num_documents


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
    until = time.monotonic() + 1800
    while not list(tmp_path.glob(".out.partial/shard-00000.bin")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def test_ctrl_c_ends_the_workers_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    process = start(tmp_path, tokenizer_dir)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=1800)  # returns when every worker has closed stderr
    assert process.returncode not in (0, None)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "SpawnProcess" not in err  # workers say nothing
    assert leftovers(tmp_path / "out") == []


def test_killed_parent_takes_its_workers_along(tmp_path: Path, tokenizer_dir: Path) -> None:
    process = start(tmp_path, tokenizer_dir)
    process.kill()
    process.communicate(timeout=1800)  # workers hold stderr open as long as they live
    assert not (tmp_path / "out").exists()


def test_results_come_in_order_and_few_are_held() -> None:
    """A slow first task holds back the others' results; meanwhile no more than `ahead` tasks are begun."""
    begun: list[EncodingTask] = []

    def submit(task: EncodingTask) -> "Future[Encoded]":
        begun.append(task)
        future: Future[Encoded] = Future()
        none = np.empty(0, dtype=np.int64)
        future.set_result(Encoded(task.input_bytes, none, none, none, (), 0))
        return future

    results = module._in_order(submit, (EncodingTask(i) for i in range(20)), ahead=4)
    for i, result in enumerate(results):
        assert result.input_bytes == i
        assert len(begun) <= i + 4
    assert len(begun) == 20


def test_a_file_name_cannot_write_the_log(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ok.txt").write_text("some words")
    (tmp_path / "in" / "a\x1b[2J\n2026 earthshine: all is well.bin").write_bytes(b"\0\0\0")
    prepare([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    err = capsys.readouterr().err
    assert "\x1b" not in err and r"a\x1b[2J\n2026" in err
    assert not any(line.startswith("2026") for line in err.splitlines())
