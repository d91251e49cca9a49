"""The whole quickstart as a user starts it, on the real SmolLM2, cut to two steps: once, because it takes minutes.

What it does when it is run again, and that its curves are curves, is in tests/unit/test_tour.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from earthshine.checkpoint.load import load_model


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, quickstart_env: dict[str, str]) -> tuple[Path, str]:
    """The folder, and what was logged."""
    root = tmp_path_factory.mktemp("quickstart") / "run"
    command = [sys.executable, "-m", "earthshine.cli.main", "quickstart", "--run", str(root)]
    process = subprocess.run(
        [*command, "--steps", "2", "--tokens-per-step", "256"], capture_output=True, text=True, env=quickstart_env
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return root, process.stderr


def test_the_plan_of_the_full_model_is_printed(quickstart: tuple[Path, str]) -> None:
    assert "692,036,928" in quickstart[1] and "214,279,488" in quickstart[1]


def test_both_proofs_hold_on_the_real_model(quickstart: tuple[Path, str]) -> None:
    for name, num_rows in (("verify-upcycle", 3), ("verify-huggingface", 2)):
        proof = json.loads((quickstart[0] / "smollm2-e8t2" / "eval" / f"{name}.json").read_text())
        assert proof["ok"] and len(proof["rows"]) == num_rows
        assert proof["subject"]["text"] == "English and code"


def test_both_models_trained_on_the_same_samples_from_the_same_loss(quickstart: tuple[Path, str]) -> None:
    runs = {}
    for name in ("smollm2-dense", "smollm2-e8t2"):
        lines = [json.loads(line) for line in (quickstart[0] / name / "metrics.jsonl").read_text().splitlines()]
        runs[name] = [line for line in lines if line["kind"] == "step"]
        evals = quickstart[0] / name / "eval"
        heldout = {w: json.loads((evals / f"heldout-{w}.json").read_text()) for w in ("before", "after")}
        # Two steps of Python code at this rate lower the loss on held-out Python code, well beyond rounding.
        assert heldout["after"]["loss"] < heldout["before"]["loss"] < 5
    dense, moe = runs.values()
    assert len(dense) == len(moe) == 2
    assert [line["samples"] for line in dense] == [line["samples"] for line in moe]
    # The first loss is that of the same function.
    assert moe[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5)
    assert moe[0]["max_violation"] >= 0 and len(moe[0]["expert_load"]) >= 1


def test_the_export_loads_and_the_report_is_one_page_with_the_evidence(quickstart: tuple[Path, str]) -> None:
    exported = quickstart[0] / "models" / "smollm2-e8t2-trained"
    assert load_model(exported).config.moe.num_experts == 8
    assert (exported / "tokenizer.json").is_file() and (exported / "README.md").is_file()
    page = (quickstart[0] / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "src=" not in page
    assert "capital of France" in page
