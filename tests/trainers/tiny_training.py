"""A tiny model of transformers, its data, and what two runs of it are compared by."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from earthshine import Muon, param_groups

V, SEQ_LEN = 26, 9
MUON = {"lr": 1e-2, "weight_decay": 0.1, "ns_dtype": "float32"}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}


def tiny(name: str = "Llama", task: str = "ForCausalLM", **sizes: Any) -> Any:
    """A model of one layer, with the same weights at every call. name: "Qwen3Moe" has four experts."""
    config = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1} | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config |= (_MOE if name == "Qwen3Moe" else {}) | sizes
    torch.manual_seed(0)
    return getattr(transformers, name + task)(getattr(transformers, f"{name}Config")(**config))


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.randint(1, V, (count, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": t, "labels": t, "attention_mask": torch.ones_like(t)} for t in tokens]


def batches(size: int, count: int = 8) -> list[dict[str, Tensor]]:
    """The rows in order."""
    data = rows(count)
    return [
        {key: torch.stack([row[key] for row in data[start : start + size]]) for key in data[0]}
        for start in range(0, count, size)
    ]


def by_hand(model: Any, steps: list[list[dict[str, Tensor]]], clip: float = 1.0, **options: Any) -> Any:
    """The reference: a plain loop over steps of micro-batches."""
    optimizer = Muon(param_groups(model), **(MUON | options))
    for micro_batches in steps:
        for batch in micro_batches:
            (model(**batch).loss / len(micro_batches)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    """To the bit."""
    others = dict(other.named_parameters())
    for name, p in one.named_parameters():
        assert torch.equal(p, others[name]), name


def assert_close(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    others = dict(other.named_parameters())
    for name, p in one.named_parameters():
        torch.testing.assert_close(p, others[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
