"""One step: forward and backward over micro-batches, clipping, and the update.

The gradient is that of (sum of the loss over the step's target tokens) / (their number), whatever the cut into
micro-batches: the number is known before the first backward pass, and nothing else divides.

Shapes: B sequences, S positions.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earthshine.data.loader import Batch
from earthshine.errors import DataError, TrainingDivergedError
from earthshine.model.transformer import Transformer
from earthshine.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """loss: nats per target token. grad_norm: before clipping. The seconds are of forward and backward alone."""

    loss: float
    grad_norm: float
    num_targets: int
    forward_backward_seconds: float


def train_step(state: TrainState, batch: Batch, *, lr: float, micro_batch: int, clip: float) -> StepResult:
    """Update `state` by the whole step `batch`, in micro-batches of `micro_batch` sequences; count the step.

    Args:
        lr: learning rate of this step, of every group.
        clip: largest global gradient norm; 0 for no clipping.

    Raises TrainingDivergedError when loss or gradient norm is not finite; then parameters, optimizer and counts are
    still those of before the step.
    """
    number = state.step + 1
    state.optimizer.zero_grad(set_to_none=True)
    state.model.reset_expert_counts()
    start = time.perf_counter()
    loss = accumulate(state.model, batch, micro_batch)
    seconds = time.perf_counter() - start
    if not math.isfinite(loss):
        raise TrainingDivergedError(f"the loss of step {number} is {loss}.")
    norm = clip_gradients(state.model.parameters(), clip)
    if not math.isfinite(norm):
        raise TrainingDivergedError(f"the gradient norm of step {number} is {norm} (its loss is {loss:.4f}).")
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.step = number
    state.total_tokens += batch.num_targets
    return StepResult(loss, norm, batch.num_targets, seconds)


def accumulate(model: Transformer, batch: Batch, micro_batch: int) -> float:
    """Add the gradient of the step's mean loss per target token to `.grad`; returns that loss, in nats.

    Raises DataError when the whole step has no target.
    """
    if batch.num_targets == 0:
        raise DataError("a step has no target token: every next token is another document's first. Raise seq_len.")
    model.train()
    device = model.embed.weight.device
    sums: list[Tensor] = []
    for first in range(0, batch.tokens_BS.shape[0], micro_batch):
        part = batch.rows(first, first + micro_batch)
        documents_BS = part.documents_BS.to(device) if bool(part.documents_BS.any()) else None
        loss_sum = model.loss_sum(part.tokens_BS.to(device), part.targets_BS.to(device), documents_BS)
        torch.autograd.backward(loss_sum / batch.num_targets)
        sums.append(loss_sum.detach())
    return math.fsum(float(s) for s in sums) / batch.num_targets


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The global L2 norm of the gradients, squared and summed in float64."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before.

    A norm that is not finite leaves them untouched. Differs from torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the
    norm and sums squares in the gradients' type.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = grad_norm(with_gradient)
    if max_norm and math.isfinite(norm) and norm > max_norm:
        for parameter in with_gradient:
            assert parameter.grad is not None
            parameter.grad.mul_(max_norm / norm)
    return norm
