"""The command line doing its work on real files, small: each command's result, and what it leaves behind."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def moe_dir(dense_dir, tmp_path_factory) -> Path:
    from earthshine.upcycle.config import UpcycleConfig
    from earthshine.upcycle.convert import upcycle

    out = tmp_path_factory.mktemp("moe") / "moe"
    upcycle(dense_dir, out, UpcycleConfig(experts=4, top_k=2))
    return out


@pytest.fixture(scope="module")
def run_dir(tiny_job, shards, tmp_path_factory) -> Path:
    """A finished run of four steps, made by two commands that are the same but for --stop-after."""
    from earthshine.cli.main import main

    out = tmp_path_factory.mktemp("runs") / "a"
    command = ["train", *tiny_job, "--data", str(shards), "--heldout", str(shards), "--run", str(out)]
    assert main([*command, "heldout.max_sequences=4", "--stop-after", "2"]) == 0
    assert main([*command, "heldout.max_sequences=4"]) == 0
    return out


def test_prepare(run, tokenizer_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "The Moon."}\n{"body": "The Earth."}\n')
    command = ["prepare", tmp_path / "a.jsonl", "--tokenizer", tokenizer_dir, "--text-key", "body", "--workers", 1]
    code, out, _ = run(*command, "--out", tmp_path / "shards", "--json")
    assert code == 0
    assert json.loads(out)["documents"] == 2
    assert (tmp_path / "shards" / "index.json").is_file()
    code, out, _ = run(*command, "--out", tmp_path / "again")
    assert (code, "2 documents" in out) == (0, True)


def test_upcycle_dry_run_writes_nothing(run, dense_dir, tmp_path):
    code, out, _ = run("upcycle", dense_dir, tmp_path / "moe", "--dry-run", "--layers", 0, 2)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert "8 experts, top-2, in 2 of 3 layers" in out
    code, out, _ = run("upcycle", dense_dir, tmp_path / "moe", "--dry-run", "--json")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert {row["recipe"] for row in json.loads(out)["ledger"]} >= {"copy"}


@pytest.mark.parametrize("layers", [[], ["--layers", 1]], ids=["all layers", "one layer"])
def test_upcycle_then_verify(run, dense_dir, tmp_path, layers):
    moe = tmp_path / "moe"
    code, out, _ = run("upcycle", dense_dir, moe, "--experts", 4, *layers)
    assert (code, "4 experts, top-2" in out) == (0, True)
    code, out, _ = run("verify", "upcycle", dense_dir, moe, "--fp64", "--json")
    result = json.loads(out)
    assert (code, result["ok"]) == (0, True)
    assert all(row["measured"] <= row["tolerance"] for row in result["rows"])
    code, out, _ = run("verify", "hf", moe)
    assert code == 0
    assert out.splitlines()[-1] == "holds"


def test_a_check_that_does_not_hold_exits_3(run, dense_dir, moe_dir, tmp_path):
    """One expert of one layer scaled: both checks of logits notice."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(moe_dir, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.1." in n and "experts.0." in n)
    tensors[name] *= 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    code, out, _ = run("verify", "upcycle", dense_dir, broken)
    assert code == 3
    assert "FAILS" in out
    assert out.splitlines()[-1] == "DOES NOT HOLD"


