"""optimizer.qk_clip_threshold: a run's clipping beside QK-Clip's equation, written out from weights and inputs."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earthshine.checkpoint import run_store
from earthshine.config import encode
from earthshine.errors import ConfigError
from earthshine.model.attention import rope_frequencies
from earthshine.model.config import ModelConfig
from earthshine.model.parameters import query_key_projections
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig
from earthshine.train.derive import derive
from earthshine.train.job import HeldoutConfig, Scratch, TrainJob
from earthshine.train.loop import fit
from earthshine.train.resume import changes_on_resume
from earthshine.train.state import build_state
from earthshine.train.step import train_step

JobMaker = Callable[..., TrainJob]
PLACE = {"seconds", "tokens_per_second", "mfu", "memory_gib"}
KINDS = ("grouped", "latent")


def optimizer(threshold: float, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(lr=5e-3, ns_dtype="float32", qk_clip_threshold=threshold, **options)


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in PLACE} for line in lines]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in records(run_dir) if record["kind"] == "step"]


def same_tensors(a: Path, b: Path) -> bool:
    one, other = (run_store.load_model_state(folder)[1] for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def job(request: pytest.FixtureRequest, make_job: JobMaker, moonlight_model: ModelConfig) -> Callable[..., TrainJob]:
    """job(kind, threshold, **changes): four query heads on two keys, or latent attention; documents are packed."""

    def make(kind: str, threshold: float, options: dict[str, Any] | None = None, **changes: Any) -> TrainJob:
        base = make_job()
        assert isinstance(base.init, Scratch)
        model = replace(base.init.model, num_attention_heads=4, num_key_value_heads=2, qkv_bias=True)
        model = replace(moonlight_model if kind == "latent" else model, init_std=0.4)  # logits of some size
        return replace(base, init=Scratch(model=model), optimizer=optimizer(threshold, **(options or {})), **changes)

    return make


# ------------------------------------------------------------------------------------------------ the equation by hand


def rotated(x: Tensor, c: ModelConfig) -> Tensor:
    """Rotary positions of (B, n, S, width), as complex numbers."""
    R = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]).double(), rope_frequencies(c).double())
    if c.mla.kv_lora_rank and c.mla.rope_interleaved:
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
    else:
        pairs = torch.complex(x[..., :R], x[..., R:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), -1)


def scores_of(attention: nn.Module, x_BSD: Tensor, c: ModelConfig) -> Tensor:
    """(B, H, S, S), in float64, from the layer's weights and its input."""
    w = {name: p.detach().double() for name, p in attention.named_parameters()}

    def heads(x: Tensor, n: int) -> Tensor:
        return x.unflatten(-1, (n, -1)).transpose(1, 2)

    H = c.num_attention_heads
    if not c.mla.kv_lora_rank:
        q = rotated(heads(x_BSD @ w["q_proj.weight"].T + w["q_proj.bias"], H), c)
        k = rotated(heads(x_BSD @ w["k_proj.weight"].T + w["k_proj.bias"], c.num_key_value_heads), c)
        return q @ k.repeat_interleave(H // c.num_key_value_heads, 1).mT / math.sqrt(c.head_dim)
    N, L = c.mla.qk_nope_head_dim, c.mla.kv_lora_rank
    q = heads(x_BSD @ w["q_proj.weight"].T, H)
    down = x_BSD @ w["kv_a_proj_with_mqa.weight"].T
    latent, shared = down[..., :L], rotated(down[..., L:].unsqueeze(1), c)
    latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w["kv_a_norm.weight"]
    k = heads(latent @ w["kv_b_proj.weight"].T, H)[..., :N]
    return (q[..., :N] @ k.mT + rotated(q[..., N:], c) @ shared.mT) / math.sqrt(c.head_dim)


def maxima(job: TrainJob) -> Tensor:
    """Of the first step: (layers, heads), over all sequences, within documents."""
    batch = build(job).loader.next_step()
    assert isinstance(job.init, Scratch)
    model = Transformer(job.init.model)
    initialize(model, job.seed)
    inputs: list[Tensor] = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0].double()))
    documents_BS = batch.documents_BS
    with torch.no_grad():
        model(batch.tokens_BS, documents_BS)
    hidden = torch.ones(job.seq_len, job.seq_len, dtype=torch.bool).triu(1)
    hidden = hidden | (documents_BS[:, None, :, None] != documents_BS[:, None, None, :])
    assert documents_BS.any()
    scores = (scores_of(block.attn, x, job.init.model) for block, x in zip(model.blocks, inputs, strict=True))
    return torch.stack([s.masked_fill(hidden, -math.inf).amax((0, 2, 3)) for s in scores])


