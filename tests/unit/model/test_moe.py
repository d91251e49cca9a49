"""The MoE layer against a loop over tokens; its statistics, its buffers, and what capacity does to it."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.model.config import ModelConfig, MoEConfig
from earthshine.model.moe import MoE
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.ops.routing import RoutingStats, bias_update, count_tokens, topk_softmax

B, S, D, E, K = 2, 6, 8, 4, 2
GATES: dict[str, dict[str, Any]] = {
    "topk_softmax": {},
    "softmax_topk": {"renormalize": False},
    "sigmoid_bias": {"routed_scaling": 1.7, "num_groups": 2, "top_k_groups": 1},
}
SHARED: dict[str, dict[str, Any]] = {
    "alone": {},
    "shared": {"shared_intermediate_size": 12, "shared_gated": False},
    "shared, gated": {"shared_intermediate_size": 12, "shared_gated": True},
}


def make(
    gate: str = "topk_softmax", balance: BalanceConfig | None = None, capacity: CapacityConfig | None = None, **moe: Any
) -> MoE:
    options = {"num_experts": E, "top_k": K, "intermediate_size": 12, "layers": (0,), "gate": gate, **GATES[gate]}
    config = ModelConfig(
        vocab_size=16,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        moe=MoEConfig(**(options | moe)),
    )
    layer = MoE(config, "loop", balance, capacity)
    g = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=g)
    if layer.router.bias_E is not None:
        layer.router.bias_E.normal_(0, 0.1, generator=g)
    return layer


def inputs(batch: int = B) -> Tensor:
    return torch.randn(batch, S, D, generator=torch.Generator().manual_seed(1))


def stats_of(layer: MoE, x_BSD: Tensor, step_counts_E: Tensor | None = None) -> RoutingStats:
    stats = layer(x_BSD, step_counts_E)[1]
    assert isinstance(stats, RoutingStats)
    return stats


def token_by_token(layer: MoE, x_BSD: Tensor) -> Tensor:
    """The layer's definition: sum over a token's experts of weight times SwiGLU, plus the shared expert."""
    rows = []
    for x_D in x_BSD.flatten(0, 1):
        _, weights_1K, expert_1K = layer.router(x_D.unsqueeze(0))
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weights_1K[0], expert_1K[0].tolist(), strict=True):
            experts = layer.experts
            hidden_F = F.silu(experts.w_gate_EFD[e] @ x_D) * (experts.w_up_EFD[e] @ x_D)
            y_D = y_D + weight * (experts.w_down_EDF[e] @ hidden_F)
        if layer.shared is not None:
            shared_D = layer.shared(x_D)
            y_D = y_D + (shared_D if layer.shared_gate is None else layer.shared_gate(x_D).sigmoid() * shared_D)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BSD)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("gate", GATES)
def test_the_layer_is_its_definition(gate: str, shared: str) -> None:
    layer = make(gate, **SHARED[shared]).double()
    x_BSD = inputs().double().requires_grad_()
    y_BSD, _ = layer(x_BSD)
    want = token_by_token(layer, x_BSD)
    torch.testing.assert_close(y_BSD, want, rtol=1e-10, atol=1e-12)
    wanted = [x_BSD, *layer.parameters()]
    seen = torch.randn(x_BSD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for got, want_grad in zip(
        torch.autograd.grad(y_BSD, wanted, seen), torch.autograd.grad(want, wanted, seen), strict=True
    ):
        torch.testing.assert_close(got, want_grad, rtol=1e-9, atol=1e-11)


def test_parameters_and_buffers_are_what_checkpoints_expect() -> None:
    assert set(make().state_dict()) == {
        "router.weight",
        "experts.w_gate_EFD",
        "experts.w_up_EFD",
        "experts.w_down_EDF",
    }
    layer = make("sigmoid_bias", shared_intermediate_size=12)
    assert "router.bias_E" in layer.state_dict() and "shared_gate.weight" in layer.state_dict()
    assert "router.bias_E" not in dict(layer.named_parameters())
    assert "shared_gate.weight" not in make(shared_intermediate_size=12, shared_gated=False).state_dict()


def test_router_numbers_are_float32_below_a_half_precision_model() -> None:
    layer = make("sigmoid_bias").to(torch.bfloat16)
    x_TD = inputs().flatten(0, 1).to(torch.bfloat16)
    logits_TE, weights_TK, _ = layer.router(x_TD)
    assert logits_TE.dtype == weights_TK.dtype == torch.float32
    torch.testing.assert_close(logits_TE, x_TD.float() @ layer.router.weight.float().T)
    y_BSD, stats = layer(inputs().to(torch.bfloat16))
    assert y_BSD.dtype == torch.bfloat16 and stats.balance.dtype == torch.float32


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_come_while_training_only_and_forward_writes_no_buffer() -> None:
    layer = make("sigmoid_bias", BalanceConfig(z_coefficient=1e-3), CapacityConfig(factor=0.5))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    first, second = stats_of(layer, inputs()), stats_of(layer, inputs())
    with torch.no_grad():
        third = stats_of(layer, inputs())
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert {*before} == {"counts_E", "dropped", "router.bias_E"}
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    assert layer.eval()(inputs())[1] is None


def test_counts_are_the_routers_choices() -> None:
    layer = make()
    stats = stats_of(layer, inputs())
    _, _, expert_TK = layer.router(inputs().flatten(0, 1))
    assert torch.equal(stats.counts_E, count_tokens(expert_TK, E)) and int(stats.counts_E.sum()) == B * S * K
    assert stats.dropped == 0


def test_what_is_not_asked_for_is_zero() -> None:
    stats = stats_of(make(balance=BalanceConfig(loss="none")), inputs())
    assert stats.balance == 0 and stats.z == 0 and not stats.balance.requires_grad


def published_balance(layer: MoE, x_BSD: Tensor, loss: str) -> Tensor:
    """Sum over the sequences of E/K * sum_i f_i P_i; f over each sequence, or over all of them ("switch")."""
    total = x_BSD.new_zeros(())
    logits = [layer.router(x_SD)[0] for x_SD in x_BSD]
    chosen = [layer.router(x_SD)[2] for x_SD in x_BSD]
    for b in range(len(x_BSD)):
        scores = logits[b].sigmoid() if layer.moe.gate == "sigmoid_bias" else logits[b].exp()
        p_SE = scores / scores.sum(-1, keepdim=True)
        pool = chosen[b] if loss == "sequence" else torch.cat(chosen)
        f_E = torch.stack([(pool == i).sum() for i in range(E)]).to(p_SE.dtype) / len(pool)
        total = total + E / K * (f_E * p_SE.mean(0)).sum()
    return total


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("balance", "published"),
    [
        (BalanceConfig(loss="sequence"), "sequence"),
        (BalanceConfig(loss="switch", scope="sequence"), "sequence"),
        (BalanceConfig(loss="switch", scope="micro_batch"), "switch"),
    ],
)
def test_each_balance_loss_trains_the_router_as_published(gate: str, balance: BalanceConfig, published: str) -> None:
    layer, x_BSD = make(gate, balance).double(), inputs().double()
    got, want = stats_of(layer, x_BSD).balance, published_balance(layer, x_BSD, published)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)  # float64 sums in another order
    got_grad, want_grad = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (got, want))
    assert float(got_grad.abs().max()) > 1e-3
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-12)


def test_the_z_loss_trains_the_router_as_published() -> None:
    layer, x_BSD = make(balance=BalanceConfig(z_coefficient=1e-3)).double(), inputs().double()
    want = (x_BSD.flatten(0, 1) @ layer.router.weight.T).exp().sum(-1).log().square().sum()
    got = stats_of(layer, x_BSD).z
    torch.testing.assert_close(got, want)
    got_grad, want_grad = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (got, want))
    assert float(got_grad.abs().max()) > 1e-3
    torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize(
    "balance",
    [BalanceConfig(), BalanceConfig(loss="switch", scope="sequence"), BalanceConfig(loss="switch", scope="step")],
    ids=["sequence", "switch sequence", "switch step"],
)
def test_balance_adds_over_micro_batches(balance: BalanceConfig) -> None:
    layer, x_BSD = make(balance=replace(balance, z_coefficient=1e-3)).double(), inputs(4).double()
    with torch.no_grad():
        step_counts_E = stats_of(layer, x_BSD).counts_E if balance.scope == "step" else None
    whole = stats_of(layer, x_BSD, step_counts_E)
    parts = [stats_of(layer, part, step_counts_E) for part in x_BSD.split([1, 3])]
    for name in ("balance", "z", "counts_E", "dropped"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))
    grads = [
        torch.autograd.grad(loss, layer.router.weight)[0]
        for loss in (parts[0].balance + parts[1].balance, whole.balance)
    ]
    torch.testing.assert_close(*grads)


def test_the_micro_batch_scope_depends_on_how_the_step_is_cut() -> None:
    layer, x_BSD = make(balance=BalanceConfig(loss="switch", scope="micro_batch")), inputs(4)
    whole = stats_of(layer, x_BSD).balance
    parts = torch.stack([stats_of(layer, part).balance for part in x_BSD.split(1)]).sum()
    whole_grad, parts_grad = (torch.autograd.grad(loss, layer.router.weight)[0] for loss in (whole, parts))
    assert float((parts_grad - whole_grad).norm() / whole_grad.norm()) > 0.05


def test_the_step_scope_refuses_to_train_without_the_steps_counts() -> None:
    layer = make(balance=BalanceConfig(loss="switch", scope="step"))
    with pytest.raises(ValueError, match=r"balance\.scope='step'.*routing_counts"):
        layer(inputs())


def test_the_micro_batch_scope_asks_the_other_ranks() -> None:
    """A rank whose partner sent everything to expert 0 sees that in its fractions."""

    class Partner:
        def sum(self, counts_E: Tensor) -> Tensor:
            return counts_E + torch.tensor([1000, 0, 0, 0])

    layer = make(balance=BalanceConfig(loss="switch", scope="micro_batch"))
    layer.count_reduce = Partner()
    p_TE = layer.router(inputs().flatten(0, 1))[0].detach().softmax(-1)
    assert abs(float(stats_of(layer, inputs()).balance.detach() / B) - E * float(p_TE[:, 0].mean())) < 0.1


# ---- the bias -------------------------------------------------------------------------------------------------------


def test_the_bias_is_never_cast() -> None:
    layer = make("sigmoid_bias")
    want = layer.router.bias_E.clone()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half(), lambda m: m.float()):
        cast(layer)
        assert layer.router.bias_E.dtype == torch.float32 and torch.equal(layer.router.bias_E, want)
        assert layer.router.weight.dtype != torch.int64 and layer.counts_E.dtype == torch.int64
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16, "the rest is cast"


def test_the_bias_is_not_cast_by_loading_tensors_in_place_of_the_modules_own() -> None:
    layer = make("sigmoid_bias")
    state = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.router.bias_E.dtype == torch.float32 and layer.router.weight.dtype == torch.bfloat16


def test_the_bias_of_an_untrained_model_made_on_meta_is_zero() -> None:
    with torch.device("meta"):
        layer = make("sigmoid_bias")
    layer.to(torch.bfloat16)
    assert layer.router.bias_E.is_meta and layer.router.bias_E.dtype == torch.float32
    layer.to_empty(device="cpu")
    for buffer, dtype in (
        (layer.router.bias_E, torch.float32),
        (layer.counts_E, torch.int64),
        (layer.dropped, torch.int64),
    ):
        assert buffer.device.type == "cpu" and buffer.dtype == dtype and not buffer.any()
    assert layer.router.weight.dtype == torch.bfloat16


def test_buffers_keep_their_values_where_parameters_are_emptied_and_follow_to_meta() -> None:
    layer = make("sigmoid_bias")
    layer.counts_E += 3
    want = layer.router.bias_E.clone()
    layer.to_empty(device="cpu")
    assert torch.equal(layer.router.bias_E, want) and layer.counts_E.tolist() == [3] * E
    layer.to("meta")
    assert layer.router.bias_E.is_meta and layer.counts_E.is_meta


def test_the_bias_is_saved_and_loaded_bit_for_bit() -> None:
    layer, other = make("sigmoid_bias"), make("sigmoid_bias").to(torch.bfloat16)
    other.router.bias_E.zero_()
    layer.router.bias_E.fill_(1 + 2**-20)  # bfloat16 would make this 1
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.router.bias_E, layer.router.bias_E)
    assert torch.equal(copy.deepcopy(layer).router.bias_E, layer.router.bias_E)


def test_the_bias_changes_the_choice_but_not_the_weights_and_gets_no_gradient() -> None:
    layer = make("sigmoid_bias", num_groups=1, top_k_groups=1)
    x_TD = inputs().flatten(0, 1)
    layer.router.bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
    logits_TE, weights_TK, expert_TK = layer.router(x_TD)
    assert set(expert_TK.flatten().tolist()) == {2, 3}
    chosen_TK = logits_TE.sigmoid().gather(1, expert_TK)
    torch.testing.assert_close(weights_TK, 1.7 * chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert not layer.router.bias_E.requires_grad
    layer.router.bias_E.copy_(bias_update(layer.router.bias_E, stats_of(layer, inputs()).counts_E, 0.5, "deepseek"))
    assert layer.router.bias_E.tolist() == [0.5, 0.5, 8.5, 8.5]


# ---- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("drop", ["probability", "position"])
def test_dropped_choices_add_nothing_and_take_no_gradient(drop: str, backend: str) -> None:
    layer = make(capacity=CapacityConfig(factor=0.7, drop=drop))
    layer.experts.backend = backend
    x_BSD = inputs().requires_grad_()
    y_BSD, stats = layer(x_BSD)
    limit = layer.capacity.tokens_per_expert(B * S, E, K)
    _, weights_TK, expert_TK = layer.router(x_BSD.flatten(0, 1))
    assert int(stats.dropped) == sum(max(0, n - limit) for n in count_tokens(expert_TK, E).tolist()) > 0
    assert torch.equal(stats.counts_E, count_tokens(expert_TK, E)), "counts are of choices before dropping"
    keep_TK = torch.zeros(B * S, K)
    for e in range(E):
        at = [(t, k) for t, k in (expert_TK == e).nonzero().tolist()]
        if drop == "probability":
            at.sort(key=lambda tk: -float(weights_TK.detach()[tk]))
        for tk in at[:limit]:
            keep_TK[tk] = 1
    want = torch.zeros(B * S, D)
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        for k in range(K):
            e, experts = int(expert_TK[t, k]), layer.experts
            y_D = experts.w_down_EDF[e] @ (F.silu(experts.w_gate_EFD[e] @ x_D) * (experts.w_up_EFD[e] @ x_D))
            want[t] = want[t] + keep_TK[t, k] * weights_TK[t, k] * y_D
    torch.testing.assert_close(y_BSD.flatten(0, 1), want, rtol=1e-5, atol=1e-5)  # float32 sums of a few terms
    wanted = [x_BSD, *layer.parameters()]
    for got, want_grad in zip(
        torch.autograd.grad(y_BSD.square().sum(), wanted), torch.autograd.grad(want.square().sum(), wanted), strict=True
    ):
        # The router's gradient is a difference of float32 dot products that nearly cancel.
        torch.testing.assert_close(got, want_grad, rtol=1e-4, atol=1e-4 * float(want_grad.abs().max()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.floats(0.1, 5), st.sampled_from(["per_assignment", "per_token"]), st.integers(0, 99))
def test_no_expert_exceeds_its_capacity_and_nothing_that_fits_is_dropped(
    batch: int, factor: float, relative_to: str, seed: int
) -> None:
    layer = make(capacity=CapacityConfig(factor=factor, relative_to=relative_to))
    seen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    x_BSD = torch.randn(batch, S, D, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        stats = stats_of(layer, x_BSD)
    limit = layer.capacity.tokens_per_expert(batch * S, E, K)
    assert seen[0].tolist() == [min(n, limit) for n in stats.counts_E.tolist()]
    assert int(stats.dropped) == int(stats.counts_E.sum() - seen[0].sum())
    if not layer.capacity.can_drop(E, K):
        assert stats.dropped == 0


def test_a_capacity_that_holds_all_is_dropless_bit_for_bit() -> None:
    free, limited = make(), make(capacity=CapacityConfig(factor=E / K))
    (y_free, _), (y_limited, stats) = free(inputs()), limited(inputs())
    assert torch.equal(y_free, y_limited) and stats.dropped == 0


def test_evaluation_drops_nothing() -> None:
    free, limited = make().eval(), make(capacity=CapacityConfig(factor=0.3)).eval()
    assert torch.equal(free(inputs())[0], limited(inputs())[0])


@pytest.mark.parametrize("shape", [(1, 1), (0, S), (1, 0)])
def test_one_token_and_none_at_all(shape: tuple[int, int]) -> None:
    balances = (BalanceConfig(z_coefficient=1e-3), BalanceConfig(loss="switch", scope="micro_batch"))
    for balance in balances:
        layer = make(balance=balance, capacity=CapacityConfig(factor=0.5))
        x_BSD = torch.randn(*shape, D)
        y_BSD, stats = layer(x_BSD)
        assert y_BSD.shape == x_BSD.shape and torch.isfinite(stats.balance) and torch.isfinite(stats.z)
        (y_BSD.sum() + stats.balance + stats.z).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_the_switch_gate_with_one_expert_per_token_trains_its_router() -> None:
    layer = make("softmax_topk", BalanceConfig(loss="none"), top_k=1)
    layer(inputs())[0].square().sum().backward()
    assert float(layer.router.weight.grad.abs().max()) > 1e-3


def test_recomputation_gives_the_same_gradients_and_statistics() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = make("sigmoid_bias", BalanceConfig(z_coefficient=1e-3), CapacityConfig(factor=0.7))

    def grads(run: Any) -> list[Tensor]:
        y_BSD, stats = run(inputs())
        loss = y_BSD.square().sum() + stats.balance + stats.z
        return [loss.detach(), stats.counts_E, *torch.autograd.grad(loss, list(layer.parameters()))]

    again = grads(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(grads(layer), again, strict=True))
    assert not layer.counts_E.any()


def test_equal_logits_spread_by_index_not_by_chance() -> None:
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()
    assert stats_of(layer, inputs()).counts_E.tolist() == [B * S, B * S, 0, 0]
    assert topk_softmax(torch.zeros(3, E), K)[1].tolist() == [[0, 1]] * 3
