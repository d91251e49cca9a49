"""Parameters and FLOPs of a `ModelConfig`, without building the model. No torch import.

FLOPs are 2 per multiply-accumulate of the matmuls that the function needs. Element-wise work, the embedding lookup and
recomputation are not counted.
"""

from collections.abc import Collection
from dataclasses import dataclass

from earthshine.model.config import ModelConfig
from earthshine.model.parameters import ParameterShape, parameter_shapes, router_biases


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

    Includes the bias of a "sigmoid_bias" gate: a buffer, but stored, and counted in Moonlight's and DeepSeek-V3's
    published sizes. What is trained is the sum over `parameters.parameter_shapes`.
    """
    shapes = parameter_shapes(c)
    gate_biases = len(router_biases(c)) * c.moe.num_experts
    return Counts(
        total=sum(w.elements for w in shapes) + gate_biases,
        active=sum(_active(w, c) for w in shapes) + gate_biases,
        embedding=sum(w.elements for w in shapes if w.role in ("embedding", "head")),
    )


def _active(w: ParameterShape, c: ModelConfig) -> int:
    """Elements that one token passes through."""
    return w.rows * w.columns * (c.moe.top_k if w.role == "experts" else w.count)


def attention_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of q k^T and of softmax(q k^T) v in all layers, per token of a sequence of `seq_len`, forward only.

    causal: each position attends to those up to its own, (seq_len + 1) / 2 on average, which is what the function
        needs; False: to all, as a kernel computes that only masks. Document boundaries, which would save more, are
        ignored. Latent attention is counted as it trains: with the keys and values of every head made from the latent.
    """
    positions = (seq_len + 1) / 2 if causal else seq_len
    return 2.0 * c.num_hidden_layers * c.num_attention_heads * (c.head_dim + c.value_dim) * positions


def forward_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True) -> float:
    """FLOPs of one token's forward pass in a sequence of `seq_len`, head and attention included."""
    matrices = sum(_active(w, c) for w in parameter_shapes(c) if w.role in ("matrix", "experts", "head"))
    tied_head = c.vocab_size * c.hidden_size if c.tie_word_embeddings else 0
    return 2.0 * (matrices + tied_head) + attention_flops_per_token(c, seq_len, causal=causal)


def backward_flops_per_token(
    c: ModelConfig, seq_len: int, *, causal: bool = True, frozen: Collection[str] = ()
) -> float:
    """FLOPs of one token's backward pass: for every matmul of the forward pass the gradients of its two factors.

    frozen: names of parameters that are not trained. The matmul with a gradient that nobody needs is not computed:
        that of a frozen weight, and that of an input below which nothing is trained.
    """
    return _Backward(c, seq_len, causal, frozen).flops


def train_flops_per_token(c: ModelConfig, seq_len: int, *, causal: bool = True, frozen: Collection[str] = ()) -> float:
    """FLOPs of one token's forward and backward pass; `frozen` as in `backward_flops_per_token`."""
    forward = forward_flops_per_token(c, seq_len, causal=causal)
    return forward + backward_flops_per_token(c, seq_len, causal=causal, frozen=frozen)


def recomputed_flops_per_token(c: ModelConfig, seq_len: int, *, frozen: Collection[str] = ()) -> float:
    """FLOPs per token of recomputation: a second forward pass through the blocks that the backward pass reaches."""
    first = _Backward(c, seq_len, True, frozen).first_block
    return sum(
        2.0 * _active(w, c)
        for w in parameter_shapes(c)
        if w.role in ("matrix", "experts") and int(w.name.split(".")[1]) >= first
    ) + attention_flops_per_token(c, seq_len) * (1 - first / c.num_hidden_layers)


