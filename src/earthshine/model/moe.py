"""The mixture-of-experts layer: router, experts, and an optional shared expert.

Shapes: T tokens, D model width, F expert width, E experts, K experts per token, R = T*K routed rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthshine.model.config import ModelConfig
from earthshine.model.layers import Linear, SwiGLU, at_least_float32, to_compute
from earthshine.model.protocols import Dispatcher, LocalDispatcher
from earthshine.ops.grouped_experts import Backend, permute, sort_by_expert, swiglu_experts, unpermute
from earthshine.ops.routing import topk_softmax


class Router(Linear):
    """Logits of the experts in at least float32, and the gate. Its weight (E, D) is one matrix, as any linear map's."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts)
        self.top_k = top_k

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """weights_TK (float32 or wider) and expert_TK (int64)."""
        return topk_softmax(super().forward(at_least_float32(x_TD)), self.top_k)


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

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        gate, up, down = (to_compute(w, x_RD) for w in (self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF))
        return swiglu_experts(x_RD, gate, up, down, counts_E, self.backend)


class MoE(nn.Module):
    """Dropless mixture of experts: the chosen experts summed by gate weight, plus the shared expert if there is one.

    `counts_E` adds up the rows each expert got in training forwards since `reset_counts`; it is not a parameter and is
    not saved.
    """

    counts_E: Tensor

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__()
        moe = config.moe
        self.router = Router(config.hidden_size, moe.num_experts, moe.top_k)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size, backend)
        self.register_buffer("counts_E", torch.zeros(moe.num_experts, dtype=torch.int64), persistent=False)
        self.shared: SwiGLU | None = None
        self.shared_gate: Linear | None = None
        if moe.shared_intermediate_size:
            self.shared = SwiGLU(config.hidden_size, moe.shared_intermediate_size)
            self.shared_gate = Linear(config.hidden_size, 1)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        weights_TK, expert_TK = self.router(x_TD)
        routed = sort_by_expert(expert_TK, self.counts_E.shape[0])
        if self.training and torch.is_grad_enabled():
            self.counts_E += routed.counts_E
        rows_RD, counts = self.dispatcher.dispatch(permute(x_TD, routed), routed.counts_E)
        y_RD = self.dispatcher.combine(self.experts(rows_RD, counts))
        y_TD = unpermute(y_RD, routed, weights_TK)
        if self.shared is not None and self.shared_gate is not None:
            y_TD = y_TD + F.sigmoid(self.shared_gate(x_TD)) * self.shared(x_TD)
        return y_TD.view_as(x_BSD)
