"""What several folders of tests need."""

import math
import traceback
from collections.abc import Callable
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


def varlen_by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn by its documentation, and with its kernel's conditions on what it is given.

    One sequence after the other; a query sees the keys up to its own place counted from the sequence's end.
    """
    assert query.shape[2] == key.shape[2] == value.shape[2] <= 256 and query.shape[2] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (query, key, value)) and window_size == (-1, 0)
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    q_starts, k_starts = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (q_starts[0], q_starts[-1], k_starts[-1]) == (0, len(query), len(key))
    outputs = []
    for q0, q1, k0, k1 in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
        assert 0 < q1 - q0 <= max_q and q1 - q0 <= k1 - k0 <= max_k
        q, k, v = query[q0:q1], *(x[k0:k1].repeat_interleave(groups, 1) for x in (key, value))
        scores = scale * torch.einsum("shc,phc->hsp", q, k)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        outputs.append(torch.einsum("hsp,phc->shc", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """flash(): attention with documents, and of chunks after cached positions, takes "varlen" on the CPU too, by the
    formula. Returns what it was called with, call by call."""
    from torch.nn.attention import varlen

    from earthshine.ops import attention

    def use() -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def varlen_attn(*args: Any, **options: Any) -> Tensor:
            calls.append({"starts": args[3:5], "most": args[5:7], **options})
            return varlen_by_formula(*args, **options)

        choose = attention.choose_backend
        as_on_a_gpu = torch.device("meta")
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        monkeypatch.setattr(
            attention,
            "choose_backend",
            lambda device, dtype, *args, **options: choose(as_on_a_gpu, torch.bfloat16, *args, **options),
        )
        return calls

    return use
