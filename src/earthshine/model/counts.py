"""Closed forms for parameters and FLOPs of a `ModelConfig`. No torch; tested against built models."""

from dataclasses import dataclass

from earthshine.model.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Parameters. `active` are those that one token passes through; embeddings are the input table and the head."""

    total: int
    active: int
    embedding: int

    @property
    def total_non_embedding(self) -> int:
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        return self.active - self.embedding


def count_parameters(c: ModelConfig) -> Counts:
    """Parameters of `c`; a tied head is counted once."""
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = 2 * c.hidden_size * heads + 2 * c.hidden_size * kv
    dense = 3 * c.hidden_size * c.intermediate_size
    expert = 3 * c.hidden_size * c.moe.intermediate_size
    shared = 3 * c.hidden_size * c.moe.shared_intermediate_size + (
        c.hidden_size if c.moe.shared_intermediate_size else 0
    )
    router = c.hidden_size * c.moe.num_experts
    embedding = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    num_moe = len(c.moe.layers)
    common = (
        embedding
        + c.num_hidden_layers * (attention + 2 * c.hidden_size)
        + c.hidden_size
        + (c.num_hidden_layers - num_moe) * dense
        + num_moe * (router + shared)
    )
    return Counts(
        total=common + num_moe * c.moe.num_experts * expert,
        active=common + num_moe * c.moe.top_k * expert,
        embedding=embedding,
    )


def forward_flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """FLOPs of the matrix products of one token's forward pass: causal attention averaged over `seq_len`, and the head.

    2 per multiply-accumulate; the embedding lookup costs nothing; element-wise work is not counted.
    """
    counts = count_parameters(c)
    head = c.vocab_size * c.hidden_size
    norms = c.hidden_size * (2 * c.num_hidden_layers + 1)
    matrices = counts.active - counts.embedding + head - norms
    attention = c.num_hidden_layers * 2 * c.num_attention_heads * c.head_dim * (seq_len + 1) / 2
    return 2.0 * (matrices + attention)


def train_flops_per_token(c: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass."""
    return 3.0 * forward_flops_per_token(c, seq_len)
