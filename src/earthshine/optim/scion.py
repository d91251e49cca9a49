"""Scion's norm-ball updates for embeddings, head, norms and vectors. Opt-in: algorithm="scion".

    M <- mu M + G                                   a sum, as Muon's; the step depends on its direction alone
    W <- (1 - lr wd) W - lr update_rms lmo(M)

lmo is the steepest direction under the norm of Scion's tables (arXiv:2502.07529; `ops.lmo`), per parameter in
group["lmo"]: "row_rms" for embeddings [V, D], "sign" for heads, "rms" for norms and vectors. Each is taken with RMS 1
(Scion's radius is then update_rms, and update_rms * d_in for "sign", which it divides by d_in), so that one learning
rate and one update_rms serve matrices and the rest alike: one rule for all parameters, which Moonlight's report names
as future work.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError
from earthshine.ops import lmo
from earthshine.optim import rules
from earthshine.optim.group_step import GroupStep, StepNumbers
from earthshine.optim.measure import Measure
from earthshine.optim.sharding import traffic
from earthshine.optim.sharding.exchange import all_reduce_bytes, check_agreement, process_group
from earthshine.optim.sharding.layout import to_local
from earthshine.optim.sharding.local_shards import ensure_group


class ScionStep(GroupStep):
    """Also: over which ranks each vector's norm is summed. Raises ConfigError for rows that are cut by columns."""

    algorithm = "scion"

    def __init__(self, group: Mapping[str, Any], process_group: Any, reduce_gradients: bool, bucket_bytes: int) -> None:
        super().__init__(group, process_group, reduce_gradients, bucket_bytes)
        # Ranks -> the "rms" parameters that they share.
        self._spread: dict[tuple[int, ...], list[int]] = {}
        for i, kind in enumerate(group["lmo"]):
            layout = self.shards.layout(i)
            ensure_group(self.params[i], layout)
            ranks = layout.ranks
            if kind == "rms" and len(ranks) > 1:
                self._spread.setdefault(ranks, []).append(i)
            if kind == "row_rms":
                self._check_rows(i, ranks)
        for ranks, members in sorted(self._spread.items()):
            what = [(self.shards.names[i], tuple(self.params[i].shape)) for i in members]
            check_agreement(ranks, repr(what), self.params[members[0]].device)

    def _check_rows(self, i: int, ranks: tuple[int, ...]) -> None:
        p, name, weight = self.params[i], self.shards.names[i], self.shards.weight(i)
        if p.ndim < 2:
            raise ConfigError(
                f"{name} of shape {list(p.shape)} has no rows: 'row_rms' is for embeddings [V, D]; use 'rms'."
            )
        if weight.ndim > 1 and weight.shape[-1] != p.shape[-1]:
            raise ConfigError(
                f"{name}: its rows are cut by columns over the processes {list(ranks)}, so 'row_rms' cannot measure "
                f"them: shard it by rows (Shard(0)), or give it to AdamW."
            )

    def _state_keys(self) -> tuple[str, ...]:
        return ("momentum_sum", "step") if self._stochastic else ("momentum_sum",)

    def predicted_bytes(self) -> dict[str, int]:
        return super().predicted_bytes() | {"norms": traffic.of_norms(self._spread)}

    def step(
        self, options: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> StepNumbers:
        shards, lr, noises = self.shards, float(options["lr"]), self._noises(states, grads)
        sums = {i: to_local(states[i]["momentum_sum"]) for i in states}
        for i, grad in grads.items():
            stored, acc_dtype = sums[i], at_least_float32_dtype(sums[i].dtype)
            sums[i] = stored.to(acc_dtype).mul_(options["momentum"]).add_(grad.reshape(stored.shape))
            if sums[i] is not stored:  # rounded once, after use
                stored.copy_(sums[i])
        squares, sent = self._squares(sums)
        norms: list[Tensor] = []
        num_elements = 0
        for i in grads:
            update = self._direction(options["lmo"][i], i, sums[i], squares.get(i)).mul_(options["update_rms"])
            weight = shards.weight(i)
            decay, cautious = lr * options["weight_decay"], options["cautious_weight_decay"]
            rules.step_([weight], [update.view(weight.shape)], lr, decay, cautious, [noises.get(i)])
            norms.append(torch.linalg.vector_norm(update))
            num_elements += update.numel()
        self._count_step(states, grads)
        measure = Measure(norms, lambda values: (sum(norm**2 for (norm,) in values), num_elements))
        return StepNumbers(self.algorithm, lambda: measure, {"norms": sent})

    def _direction(self, kind: str, i: int, total: Tensor, squares: Tensor | None) -> Tensor:
        """The lmo of a local shard with RMS 1, as a new tensor."""
        if kind == "sign":
            return lmo.sign(total).to(at_least_float32_dtype(total.dtype))
        if kind == "row_rms":
            return lmo.row_rms(total.view(-1, self.params[i].shape[-1]))
        return lmo.rms(total, squares, self.params[i].numel())

    def _squares(self, sums: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], int]:
        """Sum of squares over all ranks of each vector that is spread, one all-reduce per shard group; bytes sent.

        Of every such vector, whether this rank has a gradient of it or not: all ranks have to take part.
        """
        squares: dict[int, Tensor] = {}
        sent = 0
        for ranks, members in sorted(self._spread.items()):
            local_squares = torch.stack([torch.linalg.vector_norm(sums[i].float()).square() for i in members])
            dist.all_reduce(local_squares, group=process_group(ranks))
            squares |= dict(zip(members, local_squares.unbind(), strict=True))
            sent += all_reduce_bytes(len(ranks), local_squares.numel() * local_squares.element_size())
        return squares, sent
