"""What several folders of tests need."""

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten
# Their result, or its shape, is only known when the device has computed it.
_NEED_VALUES = {
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.masked_select,
    _aten.equal,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.bincount,
    _aten.repeat_interleave,
}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """What would make the host wait for a device, for which the meta device stands.

    transfers: copies from the device to the host; what arrives is ones. uploads: copies to the device that are not
    asynchronous. Anything else that needs a value of the device raises AssertionError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transfers = 0
        self.uploads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors):
            masks = packet in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
            assert packet not in _NEED_VALUES and not masks, f"{func} waits for the device"
        onto = kwargs.get("device")
        if packet is _aten._to_copy and args[0].is_meta and onto == torch.device("cpu"):
            self.transfers += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet is _aten.copy_ and args[1].is_meta and not args[0].is_meta:
            self.transfers += 1
            return args[0].fill_(1)
        to_device = packet is _aten._to_copy and not args[0].is_meta and onto == torch.device("meta")
        into_device = packet is _aten.copy_ and args[0].is_meta and not args[1].is_meta
        if (to_device or into_device) and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.uploads.append("".join(traceback.format_stack(limit=8)))
        return func(*args, **kwargs)


@pytest.fixture
def waits() -> Waits:
    return Waits()
