"""optim/scion.py: each of Scion's directions over several steps, written again in fp64."""

from collections.abc import Callable

import pytest
import torch
from small import normal
from torch import Tensor, nn

from earthshine.errors import ConfigError
from earthshine.optim.muon import Muon

LR, WEIGHT_DECAY, MU, STEPS = 0.02, 0.1, 0.9, 4

Rule = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("kind", "shape", "lmo"),
    [
        ("row_rms", (7, 5), lambda M: M / M.square().mean(dim=1, keepdim=True).sqrt()),
        ("sign", (7, 5), lambda M: M.sign()),
        ("rms", (9,), lambda M: M / M.square().mean().sqrt()),
        ("rms", (), lambda M: M.sign()),
    ],
)
def test_scion_for_embeddings_heads_and_norms(kind: str, shape: tuple[int, ...], lmo: Rule) -> None:
    """arXiv:2502.07529: ColNorm of a table stored by rows, Sign, RMS; each with RMS update_rms."""
    W = normal(*shape, seed=1)
    p, M = nn.Parameter(W.clone()), torch.zeros_like(W)
    group = {"params": [p], "algorithm": "scion", "lmo": (kind,)}
    optimizer = Muon([group], lr=LR, weight_decay=WEIGHT_DECAY, momentum=MU, update_rms=0.3)
    for step in range(2, 2 + STEPS):
        G = normal(*shape, seed=step)
        p.grad = G.clone()
        optimizer.step()
        M = MU * M + G
        W = (1 - LR * WEIGHT_DECAY) * W - LR * 0.3 * lmo(M)
    torch.testing.assert_close(p.detach(), W, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(optimizer.state[p]["momentum_sum"], M, rtol=1e-14, atol=0)
    assert optimizer.last_stats["update_rms"]["scion"] == pytest.approx(0.3, rel=1e-6)  # summed in fp32


def test_scion_decays_cautiously_and_leaves_rows_without_gradient_alone() -> None:
    table = nn.Parameter(normal(4, 3, seed=1))
    before = table.detach().clone()
    group = {"params": [table], "algorithm": "scion", "lmo": ("row_rms",)}
    optimizer = Muon([group], lr=LR, weight_decay=0.5, cautious_weight_decay=True)
    table.grad = torch.zeros(4, 3, dtype=torch.float64)
    table.grad[2] = -before[2]  # the update moves the row away from zero: no decay
    optimizer.step()
    rms = before[2].square().mean().sqrt()
    torch.testing.assert_close(table[2].detach(), before[2] * (1 + LR * 0.2 / rms), rtol=1e-13, atol=0)
    for row in (0, 1, 3):  # no update; sign 0 agrees with everything, as in the paper's mask
        torch.testing.assert_close(table[row].detach(), before[row] * (1 - LR * 0.5), rtol=1e-13, atol=0)


def test_scions_momentum_in_bf16_is_rounded_once_a_step_and_after_its_use() -> None:
    W = normal(7, 5, seed=1)
    p, M = nn.Parameter(W.clone()), torch.zeros_like(W)
    group = {"params": [p], "algorithm": "scion", "lmo": ("row_rms",)}
    optimizer = Muon([group], lr=LR, weight_decay=0.0, momentum=MU, momentum_dtype="bfloat16")
    for step in range(2, 2 + STEPS):
        p.grad = normal(7, 5, seed=step)
        M = MU * M + p.grad
        W = W - LR * 0.2 * M / M.square().mean(dim=1, keepdim=True).sqrt()
        M = M.bfloat16().double()
        optimizer.step()
    # 1e-6: at least fp32 between two roundings of the momentum, of which one that flips would be seen as 1e-3.
    torch.testing.assert_close(p.detach(), W, rtol=1e-6, atol=1e-6)


def test_scion_groups_say_what_each_parameter_is() -> None:
    with pytest.raises(ConfigError, match=r"lmo=\(\) of a scion group of 1 parameters must be one of row_rms, sign"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "scion"}], lr=LR)
    with pytest.raises(ConfigError, match=r"lmo=\('l2',\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "scion", "lmo": ("l2",)}], lr=LR)
