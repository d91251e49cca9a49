"""Carries an ownership plan out: packed, unpadded all-to-alls between the ranks of a shard group, counted in bytes.

A message holds, for each rank in turn, the pieces that it is to have, one after the other and nothing else. Ranks are
in the order of the process group, which torch sorts by global rank. Bytes are those that leave this rank: what a rank
"sends" to itself is copied in memory and not counted.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from earthshine.errors import ConfigError

# Process groups by their ranks, made once; together with the world they belong to, which a later one replaces.
_groups: dict[tuple[int, ...], tuple[Any, Any]] = {}


def process_group(ranks: Sequence[int]) -> Any:
    """The process group of these global ranks: one that `register_group` or `create_group` made known, or the world."""
    world, group = _groups.get(tuple(ranks), (None, None))
    return group if world is dist.group.WORLD and group is not None else dist.group.WORLD


def create_group(ranks: Sequence[int], parts: Sequence[Any], device: torch.device) -> None:
    """Make the process group of these ranks known, a new one if need be. Collective among them.

    parts: process groups that together connect the ranks: the mesh dimensions that they span.
    """
    if sorted(ranks) == list(range(dist.get_world_size())):
        return
    if _groups.get(tuple(ranks), (None, None))[0] is dist.group.WORLD:
        return
    # torch names a group that only its members make by how many groups they have, and waits forever where they have
    # not equally many: give everybody as many as the one with the most.
    names = torch.tensor([len(dist.distributed_c10d._world.pg_names)], device=device)
    most = names.clone()
    for part in parts:
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=part)
    for _ in range(int(most) - int(names)):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    _groups[tuple(ranks)] = (dist.group.WORLD, dist.new_group(sorted(ranks), use_local_synchronization=True))


def register_group(ranks: Sequence[int], group: Any) -> None:
    """Use a group that exists for these ranks (a mesh dimension's), instead of making another communicator."""
    if dist.get_process_group_ranks(group) == sorted(ranks):
        _groups[tuple(ranks)] = (dist.group.WORLD, group)


def check_agreement(ranks: Sequence[int], fingerprint: str, device: torch.device) -> None:
    """Raise ConfigError, on every rank, unless all `ranks` hold the same fingerprint of their plan.

    Ranks that disagree about who owns what would wait for each other forever, or mix up matrices.
    """
    number = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:7], "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=process_group(ranks))
    if extremes.tolist() != [number, -number]:
        raise ConfigError(
            f"the processes {list(ranks)} see different parameters or options of Muon: parameters, their order, their "
            f"'matrices', ns_* options and max_bucket_bytes must be the same on all of them."
        )


class Message:
    """One all-to-all under way: `wait()` gives what arrived, in rank order.

    sends, receives: elements per position of `ranks`. The buffer is packed in `send_order`.
    """

    def __init__(
        self, ranks: Sequence[int], buffer: Tensor, sends: Sequence[int], receives: Sequence[int], position: int
    ) -> None:
        order = send_order(ranks)
        self.arrived = buffer.new_empty(sum(receives))
        self._buffer = buffer  # must live until the transfer has ended
        self._work = dist.all_to_all_single(
            self.arrived,
            buffer,
            [receives[k] for k in order],
            [sends[k] for k in order],
            group=process_group(ranks),
            async_op=True,
        )
        self.bytes_sent = (sum(sends) - sends[position]) * buffer.element_size()

    def wait(self) -> Tensor:
        self._work.wait()
        return self.arrived


def send_order(ranks: Sequence[int]) -> list[int]:
    """Positions of `ranks` in the order of their process group: messages are packed and arrive so."""
    return sorted(range(len(ranks)), key=lambda k: ranks[k])


def ring_bytes(ranks: int, nbytes: int) -> int:
    """What an all-gather or a reduce-scatter of parts of `nbytes` sends from each rank, by a ring."""
    return (ranks - 1) * nbytes


def all_reduce_bytes(ranks: int, nbytes: int) -> int:
    """What an all-reduce of `nbytes` sends from each rank, by a ring."""
    return 2 * (ranks - 1) * nbytes // ranks
