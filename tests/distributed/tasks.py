"""What the processes do in most tests: steps of Muon on a layout, from injected or from real gradients."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from layouts import LAYOUTS, Piece, assemble, build, held, inject
from models import Model, batch, gradients, optimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import functional as F

from earthshine import Muon

Options = Mapping[str, Any]
OneProcess = Callable[..., dict[str, Tensor]]  # the fixture `one_process`


@dataclass(frozen=True)
class Missing:
    """No gradient for the parameters with these names at this step, on one rank or (None) on all."""

    step: int
    names: tuple[str, ...]
    rank: int | None = None


@dataclass(frozen=True)
class Idle:
    """A zero gradient for these entries of dimension 0, as an expert without tokens has."""

    step: int
    names: tuple[str, ...]
    entries: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What a rank has after its steps: pieces of parameters and of state ("name/key"), and the last step's numbers."""

    params: dict[str, Piece]
    state: dict[str, Piece]
    stats: dict[str, Any] = field(default_factory=dict)


def muon(model: Model, layout: str, **options: Any) -> Muon:
    """The optimizer as the layout asks for it."""
    if model.zero1 is not None:
        options["process_group"] = model.zero1
    return optimizer(model, LAYOUTS[layout].sizes, **options)


def train(
    layout: str,
    options: Options,
    steps: Iterable[int] = range(5),
    events: Iterable[Missing | Idle] = (),
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Outcome:
    """Steps with injected gradients, the same whole ones on every layout."""
    model = build(layout, dtypes=dtypes or {})
    opt = muon(model, layout, **options)
    for step in steps:
        inject(model, whole_gradients(layout, step, events, dtypes or {}))
        opt.step()
    return outcome(model, opt)


def whole_gradients(
    layout: str, step: int, events: Iterable[Missing | Idle] = (), dtypes: Mapping[str, torch.dtype] | None = None
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = dict(gradients(Model(LAYOUTS[layout].sizes, dtypes=dtypes or {}), step))
    rank = dist.get_rank() if dist.is_initialized() else 0
    for event in events:
        for name in event.names if event.step == step else ():
            if isinstance(event, Missing):
                found[name] = None if event.rank in (None, rank) else found[name]
            elif (whole := found[name]) is not None:
                whole[list(event.entries)] = 0
    return found


def outcome(model: nn.Module, opt: Muon) -> Outcome:
    return Outcome(held(dict(model.named_parameters())), held(states(model, opt)), dict(opt.last_stats))


def states(model: nn.Module, opt: Muon) -> dict[str, Tensor]:
    """The optimizer's state as a checkpoint sees it, by "name/key"."""
    found = get_optimizer_state_dict(model, opt)["state"]
    return {f"{name}/{key}": t for name, entry in found.items() for key, t in entry.items()}


def learn(layout: str, options: Options, steps: int) -> tuple[dict[str, Piece], dict[str, Piece]]:
    """Steps with gradients of a loss: the mean over a batch that data-parallel ranks divide. Pieces before, after."""
    model = build(layout)
    before = held(dict(model.named_parameters()))
    world = dist.get_world_size() if dist.is_initialized() else 1
    parts, part = {"tp": (1, 0)}.get(layout.split("-")[0], (world, dist.get_rank() if world > 1 else 0))
    if layout == "tp-2-fsdp-2":
        parts, part = 2, dist.get_rank() // 2  # the mesh is (data, tensor)
    run: Callable[[Tensor], Tensor] = model
    if layout.startswith("ddp"):
        run = nn.parallel.DistributedDataParallel(model)
    opt = muon(model, layout, **options)
    for step in range(steps):
        opt.zero_grad()
        tokens, targets = (t.chunk(parts)[part] for t in batch(step))
        # The mean over the ranks of means over equal parts of the batch is the mean over the batch.
        F.cross_entropy(run(tokens).flatten(0, 1), targets.flatten()).backward()
        opt.step()
    return before, held(dict(model.named_parameters()))


def whole(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """Parameters and state of all ranks together."""
    return assemble([o.params for o in outcomes]) | assemble([o.state for o in outcomes])
