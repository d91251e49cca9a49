"""What is derived from one parameter group: the shares of its parameters, and its algorithm's static plan and step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from earthshine.optim.adamw import step_adamw
from earthshine.optim.matrix_plan import MatrixPlan
from earthshine.optim.matrix_step import step_matrices
from earthshine.optim.options import name_of
from earthshine.optim.scion import ScionPlan, step_scion
from earthshine.optim.shares import Shares


@dataclass
class GroupStep:
    """What one step of a group did on this rank.

    squares, seconds: computed when called, which waits for the device: the sum of squares of the update's elements,
    before the learning rate, and the time of Newton-Schulz. sent: bytes by purpose.
    """

    algorithm: str
    elements: int
    squares: Callable[[], float]
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
                done.elements,
                done.squares,
                {"orthogonalize": done.bytes_sent},
                self._matrices.flops,
                lambda: done.stopwatch.seconds,
                self._matrices.imbalance,
            )
        if self._scion is not None:
            total, elements, sent = step_scion(self._scion, group, states, grads)
            return GroupStep(self.algorithm, elements, lambda: float(total), {"norms": sent})
        elements, squares = step_adamw(self.shares, group, states, grads)
        return GroupStep(self.algorithm, elements, squares)

    def new_state(self, i: int, key: str, group: Mapping[str, Any]) -> Tensor:
        """Zeros, for parameter i, where the parameter is."""
        p = self.shares.params[i]
        if key == "step":
            return torch.zeros((), dtype=torch.float32)
        wide = torch.promote_types(p.dtype, torch.float32)
        if key == "momentum_sum":
            return self.shares.new_state(i, torch.bfloat16 if group["momentum_dtype"] == "bfloat16" else wide)
        if key == "row_second_moment":
            return self.shares.new_state(i, torch.float32, per_row=True)
        return self.shares.new_state(i, p.dtype)

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
