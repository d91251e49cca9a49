"""Bytes: what the plan predicts is what Muon reports and what really leaves each rank; the bounds that it keeps; what
each rank of ZeRO-1 holds."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Worlds
from layouts import LAYOUTS, build, inject, spread_like
from tasks import Options, muon, whole_gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from traffic import Traffic, check_counts

from earthshine import Muon
from earthshine.model.parameters import parameter_shapes
from earthshine.model.presets import llama3_tiny_e8t2
from earthshine.model.transformer import Transformer
from earthshine.optim.build import configured_groups
from earthshine.optim.config import OptimizerConfig
from earthshine.optim.cost import cost


def test_the_counter(worlds: Worlds) -> None:
    """Of 48 bytes 3/4 leave in an all-to-all (here two) and a reduce-scatter, 3 x 48 in an all-gather."""
    for sent in worlds.run(4, check_counts):
        assert sent == {"alltoall_base_": 72, "_allgather_base_": 144, "_reduce_scatter_base_": 36, "allreduce_": 72}


# ----------------------------------------------------------------------------------------- predicted, reported, counted


def three_counts(layout: str, options: Options) -> list[tuple[dict[str, int], dict[str, int], int, dict[str, int]]]:
    """Per step: predicted, reported, counted in all, collectives."""
    model = build(layout)
    opt = muon(model, layout, **options)
    found = []
    for step in range(2):
        inject(model, whole_gradients(layout, step))
        with Traffic() as traffic:
            opt.step()
        found.append((opt.predicted_bytes(), opt.last_stats["bytes_sent"], traffic.total, traffic.calls))
    return found


@pytest.mark.parametrize(
    "layout, options",
    [
        ("ddp-4", {}),
        ("ep-4", {}),
        ("fsdp-4", {}),
        ("fsdp-4", {"comm_dtype": "bfloat16", "max_bucket_bytes": 500}),
        ("fsdp-4", {"normuon_beta2": 0.95, "skip_idle": True}),
        ("hsdp-2x2", {"skip_idle": True}),
        ("tp-2-fsdp-2", {"normuon_beta2": 0.95}),
        ("tp-row-4", {}),
        ("ep-2-fsdp-2-dim1", {}),
        ("zero1-4", {}),
        ("zero1-4", {"reduce_gradients": True, "normuon_beta2": 0.95}),
        ("fsdp-4", {"non_matrix": "scion"}),
    ],
)
def test_predicted_reported_and_counted_bytes_agree(worlds: Worlds, layout: str, options: Options) -> None:
    for steps in worlds.run(4, three_counts, layout, options):
        for predicted, reported, counted, calls in steps:
            assert predicted == reported
            assert sum(predicted.values()) == counted, (predicted, calls)


def test_matrices_that_are_whole_somewhere_do_not_travel(worlds: Worlds) -> None:
    for layout in ("ddp-4", "ep-4", "ddp-2-ep-2"):
        for steps in worlds.run(4, three_counts, layout, {}):
            assert not any(counted for _, _, counted, _ in steps), layout


def test_two_messages_per_bucket(worlds: Worlds) -> None:
    """One all-to-all out and one back, whatever the number of matrices; more of them when buckets are bounded."""
    (_, _, _, calls), _ = worlds.run(4, three_counts, "fsdp-4", {})[0]
    assert calls == {"alltoall_base_": 2}
    (_, _, _, bounded), _ = worlds.run(4, three_counts, "fsdp-4", {"max_bucket_bytes": 500})[0]
    assert bounded["alltoall_base_"] > 4


# --------------------------------------------------------------------------------------------------------------- bounds


class Stack(nn.Module):
    """A small transformer's matrices; with 4 layers as many of each shape as ranks, or a multiple."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(32, 32, bias=False),
                    "k": nn.Linear(32, 16, bias=False),
                    "v": nn.Linear(32, 16, bias=False),
                    "o": nn.Linear(32, 32, bias=False),
                    "up": nn.Linear(32, 96, bias=False),
                    "down": nn.Linear(96, 32, bias=False),
                }
            )
            for _ in range(layers)
        )


def stack_step(kind: str, options: Options) -> dict[str, Any]:
    """One step of Muon on `Stack`, by FSDP2 or ZeRO-1; elements and bytes."""
    torch.manual_seed(0)
    model = Stack(4 if kind == "fsdp" else 3)
    elements = sum(p.numel() for p in model.parameters())
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        options = {"process_group": dist.group.WORLD} | dict(options)
    opt = Muon(model.parameters(), lr=0.01, ns_dtype="float32", **options)
    for p in model.parameters():
        p.grad = spread_like(torch.randn(p.shape), p)
    with Traffic() as traffic:
        opt.step()
    momentum = [opt.state[p]["momentum_sum"] for p in model.parameters()]
    return {
        "elements": elements,
        "bytes": opt.last_stats["bytes_sent"],
        "counted": traffic.total,
        "momentum": sum((m.to_local() if isinstance(m, DTensor) else m).numel() for m in momentum),
        "imbalance": opt.last_stats["imbalance"],
    }


