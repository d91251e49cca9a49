"""One step: forward and backward over micro-batches, clipping, the update, and what follows it.

What a step minimizes over all its sequences, however they are cut into micro-batches:

    (sum of the loss over target tokens) / (their number)
    + balance.coefficient * (sum of the balance loss over sequences and layers) / (number of sequences)
    + balance.z_coefficient * (sum of the router z-loss over tokens and layers) / (number of tokens)

The numbers are known before the first backward pass, and nothing else divides. The Switch loss of a sequence depends
on the others' routing, by balance.scope: within its micro-batch, or, after a first pass of all tokens through the
routers, within the step (`model.training_options.BalanceConfig`).

Shapes: B sequences, S positions, E experts.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from earthshine.data.loader import Batch
from earthshine.device import Readings, Stopwatch, to_device
from earthshine.errors import DataError, TrainingDivergedError
from earthshine.model.training_options import BalanceConfig
from earthshine.model.transformer import Losses, Transformer
from earthshine.train.state import TrainState


@dataclass(frozen=True, eq=False)
class Objective:
    """What a step minimized: the sum of the three losses. Reading a number waits for the device.

    loss: nats per target token.
    balance_loss, z_loss: with their coefficients, as they were added, summed over the layers.
    balance: the balance loss without its coefficient, the mean over sequences and layers: 1 at uniform routing.

    All follow from `sums`, the `model.transformer.Losses` of each micro-batch. num_layers: those with experts.
    """

    sums: Readings
    num_targets: int
    num_sequences: int
    num_tokens: int
    num_layers: int
    config: BalanceConfig

    def _sum(self, which: str) -> float:
        return math.fsum(values[Losses._fields.index(which)] for values in self.sums.values)

    @property
    def loss(self) -> float:
        return self._sum("nll") / self.num_targets

    @property
    def balance_loss(self) -> float:
        return self.config.coefficient * self._sum("balance") / self.num_sequences

    @property
    def z_loss(self) -> float:
        return self.config.z_coefficient * self._sum("z") / self.num_tokens

    @property
    def balance(self) -> float:
        return self._sum("balance") / self.num_sequences / max(self.num_layers, 1)

    @property
    def total(self) -> float:
        return self.loss + self.balance_loss + self.z_loss

    def __str__(self) -> str:
        return f"loss {self.loss}, balance_loss {self.balance_loss}, z_loss {self.z_loss}"


@dataclass(frozen=True, eq=False)
class StepResult:
    """The numbers of step `step`. Reading one waits for the device; `read(*readings)` fetches them all at once.

    grad_norm: before clipping. forward_backward_seconds: a first routing pass included. clipped_logits: the largest
    attention logit and the number of heads clipped, where QK-Clip is on.
    """

    step: int
    objective: Objective
    num_targets: int
    norm: Readings
    stopwatch: Stopwatch
    clipped_logits: Readings | None = None

    @property
    def readings(self) -> tuple[Readings, ...]:
        return self.objective.sums, self.norm, *([self.clipped_logits] if self.clipped_logits else [])

    @property
    def grad_norm(self) -> float:
        return self.norm.values[0][0]

    @property
    def forward_backward_seconds(self) -> float:
        return self.stopwatch.seconds

    def require_finite(self) -> None:
        """Raise TrainingDivergedError when loss or gradient norm is not finite."""
        if not math.isfinite(self.objective.total):
            raise TrainingDivergedError(f"the loss of step {self.step} is {self.objective.total} ({self.objective}).")
        if not math.isfinite(self.grad_norm):
            raise TrainingDivergedError(
                f"the gradient norm of step {self.step} is {self.grad_norm} (its loss is {self.objective.loss:.4f})."
            )
        if self.clipped_logits is not None and not math.isfinite(self.clipped_logits.values[0][0]):
            raise TrainingDivergedError(f"an attention logit of step {self.step} is not finite.")


def train_step(state: TrainState, batch: Batch, *, lr: float, micro_batch: int, clip: float) -> StepResult:
    """Update `state` with the whole step `batch`, in micro-batches of `micro_batch` sequences; count the step.

    Does not wait for an accelerator: the numbers of the step stay on the device until they are read.

    Args:
        lr: learning rate of this step, for every group.
        clip: largest global gradient norm; 0 for no clipping.

    On a CPU, where reading a number is free, raises TrainingDivergedError when loss or gradient norm is not finite;
    then parameters, routers' biases, optimizer and step are still those before it. On an accelerator
    `StepResult.require_finite` finds it, after the update.
    """
    state.optimizer.zero_grad(set_to_none=True)
    state.model.reset_expert_counts()
    qk_clip = state.qk_clip
    with Stopwatch(state.device) as stopwatch, qk_clip.recording() if qk_clip else nullcontext():
        objective = accumulate(state.model, batch, micro_batch)
    norm = clip_gradients(state.model.parameters(), clip)
    result = StepResult(state.step + 1, objective, batch.num_targets, Readings(norm), stopwatch)
    if norm.is_cpu:
        result.require_finite()
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    if qk_clip is not None:
        qk_clip.clip_recorded()
        result = replace(result, clipped_logits=qk_clip.measure())
    state.model.update_router_bias()
    state.step = result.step
    state.total_tokens += batch.num_targets
    return result


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
    sums: list[Tensor] = []
    for part in parts:
        tokens_BS, targets_BS, documents_BS = _on_device(model, part)
        losses = model.losses(tokens_BS, targets_BS, documents_BS, step_counts)
        terms = (
            losses.nll / batch.num_targets,
            losses.balance * (balance.coefficient / num_sequences),
            losses.z * (balance.z_coefficient / num_tokens),
        )
        torch.autograd.backward(sum(terms[1:], terms[0]))
        sums.append(torch.stack([s.detach() for s in losses]))
    num_layers = len(model.config.moe.layers)
    return Objective(Readings(*sums), batch.num_targets, num_sequences, num_tokens, num_layers, balance)


def _routing_counts(model: Transformer, parts: Sequence[Batch]) -> dict[int, Tensor]:
    """How often the step's tokens choose each expert, (E,) by layer: a forward pass without gradients, part by part."""
    total: dict[int, Tensor] = {}
    for part in parts:
        tokens_BS, _, documents_BS = _on_device(model, part)
        for layer, counts_E in model.routing_counts(tokens_BS, documents_BS).items():
            total[layer] = total.get(layer, 0) + counts_E
    return total


def _on_device(model: Transformer, part: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, targets, and document numbers where a sequence has more than one document.

    The numbers stay on the host, where the model counts without waiting for the device (`ops.attention.make_mask`).
    """
    device = model.embed.weight.device
    documents_BS = part.documents_BS if bool(part.documents_BS.any()) else None
    return to_device(part.tokens_BS, device), to_device(part.targets_BS, device), documents_BS


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The global L2 norm of the gradients, squared and summed in float64: 0-d, on their device."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their global norm is at most `max_norm` (0: leave them); returns the norm before.

    A norm that is not finite leaves them untouched. Does not wait for an accelerator: there they are multiplied by 1
    where nothing is to be clipped. Differs from torch.nn.utils.clip_grad_norm_, which adds 1e-6 to the norm and sums
    squares in the gradients' dtype.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = grad_norm(with_gradient)
    if not max_norm or not with_gradient:
        return norm
    clips = norm.isfinite() & (norm > max_norm)
    if norm.is_cpu and not clips:
        return norm
    factor = torch.where(clips, torch.full_like(norm, max_norm) / norm, 1.0)
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm
