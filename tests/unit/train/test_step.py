"""train/step.py: what a step's gradient is, and what a step that must not happen leaves behind."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from earthshine.data.loader import Batch
from earthshine.errors import DataError, TrainingDivergedError
from earthshine.model.config import ModelConfig
from earthshine.model.training_options import BalanceConfig, CapacityConfig, TrainingOptions
from earthshine.model.transformer import Transformer, initialize
from earthshine.ops.routing import bias_update
from earthshine.train.job import Scratch, TrainJob
from earthshine.train.state import TrainState, build_state
from earthshine.train.step import Objective, accumulate, clip_gradients, grad_norm, train_step

CPU = torch.device("cpu")


def uneven_batch(vocab: int) -> Batch:
    """Four rows of 16 tokens with 16, 9, 1 and 4 targets: every micro-batch has another mean than the step."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, vocab, (4, 16), generator=generator)
    targets_BS = torch.randint(0, vocab, (4, 16), generator=generator)
    documents_BS = torch.zeros(4, 16, dtype=torch.int32)
    documents_BS[1, 5:] = 1
    for row, num_targets in enumerate((16, 9, 1, 4)):
        targets_BS[row, num_targets:] = -100
    return Batch(tokens_BS, targets_BS, documents_BS, tuple((0, 0, i) for i in range(4)), 30)


def built(config: ModelConfig, **options: Any) -> Transformer:
    model = Transformer(config, training=TrainingOptions(**options))
    initialize(model, seed=0)
    return model


