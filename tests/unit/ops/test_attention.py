"""Row blocks equal SDPA, in values and gradients, and both equal the formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from earthshine.ops.attention import causal_attention, max_logits


def inputs(B: int, H: int, G: int, S: int, C: int, V: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, S, H, C), (B, S, G, C), (B, S, G, V))
    return [torch.randn(*s, generator=g).to(dtype).transpose(1, 2).requires_grad_() for s in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, scale: float) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = scale * q @ k.transpose(2, 3)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1 + scores.shape[3] - scores.shape[2])
    if documents is not None:
        hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "B, H, G, S, C, V",
    [(2, 4, 2, 150, 8, 8), (1, 3, 3, 64, 12, 8), (2, 2, 1, 1, 4, 4), (1, 6, 2, 65, 6, 10)],
    ids=["grouped", "latent", "one position", "one row over"],
)
def test_values_and_gradients_equal_the_formula(
    backend: str, packed: bool, B: int, H: int, G: int, S: int, C: int, V: int
) -> None:
    """2e-6 relative to the largest: sums of up to 150 float32 terms."""
    q, k, v = inputs(B, H, G, S, C, V)
    documents = torch.arange(S).expand(B, S) // 40 if packed else None
    wanted = formula(q, k, v, documents, 0.3)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(wanted, (q, k, v), grad.double())
    out = causal_attention(q, k, v, documents, scale=0.3, backend=backend)
    for got, want in zip((out, *torch.autograd.grad(out, (q, k, v), grad)), (wanted, *expected), strict=True):
        assert got.shape == want.shape
        assert float((got - want).detach().abs().max()) <= 2e-6 * max(1.0, float(want.detach().abs().max()))


def test_bf16_row_blocks_are_as_near_as_sdpa() -> None:
    """Softmax is in float32 in both: neither may be more than 1.5 times as far from the formula as the other."""
    q, k, v = inputs(1, 2, 1, 96, 8, 8, torch.bfloat16)
    wanted = formula(q, k, v, None, 0.5)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = (wanted, *torch.autograd.grad(wanted, (q, k, v), grad.double()))
    errors = {}
    for backend in ("sdpa", "blocks"):
        out = causal_attention(q, k, v, scale=0.5, backend=backend)
        got = (out, *torch.autograd.grad(out, (q, k, v), grad))
        errors[backend] = [
            float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(got, expected, strict=True)
        ]
    for ours, theirs in zip(errors["blocks"], errors["sdpa"], strict=True):
        assert ours <= max(1.5 * theirs, 4e-3)


def test_a_chunk_after_cached_positions_sees_them_all() -> None:
    q, k, v = inputs(1, 2, 2, 9, 4, 4)
    with torch.no_grad():
        whole = causal_attention(q, k, v)
        torch.testing.assert_close(causal_attention(q[:, :, 5:], k, v), whole[:, :, 5:], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(causal_attention(q[:, :, 8:], k, v), whole[:, :, 8:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "B, H, G, S, C",
    [(2, 4, 2, 150, 8), (1, 3, 3, 64, 12), (2, 2, 1, 1, 4), (1, 6, 2, 65, 6)],
    ids=["grouped", "one key each", "one position", "one row over"],
)
def test_max_logits_are_those_of_the_attended_pairs(packed: bool, B: int, H: int, G: int, S: int, C: int) -> None:
    """1e-6: sums of up to 12 float32 terms."""
    q, k, _ = inputs(B, H, G, S, C, C)
    documents = torch.arange(S).expand(B, S) // 40 if packed else None
    scores = 0.3 * q.double() @ k.double().repeat_interleave(H // G, 1).mT
    attended = torch.ones(B, S, S, dtype=torch.bool).tril()
    if documents is not None:
        attended &= documents.unsqueeze(2) == documents.unsqueeze(1)
    expected = [scores[:, h][attended].max() for h in range(H)]
    got = max_logits(q, k, 0.3, documents)
    assert not got.requires_grad
    torch.testing.assert_close(got, torch.stack(expected).float(), rtol=1e-6, atol=1e-6)


def test_max_logits_of_the_last_queries_of_more_keys_and_of_none() -> None:
    q, k, _ = (x.detach() for x in inputs(1, 4, 2, 9, 4, 4))
    by_position = [max_logits(q[:, :, i : i + 1], k[:, :, : i + 1]) for i in range(9)]
    torch.testing.assert_close(max_logits(q[:, :, 5:], k), torch.stack(by_position[5:]).amax(0))
    assert torch.equal(max_logits(q[:, :, :0], k), torch.full((4,), -math.inf))
    assert torch.equal(max_logits(q[:0], k[:0]), torch.full((4,), -math.inf))
    assert max_logits(q.bfloat16(), k.bfloat16()).dtype == torch.float32
