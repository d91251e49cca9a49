"""Writing Hugging Face directories: bit-equal round trips, and what is refused."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from earthshine.checkpoint import run_store
from earthshine.checkpoint.export import export
from earthshine.checkpoint.hf import SPARE_BYTES, read_config, save_model
from earthshine.checkpoint.load import load_model
from earthshine.errors import DiskFullError, OutputExistsError, WeightsError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(config: ModelConfig, hf_dir, tmp_path, dtype):
    source = hf_dir(config, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    model = load_model(source)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    save_model(model, config, tmp_path / "out", dtype, tokenizer_dir=source, extra={"README.md": "hello"})
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    assert read_config(tmp_path / "out") == config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "README.md").read_text() == "hello"


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_routers_bias_stays_float32(hf_dir, deepseek, tmp_path, stored):
    source = hf_dir(deepseek, lambda t: t.update({BIAS: t[BIAS].to(stored)}), dtype=torch.bfloat16)
    expected = load_file(source / "model.safetensors")[BIAS].float()
    for dtype in (torch.bfloat16, torch.float64):
        model = load_model(source, dtype=dtype)
        bias_E = model.blocks[1].moe.router.bias_E
        assert bias_E.dtype == torch.float32 and torch.equal(bias_E, expected)
    save_model(model, deepseek, tmp_path / "saved", torch.bfloat16)
    export(source, tmp_path / "exported", dtype="bfloat16")
    for out in ("saved", "exported"):
        written = load_file(tmp_path / out / "model.safetensors")
        assert written[BIAS].dtype == torch.float32 and torch.equal(written[BIAS], expected)
        assert written[BIAS.replace("e_score_correction_bias", "weight")].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, 65520.0), (torch.float16, -1e5), (torch.bfloat16, -3.4e38)]
)
def test_values_that_a_narrower_type_cannot_hold_are_not_written(dense, tmp_path, dtype, value):
    """Nor read from a run; the largest that rounds to a finite one is."""
    model = Transformer(dense)
    initialize(model, 0)
    with torch.no_grad():
        model.final_norm.weight[0] = value
    run_store.save(
        tmp_path / "run",
        step=1,
        tensors={f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        state={},
        model=dense,
        job={},
        keep=0,
    )
    for refused in (
        lambda: save_model(model, dense, tmp_path / "out", dtype=dtype),
        lambda: load_model(tmp_path / "run", dtype=dtype),
    ):
        with pytest.raises(WeightsError, match=rf"tensor final_norm.weight holds values that {dtype} cannot"):
            refused()
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        model.final_norm.weight[0] = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 8)
    save_model(model, dense, tmp_path / "out", dtype=dtype)
    assert load_model(tmp_path / "out").final_norm.weight[0] == torch.finfo(dtype).max


def test_saving_checks_the_state_and_the_output(dense, hf_dir, tmp_path):
    source = hf_dir(dense)
    state = load_model(source).state_dict()
    with pytest.raises(OutputExistsError):
        save_model(state, dense, source)
    with pytest.raises(WeightsError, match=r"missing \['head.weight'\]"):
        save_model({n: t for n, t in state.items() if n != "head.weight"}, dense, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"not consumed \['x'\]"):
        save_model(state | {"x": torch.ones(1)}, dense, tmp_path / "out")
    with pytest.raises(WeightsError, match="final_norm.weight"):
        save_model(state | {"final_norm.weight": torch.ones(1)}, dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(dense, hf_dir, tmp_path, monkeypatch):
    source = hf_dir(dense)
    state = load_model(source).state_dict()
    num_bytes = sum(t.nbytes for t in state.values()) + SPARE_BYTES
    for spare in (0, -1):
        free = SimpleNamespace(f_bavail=num_bytes + spare, f_frsize=1, f_blocks=1)
        monkeypatch.setattr(os, "statvfs", lambda path, free=free: free)
        for write in (lambda out: save_model(state, dense, out), lambda out: export(source, out)):
            out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
            if spare < 0:
                with pytest.raises(DiskFullError, match=rf"{out} needs .*, but .* are free there"):
                    write(out)
            else:
                write(out)
            assert out.exists() == (spare == 0)
