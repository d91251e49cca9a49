"""train/job.py: what a job refuses, what follows from it, and what may change while it runs."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from earthshine.checkpoint import run_store
from earthshine.config import decode, encode, override
from earthshine.errors import ConfigError, UnsupportedModelError
from earthshine.model.config import BalanceConfig, CapacityConfig, ModelConfig
from earthshine.model.counts import train_flops_per_token
from earthshine.model.hf_config import to_hf
from earthshine.model.presets import llama3_tiny, llama3_tiny_e8t2
from earthshine.model.transformer import Transformer, initialize
from earthshine.ops.orthogonalize import newton_schulz
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.optim.logical_matrices import logical_matrices
from earthshine.optim.muon import build_optimizer
from earthshine.train.derive import derive
from earthshine.train.job import FromCheckpoint, FromHuggingFace, Scratch, TrainJob, check_model, model_config
from earthshine.train.resume import changes_on_resume

JobMaker = Callable[..., TrainJob]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seq_len=0", "seq_len=0 must be at least 1"),
        ("num_steps=0", "num_steps=0 must be at least 1"),
        ("sequences_per_micro_batch=3", r"=3 does not divide sequences_per_step=4; use one of 1, 2, 4"),
        ("clip_grad_norm=-1", "clip_grad_norm=-1.0 must be 0"),
        ("seed=-1", "seed=-1 must not be negative"),
        (f"seed={1 << 64}", r"seed=18446744073709551616 must .* be below 2\*\*64"),
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


def test_a_capacity_that_can_never_drop_is_warned_of(make_job: JobMaker) -> None:
    """Four experts, top-2: factor 2 of the choices, or 4 of the tokens, is room for every token."""
    for factor, meaning in ((2.0, "per_assignment"), (4.0, "per_token")):
        capacity = CapacityConfig(factor=factor, meaning=meaning)  # type: ignore[arg-type]
        (warning,) = derive(make_job(moe=True, capacity=capacity)).warnings
        assert (
            f"capacity.factor={factor:g} can never drop a token" in warning
            and f"from a factor of {factor:g}" in warning
        )
        assert derive(make_job(moe=True, capacity=replace(capacity, factor=factor - 0.1))).warnings == ()
    assert derive(make_job(moe=True)).warnings == ()


def test_a_loss_that_depends_on_the_micro_batch_is_warned_of(make_job: JobMaker) -> None:
    balance = BalanceConfig(loss="switch", scope="micro_batch")
    (warning,) = derive(make_job(moe=True, balance=balance)).warnings
    assert "the gradient depends on sequences_per_micro_batch=2" in warning
    assert derive(make_job(moe=True, balance=balance, sequences_per_micro_batch=4)).warnings == ()
    assert derive(make_job(moe=True, balance=SWITCH)).warnings == ()


def test_forward_passes_done_again_are_counted(make_job: JobMaker) -> None:
    """Recomputation and the Switch loss's routing pass go through every layer, but not through the head."""
    once = derive(make_job(moe=True))
    assert once.repeated_forward_flops_per_step == 0 and "once more" not in once.table()
    job = make_job(moe=True, balance=SWITCH)
    model = model_config(job)
    layers = (train_flops_per_token(model, 16) / 3 - 2 * model.vocab_size * model.hidden_size) * job.tokens_per_step
    assert derive(job).repeated_forward_flops_per_step == pytest.approx(layers)
    both = derive(replace(job, recompute="block"))
    assert both.repeated_forward_flops_per_step == pytest.approx(2 * layers)
    assert both.total_flops - once.total_flops == pytest.approx(job.num_steps * 2 * layers)
    assert "forward once more, FLOPs per step" in both.table()


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
    built.loss_sum(torch.arange(8)[None], torch.arange(1, 9)[None]).backward()
    gradient = dict(built.named_parameters())["blocks.1.moe.router.weight"].grad
    assert gradient is not None
    # The derivative of s / (s + 1e-20) is a difference that rounds to 8e-11 here; a router that learns has 5e-4.
    return gradient.where(gradient.abs() > 1e-8, 0)


@pytest.mark.parametrize(("pattern", "message"), [("*.atn.*", "matches none of the"), ("*", "leaves no parameter")])
def test_freezing_nothing_or_everything_is_refused_before_it_runs(
    pattern: str, message: str, make_job: JobMaker
) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(make_job(optimizer=OptimizerConfig(freeze=(pattern,))))


def test_the_model_of_a_warm_start_is_read_from_its_json(tmp_path: Path, make_job: JobMaker) -> None:
    model = llama3_tiny()
    (tmp_path / "config.json").write_text(json.dumps(to_hf(model)))
    found = model_config(make_job(init=FromHuggingFace(path=str(tmp_path))))
    assert found.hidden_size == model.hidden_size and found.vocab_size == model.vocab_size
    run = tmp_path / "run"
    run_store.save(run, step=1, tensors={"model.x": torch.zeros(1)}, state={}, model=model, job={}, keep=0)
    assert model_config(make_job(init=FromCheckpoint(path=str(run)))) == model


