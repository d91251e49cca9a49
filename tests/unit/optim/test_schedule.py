"""Learning-rate values at the seams of each schedule, and refused configs."""

import subprocess
import sys
from typing import get_args

import pytest

from earthshine.config import decode, encode
from earthshine.errors import ConfigError
from earthshine.ops.newton_schulz_tables import COEFFICIENTS, Table, default_steps
from earthshine.optim.config import OptimizerConfig, ScheduleConfig
from earthshine.optim.schedule import learning_rate


def rates(schedule: ScheduleConfig, num_steps: int, peak: float = 2.0) -> list[float]:
    return [learning_rate(schedule, peak, step, num_steps) for step in range(num_steps + 2)]


def test_constant_with_warmup() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=4)
    assert rates(schedule, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_starts_at_the_peak_and_ends_at_the_fraction() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, final_fraction=0.1)
    got = rates(schedule, 10)
    assert got[:3] == [1.0, 2.0, 2.0]
    assert got[6] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way
    assert got[10] == got[11] == pytest.approx(0.2)
    assert got[2:] == sorted(got[2:], reverse=True)
    assert got[9] > 0.2  # the last step is not wasted


def test_wsd_is_flat_and_then_linear() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.0)
    assert rates(schedule, 10) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0])


def test_warmup_longer_than_what_is_left() -> None:
    """A run cut to few steps ends inside its warm-up or decay; nothing divides by zero."""
    assert rates(ScheduleConfig(kind="cosine", warmup_steps=10), 2) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    wsd = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=100, final_fraction=0.5)
    assert rates(wsd, 4) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 1.0])
    assert rates(wsd, 2) == pytest.approx([1.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wsd"}, "decay_steps=0 must be positive"),
        ({"kind": "cosine", "decay_steps": 3}, "only means something for kind='wsd'"),
        ({"final_fraction": 1.5}, r"final_fraction=1\.5 must be between"),
        ({"warmup_steps": -1}, "must not be negative"),
        ({"kind": "linear"}, "kind='linear' must be one of"),
    ],
)
def test_schedules_that_contradict_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"optimizer\.lr=-1\.0 must be a finite"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"beta2": 1.0}, r"beta2=1\.0 must be at least 0 and below 1"),
        ({"ns_steps": -1}, "ns_steps=-1 must be a whole number from 1 to 100"),
        ({"ns_coefficients": "keller6"}, "ns_coefficients='keller6' must be one of keller5"),
        ({"ns_coefficients": "table"}, 'both ns_coefficients="table" and rows'),
        ({"ns_table": ((2.0, -1.5, 0.5),)}, 'both ns_coefficients="table" and rows'),
        ({"norm": "schatten"}, "norm='schatten' needs schatten_p"),
        ({"schatten_p": 2.0}, "norm='spectral' none"),
        ({"exact_rms": True, "scale": "original"}, "would mean nothing"),
        ({"exact_rms": True, "normuon_beta2": 0.95}, "exact already"),
    ],
)
def test_optimizer_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**options)  # type: ignore[arg-type]


def test_configs_survive_json() -> None:
    config = OptimizerConfig(freeze=("embed.*",))
    assert decode(OptimizerConfig, encode(config)) == config
    assert decode(ScheduleConfig, encode(ScheduleConfig())) == ScheduleConfig()


def test_the_tables_of_the_config_are_those_of_the_operator() -> None:
    assert get_args(Table) == tuple(COEFFICIENTS)
    for name in COEFFICIENTS:
        assert OptimizerConfig(ns_coefficients=name).newton_schulz_steps == default_steps(name)  # type: ignore[arg-type]
    assert OptimizerConfig(ns_coefficients="table", ns_table=((2.0, -1.5, 0.5),) * 3).newton_schulz_steps == 3


def test_configs_and_schedule_do_not_load_torch() -> None:
    code = "import sys, earthshine.optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
