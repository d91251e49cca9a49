"""Jobs that fit a laptop, for a first run and for tests. They need token shards: `data.sources=[{"path": "DIR"}]`."""

from dataclasses import replace

from earthshine.model import presets
from earthshine.model.training_options import BalanceConfig, CapacityConfig
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.train.job import CheckpointConfig, Scratch, TrainJob


def tiny() -> TrainJob:
    """A dense Llama of 0.5 M parameters trained with Muon on 0.25 M tokens."""
    return TrainJob(
        name="tiny",
        init=Scratch(model=presets.llama3_tiny()),
        seq_len=256,
        sequences_per_step=8,
        sequences_per_micro_batch=4,
        num_steps=120,
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=12),
        checkpoint=CheckpointConfig(every_steps=40),
    )


def tiny_moe() -> TrainJob:
    """`tiny` with 8 experts, top-2, in every layer."""
    return replace(tiny(), name="tiny_moe", init=Scratch(model=presets.llama3_tiny_e8t2()))


def tiny_switch() -> TrainJob:
    """`tiny_moe` balanced by the Switch loss over the whole step, with capacity factor 1."""
    balance = BalanceConfig(loss="switch", scope="step", coefficient=1e-2)
    return replace(tiny_moe(), name="tiny_switch", balance=balance, capacity=CapacityConfig(factor=1.0))


def tiny_moonlight() -> TrainJob:
    """Moonlight's architecture and balance, at 3 M parameters, trained with Muon on 0.25 M tokens."""
    # Moonlight's own rate, 1e-3, would move a bias by 0.12 at most in 120 steps: too slow to balance anything.
    balance = BalanceConfig(bias_rate=1e-2)
    return replace(tiny(), name="tiny_moonlight", init=Scratch(model=presets.moonlight_tiny()), balance=balance)
