"""Documents stay apart, counts count once, initial weights follow the scheme, and bf16 stays near fp32."""

import math

import pytest
import torch

from earthshine.errors import ConfigError
from earthshine.model.presets import PRESETS
from earthshine.model.transformer import Transformer, initialize


def build(name: str = "llama3_tiny_e8t2", **options: object) -> Transformer:
    model = Transformer(PRESETS[name](), **options)
    initialize(model, seed=0)
    return model


def test_packed_documents_give_the_logits_of_each_alone() -> None:
    """1e-5: masked and unmasked attention sum in another order. Positions go through: rotary attention is relative."""
    model = build()
    tokens = torch.randint(0, 2048, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(tokens, documents_BS=documents)
        alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_refused() -> None:
    """One position past the end would broadcast into nothing, and attention would be computed without it."""
    model = build("llama3_tiny")
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64), cache=cache)
        with pytest.raises(ConfigError, match="room for 4 positions, not for 5"):
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def test_documents_cannot_go_with_cached_positions() -> None:
    """Which document a cached position belongs to is not known: attention would cross into others, silently."""
    model = build("llama3_tiny")
    tokens, documents = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 0, 1]])
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        whole = model(tokens, documents)
        torch.testing.assert_close(model(tokens, documents, cache), whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(ConfigError, match="documents_BS cannot be combined with cached positions"):
            model(tokens, documents, cache)


def test_counts_without_gradient_are_those_of_the_training_forward() -> None:
    """Both passes must attend by the same kernel, or tokens near a tie would be routed elsewhere."""
    model = build(compute_dtype=torch.bfloat16).train()
    tokens = torch.randint(0, 2048, (2, 96), generator=torch.Generator().manual_seed(0))
    before = model.routing_counts(tokens)
    model.losses(tokens, tokens)
    for layer, counts_E in model.expert_counts().items():
        assert torch.equal(before[layer], counts_E)
    with pytest.raises(ValueError, match="call model.train"):
        model.eval().routing_counts(tokens)


def test_expert_counts_add_up_in_training_forwards_only() -> None:
    model = build()
    tokens = torch.randint(0, 2048, (2, 10))
    model.losses(tokens, tokens)
    model.losses(tokens, tokens)
    assert {layer: int(c.sum()) for layer, c in model.expert_counts().items()} == {0: 80, 1: 80, 2: 80}
    with torch.no_grad():
        model.losses(tokens, tokens)
    model.eval().losses(tokens, tokens)
    assert all(int(c.sum()) == 80 for c in model.expert_counts().values())
    model.reset_expert_counts()
    assert not any(c.any() for c in model.expert_counts().values())


def test_initialization_follows_the_scheme_and_the_seed() -> None:
    """Standard deviations within 5 %, four standard errors of the smallest matrix."""
    model, again, other = build(), build(), Transformer(PRESETS["llama3_tiny_e8t2"]())
    initialize(other, seed=1)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if "norm" in name:
            assert (p == 1).all()
            continue
        assert not torch.equal(p, r)
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "w_down_EDF"))
        expected = 0.02 / math.sqrt(6) if residual else 0.02
        assert p.std().item() == pytest.approx(expected, rel=max(0.05, 4 / math.sqrt(2 * p.numel())))


def test_sequence_losses_add_up_to_the_loss() -> None:
    model = build()
    tokens, targets = torch.randint(0, 2048, (3, 8)), torch.randint(0, 2048, (3, 8))
    targets[0, :3] = -100
    rows, whole = model.sequence_loss_sums(tokens, targets), model.losses(tokens, targets).nll
    torch.testing.assert_close(rows.sum(), whole, rtol=1e-6, atol=0)
    whole.backward()
    gradient = model.embed.weight.grad.clone()
    model.zero_grad()
    model.sequence_loss_sums(tokens, targets).sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, gradient, rtol=1e-5, atol=1e-7)


def test_bfloat16_compute_keeps_float32_parameters_and_comes_near() -> None:
    """8 bits of mantissa: 1e-2 on logits of this size. Gradients arrive in the parameters' float32."""
    fine, coarse = build("llama3_tiny"), build("llama3_tiny", compute_dtype=torch.bfloat16)
    tokens = torch.randint(0, 2048, (1, 6))
    torch.testing.assert_close(coarse(tokens), fine(tokens), atol=1e-2, rtol=0)
    coarse.losses(tokens, tokens).nll.backward()
    assert {p.dtype for p in coarse.parameters()} == {p.grad.dtype for p in coarse.parameters()} == {torch.float32}