def build(job: TrainJob) -> Any:
    return build_state(job, torch.device("cpu"), torch.float32, None, trust=False, allow_config_change=False)


def clipped(weights: dict[str, Tensor], c: ModelConfig, gamma_LH: Tensor) -> dict[str, Tensor]:
    """The weights scaled row by row, as the paper (and for grouped keys `optim.qk_clip`) writes it."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    for layer, gamma_H in enumerate(gamma_LH.tolist()):
        where, C = f"blocks.{layer}.attn", c.head_dim
        for h, gamma in enumerate(gamma_H):
            rows = slice(h * C, (h + 1) * C)
            if c.mla.kv_lora_rank:
                N, width = c.mla.qk_nope_head_dim, c.mla.qk_nope_head_dim + c.mla.v_head_dim
                weights[f"{where}.q_proj.weight"][h * C : h * C + N] *= math.sqrt(gamma)
                weights[f"{where}.q_proj.weight"][h * C + N : (h + 1) * C] *= gamma
                weights[f"{where}.kv_b_proj.weight"][h * width : h * width + N] *= math.sqrt(gamma)
                continue
            L = c.num_attention_heads // c.num_key_value_heads
            smallest = min(gamma_H[h // L * L : (h // L + 1) * L])
            for kind in ("weight", "bias"):
                weights[f"{where}.q_proj.{kind}"][rows] *= gamma / math.sqrt(smallest)
                if h % L == 0:
                    weights[f"{where}.k_proj.{kind}"][h // L * C : (h // L + 1) * C] *= math.sqrt(smallest)
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_step_is_clipped_by_its_equation(kind: str, algorithm: str, job: Callable[..., TrainJob], tmp_path: Path):
    options = {"algorithm": algorithm}
    largest_LH = maxima(job(kind, 0.0))
    ordered = largest_LH.flatten().sort().values
    tau = float(ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2  # half of the heads are above
    fit(job(kind, 0.0, options), tmp_path / "off", stop_after=1)
    fit(job(kind, tau, options), tmp_path / "on", stop_after=1)
    (line,) = steps(tmp_path / "on")
    assert line["heads_clipped"] == int((largest_LH > tau).sum()) == len(ordered) // 2
    assert line["max_attention_logit"] == pytest.approx(float(ordered[-1]), rel=1e-5)  # float32's sums
    gamma_LH = (tau / largest_LH).clamp(max=1)
    model, after = run_store.load_model_state(tmp_path / "off")
    expected, got = clipped(after, model, gamma_LH), run_store.load_model_state(tmp_path / "on")[1]
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=0, msg=name)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, got[name])}
    assert changed <= {name for names in query_key_projections(model).values() for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_resumes_is_the_run_that_did_not_stop(
    kind: str, job: Callable[..., TrainJob], tmp_path: Path
) -> None:
    """Also where recomputation begins in the middle, and whether or not there are evaluations between."""
    tau = float(maxima(job(kind, 0.0)).max()) / 3
    fit(job(kind, tau), tmp_path / "whole")
    fit(job(kind, tau), tmp_path / "cut", stop_after=3)
    fit(job(kind, tau, recompute="block"), tmp_path / "cut")
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert same_tensors(tmp_path / "cut", tmp_path / "whole")
    lines = steps(tmp_path / "whole")
    assert len(lines) == 6 and lines[0]["heads_clipped"] > 0
    fit(job(kind, tau, heldout=HeldoutConfig(), log_every=2), tmp_path / "quiet")
    keys = ("step", "max_attention_logit", "heads_clipped", "loss")
    quiet = [{key: line[key] for key in keys} for line in steps(tmp_path / "quiet")]
    assert quiet == [{key: line[key] for key in keys} for line in lines[1::2]]


def test_a_threshold_that_no_logit_reaches_changes_no_bit(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    fit(job("grouped", 0.0, num_steps=2), tmp_path / "off")
    fit(job("grouped", 1e6, num_steps=2), tmp_path / "on")
    assert same_tensors(tmp_path / "off", tmp_path / "on")
    assert [line["heads_clipped"] for line in steps(tmp_path / "on")] == [0, 0]
    added = {"max_attention_logit", "heads_clipped"}
    without = [{k: v for k, v in line.items() if k not in added} for line in records(tmp_path / "on")]
    assert without == records(tmp_path / "off") and not added & set(steps(tmp_path / "off")[0])


def test_what_is_clipped_is_reported(
    job: Callable[..., TrainJob], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the dry run's table, of frozen layers in a warning, and in the step's line."""
    assert "QK-Clip" not in derive(job("grouped", 0.0)).table()
    row = next(line for line in derive(job("grouped", 0.5)).table().splitlines() if "QK-Clip" in line)
    assert row.split(maxsplit=1)[1] == "attention logits above 0.5, in 2 layers"
    frozen = job("grouped", 0.5, {"freeze": ("blocks.0.attn.k_proj.*",)})
    fit(frozen, tmp_path, stop_after=1)
    err = capsys.readouterr().err
    assert "attention logits above 0.5, in 1 layer\n" in err
    assert "warning: QK-Clip skips layers whose queries or keys are frozen (0)" in err
    (line,) = steps(tmp_path)
    step_line = next(one for one in err.splitlines() if one.startswith("step "))
    assert f"logit {line['max_attention_logit']:5.1f}" in step_line
    assert step_line.endswith(f"clipped {line['heads_clipped']}") and 0 < line["heads_clipped"] <= 4
    assert json.loads((tmp_path / "plan.json").read_text())["qk_clip_layers"] == [1]


