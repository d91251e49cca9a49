"""Batches of token ids, in the global sample order.

The order is decided by sequence alone: which source (`mixture`), then which sample of its epoch (`packing`). How
sequences are cut into steps, and on which step a run stopped, does not enter, so the whole state is how many samples
each source has given, and a rank of many takes rows of the same step (`Batch.rows`).

Shapes: B sequences, S tokens per sequence.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from earthshine.data.config import DataConfig
from earthshine.data.mixture import Mixture
from earthshine.data.packing import Epoch, cut
from earthshine.data.shards import TokenShards
from earthshine.data.tokenization import Tokenization, of_sources
from earthshine.errors import CheckpointError, ConfigError, DataError

IGNORED = -100  # marks a position without a target, as in torch.nn.functional.cross_entropy

SampleId = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences and what should follow each of their tokens.

    tokens_BS: int64. targets_BS: int64, the next token, or -100 where it is another document's first and documents are
    separate. documents_BS: int32, the number of the document within its row, from 0; all 0 when documents are not
    separate. sample_ids: (source, epoch, index) of each row. num_targets: targets other than -100.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor
    sample_ids: tuple[SampleId, ...]
    num_targets: int

    def rows(self, start: int, stop: int) -> "Batch":
        """Rows start to stop - 1: views of the same tensors."""
        targets_BS = self.targets_BS[start:stop]
        return Batch(
            self.tokens_BS[start:stop],
            targets_BS,
            self.documents_BS[start:stop],
            self.sample_ids[start:stop],
            int((targets_BS != IGNORED).sum()),
        )


def batch_of_windows(
    window_BT: NDArray[np.int64], ends_BT: NDArray[np.bool_], sample_ids: list[SampleId], document_attention: bool
) -> Batch:
    """Windows of T = S + 1 tokens as a Batch. ends_BT: which tokens are the last of their document."""
    tokens_BS = window_BT[:, :-1]
    targets_BS = window_BT[:, 1:].copy()
    documents_BS = np.zeros(tokens_BS.shape, dtype=np.int32)
    if document_attention:
        end_BS = ends_BT[:, :-1]
        np.cumsum(end_BS[:, :-1], axis=1, dtype=np.int32, out=documents_BS[:, 1:])
        targets_BS[end_BS] = IGNORED
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens_BS)),
        torch.from_numpy(targets_BS),
        torch.from_numpy(documents_BS),
        tuple(sample_ids),
        int(np.count_nonzero(targets_BS != IGNORED)),
    )


class _Source:
    """One folder of shards, with the epoch it is in. Holds about 28 bytes per document and 8 per sample."""

    def __init__(self, number: int, shards: TokenShards, seq_len: int, seed: int) -> None:
        self.shards = shards
        self._lengths_N = shards.lengths()
        self._key = {"seq_len": seq_len, "seed": seed, "source": number}
        self.samples_per_epoch, self.left_out_per_epoch = samples_per_epoch(shards, seq_len)
        self._epoch_number = -1
        self._epoch: Epoch | None = None

    def read(self, epoch: int, index: int, out_T: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Fill `out_T` with a sample; returns which of its tokens are the last of their document."""
        if epoch != self._epoch_number or self._epoch is None:
            self._epoch = None  # the old order goes before the new one is made
            self._epoch = Epoch(self._lengths_N, epoch=epoch, **self._key)
            self._epoch_number = epoch
        document_P, start_P, stop_P = self._epoch.sample(index)
        self.shards.read(document_P, start_P, stop_P, out_T)
        return self.shards.ends(start_P, stop_P, out_T)


def samples_per_epoch(shards: TokenShards, seq_len: int) -> tuple[int, int]:
    """Samples of an epoch, at least one, and the tokens left out of it."""
    samples, left_out = cut(shards.num_tokens, seq_len)
    if samples == 0:
        raise DataError(
            f"{shards.path} has {shards.num_tokens} tokens, a sample of seq_len={seq_len} needs {seq_len + 1}; "
            f"prepare more text or choose a shorter seq_len."
        )
    return samples, left_out


