"""Export: what leaves is what was trained, with all that another program needs to use it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from earthshine.checkpoint import run_store
from earthshine.checkpoint.export import export
from earthshine.checkpoint.hf import read_config
from earthshine.checkpoint.load import load_model
from earthshine.data.tokenization import Tokenization
from earthshine.errors import CheckpointError, ConfigError, OutputExistsError, WeightsError
from earthshine.files import sha256_file
from earthshine.model.config import ModelConfig


@pytest.fixture
def origin(hf_dir, dense) -> Path:
    """A directory with a tokenizer, which runs start from."""
    folder = hf_dir(dense, name="origin")
    (folder / "tokenizer.json").write_text('{"model": 1}')
    return folder


def make_run(
    run_dir: Path,
    config: ModelConfig,
    origin: Path | None,
    poison: bool = False,
    tokenization: Tokenization | None = None,
) -> dict[str, torch.Tensor]:
    """A run folder with a checkpoint of random weights at step 3; returns them."""
    from earthshine.model.transformer import Transformer, initialize

    model = Transformer(config)
    initialize(model, 0)
    state = dict(model.state_dict())
    if poison:
        state["final_norm.weight"][0] = float("nan")
    job = {"init": {"kind": "huggingface", "path": str(origin)} if origin else {"kind": "scratch"}}
    tensors = {f"model.{n}": t for n, t in state.items()}
    run_store.save(run_dir, step=3, tensors=tensors, state={}, model=config, job=job, keep=1, tokenization=tokenization)
    line = {"kind": "step", "step": 3, "total_tokens": 123456}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "st')
    return state


def test_a_run_leaves_with_everything(config: ModelConfig, origin, tmp_path):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    state = make_run(run_dir, config, origin)
    (run_dir / "eval").mkdir()
    held_out = {"kind": "heldout", "loss": 3.25, "stderr": 0.01, "bits_per_byte": 1.5, "tokens": 99}
    (run_dir / "eval" / "heldout-after.json").write_text(json.dumps(held_out))
    (origin / "earthshine.json").write_text(json.dumps({"options": {"experts": 8, "top_k": 2, "layers": []}}))
    export(run_dir, out)
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    if config.family in ("qwen3", "qwen2_moe", "qwen3_moe"):  # the tokenizer was a Llama's, and can stay so
        names.append("tokenizer_config.json")
    assert sorted(p.name for p in out.iterdir()) == names
    assert read_config(out) == config
    for model in (load_model(out), load_model(run_dir)):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    card = (out / "README.md").read_text()
    for fact in ("123,456", "3.25", "origin", "sparse upcycling"):
        assert fact in card, fact


def test_a_directory_in_half_the_size(config: ModelConfig, hf_dir, tmp_path):
    source, out = hf_dir(config), tmp_path / "out"
    export(source, out, dtype="bfloat16")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for name in before:
        keeps_float32 = name.endswith("e_score_correction_bias")
        assert torch.equal(after[name], before[name] if keeps_float32 else before[name].bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tokenizer_that_was_named_wins(origin, hf_dir, dense, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"model": 2}')
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    (origin / "generation_config.json").write_text('{"temperature": 0.1}')
    export(origin, tmp_path / "a", tokenizer_dir=other)
    assert json.loads((tmp_path / "a" / "tokenizer.json").read_text()) == {"model": 2}
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text()) == {"temperature": 0.5}
    with pytest.raises(ConfigError, match="no tokenizer"):
        export(origin, tmp_path / "b", tokenizer_dir=tmp_path)
    make_run(tmp_path / "run", dense, None)
    export(tmp_path / "run", tmp_path / "c")
    assert "gets no tokenizer" in capsys.readouterr().err


def test_generation_config_and_licences_stay_under_another_tokenizer(origin, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_text("pieces")
    (origin / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    (origin / "LICENSE").write_text("of the weights")
    (origin / "chat_template.jinja").write_text("of the old tokenizer")
    export(origin, tmp_path / "out", tokenizer_dir=other)
    written = {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"}
    assert json.loads(written["generation_config.json"]) == {"eos_token_id": [3, 1]}
    assert written["LICENSE"] == "of the weights" and written["tokenizer.model"] == "pieces"
    assert not {"tokenizer.json", "chat_template.jinja"} & set(written)


def test_the_tokenizer_is_read_as_in_the_folder_it_comes_from(models, hf_dir, tmp_path, capsys):
    """A bare tokenizer.json under another `model_type` would be read as a Qwen2's."""
    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 99}}}')
    export(hf_dir(models["qwen2_moe"]), tmp_path / "out", tokenizer_dir=named)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast"}
    log = capsys.readouterr().err
    assert "reads the tokenizer with TokenizersBackend, as before, for which tokenizer_class=PreTrained" in log
    assert f"the tokenizer of {named} has 100 ids and the model 40 rows" in log