def test_where_it_could_lower_no_logit_it_is_refused(job: Callable[..., TrainJob]) -> None:
    with pytest.raises(ConfigError, match=r"qk_clip_threshold=100 has nothing to scale: optimizer.freeze"):
        derive(job("latent", 100.0, {"freeze": ("*.kv_b_proj.*",)}))
    normalized = job("grouped", 100.0)
    assert isinstance(normalized.init, Scratch)
    normalized = replace(normalized, init=Scratch(model=replace(normalized.init.model, qkv_bias=False, qk_norm=True)))
    with pytest.raises(ConfigError, match=r"qk_clip_threshold=100 is not for model.qk_norm=true"):
        derive(normalized)
    derive(replace(normalized, optimizer=optimizer(0.0)))
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="optimizer.qk_clip_threshold=.*must be a finite number of at least 0"):
            optimizer(value)


def test_it_is_a_hyper_parameter_that_older_runs_did_not_have(job: Callable[..., TrainJob]) -> None:
    old = encode(job("grouped", 0.0))
    assert changes_on_resume(old, job("grouped", 50.0), steps_done=1) == ["optimizer.qk_clip_threshold: 0.0 -> 50.0"]
    del old["optimizer"]["qk_clip_threshold"]
    assert changes_on_resume(old, job("grouped", 0.0), steps_done=1) == []
    assert changes_on_resume(old, job("grouped", 50.0), steps_done=1) == ["optimizer.qk_clip_threshold: 0.0 -> 50.0"]


@pytest.mark.parametrize("name", ["llama3_tiny", "moonlight_tiny", "biased", "latent queries"])
def test_projections_named_without_the_model_are_those_that_its_modules_declare(name: str) -> None:
    c = PRESETS[name if "tiny" in name else "moonlight_tiny" if "latent" in name else "llama3_tiny"]()
    c = replace(c, qkv_bias=name == "biased")
    if name == "latent queries":
        c = replace(c, mla=replace(c.mla, q_lora_rank=24))
    with torch.device("meta"):
        blocks = Transformer(c).blocks
    for layer, names in query_key_projections(c).items():
        declared = blocks[layer].attn.query_key_heads()
        assert sorted(names) == sorted(f"blocks.{layer}.attn.{n}" for n in (*declared["query"], *declared["key"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_clipped_alike(kind: str, job: Callable[..., TrainJob]) -> None:
    tau = float(maxima(job(kind, 0.0)).max()) / 3
    eager, compiled = (build(job(kind, tau, compile=c)) for c in (False, True))
    for step in range(3):
        logits = []
        for state in (eager, compiled):
            result = train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=2, clip=1.0)
            assert result.clipped_logits is not None
            logits.append(result.clipped_logits.values)
        assert logits[1][0] == pytest.approx(logits[0][0], rel=1e-4) and logits[1][1] == logits[0][1]
        assert step or logits[0][1] != [0]