def test_fsdp_traffic_with_bf16_payload(worlds: Worlds) -> None:
    """At most 4 P (N - 1) / N^2 bytes per rank: its share of P/N out and its owned P/N back, 2 bytes each."""
    for world in (2, 4):
        for rank in worlds.run(world, stack_step, "fsdp", {"comm_dtype": "bfloat16"}):
            assert 0 < rank["counted"] <= 4 * rank["elements"] * (world - 1) / world**2, rank
            assert rank["imbalance"] == pytest.approx(1.0)


def test_zero1_traffic_against_adamw(worlds: Worlds) -> None:
    """AdamW's ZeRO-1 sends 8 bytes (N - 1)/N per element: gradients out, parameters back, both fp32. Ours adds the cut
    matrices only: above 1, at most 1.25 times that, as the paper bounds it. Three layers leave cuts."""
    for world in (2, 4):
        options = {"comm_dtype": "bfloat16", "reduce_gradients": True}
        ranks = worlds.run(world, stack_step, "zero1", options)
        for rank in ranks:
            ratio = rank["counted"] / (8 * rank["elements"] * (world - 1) / world)
            assert 1 < ratio <= 1.25, rank
        assert any(rank["bytes"].get("orthogonalize", 0) for rank in ranks)
        assert sum(r["momentum"] for r in ranks) == ranks[0]["elements"]
        even = ranks[0]["elements"] / world
        assert all(abs(r["momentum"] - even) <= 96 for r in ranks)  # the longest row


def state_bytes(layout: str) -> tuple[int, int, int]:
    """Bytes of state on this rank for the parameters that Muon updates: Muon's, and those of torch's AdamW."""
    model = build(layout)
    opt = muon(model, layout)
    params = [p for group in opt.param_groups if group["algorithm"] == "muon" for p in group["params"]]
    adamw = torch.optim.AdamW(params, foreach=False)
    inject(model, whole_gradients(layout, 0))
    opt.step()
    adamw.step()

    def local_bytes(optimizer: torch.optim.Optimizer) -> int:
        tensors = [t for p in params for key, t in optimizer.state[p].items() if key != "step"]
        mine = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in mine)

    return local_bytes(opt), local_bytes(adamw), sum(p.numel() for p in params)


def test_momentum_is_half_of_adamw_s_two_buffers(worlds: Worlds) -> None:
    for layout in ("plain", "fsdp-4", "tp-2-fsdp-2"):
        for ours, theirs, _ in worlds.run(LAYOUTS[layout].world, state_bytes, layout):
            assert ours * 2 == theirs
    ranks = worlds.run(4, state_bytes, "zero1-4")
    assert sum(ours for ours, _, _ in ranks) == 4 * ranks[0][2]  # one fp32 buffer in all, AdamW's are on every rank
    assert all(abs(ours - elements) <= 4 * 22 * 3 for ours, _, elements in ranks)  # P/N of 4 bytes, within longest rows


# --------------------------------------------------------------------------------------------------------------- memory


def zero1_state_bytes(config: OptimizerConfig) -> dict[str, int]:
    """Of this rank's ZeRO-1 shards, by algorithm, without step counts."""
    model = Transformer(llama3_tiny_e8t2())
    optimizer = Muon(configured_groups(model, config), **config.as_group(), process_group=dist.group.WORLD)
    held = {"muon": 0, "scion": 0, "adamw": 0}
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"]]
        held[group["algorithm"]] += sum(t.nbytes for state in states for key, t in state.items() if key != "step")
    return held


@pytest.mark.parametrize(
    "options", [{}, {"non_matrix": "scion", "momentum_dtype": "bfloat16"}, {"normuon_beta2": 0.95}], ids=str
)
def test_zero1_divides_the_state_that_a_plan_counts(worlds: Worlds, options: Options) -> None:
    """Over the ranks it adds up to the byte. It is even to within two rows, or 1 %: NorMuon has a number per row, and
    rows differ in length."""
    config = OptimizerConfig(ns_dtype="float32", **options)
    ranks = worlds.run(4, zero1_state_bytes, config)
    expected = cost(config, parameter_shapes(llama3_tiny_e8t2()))
    for algorithm, total in expected.items():
        held = [rank[algorithm] for rank in ranks]
        assert sum(held) == total.state_bytes
        assert max(held) - min(held) <= max(0.01 * total.state_bytes, 2 * 8 * 64)
