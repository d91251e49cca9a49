"""Counts what collectives send, below the Python functions that start them: independent of what Muon counts."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# name of the operation -> bytes that leave rank k of n, by the algorithms with the least traffic (ring)
_RING = {
    "_allgather_base_": lambda output, source, n: (n - 1) * _bytes(source),
    "_reduce_scatter_base_": lambda output, source, n: _bytes(source) * (n - 1) // n,
}


class Traffic(TorchDispatchMode):
    """Bytes that left this process while active, by operation of torch's `c10d` library, and how many there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.rpartition(":")[2]
            self.sent[name] = self.sent.get(name, 0) + self._count(name, *args)
            self.calls[name] = self.calls.get(name, 0) + 1
        elif func.namespace == "_c10d_functional" and "wait" not in func._schema.name:
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _count(name: str, output: Any, source: Any, *rest: Any) -> int:
        if name == "alltoall_base_":
            group = dist.ProcessGroup.unbox(rest[0])
            splits = rest[2] or [source.shape[0] // group.size()] * group.size()
            row = _bytes(source) // max(1, source.shape[0])
            return sum(n for rank, n in enumerate(splits) if rank != group.rank()) * row
        if name in _RING:
            return _RING[name](output, source, dist.ProcessGroup.unbox(rest[0]).size())
        if name == "allreduce_":
            n = dist.ProcessGroup.unbox(source).size()
            return sum(2 * _bytes(t) * (n - 1) // n for t in output)
        raise AssertionError(f"c10d::{name} is not counted")


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def check_counts() -> dict[str, int]:
    """A task: the counts of one collective of each kind, 12 fp32 elements a rank."""
    n = dist.get_world_size()
    x = torch.zeros(12)
    with Traffic() as traffic:
        dist.all_to_all_single(x.new_empty(12), x)
        splits = [3] * n
        dist.all_to_all_single(x.new_empty(12), x, splits, splits, async_op=True).wait()
        dist.all_gather_single(x.new_empty(12 * n), x)
        dist.reduce_scatter_single(x.new_empty(12 // n), x)
        dist.all_reduce(x)
    return traffic.sent
