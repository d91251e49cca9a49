"""optim/adamw.py beside torch's AdamW."""

import torch
from torch import nn

from earthshine.optim.muon import Muon

LR = 3e-3


def test_adamw_half_equals_torch() -> None:
    """Ten steps against torch.optim.AdamW's plain loop: 1e-7 on parameters of size 1 is one rounding."""
    g = torch.Generator().manual_seed(0)
    shapes = [(300, 7), (5,), (1, 33)]
    ours = [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon([{"params": ours, "algorithm": "adamw"}], lr=LR, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    b = torch.optim.AdamW(theirs, lr=LR, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-7, atol=2e-7)


def test_cautious_decay_of_adamws_parameters() -> None:
    """AdamW's own step without decay, and decay where update and weight have one sign (arXiv:2510.12402)."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(37, dtype=torch.float64, generator=g)
    cautious, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([{"params": [cautious], "algorithm": "adamw"}], lr=0.1, weight_decay=0.5, cautious_weight_decay=True)
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95))
    for _ in range(4):
        before = plain.detach().clone()
        cautious.grad = torch.randn(37, dtype=torch.float64, generator=g)
        plain.grad = cautious.grad.clone()
        ours.step()
        theirs.step()
        with torch.no_grad():
            update = before - plain  # its sign is all that matters
            plain -= 0.1 * 0.5 * before * (update * before >= 0)
        # Rounding of fp64, with room for the order of decay and update.
        torch.testing.assert_close(cautious.detach(), plain.detach(), rtol=1e-12, atol=1e-13)