class Loader:
    """The endless global sample order of a run, one whole step at a time.

    shards: each source's, opened. summary: for each source its path, weight, tokens, documents, samples per epoch, and
    the tokens that packing leaves out of each epoch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        sequences_per_step: int,
        seed: int,
        vocab_size: int,
        verify: bool = True,
    ) -> None:
        """seq_len: tokens per sequence. vocab_size: the model's. verify: hash every shard first (~ 1 s per GB).

        Raises ConfigError for numbers that make no sense, DataError for shards that cannot be used or disagree.
        """
        for name, value in (("seq_len", seq_len), ("sequences_per_step", sequences_per_step)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed={seed} must be from 0 to 2**64 - 1: it is a key of the shuffles.")
        if not config.sources:
            raise ConfigError("data.sources=[] names no token shards; add a folder written by prepare.")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self._document_attention, self._sequences_per_step, self._seed = (
            config.document_attention,
            sequences_per_step,
            seed,
        )
        self._sources = [
            _Source(i, TokenShards(s.path, verify=verify, vocab_size=vocab_size), seq_len, seed)
            for i, s in enumerate(config.sources)
        ]
        self.shards = [s.shards for s in self._sources]
        require_one_tokenizer(self.shards)
        self._mixture = Mixture([s.weight for s in config.sources])
        self._taken = [0] * len(self._sources)
        self._steps = 0
        self._ahead: tuple[Batch, list[int]] | None = None
        self.summary = [
            {
                "path": c.path,
                "weight": c.weight,
                "tokens": s.shards.num_tokens,
                "documents": s.shards.num_documents,
                "tokenizer_sha256": s.shards.tokenizer_sha256,
                "samples_per_epoch": s.samples_per_epoch,
                "left_out_per_epoch": s.left_out_per_epoch,
            }
            for c, s in zip(config.sources, self._sources, strict=True)
        ]

    def next_step(self) -> Batch:
        """The next step's sequences, for all ranks together. A source that is used up starts its next epoch."""
        batch, taken = self._ahead or self._read()
        self._ahead = None
        self._taken = taken
        self._steps += 1
        return batch

    def read_ahead(self) -> None:
        """Read the next step now, while a device computes; `state_dict` stays that of the steps handed out.

        What cannot be read is left to the step that needs it.
        """
        with contextlib.suppress(DataError, OSError):
            self._ahead = self._ahead or self._read()

    def _read(self) -> tuple[Batch, list[int]]:
        """The next step, and how many samples each source has given after it."""
        window_BT = np.empty((self._sequences_per_step, self.seq_len + 1), dtype=np.int64)
        ends_BT = np.empty(window_BT.shape, dtype=np.bool_)
        taken = list(self._taken)
        sample_ids = []
        for row_T, end_T in zip(window_BT, ends_BT, strict=True):
            number = self._mixture.choose(taken)
            source = self._sources[number]
            epoch, index = divmod(taken[number], source.samples_per_epoch)
            end_T[:] = source.read(epoch, index, row_T)
            sample_ids.append((number, epoch, index))
            taken[number] += 1
        return batch_of_windows(window_BT, ends_BT, sample_ids, self._document_attention), taken

    @property
    def tokenization(self) -> Tokenization:
        """How the run's texts became ids: what its checkpoints carry, for evaluation, prompts and export."""
        return of_sources([s.tokenization for s in self.shards])

    def notes(self) -> list[str]:
        """What a user should know about the data before the first step, as lines of a log."""
        notes = [note for shards in self.shards for note in shards.notes()]
        if len({shards.tokenization.bos_ids for shards in self.shards}) > 1:
            notes.append(
                "warning: data.sources: the documents of some begin with a beginning token and those of others do not; "
                "prepare them alike, because a prompt begins like the first source's documents."
            )
        return notes

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, JSON-ready: samples taken of each source; and what the order is made from."""
        return {
            "version": 1,
            "steps": self._steps,
            "taken": list(self._taken),
            "seed": self._seed,
            "seq_len": self.seq_len,
            "fingerprints": [s.fingerprint for s in self.shards],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken; sequences_per_step may differ.

        Raises CheckpointError when the state is of another seed or seq_len or is not a loader's state, DataError when a
        source holds other data than then: the same positions would be other samples.
        """
        current = self.state_dict()
        if not isinstance(state, dict) or set(state) != set(current) or state["version"] != current["version"]:
            raise CheckpointError("the loader's saved state is not one of this program's; start from the beginning.")
        for name in ("seed", "seq_len"):
            if state[name] != current[name]:
                raise CheckpointError(
                    f"{name}={current[name]}, but the loader's state was saved with {name}={state[name]}: the same "
                    f"positions would be other samples. Restore {name}, or start a new run from the checkpoint."
                )
        if len(state["taken"]) != len(self._taken) or len(state["fingerprints"]) != len(self._taken):
            raise CheckpointError(
                f"data.sources has {len(self._taken)} sources, but the loader's state was saved with "
                f"{len(state['taken'])}. Restore them, or start a new run from the checkpoint."
            )
        for shards, saved_fingerprint in zip(self.shards, state["fingerprints"], strict=True):
            if shards.fingerprint != saved_fingerprint:
                raise DataError(
                    f"{shards.path} holds other data than when the loader's state was saved. "
                    f"Restore it, or start a new run from the checkpoint."
                )
        self._taken = [int(n) for n in state["taken"]]
        self._steps = int(state["steps"])
        self._ahead = None


def require_one_tokenizer(shards: list[TokenShards]) -> None:
    """Raises DataError unless all were prepared with the same tokenizer and end-of-document token."""
    for other in shards[1:]:
        if (other.tokenizer_sha256, other.eod) != (shards[0].tokenizer_sha256, shards[0].eod):
            raise DataError(
                f"{other.path} and {shards[0].path} were prepared with different tokenizers or end-of-document tokens; "
                f"prepare all sources with the tokenizer of the model."
            )
