"""Bad input at the command line: a clear line that names the thing, the right exit code, and nothing left behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def damaged(dense_dir, tmp_path) -> Callable[..., Path]:
    """A copy of the dense model with its tensors, its weights' bytes or its config changed."""

    def make(tensors=None, raw=None, config=None) -> Path:
        from safetensors.torch import load_file, save_file

        out = tmp_path / "damaged"
        shutil.copytree(dense_dir, out)
        (file,) = out.glob("*.safetensors")
        if tensors:
            state = load_file(file)
            tensors(state)
            save_file(state, file, metadata={"format": "pt"})
        if raw:
            file.write_bytes(raw(file.read_bytes()))
        if config:
            data = json.loads((out / "config.json").read_text())
            data.update(config)
            (out / "config.json").write_text(json.dumps(data))
        return out

    return make


def assert_refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """Exit code, nothing on stdout, and one line on stderr (after log lines) with these words."""
    got, out, err = result
    last = err.splitlines()[-1] if err else ""
    assert (got, out) == (code, ""), err
    assert last.startswith("earthshine: "), err
    assert "bug" not in last
    for word in words:
        assert word in last


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("command", ["upcycle", "upcycle --dry-run", "eval"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), (NORM, "no tensor")),
        (lambda t: t.update({"model.layers.9.extra": t[NORM].clone()}), ("model.layers.9.extra",)),
        (lambda t: t.update({NORM: t[NORM][:5].clone()}), (NORM, "5")),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_wrong_set_of_tensors(run, damaged, shards, tmp_path, command, change, words):
    dense = damaged(tensors=change)
    arguments = [tmp_path / "out"] if "upcycle" in command else ["--shards", shards]
    name, *options = command.split()
    assert_refused(run(name, dense, *arguments, *options), 1, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def visible(folder: Path) -> list[str]:
    """Names that a user sees; what a killed conversion may resume from is hidden."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_tensor_that_is_not_finite(run, damaged, tmp_path):
    dense = damaged(tensors=lambda t: t["model.layers.2.mlp.up_proj.weight"].view(-1)[7].fill_(float("nan")))
    assert_refused(run("upcycle", dense, tmp_path / "out"), 1, "model.layers.2.mlp.up_proj.weight", "NaN")
    assert visible(tmp_path) == ["damaged"]


@pytest.mark.parametrize(
    "raw",
    [
        lambda b: b[:-100],
        lambda b: b[:20],
        lambda b: b"",
        lambda b: b[:8] + b"}" + b[9:],
        lambda b: b"\xff" * 8 + b[8:],
    ],
    ids=["truncated", "header cut", "empty", "header not JSON", "header of absurd length"],
)
def test_a_damaged_safetensors_file(run, damaged, tmp_path, raw):
    assert_refused(run("upcycle", damaged(raw=raw), tmp_path / "out"), 1, ".safetensors")
    assert visible(tmp_path) == ["damaged"]


def test_a_config_of_no_known_family(run, damaged, tmp_path):
    dense = damaged(config={"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    assert_refused(run("upcycle", dense, tmp_path / "out"), 2, "mamba", "llama")
    assert visible(tmp_path) == ["damaged"]


def test_a_folder_that_is_not_a_model(run, tmp_path):
    assert_refused(run("upcycle", tmp_path / "nowhere", tmp_path / "out"), 2, "nowhere/config.json")
    assert_refused(run("generate", tmp_path / "nowhere", "--prompt", "a"), 2, "nowhere")
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", 2, "--top-k", 3], ("top_k=3", "experts=2")),
        (["--layers", 1, 3], ("3",)),
        (["--layers", 1, 1], ("twice",)),
        (["--router-std", 0], ("router_std",)),
    ],
    ids=["more than there are", "no such layer", "a layer twice", "no router"],
)
def test_options_that_cannot_be(run, dense_dir, tmp_path, options, words):
    assert_refused(run("upcycle", dense_dir, tmp_path / "out", *options), 2, *words)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("command", ["upcycle", "prepare", "export"])
def test_an_output_that_exists_is_kept(run, dense_dir, tokenizer_dir, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (tmp_path / "text.txt").write_text("The Moon.")
    arguments = {
        "upcycle": [dense_dir, out],
        "prepare": [tmp_path / "text.txt", "--tokenizer", tokenizer_dir, "--out", out],
        "export": [dense_dir, out],
    }
    assert_refused(run(command, *arguments[command]), 2, str(out), "exist")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_no_documents(run, tokenizer_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    command = ["prepare", tmp_path / "empty", "--tokenizer", tokenizer_dir, "--out", tmp_path / "shards"]
    assert_refused(run(*command), 1, "no document")
    (tmp_path / "empty" / "a.jsonl").write_text("")
    assert_refused(run(*command), 1, "no document")
    assert visible(tmp_path) == ["empty"]


def test_a_vocabulary_that_is_too_small(run, tiny_job, shards, tmp_path):
    command = ["train", *tiny_job, "init.model.vocab_size=100", "--data", shards, "--run", tmp_path / "run"]
    assert_refused(run(*command), 1, "100", "shard-00000")
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


def test_no_data_and_no_such_data(run, tiny_job, tmp_path):
    code, _, err = run("train", *tiny_job, "--run", tmp_path / "run")
    assert (code, "add --data DIR" in err.splitlines()[-1]) == (2, True)
    assert not (tmp_path / "run").exists()
    code, _, err = run("train", *tiny_job, "--data", tmp_path / "none", "--run", tmp_path / "run")
    assert (code in (1, 2), "none" in err.splitlines()[-1]) == (True, True)


def test_a_run_folder_of_another_config(run, tiny_job, shards, tmp_path):
    command = ["train", *tiny_job, "--data", shards, "--run", tmp_path / "run"]
    assert run(*command, "--stop-after", 1)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    code, out, err = run(*command, "optimizer.lr=0.5")
    assert (code in (1, 2), out) == (True, "")
    assert "optimizer.lr: 0.003 -> 0.5" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_checkpoint_made_elsewhere_needs_trust(run, tiny_job, shards, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    assert run("train", *tiny_job, "--data", shards, "--run", run_dir, "--stop-after", 1)[0] == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    command = ["eval", run_dir, "--shards", shards, "--seq-len", 32, "--max-sequences", 2]
    assert_refused(run(*command), 1, "--trust")
    assert run(*command, "--trust")[0] == 0


def test_a_report_of_no_run(run, tmp_path):
    code, out, err = run("report", tmp_path)
    assert (code, out) == (2, "")
    assert str(tmp_path) in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="a small disk of our own needs user namespaces",
)
@pytest.mark.parametrize("command", ["upcycle", "prepare"])
def test_a_full_disk(command, dense_dir, tokenizer_dir, tmp_path, earthshine_env):
    """A file system of 256 KiB, mounted for the command alone: one line that names the path, and nothing left there."""
    small = tmp_path / "small"
    small.mkdir()
    (tmp_path / "long.txt").write_text("".join(f"{i} " for i in range(200_000)))
    arguments = {
        "upcycle": f"{dense_dir} {small}/out",
        "prepare": f"{tmp_path}/long.txt --tokenizer {tokenizer_dir} --out {small}/out --workers 1",
    }[command]
    program = f"{sys.executable} -m earthshine.cli.main {command} {arguments}"
    script = (
        f"mount -t tmpfs -o size=256k tmpfs {small} || exit 99; "
        f"{program}; code=$?; echo left: $(ls -A {small}); exit $code"
    )
    process = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", script],
        capture_output=True,
        text=True,
        env=earthshine_env,
    )
    lines = [line for line in process.stderr.splitlines() if line.startswith("earthshine: ")]
    assert process.returncode == 1, process.stderr
    assert len(lines) == 1
    assert str(small) in lines[0]
    assert "Traceback" not in process.stderr
    assert process.stdout.strip() == "left:"


@pytest.mark.parametrize("command", ["eval", "verify hf", "verify upcycle", "verify checkpoint"])
@pytest.mark.parametrize("out", ["a folder", "a file/below.json"])
def test_an_out_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, command, out):
    """Before: the model that is named is not even there."""
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a file").write_text("")
    options = {"eval": ["--shards", tmp_path], "verify upcycle": [tmp_path / "moe"]}.get(command, [])
    assert_refused(run(*command.split(), tmp_path / "none", *options, "--out", tmp_path / out), 2, "out=", out)


def test_a_report_is_no_other_file(run, tmp_path):
    assert visible(tmp_path) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in ("page.json", "page.md", "PAGE.PDF"):
        assert_refused(run("report", tmp_path / "run", "--out", tmp_path / name), 2, name, ".html")
    assert visible(tmp_path) == ["run"]


@pytest.mark.parametrize("command", ["prepare", "train", "upcycle", "export"])
def test_a_folder_that_cannot_be_made(run, dense_dir, tokenizer_dir, tiny_job, shards, tmp_path, command):
    (tmp_path / "a.txt").write_text("The Moon.")
    out = tmp_path / "a.txt" / "below"
    arguments = {
        "prepare": [tmp_path / "a.txt", "--tokenizer", tokenizer_dir, "--out", out],
        "train": [*tiny_job, "--data", shards, "--run", out],
        "upcycle": [dense_dir, out],
        "export": [dense_dir, out],
    }
    assert_refused(run(command, *arguments[command]), 2, "a.txt", "cannot be made", "Choose another place")
    assert_refused(run("doctor", "--path", tmp_path / "a.txt"), 2, "a.txt is not a folder")
