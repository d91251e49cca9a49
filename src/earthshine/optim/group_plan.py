"""What is derived from one parameter group: its local shards, and its algorithm's static plan and step."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.adamw import step_adamw
from earthshine.optim.measure import Measure
from earthshine.optim.muon_step import step_matrices
from earthshine.optim.options import STATIC, initial_options, name_of
from earthshine.optim.rounding import NARROW, Noise, elements
from earthshine.optim.scion import ScionPlan, step_scion
from earthshine.optim.sharding.batches import MatrixPlan
from earthshine.optim.sharding.local_shards import LocalShards

# Entries with a value per parameter: they follow the list of parameters.
_PER_PARAMETER = ("param_names", "matrices", "lmo")


@dataclass
class GroupStep:
    """What one step of a group did on this rank.

    measure: computed when called, before the next step. seconds: the time of Newton-Schulz; calling it waits for the
    device. sent: bytes by purpose.
    """

    algorithm: str
    measure: Callable[[], Measure]
    sent: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    seconds: Callable[[], float] = float
    imbalance: float = 1.0


class GroupPlan:
    """The plan of a checked group. Collective where its parameters are spread over processes."""

    def __init__(self, group: Mapping[str, Any], process_group: Any, bucket_bytes: int) -> None:
        params = group["params"]
        self.group, self.params = group, list(params)
        self.algorithm: str = group["algorithm"]
        names = [name_of(group, i) for i in range(len(params))]
        specs = group["matrices"] if self.algorithm == "muon" else ((),) * len(params)
        self._planned = {key: group.get(key) for key in ("algorithm", *STATIC)}
        self.options = initial_options(group)  # as last checked: a loop may set them
        self.per_parameter = {key: copy(group.get(key)) for key in _PER_PARAMETER}
        self._were = [_traits(p) for p in params]
        self.shards = LocalShards(params, specs, names, process_group, bucket_bytes)
        self._matrices = MatrixPlan(group, self.shards, bucket_bytes) if self.algorithm == "muon" else None
        self._scion = ScionPlan(group, self.shards) if self.algorithm == "scion" else None
        narrow = [i for i, p in enumerate(params) if p.dtype in NARROW and group["rounding"] == "stochastic"]
        self._elements = {i: elements(self.shards.layout(i), params[i].device) for i in narrow}

    def step(
        self, group: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> GroupStep:
        """Update the local shards that have a gradient. states, grads: by the parameter's index in the group."""
        noises = self._noises(group, states, grads)
        if self._matrices is not None:
            done = step_matrices(self._matrices, group, states, grads, noises)
            return GroupStep(
                self.algorithm,
                done.measure,
                {"orthogonalize": done.bytes_sent},
                done.flops,
                lambda: done.stopwatch.seconds,
                self._matrices.imbalance,
            )
        if self._scion is not None:
            measured, sent = step_scion(self._scion, group, states, grads, noises)
            return GroupStep(self.algorithm, lambda: measured, {"norms": sent})
        return GroupStep(self.algorithm, step_adamw(self.shards, group, states, grads, noises))

    def _noises(
        self, group: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> dict[int, Noise]:
        """The random bits of this step's rounding; counts the steps that AdamW does not count itself."""
        found = {}
        for i in grads if group["rounding"] == "stochastic" else ():
            step = states[i]["step"]
            if i in self._elements:
                found[i] = self._elements[i].at(group["rounding_seed"], self.shards.names[i], int(step))
            if self.algorithm != "adamw":
                step += 1
        return found

    def is_current(self) -> bool:
        """Whether the group's parameters are those that the plan was made for, where and as they were.

        Raises ConfigError for an option that plan or state were made by, and that was changed since.
        """
        group = self.group
        params = group["params"]
        same = len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True))
        listed = {key: self.per_parameter[key] for key in ("matrices", "lmo")} if same else {}
        for key, value in (self._planned | listed).items():
            if group.get(key) != value:
                raise ConfigError(
                    f"{key} of a parameter group was changed from {value!r} to {group.get(key)!r} after construction; "
                    f"plan and state were made for the former: set it when the optimizer is made."
                )
        return same and all(_traits(p) == were for p, were in zip(params, self._were, strict=True))

    def new_state(self, i: int, key: str, group: Mapping[str, Any]) -> Tensor:
        """Zeros, for parameter i, where the parameter is; at least fp32 unless the momentum is asked for in bf16."""
        if key == "step":
            return torch.zeros((), dtype=torch.float32)
        dtype = torch.promote_types(self.shards.params[i].dtype, torch.float32)
        if key == "momentum_sum" and group["momentum_dtype"] == "bfloat16":
            dtype = torch.bfloat16
        per_row = key == "row_second_moment"
        return self.shards.new_state(i, torch.float32 if per_row else dtype, per_row=per_row)

    def whole_shape(self, i: int, key: str) -> tuple[int, ...]:
        """The shape of a kind of state as a checkpoint has it."""
        return () if key == "step" else self.shards.state_shape(i, key == "row_second_moment")

    def predicted_bytes(self, reduce: bool) -> dict[str, int]:
        """Bytes that a step sends from this rank, by purpose."""
        found = self.shards.predicted_bytes(reduce)
        if self._matrices is not None:
            found["orthogonalize"] = self._matrices.predicted_bytes()
        if self._scion is not None:
            found["norms"] = self._scion.predicted_bytes()
        return found


def _traits(p: Any) -> tuple[Any, ...]:
    """What a plan reads of a tensor: other traits, another plan."""
    return p.device, p.dtype, p.shape, getattr(p, "placements", None), getattr(p, "device_mesh", None)


def alike(a: Any, b: Any) -> bool:
    """Whether one tensor of state may stand for another."""
    return _traits(a) == _traits(b)
