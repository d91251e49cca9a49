"""The whole tour, cut to two short steps, on the real SmolLM2 and as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from earthshine.checkpoint.hf import load_model
from earthshine.errors import WeightsError
from earthshine.tour import find_weights


def quickstart(root: Path, env: dict[str, str], tokens_per_step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "earthshine.cli.main", "quickstart", "--run", str(root)]
    command += ["--steps", "2", "--tokens-per-step", str(tokens_per_step)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory, tour_env: dict[str, str]) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("tour") / "run"
    done = quickstart(root, tour_env, 256)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, done.stderr


def test_the_plan_of_the_full_model_is_printed(tour: tuple[Path, str]) -> None:
    assert "692,036,928" in tour[1] and "214,279,488" in tour[1]


def test_both_proofs_hold_on_the_real_model(tour: tuple[Path, str]) -> None:
    for name, num_rows in (("verify-upcycle", 3), ("verify-huggingface", 2)):
        proof = json.loads((tour[0] / "smollm2-e8t2" / "eval" / f"{name}.json").read_text())
        assert proof["ok"] and len(proof["rows"]) == num_rows
        assert proof["subject"]["text"] == "English and code"


def test_both_models_trained_on_the_same_samples_from_the_same_loss(tour: tuple[Path, str]) -> None:
    runs = {}
    for name in ("smollm2-dense", "smollm2-e8t2"):
        lines = [json.loads(line) for line in (tour[0] / name / "metrics.jsonl").read_text().splitlines()]
        runs[name] = [line for line in lines if line["kind"] == "step"]
        heldout = {
            w: json.loads((tour[0] / name / "eval" / f"heldout-{w}.json").read_text()) for w in ("before", "after")
        }
        # Two steps of Python code at this rate lower the loss on held-out Python code, well beyond rounding.
        assert heldout["after"]["loss"] < heldout["before"]["loss"] < 5
    dense, moe = runs.values()
    assert len(dense) == len(moe) == 2
    assert [line["samples"] for line in dense] == [line["samples"] for line in moe]
    # The first loss is that of the same function.
    assert moe[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5)
    assert moe[0]["max_violation"] >= 0 and len(moe[0]["expert_load"]) == 8


def test_the_export_loads_and_the_report_is_one_page_with_the_evidence(tour: tuple[Path, str]) -> None:
    exported = tour[0] / "models" / "smollm2-e8t2-trained"
    assert load_model(exported).config.moe.num_experts == 8
    assert (exported / "tokenizer.json").is_file() and (exported / "README.md").is_file()
    page = (tour[0] / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page
    assert "capital of France" in page


def test_the_same_command_again_finds_everything_done(tour: tuple[Path, str], tour_env: dict[str, str]) -> None:
    """Only what is cheap is done again; nothing trains or converts. Another config is refused, with the difference."""
    again = quickstart(tour[0], tour_env, 256)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "step 1/2" not in again.stderr
    changed = quickstart(tour[0], tour_env, 512)
    assert changed.returncode == 2 and "sequences_per_step: 1 -> 2" in changed.stderr


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a file"):
        find_weights(tmp_path / "none.gguf")
