"""`TrainingOptions`, what a model has to know of its training: how its experts are balanced, how many tokens an expert
takes, and whether blocks are recomputed in the backward pass. No torch import.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from earthshine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps experts evenly loaded while training. `ops.routing` has each formula.

    loss: "sequence" is DeepSeek-V3's loss of every sequence by itself, additive over micro-batches and ranks;
        "switch" the Switch Transformer's; "none" for neither. Both are 1 per layer at uniform routing.
    coefficient: of that loss, averaged over the step's sequences and summed over the layers.
    scope: what the Switch loss takes its expert fractions over: each sequence, each micro-batch (the gradient then
        depends on the size of the micro-batches), or the whole step (one more routing pass, without gradient). It must
        be chosen with loss="switch" and is "none" otherwise.
    z_coefficient: of the router z-loss, averaged over the step's tokens and summed over the layers (ST-MoE,
        arXiv:2202.08906).
    bias: how the bias of a "sigmoid_bias" gate moves after each step, by `bias_rate`: "deepseek" by the sign of the
        load's deficit, "moonlight" by that sign less its mean; "none" not at all.
    Raises ConfigError where the fields contradict each other.
    """

    loss: Literal["none", "sequence", "switch"] = "sequence"
    coefficient: float = 1e-3
    scope: Literal["none", "sequence", "micro_batch", "step"] = "none"
    z_coefficient: float = 0.0
    bias: Literal["none", "moonlight", "deepseek"] = "moonlight"
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("coefficient", "z_coefficient", "bias_rate"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"balance.{name}={getattr(self, name)} must be a number that is not negative.")
        if self.loss == "switch" and self.scope == "none":
            raise ConfigError(
                "balance.loss='switch' needs balance.scope: 'sequence', 'micro_batch' or 'step'. The loss is a product "
                "of two averages, so its gradient depends on what they are taken over."
            )
        if self.loss != "switch" and self.scope != "none":
            raise ConfigError(f"balance.scope={self.scope!r} is for balance.loss='switch', not {self.loss!r}.")
        if self.loss == "none" and self.coefficient != BalanceConfig.coefficient:
            raise ConfigError(
                f"balance.coefficient={self.coefficient} has no effect with balance.loss='none': choose one."
            )
        if self.bias == "none" and self.bias_rate != BalanceConfig.bias_rate:
            raise ConfigError(f"balance.bias_rate={self.bias_rate} has no effect with balance.bias='none': choose one.")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """How many tokens of a micro-batch an expert takes while training; evaluation and exported models drop nothing.

    factor: 0 for no limit. Else, for T tokens, E experts and k experts per token, an expert takes at most
        ceil(T * k / E * factor) or ceil(T / E * factor), by `relative_to`.
    relative_to: the mean number of choices per expert ("per_assignment", as in Megatron), or of tokens ("per_token", as
        printed in arXiv:2412.09952).
    exact_factor: numerator and denominator of `factor` as it was written, in decimal: 1.1 is exactly 11/10.
    drop: which choices an overfull expert keeps: those with the largest gate weight ("probability"), or those of the
        first tokens ("position").
    """

    factor: float = 0.0
    relative_to: Literal["per_assignment", "per_token"] = field(default="per_assignment", metadata={"was": "meaning"})
    drop: Literal["probability", "position"] = "probability"
    # Integers made here, because torch.compile traces their use and could not trace how they are made.
    exact_factor: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.factor >= 0 and math.isfinite(self.factor)):
            raise ConfigError(f"capacity.factor={self.factor} must be 0 (dropless) or a positive number.")
        object.__setattr__(self, "exact_factor", Fraction(str(float(self.factor))).as_integer_ratio())
        unset = (CapacityConfig.relative_to, CapacityConfig.drop)
        if self.factor == 0 and (self.relative_to, self.drop) != unset:
            raise ConfigError(
                f"capacity.relative_to={self.relative_to!r} and capacity.drop={self.drop!r} have no effect with "
                f"capacity.factor=0, which drops nothing: set the factor, or leave these out."
            )

    def tokens_per_expert(self, num_tokens: int, num_experts: int, top_k: int) -> int:
        """How many tokens an expert takes: at most `num_tokens`, as no token chooses it twice; 0 when dropless.

        Exact: in floats, 200 * 1.1 / 4 is a little more than 55, and would be rounded up to 56.
        """
        if self.factor == 0:
            return 0
        rows = num_tokens * (top_k if self.relative_to == "per_assignment" else 1)
        numerator, denominator = self.exact_factor
        return min(num_tokens, max(1, -(-rows * numerator // (denominator * num_experts))))

    def can_drop(self, num_experts: int, top_k: int) -> bool:
        """Whether any routing could exceed the capacity (but for rounding up)."""
        numerator, denominator = self.exact_factor
        return 0 < numerator * (top_k if self.relative_to == "per_assignment" else 1) < denominator * num_experts


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a model has to know of its training; none of it changes what it computes in evaluation.

    recompute: activation checkpointing: keep each block's input only, and run the block again in the backward pass.
    """

    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    recompute: bool = False
