"""Muon in a plain PyTorch loop, on a toy language model: python examples/muon_plain_loop.py

The model learns which token follows which. Put your own module in place of `Net`; the three Muon lines stay the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earthshine import Muon, describe, param_groups

VOCAB, WIDTH = 32, 64


class Net(nn.Module):
    """One attention and one feed-forward layer: small, but with all kinds of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), is_causal=True)
        return self.lm_head(x + self.down_proj(F.gelu(self.up_proj(x))))


def batch(following: Tensor, length: int = 24) -> Tensor:
    """Sixteen sequences in which `following[t]` comes after token t."""
    tokens = [torch.randint(VOCAB, (16,))]
    for _ in range(length - 1):
        tokens.append(following[tokens[-1]])
    return torch.stack(tokens, dim=1)


def main(num_steps: int = 61) -> list[float]:
    torch.manual_seed(0)
    following, model = torch.randperm(VOCAB), Net()
    groups = param_groups(model)  # hidden matrices to Muon; embedding, head, norms and biases to AdamW
    print(describe(groups))
    optimizer = Muon(groups, lr=3e-3, weight_decay=0.1)
    losses = []
    for step in range(num_steps):
        tokens = batch(following)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
