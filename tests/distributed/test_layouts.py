"""The ways of `layouts.py` to spread the model are what they say, before any optimizer of ours sees them."""

import pytest
import torch
from harness import Worlds
from layouts import LAYOUTS, Piece, assemble, build, differences, held
from models import Model
from torch.distributed.tensor import DTensor


def spread(layout: str) -> tuple[dict[str, Piece], dict[str, str], list[str]]:
    """Pieces of the initial values, placements of DTensors, and where torch's full_tensor is not the initial value."""
    model, whole = build(layout), dict(Model(LAYOUTS[layout].sizes).named_parameters())
    shards = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    wrong = [name for name, p in shards.items() if not torch.equal(p.full_tensor(), whole[name])]
    return held(dict(model.named_parameters())), {n: str(p.placements) for n, p in shards.items()}, wrong


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.world == 4])
def test_pieces_are_where_torch_puts_them(worlds: Worlds, layout: str) -> None:
    ranks = worlds.run(LAYOUTS[layout].world, spread, layout)
    want = {name: p.detach() for name, p in Model(LAYOUTS[layout].sizes).named_parameters()}
    assert not differences(assemble([pieces for pieces, _, _ in ranks]), want)
    assert [wrong for _, _, wrong in ranks] == [[]] * 4


def test_the_layouts_hold_the_hard_cases(worlds: Worlds) -> None:
    """Empty shards, uneven shards of strided placements, and a stack whose experts FSDP2 cuts in two ways."""
    pieces, placements, _ = zip(*worlds.run(4, spread, "fsdp-4"), strict=True)
    assert [p["experts.w_in"].shape[0] for p in pieces] == [3] * 4
    assert [p["experts.w_in"].values.shape[0] for p in pieces] == [1, 1, 1, 0]
    assert [p["gate.weight"].values.shape[0] for p in pieces] == [1, 1, 1, 0]
    pieces, placements, _ = zip(*worlds.run(4, spread, "tp-2-fsdp-2"), strict=True)
    assert placements[0]["up.weight"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"
    assert [p["up.weight"].values.shape[0] for p in pieces] == [6, 6, 5, 5]
    assert [p["gate.weight"].values.shape[0] for p in pieces] == [1, 1, 0, 0]
    assert placements[0]["down.weight"] == "(Shard(dim=0), Shard(dim=1))"
    assert "_StridedShard(dim=0" in worlds.run(4, spread, "ep-2-fsdp-2-dim0")[0][1]["experts.w_in"]
    assert worlds.run(4, spread, "ep-2-fsdp-2-dim1")[0][1]["experts.w_in"] == "(Shard(dim=1), Shard(dim=0))"
