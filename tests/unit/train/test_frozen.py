"""optimizer.freeze: what stays, and that the plan and the speed count what is computed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from earthshine.checkpoint import run_store
from earthshine.errors import ConfigError
from earthshine.model.config import ModelConfig
from earthshine.model.counts import train_flops_per_token
from earthshine.model.transformer import Transformer, initialize
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.groups import describe, param_groups
from earthshine.train.derive import derive
from earthshine.train.job import HeldoutConfig, Scratch, TrainJob
from earthshine.train.loop import fit

JobMaker = Callable[..., TrainJob]

BIAS, WEIGHT = "blocks.1.moe.router.bias_E", "blocks.1.moe.router.weight"
MODES = {  # patterns -> whether the bias stays, and the router's weight
    (): (False, False),
    ("*.experts.*",): (False, False),
    ("*.router.weight",): (True, True),
    ("*.moe.*",): (True, True),
    ("blocks.1.moe.router.*",): (True, True),
    ("*.router.bias_E",): (True, False),
    ("*.bias_E", "*.router.weight"): (True, True),
}


def optimizer(freeze: tuple[str, ...]) -> OptimizerConfig:
    return OptimizerConfig(lr=5e-3, ns_dtype="float32", freeze=freeze)


@pytest.mark.parametrize("freeze", MODES)
def test_a_router_s_bias_stays_where_the_router_is_frozen_or_it_is_named(
    freeze: tuple[str, ...], make_job: JobMaker, moonlight_model: ModelConfig, tmp_path: Path
) -> None:
    bias_stays, weight_stays = MODES[freeze]
    job = make_job(
        init=Scratch(model=moonlight_model), optimizer=optimizer(freeze), num_steps=2, heldout=HeldoutConfig()
    )
    fit(job, tmp_path, device="cpu")
    before = Transformer(moonlight_model)
    initialize(before, job.seed)
    after = run_store.load_model_state(tmp_path)[1]
    stays = {name for name, tensor in before.state_dict().items() if torch.equal(tensor, after[name])}
    assert (BIAS in stays, WEIGHT in stays) == (bias_stays, weight_stays)
    assert json.loads((tmp_path / "plan.json").read_text())["frozen_router_biases"] == [1] * bias_stays
    assert ("router bias frozen in layers" in derive(job).table()) == bias_stays


def test_what_is_frozen_is_reported(make_job: JobMaker, moonlight_model: ModelConfig) -> None:
    model = Transformer(moonlight_model)
    groups = param_groups(model, freeze=["*.router.bias_E"])
    lines = [" ".join(line.split()) for line in describe(groups, model).splitlines()]
    assert "frozen blocks.*.moe.router.bias_E 1 6 6 buffer, not moved" in lines
    assert "bias_E" not in describe(param_groups(Transformer(moonlight_model)), Transformer(moonlight_model))
    frozen = derive(make_job(init=Scratch(model=moonlight_model), optimizer=optimizer(("*.experts.*",))))
    elements = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert frozen.frozen_parameters == elements and f"{elements:,}" in frozen.table()


@pytest.mark.parametrize("pattern", ["*.router.bias", "*.bias_E", "*.counts_E"])
def test_only_buffers_that_training_moves_can_be_frozen(pattern: str, make_job: JobMaker) -> None:
    """The micro model's gate has no bias; counts are no state of a model."""
    job = make_job(moe=True, optimizer=optimizer((pattern,)))
    with pytest.raises(ConfigError, match="matches none of the"):
        derive(job)
    assert isinstance(job.init, Scratch)
    with pytest.raises(ConfigError, match="matches none of the"):
        param_groups(Transformer(job.init.model), freeze=[pattern])


def test_plan_and_speed_count_the_backward_pass_that_is_computed(make_job: JobMaker, tmp_path: Path) -> None:
    """The figures themselves are compared with torch's counter in model/test_counts.py."""
    freeze = ("embed.weight", "blocks.0.*")
    job = make_job(True, optimizer=optimizer(freeze), num_steps=2, heldout=HeldoutConfig(), recompute="block")
    plan, whole = derive(job), derive(make_job(True, recompute="block"))
    assert isinstance(job.init, Scratch)
    model = Transformer(job.init.model)
    frozen = {n for n, _ in model.named_parameters() if n == "embed.weight" or n.startswith("blocks.0.")}
    expected = train_flops_per_token(job.init.model, job.seq_len, frozen=frozen) * job.tokens_per_step
    assert plan.forward_backward_flops_per_step == expected < 0.8 * whole.forward_backward_flops_per_step
    assert plan.repeated_forward_flops_per_step < whole.repeated_forward_flops_per_step
    fit(job, tmp_path, device="cpu")
    env = json.loads((tmp_path / "env.json").read_text())
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    # The rate is that of forward and backward alone, which take less than the step.
    assert record["mfu"] * env["peak_flops"] * record["seconds"] > 0.999 * expected


def test_gradients_of_what_is_trained_do_not_depend_on_what_is_frozen(moonlight_model: ModelConfig) -> None:
    tokens_BS = torch.arange(2 * 32).view(2, 32) % moonlight_model.vocab_size
    gradients = []
    for freeze in ((), ("head.weight", "*.k*", "*.up_proj.*", "*.w_gate_EFD", "embed.weight")):
        model = Transformer(moonlight_model)
        initialize(model, 0)
        param_groups(model, freeze=freeze)
        sum(model.train().losses(tokens_BS, tokens_BS.roll(-1, 1))).backward()  # type: ignore[union-attr]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert 0 < len(gradients[1]) < len(gradients[0])
    assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in gradients[1].items())
