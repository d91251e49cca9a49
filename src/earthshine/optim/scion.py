"""Norm-ball steps for what is no hidden matrix: embeddings, head, norms and vectors. Opt-in: algorithm="scion".

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

from earthshine.errors import ConfigError
from earthshine.ops import lmo
from earthshine.optim import rules
from earthshine.optim.measure import Measure
from earthshine.optim.rounding import NEAREST, Noise
from earthshine.optim.sharding.exchange import check_agreement, process_group
from earthshine.optim.sharding.layout import read_layout
from earthshine.optim.sharding.local_shards import LocalShards, ensure_group

# The directions that group["lmo"] may name.
KINDS = ("row_rms", "sign", "rms")


class ScionPlan:
    """Over which ranks each vector's norm has to be summed. Raises ConfigError for rows that are cut by columns."""

    def __init__(self, group: Mapping[str, Any], shards: LocalShards) -> None:
        self.shards = shards
        # Ranks -> the "rms" parameters that they share.
        self.spread: dict[tuple[int, ...], list[int]] = {}
        for i, kind in enumerate(group["lmo"]):
            layout = read_layout(shards.params[i], (), shards.names[i])
            ensure_group(shards.params[i], layout)
            ranks = shards.zero1_ranks(i) or layout.ranks
            if kind == "rms" and len(ranks) > 1:
                self.spread.setdefault(ranks, []).append(i)
            if kind == "row_rms" and shards.params[i].ndim < 2:
                raise ConfigError(
                    f"{shards.names[i]} of shape {list(shards.params[i].shape)} has no rows: 'row_rms' is for "
                    f"embeddings [V, D]; use 'rms'."
                )
            if (
                kind == "row_rms"
                and shards.weight(i).ndim > 1
                and shards.weight(i).shape[-1] != shards.params[i].shape[-1]
            ):
                raise ConfigError(
                    f"{shards.names[i]}: its rows are cut by columns over the processes {list(ranks)}, so 'row_rms' "
                    f"cannot measure them: shard it by rows (Shard(0)), or give it to AdamW."
                )

        for ranks, members in sorted(self.spread.items()):
            what = [(shards.names[i], tuple(shards.params[i].shape)) for i in members]
            check_agreement(ranks, repr(what), shards.params[members[0]].device)

    def predicted_bytes(self) -> int:
        return sum(_bytes(len(ranks), len(members)) for ranks, members in self.spread.items())


def step_scion(
    plan: ScionPlan,
    group: Mapping[str, Any],
    states: Mapping[int, Mapping[str, Tensor]],
    grads: Mapping[int, Tensor],
    noises: Mapping[int, Noise] = NEAREST,
) -> tuple[Measure, int]:
    """One step of the local shards that have a gradient: (what measures it, bytes sent). noises: see `rules.step_`."""
    shards, lr = plan.shards, float(group["lr"])
    sums = {i: shards.local_state(states[i]["momentum_sum"]) for i in states}
    for i, grad in grads.items():
        kept, wide = sums[i], torch.promote_types(sums[i].dtype, torch.float32)
        sums[i] = kept.to(wide).mul_(group["momentum"]).add_(grad.reshape(kept.shape))  # rounded once, after use
        if sums[i] is not kept:
            kept.copy_(sums[i])
    squares, sent = _squares(plan, sums)
    norms: list[Tensor] = []
    elements = 0
    for i in grads:
        update = _direction(group["lmo"][i], shards, i, sums[i], squares.get(i)).mul_(group["update_rms"])
        weight = shards.weight(i)
        decay, cautious = lr * group["weight_decay"], group["cautious_weight_decay"]
        rules.step_([weight], [update.view(weight.shape)], lr, decay, cautious, [noises.get(i)])
        norms.append(torch.linalg.vector_norm(update))
        elements += update.numel()
    return Measure(norms, lambda values: (sum(norm**2 for (norm,) in values), elements)), sent


def _direction(kind: str, shards: LocalShards, i: int, total: Tensor, squares: Tensor | None) -> Tensor:
    """The lmo of a local shard with RMS 1, as a new tensor."""
    if kind == "sign":
        return lmo.sign(total).to(torch.promote_types(total.dtype, torch.float32))
    if kind == "row_rms":
        return lmo.row_rms(total.view(-1, shards.params[i].shape[-1]))
    return lmo.rms(total, squares, shards.params[i].numel())


def _squares(plan: ScionPlan, sums: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], int]:
    """Sum of squares over all ranks of each vector that is spread, one all-reduce per shard group; and the bytes sent.

    Of every such vector, whether this rank has a gradient of it or not: all ranks have to take part.
    """
    found: dict[int, Tensor] = {}
    sent = 0
    for ranks, members in sorted(plan.spread.items()):
        own = torch.stack([torch.linalg.vector_norm(sums[i].float()).square() for i in members])
        dist.all_reduce(own, group=process_group(ranks))
        found |= dict(zip(members, own.unbind(), strict=True))
        sent += _bytes(len(ranks), len(members))
    return found, sent


def _bytes(ranks: int, values: int) -> int:
    """What a ring all-reduce of fp32 values sends from each rank."""
    return 2 * (ranks - 1) * 4 * values // ranks
