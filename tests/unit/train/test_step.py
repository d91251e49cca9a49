"""train/step.py: what a step's gradient is, and what a step that must not happen leaves behind."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from earthshine.data.loader import Batch
from earthshine.errors import DataError, TrainingDivergedError
from earthshine.model.config import ModelConfig
from earthshine.model.transformer import Transformer, initialize
from earthshine.train.job import TrainJob
from earthshine.train.state import TrainState, build_state
from earthshine.train.step import accumulate, clip_gradients, grad_norm, train_step

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


def gradients(model: Transformer, batch: Batch, micro_batch: int) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = accumulate(model, batch, micro_batch)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("moe", [False, True])
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(
    moe: bool, micro_model: Callable[[bool], ModelConfig]
) -> None:
    """1, 2 and 4 micro-batches with 30 targets spread 16 + 9 + 1 + 4. A mean of means is 30 % off at least."""
    model = Transformer(micro_model(moe))
    initialize(model, seed=0)
    batch = uneven_batch(model.config.vocab_size)
    whole_loss, whole = gradients(model, batch, 4)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for micro_batch in (2, 1):
        loss, cut = gradients(model, batch, micro_batch)
        assert abs(loss - whole_loss) <= 1e-6 * whole_loss
        for name, gradient in whole.items():
            # fp32 sums in another order: measured at most 2.2e-7 of the parameter's largest gradient.
            difference = (cut[name] - gradient).abs().max() / gradient.abs().max()
            assert difference <= 1e-6, f"{name}: {difference:.1e} with {4 // micro_batch} micro-batches"


def test_the_loss_is_the_mean_over_the_targets_of_the_whole_step(micro_model: Callable[[bool], ModelConfig]) -> None:
    model = Transformer(micro_model(False))
    initialize(model, seed=0)
    batch = uneven_batch(model.config.vocab_size)
    logits_BSV = model(batch.tokens_BS, batch.documents_BS).double()
    expected = nn.functional.cross_entropy(logits_BSV.detach().flatten(0, 1), batch.targets_BS.flatten())
    assert accumulate(model, batch, 2) == pytest.approx(float(expected), rel=1e-6)


def test_expert_counts_are_of_the_whole_step(micro_model: Callable[[bool], ModelConfig]) -> None:
    model = Transformer(micro_model(True))
    initialize(model, seed=0)
    accumulate(model, uneven_batch(model.config.vocab_size), 1)
    assert int(model.expert_counts()[1].sum()) == 4 * 16 * 2


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


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    what: str, make_job: Callable[..., TrainJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = build(make_job())
    batch = state.loader.next_step()
    if what == "loss":
        sums = Transformer.loss_sum
        monkeypatch.setattr(Transformer, "loss_sum", lambda *args: sums(*args) * math.inf)
    else:
        state.model.final_norm.weight.register_hook(lambda grad: grad * math.nan)
    before = snapshot(state)
    with pytest.raises(TrainingDivergedError, match=f"the {what}.* of step 1 is (inf|nan)"):
        train_step(state, batch, lr=1e-3, micro_batch=2, clip=1.0)
    assert state.step == 0 and state.total_tokens == 0
    for name, tensor in snapshot(state).items():
        assert torch.equal(tensor, before[name]), name


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
