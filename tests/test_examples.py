"""Every script in examples/ runs, from an empty folder, and does what it says."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MAX_LINES = 60


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["example"])
    yield
    torch.set_num_threads(threads)


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_examples_are_short_and_all_tested():
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in EXAMPLES.glob("*.py")}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}
    tested = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{Path(name).stem}"' in tested for name in lines)


def test_muon_in_a_plain_loop(capsys):
    losses = main_of("muon_plain_loop")(num_steps=11)
    assert losses[-1] < losses[0] / 2
    assert "muon" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("accelerate") is None, reason="Trainer needs accelerate: pip install accelerate")
def test_muon_in_hugging_face_trainer():
    losses = main_of("muon_hf_trainer")(num_steps=20)
    assert losses[-1] < losses[0] / 2


def test_upcycle_and_check(capsys):
    assert main_of("upcycle_and_check")() <= 1e-5
    assert "MixtralForCausalLM" in capsys.readouterr().out


def test_train_and_read_a_run(tmp_path, capsys):
    run = main_of("train_tiny_moe")(tmp_path / "run", num_steps=4)
    assert (run / "report.html").is_file()
    steps = main_of("read_run_folder")(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "step-000004" in capsys.readouterr().out
