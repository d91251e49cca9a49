"""Accelerate's own loop, and FSDP2 by it and by Trainer, on CPUs.

Accelerate takes its FSDP branch only with accelerators: the tests set the kind of its state by hand, as `_fsdp` does;
all else is its own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Worlds
from tiny_training import MUON, assert_close, batches, by_hand, rows, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from earthshine import Muon, param_groups

pytestmark = pytest.mark.skipif(
    find_spec("accelerate") is None, reason="needs accelerate: pip install 'earthshine[trainers]'"
)


@contextmanager
def _accelerate(**state: Any) -> Iterator[Any]:
    """An Accelerator on CPUs, over the processes there are; forgotten afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    environment = {"ACCELERATE_USE_CPU": "true"}
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        environment |= {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        AcceleratorState._reset_state(True)
        try:
            yield Accelerator(cpu=True, **state)
        finally:
            AcceleratorState._reset_state(True)


def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """prepare() with a schedule, accumulate(), clipping, and a state that is saved and loaded in the middle."""
    pairs = batches(2)
    with _accelerate(gradient_accumulation_steps=2) as accelerator:
        model = tiny()
        optimizer = Muon(param_groups(model), **MUON)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

        def train(some: list[dict[str, Tensor]]) -> None:
            for batch in some:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()

        train(pairs[:2])
        accelerator.save_state(str(tmp_path))
        train(pairs[:2])
        accelerator.load_state(str(tmp_path))
        train(pairs[2:])
    assert_close(model, by_hand(tiny(), [pairs[:2], pairs[2:]]), rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- FSDP2


def _fsdp(plugin: Any) -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)}


def prepared_by_accelerate(folder: str) -> dict[str, Tensor]:
    """The whole parameters after three steps, of which a checkpoint by torch's own means is between two."""
    from accelerate import FullyShardedDataParallelPlugin

    with _accelerate() as accelerator:
        _fsdp(
            FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, reshard_after_forward=True)
        )
        model = tiny("Qwen3Moe")
        optimizer = Muon(param_groups(model), **MUON)
        model, optimizer = accelerator.prepare(model, optimizer)
        for batch in batches(4)[:2] * 2:
            part = {key: t.chunk(2)[dist.get_rank()] for key, t in batch.items()}
            accelerator.backward(model(**part).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        for p, state in optimizer.optimizer.state.items():
            assert all(isinstance(t, DTensor) and t.placements == p.placements for t in state.values() if t.ndim)
        return _whole(model)


def trained_by_trainer(folder: str) -> dict[str, Tensor]:
    """docs/muon.md's MuonTrainer with TrainingArguments' fsdp."""
    import accelerate.state
    from test_trainer import Ordered, arguments

    with _accelerate(), pytest.MonkeyPatch.context() as patch:
        accelerate.state.AcceleratorState._reset_state(True)
        original = accelerate.state.AcceleratorState.__init__

        def init(self: Any, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            if options.get("fsdp_plugin") is not None:
                _fsdp(options["fsdp_plugin"])

        patch.setattr(accelerate.state.AcceleratorState, "__init__", init)
        fsdp = {"version": 2, "cpu_ram_efficient_loading": False, "reshard_after_forward": True}
        fsdp |= {"auto_wrap_policy": "NO_WRAP"}
        model = tiny()
        chosen = arguments(Path(folder), fsdp="full_shard", fsdp_config=fsdp, per_device_train_batch_size=1)
        trainer = Ordered(model, chosen, train_dataset=rows())
        trainer.train()
        return _whole(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [(prepared_by_accelerate, "Qwen3Moe"), (trained_by_trainer, "Llama")])
def test_fsdp2_takes_the_steps_of_one_process(worlds: Worlds, tmp_path: Path, task: Any, name: str) -> None:
    """Half of each batch on each of two processes; an optimizer that is made before its parameters are sharded."""
    one, other = worlds.run(2, task, str(tmp_path))
    steps = batches(4)[:2] * 2 if name == "Qwen3Moe" else batches(2)
    alone = dict(by_hand(tiny(name), [[batch] for batch in steps]).named_parameters())
    assert one.keys() == alone.keys()
    for key, p in alone.items():
        assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(one[key], p.detach(), rtol=1e-4, atol=1e-5, msg=key)
