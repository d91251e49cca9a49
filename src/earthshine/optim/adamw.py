"""torch's AdamW on the local shards of a group, and the size of its last update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from earthshine.device import at_least_float32_dtype
from earthshine.optim import rules
from earthshine.optim.group_step import GroupStep, StepNumbers
from earthshine.optim.measure import Measure
from earthshine.optim.rounding import write_
from earthshine.optim.sharding.layout import to_local

# The fused CPU kernel computes what fills whole vectors with fused multiply-adds and the rest of a tensor without: an
# element's bits would depend on where a shard ends. No vector is longer (16 fp32 of AVX-512, two at a time for bf16).
_VECTOR = 32
# Elements of the moments looked at together when the update is measured: on an accelerator this bounds memory, and a
# kernel for every few of them would take longer than the step; on a CPU they stay in the cache.
_STATS_ELEMENTS = 1 << 26
_CPU_STATS_ELEMENTS = 1 << 18


class AdamWStep(GroupStep):
    """Equation and order of operations are torch.optim.AdamW's (arXiv:1711.05101, algorithm 2).

    Moments are at least fp32, and so is the arithmetic: in fp16 the second moment of gradients below 1e-4 is zero.
    """

    algorithm = "adamw"

    def _state_keys(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "step")

    def step(
        self, options: Mapping[str, Any], states: Mapping[int, Mapping[str, Tensor]], grads: Mapping[int, Tensor]
    ) -> StepNumbers:
        shards, noises = self.shards, self._noises(states, grads)
        members = sorted(grads)
        weights = [shards.weight(i) for i in members]
        moments = [[to_local(states[i][key]) for i in members] for key in ("exp_avg", "exp_avg_sq")]
        steps = [states[i]["step"] for i in members]
        rows = list(zip(weights, [grads[i] for i in members], *moments, steps, strict=True))
        _update([row for row in rows if row[0].dtype.itemsize >= 4], options)
        for i, (weight, *row) in zip(members, rows, strict=True):
            if weight.dtype.itemsize < 4:  # one at a time: the copy is twice its size
                exact = weight.to(at_least_float32_dtype(weight.dtype))
                _update([(exact, *row)], options)
                write_(weight, exact, noises.get(i))
        betas, eps = options["betas"], options["eps"]

        def measure() -> Measure:
            steps_done = [float(states[i]["step"]) for i in members]  # kept on the CPU: nothing waits
            norms = [
                _piece_norms(m, v, step, betas, eps)
                for m, v, step in zip(moments[0], moments[1], steps_done, strict=True)
            ]

            def total(values: Sequence[Sequence[float]]) -> tuple[float, int]:
                squares = (
                    sum(norm**2 for norm in of_pieces) / (1 - betas[0] ** step) ** 2
                    for of_pieces, step in zip(values, steps_done, strict=True)
                )
                return sum(squares), sum(w.numel() for w in weights)

            return Measure(norms, total)

        return StepNumbers(self.algorithm, measure)


def _update(rows: Sequence[Sequence[Tensor]], group: Mapping[str, Any]) -> None:
    """One step of (weight, gradient, first and second moment, step count) each, in place."""
    if not rows:
        return
    weights = [row[0] for row in rows]
    before = [w.clone() for w in weights] if group["cautious_weight_decay"] else []
    columns = [weights, [g.to(w.dtype) for w, g, *_ in rows], [row[2] for row in rows], [row[3] for row in rows]]
    steps = [row[4] for row in rows]
    # The fused kernel reads and writes everything once; on a CPU torch's default is one loop per operation.
    fused = all(w.is_cpu and w.is_floating_point() for w in weights)
    pieces, piece_steps, copies = _whole_vectors(columns, steps) if fused else (columns, steps, [])
    adamw(
        pieces[0],
        pieces[1],
        pieces[2],
        pieces[3],
        [],
        piece_steps,
        foreach=not fused,
        fused=fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=0.0 if before else group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for tensor, copy in copies:
        tensor.copy_(copy.view(-1)[: tensor.numel()].view(tensor.shape))
    for w, old, m in zip(weights, before, columns[2], strict=False):
        # The update has the first moment's signs. What decay takes off is the same before and after the update.
        decayed = old.clone()
        rules.decay_([decayed], [m], float(group["lr"]) * group["weight_decay"], cautious=True)
        w.add_(decayed.sub_(old))


def _whole_vectors(
    columns: list[list[Tensor]], steps: list[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The same lists in pieces that the kernel may take: contiguous, and a tensor's last few elements in a copy filled
    up with zeros to a whole vector.

    The kernel walks through memory, whatever the strides: tensors in another order are copied. Returns the pieces, a
    step count of each, and (tensor, copy) of what has to be copied back.
    """
    pieces: list[list[Tensor]] = [[] for _ in columns]
    piece_steps: list[Tensor] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for row in zip(*columns, steps, strict=True):
        *tensors, step = row
        ordered = [t.contiguous() for t in tensors]
        copies += [(t, o) for k, (t, o) in enumerate(zip(tensors, ordered, strict=True)) if k != 1 and o is not t]
        whole = tensors[0].numel() - tensors[0].numel() % _VECTOR
        tails = [t.view(-1)[whole:] for t in ordered]
        padded = [tail.new_zeros(_VECTOR) for tail in tails] if len(tails[0]) else []
        for k, (piece, t) in enumerate(zip(pieces, ordered, strict=True)):
            piece.append(t.view(-1)[:whole])
            if padded:
                padded[k][: len(tails[k])] = tails[k]
                piece.append(padded[k])
                if k != 1:  # all but the gradient
                    copies.insert(0, (tails[k], padded[k]))  # before the copy that it is a part of
        piece_steps += [step, step.clone()] if padded else [step]  # each piece counts its own
    return pieces, piece_steps, copies


def _piece_norms(m: Tensor, v: Tensor, step: float, betas: tuple[float, float], eps: float) -> Tensor:
    """Norms of pieces of m / (sqrt(v_hat) + eps), from the moments after a step: the update, without the correction of
    the first moment.
    """
    root = (1 - betas[1] ** step) ** 0.5
    size = _CPU_STATS_ELEMENTS if m.is_cpu else _STATS_ELEMENTS
    norms = []
    for part_m, part_v in zip(m.reshape(-1).split(size), v.reshape(-1).split(size), strict=True):
        update = part_m / (part_v.sqrt().div_(root).add_(eps))
        norms.append(torch.linalg.vector_norm(update, dtype=at_least_float32_dtype(update.dtype)))
    return torch.stack(norms)
