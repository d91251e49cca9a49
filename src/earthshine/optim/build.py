"""The optimizer of a job's config, for any module."""

from typing import Any

from torch import nn

from earthshine.optim.config import OptimizerConfig
from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon


def configured_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameter groups of a config; freezes the parameters that `config.freeze` names."""
    return param_groups(
        model,
        algorithm=config.algorithm,
        non_matrix=config.non_matrix,
        router=config.router,
        heads=config.heads,
        freeze=config.freeze,
    )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Muon:
    """The optimizer of a config; freezes as `configured_groups` does."""
    return Muon(configured_groups(model, config), **config.as_group())
