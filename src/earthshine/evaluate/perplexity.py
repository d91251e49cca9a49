"""Held-out loss and bits per byte, with standard errors over sequences."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earthshine.console import progress
from earthshine.data.heldout import HeldOut
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

    Raises ConfigError for a `seq_len` beyond the model's positions, of which it learned nothing; DataError when there
    is no whole window or a token is outside the vocabulary; TrainingDivergedError, naming the sequence, when a loss is
    not finite.
    """
    limit = model.config.max_position_embeddings
    if not 1 <= seq_len <= limit:
        raise ConfigError(f"seq_len={seq_len} must be between 1 and the model's {limit} positions.")
    heldout = HeldOut(
        path,
        seq_len=seq_len,
        max_sequences=max_sequences,
        document_attention=document_attention,
        vocab_size=model.config.vocab_size,
    )
    sums: list[float] = []
    counts: list[int] = []
    device = model.embed.weight.device
    with _evaluating(model), progress("held-out loss", heldout.num_sequences, "sequences") as bar:
        for rows in heldout.batches(batch):
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
    num_bytes = tokens * bytes_per_token(heldout)
    return {
        "kind": "heldout",
        "loss": loss,
        "stderr": ratio_stderr(sums, counts),
        "bits_per_byte": math.fsum(sums) / math.log(2) / num_bytes,
        "tokens": tokens,
        "bytes": round(num_bytes),
        "seq_len": seq_len,
        "document_attention": document_attention,
        "sha256": heldout.shards.fingerprint,
        "lost": heldout.shards.lost(),
        "sequence_losses": [s / n for s, n in zip(sums, counts, strict=True)],
        "sequence_tokens": counts,
    }


def bytes_per_token(heldout: HeldOut) -> float:
    """UTF-8 bytes of text per target token, for bits per byte.

    A document has one target fewer than tokens where its first is none, and as many without document attention.
    Where `max_sequences` limits the windows, only the documents that they touch count: a part of a held-out set can be
    denser than the whole.
    """
    shards = heldout.shards
    tokens, documents, num_bytes = shards.num_tokens, shards.num_documents, shards.num_bytes
    if heldout.max_sequences:
        ends_N = np.cumsum(heldout.lengths_N, dtype=np.int64)
        last = int(np.searchsorted(ends_N, heldout.max_sequences * heldout.seq_len + 1, side="left"))
        documents = min(last + 1, documents)
        tokens, num_bytes = int(ends_N[documents - 1]), shards.document_bytes(documents)
    return num_bytes / (tokens - documents if heldout.document_attention else tokens)


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
