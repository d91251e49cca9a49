"""Held-out loss and bits per byte, with standard errors over sequences."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from earthshine.console import progress
from earthshine.data.loader import heldout_batches, heldout_bytes_per_token
from earthshine.data.shards import TokenShards
from earthshine.errors import ConfigError, DataError, TrainingDivergedError
from earthshine.model.transformer import Transformer
from earthshine.ops.cross_entropy import IGNORE


@torch.no_grad()
def heldout_loss(
    model: Transformer,
    path: str | Path,
    *,
    seq_len: int,
    max_sequences: int = 64,
    batch: int = 8,
    document_attention: bool = True,
) -> dict[str, Any]:
    """Mean next-token loss over the first `max_sequences` held-out windows (0: all) of `seq_len` tokens.

    `document_attention` as in training: whether attention stays within documents.

    Returns a JSON-ready dict: `loss` in nats per token and its standard error over sequences (`stderr`, a ratio
    estimator: sequences differ in their number of targets), `bits_per_byte` of UTF-8 text, `tokens`, `bytes`
    (estimated from the shards' bytes per token), and `sequence_losses` (nats per token) with `sequence_tokens`, so
    that two models can be compared sequence by sequence; `sha256` is the fingerprint of the shards, so that results on
    other texts are told apart; `lost` says in words what the tokenizer could not spell of the text, "" for nothing:
    where it is not empty, bits per byte are lossy, because they are over the bytes of a text that the model never saw.

    Raises ConfigError for a `seq_len` beyond the model's positions, where the loss would be of something that it never
    learned; DataError when there is no whole window or a token is outside the vocabulary; TrainingDivergedError,
    naming the sequence, when a loss is not finite.
    """
    limit = model.config.max_position_embeddings
    if not 1 <= seq_len <= limit:
        raise ConfigError(f"seq_len={seq_len} must be between 1 and the model's {limit} positions.")
    if max_sequences < 0:
        raise ConfigError(f"max_sequences={max_sequences} must not be negative; 0 takes all.")
    sums: list[float] = []
    counts: list[int] = []
    shards = TokenShards(path, verify=False)
    windows = (shards.num_tokens - 1) // seq_len
    batches = heldout_batches(
        str(path),
        seq_len=seq_len,
        max_sequences=max_sequences,
        batch=batch,
        document_attention=document_attention,
        vocab_size=model.config.vocab_size,
    )
    device = model.embed.weight.device
    with _evaluating(model), progress("held-out loss", min(windows, max_sequences or windows), "sequences") as bar:
        for rows in batches:
            documents_BS = rows.documents_BS if document_attention else None
            losses_B = model.sequence_loss_sums(rows.tokens_BS.to(device), rows.targets_BS.to(device), documents_BS)
            targets_B = (rows.targets_BS != IGNORE).sum(1)
            for loss_sum, num_targets in zip(losses_B.tolist(), targets_B.tolist(), strict=True):
                if num_targets:
                    if not math.isfinite(loss_sum):
                        raise TrainingDivergedError(
                            f"the held-out loss of sequence {len(sums) + 1} on {path} is {loss_sum / num_targets}: "
                            f"the weights are damaged or have diverged."
                        )
                    sums.append(loss_sum)
                    counts.append(num_targets)
            bar.advance(rows.tokens_BS.shape[0])
    if not sums:
        raise DataError(f"{path} holds no window of {seq_len} held-out tokens: prepare more text or lower seq_len.")
    tokens = sum(counts)
    loss = math.fsum(sums) / tokens
    num_bytes = tokens * heldout_bytes_per_token(
        str(path), seq_len=seq_len, max_sequences=max_sequences, document_attention=document_attention
    )
    return {
        "kind": "heldout",
        "loss": loss,
        "stderr": ratio_stderr(sums, counts),
        "bits_per_byte": math.fsum(sums) / math.log(2) / num_bytes,
        "tokens": tokens,
        "bytes": round(num_bytes),
        "seq_len": seq_len,
        "document_attention": document_attention,
        "sha256": shards.fingerprint,
        "lost": shards.lost(),
        "sequence_losses": [s / n for s, n in zip(sums, counts, strict=True)],
        "sequence_tokens": counts,
    }


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def ratio_stderr(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of sum(sums)/sum(counts) over independent sequences (Cochran 1977, section 6.3); 0 for one."""
    n = len(sums)
    if n < 2:
        return 0.0
    ratio, mean_count = math.fsum(sums) / sum(counts), sum(counts) / n
    residual = math.fsum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(residual / (n * (n - 1))) / mean_count