def test_train_leaves_a_run_folder(run, run_dir, tiny_job, shards):
    assert {"config.json", "plan.json", "env.json", "metrics.jsonl", "checkpoints"} <= {
        p.name for p in run_dir.iterdir()
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    code, _, err = run(
        "train", *tiny_job, "--data", shards, "--run", run_dir, "--heldout", shards, "heldout.max_sequences=4"
    )
    assert code == 0, err
    code, _, err = run("train", run_dir / "config.json", "--run", run_dir)
    assert code == 0, err
    resume = f"earthshine train {run_dir}/config.json --run {run_dir}\n"
    for path in (run_dir, run_dir / "checkpoints" / "step-000004"):
        code, _, err = run("train", path)
        assert (code, err) == (2, f"earthshine: {path} is a run, not a job: resume it with {resume}")


def test_verify_checkpoint(run, run_dir):
    written = run_dir / "eval" / "verify-checkpoint.json"
    code, out, err = run("verify", "checkpoint", run_dir, "--replay", "--json", "--out", written)
    assert code == 0, err
    result = json.loads(out)
    assert result["ok"] is True
    assert any(row["name"].startswith("replay") for row in result["rows"])
    assert json.loads(written.read_text()) == result


@pytest.mark.parametrize("what", ["dense_dir", "run_dir"])
def test_eval(run, request, shards, tmp_path, what):
    model = request.getfixturevalue(what)
    code, out, _ = run(
        "eval", model, "--shards", shards, "--seq-len", 32, "--max-sequences", 3, "--out", tmp_path / "e.json", "--json"
    )
    result = json.loads(out)
    assert code == 0
    assert len(result["sequence_losses"]) == 3
    assert 0 < result["loss"] < 8
    assert json.loads((tmp_path / "e.json").read_text()) == result
    code, out, _ = run("eval", model, "--shards", shards, "--seq-len", 32, "--max-sequences", 3)
    assert (code, "bits per byte" in out) == (0, True)


def test_eval_on_shards_of_another_tokenizer_says_so(run, dense_dir, shards, tmp_path):
    model = shutil.copytree(dense_dir, tmp_path / "model")
    command = ["eval", model, "--shards", shards, "--seq-len", 32, "--max-sequences", 2]
    assert "not made with" not in run(*command)[2]
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    code, _, err = run(*command)
    assert (code, "not made with" in err) == (0, True)


def test_another_tokenizer_than_the_runs_is_refused(run, run_dir, shards, tokenizer_dir, tmp_path):
    other = shutil.copytree(tokenizer_dir, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    (tmp_path / "a.txt").write_text("The Moon. " * 200)
    assert run("prepare", tmp_path / "a.txt", "--tokenizer", other, "--out", tmp_path / "d")[0] == 0
    for command in (
        ("eval", run_dir, "--shards", tmp_path / "d", "--seq-len", 32),
        ("generate", run_dir, "--tokenizer", other, "--prompt", "a"),
        ("export", run_dir, tmp_path / "out", "--tokenizer", other),
    ):
        code, _, err = run(*command)
        assert (code, err.count("sha256")) == (2, 2), err


def test_a_run_is_evaluated_with_its_own_masks(run, tiny_job, shards, tmp_path):
    for within, flags, masks in ((False, [], "across"), (True, [], "within"), (True, ["--across-documents"], "across")):
        folder = tmp_path / f"run-{within}"
        command = ["train", *tiny_job, f"data.document_attention={str(within).lower()}", "num_steps=2"]
        with_heldout = ["--heldout", shards, "heldout.max_sequences=4", "sequences_per_micro_batch=4", "--run", folder]
        assert run(*command, "--data", shards, *with_heldout)[0] == 0
        check = ["eval", folder, "--shards", shards, "--seq-len", 32, "--max-sequences", 4, *flags]
        out = run(*check)[1]
        assert f"{masks} documents" in out
        assert ("the run was trained within documents" in out) == bool(flags)
        result = json.loads(run(*check, "--json")[1])
        after = json.loads((folder / "eval" / "heldout-after.json").read_text())
        assert (result == after) == (not flags)


def test_generate(run, dense_dir, run_dir, tokenizer_dir):
    command = ["generate", dense_dir, "--prompt", "The Moon", "--max-new-tokens", 3]
    code, out, _ = run(*command, "--temperature", 1, "--seed", 3, "--json")
    result = json.loads(out)
    assert code == 0
    assert len(result["new_ids"]) <= 3
    assert run(*command, "--temperature", 1, "--seed", 3)[1] == "The Moon" + result["text"] + "\n"
    code, out, _ = run("generate", run_dir, "--tokenizer", tokenizer_dir, "--prompt", "Night", "--max-new-tokens", 2)
    assert code == 0
    assert out.startswith("Night")


def test_export_is_a_model(run, run_dir, tokenizer_dir, tmp_path):
    out_dir = tmp_path / "exported"
    code, out, err = run("export", run_dir, out_dir, "--tokenizer", tokenizer_dir)
    assert (code, out) == (0, f"{out_dir}\n"), err
    assert {"config.json", "tokenizer.json", "README.md"} <= {p.name for p in out_dir.iterdir()}
    assert run("verify", "hf", out_dir)[0] == 0


def test_report(run, run_dir, tmp_path):
    code, out, _ = run("report", run_dir, "--out", tmp_path / "page.html", "--title", "Two nights")
    assert (code, out) == (0, f"{tmp_path / 'page.html'}\n")
    assert "Two nights" in (tmp_path / "page.html").read_text()
    code, out, _ = run("report", run_dir, "--out", tmp_path, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)


def test_sigterm_saves_and_exits_75(run, tiny_job, shards, tmp_path, earthshine_env):
    run_dir = tmp_path / "run"
    command = [
        "train",
        *tiny_job,
        "num_steps=100000",
        "schedule.kind=constant",
        "--data",
        str(shards),
        "--run",
        str(run_dir),
    ]
    metrics = run_dir / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "earthshine.cli.main", *command], env=earthshine_env, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 1800
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=1800)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, err
    assert "Traceback" not in err
    saved = max(int(p.name.partition("-")[2]) for p in (run_dir / "checkpoints").glob("step-*"))
    assert saved >= 1
    code, _, err = run(*command, "--stop-after", saved + 1)
    assert code == 0, err


def test_a_recipe_takes_its_vocabulary_from_the_shards(run, tiny_job, shards, tmp_path, monkeypatch):
    """320 token ids; and a resume, by the recipe or by config.json, is of the same model."""
    from earthshine.model.presets import PRESETS
    from earthshine.recipes import tiny

    small = lambda: replace(PRESETS["llama3_tiny"](), vocab_size=100)  # noqa: E731
    monkeypatch.setattr(tiny.presets, "llama3_tiny", small)
    named = [word for word in tiny_job if "vocab_size" not in word]
    command = ["train", *named, "--data", shards, "--run", tmp_path / "run"]
    line = "init.model.vocab_size: 100 -> 320, the number of token ids in the shards"
    code, out, err = run(*command, "--dry-run")
    assert code == 0 and line in err and "  init.model.vocab_size: 100 -> 320\n" in out
    plan = json.loads(run(*command, "--dry-run", "--json")[1])
    assert plan["notes"] == [line] and plan["job"]["init"]["model"]["vocab_size"] == 320
    code, _, err = run(*command, "--stop-after", 1)
    assert code == 0 and line in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"]["model"]["vocab_size"] == 320
    code, _, err = run(*command, "--stop-after", 2)
    assert code == 0, err
    code, _, err = run("train", tmp_path / "run" / "config.json", "--run", tmp_path / "run")
    assert code == 0 and "vocab_size" not in err, err
    code, _, err = run(*command[:-1], tmp_path / "other", "init.model.vocab_size=100")
    assert code == 1 and "100 ids" in err
