"""The decoder: attention and feed-forward blocks of every family in `model.config`.

Shapes: B batch, S positions, T = B*S tokens, D model width, V vocabulary, E experts.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from earthshine.errors import ConfigError
from earthshine.model.attention import Cache, RopeTables, attention_widths, make_attention, make_cache
from earthshine.model.config import ModelConfig
from earthshine.model.layers import Embedding, Linear, RMSNorm, SwiGLU, at_least_float32, to_compute
from earthshine.model.moe import MoE
from earthshine.model.protocols import LocalLossReduce, LossReduce
from earthshine.model.training_options import BalanceConfig, CapacityConfig, TrainingOptions
from earthshine.ops.attention import Mask, make_mask
from earthshine.ops.cross_entropy import cross_entropy_sum
from earthshine.ops.grouped_experts import Backend
from earthshine.ops.routing import RoutingStats, bias_update


class Losses(NamedTuple):
    """What one forward pass adds to a step's objective; 0-d sums, so that micro-batches and ranks add up.

    nll: negative log likelihood in nats, over targets. balance: the experts' balance loss, 1 at uniform routing, over
    sequences and layers. z: the squared log-sum-exp of router logits, over tokens and layers.
    """

    nll: Tensor
    balance: Tensor
    z: Tensor


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward network (`ffn`) or MoE (`moe`), each added to its input."""

    def __init__(
        self, config: ModelConfig, layer: int, backend: Backend, balance: BalanceConfig, capacity: CapacityConfig
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = make_attention(config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: SwiGLU | None = None
        self.moe: MoE | None = None
        if layer in config.moe.layers:
            self.moe = MoE(config, backend, balance, capacity)
        else:
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | None,
        step_counts_E: Tensor | None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """The block's output, and what its routing adds to the losses. No side effects: it may be recomputed."""
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), rope, mask, cache)
        if self.moe is not None:
            y_BSD, stats = self.moe(self.ffn_norm(x_BSD), step_counts_E)
            return x_BSD + y_BSD, stats
        assert self.ffn is not None
        return x_BSD + self.ffn(self.ffn_norm(x_BSD)), None


