"""The bytes that a step sends from this rank to others, from the plan alone: what `Muon.predicted_bytes` adds up.

What a step really sends is counted where it is handed over, by the same formulas for collectives (`exchange`).
"""

from collections.abc import Mapping, Sequence

from earthshine.device import at_least_float32_dtype
from earthshine.optim.sharding.batches import MatrixPlan
from earthshine.optim.sharding.exchange import all_reduce_bytes, ring_bytes
from earthshine.optim.sharding.local_shards import LocalShards
from earthshine.optim.sharding.zero1 import Zero1Shards


def of_matrices(plan: MatrixPlan) -> int:
    """Matrices on their way to owners and back, and the statistics beside them."""
    total = 0
    for t in plan.transfers:
        position = t.shard_group.position
        elements, stats = (
            [sum(counts) - counts[position] for counts in both]
            for both in ((t.sends, t.receives), (t.stats_sends, t.stats_receives))
        )
        # Statistics are fp32; only the moments among them come back.
        total += sum(elements) * plan.comm_dtype.itemsize + 4 * (sum(stats) if plan.normuon else stats[0])
    return total


def of_norms(spread: Mapping[tuple[int, ...], Sequence[int]]) -> int:
    """Sums of squares, fp32: ranks -> the vectors that they share."""
    return sum(all_reduce_bytes(len(ranks), 4 * len(members)) for ranks, members in spread.items())


def of_shards(shards: LocalShards) -> dict[str, int]:
    """ZeRO-1's gradients and parameters, by purpose."""
    if not isinstance(shards, Zero1Shards):
        return {}
    total = {"gather_parameters": 0, "reduce_gradients": 0}
    for partition, members in shards.partitions:
        ranks, elements = len(partition.ranks), partition.longest
        total["gather_parameters"] += ring_bytes(ranks, elements * partition.dtype.itemsize)
        total["reduce_gradients"] += ring_bytes(ranks, elements * partition.acc_dtype.itemsize)
        total["reduce_gradients"] += all_reduce_bytes(ranks, len(members))  # whether there is a gradient
    for i in shards.scalars:
        ranks, p = shards.process_group.size(), shards.params[i]
        total["reduce_gradients"] += all_reduce_bytes(ranks, 2 * at_least_float32_dtype(p.dtype).itemsize)
    return total if shards.reduce_gradients else total | {"reduce_gradients": 0}
