"""train/job.py: what a job refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from earthshine.checkpoint import run_store
from earthshine.config import decode, encode, override
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import ModelConfig
from earthshine.model.hf_config import to_hf
from earthshine.model.presets import llama3_tiny, llama3_tiny_e8t2
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig
from earthshine.train.derive import derive
from earthshine.train.job import FromCheckpoint, FromHuggingFace, Scratch, TrainJob, check_model, model_config

JobMaker = Callable[..., TrainJob]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seq_len=0", "seq_len=0 must be at least 1"),
        ("num_steps=0", "num_steps=0 must be at least 1"),
        ("sequences_per_micro_batch=3", r"=3 does not divide sequences_per_step=4; use one of 1, 2, 4"),
        ("clip_grad_norm=-1", "clip_grad_norm=-1.0 must be 0"),
        ("seed=-1", "seed=-1 must be from 0 to"),
        (f"seed={1 << 64}", r"seed=18446744073709551616 must be from 0 to 2\*\*64 - 1"),
        ("name=a/b", "name='a/b' must be usable as a folder name"),
        ("checkpoint.keep=-1", "checkpoint.keep=-1 must not be negative"),
        ("balance.loss=switch", "loss='switch' needs balance.scope: 'sequence', 'micro_batch' or 'step'"),
        ("balance.coefficient=-1", "balance.coefficient=-1.0 must be a number that is not negative"),
        ("balance.los=none", r"no field 'balance.los'. Did you mean 'loss'"),
        ("capacity.factor=-1", "capacity.factor=-1.0 must be 0"),
        ("recompute=layer", "'layer' is not one of 'none', 'block'"),
        ("compile=1", "compile=1 must be of type bool"),
        ("schedule.warmup_steps=7", "warmup_steps=7 .* more than num_steps=6"),
        ("optimizer.lrr=1", r"no field 'optimizer.lrr'. Did you mean 'lr'"),
        ("tracker=wandb", "'wandb' is not one of 'none', 'tensorboard'"),
    ],
)
def test_what_cannot_be_is_refused(change: str, message: str, make_job: JobMaker) -> None:
    with pytest.raises(ConfigError, match=message):
        override(make_job(), [change])


@pytest.mark.parametrize(
    "init",
    [Scratch(model=llama3_tiny()), FromHuggingFace(path="a"), FromCheckpoint(path="b")],
    ids=lambda i: str(i.kind),
)
def test_a_job_survives_json(init: Any, make_job: JobMaker) -> None:
    job = make_job(init=init)
    assert decode(TrainJob, json.loads(json.dumps(encode(job)))) == job


def test_a_sequence_longer_than_the_positions_is_refused(make_job: JobMaker) -> None:
    with pytest.raises(ConfigError, match=r"seq_len=65 is more than model.max_position_embeddings=64"):
        model_config(make_job(seq_len=65))


def top_1(model: ModelConfig) -> ModelConfig:
    return replace(model, moe=replace(model.moe, top_k=1))


@pytest.mark.parametrize("init", ["scratch", "huggingface", "checkpoint", "resumed"])
def test_a_router_that_gets_no_gradient_is_refused(init: str, tmp_path: Path, make_job: JobMaker) -> None:
    """The softmax over the one chosen expert is 1: measured below, the gradient is exactly 0."""
    model = top_1(llama3_tiny_e8t2())
    (tmp_path / "config.json").write_text(json.dumps(to_hf(model)))
    run_store.save(tmp_path, step=1, tensors={"model.x": torch.zeros(1)}, state={}, model=model, job={}, keep=0)
    kinds: dict[str, Any] = {
        "huggingface": FromHuggingFace(path=str(tmp_path)),
        "checkpoint": FromCheckpoint(path=str(tmp_path)),
    }
    job = make_job(init=kinds.get(init, Scratch(model=model)))
    with pytest.raises(ConfigError, match=r"top_k=1 with gate='topk_softmax' .* gives the router no gradient"):
        derive(job, model=model if init == "resumed" else None)
    frozen = replace(job, optimizer=OptimizerConfig(freeze=("*.router.weight",)))
    assert derive(frozen).trainable_parameters > 0


@pytest.mark.parametrize("gate", ["softmax_topk", "sigmoid_bias"])
def test_any_gate_that_gives_one_expert_all_the_weight_is_refused(
    gate: Any, make_job: JobMaker, micro_model: Callable[[bool], ModelConfig], moonlight_model: ModelConfig
) -> None:
    model = moonlight_model if gate == "sigmoid_bias" else micro_model(True)
    of_one = replace(model, moe=replace(model.moe, top_k=1, gate=gate))
    assert not router_gradient(of_one).any()
    with pytest.raises(ConfigError, match=rf"top_k=1 with gate='{gate}' and renormalize=true"):
        check_model(make_job(), of_one)
    learns = replace(of_one, moe=replace(of_one.moe, renormalize=False))  # the Switch Transformer's gate, for one
    assert router_gradient(learns).any()
    check_model(make_job(), learns)


SWITCH = BalanceConfig(loss="switch", scope="step")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"balance": SWITCH}, "balance.loss"), ({"capacity": CapacityConfig(factor=1.0)}, "capacity.factor")],
)
def test_settings_for_experts_are_refused_for_a_dense_model(
    changes: dict[str, Any], named: str, make_job: JobMaker
) -> None:
    with pytest.raises(ConfigError, match=f"the model is dense, and {named} is for models with experts"):
        derive(make_job(**changes))
    assert derive(make_job(moe=True, **changes)).parameters > 0


@pytest.mark.parametrize("balance", [BalanceConfig(bias="deepseek"), BalanceConfig(bias_rate=1e-2)])
def test_a_rule_for_a_bias_that_the_gate_does_not_have_is_refused(
    balance: BalanceConfig, make_job: JobMaker, moonlight_model: ModelConfig
) -> None:
    with pytest.raises(ConfigError, match=r"balance.bias=.* are for model.moe.gate='sigmoid_bias', not 'topk_softmax'"):
        derive(make_job(moe=True, balance=balance))
    assert derive(make_job(init=Scratch(model=moonlight_model), balance=balance)).parameters > 0
    assert derive(make_job(moe=True, balance=BalanceConfig(bias="none"))).parameters > 0


def test_what_could_not_be_exported_is_not_trained(make_job: JobMaker) -> None:
    model = llama3_tiny_e8t2()
    some = replace(model, moe=replace(model.moe, layers=(1,)))
    with pytest.raises(UnsupportedModelError, match="no Hugging Face class holds .*: experts in some layers"):
        derive(make_job(init=Scratch(model=some)))
    shared = replace(some, moe=replace(some.moe, shared_intermediate_size=16))
    assert derive(make_job(init=Scratch(model=shared))).parameters > 0


def test_the_gradient_of_a_router_that_chooses_one_expert_is_zero(micro_model: Callable[[bool], ModelConfig]) -> None:
    assert not router_gradient(top_1(micro_model(True))).any()
    assert router_gradient(micro_model(True)).any()


def router_gradient(model: ModelConfig) -> torch.Tensor:
    """That of the next-token loss."""
    built = Transformer(model)
    initialize(built, seed=0)
    built.losses(torch.arange(8)[None], torch.arange(1, 9)[None]).nll.backward()
    gradient = dict(built.named_parameters())["blocks.1.moe.router.weight"].grad
    assert gradient is not None
    # The derivative of s / (s + 1e-20) is a difference that rounds to 8e-11 here; a router that learns has 5e-4.
    return gradient.where(gradient.abs() > 1e-8, 0)


def test_the_model_of_a_warm_start_is_read_from_its_json(tmp_path: Path, make_job: JobMaker) -> None:
    model = llama3_tiny()
    (tmp_path / "config.json").write_text(json.dumps(to_hf(model)))
    read = model_config(make_job(init=FromHuggingFace(path=str(tmp_path))))
    assert read.hidden_size == model.hidden_size and read.vocab_size == model.vocab_size
    run = tmp_path / "run"
    run_store.save(run, step=1, tensors={"model.x": torch.zeros(1)}, state={}, model=model, job={}, keep=0)
    assert model_config(make_job(init=FromCheckpoint(path=str(run)))) == model


@pytest.mark.parametrize("init", [FromHuggingFace(path="nowhere"), FromCheckpoint(path="nowhere")])
def test_a_warm_start_from_nowhere_is_refused(init: Any, make_job: JobMaker) -> None:
    with pytest.raises(ConfigError, match=r"init.path='nowhere'"):
        model_config(make_job(init=init))


def test_a_job_loads_without_torch() -> None:
    code = "import sys, earthshine.train.job, earthshine.recipes.registry as r; r.RECIPES['tiny_moe'](); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