class _Backward:
    """The matmuls of a backward pass, by walking through the forward pass and asking what needs a gradient.

    flops: per token. first_block: the lowest block that the backward pass reaches; the number of blocks for none.
    Each method takes whether its input `needs` a gradient and returns whether its output does.
    """

    def __init__(self, c: ModelConfig, seq_len: int, causal: bool, frozen: Collection[str]) -> None:
        self._c = c
        self._forward = {w.name: 2.0 * _active(w, c) for w in parameter_shapes(c)}
        self._trained = self._forward.keys() - set(frozen)
        positions = (seq_len + 1) / 2 if causal else seq_len
        per_width = 2.0 * c.num_attention_heads * positions
        self._scores, self._values = per_width * c.head_dim, per_width * c.value_dim
        self.flops = 0.0
        needs, reached = "embed.weight" in self._trained, []
        for layer in range(c.num_hidden_layers):
            needs = self._block(layer, needs)
            reached.append(needs)
        self.first_block = reached.index(True) if needs else c.num_hidden_layers
        needs = self._norm("final_norm", needs)
        tied = c.tie_word_embeddings
        self._forward["head.weight"] = 2.0 * c.vocab_size * c.hidden_size
        if tied and "embed.weight" in self._trained:
            self._trained = self._trained | {"head.weight"}
        self._matmul("head", needs)

    def _matmul(self, name: str, needs: bool) -> bool:
        """y = W x + b."""
        trained = name if name in self._forward else f"{name}.weight"
        needs_weight = trained in self._trained
        self.flops += self._forward[trained] * (needs + needs_weight)
        return needs or needs_weight or f"{name}.bias" in self._trained

    def _norm(self, name: str, needs: bool) -> bool:
        return needs or f"{name}.weight" in self._trained

    def _block(self, layer: int, needs: bool) -> bool:
        where = f"blocks.{layer}"
        attend = self._latent_attention if self._c.mla.kv_lora_rank else self._attention
        needs = attend(f"{where}.attn", self._norm(f"{where}.attn_norm", needs)) or needs
        normed = self._norm(f"{where}.ffn_norm", needs)
        if layer not in self._c.moe.layers:
            return self._swiglu(f"{where}.ffn", normed, "gate_proj", "up_proj", "down_proj") or needs
        moe = self._c.moe
        needs_output = self._matmul(f"{where}.moe.router", normed)
        needs_output |= self._swiglu(f"{where}.moe.experts", normed, "w_gate_EFD", "w_up_EFD", "w_down_EDF")
        if moe.shared_intermediate_size:
            needs_output |= self._swiglu(f"{where}.moe.shared", normed, "gate_proj", "up_proj", "down_proj")
            if moe.shared_gated:
                needs_output |= self._matmul(f"{where}.moe.shared_gate", normed)
        return needs_output or needs

    def _swiglu(self, where: str, needs: bool, gate: str, up: str, down: str) -> bool:
        hidden = [self._matmul(f"{where}.{name}", needs) for name in (gate, up)]
        return self._matmul(f"{where}.{down}", any(hidden))

    def _attention(self, where: str, needs: bool) -> bool:
        q, k, v = (self._matmul(f"{where}.{name}_proj", needs) for name in "qkv")
        q, k = self._norm(f"{where}.q_norm", q), self._norm(f"{where}.k_norm", k)
        return self._attended(where, q, k, v)

    def _latent_attention(self, where: str, needs: bool) -> bool:
        if self._c.mla.q_lora_rank:
            latent = self._norm(f"{where}.q_a_norm", self._matmul(f"{where}.q_a_proj", needs))
            q = self._matmul(f"{where}.q_b_proj", latent)
        else:
            q = self._matmul(f"{where}.q_proj", needs)
        latent = self._matmul(f"{where}.kv_a_proj_with_mqa", needs)
        v = self._matmul(f"{where}.kv_b_proj", self._norm(f"{where}.kv_a_norm", latent))
        return self._attended(where, q, latent or v, v)

    def _attended(self, where: str, q: bool, k: bool, v: bool) -> bool:
        """Scores = q k^T have gradients for q and k; probabilities v has one for v, and one on the way to q and k."""
        self.flops += self._scores * (q + k) + self._values * (v + (q or k))
        return self._matmul(f"{where}.o_proj", q or k or v)
