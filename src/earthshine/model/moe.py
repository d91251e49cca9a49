"""The mixture-of-experts (MoE) layer: router, experts, and an optional shared expert.

Shapes: B sequences of S positions, T = B*S tokens, D model width, F expert width, E experts, K experts per token,
R = T*K routed rows.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthshine.model.config import ModelConfig, MoEConfig
from earthshine.model.layers import Linear, SwiGLU, at_least_float32, to_compute
from earthshine.model.protocols import CountReduce, Dispatcher, LocalCountReduce, LocalDispatcher
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.ops.grouped_experts import Backend, permute, sort_by_expert, swiglu_experts, unpermute
from earthshine.ops.routing import (
    RoutingStats,
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


def _follow(before: Tensor, after: Tensor) -> Tensor:
    """`before` with its values and dtype on the device of `after`; zeros where it had no values (meta)."""
    if before.is_meta:
        return torch.zeros_like(before, device=after.device)
    return before.to(after.device)


class Router(Linear):
    """Logits of the experts in at least float32, and the gate. Its weight (E, D) is one matrix, as any linear map's.

    `bias_E` (gate "sigmoid_bias" only, else None) is a float32 buffer, saved with the model and moved by
    `ops.routing.bias_update`, which `Transformer.update_router_bias` calls. It follows the module to a device but never
    to another dtype: bfloat16 would round away updates of 1e-3. Where the weight is frozen, or `freeze_buffer` was
    called, it does not move.
    """

    bias_E: Tensor | None
    bias_frozen: bool = False

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__(hidden_size, moe.num_experts)
        self.moe = moe
        bias_E = torch.zeros(moe.num_experts, dtype=torch.float32) if moe.gate == "sigmoid_bias" else None
        self.register_buffer("bias_E", bias_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.bias_E
        super()._apply(fn, recurse)
        if before is not None and self.bias_E is not None:
            self.bias_E = _follow(before, self.bias_E)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}bias_E"
        if name in state_dict:  # with assign=True the tensor itself would become the buffer, of whatever dtype
            state_dict = {**state_dict, name: state_dict[name].float()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def trained_buffers(self) -> dict[str, bool]:
        """For the optimizer's groups: what training moves beside the parameters, and whether it does here."""
        return {} if self.bias_E is None else {"bias_E": self.weight.requires_grad and not self.bias_frozen}

    def freeze_buffer(self, name: str) -> None:
        """From now on, leave that buffer of `trained_buffers` as it is."""
        self.bias_frozen |= name == "bias_E"

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """logits_TE and weights_TK, both float32 or wider, and expert_TK (int64)."""
        moe = self.moe
        logits_TE = super().forward(at_least_float32(x_TD))
        if self.bias_E is not None:
            weights_TK, expert_TK = sigmoid_bias(
                logits_TE, self.bias_E, moe.top_k, moe.renormalize, moe.num_groups, moe.top_k_groups
            )
        elif moe.gate == "softmax_topk":
            weights_TK, expert_TK = softmax_topk(logits_TE, moe.top_k, moe.renormalize)
        else:
            weights_TK, expert_TK = topk_softmax(logits_TE, moe.top_k)
        if moe.routed_scaling != 1:
            weights_TK = weights_TK * moe.routed_scaling
        return logits_TE, weights_TK, expert_TK


