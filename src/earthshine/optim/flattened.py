"""Weights that are not there in their own shape: flattened by a sharding that keeps 1-D pieces, or not made yet.

FullyShardedDataParallel (FSDP1) and DeepSpeed's ZeRO-3 leave a process a run of consecutive elements of many
parameters at once. AdamW does not mind; no matrix can be seen in it.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from earthshine.errors import ConfigError

FLATTENED = (
    "FullyShardedDataParallel (FSDP1) and DeepSpeed's ZeRO-3 flatten matrices, and Muon needs their rows and columns: "
    "shard by torch.distributed.fsdp.fully_shard instead (FSDP2; accelerate's fsdp_version: 2)"
)
# Modules all of whose weights have two or more dimensions.
_OF_MATRICES = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
    nn.RNNBase,
)


def check_shapes(model: nn.Module, parameters: Iterable[tuple[str, nn.Module, str, Tensor]]) -> None:
    """ConfigError for (name, module, local name, parameter) in which the matrix that the module makes cannot be seen.

    Named is a parameter that must have been a matrix; only where none is known to be, one that FSDP1 has marked.
    """
    handles: list[Any] = [getattr(module, "_handle", None) for module in model.modules()]
    # With NO_SHARD parameters keep their shapes, although they are marked.
    sharded = any(getattr(handle, "uses_sharded_strategy", False) is True for handle in handles)
    marked = []
    for name, module, local, p in parameters:
        if is_lazy(p):
            raise ConfigError(
                f"{name} of {type(module).__name__} has no shape yet: run one forward pass, then call param_groups."
            )
        if p.ndim > 1:
            continue
        declare = getattr(module, "logical_matrices", None)
        matrix = isinstance(module, _OF_MATRICES) and "weight" in local
        # ds_shape: ZeRO-3's note of the shape.
        if matrix or (callable(declare) and local in declare()) or len(getattr(p, "ds_shape", ())) > 1:
            raise _flattened(name, module, p)
        if getattr(p, "_is_flat_param", False) or (sharded and getattr(p, "_fsdp_flattened", False)):
            marked.append((name, module, p))
    if marked:
        raise _flattened(*marked[0])


def _flattened(name: str, module: nn.Module, p: Tensor) -> ConfigError:
    return ConfigError(
        f"{name} of {type(module).__name__} has the shape {list(p.shape)}: {FLATTENED}, or give it to AdamW by "
        f"adamw=[{name!r}]."
    )
