"""What is derived from one parameter group: the shares of its parameters, and its algorithm's static plan and step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.adamw import step_adamw
from earthshine.optim.matrix_plan import MatrixPlan
from earthshine.optim.matrix_step import step_matrices
from earthshine.optim.measure import Measure
from earthshine.optim.options import name_of
from earthshine.optim.scion import ScionPlan, step_scion
from earthshine.optim.shares import Shares

# Options that plan and state are made by; the others may change from step to step, as a scheduler's.
_STATIC = (
    "algorithm",
    "ns_coefficients",
    "ns_steps",
    "ns_dtype",
    "ns_form",
    "momentum_dtype",
    "normuon_beta2",
    "skip_idle",
    "payload_dtype",
    "matrices",
    "lmo",
)


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
        self.algorithm: str = group["algorithm"]
        names = [name_of(group, i) for i in range(len(params))]
        specs = group["matrices"] if self.algorithm == "muon" else ((),) * len(params)
        self._static = {key: group.get(key) for key in _STATIC}
        self._were = [(p, (p.device, p.dtype)) for p in params]
        self.shares = Shares(params, specs, names, process_group, bucket_bytes)
        self._matrices = MatrixPlan(group, self.shares, bucket_bytes) if self.algorithm == "muon" else None
        self._scion = ScionPlan(group, self.shares) if self.algorithm == "scion" else None

    def step(
        self, group: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> GroupStep:
        """Update the shares that have a gradient. states, grads: by the parameter's index in the group."""
        if self._matrices is not None:
            done = step_matrices(self._matrices, group, states, grads)
            return GroupStep(
                self.algorithm,
                done.measure,
                {"orthogonalize": done.bytes_sent},
                done.flops,
                lambda: done.stopwatch.seconds,
                self._matrices.imbalance,
            )
        if self._scion is not None:
            measured, sent = step_scion(self._scion, group, states, grads)
            return GroupStep(self.algorithm, lambda: measured, {"norms": sent})
        return GroupStep(self.algorithm, step_adamw(self.shares, group, states, grads))

    def holds(self, group: Mapping[str, Any]) -> bool:
        """Whether these are the parameters that the plan was made for, where they were and of the type they had."""
        params = group["params"]
        for key, value in self._static.items():
            if group.get(key) != value:
                raise ConfigError(
                    f"{key} of a parameter group was changed from {value!r} to {group.get(key)!r} after construction; "
                    f"plan and state were made for the former: set it when the optimizer is made."
                )
        return len(params) == len(self._were) and all(
            p is old and (p.device, p.dtype) == where for p, (old, where) in zip(params, self._were, strict=True)
        )

    def new_state(self, i: int, key: str, group: Mapping[str, Any]) -> Tensor:
        """Zeros, for parameter i, where the parameter is."""
        if key == "step":
            return torch.zeros((), dtype=torch.float32)
        return self.shares.new_state(i, self._type(i, key, group), per_row=key == "row_second_moment")

    def fits(self, i: int, key: str, state: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether state is where parameter i is, and of the type that it should have."""
        where = self.shares.params[i].device
        return key == "step" or (state.device == where and state.dtype == self._type(i, key, group))

    def _type(self, i: int, key: str, group: Mapping[str, Any]) -> torch.dtype:
        own = self.shares.params[i].dtype
        if key == "momentum_sum":
            narrow = group["momentum_dtype"] == "bfloat16"
            return torch.bfloat16 if narrow else torch.promote_types(own, torch.float32)
        return torch.float32 if key == "row_second_moment" else own

    def whole_shape(self, i: int, key: str) -> tuple[int, ...]:
        """The shape of a kind of state as a checkpoint has it."""
        return () if key == "step" else self.shares.state_shape(i, key == "row_second_moment")

    def predicted_bytes(self, reduce: bool) -> dict[str, int]:
        """Bytes that a step sends from this rank, by purpose."""
        found = self.shares.predicted_bytes(reduce)
        if self._matrices is not None:
            found["orthogonalize"] = self._matrices.predicted_bytes()
        if self._scion is not None:
            found["norms"] = self._scion.predicted_bytes()
        return found
