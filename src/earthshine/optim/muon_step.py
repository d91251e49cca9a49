"""One Muon step of a group: momentum where a parameter lives, whole matrices to whoever orthogonalizes them, updates
back to where it lives. The equations are those of `optim.rules`; `optim.sharding.batches` says what goes where.

The next bucket travels, and local batches run, while a bucket is computed. A rank whose local shard of a parameter has
no gradient leaves it alone and contributes zeros to its matrices: it sends and receives all the same.

Legend: B matrices of a batch, S = min(rows, cols), L = max(rows, cols); tall matrices lie in a batch transposed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from earthshine.device import Stopwatch
from earthshine.optim import rules
from earthshine.optim.group_step import GroupStep, StepNumbers
from earthshine.optim.logical_matrices import Spec
from earthshine.optim.measure import Measure
from earthshine.optim.rounding import NEAREST, Noise
from earthshine.optim.sharding import traffic
from earthshine.optim.sharding.batches import Batch, MatrixPlan, Transfer
from earthshine.optim.sharding.exchange import Message
from earthshine.optim.sharding.layout import to_local
from earthshine.optim.sharding.pieces import Piece


class MuonStep(GroupStep):
    """Muon on the logical matrices of a group. Raises ConfigError for layouts and options that it cannot serve."""

    algorithm = "muon"
    per_row = ("row_second_moment",)

    def __init__(self, group: Mapping[str, Any], process_group: Any, reduce_gradients: bool, bucket_bytes: int) -> None:
        super().__init__(group, process_group, reduce_gradients, bucket_bytes)
        self._plan = MatrixPlan(group, self.shards, bucket_bytes)

    def _specs(self) -> list[Spec]:
        return list(self.group["matrices"])

    def _state_keys(self) -> tuple[str, ...]:
        keys = ("momentum_sum", *self.per_row) if self.group["normuon_beta2"] else ("momentum_sum",)
        return (*keys, "step") if self._stochastic else keys

    def predicted_bytes(self) -> dict[str, int]:
        return super().predicted_bytes() | {"orthogonalize": traffic.of_matrices(self._plan)}

    def step(
        self, options: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> StepNumbers:
        numbers = step_matrices(self._plan, options, states, grads, self._noises(states, grads))
        self._count_step(states, grads)
        return numbers


def step_matrices(
    plan: MatrixPlan,
    options: Mapping[str, Any],
    states: Mapping[int, Mapping[str, Tensor]],
    grads: Mapping[int, Tensor],
    noises: Mapping[int, Noise] = NEAREST,
) -> StepNumbers:
    """Update the local shards of the parameters that have a gradient.

    options: the group's. states, grads, noises: by the parameter's index in the group; a gradient is this process's
    shard of it, and so are the elements whose rounding a noise decides (`rules.step_`).
    """
    step = _Step(plan, options, states, grads, noises)
    # One shard group after the other: ranks may share several, and each has its own communicator.
    local = plan.local
    for shard_group in plan.shard_groups:
        transfers = [t for t in plan.transfers if t.shard_group is shard_group]
        in_flight = [step.send(t) for t in transfers[:1]]
        if in_flight:
            for batch in local:
                step.local_batch(batch)
            local = ()
        apply: Callable[[], None] | None = None
        for n, transfer in enumerate(transfers):
            messages = in_flight.pop()
            in_flight += [step.send(t) for t in transfers[n + 1 : n + 2]]
            apply_next = step.orthogonalize_owned(transfer, messages)
            if apply is not None:
                apply()
            apply = apply_next
        if apply is not None:
            apply()
    for batch in local:
        step.local_batch(batch)
    step.write_back()
    return step.numbers


class _Step:
    """One step under way, on two-dimensional views of the local shards of all parameters that have a gradient."""

    def __init__(
        self,
        plan: MatrixPlan,
        options: Mapping[str, Any],
        states: Mapping[int, Mapping[str, Tensor]],
        grads: Mapping[int, Tensor],
        noises: Mapping[int, Noise],
    ) -> None:
        self.plan, self.options, self.noises, shards = plan, options, noises, plan.shards
        self.grads = {i: shards.view2d(i, g) for i, g in grads.items()}
        self.sums = {i: shards.view2d(i, to_local(states[i]["momentum_sum"])) for i in grads}
        self.local_weights = {i: shards.weight(i) for i in grads}
        self.weights = {i: shards.view2d(i, weight) for i, weight in self.local_weights.items()}
        self.moments: dict[int, Tensor] = {}
        if plan.normuon:
            # Of every parameter: copies of a row's moment must stay alike where only some holders have a gradient.
            rows = {i: to_local(state["row_second_moment"]) for i, state in states.items()}
            self.moments = {i: shards.view2d(i, v, per_row=True) for i, v in rows.items()}
        # Per batch, the Frobenius norm of each matrix's update, and (scale, elements) of each.
        self.norms: list[tuple[Tensor, list[tuple[float, int]]]] = []
        self.stopwatch = stopwatch = Stopwatch(plan.device)
        self.numbers = StepNumbers(
            "muon",
            measure=partial(_measure, self.norms),
            sent={"orthogonalize": 0},
            seconds=lambda: stopwatch.seconds,
            imbalance=plan.imbalance,
        )

    def write_back(self) -> None:
        """Weights whose local shard cannot be seen as rows and columns in place were updated in a copy."""
        for view, weight in zip(self.weights.values(), self.local_weights.values(), strict=True):
            if view.data_ptr() != weight.data_ptr():
                weight.copy_(view.view(weight.shape))

    def momentum(self, pieces: Sequence[Piece]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """G and the new M of each of some pieces."""
        grads, sums = [p.of(self.grads) for p in pieces], [p.of(self.sums) for p in pieces]
        return grads, rules.momentum_(sums, grads, self.options["momentum"], self.plan.acc_dtype)

    # ------------------------------------------------------------------------------------------------ local matrices

    def local_batch(self, batch: Batch) -> None:
        present = [(piece, slot) for piece, slot in batch.sources if piece.param in self.grads]
        if not present:
            return
        pieces = [piece for piece, _ in present]
        grads, sums = self.momentum(pieces)
        X_BSL = self._new_batch(batch, complete=len(present) == len(batch.sources))
        for (piece, slot), g, m in zip(present, grads, sums, strict=True):
            rules.direction_(piece.in_batch(X_BSL, slot), g, m, self.options)
        busy_B = self._new_busy(batch)
        if busy_B is not None:
            for (piece, slot), g in zip(present, grads, strict=True):
                busy_B[slot : slot + piece.count] |= (g != 0).flatten(1).any(dim=1)
        v_BL = self._new_moments(batch)
        rows = [] if v_BL is None else [piece.rows_in_batch(v_BL, slot) for piece, slot in present]
        for piece, rows_CR in zip(pieces, rows, strict=False):
            rows_CR.copy_(piece.rows_of(self.moments))
        O_BSL = self._update(X_BSL, batch, busy_B, v_BL)
        self._apply(pieces, [piece.in_batch(O_BSL, slot) for piece, slot in present])
        for piece, rows_CR in zip(pieces, rows, strict=False):
            piece.rows_of(self.moments).copy_(rows_CR)

    # ----------------------------------------------------------------------------------------------- spread matrices

    def send(self, t: Transfer) -> tuple[Message, Message | None]:
        """Momentum of this rank's pieces of a bucket; directions and statistics set out for the owners."""
        present = [piece.param in self.grads for piece in t.outgoing]
        grads, sums = self.momentum(list(compress(t.outgoing, present)))
        make = torch.empty if all(present) else torch.zeros
        buffer = make(sum(t.sends), dtype=self.plan.comm_dtype, device=self.plan.device)
        for out, g, m in zip(compress(_split(buffer, t.outgoing), present), grads, sums, strict=True):
            rules.direction_(out, g, m, self.options)
        stats = None
        if self.plan.skip_idle or self.plan.normuon:
            stats_buffer = torch.zeros(sum(t.stats_sends), dtype=torch.float32, device=self.plan.device)
            of_each = self._split_stats(stats_buffer, t.outgoing)
            for stats_of_piece, g in zip(compress(of_each, present), grads, strict=True) if self.plan.skip_idle else ():
                stats_of_piece[0] = (g != 0).any()
            for piece, stats_of_piece in zip(t.outgoing, of_each, strict=True) if self.plan.normuon else ():
                self._rows(stats_of_piece).copy_(piece.rows_of(self.moments)[0])
            stats = self._message(t, stats_buffer, t.stats_sends, t.stats_receives)
        return self._message(t, buffer, t.sends, t.receives), stats

    def orthogonalize_owned(self, t: Transfer, messages: tuple[Message, Message | None]) -> Callable[[], None]:
        """Orthogonalize what arrives and send it back; the result applies what comes back to this rank."""
        arrived, stats = messages[0].wait(), messages[1].wait() if messages[1] is not None else None
        back = torch.empty_like(arrived)
        pieces, updates = _split(arrived, t.incoming), _split(back, t.incoming)
        stats_of = self._split_stats(stats, t.incoming) if stats is not None else []
        for batch, indices in t.owned:
            received = [pieces[n] for n in indices]
            returning = [updates[n] for n in indices]
            self._owned_batch(batch, received, [stats_of[n] for n in indices if stats_of], returning)
        returned = self._message(t, back, t.receives, t.sends)
        moments = None
        if stats is not None and self.plan.normuon:
            moments = self._message(t, stats, t.stats_receives, t.stats_sends)

        def apply() -> None:
            update, rows = returned.wait(), moments.wait() if moments is not None else None
            present = [piece.param in self.grads for piece in t.outgoing]
            self._apply(list(compress(t.outgoing, present)), list(compress(_split(update, t.outgoing), present)))
            if rows is not None:
                for piece, stats_of_piece in zip(t.outgoing, self._split_stats(rows, t.outgoing), strict=True):
                    piece.rows_of(self.moments)[0] = self._rows(stats_of_piece)

        return apply

    def _owned_batch(
        self, batch: Batch, received: Sequence[Tensor], stats: Sequence[Tensor], returning: Sequence[Tensor]
    ) -> None:
        """Matrices that arrived in pieces; `stats` then holds their new statistics, `returning` their updates."""
        X_BSL, busy_B, v_BL = self._new_batch(batch, complete=True), self._new_busy(batch), self._new_moments(batch)
        for (piece, slot), part in zip(batch.sources, received, strict=True):
            piece.in_batch(X_BSL, slot).copy_(part)
        for (piece, slot), stats_of_piece in zip(batch.sources, stats, strict=False):
            if busy_B is not None:
                busy_B[slot] |= stats_of_piece[0] > 0
            if v_BL is not None:
                piece.rows_in_batch(v_BL, slot)[0] = self._rows(stats_of_piece)
        O_BSL = self._update(X_BSL, batch, busy_B, v_BL)
        for (piece, slot), part in zip(batch.sources, returning, strict=True):
            part.copy_(piece.in_batch(O_BSL, slot))
        for (piece, slot), stats_of_piece in zip(batch.sources, stats, strict=False):
            if v_BL is not None:
                self._rows(stats_of_piece).copy_(piece.rows_in_batch(v_BL, slot)[0])

    def _split_stats(self, stats: Tensor, pieces: Sequence[Piece]) -> Sequence[Tensor]:
        """The statistics of each piece: with skip_idle whether it is busy, with NorMuon a second moment per row."""
        parts: Sequence[Tensor] = stats.split([self.plan.num_stats(piece) for piece in pieces])
        return parts

    def _rows(self, stats_of_piece: Tensor) -> Tensor:
        return stats_of_piece[int(self.plan.skip_idle) :]

    def _message(self, t: Transfer, buffer: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Message:
        message = Message(t.shard_group.ranks, buffer, sends, receives, t.shard_group.position)
        self.numbers.sent["orthogonalize"] += message.bytes_sent
        return message

    # --------------------------------------------------------------------------------------------------- of both kinds

    def _new_batch(self, batch: Batch, complete: bool) -> Tensor:
        """Matrices to be filled. One that nothing fills, because its parameter has no gradient, is zero."""
        make = torch.empty if complete else torch.zeros
        return make(batch.size, dtype=self.plan.acc_dtype, device=self.plan.device)

    def _new_busy(self, batch: Batch) -> Tensor | None:
        """Whether any element of each matrix's gradient is not zero, False so far; None without skip_idle."""
        return (
            torch.zeros(len(batch.shapes), dtype=torch.bool, device=self.plan.device) if self.plan.skip_idle else None
        )

    def _new_moments(self, batch: Batch) -> Tensor | None:
        """NorMuon's second moment, of M rows from the left in each matrix, zeros so far; None without NorMuon."""
        if not self.plan.normuon:
            return None
        return torch.zeros(batch.size[0], batch.size[2], dtype=torch.float32, device=self.plan.device)

    def _update(self, X_BSL: Tensor, batch: Batch, busy_B: Tensor | None, v_BL: Tensor | None) -> Tensor:
        """The updates before their scale, whose norms are noted; the new second moments into v. May overwrite X."""
        if self.options["norm"] == "spectral":
            self.numbers.flops += sum(self.plan.cost(M, N) for M, N in batch.shapes)
        O_BSL = rules.update(X_BSL, batch.by_shape(), self.options, self.plan.ns_dtype, busy_B, v_BL, self.stopwatch)
        norms_B = torch.linalg.vector_norm(O_BSL, dim=(1, 2), dtype=self.plan.acc_dtype)
        self.norms.append((norms_B, [(rules.scale(self.options, M, N), M * N) for M, N in batch.shapes]))
        return O_BSL

    def _apply(self, pieces: Sequence[Piece], updates: Sequence[Tensor]) -> None:
        """W <- W - lr wd W - lr s O, those of one scale s together."""
        lr = float(self.options["lr"])
        by_scale: dict[float, tuple[list[Tensor], list[Tensor], list[Noise | None]]] = {}
        for piece, update in zip(pieces, updates, strict=True):
            scale = rules.scale(self.options, *piece.matrix)
            weights, changes, noises = by_scale.setdefault(scale, ([], [], []))
            weights.append(piece.of(self.weights))
            changes.append(update)
            noises.append(piece.noise(self.noises))
        for scale, (weights, changes, noises) in by_scale.items():
            decay, cautious = lr * self.options["weight_decay"], self.options["cautious_weight_decay"]
            rules.step_(weights, changes, lr * scale, decay, cautious, noises)


def _split(message: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """The pieces of a message, [1, rows, cols] each, the same memory."""
    parts = message.split([piece.numel for piece in pieces])
    return [part.view(1, *piece.size) for part, piece in zip(parts, pieces, strict=True)]


def _measure(norms: Sequence[tuple[Tensor, Sequence[tuple[float, int]]]]) -> Measure:
    """A matrix whose update is zero, as that of one without a gradient, is not counted."""

    def total(values: Sequence[Sequence[float]]) -> tuple[float, int]:
        squares, elements = 0.0, 0
        for of_batch, (_, of_each) in zip(values, norms, strict=True):
            for norm, (scale, size) in zip(of_batch, of_each, strict=True):
                if norm != 0:
                    squares, elements = squares + (norm * scale) ** 2, elements + size
        return squares, elements

    return Measure([norms_B for norms_B, _ in norms], total)
