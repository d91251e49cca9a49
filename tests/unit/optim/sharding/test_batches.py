"""The plan of a Muon group without processes: what lies in which batch, what every message holds, and whole steps of
several positions whose messages travel between threads."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from earthshine.optim import muon_step
from earthshine.optim.logical_matrices import LogicalMatrix, Spec, logical_matrices, view_shape
from earthshine.optim.muon_step import step_matrices
from earthshine.optim.ranges import Ranges
from earthshine.optim.sharding import batches, traffic
from earthshine.optim.sharding.batches import Batch, MatrixPlan
from earthshine.optim.sharding.layout import Layout, _spread
from earthshine.optim.sharding.zero1 import partition_rows

Cuts = tuple[tuple[int, int, int], ...]  # degree, dimension, split of each sharded mesh dimension
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "update_rms": 0.2,
    "scale": "match_rms_adamw",
    "exact_rms": False,
    "norm": "spectral",
    "ns_coefficients": "keller5",
    "ns_steps": 5,
    "ns_dtype": "float32",
    "ns_form": "standard",
    "ns_compile": False,
    "normuon_beta2": 0.0,
    "cautious_weight_decay": False,
    "skip_idle": False,
    "comm_dtype": "auto",
}


@pytest.fixture
def agreements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What positions would have compared."""
    found: list[str] = []
    monkeypatch.setattr(batches, "check_agreement", lambda ranks, fingerprint, device: found.append(fingerprint))
    return found


