"""Gates and losses against their published formulas written out in float64; conservation under capacity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.ops.routing import (
    bias_update,
    count_tokens,
    keep_within_capacity,
    probabilities,
    sequence_balance,
    sigmoid_bias,
    softmax_topk,
    switch_balance,
    topk_softmax,
    z_loss,
)

B, S, D, E, K = 3, 5, 4, 6, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def router() -> tuple[Tensor, Tensor]:
    """Activations (B, S, D) and a router weight (E, D) that wants a gradient, in float64."""
    x_BSD = torch.randn(B, S, D, dtype=torch.float64)
    return x_BSD, torch.randn(E, D, dtype=torch.float64).requires_grad_()


def gradient(loss: Tensor, weight: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return grad


def assert_same_loss(got: Tensor, want: Tensor, weight_ED: Tensor) -> None:
    """Value and gradient; float64 sums in another order."""
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = gradient(got, weight_ED)
    assert float(grad.abs().max()) > 1e-3, "no gradient reaches the router"
    torch.testing.assert_close(grad, gradient(want, weight_ED), rtol=1e-10, atol=1e-12)


def by_hand(row: list[float], k: int) -> list[int]:
    """The k largest entries, ties to the smaller index."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


# ---- gates ----------------------------------------------------------------------------------------------------------


def test_softmax_gates_are_their_formulas() -> None:
    logits_TE = torch.randn(40, E, dtype=torch.float64)
    chosen = [by_hand(row, K) for row in logits_TE.tolist()]
    all_TE = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits_TE.tolist()]
    plain = torch.tensor([[p[i] for i in c] for p, c in zip(all_TE, chosen, strict=True)], dtype=torch.float64)
    for weights, expert in (topk_softmax(logits_TE, K), softmax_topk(logits_TE, K, True)):
        assert expert.tolist() == chosen and expert.dtype == torch.int64
        torch.testing.assert_close(weights, plain / plain.sum(1, keepdim=True), rtol=1e-12, atol=0)
    weights, expert = softmax_topk(logits_TE, K, False)
    assert expert.tolist() == chosen
    torch.testing.assert_close(weights, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_sigmoid_gate_is_its_formula(renormalize: bool) -> None:
    logits_TE = torch.randn(40, E, dtype=torch.float64)
    bias_E = torch.tensor([0.3, -0.3, 0.0, 0.1, 0.0, -0.1])
    sigmoid = [[1 / (1 + math.exp(-v)) for v in row] for row in logits_TE.tolist()]
    chosen = [by_hand([s + b for s, b in zip(row, bias_E.tolist(), strict=True)], K) for row in sigmoid]
    assert chosen != [by_hand(row, K) for row in sigmoid], "the bias should matter here"
    want = torch.tensor([[s[i] for i in c] for s, c in zip(sigmoid, chosen, strict=True)], dtype=torch.float64)
    if renormalize:
        want = want / want.sum(1, keepdim=True)
    weights, expert = sigmoid_bias(logits_TE, bias_E, K, renormalize)
    assert expert.tolist() == chosen
    torch.testing.assert_close(weights, want, rtol=1e-12, atol=0)


def test_gates_keep_the_precision_of_the_logits_and_let_gradients_through_the_weights_only() -> None:
    bias_E = torch.zeros(E, requires_grad=True)
    gates = (
        lambda x: topk_softmax(x, K),
        lambda x: softmax_topk(x, K, False),
        lambda x: sigmoid_bias(x, bias_E, K, True, 3, 2),
    )
    for gate in gates:
        for dtype in (torch.float32, torch.float64):
            weights, expert = gate(torch.randn(4, E, dtype=dtype))
            assert weights.dtype == dtype and not expert.requires_grad
        assert torch.autograd.gradcheck(
            lambda x, g=gate: g(x)[0], torch.randn(4, E, dtype=torch.float64).requires_grad_()
        )
    assert bias_E.grad is None


@pytest.mark.parametrize("rows", [[[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]], [[0.0] * 6], [[3.0, 1.0, 1.0, 1.0, 1.0, 1.0]]])
def test_ties_go_to_the_smaller_index(rows: list[list[float]]) -> None:
    logits_TE = torch.tensor(rows)
    want = [by_hand(row, 3) for row in rows]
    assert topk_softmax(logits_TE, 3)[1].tolist() == want
    assert softmax_topk(logits_TE, 3, False)[1].tolist() == want
    assert sigmoid_bias(logits_TE, torch.zeros(6), 3, True)[1].tolist() == want


def test_tied_groups_go_to_the_smaller_index() -> None:
    _, expert = sigmoid_bias(torch.zeros(1, 8), torch.zeros(8), 3, True, 4, 2)
    assert expert.tolist() == [[0, 1, 2]]
    # Groups (1, 3) and (2, 2) have equal sums of their two best.
    _, expert = sigmoid_bias(torch.zeros(1, 6), torch.tensor([0.0, 0.0, 1.0, 3.0, 2.0, 2.0]), 2, True, 3, 1)
    assert expert.tolist() == [[3, 2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=5, max_size=5), min_size=0, max_size=6), st.integers(1, 5))
