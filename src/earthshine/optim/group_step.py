"""What every algorithm does for a parameter group: `MuonStep`, `ScionStep` and `AdamWStep`.

It is made with the optimizer, from a checked group: the local shards, and what follows from their layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from earthshine.device import at_least_float32_dtype
from earthshine.errors import ConfigError
from earthshine.optim.logical_matrices import Spec
from earthshine.optim.measure import Measure
from earthshine.optim.options import PER_PARAMETER, STATIC, name_of, settable_options
from earthshine.optim.rounding import NARROW, Noise, elements
from earthshine.optim.sharding import traffic
from earthshine.optim.sharding.local_shards import LocalShards
from earthshine.optim.sharding.zero1 import Zero1Shards


@dataclass
class StepNumbers:
    """What one step of a group did on this rank.

    measure: computed when called, before the next step. sent: bytes by purpose. flops, seconds: of Newton-Schulz;
    calling `seconds` waits for the device. imbalance: the most loaded rank's Newton-Schulz over the mean.
    """

    algorithm: str
    measure: Callable[[], Measure]
    sent: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    seconds: Callable[[], float] = float
    imbalance: float = 1.0


class GroupStep(ABC):
    """One algorithm on the local shards of one group. Making it is collective where they are spread over processes.

    options: the group's as last checked; a loop may set them. per_parameter: its entries with a value per parameter.
    state_keys: the kinds of state that each parameter has; those in `per_row` hold one value per row.
    """

    algorithm: ClassVar[str]
    per_row: ClassVar[tuple[str, ...]] = ()

    def __init__(self, group: Mapping[str, Any], process_group: Any, reduce_gradients: bool, bucket_bytes: int) -> None:
        self.group, self.params = group, list(group["params"])
        self.options = settable_options(group)
        self.per_parameter = {key: copy(group.get(key)) for key in PER_PARAMETER}
        self._static = {key: group.get(key) for key in ("algorithm", *STATIC)}
        self._seen = [_traits(p) for p in self.params]
        names = [name_of(group, i) for i in range(len(self.params))]
        self.shards = (
            LocalShards(self.params, self._specs(), names)
            if process_group is None
            else Zero1Shards(self.params, self._specs(), names, process_group, reduce_gradients, bucket_bytes)
        )
        self._stochastic = group["rounding"] == "stochastic"
        self.state_keys = self._state_keys()
        narrow = [i for i, p in enumerate(self.params) if self._stochastic and p.dtype in NARROW]
        self._elements: dict[int, Noise] = {}
        for i in narrow:
            layout = self.shards.layout(i)
            rows, cols = layout.rows[layout.position], layout.cols[layout.position]
            self._elements[i] = elements(rows, cols, layout.view[1], self.params[i].device)

    def _specs(self) -> list[Spec]:
        """How each parameter divides into matrices; () where the algorithm does not ask."""
        return [()] * len(self.params)

    @abstractmethod
    def _state_keys(self) -> tuple[str, ...]: ...

    @abstractmethod
    def step(
        self, options: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> StepNumbers:
        """Update the local shards that have a gradient.

        options: the group's, lr a float. states, grads: by the parameter's index in the group; a gradient is its local
        shard.
        """

    def new_state(self, i: int, key: str) -> Tensor:
        """Zeros, for parameter i, where the parameter is; at least fp32 unless the momentum is asked for in bf16.

        "step" is a count, on the CPU.
        """
        if key == "step":
            return torch.zeros((), dtype=torch.float32)
        dtype = at_least_float32_dtype(self.params[i].dtype)
        if key == "momentum_sum" and self.group["momentum_dtype"] == "bfloat16":
            dtype = torch.bfloat16
        per_row = key in self.per_row
        return self.shards.new_state(i, torch.float32 if per_row else dtype, per_row=per_row)

    def state_shape(self, i: int, key: str) -> tuple[int, ...]:
        """The shape of a kind of state as a checkpoint has it."""
        return () if key == "step" else self.shards.state_shape(i, key in self.per_row)

    def to_dtensor(self, states: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The state of each parameter as a checkpoint holds it. Collective with a process group."""
        return self._moved(self.shards.to_dtensor, states)

    def from_dtensor(self, saved: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The reverse of `to_dtensor`: this process's local shards."""
        return self._moved(self.shards.from_dtensor, saved)

    def _moved(
        self,
        move: Callable[[Mapping[int, Tensor], bool], Mapping[int, Tensor]],
        states: Sequence[Mapping[str, Tensor]],
    ) -> list[dict[str, Tensor]]:
        moved = [dict(state) for state in states]
        for key in self.state_keys:
            if key != "step":
                for i, tensor in move({i: s[key] for i, s in enumerate(states)}, key in self.per_row).items():
                    moved[i][key] = tensor
        return moved

    def saved_zeros(self, i: int, key: str, state: Tensor) -> Tensor:
        """Zeros as a checkpoint would hold them, for a kind of state of parameter i."""
        return torch.zeros_like(state) if key == "step" else self.shards.saved_zeros(i, state, key in self.per_row)

    def predicted_bytes(self) -> dict[str, int]:
        """Bytes that a step sends from this rank to others, by purpose."""
        return traffic.of_shards(self.shards)

    def is_current(self) -> bool:
        """Whether the group's parameters are those that this was made for, where and as they were.

        Raises ConfigError for an option that plan or state were made by, and that was changed since.
        """
        group = self.group
        params = group["params"]
        same = len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True))
        listed = {key: self.per_parameter[key] for key in ("matrices", "lmo")} if same else {}
        for key, value in (self._static | listed).items():
            if group.get(key) != value:
                raise ConfigError(
                    f"{key} of a parameter group was changed from {value!r} to {group.get(key)!r} after construction; "
                    f"plan and state were made for the former: set it when the optimizer is made."
                )
        return same and all(_traits(p) == seen for p, seen in zip(params, self._seen, strict=True))

    def _noises(self, states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]) -> dict[int, Noise]:
        """The random bits of this step's rounding, by the step counts of the state."""
        seed, names = self.group["rounding_seed"], self.shards.names
        return {i: self._elements[i].at(seed, names[i], int(states[i]["step"])) for i in grads if i in self._elements}

    def _count_step(self, states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]) -> None:
        """Count a step of what has a gradient, for stochastic rounding, where the algorithm itself counts none."""
        for i in grads if self._stochastic else ():
            states[i]["step"].add_(1)


def _traits(p: Any) -> tuple[Any, ...]:
    """What a plan reads of a tensor: other traits, another plan."""
    return p.device, p.dtype, p.shape, getattr(p, "placements", None), getattr(p, "device_mesh", None)


def state_fits(state: Any, fresh: Any) -> bool:
    """Whether a tensor of state may stand for one that was made for the parameter as it is now."""
    return _traits(state) == _traits(fresh)