def test_a_relative_origin_is_that_of_the_runs_start(origin, dense, tmp_path, monkeypatch, capsys):
    """Also when a folder of that name lies where the export is made, and through a run between."""
    make_run(tmp_path / "first", dense, Path("origin"))
    (tmp_path / "first" / "origin.json").write_text(json.dumps({"path": str(origin)}))
    make_run(tmp_path / "second", dense, Path("../first"))
    (tmp_path / "second" / "origin.json").write_text(json.dumps({"path": str(tmp_path / "first")}))
    (tmp_path / "first" / "config.json").write_text(json.dumps({"init": {"path": "origin"}}))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "origin").mkdir(parents=True)
    (elsewhere / "origin" / "tokenizer.json").write_text('{"model": "wrong"}')
    monkeypatch.chdir(elsewhere)
    for run in ("first", "second"):
        export(tmp_path / run, tmp_path / f"{run}-out")
        assert json.loads((tmp_path / f"{run}-out" / "tokenizer.json").read_text()) == {"model": 1}
    origin.rename(tmp_path / "gone")
    export(tmp_path / "first", tmp_path / "without")
    assert f"gets no tokenizer: {origin} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("from_run", [False, True])
def test_a_qwen2_moe_without_a_bias_gets_zeros_for_vllm(from_run, models, hf_dir, tmp_path, capsys):
    plain = replace(models["qwen2_moe"], head_dim=4)
    if from_run:
        make_run(tmp_path / "run", plain, None)
    source = tmp_path / "run" if from_run else hf_dir(plain)
    export(source, tmp_path / "out")
    assert read_config(tmp_path / "out") == replace(plain, qkv_bias=True)
    before, after = load_model(source).eval(), load_model(tmp_path / "out").eval()
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(before(tokens), after(tokens))
    log = capsys.readouterr().err
    assert "get a bias of zeros" in log and "serving: SGLang's Qwen2-MoE has experts in every layer" in log


def test_what_cannot_be_exported_leaves_nothing(origin, hf_dir, dense, tmp_path):
    with pytest.raises(ConfigError, match="float8"):
        export(origin, tmp_path / "out", dtype="float8")
    with pytest.raises(OutputExistsError):
        export(origin, origin)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export(tmp_path / "empty", tmp_path / "out")
    make_run(tmp_path / "run", dense, None, poison=True)
    with pytest.raises(WeightsError, match=r"final_norm.weight holds"):
        export(tmp_path / "run", tmp_path / "out")
    nan = hf_dir(dense, lambda t: t["model.norm.weight"].fill_(float("inf")), name="nan")
    with pytest.raises(WeightsError, match=r"model.norm.weight holds"):
        export(nan, tmp_path / "out")
    beyond = hf_dir(dense, name="beyond")
    (beyond / "generation_config.json").write_text('{"eos_token_id": 40}')
    with pytest.raises(ConfigError, match=r"beyond/generation_config.json: eos_token_id=40 is not in the vocabulary"):
        export(beyond, tmp_path / "out")
    huge = hf_dir(dense, lambda t: t["model.norm.weight"].fill_(3.4e38), name="huge")
    with pytest.raises(WeightsError, match=r"model.norm.weight holds values that torch.bfloat16 cannot"):
        export(huge, tmp_path / "out", dtype="bfloat16")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_another_tokenizer_than_the_runs_does_not_leave_with_it(dense: ModelConfig, origin: Path, tmp_path: Path):
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"model": 2}')
    of_data = Tokenization(tokenizer_sha256=sha256_file(origin / "tokenizer.json"), eod=7)
    make_run(run, dense, None, tokenization=of_data)
    with pytest.raises(ConfigError, match=rf"other/tokenizer.json has the sha256 .* sha256 {of_data.tokenizer_sha256}"):
        export(run, tmp_path / "out", tokenizer_dir=other)
    export(run, tmp_path / "out", tokenizer_dir=origin)
    make_run(tmp_path / "warm", dense, other, tokenization=of_data)  # began with a model of another tokenizer
    with pytest.raises(ConfigError, match="--tokenizer"):
        export(tmp_path / "warm", tmp_path / "out2")
    (other / "tokenizer.json").rename(other / "tokenizer.model")
    export(run, tmp_path / "out3", tokenizer_dir=other)


@pytest.mark.parametrize(("ends", "after"), [(None, 7), (3, [3, 7]), ([3, 5], [3, 5, 7]), ([7, 3], [7, 3])])
def test_the_end_token_of_the_data_ends_a_text(
    dense: ModelConfig, origin: Path, tmp_path: Path, ends: object, after: object
):
    """Also where the generation config of the model that a run began with names others."""
    given = {"temperature": 0.6} | ({"eos_token_id": ends} if ends is not None else {})
    (origin / "generation_config.json").write_text(json.dumps(given))
    rule = Tokenization(tokenizer_sha256=sha256_file(origin / "tokenizer.json"), eod=7)
    make_run(tmp_path / "run", dense, origin, tokenization=rule)
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == given | {"eos_token_id": after}


def test_a_model_without_an_end_token_leaves_with_a_word(dense: ModelConfig, origin: Path, tmp_path: Path, capsys):
    """As of a run from before checkpoints kept the end token of the data."""
    make_run(tmp_path / "run", replace(dense, eos_token_ids=()), origin)
    export(tmp_path / "run", tmp_path / "out")
    assert "out names no end token" in capsys.readouterr().err
    make_run(tmp_path / "ends", replace(dense, eos_token_ids=(0,)), origin)
    export(tmp_path / "ends", tmp_path / "out2")
    assert "end token" not in capsys.readouterr().err


def test_a_tokenizers_file_in_place_of_its_folder(dense: ModelConfig, origin: Path, tmp_path: Path):
    make_run(tmp_path / "run", dense, None)
    with pytest.raises(ConfigError, match="tokenizer.json holds no tokenizer file to copy; name the folder"):
        export(tmp_path / "run", tmp_path / "out", tokenizer_dir=origin / "tokenizer.json")