def test_choices_are_those_of_a_stable_sort(rows: list[list[int]], k: int) -> None:
    logits_TE = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    assert topk_softmax(logits_TE, k)[1].tolist() == [by_hand(row, k) for row in rows]


@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (4, 2), (2, 1), (4, 4)])
def test_the_sigmoid_gate_is_that_of_transformers(num_groups: int, top_k_groups: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = transformers.DeepseekV3Config(
        hidden_size=8, n_routed_experts=16, num_experts_per_tok=3, n_group=num_groups, topk_group=top_k_groups,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.normal_(0, 0.3)
    logits, want_weights, want_expert = theirs(torch.randn(200, 8))
    weights, expert = sigmoid_bias(logits, theirs.e_score_correction_bias, 3, True, num_groups, top_k_groups)
    want_expert, order = want_expert.sort(-1)  # theirs are in no order
    expert, ours = expert.sort(-1)
    assert torch.equal(expert, want_expert)
    # One rounding each of sum, quotient and product.
    torch.testing.assert_close(2.5 * weights.gather(1, ours), want_weights.gather(1, order), rtol=1e-6, atol=0)


# ---- losses ---------------------------------------------------------------------------------------------------------


def published_sequence_loss(scores_BSE: Tensor, expert_BSK: Tensor) -> Tensor:
    """arXiv:2412.19437, eqs 17 to 20, term by term, with alpha = 1, summed over sequences."""
    total = scores_BSE.new_zeros(())
    for b in range(B):
        for i in range(E):
            chosen = sum(i in expert_BSK[b, t].tolist() for t in range(S))
            f = E / (K * S) * chosen
            p = sum(scores_BSE[b, t, i] / scores_BSE[b, t].sum() for t in range(S)) / S
            total = total + f * p
    return total


def published_switch_loss(logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """arXiv:2101.03961, eqs 4 to 6, term by term, with alpha = 1; K choices count where one did."""
    num_tokens, p_TE = len(logits_TE), logits_TE.softmax(-1)
    total = logits_TE.new_zeros(())
    for i in range(E):
        f = sum(i in row for row in expert_TK.tolist()) / num_tokens
        total = total + f * p_TE[:, i].sum() / num_tokens
    return E * total


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax_topk", "sigmoid_bias"])
def test_the_sequence_loss_and_its_gradient_are_the_published_ones(gate: str) -> None:
    x_BSD, weight_ED = router()
    logits_BSE = x_BSD @ weight_ED.T
    if gate == "sigmoid_bias":
        scores_BSE, expert_TK = logits_BSE.sigmoid(), sigmoid_bias(logits_BSE.flatten(0, 1), torch.zeros(E), K, True)[1]
    else:
        scores_BSE, expert_TK = logits_BSE.softmax(-1), topk_softmax(logits_BSE.flatten(0, 1), K)[1]
    expert_BSK = expert_TK.view(B, S, K)
    values_B = sequence_balance(probabilities(logits_BSE, gate), expert_BSK)
    assert values_B.shape == (B,)
    assert_same_loss(values_B.sum(), published_sequence_loss(scores_BSE, expert_BSK), weight_ED)


def test_the_switch_loss_and_its_gradient_are_the_published_ones() -> None:
    x_BSD, weight_ED = router()
    logits_TE = x_BSD.flatten(0, 1) @ weight_ED.T
    _, expert_TK = topk_softmax(logits_TE, K)
    got = switch_balance(probabilities(logits_TE, "topk_softmax"), count_tokens(expert_TK, E))
    assert_same_loss(got, published_switch_loss(logits_TE, expert_TK) / K, weight_ED)


def test_the_switch_loss_is_that_of_transformers_divided_by_k() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits_TE = torch.randn(30, E)
    got = switch_balance(logits_TE.softmax(-1), count_tokens(topk_softmax(logits_TE, K)[1], E))
    # Sums of 30 float32.
    torch.testing.assert_close(K * got, modeling.load_balancing_loss_func((logits_TE,), E, K), rtol=1e-5, atol=0)


def test_the_z_loss_and_its_gradient_are_the_published_ones() -> None:
    """arXiv:2202.08906, eq. 5, times the number of tokens."""
    x_BSD, weight_ED = router()
    logits_TE = x_BSD.flatten(0, 1) @ weight_ED.T
    want = sum((sum(logits_TE[t, i].exp() for i in range(E))).log() ** 2 for t in range(B * S))
    assert isinstance(want, Tensor)
    assert_same_loss(z_loss(logits_TE), want, weight_ED)
    assert torch.isfinite(z_loss(torch.full((2, E), 200.0)))  # exp alone would overflow


def test_balance_is_one_when_uniform_and_e_over_k_at_worst() -> None:
    expert_BSK = torch.arange(2 * 3 * K).view(2, 3, K) % E  # 6 choices a sequence, one per expert
    uniform_BSE = torch.full((2, 3, E), 1 / E)
    torch.testing.assert_close(sequence_balance(uniform_BSE, expert_BSK), torch.ones(2))
    torch.testing.assert_close(switch_balance(uniform_BSE[0], torch.full((E,), 7)), torch.tensor(1.0))
    one_TE = torch.zeros(4, E)
    one_TE[:, 0] = 1
    torch.testing.assert_close(switch_balance(one_TE, torch.tensor([4, 4, 0, 0, 0, 0])), torch.tensor(E / K))


def test_the_sequence_loss_adds_over_micro_batches_and_the_switch_loss_does_not() -> None:
    x_BSD, weight_ED = router()
    logits_BSE = x_BSD @ weight_ED.T
    expert_BSK = topk_softmax(logits_BSE.flatten(0, 1), K)[1].view(B, S, K)
    p_BSE = logits_BSE.softmax(-1)

    def switch(sequences: slice) -> Tensor:
        p_TE = p_BSE[sequences].flatten(0, 1)
        return switch_balance(p_TE, count_tokens(expert_BSK[sequences], E)) * len(p_BSE[sequences])

    parts = slice(0, 1), slice(1, B)
    assert_same_loss(
        sum(sequence_balance(p_BSE[s], expert_BSK[s]).sum() for s in parts),
        sequence_balance(p_BSE, expert_BSK).sum(),
        weight_ED,
    )
    whole = gradient(switch(slice(0, B)), weight_ED)
    assert float((gradient(sum(switch(s) for s in parts), weight_ED) - whole).norm() / whole.norm()) > 0.05
    # With the fractions of the whole step it does.
    counts_E = count_tokens(expert_BSK, E)
    assert_same_loss(
        sum(switch_balance(p_BSE[s].flatten(0, 1), counts_E) * len(p_BSE[s]) for s in parts),
        switch(slice(0, B)),
        weight_ED,
    )


def test_losses_of_no_tokens_are_zero() -> None:
    none = torch.zeros(0, S, E)
    assert sequence_balance(none, torch.zeros(0, S, K, dtype=torch.int64)).sum() == 0
    assert switch_balance(none.flatten(0, 1), torch.zeros(E, dtype=torch.int64)) == 0
    assert z_loss(none.flatten(0, 1)) == 0


def test_probabilities_sum_to_one_even_where_every_sigmoid_is_small() -> None:
    logits_TE = torch.randn(20, E) - 20
    for gate in ("topk_softmax", "sigmoid_bias"):
        torch.testing.assert_close(probabilities(logits_TE, gate).sum(-1), torch.ones(20))
    assert torch.isfinite(probabilities(torch.full((1, E), -200.0), "sigmoid_bias")).all()


# ---- loads ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_choices() -> None:
    counts_E = count_tokens(torch.tensor([[0, 3], [3, 1]]), 5)
    assert counts_E.tolist() == [1, 1, 0, 2, 0] and counts_E.dtype == torch.int64
    assert count_tokens(torch.zeros(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_the_bias_moves_by_the_sign_of_the_load() -> None:
    bias_E, counts_E = torch.tensor([0.5, 0.0, 0.0, -0.5]), torch.tensor([9, 1, 2, 0])  # mean 3
    up = 0.001
    deepseek = bias_update(bias_E, counts_E, up, "deepseek")
    torch.testing.assert_close(deepseek, bias_E + up * torch.tensor([-1.0, 1.0, 1.0, 1.0]), rtol=0, atol=1e-7)
    moonlight = bias_update(bias_E, counts_E, up, "moonlight")
    torch.testing.assert_close(moonlight, bias_E + up * torch.tensor([-1.5, 0.5, 0.5, 0.5]), rtol=0, atol=1e-7)
    assert deepseek.dtype == moonlight.dtype == torch.float32
    even = bias_update(bias_E, torch.tensor([3, 3, 3, 3]), up, "moonlight")
    assert torch.equal(even, bias_E)


def test_the_bias_moves_for_large_counts_too() -> None:
    """Above 2^24 float32 would not tell these counts from their mean."""
    counts_E = torch.tensor([2**30 + 1, 2**30 - 1])
    assert torch.equal(bias_update(torch.zeros(2), counts_E, 1.0, "deepseek"), torch.tensor([-1.0, 1.0]))


def test_the_biases_rule_evens_out_a_skewed_load() -> None:
    skew_E, bias_E = torch.linspace(-1, 1, E), torch.zeros(E)
    violations = []
    for _ in range(150):
        logits_TE = torch.randn(256, E) + skew_E
        counts_E = count_tokens(sigmoid_bias(logits_TE, bias_E, K, True)[1], E)
        violations.append(float(counts_E.max() * E / counts_E.sum() - 1))
        bias_E = bias_update(bias_E, counts_E, 1e-2, "moonlight")
    assert violations[0] > 0.6 and sum(violations[-20:]) / 20 < 0.2
    assert abs(float(bias_E.mean())) < 1e-5


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """weights_TK (with many ties), expert_TK (distinct per token), number of experts, capacity."""
    num_experts = draw(st.integers(1, 6))
    top_k, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(0, 12))
    expert = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_tokens)]
    weights = [[draw(st.sampled_from([0.1, 0.25, 0.5])) for _ in range(top_k)] for _ in range(num_tokens)]
    shape = (num_tokens, top_k)
    expert_TK = torch.tensor(expert, dtype=torch.int64).view(shape)
    return torch.tensor(weights).view(shape), expert_TK, num_experts, draw(st.integers(1, 13))


@settings(max_examples=80, deadline=None)
@given(choices(), st.sampled_from(["probability", "position"]))
def test_each_expert_keeps_its_best_choices_up_to_its_capacity(
    case: tuple[Tensor, Tensor, int, int], drop: str
) -> None:
    weights_TK, expert_TK, num_experts, capacity = case
    keep_TK = keep_within_capacity(weights_TK, expert_TK, num_experts, capacity, drop)
    assert keep_TK.shape == expert_TK.shape and keep_TK.dtype == torch.bool
    for expert in range(num_experts):
        wanted = [(t, k) for t in range(len(expert_TK)) for k in range(expert_TK.shape[1]) if expert_TK[t, k] == expert]
        if drop == "probability":
            wanted.sort(key=lambda at: (-float(weights_TK[at]), at[0]))
        surviving = [at for at in wanted if bool(keep_TK[at])]
        assert surviving == wanted[:capacity]  # none above, and nothing that fits is dropped
