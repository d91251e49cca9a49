"""Which kernel attends where, what it is given, and that each gives what the formula gives."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.ops import attention
from earthshine.ops.attention import causal_attention, choose_backend, document_starts, make_mask

CPU, META = torch.device("cpu"), torch.device("meta")  # meta stands for a current accelerator
S, BF16 = 8192, torch.bfloat16


def inputs(B: int, H: int, G: int, S: int, P: int, C: int, V: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, H, S, C), (B, G, P, C), (B, G, P, V))
    return [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = 0.3 * q @ k.mT
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.device]:
    def use(*capability: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return torch.device("cuda")

    return use


@pytest.mark.parametrize(
    "capability, dtype, widths, backend",
    [
        ((9, 0), BF16, (128, 128), "varlen"),  # Llama-3-8B
        ((8, 0), BF16, (64, 64), "varlen"),
        ((8, 9), torch.float16, (128, 128), "varlen"),
        ((12, 0), BF16, (192, 128), "varlen"),  # Moonlight
        ((9, 0), BF16, (256, 256), "varlen"),
        ((10, 3), BF16, (256, 256), "varlen"),
        ((8, 9), BF16, (256, 256), "sdpa"),  # no backward pass of that width
        ((12, 0), BF16, (256, 256), "sdpa"),
        ((9, 0), BF16, (576, 512), "sdpa"),
        ((9, 0), torch.float32, (128, 128), "sdpa"),
        ((7, 5), BF16, (128, 128), "sdpa"),
    ],
)
def test_the_kernel_for_documents_by_device_dtype_and_widths(
    gpu: Callable[..., torch.device], capability: tuple[int, int], dtype: torch.dtype, widths: Any, backend: str
) -> None:
    device = gpu(*capability)
    assert choose_backend(device, dtype, widths, S, S, documents=True)[0] == backend
    assert choose_backend(device, dtype, widths, 64, S, documents=False)[0] == backend  # a chunk after cached positions
    assert choose_backend(device, dtype, widths, S, S, documents=False)[0] == "sdpa"
    assert choose_backend(device, dtype, widths, 1, S, documents=False)[0] == "sdpa"


@pytest.mark.parametrize(
    "widths, queries, keys, backend",
    [((64, 64), 512, 512, "blocks"), ((64, 64), 2048, 2048, "sdpa"), ((24, 16), 2048, 2048, "blocks")]
    + [((64, 64), 8, 512, "sdpa")],
)
def test_the_kernel_on_a_cpu_is_what_measured_fastest(widths: Any, queries: int, keys: int, backend: str) -> None:
    for dtype in (torch.float32, BF16):
        assert choose_backend(CPU, dtype, widths, queries, keys, documents=False)[0] == backend


DOCUMENTS = {
    "several": [[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "on into the next row": [[0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 2]],
    "one": [[0] * 9, [0] * 9],
    "one each": [list(range(9)), list(range(9))],
    "numbers that fall": [[7, 7, 3, 3, 3, 3, 0, 0, 0], [2] * 9],
}
HEADS = {"grouped": (4, 2, 8, 8), "one key": (3, 1, 6, 6), "latent": (2, 2, 12, 8), "wider values": (2, 2, 4, 10)}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_varlen_gives_the_values_and_gradients_of_the_formula(
    flash: Callable[[], list[Any]], documents: list[list[int]], heads: tuple[int, int, int, int]
) -> None:
    H, G, C, V = heads
    documents_BS = torch.tensor(documents, dtype=torch.int32)
    q, k, v = inputs(2, H, G, 9, 9, C, V)
    wanted = formula(q, k, v, documents_BS)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    calls = flash()
    out = causal_attention(q, k, v, documents_BS, scale=0.3)
    assert len(calls) == 1
    for got, want in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("documents", [None, *DOCUMENTS.values()], ids=["position alone", *DOCUMENTS])
def test_what_the_memory_efficient_kernel_gets_gives_the_formula(
    documents: list[list[int]] | None, heads: tuple[int, int, int, int]
) -> None:
    """On an accelerator without flash attention: a key for each query's head, and what is hidden at -inf."""
    H, G, C, V = heads
    q, k, v = inputs(2, H, G, 9, 9, C, V)
    documents_BS = None if documents is None else torch.tensor(documents)
    wanted = formula(q, k, v, documents_BS)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(wanted, (q, k, v), grad)
    fused = attention._for_fused_kernels(q, k, v, grouped=False)
    assert [x.shape[1] for x in fused] == [H] * 3 and all(x.shape[3] % 8 == 0 for x in fused)
    visible = make_mask(CPU, q.dtype, shape=(2, 9, 9), widths=(C, V), documents_BS=documents_BS, backend="sdpa").visible
    bias = None if visible is None else torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -math.inf)
    out = F.scaled_dot_product_attention(*fused, attn_mask=bias, is_causal=bias is None, scale=0.3)[..., :V]
    for got, want in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("queries, keys", [(16, 16), (4, 16), (1, 16)])
