"""Parameters and FLOPs of a `ModelConfig`, without building the model. No torch.

FLOPs are 2 per multiply-accumulate of the matrix products that the function needs: element-wise work, the embedding
lookup and what is computed a second time to save memory are not counted.
"""

from dataclasses import dataclass

from earthshine.model.config import ModelConfig
from earthshine.model.matrices import Weight, weights


@dataclass(frozen=True)
class Counts:
    """Parameters. `active` are those that one token passes through; embeddings are the input table and the head, both
    of them active."""

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
    """Parameters of `c`; a tied head is counted once.

    The bias of a "sigmoid_bias" gate is a buffer, but it is stored, and Moonlight's and DeepSeek-V3's published sizes
    count it: here too. The sum over what is trained is that over `matrices.weights`.
    """
    found = weights(c)
    gate_biases = len(c.moe.layers) * c.moe.num_experts if c.moe.gate == "sigmoid_bias" else 0
    return Counts(
        total=sum(w.elements for w in found) + gate_biases,
        active=sum(_active(w, c) for w in found) + gate_biases,
        embedding=sum(w.elements for w in found if w.role in ("embedding", "head")),
    )


def _active(w: Weight, c: ModelConfig) -> int:
    """Elements that one token passes through."""
    return w.rows * w.columns * (c.moe.top_k if w.role == "experts" else w.count)


def attention_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of q k^T and of its softmax times v in all layers, per token of a sequence of `seq_len`, forward only.

    causal: each position meets those up to its own, (seq_len + 1) / 2 on average, which is what the function needs;
        False: the whole square, which a kernel that only masks computes. Borders of documents, which need less still,
        are not looked at. Latent attention is counted as it trains, with keys and values of every head made from the
        latent.
    """
    positions = (seq_len + 1) / 2 if causal else seq_len
    return 2.0 * c.num_hidden_layers * c.num_attention_heads * (c.head_dim + c.value_dim) * positions


def forward_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of one token's forward pass in a sequence of `seq_len`, head and attention included."""
    matrices = sum(_active(w, c) for w in weights(c) if w.role in ("matrix", "experts", "head"))
    tied_head = c.vocab_size * c.hidden_size if c.tie_word_embeddings else 0
    return 2.0 * (matrices + tied_head) + attention_flops_per_token(c, seq_len, causal=causal)


def backward_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of one token's backward pass: for every product of the forward pass the gradients of its two factors."""
    return 2.0 * forward_flops_per_token(c, seq_len, causal=causal)


def train_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of one token's forward and backward pass."""
    return forward_flops_per_token(c, seq_len, causal=causal) + backward_flops_per_token(c, seq_len, causal=causal)