class Experts(nn.Module):
    """E feed-forward networks, each of the three matrices stacked over the experts."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.w_gate_EFD = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w_up_EFD = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w_down_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def logical_matrices(self) -> dict[str, tuple[str]]:
        """For the optimizer: each is a stack of E matrices."""
        return {"w_gate_EFD": ("batch",), "w_up_EFD": ("batch",), "w_down_EDF": ("batch",)}

    def forward(self, x_RD: Tensor, counts_E: Tensor, capacity: int = 0) -> Tensor:
        """Rows sorted by expert through their experts; rows beyond sum(counts_E) give zeros.

        `capacity` is at least the largest count; 0 says nothing about it.
        """
        gate, up, down = (to_compute(w, x_RD) for w in (self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF))
        return swiglu_experts(x_RD, gate, up, down, counts_E, self.backend, capacity)


class MoE(nn.Module):
    """An MoE layer: the chosen experts summed by gate weight, plus the shared expert if there is one.

    While training, choices beyond an expert's capacity are dropped: they add nothing, and the token's other weights
    stay as they are (Megatron-LM's rule). Otherwise nothing is dropped.

    `counts_E` and `dropped` count choices since the last reset; they are neither parameters nor saved. `Transformer`
    adds each forward's `RoutingStats` to them: forward itself writes no buffer, because recomputation calls it twice.
    """

    counts_E: Tensor
    dropped: Tensor

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        balance: BalanceConfig | None = None,
        capacity: CapacityConfig | None = None,
    ) -> None:
        super().__init__()
        moe = config.moe
        self.moe = moe
        self.balance = balance or BalanceConfig()
        self.capacity = capacity or CapacityConfig()
        self.router = Router(config.hidden_size, moe)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size, backend)
        self.register_buffer("counts_E", torch.zeros(moe.num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.int64), persistent=False)
        self.shared: SwiGLU | None = None
        self.shared_gate: Linear | None = None
        if moe.shared_intermediate_size:
            self.shared = SwiGLU(config.hidden_size, moe.shared_intermediate_size)
            self.shared_gate = Linear(config.hidden_size, 1) if moe.shared_gated else None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.count_reduce: CountReduce = LocalCountReduce()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        counts_E, dropped = self.counts_E, self.dropped
        super()._apply(fn, recurse)
        self.counts_E, self.dropped = _follow(counts_E, self.counts_E), _follow(dropped, self.dropped)
        return self

    def forward(self, x_BSD: Tensor, step_counts_E: Tensor | None = None) -> tuple[Tensor, RoutingStats | None]:
        """The layer's output (B, S, D), and in training mode its routing statistics, else None.

        Args:
            step_counts_E: for the Switch loss with scope "step": the choices of the whole step, int64.
        """
        x_TD = x_BSD.flatten(0, 1)
        logits_TE, weights_TK, expert_TK = self.router(x_TD)
        assigned_TK, capacity = self._drop(weights_TK, expert_TK)
        routed = sort_by_expert(assigned_TK, self.moe.num_experts)
        rows_RD, counts_E, capacity = self.dispatcher.dispatch(permute(x_TD, routed), routed.counts_E, capacity)
        y_RD = self.dispatcher.combine(self.experts(rows_RD, counts_E, capacity))
        y_TD = unpermute(y_RD, routed, weights_TK)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = F.sigmoid(self.shared_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        y_BSD = y_TD.view_as(x_BSD)
        if not self.training:
            return y_BSD, None
        counts_E = routed.counts_E if assigned_TK is expert_TK else count_tokens(expert_TK, self.moe.num_experts)
        balance = self._balance(logits_TE.unflatten(0, x_BSD.shape[:2]), expert_TK, counts_E, step_counts_E)
        z = z_loss(logits_TE) if self.balance.z_coefficient else logits_TE.new_zeros(())
        return y_BSD, RoutingStats(balance, z, counts_E, counts_E.sum() - routed.counts_E.sum())

    def _drop(self, weights_TK: Tensor, expert_TK: Tensor) -> tuple[Tensor, int]:
        """`expert_TK` with E in place of dropped choices, whose outputs are zeros; the capacity (0: no limit)."""
        moe, num_tokens = self.moe, expert_TK.shape[0]
        capacity = self.capacity.tokens_per_expert(num_tokens, moe.num_experts, moe.top_k) if self.training else 0
        if capacity == 0 or capacity >= num_tokens:  # an expert gets at most one choice of each token
            return expert_TK, 0
        keep_TK = keep_within_capacity(weights_TK, expert_TK, moe.num_experts, capacity, self.capacity.drop)
        return expert_TK.where(keep_TK, moe.num_experts), capacity

    def _balance(self, logits_BSE: Tensor, expert_TK: Tensor, counts_E: Tensor, step_counts_E: Tensor | None) -> Tensor:
        """The balance loss, summed over the sequences: 0-d. Dropped choices count as what the router wanted.

        Raises ValueError where the scope is the step and its counts are missing, except in a pass without gradient:
        that is how they are gathered.
        """
        config = self.balance
        if config.loss == "none":
            return logits_BSE.new_zeros(())
        if config.scope == "step" and step_counts_E is None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "balance.scope='step' takes expert fractions over the whole step: pass step_counts, the sum of "
                    "Transformer.routing_counts over the step's micro-batches."
                )
            return logits_BSE.new_zeros(())
        p_BSE = probabilities(logits_BSE, self.moe.gate)
        if config.loss == "sequence" or config.scope == "sequence":
            return sequence_balance(p_BSE, expert_TK.unflatten(0, p_BSE.shape[:2])).sum()
        choices_E = step_counts_E if config.scope == "step" else self.count_reduce.sum(counts_E)
        assert choices_E is not None
        return p_BSE.shape[0] * switch_balance(p_BSE.flatten(0, 1), choices_E)
