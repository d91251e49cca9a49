"""A small model with parameters of every kind, a loop that trains it, and Gaussian tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from earthshine.optim.groups import param_groups
from earthshine.optim.muon import Muon

LR = 3e-3


class Small(nn.Module):
    """Embedding, norm, two matrices and a head: Muon's and AdamW's parameters."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, 8)
            self.norm = nn.LayerNorm(8)
            self.up = nn.Linear(8, 16)
            self.down = nn.Linear(16, 8, bias=False)
            self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y: Tensor = self.head(x + self.down(torch.relu(self.up(self.norm(x)))))
        return y


def muon(model: nn.Module, **options: Any) -> Muon:
    return Muon(param_groups(model), **{"lr": LR, "ns_dtype": "float32"} | options)


def backward(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        losses.append(float(backward(model, seed)))
        optimizer.step()
    return losses


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian, the same for the same shape and seed in every dtype, up to its rounding."""
    g = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