def gradients(model: Transformer, batch: Batch, micro_batch: int) -> tuple[Objective, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    model.reset_expert_counts()
    objective = accumulate(model, batch, micro_batch)
    return objective, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to the largest element of that gradient."""
    assert set(got) == set(expected)
    return max(float((got[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


# Coefficients far above any that people use, so that these losses are most of the router's gradient.
BALANCED = {
    "sequence": BalanceConfig(coefficient=1.0),
    "switch by sequence": BalanceConfig(loss="switch", scope="sequence", coefficient=1.0),
    "switch by step": BalanceConfig(loss="switch", scope="step", coefficient=1.0),
    "z": BalanceConfig(loss="none", z_coefficient=1.0),
}


@pytest.mark.parametrize("which", ["dense", "no loss", *BALANCED])
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(
    which: str, micro_model: Callable[[bool], ModelConfig]
) -> None:
    """1, 2 and 4 micro-batches with 30 targets spread 16 + 9 + 1 + 4. A mean of means is 30 % off at least."""
    model = built(micro_model(which != "dense"), balance=BALANCED.get(which, BalanceConfig(loss="none")))
    batch = uneven_batch(model.config.vocab_size)
    whole_objective, whole = gradients(model, batch, 4)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for micro_batch in (2, 1):
        objective, cut = gradients(model, batch, micro_batch)
        # fp32 sums in another order: measured at most 6e-7 of a parameter's largest gradient.
        assert difference(cut, whole) <= 2e-6
        for name in ("loss", "balance_loss", "z_loss", "balance"):
            assert getattr(objective, name) == pytest.approx(getattr(whole_objective, name), rel=1e-6)


def test_the_switch_loss_by_micro_batch_depends_on_the_cut(micro_model: Callable[[bool], ModelConfig]) -> None:
    """The product of two averages is not additive (DESIGN section 3), which is why this scope has its name."""
    model = built(micro_model(True), balance=BalanceConfig(loss="switch", scope="micro_batch", coefficient=1.0))
    batch = uneven_batch(model.config.vocab_size)
    whole, cut = gradients(model, batch, 4)[1], gradients(model, batch, 1)[1]
    assert difference(cut, whole) > 0.01
    by_step = built(model.config, balance=BALANCED["switch by step"])
    assert difference(gradients(by_step, batch, 1)[1], whole) <= 2e-6  # what one micro-batch of everything gives


@pytest.mark.parametrize("which", BALANCED)
def test_what_balances_is_in_the_gradient_and_is_reported(
    which: str, micro_model: Callable[[bool], ModelConfig]
) -> None:
    """Its gradient is the difference to that of the loss alone, and twice the coefficient doubles it."""
    config, router = micro_model(True), "blocks.1.moe.router.weight"
    batch = uneven_batch(config.vocab_size)
    once = BALANCED[which]
    scale = 2 if once.loss != "none" else 1  # a coefficient of no loss is refused
    twice = replace(once, coefficient=scale * once.coefficient, z_coefficient=2 * once.z_coefficient)
    results = [gradients(built(config, balance=b), batch, 2) for b in (BalanceConfig(loss="none"), once, twice)]
    (alone, g0), (objective, g1), (_, g2) = results[0], results[1], results[2]
    added = g1[router] - g0[router]
    assert added.abs().max() > 1e-3 * g0[router].abs().max()
    # Differences of float32 gradients: what they share cancels, its rounding does not.
    torch.testing.assert_close(g2[router] - g0[router], 2 * added, rtol=1e-4, atol=1e-6)
    assert objective.loss == alone.loss and alone.total == alone.loss and alone.balance == 0.0
    if which == "z":
        assert objective.z_loss > 0 and objective.balance == objective.balance_loss == 0
    else:
        assert objective.balance_loss == objective.balance >= 0.9  # coefficient and layers are 1 here
    assert objective.total == objective.loss + objective.balance_loss + objective.z_loss


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_step(micro_model: Callable[[bool], ModelConfig]) -> None:
    model = built(micro_model(False))
    batch = uneven_batch(model.config.vocab_size)
    logits_BSV = model(batch.tokens_BS, batch.documents_BS).double()
    expected = nn.functional.cross_entropy(logits_BSV.detach().flatten(0, 1), batch.targets_BS.flatten())
    assert accumulate(model, batch, 2).loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", ["sequence", "switch by step"])
def test_expert_counts_are_of_the_whole_step_each_choice_once(
    which: str, recompute: bool, micro_model: Callable[[bool], ModelConfig]
) -> None:
    """Neither recomputation nor a first pass for the Switch loss counts anything."""
    model = built(micro_model(True), balance=BALANCED[which], recompute=recompute)
    gradients(model, uneven_batch(model.config.vocab_size), 1)
    assert int(model.expert_counts()[1].sum()) == 4 * 16 * 2


@pytest.mark.parametrize("kind", ["dense", "moe", "moonlight", "capacity"])
def test_recomputation_gives_the_same_gradients_to_the_bit(
    kind: str, micro_model: Callable[[bool], ModelConfig], moonlight_model: ModelConfig
) -> None:
    config = moonlight_model if kind == "moonlight" else micro_model(kind != "dense")
    options = {"capacity": CapacityConfig(factor=0.5)} if kind == "capacity" else {}
    kept, again = built(config, **options), built(config, recompute=True, **options)
    batch = uneven_batch(config.vocab_size)
    (objective, expected), (other, got) = gradients(kept, batch, 2), gradients(again, batch, 2)
    assert str(other) == str(objective) and set(got) == set(expected)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert kept.dropped_counts() == again.dropped_counts()
    assert any(kept.dropped_counts().values()) == (kind == "capacity")
    counts, others = kept.expert_counts(), again.expert_counts()
    assert all(torch.equal(others[layer], counts_E) for layer, counts_E in counts.items())


def test_clipping_scales_to_the_norm_and_reports_the_one_before() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([3.0, 0.0, 0.0])
    parameters[1].grad = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert clip_gradients(parameters, 10.0) == 5.0
    assert grad_norm(parameters) == 5.0  # below the limit: untouched
    assert clip_gradients(parameters, 1.0) == 5.0
    assert grad_norm(parameters) == pytest.approx(1.0, rel=1e-6)
    assert clip_gradients(parameters, 0.0) == pytest.approx(1.0, rel=1e-6)


def test_the_norm_survives_squares_beyond_float32() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3e25, 4e25])
    assert grad_norm([parameter]) == pytest.approx(5e25)


def test_no_gradient_has_norm_zero() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], 1.0) == 0.0


def build(job: TrainJob) -> TrainState:
    return build_state(job, CPU, torch.float32, None, trust=False, allow_config_change=False)


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


@pytest.mark.parametrize("what", ["loss", "balance", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    what: str, make_job: Callable[..., TrainJob], moonlight_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the router's bias, although the tokens were routed and counted."""
    state = build(make_job(init=Scratch(model=moonlight_model)))
    train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=2, clip=1.0)
    batch = state.loader.next_step()
    if what == "gradient":
        state.model.final_norm.weight.register_hook(lambda grad: grad * math.nan)
    else:
        found, name = Transformer.losses, {"loss": "nll", "balance": "balance"}[what]

        def poisoned(*args: Any) -> Any:
            losses = found(*args)
            return losses._replace(**{name: getattr(losses, name) * math.inf})

        monkeypatch.setattr(Transformer, "losses", poisoned)
    before = snapshot(state)
    assert before["model.blocks.1.moe.router.bias_E"].any()
    message = f"the {'gradient norm' if what == 'gradient' else 'loss'} of step 2 is (inf|nan)"
    with pytest.raises(TrainingDivergedError, match=message):
        train_step(state, batch, lr=1e-3, micro_batch=2, clip=1.0)
    assert state.step == 1
    for name, tensor in snapshot(state).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("rule", ["moonlight", "deepseek", "none"])