@pytest.mark.parametrize("init", [FromHuggingFace(path="nowhere"), FromCheckpoint(path="nowhere")])
def test_a_warm_start_from_nowhere_is_refused(init: Any, make_job: JobMaker) -> None:
    with pytest.raises(ConfigError, match=r"init.path='nowhere'"):
        model_config(make_job(init=init))


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("freeze", [(), ("*.attn.*", "embed.weight"), ("*.ffn_norm.weight",)])
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("kind", ["dense", "moe", "partial"])
def test_derived_parameters_and_bytes_are_those_of_the_built_optimizer(
    kind: str, algorithm: Any, freeze: tuple[str, ...], make_job: JobMaker, micro_model: Callable[[bool], ModelConfig]
) -> None:
    """Bytes are those of what is allocated, but for AdamW's step counts."""
    config = {"dense": llama3_tiny(), "moe": llama3_tiny_e8t2(), "partial": micro_model(True)}[kind]
    optimizer = OptimizerConfig(algorithm=algorithm, freeze=freeze)
    derived = derive(make_job(init=Scratch(model=config), optimizer=optimizer))
    with torch.device("meta"):
        model = Transformer(config)
        built = build_optimizer(model, optimizer)
    elements = {"muon": 0, "adamw": 0}
    for group in built.param_groups:
        elements[group["algorithm"]] += sum(p.numel() for p in group["params"])
    assert {"muon": derived.muon_parameters, "adamw": derived.adamw_parameters} == elements
    assert derived.parameter_bytes == nbytes(model.parameters())
    assert derived.gradient_bytes == nbytes(torch.zeros_like(p) for p in model.parameters() if p.requires_grad)
    state = [value for s in built.state.values() for key, value in s.items() if key != "step"]
    assert derived.optimizer_bytes == nbytes(state)


@pytest.mark.parametrize("form", ["standard", "gram", "auto"])
def test_newton_schulz_flops_are_those_that_it_computes(form: Any, make_job: JobMaker) -> None:
    """Counted while it runs, on a device where symmetric products are not halved. Sides of 32 and more: smaller ones
    are filled up for the products, and counted as they are."""
    tiny = llama3_tiny_e8t2()
    config = replace(tiny, moe=replace(tiny.moe, num_experts=32), num_key_value_heads=tiny.num_attention_heads)
    optimizer = OptimizerConfig(ns_form=form, ns_steps=5, ns_dtype="float32")
    with torch.device("meta"):
        built = build_optimizer(Transformer(config), optimizer)
    shapes: Counter[tuple[int, int]] = Counter()
    for group in (g for g in built.param_groups if g["algorithm"] == "muon"):
        for p, spec in zip(group["params"], group["matrices"], strict=True):
            shapes.update((matrix.M, matrix.N) for matrix in logical_matrices(tuple(p.shape), spec))
    assert min(map(min, shapes)) >= 32
    with FlopCounterMode(display=False) as counter:
        for (M, N), count in shapes.items():
            newton_schulz(torch.empty(count, M, N, device="meta"), steps=5, form=form)
    derived = derive(make_job(init=Scratch(model=config), optimizer=optimizer))
    assert derived.newton_schulz_flops_per_step == counter.get_total_flops() > 0


def test_steps_tokens_and_flops(make_job: JobMaker) -> None:
    job = make_job(num_steps=10, sequences_per_step=8, sequences_per_micro_batch=2, seq_len=16)
    derived = derive(job)
    assert (derived.tokens_per_step, derived.total_tokens, derived.micro_batches) == (128, 1280, 4)
    assert derived.forward_backward_flops_per_step == train_flops_per_token(model_config(job), 16) * 128
    both = derived.forward_backward_flops_per_step + derived.newton_schulz_flops_per_step
    assert derived.total_flops == 10 * both
    assert derive(job, world=2).micro_batches == 2
    with pytest.raises(ConfigError, match="does not divide into 3 processes"):
        derive(job, world=3)


def test_the_table_names_what_people_ask_for(make_job: JobMaker) -> None:
    table = derive(make_job()).table(flops_per_second=1e9)
    for what in ("parameters", "active per token", "Newton-Schulz", "memory: optimizer", "at 1 GFLOP/s"):
        assert what in table


def test_changing_what_does_not_touch_the_mathematics_is_allowed(make_job: JobMaker) -> None:
    job = make_job()
    changes = [
        "name=other",
        "tracker=tensorboard",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        "heldout.every_steps=1",
        "recompute=block",
        "log_every=10",
    ]
    assert changes_on_resume(encode(job), override(job, changes), steps_done=3) == []


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "sequences_per_micro_batch=1",
        "optimizer.lr=0.1",
        "heldout.max_sequences=1",
        "data.document_attention=false",
        "init.model.rope_theta=1.0",
        "compute_dtype=bfloat16",
        "balance.coefficient=0.01",
        "balance.bias_rate=0.01",
        "capacity.factor=1.0",
        "compile=true",
        "num_steps=7",
    ],
)
def test_changing_the_mathematics_is_refused_with_the_difference(change: str, make_job: JobMaker) -> None:
    job = make_job()
    lines = changes_on_resume(encode(job), override(job, [change]), steps_done=4)
    assert len(lines) == 1 and lines[0].startswith(change.partition("=")[0] + ": ")


def test_a_run_may_be_lengthened_where_its_learning_rates_stay(make_job: JobMaker) -> None:
    constant = make_job(schedule=ScheduleConfig(kind="constant", warmup_steps=2))
    assert changes_on_resume(encode(constant), replace(constant, num_steps=60), steps_done=6) == []
    assert changes_on_resume(encode(constant), replace(constant, num_steps=5), steps_done=6)
    wsd = make_job(schedule=ScheduleConfig(kind="wsd", warmup_steps=1, decay_steps=2))
    assert changes_on_resume(encode(wsd), replace(wsd, num_steps=60), steps_done=4) == []
    assert changes_on_resume(encode(wsd), replace(wsd, num_steps=60), steps_done=6)


def test_a_job_loads_without_torch() -> None:
    code = "import sys, earthshine.train.job, earthshine.recipes.registry as r; r.recipe('tiny_moe'); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