@pytest.mark.parametrize("heads", [(8, 2, 16, 16), (4, 4, 24, 16), (6, 2, 300, 300), (6, 3, 12, 12)])
def test_no_accelerator_is_left_with_the_math_kernel(
    monkeypatch: pytest.MonkeyPatch, documents: bool, dtype: torch.dtype, queries: int, keys: int, heads: Any
) -> None:
    """SDPA takes it for grouped heads with a mask, or where flash attention cannot run; and for odd widths."""
    if documents and queries != keys:
        return
    H, G, C, V = heads
    given: list[Any] = []

    def sdpa(q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool, attn_mask: Tensor | None, **_: Any) -> Tensor:
        given.append((q, k, v, enable_gqa, attn_mask))
        return q.new_empty(*q.shape[:3], v.shape[3])

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    q, k, v = (
        torch.empty(2, h, n, w, dtype=dtype, device=META) for h, n, w in ((H, queries, C), (G, keys, C), (G, keys, V))
    )
    documents_BS = torch.zeros(2, keys, dtype=torch.int32) if documents else None
    assert causal_attention(q, k, v, documents_BS).shape == (2, H, queries, V)
    if not given:  # flash attention of variable length
        assert dtype == BF16 and max(C, V) <= 256 and (documents or 1 < queries < keys)
        return
    ((q, k, v, enable_gqa, bias),) = given
    assert all(x.shape[3] % 8 == 0 for x in (q, k, v))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    if enable_gqa:
        assert bias is None and dtype == BF16 and q.shape[3] == v.shape[3] <= 256
    assert bias is None or bias.dtype == dtype  # a bool would be turned into it in every layer


def test_a_chunk_after_cached_positions_sees_them_all(flash: Callable[[], list[Any]]) -> None:
    q, k, v = (x.detach() for x in inputs(2, 4, 2, 9, 9, 8, 8))
    whole = formula(q, k, v, None)
    calls = flash()
    for start in (1, 5, 7):
        torch.testing.assert_close(causal_attention(q[:, :, start:], k, v, scale=0.3), whole[:, :, start:])
    assert [call["most"] for call in calls] == [(8, 9), (4, 9), (2, 9)]
    torch.testing.assert_close(causal_attention(q[:, :, 8:], k, v, scale=0.3), whole[:, :, 8:])
    assert len(calls) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_starts_say_what_the_dense_mask_says(documents: list[list[int]]) -> None:
    """Or there are none: a document that another interrupts has no single start."""
    documents_BS = torch.tensor(documents)
    starts = document_starts(documents_BS)
    interrupted = any(
        len(set(row)) != sum(a != b for a, b in zip([None, *row], row, strict=False)) for row in documents
    )
    assert (starts is None) == interrupted
    if starts is not None:
        position = torch.arange(documents_BS.numel())
        number = torch.searchsorted(starts, position, right=True)
        same = (number.unsqueeze(1) == number).tril()
        by_row = torch.block_diag(*(row.unsqueeze(1) == row for row in documents_BS)).bool().tril()
        assert torch.equal(same, by_row) and starts.dtype == torch.int32


def test_interrupted_documents_get_the_dense_mask(flash: Callable[[], list[Any]]) -> None:
    documents_BS = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 2, 1, 0]])
    q, k, v = inputs(2, 2, 2, 5, 5, 8, 8)
    calls = flash()
    torch.testing.assert_close(causal_attention(q, k, v, documents_BS, scale=0.3), formula(q, k, v, documents_BS))
    assert not calls


def test_a_mask_for_fewer_keys_than_were_gathered_is_made_anew() -> None:
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 4, 9, 8, 8))
    mask = make_mask(CPU, q.dtype, shape=(1, 4, 4), widths=(8, 8))
    torch.testing.assert_close(causal_attention(q, k, v, mask, scale=0.3), formula(q, k, v, None))