class Held:
    """Stands for `LocalShards`: what one position holds, as rows and columns."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], layouts: Sequence[Layout], dtype: torch.dtype) -> None:
        self.params = [torch.empty(shape, dtype=dtype) for shape in shapes]
        self._layouts, self.names = list(layouts), [f"p{i}" for i in range(len(shapes))]
        self.weights: dict[int, Tensor] = {}

    def weight(self, i: int) -> Tensor:
        return self.weights[i]

    def layout(self, i: int) -> Layout:
        return self._layouts[i]

    def view2d(self, i: int, share: Tensor, per_row: bool = False) -> Tensor:
        return share


def plan_of(
    shapes: Sequence[tuple[int, ...]],
    specs: Sequence[Spec],
    layouts: Sequence[Layout],
    bucket_bytes: int = 1 << 20,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> MatrixPlan:
    shards: Any = Held(shapes, layouts, dtype)
    return MatrixPlan(OPTIONS | {"matrices": tuple(specs)} | options, shards, bucket_bytes)


def whole(shape: tuple[int, ...], spec: Spec) -> Layout:
    rows, cols = view_shape(shape, spec)
    return Layout((rows, cols), (0,), 0, (((0, rows),),), (((0, cols),),))


def indices(ranges: Ranges) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


def held_by(view: Tensor, layout: Layout, position: int) -> Tensor:
    return view[indices(layout.rows[position])][:, indices(layout.cols[position])].contiguous()


def cut_out(view: Tensor, matrix: LogicalMatrix) -> Tensor:
    return view[indices(matrix.rows)][:, slice(*matrix.cols, matrix.step)]


# ------------------------------------------------------------------------------------------------- one process: batches

SHAPES: list[tuple[int, ...]] = [(6, 4), (4, 6), (3, 4, 6), (10, 4), (4, 16), (12, 6), (6, 2, 2), (1, 6), (0, 4)]
SHAPES += [(2, 4, 6)]
SPECS: list[Spec] = [
    ("matrix",),
    ("matrix",),
    ("batch",),
    ("rows", (6, 4)),
    ("cols", (6, 10)),
    ("interleaved", 2, (4, 2)),
    ("flatten", 1),
    ("matrix",),
    ("matrix",),
    ("interleaved_cols", 3),
]


@pytest.mark.parametrize("capacity", [1, 2, 3, 100])
def test_every_element_is_in_one_piece_and_every_matrix_in_a_batch_of_its_sides(
    monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    monkeypatch.setattr(batches, "matrices_per_batch", lambda *_: capacity)
    layouts = [whole(shape, spec) for shape, spec in zip(SHAPES, SPECS, strict=True)]
    plan = plan_of(SHAPES, SPECS, layouts)
    assert (plan.transfers, traffic.of_matrices(plan), plan.imbalance) == ((), 0, 1.0)
    counts = {i: torch.zeros(layout.view) for i, layout in enumerate(layouts)}
    numbers = {i: torch.arange(float(c.numel())).view(c.shape) + 1000 * i for i, c in counts.items()}
    found: list[Tensor] = []
    for batch in plan.local:
        B, S, L = batch.size
        assert 1 <= B <= capacity
        assert {(min(shape), max(shape)) for shape in batch.shapes} == {(S, L)}
        X_BSL = torch.full(batch.size, -1.0)
        for piece, slot in batch.sources:
            piece.of(counts).add_(1)
            target = piece.in_batch(X_BSL, slot)
            assert (target == -1).all()
            target.copy_(piece.of(numbers))
        assert (X_BSL >= 0).all()
        found += [X.mT if M > N else X for X, (M, N) in zip(X_BSL, batch.shapes, strict=True)]
    assert all((c == 1).all() for c in counts.values())
    expected = [
        cut_out(numbers[i], matrix)
        for i, (shape, spec) in enumerate(zip(SHAPES, SPECS, strict=True))
        for matrix in logical_matrices(shape, spec)
    ]
    # In any order, and bits and pieces where they belong.
    assert sorted(x.tolist() for x in found) == sorted(x.tolist() for x in expected)
    sides = {(min(e.shape), max(e.shape)) for e in expected}
    per_sides = {s: sum((min(e.shape), max(e.shape)) == s for e in expected) for s in sides}
    assert len(plan.local) == sum(-(-n // capacity) for n in per_sides.values())  # no batch more than needed


def test_neighbors_in_a_stack_are_one_piece_up_to_the_end_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "matrices_per_batch", lambda *_: 4)
    shapes, specs = [(3, 4, 6), (6, 4), (4, 4, 6)], [("batch",), ("matrix",), ("batch",)]
    plan = plan_of(shapes, specs, [whole(s, spec) for s, spec in zip(shapes, specs, strict=True)])
    got = [[(p.param, p.local, p.size, p.count, slot) for p, slot in batch.sources] for batch in plan.local]
    assert got == [
        [(0, (0, 0), (4, 6), 3, 0), (1, (0, 0), (6, 4), 1, 3)],
        [(2, (0, 0), (4, 6), 4, 0)],
    ]


@pytest.mark.parametrize(
    ("options", "dtype", "comm_dtype"),
    [
        ({}, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.float32),
        ({}, torch.float64, torch.float64),
        ({"ns_dtype": "bfloat16"}, torch.float32, torch.bfloat16),
        ({"ns_dtype": "bfloat16", "comm_dtype": "float32"}, torch.float32, torch.float32),
        ({"comm_dtype": "bfloat16"}, torch.float32, torch.bfloat16),
    ],
)
def test_what_travels_is_no_less_than_newton_schulz_works_in(
    options: dict[str, Any], dtype: torch.dtype, comm_dtype: torch.dtype
) -> None:
    plan = plan_of([(4, 6)], [("matrix",)], [whole((4, 6), ("matrix",))], dtype=dtype, **options)
    assert plan.comm_dtype == comm_dtype


# ------------------------------------------------------------------------------------------ several: mirrored messages


@dataclass(frozen=True)
class Case:
    shapes: list[tuple[int, ...]]
    specs: list[Spec]
    layouts: Callable[[int], list[Layout]]  # by position
    ranks: tuple[int, ...]

    def plans(self, bucket_bytes: int, **options: Any) -> list[MatrixPlan]:
        return [
            plan_of(self.shapes, self.specs, self.layouts(position), bucket_bytes, **options)
            for position in range(len(self.ranks))
        ]


def sharded(parameters: Sequence[tuple[tuple[int, ...], Spec, Cuts]], ranks: tuple[int, ...]) -> Case:
    def layouts(position: int) -> list[Layout]:
        found = []
        for shape, spec, cuts in parameters:
            rows, cols, _ = _spread(shape, spec[0] == "flatten", cuts)
            found.append(Layout(view_shape(shape, spec), ranks, position, rows, cols))
        return found

    return Case([p[0] for p in parameters], [p[1] for p in parameters], layouts, ranks)


def zero1(parameters: Sequence[tuple[tuple[int, ...], Spec]], ranks: tuple[int, ...]) -> Case:
    shapes, specs = [s for s, _ in parameters], [spec for _, spec in parameters]
    views = [view_shape(s, spec) for s, spec in parameters]
    return Case(shapes, specs, lambda position: partition_rows(views, ranks, position), ranks)


KINDS: dict[Spec, tuple[int, ...]] = {
    ("matrix",): (7, 5),
    ("rows", (2, 4)): (3, 6, 4),
    ("cols", (3, 1)): (2, 3, 4),
    ("heads", 2, (1, 2)): (6, 4),
    ("interleaved", 3, (2, 1)): (9, 4),
    ("batch",): (5, 3, 4),
    ("flatten", 2): (6, 2, 3),
}


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[Spec] = tuple(KINDS)) -> Case:
    """Some parameters on one mesh of up to two dimensions, or divided by ZeRO-1; ranks in any order."""
    specs = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=4))
    if draw(st.booleans()):
        ranks = tuple(range(draw(st.integers(2, 4))))
        return zero1([(KINDS[s], s) for s in specs], ranks)
    degrees = draw(st.sampled_from([(2,), (3,), (2, 2)]))
    parameters = []
    for spec in specs:
        shape = KINDS[spec]
        dim, split = st.integers(0, len(shape) - 1), st.sampled_from([1, 1, 2])
        parameters.append((shape, spec, tuple((degree, draw(dim), draw(split)) for degree in degrees)))
    size = 4 if len(degrees) == 2 else degrees[0]
    ranks = draw(st.permutations(range(size)))  # of a mesh that does not count upwards
    return sharded(parameters, tuple(ranks))


MONKEYPATCHED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(MONKEYPATCHED, max_examples=60)
@given(
    case=cases(),
    bucket_bytes=st.sampled_from([1, 150, 1 << 20]),
    options=st.sampled_from(
        [{}, {"skip_idle": True}, {"normuon_beta2": 0.9}, {"skip_idle": True, "normuon_beta2": 0.9}]
    ),
)
def test_what_one_position_sends_is_what_the_other_expects(
    agreements: list[str], case: Case, bucket_bytes: int, options: dict[str, Any]
) -> None:
    """Every element of every matrix goes to one place, and all positions have the same messages in mind."""
    agreements.clear()
    if options.get("normuon_beta2") and any(spec[0] == "cols" for spec in case.specs):
        options = {}
    plans = case.plans(bucket_bytes, **options)
    N = len(case.ranks)
    assert len(set(agreements)) == len({len(plan.transfers) for plan in plans}) == 1
    order = sorted(range(N), key=lambda k: case.ranks[k])
    full = [
        torch.arange(float(torch.Size(s).numel())).view(view_shape(s, spec)) + 1000 * i
        for i, (s, spec) in enumerate(zip(case.shapes, case.specs, strict=True))
    ]
    layouts = case.layouts(0)
    local = [{i: held_by(v, layouts[i], k) for i, v in enumerate(full)} for k in range(N)]
    touched = [{i: torch.zeros_like(v) for i, v in mine.items()} for mine in local]
    matrices: list[Tensor] = []
    for k, plan in enumerate(plans):
        for batch in plan.local:
            X_BSL = torch.full(batch.size, -1.0)
            for piece, slot in batch.sources:
                piece.of(touched[k]).add_(1)
                piece.in_batch(X_BSL, slot).copy_(piece.of(local[k]))
            matrices += upright(batch, X_BSL)
    bytes_sent = [0] * N
    for number in range(len(plans[0].transfers)):
        transfers = [plan.transfers[number] for plan in plans]
        outgoing = []
        for k, t in enumerate(transfers):
            for piece in t.outgoing:
                piece.of(touched[k]).add_(1)
            message = torch.cat([torch.empty(0), *(piece.of(local[k]).flatten() for piece in t.outgoing)])
            assert len(message) == sum(t.sends)
            outgoing.append(dict(zip(order, message.split([t.sends[j] for j in order]), strict=True)))
        for a in range(N):
            for b in range(N):
                assert transfers[a].sends[b] == transfers[b].receives[a]
                assert transfers[a].stats_sends[b] == transfers[b].stats_receives[a]
        for k, t in enumerate(transfers):
            # Updates go back to where directions came from; of the stats, only NorMuon's moments.
            elements = [*away(t.sends, k), *away(t.receives, k), *away(t.stats_sends, k)]
            bytes_sent[k] += 4 * sum(elements + (away(t.stats_receives, k) if plans[k].normuon else []))
            arrived = torch.cat([outgoing[j][k] for j in order])
            assert sum(map(plan.num_stats, t.incoming)) == sum(t.stats_receives)
            parts = arrived.split([piece.numel for piece in t.incoming])
            assert sorted(n for _, numbers in t.owned for n in numbers) == list(range(len(t.incoming)))
            for batch, numbers in t.owned:
                X_BSL = torch.full(batch.size, -1.0)
                for (piece, slot), n in zip(batch.sources, numbers, strict=True):
                    assert piece is t.incoming[n]
                    target = piece.in_batch(X_BSL, slot)
                    assert (target == -1).all()
                    target.copy_(parts[n].view(target.shape))
                matrices += upright(batch, X_BSL)
    assert all((count == 1).all() for mine in touched for count in mine.values())
    expected = [
        cut_out(full[i], matrix)
        for i, (shape, spec) in enumerate(zip(case.shapes, case.specs, strict=True))
        for matrix in logical_matrices(shape, spec)
    ]
    assert sorted(m.tolist() for m in matrices) == sorted(m.tolist() for m in expected)
    assert [traffic.of_matrices(plan) for plan in plans] == bytes_sent


def away(counts: Sequence[int], position: int) -> list[int]:
    return [n for k, n in enumerate(counts) if k != position]


def upright(batch: Batch, X_BSL: Tensor) -> list[Tensor]:
    assert (X_BSL >= 0).all()
    return [X.mT if M > N else X for X, (M, N) in zip(X_BSL, batch.shapes, strict=True)]


def test_positions_with_other_options_do_not_agree(agreements: list[str]) -> None:
    case = sharded([((4, 6), ("matrix",), ((2, 0, 1),))], (0, 1))
    case.plans(1 << 20)
    case.plans(1 << 20, lr=0.2, param_names=["elsewhere"], initial_lr=0.3)
    assert len(set(agreements)) == 1
    for options in ({"skip_idle": True}, {"ns_steps": 4}, {"momentum": 0.8}):
        agreements.clear()
        case.plans(1 << 20)
        case.plans(1 << 20, **options)
        assert len(set(agreements)) == 2, options


# ------------------------------------------------------------------------------------ several: whole steps, in threads


class Post:
    """Messages between the threads of a test, in place of `exchange.Message`."""

    def __init__(self, positions: int) -> None:
        self.parts: dict[tuple[int, int, int], Tensor] = {}  # number, from, to
        self.sent = [0] * positions
        self.arrivals = threading.Condition()

    def message(
        self, ranks: Sequence[int], buffer: Tensor, sends: Sequence[int], receives: Sequence[int], position: int
    ) -> Any:
        order = sorted(range(len(ranks)), key=lambda k: ranks[k])
        with self.arrivals:
            number = self.sent[position]
            self.sent[position] += 1
            for k, part in zip(order, buffer.clone().split([sends[k] for k in order]), strict=True):
                self.parts[number, position, k] = part
            self.arrivals.notify_all()

        def wait() -> Tensor:
            needed = [(number, k, position) for k in order]
            with self.arrivals:
                assert self.arrivals.wait_for(lambda: all(n in self.parts for n in needed), timeout=600), "a hang"
                parts = [self.parts[n] for n in needed]
            assert [p.numel() for p in parts] == [receives[k] for k in order]
            return torch.cat(parts)

        return SimpleNamespace(wait=wait, bytes_sent=(sum(sends) - sends[position]) * buffer.element_size())


State = dict[str, Tensor]
STATE_KEYS = ("momentum_sum", "row_second_moment")


def run_steps(
    case: Case,
    bucket_bytes: int,
    options: dict[str, Any],
    grads: Sequence[Mapping[int, Tensor]],
) -> tuple[list[dict[int, Tensor]], list[dict[int, State]], list[list[int]]]:
    """Weights and state of every position after the steps, and the bytes of each step. grads: whole, as 2-D views."""
    plans = case.plans(bucket_bytes, **options)
    group = OPTIONS | {"matrices": tuple(case.specs)} | options
    layouts = case.layouts(0)
    post = Post(len(plans))
    states: list[dict[int, State]] = []
    for k, plan in enumerate(plans):
        for i, (shape, spec) in enumerate(zip(case.shapes, case.specs, strict=True)):
            W = torch.randn(view_shape(shape, spec), generator=torch.Generator().manual_seed(i))
            plan.shards.weights[i] = held_by(W, layouts[i], k)  # type: ignore[attr-defined]
        states.append(
            {
                i: {STATE_KEYS[0]: torch.zeros_like(w), STATE_KEYS[1]: torch.zeros(w.shape[0], 1)}
                for i, w in plan.shards.weights.items()  # type: ignore[attr-defined]
            }
        )
    sent: list[list[int]] = [[] for _ in plans]
    failures: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for step in grads:
                mine = {i: held_by(G, layouts[i], k) for i, G in step.items()}
                sent[k].append(step_matrices(plans[k], group, states[k], mine).sent["orthogonalize"])
        except BaseException as failure:
            failures.append(failure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon_step, "Message", post.message)
        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(plans))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    assert sent == [[traffic.of_matrices(plan)] * len(grads) for plan in plans]
    return [plan.shards.weights for plan in plans], states, sent  # type: ignore[attr-defined]


RECIPES: list[dict[str, Any]] = [
    {},
    {"normuon_beta2": 0.9},
    {"normuon_beta2": 0.9, "skip_idle": True},
    {"exact_rms": True, "cautious_weight_decay": True, "skip_idle": True},
    {"norm": "schatten", "schatten_p": 3.0, "nesterov": False},
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's; the threads are ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(MONKEYPATCHED, max_examples=60)
@given(
    case=cases([spec for spec in KINDS if spec[0] != "cols"]),
    bucket_bytes=st.sampled_from([1, 150, 1 << 20]),
    options=st.sampled_from(RECIPES),
    missing=st.sets(st.integers(0, 3)),
    idle=st.sampled_from([slice(3), slice(-3, None)]),
)
def test_any_layout_gives_the_bits_of_one_process(
    agreements: list[str],
    one_thread: None,
    case: Case,
    bucket_bytes: int,
    options: dict[str, Any],
    missing: set[int],
    idle: slice,
) -> None:
    """Two steps; in the second some parameters have no gradient, and some rows of the others a zero one."""
    views = [view_shape(s, spec) for s, spec in zip(case.shapes, case.specs, strict=True)]
    g = torch.Generator().manual_seed(7)
    grads = [{i: torch.randn(view, generator=g) for i, view in enumerate(views)} for _ in range(2)]
    grads[1] = {i: G for i, G in grads[1].items() if i not in missing}
    for G in grads[1].values():
        G[idle] = 0
    lone = Case(case.shapes, case.specs, lambda _: [whole(*x) for x in zip(case.shapes, case.specs, strict=True)], (0,))
    (expected,), (expected_states,), _ = run_steps(lone, bucket_bytes, options, grads)
    weights, states, _ = run_steps(case, bucket_bytes, options, grads)
    layouts = case.layouts(0)
    for k in range(len(case.ranks)):
        for i, layout in enumerate(layouts):
            assert torch.equal(weights[k][i], held_by(expected[i], layout, k)), (k, i)
            momentum, moment = (expected_states[i][key] for key in STATE_KEYS)
            assert torch.equal(states[k][i][STATE_KEYS[0]], held_by(momentum, layout, k)), (k, i)
            if weights[k][i].numel():
                rows = indices(layout.rows[k])
                assert torch.equal(states[k][i][STATE_KEYS[1]], moment[rows]), (k, i)
