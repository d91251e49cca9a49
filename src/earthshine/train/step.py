"""One step: forward and backward over micro-batches, clipping, and the update.

What a step minimises, over all its sequences, whatever the cut into micro-batches:

    (sum of the loss over target tokens) / (their number)
    + balance.coefficient * (sum of the balance loss over sequences and layers) / (number of sequences)
    + balance.z_coefficient * (sum of the router z-loss over tokens and layers) / (number of tokens)

The numbers are known before the first backward pass, and nothing else divides. The Switch loss of a sequence depends
on the others' routing, by balance.scope: within its micro-batch, or, after a first pass of all tokens through the
routers, within the step (`model.config.BalanceConfig`).

Shapes: B sequences, S positions, E experts.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from earthshine.data.loader import Batch
from earthshine.errors import DataError, TrainingDivergedError
from earthshine.model.transformer import Transformer
from earthshine.train.state import TrainState


@dataclass(frozen=True)
class Objective:
    """What a step minimised, the sum of the three losses.

    loss: nats per target token.
    balance_loss, z_loss: as they were added, coefficient included, summed over the layers.
    balance: the balance loss without its coefficient, the mean over sequences and layers: 1 at uniform routing.
    """

    loss: float
    balance_loss: float = 0.0
    z_loss: float = 0.0
    balance: float = 0.0

    @property
    def total(self) -> float:
        return self.loss + self.balance_loss + self.z_loss


@dataclass(frozen=True)
class StepResult:
    """grad_norm: before clipping. The seconds are of forward and backward alone, a first routing pass included."""

    objective: Objective
    grad_norm: float
    num_targets: int
    forward_backward_seconds: float


def train_step(state: TrainState, batch: Batch, *, lr: float, micro_batch: int, clip: float) -> StepResult:
    """Update `state` by the whole step `batch`, in micro-batches of `micro_batch` sequences; count the step.

    Args:
        lr: learning rate of this step, of every group.
        clip: largest global gradient norm; 0 for no clipping.

    Raises TrainingDivergedError when loss or gradient norm is not finite; then parameters, routers' biases, optimizer
    and step are still those of before it.
    """
    number = state.step + 1
    state.optimizer.zero_grad(set_to_none=True)
    state.model.reset_expert_counts()
    start = time.perf_counter()
    objective = accumulate(state.model, batch, micro_batch)
    seconds = time.perf_counter() - start
    if not math.isfinite(objective.total):
        raise TrainingDivergedError(f"the loss of step {number} is {objective.total} ({objective}).")
    norm = clip_gradients(state.model.parameters(), clip)
    if not math.isfinite(norm):
        raise TrainingDivergedError(f"the gradient norm of step {number} is {norm} (its loss is {objective.loss:.4f}).")
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.model.update_router_bias()
    state.step = number
    state.total_tokens += batch.num_targets
    return StepResult(objective, norm, batch.num_targets, seconds)


def accumulate(model: Transformer, batch: Batch, micro_batch: int) -> Objective:
    """Add the gradient of the step's objective to `.grad`, in micro-batches of `micro_batch` sequences; returns it.

    Raises DataError when the whole step has no target.
    """
    if batch.num_targets == 0:
        raise DataError("a step has no target token: every next token is another document's first. Raise seq_len.")
    model.train()
    num_sequences, num_tokens = batch.tokens_BS.shape[0], batch.tokens_BS.numel()
    parts = [batch.rows(first, first + micro_batch) for first in range(0, num_sequences, micro_batch)]
    balance = model.balance
    step_counts = _routing_counts(model, parts) if balance.scope == "step" else None
    sums: list[tuple[Tensor, ...]] = []
    for part in parts:
        tokens_BS, targets_BS, documents_BS = _on_device(model, part)
        losses = model.losses(tokens_BS, targets_BS, documents_BS, step_counts)
        terms = (
            losses.nll / batch.num_targets,
            losses.balance * (balance.coefficient / num_sequences),
            losses.z * (balance.z_coefficient / num_tokens),
        )
        torch.autograd.backward(sum(terms[1:], terms[0]))
        sums.append(tuple(s.detach() for s in losses))
    nll, unweighted, z = (math.fsum(map(float, column)) for column in zip(*sums, strict=True))
    return Objective(
        loss=nll / batch.num_targets,
        balance_loss=balance.coefficient * unweighted / num_sequences,
        z_loss=balance.z_coefficient * z / num_tokens,
        balance=unweighted / num_sequences / max(len(model.config.moe.layers), 1),
    )


def _routing_counts(model: Transformer, parts: Sequence[Batch]) -> dict[int, Tensor]:
    """How often the step's tokens choose each expert, (E,) by layer: a forward pass without gradient, by parts."""
    total: dict[int, Tensor] = {}
    for part in parts:
        tokens_BS, _, documents_BS = _on_device(model, part)
        for layer, counts_E in model.routing_counts(tokens_BS, documents_BS).items():
            total[layer] = total.get(layer, 0) + counts_E
    return total


def _on_device(model: Transformer, part: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets, and the documents' numbers where there is more than one document in a sequence."""
    device = model.embed.weight.device
    documents_BS = part.documents_BS.to(device) if bool(part.documents_BS.any()) else None
    return part.tokens_BS.to(device), part.targets_BS.to(device), documents_BS


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
