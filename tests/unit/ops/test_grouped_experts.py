"""Backends agree with the loop, whatever the loads; permuting and back conserves tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earthshine.ops.grouped_experts import permute, sort_by_expert, swiglu_experts, unpermute
from earthshine.ops.routing import count_tokens, topk_softmax

E, D, F = 5, 16, 24
LOADS = {
    "even": [4, 4, 4, 4, 4],
    "starved": [0, 7, 0, 3, 0],
    "one takes all": [0, 0, 20, 0, 0],
    "one token": [0, 1, 0, 0, 0],
    "zero tokens": [0, 0, 0, 0, 0],
}


def run(backend: str, loads: list[int], capacity: int = 0, unused: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(loads) + unused, D, generator=g).requires_grad_()
    weights = [torch.randn(E, *s, generator=g).requires_grad_() for s in ((F, D), (F, D), (D, F))]
    y = swiglu_experts(x, *weights, torch.tensor(loads), backend, capacity)
    y.backward(torch.randn(y.shape, generator=g))
    return [y.detach(), x.grad, *(w.grad for w in weights)]


@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("backend, capacity", [("grouped", 0), ("padded", 0), ("padded", 20), ("auto", 0)])
def test_backends_equal_the_loop(backend: str, capacity: int, loads: list[int], unused: int) -> None:
    """1e-6 of the largest value: the same fp32 products, perhaps summed in another order."""
    for got, want in zip(run(backend, loads, capacity, unused), run("loop", loads, 0, unused), strict=True):
        largest = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("backend", ["grouped", "padded", "loop", "auto"])
def test_unused_rows_are_zeros_and_take_no_gradient(backend: str) -> None:
    y, grad_x, *_ = run(backend, [2, 0, 3, 0, 0], unused=4)
    assert not y[5:].any() and not grad_x[5:].any() and y[:5].any()


def test_dropped_choices_are_sorted_to_the_end_and_not_counted() -> None:
    expert_TK = torch.tensor([[1, E], [E, 0], [1, 2]])
    routed = sort_by_expert(expert_TK, E)
    assert routed.counts_E.tolist() == [1, 2, 1, 0, 0]
    assert expert_TK.flatten()[routed.order_R].tolist() == [0, 1, 1, 2, E, E]


def test_auto_takes_the_loop_where_the_grouped_product_cannot_run() -> None:
    x, w = torch.randn(3, 6), [torch.randn(2, 6, 6) for _ in range(3)]
    counts = torch.tensor([1, 2])
    assert torch.equal(swiglu_experts(x, *w, counts, "auto"), swiglu_experts(x, *w, counts, "loop"))
    double = swiglu_experts(x.double(), *(t.double() for t in w), counts, "auto")
    torch.testing.assert_close(double.float(), swiglu_experts(x, *w, counts, "loop"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.data())
def test_every_choice_of_every_token_is_one_row(tokens: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    weights, chosen = topk_softmax(logits, k)
    routed = sort_by_expert(chosen, experts)
    assert torch.equal(routed.counts_E, count_tokens(chosen, experts)) and int(routed.counts_E.sum()) == tokens * k
    assert sorted(routed.order_R.tolist()) == list(range(tokens * k))
    assert torch.equal(routed.order_R[routed.inverse_R], torch.arange(tokens * k))
    x = torch.randn(tokens, 8)
    # Identity experts with weights that sum to one give each token back.
    torch.testing.assert_close(unpermute(permute(x, routed), routed, weights), x)


def test_permute_gradients_in_float64() -> None:
    chosen = torch.tensor([[1, 0], [1, 2], [0, 2]])
    routed = sort_by_expert(chosen, 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: unpermute(permute(x, routed) ** 2, routed, w), (x, w))


def test_the_gate_breaks_ties_by_index_and_renormalizes() -> None:
    weights, chosen = topk_softmax(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5))
    logits = torch.randn(50, 7)
    weights, chosen = topk_softmax(logits, 3)
    probabilities = logits.softmax(-1).gather(1, chosen)
    torch.testing.assert_close(weights, probabilities / probabilities.sum(1, keepdim=True))
