"""What a model asks of other ranks when they hold parts of it, and the defaults for a process that holds all of it.

The model calls these and knows nothing of ranks. So far only the defaults in this file implement them: those for meshes
will come with `parallel/`, which does not exist yet.
"""

from typing import Protocol

from torch import Tensor


class Dispatcher(Protocol):
    """Carries rows to the ranks that hold their experts, and back. E experts in total, L of them here."""

    def dispatch(self, x_RD: Tensor, counts_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, int]:
        """Rows sorted by expert -> the rows for this rank's experts, sorted, their counts_L, and the most rows that
        one of these experts can have.

        capacity: the most rows that this rank has for one expert; 0, in and out, where that is not known. Rows beyond
        sum(counts_E) are of dropped choices, for which `combine` returns zeros.
        """
        ...

    def combine(self, y_RD: Tensor) -> Tensor:
        """The outputs of the rows that `dispatch` last brought -> the rows that this rank sent, in their order."""
        ...


class KeyValueGather(Protocol):
    """Brings the keys and values of earlier positions that other ranks of the context axis hold.

    Latent attention gathers what its keys and values are made of: the shared key, and as value the latent, with G = 1.
    """

    def gather(self, k_BGSC: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's keys and values -> those of all positions up to this rank's last."""
        ...


class LossReduce(Protocol):
    """Reductions over the ranks that share a vocabulary; `vocab_start` is the first row that this rank holds."""

    vocab_start: int

    def max(self, x: Tensor) -> Tensor: ...

    def sum(self, x: Tensor) -> Tensor: ...


class CountReduce(Protocol):
    """Sums the choices of one micro-batch over the ranks that hold parts of it."""

    def sum(self, counts_E: Tensor) -> Tensor: ...


class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, x_RD: Tensor, counts_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, int]:
        return x_RD, counts_E, capacity

    def combine(self, y_RD: Tensor) -> Tensor:
        return y_RD


class LocalKeyValueGather:
    """All positions are here."""

    def gather(self, k_BGSC: Tensor, v_BGSV: Tensor) -> tuple[Tensor, Tensor]:
        return k_BGSC, v_BGSV


class LocalLossReduce:
    """The whole vocabulary is here."""

    vocab_start = 0

    def max(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x


class LocalCountReduce:
    """The whole micro-batch is here."""

    def sum(self, counts_E: Tensor) -> Tensor:
        return counts_E