class Transformer(nn.Module):
    """A decoder-only language model. Parameters are left unset: load them, or call `initialize`.

    Args:
        config: the architecture.
        compute_dtype: dtype of activations and matmuls; parameters stay float32 (use `.double()` together with
            torch.float64 for a float64 model).
        experts_backend: see `ops.grouped_experts.swiglu_experts`.
        training: balance, capacity and recomputation; without effect in evaluation.
    """

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype = torch.float32,
        experts_backend: Backend = "auto",
        *,
        training: TrainingOptions | None = None,
    ) -> None:
        super().__init__()
        training = training or TrainingOptions()
        self.config = config
        self.compute_dtype = compute_dtype
        self.balance = training.balance
        self.recompute = training.recompute
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, i, experts_backend, training.balance, training.capacity)
            for i in range(config.num_hidden_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self.loss_reduce: LossReduce = LocalLossReduce()
        self._rope = RopeTables(config)

    @property
    def head_weight_VD(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def hidden(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final normalized hidden states (B, S, D) in the compute dtype. Positions continue from the cache's length.

        They do not restart at a document: rotary attention depends on differences of positions only.
        """
        return self._hidden(tokens_BS, documents_BS, cache)[0]

    def _hidden(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        cache: Cache | None = None,
        step_counts: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, RoutingStats]]:
        """Hidden states, and in training each MoE layer's statistics, which are also added to its counts."""
        start = 0 if cache is None else cache.length
        if documents_BS is not None and start:
            raise ConfigError(
                "documents_BS cannot be combined with cached positions: which document those belong to is unknown."
            )
        (batch, length), end = tokens_BS.shape, start + tokens_BS.shape[1]
        rope = self._rope.rows(start, end, tokens_BS)
        mask = make_mask(
            tokens_BS.device,
            self.compute_dtype,
            shape=(batch, length, end),
            widths=attention_widths(self.config),
            documents_BS=documents_BS,
        )
        x_BSD = self.embed(tokens_BS).to(self.compute_dtype)
        routing_stats: dict[int, RoutingStats] = {}
        counting = self.training and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            inputs = (x_BSD, rope, mask, cache, (step_counts or {}).get(layer))
            if self.recompute and counting:
                # The forward pass uses no random numbers, so there is no random state to restore.
                x_BSD, stats = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BSD, stats = block(*inputs)
            if stats is not None:
                routing_stats[layer] = stats
        if cache is not None:
            cache.length += tokens_BS.shape[1]
        if counting:
            for layer, moe in self._moe_layers().items():
                if layer in routing_stats:
                    moe.counts_E += routing_stats[layer].counts_E
                    moe.dropped += routing_stats[layer].dropped
        return self.final_norm(x_BSD), routing_stats

    def forward(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, S, V) in at least float32.

        Args:
            tokens_BS: int64 token ids.
            documents_BS: number of the document that each position belongs to, to keep attention within documents. For
                an accelerator best left on the CPU: see `ops.attention.make_mask`.
            cache: keys and values of the positions before these; it is extended.
        """
        h_BSD = self.hidden(tokens_BS, documents_BS, cache)
        return at_least_float32(F.linear(h_BSD, to_compute(self.head_weight_VD, h_BSD)))

    def next_token_logits(self, tokens_BS: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) after the last of these positions only, extending the cache."""
        h_BD = self.hidden(tokens_BS, cache=cache)[:, -1]
        return at_least_float32(F.linear(h_BD, to_compute(self.head_weight_VD, h_BD)))

    def losses(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor,
        documents_BS: Tensor | None = None,
        step_counts: Mapping[int, Tensor] | None = None,
    ) -> Losses:
        """The loss over targets other than -100, and those that keep experts balanced: 0 in evaluation and if dense.

        Sums, so that dividing by a step's number of targets gives the same gradient however the step is cut.
        step_counts: `routing_counts` of the whole step, for the Switch loss with scope="step".
        """
        h_BSD, stats = self._hidden(tokens_BS, documents_BS, step_counts=step_counts)
        nll = self._loss(h_BSD.flatten(0, 1), targets_BS.flatten())
        zero = nll.new_zeros(())
        balance, z = (sum((getattr(s, name) for s in stats.values()), zero) for name in ("balance", "z"))
        return Losses(nll, balance, z)

    @torch.no_grad()
    def routing_counts(self, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> dict[int, Tensor]:
        """For each MoE layer, int64 (E,): how many choices fall on each expert in a training forward.

        `expert_counts` do not change. Raises ValueError in evaluation mode, which has no capacity: routing differs.
        """
        if not self.training:
            raise ValueError("routing_counts are those of a training forward: call model.train() first.")
        stats = self._hidden(tokens_BS, documents_BS)[1]
        return {layer: s.counts_E for layer, s in stats.items()}

    def sequence_loss_sums(self, tokens_BS: Tensor, targets_BS: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """`Losses.nll` of each sequence by itself: (B,)."""
        h_BSD = self.hidden(tokens_BS, documents_BS)
        return torch.stack([self._loss(h_SD, targets_S) for h_SD, targets_S in zip(h_BSD, targets_BS, strict=True)])

    def _loss(self, h_TD: Tensor, targets_T: Tensor) -> Tensor:
        return cross_entropy_sum(
            h_TD,
            to_compute(self.head_weight_VD, h_TD),
            targets_T,
            vocab_start=self.loss_reduce.vocab_start,
            reduce_max=self.loss_reduce.max,
            reduce_sum=self.loss_reduce.sum,
        )

    def new_cache(self, batch: int, max_positions: int) -> Cache:
        return make_cache(self.config, batch, max_positions, self.compute_dtype, self.embed.weight.device)

    def _moe_layers(self) -> dict[int, MoE]:
        return {i: block.moe for i, block in enumerate(self.blocks) if isinstance(block.moe, MoE)}

    def expert_counts(self) -> dict[int, Tensor]:
        """For each MoE layer, int64 (E,): rows routed to each expert in training forwards since the last reset."""
        return {i: moe.counts_E.clone() for i, moe in self._moe_layers().items()}

    def dropped_counts(self) -> dict[int, Tensor]:
        """For each MoE layer, int64, 0-d: how many of those choices were dropped for want of capacity."""
        return {i: moe.dropped.clone() for i, moe in self._moe_layers().items()}

    def reset_expert_counts(self) -> None:
        for moe in self._moe_layers().values():
            moe.counts_E.zero_()
            moe.dropped.zero_()

    @torch.no_grad()
    def update_router_bias(self) -> None:
        """Move each router's bias by its expert counts since the last reset: `ops.routing.bias_update`, once per step.

        Frozen routers keep theirs.
        """
        for moe in self._moe_layers().values():
            bias_E, trained = moe.router.bias_E, moe.router.trained_buffers().get("bias_E", False)
            if self.balance.bias != "none" and bias_E is not None and trained:
                bias_E.copy_(bias_update(bias_E, moe.counts_E, self.balance.bias_rate, self.balance.bias))

    def compile_blocks(self) -> None:
        """Compile each block by itself: blocks of one architecture share their code, whatever the routing."""
        for block in self.blocks:
            block.compile(dynamic=False)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Initialize for training from scratch: weights N(0, init_std), norms 1, biases 0, and the projections that write
    to the residual stream scaled by 1/sqrt(2 * layers) (GPT-2: Radford et al. 2019, section 2.3).

    Each parameter's values are a function of (seed, name) alone.
    """
    residual_scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        values = torch.empty(parameter.shape).normal_(0.0, model.config.init_std, generator=generator)
        if name.endswith(("o_proj.weight", "down_proj.weight", "w_down_EDF")):
            values *= residual_scale
        parameter.copy_(values)
    for moe in model._moe_layers().values():
        if moe.router.bias_E is not None:
            moe.router.bias_E.zero_()
