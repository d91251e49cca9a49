"""The quickstart, on a model that is small enough to run it whole; and what it does between its stages."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny_gguf
from earthshine import tour
from earthshine.checkpoint.load import load_model
from earthshine.errors import ConfigError, WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize


def test_the_marks_of_its_chat_are_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i + 2 for i, c in enumerate(letters)} | {"<|im_start|>": 0, "<|im_end|>": 1}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    given: list[Sequence[int]] = []

    def generate(model: Any, prompt_ids: Sequence[int], **_: Any) -> list[int]:
        given.append(prompt_ids)
        return [letters.index("A") + 2]

    monkeypatch.setattr("earthshine.checkpoint.load.load_model", lambda path: None)
    monkeypatch.setattr("earthshine.evaluate.generate.generate", generate)
    tour._sample(tmp_path / "samples.json", "dense", tmp_path, tmp_path)
    assert [i for i in given[0] if i < 2] == [0, 1, 0]
    assert [s["text"] for s in json.loads((tmp_path / "samples.json").read_text())["samples"]] == ["A", "A"]


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[..., Path]]]:
    """The whole quickstart on a Llama of three layers out of a GGUF file, and on a few short source files."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = ModelConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=256, eos_token_ids=(257,),
    )  # fmt: skip
    model = Transformer(config)
    initialize(model, seed=0)
    marks = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<pad>")
    weights = tiny_gguf.write(folder / "tiny.gguf", model, marks=marks)
    sources = [
        folder / f"{name}.py" for name in ("ast", "cgi", "dis", "bdb", "abc", "pty", "uu", "this", "sched", "site")
    ]
    for i, source in enumerate(sources):
        source.write_text("".join(f"def f{i}_{n}(x):\n    return x + {n}\n" for n in range(60)))

    def run(**options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tour, "MOE_LAYERS", (1, 2))
            patch.setattr(tour, "SEQ_LEN", 32)
            patch.setattr(tour, "TOKENS_PER_STEP", 64)
            patch.setattr(tour, "SAMPLE_TOKENS", 3)
            patch.setattr(tour, "_stdlib_sources", lambda: sources)
            return tour.quickstart(folder / "run", weights=weights, **options)

    run()
    yield folder / "run", run


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_its_curves_are_curves_of_the_same_samples(small_quickstart: tuple[Path, Any]) -> None:
    dense, moe = (steps_of(small_quickstart[0] / name) for name in ("smollm2-dense", "smollm2-e8t2"))
    assert len(dense) == len(moe) == tour.STEPS >= 20
    assert [line["samples"] for line in dense] == [line["samples"] for line in moe]
    assert moe[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5), "the first loss is that of the same function"


def test_the_same_command_again_finds_everything_done(
    small_quickstart: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what is cheap is done again; nothing trains or converts. Another config is refused, with the difference."""
    folder, run = small_quickstart
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert files and run() == folder / "report.html"
    assert "step  1/" not in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == files
    with pytest.raises(ConfigError, match="sequences_per_step: 2 -> 4"):
        run(tokens_per_step=128)


def test_what_a_stopped_quickstart_lacks_is_made(small_quickstart: tuple[Path, Any]) -> None:
    folder, run = small_quickstart
    proof = folder / "smollm2-e8t2" / "eval" / "verify-huggingface.json"
    (folder / "report.html").unlink()
    proof.unlink()
    shutil.rmtree(folder / "models" / "smollm2-e8t2-trained")
    run()
    assert json.loads(proof.read_text())["ok"] and (folder / "report.html").is_file()
    assert load_model(folder / "models" / "smollm2-e8t2-trained").config.moe.num_experts == 8


@pytest.mark.parametrize("tokens", [0, 1, 100])
def test_tokens_per_step_are_whole_sequences(tmp_path: Path, tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"tokens_per_step={tokens} must be a multiple"):
        tour.quickstart(tmp_path / "run", tokens_per_step=tokens)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a file"):
        tour.find_weights(tmp_path / "none.gguf")