def test_the_bias_moves_once_a_step_by_the_whole_step_s_counts(
    rule: Any, make_job: Callable[..., TrainJob], moonlight_model: ModelConfig
) -> None:
    rate = BalanceConfig.bias_rate if rule == "none" else 1e-2  # another rate of no rule is refused
    balance = BalanceConfig(bias=rule, bias_rate=rate)
    state = build(make_job(init=Scratch(model=moonlight_model), balance=balance))
    for _ in range(3):
        before_E = state.tensors()["model.blocks.1.moe.router.bias_E"].clone()
        train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=1, clip=1.0)
        after_E = state.tensors()["model.blocks.1.moe.router.bias_E"]
        if rule == "none":
            assert not after_E.any()
        else:
            counts_E = state.model.expert_counts()[1]
            assert int(counts_E.sum()) == 4 * 16 * 2
            assert torch.equal(after_E, bias_update(before_E, counts_E, 1e-2, rule)) and not after_E.equal(before_E)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's compiler warns itself, and hides that where warnings are no errors
@pytest.mark.parametrize("kind", ["dense", "moe", "moonlight"])
def test_a_compiled_model_takes_the_same_steps(
    kind: str, make_job: Callable[..., TrainJob], moonlight_model: ModelConfig
) -> None:
    """Dropless routing included, where every step gives every expert another number of tokens."""
    init = {"init": Scratch(model=moonlight_model)} if kind == "moonlight" else {}
    eager, compiled = (build(make_job(kind == "moe", compile=c, **init)) for c in (False, True))
    for _ in range(3):
        losses = []
        for state in (eager, compiled):
            result = train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=2, clip=1.0)
            losses.append(result.objective.total)
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # fused kernels round elsewhere
    for name, tensor in eager.tensors().items():
        other = compiled.tensors()[name]
        # Muon amplifies last bits of a gradient: 3 steps of 1e-3, so a tenth of one step's size.
        torch.testing.assert_close(other, tensor, rtol=0, atol=1e-4, msg=name)


def test_a_step_counts_itself_and_its_targets(make_job: Callable[..., TrainJob]) -> None:
    state = build(make_job())
    batch = state.loader.next_step()
    result = train_step(state, batch, lr=1e-3, micro_batch=2, clip=1.0)
    assert (state.step, state.total_tokens) == (1, batch.num_targets) == (1, result.num_targets)
    assert {group["lr"] for group in state.optimizer.param_groups} == {1e-3}


def test_a_step_without_targets_is_refused(make_job: Callable[..., TrainJob]) -> None:
    state = build(make_job())
    batch = state.loader.next_step()
    empty = replace(batch, targets_BS=torch.full_like(batch.targets_BS, -100), num_targets=0)
    with pytest.raises(DataError, match="no target token"):
        train_step(state, empty, lr=1e-3, micro_batch=2, clip=1.0)


# What torch.use_deterministic_algorithms says to raise on an accelerator, of what is not about images.
NOT_DETERMINISTIC = {"bincount", "histc", "median", "kthvalue", "put_", "nll_loss2d_forward", "cumsum", "resize_"}


class Operations(TorchDispatchMode):
    """The operations called; a running sum only where it is of floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name != "cumsum" or args[0].is_floating_point():
            self.called.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dropping", "moonlight"])
def test_no_operation_of_a_step_lacks_a_deterministic_form(
    kind: str, make_job: Callable[..., TrainJob], moonlight_model: ModelConfig
) -> None:
    """On an accelerator `fit` asks for deterministic kernels strictly, so one of these would end it."""
    job = make_job(init=Scratch(model=moonlight_model)) if kind == "moonlight" else make_job(True)
    if kind == "dropping":
        job = replace(job, capacity=CapacityConfig(factor=1.0, drop="probability"))
    state = build(job)
    with Operations() as operations:
        train_step(state, state.loader.next_step(), lr=1e-3, micro_batch=2, clip=1.0)
    assert {"bmm", "scatter_add_"} < operations.called
    assert not operations.called & NOT_DETERMINISTIC
