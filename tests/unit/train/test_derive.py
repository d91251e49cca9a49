"""train/derive.py: what follows from a job, beside what is built from it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from earthshine.data.config import DataConfig, SourceConfig
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.counts import train_flops_per_token
from earthshine.model.presets import llama3_tiny, llama3_tiny_e8t2
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.model.transformer import Transformer
from earthshine.ops.orthogonalize import newton_schulz
from earthshine.optim.build import build_optimizer
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.logical_matrices import logical_matrices
from earthshine.train.derive import derive
from earthshine.train.job import Scratch, TrainJob, model_config

JobMaker = Callable[..., TrainJob]
SWITCH = BalanceConfig(loss="switch", scope="step")


def test_a_capacity_that_can_never_drop_is_warned_of(make_job: JobMaker) -> None:
    """Four experts, top-2: factor 2 of the choices, or 4 of the tokens, is room for every token."""
    for factor, relative_to in ((2.0, "per_assignment"), (4.0, "per_token")):
        capacity = CapacityConfig(factor=factor, relative_to=relative_to)  # type: ignore[arg-type]
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


@pytest.mark.parametrize(("pattern", "message"), [("*.atn.*", "matches none of the"), ("*", "leaves no parameter")])
def test_freezing_nothing_or_everything_is_refused_before_it_runs(
    pattern: str, message: str, make_job: JobMaker
) -> None:
    with pytest.raises(ConfigError, match=message):
        derive(make_job(optimizer=OptimizerConfig(freeze=(pattern,))))


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
    for what in (
        "parameters",
        "active per token",
        "Newton-Schulz",
        "memory: optimizer",
        "time at the measured 1 GFLOP/s (lower bound)",
    ):
        assert what in table


def test_a_mixture_shares_the_sequences_by_weight(make_job: JobMaker, shards: Path, heldout: Path) -> None:
    sources = (SourceConfig(path=str(shards), weight=3), SourceConfig(path=str(heldout)))
    a, b = derive(make_job(data=DataConfig(sources=sources))).sources
    windows = [(json.loads((p / "index.json").read_text())["tokens"] - 1) // 16 for p in (shards, heldout)]
    assert (a.epochs, b.epochs) == (18 / windows[0], 6 / windows[1])


def test_data_that_are_not_here_are_no_fault_of_a_plan(make_job: JobMaker, tmp_path: Path) -> None:
    plan = derive(make_job(data=DataConfig(sources=(SourceConfig(path=str(tmp_path / "none")),))))
    assert (plan.sources, plan.warnings) == ((), ())
