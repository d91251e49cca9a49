"""Standard streams that are closed, broken or ASCII, text that is not UTF-8, and `~`: at every command alike."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from earthshine.cli.main import main

EARTHSHINE = (sys.executable, "-m", "earthshine.cli.main")


def shell(line: str, *args: object, **env: str) -> "subprocess.CompletedProcess[bytes]":
    """A shell's line in which "$@" is earthshine with these arguments."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *EARTHSHINE, *map(str, args)], capture_output=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize("line", ['exec "$@" 2>&-', 'exec "$@" <&- 2>&-', 'exec "$@" 2>/dev/full'])
def test_without_stderr(line):
    process = shell(line, "ls", "recipes")
    assert process.returncode == 0
    assert b"tiny" in process.stdout
    assert shell(line, "show", "nothing").returncode == 2


@pytest.mark.parametrize(("line", "code"), [('exec "$@" >&-', 0), ('exec "$@" >/dev/full', 1)])
def test_without_stdout(line, code):
    process = shell(line, "ls", "recipes")
    assert process.returncode == code
    assert b"bug" not in process.stderr and b"Traceback" not in process.stderr


def test_what_a_closed_stream_leaves_free_is_not_a_file_of_ours():
    """Descriptor 2 must not become the next file that is opened: libraries write to it."""
    code = """import os, sys
from earthshine.cli.main import main
main(["ls", "recipes"])
with open(sys.argv[1], "w") as file:
    sys.exit(file.fileno() < 3)"""
    process = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code, os.devnull], capture_output=True
    )
    assert process.returncode == 0


PROMPT = "\u65e5\u672c \U0001f319 \xe9"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ascii_stdout(monkeypatch, dense_dir, options):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["generate", str(dense_dir), "--prompt", PROMPT, "--max-new-tokens", "2", *options]) == 0
    text = stream.buffer.getvalue().decode("ascii")
    if options:
        assert json.loads(text)["prompt"] == PROMPT
    else:
        assert text.startswith(r"\u65e5\u672c \U0001f319 \xe9")


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["generate", "model", "--prompt", NOT_UTF8], "prompt"),
        (["report", "run", "--title", NOT_UTF8], "title"),
        (["prepare", "a.txt", "--tokenizer", "t", "--out", "o", "--eod", NOT_UTF8], "eod"),
        (["prepare", "a.txt", "--tokenizer", "t", "--out", "o", "--text-key", NOT_UTF8], "text-key"),
        (["train", "tiny", f"name={NOT_UTF8}"], "overrides"),
        (["show", NOT_UTF8], "name"),
    ],
)
def test_text_that_is_not_utf8(run, args, name):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert f"earthshine: {name}=" in err and "not UTF-8" in err and "bug" not in err


def test_paths_need_not_be_utf8(run, shards, tiny_job, tmp_path):
    data, folder = tmp_path / NOT_UTF8, tmp_path / f"run {NOT_UTF8}"
    data.symlink_to(shards)
    for more in ([], ["--stop-after", 3], []):
        code, out, err = run("train", *tiny_job, "--data", data, "--run", folder, *more)
        assert code == 0, err
    assert json.loads((folder / "config.json").read_bytes())["data"]["sources"][0]["path"] == str(data)
    assert run("report", folder)[0] == 0


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder, and another working folder."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder(run, home, dense_dir, tokenizer_dir, shards, tiny_job):
    for name, target in (("dense", dense_dir), ("tok", tokenizer_dir), ("shards", shards)):
        (home / name).symlink_to(target)
    (home / "a.txt").write_text("The Moon.")
    job = [*tiny_job, "num_steps=1", "init.model.max_position_embeddings=64"]
    by_path = 'data.sources=[{"path": "~/shards"}]'
    commands = [
        ["prepare", "~/a.txt", "--tokenizer=~/tok", "--out=~/out"],
        ["train", *job, by_path, "heldout.path=~/shards", "heldout.max_sequences=1", "--run=~/run"],
        ["train", "~/run/config.json", "--data=~/shards", "--heldout=~/shards", "--run=~/run2"],
        ["train", *job, by_path, 'init={"kind": "huggingface", "path": "~/dense"}', "--run=~/run3"],
        ["train", *job, by_path, 'init={"kind": "checkpoint", "path": "~/run"}', "--run=~/run4"],
        ["eval", "~/dense", "--shards=~/shards", "--max-sequences=1", "--seq-len=32", "--out=~/result.json"],
        ["generate", "~/run", "--tokenizer=~/tok", "--prompt=~", "--max-new-tokens=1"],
        ["report", "~/run", "--out=~/page.html"],
        ["export", "~/run", "~/exported", "--tokenizer=~/tok"],
        ["upcycle", "~/dense", "~/moe", "--experts=2", "--top-k=2"],
        ["verify", "upcycle", "~/dense", "~/moe", "--out=~/proof.json", "--tokens=8"],
        ["verify", "checkpoint", "~/run"],
    ]
    for command in commands:
        code, out, err = run(*command)
        assert code == 0, (command, out, err)
    assert list(Path().iterdir()) == []
    made = {p.name for p in home.iterdir()}
    assert made >= {"out", "run", "run2", "run3", "run4", "result.json", "page.html", "exported", "moe", "proof.json"}


def test_what_train_prints_can_be_pasted(run, shards, tiny_job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, word in (("my run; no", "'my run; no'"), ("-dash", "./-dash")):
        code, out, err = run("train", *tiny_job, "num_steps=1", "--data", shards, f"--run={name}")
        assert code == 0, err
        assert out.splitlines() == [name, f"next: earthshine report {word}"]


def test_an_argument_in_utf8_is_read_in_any_locale(dense_dir):
    """Python hands over bytes that its locale cannot decode as surrogates."""
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = shell('exec "$@"', "show", "\u65e5", **env)
    assert rb"recipe or preset '\u65e5' is not known" in process.stderr
