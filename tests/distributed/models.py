"""A small model that holds every kind of parameter, its gradients, and the groups of its optimizer.

Legend: B sequences, S positions, D model, E experts, F expert hidden, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earthshine import Muon, param_groups

D, V = 12, 41
_CONV_CHANNELS = D // 2


@dataclass(frozen=True)
class Sizes:
    """What decides whether shards come out even. qkv: rows of the fused projection's three matrices."""

    hidden: int = 20
    qkv: tuple[int, int, int] = (12, 4, 4)
    gate: int = 4
    experts: int = 4
    expert_hidden: int = 8


EVEN = Sizes()  # every dimension of a linear layer divides by 4
UNEVEN = Sizes(hidden=22, qkv=(10, 3, 4), gate=3, experts=3, expert_hidden=7)  # over 4 ranks: uneven, and empty
HALVES = Sizes(hidden=22, qkv=(10, 5, 3), gate=2, experts=3, expert_hidden=6)  # divides by 2, the halves do not


class Experts(nn.Module):
    """Two stacks of matrices: fused gate and up [E, 2F, D], and down [E, D, F]. Every token visits every expert."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.w_in = nn.Parameter(torch.randn(experts, 2 * hidden, D) / D**0.5)
        self.w_out = nn.Parameter(torch.randn(experts, D, hidden) / hidden**0.5)

    def logical_matrices(self) -> dict[str, tuple[Any, ...]]:
        return {"w_in": ("rows", (self.hidden, self.hidden)), "w_out": ("batch",)}

    def forward(self, x_BSD: Tensor, probs_BSE: Tensor) -> Tensor:
        both = torch.einsum("bsd,efd->bsef", x_BSD, self.w_in)
        gate, up = both.split(self.hidden, dim=-1)
        out_BSED = torch.einsum("bsef,edf->bsed", F.silu(gate) * up, self.w_out)
        return (out_BSED * probs_BSE[..., None]).sum(2)


class Model(nn.Module):
    """Matrices alone, fused by rows, by columns, interleaved and by heads; stacks; a convolution; what is no matrix."""

    def __init__(self, sizes: Sizes, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """dtypes: of whole submodules, by name; float32 otherwise."""
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(V, D)
            self.norm = nn.RMSNorm(D)
            self.qkv = nn.Linear(D, sum(sizes.qkv), bias=False)
            self.interleaved = nn.Linear(D, 12, bias=False)
            self.heads = nn.Linear(D, 12)
            self.gate = nn.Linear(D, sizes.gate, bias=False)
            self.cols = nn.Linear(16, D, bias=False)
            self.conv = nn.Conv1d(D, _CONV_CHANNELS, 3, padding=1)
            self.up = nn.Linear(D, sizes.hidden)
            self.down = nn.Linear(sizes.hidden, D, bias=False)
            self.router = nn.Linear(D, sizes.experts, bias=False)
            self.experts = Experts(sizes.experts, sizes.expert_hidden)
            self.lm_head = nn.Linear(D, V, bias=False)
        self.zero1: Any = None  # a process group, where a layout has the optimizer divide what is replicated
        for name, dtype in (dtypes or {}).items():
            self.get_submodule(name).to(dtype)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens_BS))
        fused = self.qkv(x)
        gates = self.gate(x)
        mixed = self.cols(torch.cat([self.heads(x), F.pad(gates, (0, 4 - gates.shape[-1]))], dim=-1))
        x = x + mixed + fused[..., :D] * self.interleaved(x) + fused[..., -D:]
        local = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + torch.cat([local, local], dim=-1)
        x = x + self.down(F.silu(self.up(x)))
        x = x + self.experts(x, self.router(x).softmax(dim=-1))
        return self.lm_head(x)


def matrices(sizes: Sizes) -> dict[str, tuple[Any, ...]]:
    """What the linear layers hold that do not say it themselves."""
    return {
        "qkv.weight": ("rows", sizes.qkv),
        "interleaved.weight": ("interleaved", 2, (4, 1, 1)),
        "heads.weight": ("heads", 3),
        "cols.weight": ("cols", (10, 6)),
    }


def groups(model: nn.Module, sizes: Sizes, by_rows: bool = False, **options: Any) -> list[dict[str, Any]]:
    """by_rows: nothing is divided by columns, which NorMuon cannot take."""
    known = matrices(sizes) | ({"cols.weight": ("matrix",)} if by_rows else {})
    return param_groups(model, matrices=known, **options)


def optimizer(model: nn.Module, sizes: Sizes, **options: Any) -> Muon:
    """Muon with a large lr and decay, so that a wrong element cannot hide; fp32 unless an option says otherwise."""
    non_matrix = {"non_matrix": options.pop("non_matrix")} if "non_matrix" in options else {}
    made = groups(model, sizes, by_rows="normuon_beta2" in options, **non_matrix)
    return Muon(made, **({"lr": 0.05, "weight_decay": 0.1, "ns_dtype": "float32"} | options))


def gradients(model: Model, step: int) -> dict[str, Tensor]:
    """Whole gradients of a model on one process, the same wherever it is called."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.dtype) * (1 + i % 3)
        for i, (name, p) in enumerate(model.named_parameters())
    }


def batch(step: int, sequences: int = 16, length: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, S]."""
    generator = torch.Generator().manual_seed(2000 + step)
    tokens = torch.randint(V, (sequences, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]
