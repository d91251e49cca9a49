"""Earthshine: train Mixture-of-Experts language models with Muon, from scratch or upcycled from a dense checkpoint.

Everything here is loaded when it is first used, so `import earthshine` is instant.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import earthshine.upcycle as _upcycle_package

if TYPE_CHECKING:
    from earthshine.checkpoint.load import load_model
    from earthshine.model.config import ModelConfig
    from earthshine.optim.groups import describe, param_groups
    from earthshine.optim.muon import Muon
    from earthshine.train.job import TrainJob
    from earthshine.train.loop import fit
    from earthshine.upcycle.config import UpcycleConfig

__version__ = "0.1.0"

_WHERE = {
    "ModelConfig": "earthshine.model.config",
    "Muon": "earthshine.optim.muon",
    "TrainJob": "earthshine.train.job",
    "UpcycleConfig": "earthshine.upcycle.config",
    "describe": "earthshine.optim.groups",
    "fit": "earthshine.train.loop",
    "load_model": "earthshine.checkpoint.load",
    "param_groups": "earthshine.optim.groups",
}

__all__ = [  # upcycle is the package, made callable below
    "ModelConfig", "Muon", "TrainJob", "UpcycleConfig", "describe", "fit", "load_model", "param_groups", "upcycle",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'earthshine' has no attribute '{name}'")


class _CallablePackage(ModuleType):
    """`earthshine.upcycle` is a package, and also the function of its command, `upcycle.convert.upcycle`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from earthshine.upcycle.convert import upcycle

        return upcycle(*args, **kwargs)


sys.modules[_upcycle_package.__name__].__class__ = _CallablePackage
