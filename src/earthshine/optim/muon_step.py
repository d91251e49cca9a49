"""One Muon step of a group: momentum where a parameter lives, whole matrices to whoever orthogonalizes them, updates
back to where it lives. The equations are those of `optim.rules`; `optim.sharding.batches` says what goes where.

The next bucket travels, and local batches run, while a bucket is computed. A rank whose local shard of a parameter has
no gradient leaves it alone and contributes zeros to its matrices: it sends and receives all the same.

Legend: B matrices of a batch, S = min(rows, cols), L = max(rows, cols); tall matrices lie in a batch transposed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from earthshine.optim.sharding.batches import Batch, MatrixPlan, Place, Rect, Segment, Transfer
from earthshine.optim.sharding.exchange import Message
from earthshine.optim.sharding.layout import to_local


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
    group: Mapping[str, Any],
    states: Mapping[int, Mapping[str, Tensor]],
    grads: Mapping[int, Tensor],
    noises: Mapping[int, Noise] = NEAREST,
) -> StepNumbers:
    """Update the local shards of the parameters that have a gradient.

    states, grads, noises: by the parameter's index in the group; a gradient is this process's shard of it, and so are
    the elements whose rounding a noise decides (`rules.step_`).
    """
    run = _Run(plan, group, states, grads, noises)
    # One shard group after the other: ranks may share several, and each has its own communicator.
    local = plan.local
    for shard_group in plan.shard_groups:
        transfers = [t for t in plan.transfers if t.shard_group is shard_group]
        travelling = [run.send(t) for t in transfers[:1]]
        if travelling:
            for batch in local:
                run.local_batch(batch)
            local = ()
        apply: Callable[[], None] | None = None
        for number, transfer in enumerate(transfers):
            messages = travelling.pop()
            travelling += [run.send(t) for t in transfers[number + 1 : number + 2]]
            apply_next = run.orthogonalize_owned(transfer, messages)
            if apply is not None:
                apply()
            apply = apply_next
        if apply is not None:
            apply()
    for batch in local:
        run.local_batch(batch)
    run.write_back()
    return run.numbers


class _Run:
    """One step under way: two-dimensional views of the local shards of everything that has a gradient."""

    def __init__(
        self,
        plan: MatrixPlan,
        group: Mapping[str, Any],
        states: Mapping[int, Mapping[str, Tensor]],
        grads: Mapping[int, Tensor],
        noises: Mapping[int, Noise],
    ) -> None:
        self.plan, self.group, self.noises, shards = plan, group, noises, plan.shards
        self.grads = {i: shards.view2d(i, g) for i, g in grads.items()}
        self.sums = {i: shards.view2d(i, to_local(states[i]["momentum_sum"])) for i in grads}
        self.weights = {i: shards.view2d(i, shards.weight(i)) for i in grads}
        self.moments: dict[int, Tensor] = {}
        if plan.moments:
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
        for i, view in self.weights.items():
            weight = self.plan.shards.weight(i)
            if view.data_ptr() != weight.data_ptr():
                weight.copy_(view.view(weight.shape))

    def momentum(self, rects: Sequence[Rect]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """G and the new M of each of some rectangles."""
        grads, sums = [r.of(self.grads) for r in rects], [r.of(self.sums) for r in rects]
        return grads, rules.momentum_(sums, grads, self.group["momentum"], self.plan.acc_dtype)

    # ------------------------------------------------------------------------------------------------ local matrices

    def local_batch(self, batch: Batch) -> None:
        present = [(rect, place) for rect, place in batch.sources if rect.param in self.grads]
        if not present:
            return
        rects = [rect for rect, _ in present]
        grads, sums = self.momentum(rects)
        X_BSL = self._new_batch(batch, complete=len(present) == len(batch.sources))
        for (rect, place), g, m in zip(present, grads, sums, strict=True):
            X_CMN = batch.part(X_BSL, place, rect.count, rect.rows, rect.cols)
            rules.direction_(X_CMN, g, m, self.group)
        busy_B = self._flags(batch)
        if busy_B is not None:
            for (rect, place), g in zip(present, grads, strict=True):
                busy_B[place.slot : place.slot + rect.count] |= (g != 0).flatten(1).any(dim=1)
        moment_BL = self._moments(batch)
        rows = [] if moment_BL is None else [_rows(moment_BL, place, rect.count, rect.rows) for rect, place in present]
        for (rect, _), rows_CM in zip(present, rows, strict=False):
            rows_CM.copy_(rect.rows_of(self.moments))
        O_BSL = self._update(X_BSL, batch, busy_B, moment_BL)
        updates = [batch.part(O_BSL, place, rect.count, rect.rows, rect.cols) for rect, place in present]
        self._apply(rects, updates, [batch.shapes[place.slot] for _, place in present])
        for (rect, _), rows_CM in zip(present, rows, strict=False):
            rect.rows_of(self.moments).copy_(rows_CM)

    # ----------------------------------------------------------------------------------------------- spread matrices

    def send(self, t: Transfer) -> tuple[Message, Message | None]:
        """Momentum of this rank's rectangles of a bucket; directions and statistics set out for the owners."""
        present = [(rect, segment) for rect, segment in t.outgoing if rect.param in self.grads]
        grads, sums = self.momentum([rect for rect, _ in present])
        make = torch.empty if len(present) == len(t.outgoing) else torch.zeros
        buffer = make(sum(t.sends), dtype=self.plan.comm_dtype, device=self.plan.device)
        for (_, segment), g, m in zip(present, grads, sums, strict=True):
            rules.direction_(segment.of(buffer), g, m, self.group)
        stats = None
        if self.plan.flags or self.plan.moments:
            buffer_stats = torch.zeros(sum(t.stats_sends), dtype=torch.float32, device=self.plan.device)
            for (_, segment), g in zip(present, grads, strict=True) if self.plan.flags else ():
                buffer_stats[segment.stats_offset] = (g != 0).any()
            for rect, segment in t.outgoing if self.plan.moments else ():
                self._row_stats(buffer_stats, segment).copy_(rect.rows_of(self.moments)[0])
            stats = self._message(t, buffer_stats, t.stats_sends, t.stats_receives)
        return self._message(t, buffer, t.sends, t.receives), stats

    def orthogonalize_owned(self, t: Transfer, messages: tuple[Message, Message | None]) -> Callable[[], None]:
        """Orthogonalize what arrives here and send it back; the result applies what comes back to this rank."""
        arrived, stats = messages[0].wait(), messages[1].wait() if messages[1] is not None else None
        back = torch.empty_like(arrived)
        for batch in t.owned:
            self._owned_batch(batch, arrived, stats, back)
        returned = self._message(t, back, t.receives, t.sends)
        moments = None
        if stats is not None and self.plan.moments:
            moments = self._message(t, stats, t.stats_receives, t.stats_sends)

        def apply() -> None:
            update, rows = returned.wait(), moments.wait() if moments is not None else None
            present = [(rect, segment) for rect, segment in t.outgoing if rect.param in self.grads]
            shapes = [segment.shape for _, segment in present]
            self._apply([rect for rect, _ in present], [segment.of(update) for _, segment in present], shapes)
            if rows is not None:
                for rect, segment in t.outgoing:
                    rect.rows_of(self.moments)[0] = self._row_stats(rows, segment)

        return apply

    def _owned_batch(self, batch: Batch, arrived: Tensor, stats: Tensor | None, back: Tensor) -> None:
        """Matrices that arrived in pieces; `stats` then holds their new statistics, `back` their updates."""
        X_BSL, busy_B, moment_BL = self._new_batch(batch, complete=True), self._flags(batch), self._moments(batch)
        for segment, place in batch.sources:
            batch.part(X_BSL, place, 1, segment.rows, segment.cols).copy_(segment.of(arrived))
            if busy_B is not None and stats is not None:
                busy_B[place.slot] |= stats[segment.stats_offset] > 0
            if moment_BL is not None and stats is not None:
                _rows(moment_BL, place, 1, segment.rows)[0] = self._row_stats(stats, segment)
        O_BSL = self._update(X_BSL, batch, busy_B, moment_BL)
        for segment, place in batch.sources:
            segment.of(back).copy_(batch.part(O_BSL, place, 1, segment.rows, segment.cols))
            if moment_BL is not None and stats is not None:
                self._row_stats(stats, segment).copy_(_rows(moment_BL, place, 1, segment.rows)[0])

    def _row_stats(self, stats: Tensor, segment: Segment) -> Tensor:
        start = segment.stats_offset + int(self.plan.flags)
        return stats[start : start + segment.rows]

    def _message(self, t: Transfer, buffer: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Message:
        message = Message(t.shard_group.ranks, buffer, sends, receives, t.shard_group.position)
        self.numbers.sent["orthogonalize"] += message.bytes_sent
        return message

    # ----------------------------------------------------------------------------------------- what both have in common

    def _new_batch(self, batch: Batch, complete: bool) -> Tensor:
        """A matrix that nothing fills, because its parameter has no gradient, is zero."""
        make = torch.empty if complete else torch.zeros
        return make(batch.size, dtype=self.plan.acc_dtype, device=self.plan.device)

    def _flags(self, batch: Batch) -> Tensor | None:
        """Per matrix whether any holder's gradient is anything but zero; None where nobody asks."""
        return torch.zeros(len(batch.shapes), dtype=torch.bool, device=self.plan.device) if self.plan.flags else None

    def _moments(self, batch: Batch) -> Tensor | None:
        """NorMuon's second moment per row, from the left, of each matrix; None without NorMuon."""
        if not self.plan.moments:
            return None
        return torch.zeros(batch.size[0], batch.size[2], dtype=torch.float32, device=self.plan.device)

    def _update(self, X_BSL: Tensor, batch: Batch, busy_B: Tensor | None, moment_BL: Tensor | None) -> Tensor:
        """The updates before their scale, and their norms; new values into `moment`. May overwrite X."""
        if self.group["norm"] == "spectral":
            self.numbers.flops += sum(self.plan.cost(M, N) for M, N in batch.shapes)
        O_BSL = rules.update(X_BSL, batch.by_shape(), self.group, self.plan.ns_dtype, busy_B, moment_BL, self.stopwatch)
        norms_B = torch.linalg.vector_norm(O_BSL, dim=(1, 2), dtype=self.plan.acc_dtype)
        self.norms.append((norms_B, [(rules.scale(self.group, M, N), M * N) for M, N in batch.shapes]))
        return O_BSL

    def _apply(self, rects: Sequence[Rect], updates: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> None:
        """W <- W - lr wd W - lr s O, those of one scale s together."""
        lr = float(self.group["lr"])
        by_scale: dict[float, tuple[list[Tensor], list[Tensor], list[Noise | None]]] = {}
        for rect, update, shape in zip(rects, updates, shapes, strict=True):
            weights, changes, noises = by_scale.setdefault(rules.scale(self.group, *shape), ([], [], []))
            weights.append(rect.of(self.weights))
            changes.append(update)
            noises.append(rect.noise(self.noises))
        for scale, (weights, changes, noises) in by_scale.items():
            decay, cautious = lr * self.group["weight_decay"], self.group["cautious_weight_decay"]
            rules.step_(weights, changes, lr * scale, decay, cautious, noises)


def _rows(moment_BL: Tensor, place: Place, count: int, rows: int) -> Tensor:
    """One value per row of the rectangles at a place, [count, rows], the same memory."""
    return moment_BL.narrow(0, place.slot, count).narrow(1, place.row, rows)


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
