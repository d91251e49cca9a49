"""What an optimizer costs, by its options and the parameters' shapes alone: who trains what, bytes of state, and the
FLOPs of Newton-Schulz. No torch.

Plan, dry run, report and model card ask here; a test holds it, for every option, to the optimizer that is built.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from earthshine.ops.newton_schulz_tables import (
    Coefficients,
    Form,
    cheaper_form,
    coefficient_steps,
    gram_restarts,
    newton_schulz_flops,
)
from earthshine.optim.config import OptimizerConfig

Algorithm = Literal["muon", "adamw", "scion"]
# The largest relative rounding of each dtype of Newton-Schulz. "auto" is decided where it runs; a plan takes fp32.
_EPSILON = {"auto": 2.0**-23, "float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_FP32_BYTES = 4


class Parameter(Protocol):
    """A parameter as `count` matrices of rows x columns; see `model.parameters.ParameterShape`."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def elements(self) -> int: ...
    @property
    def for_muon(self) -> bool:
        """Whether it is a matrix of a hidden layer, with more than one row and column."""

    @property
    def is_router(self) -> bool: ...
    @property
    def head_rows(self) -> tuple[int, ...]:
        """Rows of each attention head's matrices, in order; () where it is not divided by heads."""


@dataclass
class Cost:
    """Of all parameters that one algorithm trains. state_bytes: without AdamW's step counts, 4 bytes per parameter."""

    elements: int = 0
    state_bytes: int = 0
    newton_schulz_flops: float = 0.0


def algorithm_of(parameter: Parameter, config: OptimizerConfig) -> Algorithm:
    """Who trains it, as `optim.groups` divides our models."""
    if config.algorithm == "adamw" or (parameter.is_router and config.router == "adamw"):
        return "adamw"
    return "muon" if parameter.for_muon else config.non_matrix


def cost(config: OptimizerConfig, parameters: Iterable[Parameter]) -> dict[Algorithm, Cost]:
    """The cost of each algorithm, of one process that holds everything, with fp32 parameters. ZeRO-1 divides the bytes
    of state over its ranks, as evenly as whole rows allow.

    Halves of symmetric matmuls that a CPU leaves out are counted; the SVD of norm="schatten" is not.
    """
    costs: dict[Algorithm, Cost] = {"muon": Cost(), "adamw": Cost(), "scion": Cost()}
    for parameter in parameters:
        algorithm = algorithm_of(parameter, config)
        total = costs[algorithm]
        total.elements += parameter.elements
        total.state_bytes += _state_bytes(algorithm, parameter, config)
        if algorithm == "muon" and config.norm == "spectral":
            total.newton_schulz_flops += parameter.count * _orthogonalizing(parameter, config)
    return costs


def _state_bytes(algorithm: Algorithm, parameter: Parameter, config: OptimizerConfig) -> int:
    if algorithm == "adamw":
        return 2 * _FP32_BYTES * parameter.elements
    momentum = (2 if config.momentum_dtype == "bfloat16" else _FP32_BYTES) * parameter.elements
    rows = parameter.count * parameter.rows if algorithm == "muon" and config.normuon_beta2 else 0
    return momentum + _FP32_BYTES * rows


def _orthogonalizing(parameter: Parameter, config: OptimizerConfig) -> float:
    """FLOPs for one of the parameter's matrices, which heads="split" divides once more."""
    table = coefficient_steps(config.ns_table or config.ns_coefficients, config.newton_schulz_steps)
    epsilon = _EPSILON[config.ns_dtype]
    pieces = parameter.head_rows if config.heads == "split" and parameter.head_rows else (parameter.rows,)
    return float(sum(_flops(rows, parameter.columns, table, epsilon, config.ns_form) for rows in pieces))


@functools.lru_cache(maxsize=1024)
def _flops(rows: int, columns: int, table: Coefficients, epsilon: float, form: Form) -> int:
    restarts = len(gram_restarts(table, epsilon))
    gram = newton_schulz_flops(rows, columns, len(table), "gram", restarts=restarts)
    standard = newton_schulz_flops(rows, columns, len(table))
    if form == "auto":
        form = cheaper_form(rows, columns, gram, standard, below_fp32=epsilon > _EPSILON["float32"])
    return gram if form == "gram" else standard
