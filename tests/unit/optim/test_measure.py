"""optim/measure.py, and that a step of the optimizer waits for no device until its numbers are asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from earthshine.device import Readings, read
from earthshine.optim import adamw
from earthshine.optim.muon import Muon

MUON = [{}, {"normuon_beta2": 0.95}, {"normuon_beta2": 0.95, "skip_idle": True}, {"exact_rms": True},
        {"norm": "schatten", "schatten_p": 4.0}, {"momentum_dtype": "bfloat16"}, {"cautious_weight_decay": True},
        {"ns_form": "gram"}, {"ns_dtype": "bfloat16"}]  # fmt: skip


def optimizer(device: str, lr: Any = 0.1, **options: Any) -> Muon:
    """Matrices alone, stacked, tall and wide; a table in AdamW and one in Scion; vectors in both."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device))

    matrices = [parameter(40, 64), parameter(3, 40, 64), parameter(3, 64, 40), parameter(2, 50, 50)]
    specs = (("matrix",), ("batch",), ("batch",), ("batch",))
    groups = [
        {"algorithm": "muon", "params": matrices, "matrices": specs},
        {"algorithm": "adamw", "params": [parameter(70, 40), parameter(40)]},
        {"algorithm": "scion", "params": [parameter(71, 40), parameter(41)], "lmo": ("row_rms", "rms")},
    ]
    made = Muon(groups, lr=lr, **{"ns_dtype": "float32", **options})
    for group in made.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    return made


@pytest.mark.parametrize("options", MUON, ids=str)
def test_a_step_waits_for_nothing_and_its_numbers_are_one_transfer(options: dict[str, Any], waits: Any) -> None:
    made = optimizer("meta", **options)
    with waits:
        made.step()
        made.step()
        assert waits.transfers == 0
        assert set(made.last_stats["update_rms"]) == {"muon", "adamw", "scion"}
        assert waits.transfers == 1
        assert made.last_stats["update_rms_by_group"]
        assert waits.transfers == 1 and not waits.uploads


def test_a_learning_rate_on_the_device_is_waited_for_once_per_group(waits: Any) -> None:
    made = optimizer("meta", lr=torch.tensor(0.1))
    for group in made.param_groups:
        group["lr"] = torch.tensor(0.1).as_subclass(Counted)
    made.step()
    assert [group["lr"].times for group in made.param_groups] == [1, 1, 1]


class Counted(Tensor):
    """A learning rate that counts how often its value is asked for."""

    times = 0

    def __float__(self) -> float:
        self.times += 1
        return float(self.as_subclass(Tensor))


def test_the_numbers_are_read_together_with_others(waits: Any) -> None:
    made = optimizer("meta")
    made.step()
    other = Readings(torch.zeros(3, 2, dtype=torch.int64, device="meta"), torch.zeros((), device="meta"))
    with waits:
        read(other, made.measure())
        assert other.values == [[1.0] * 6, [1.0]] and made.last_stats["update_rms"]
    assert waits.transfers == 1


def test_what_was_read_is_exact_and_stays() -> None:
    x, counts = torch.tensor([0.1, 3e-39, 1e38]), torch.tensor([[2**53 - 1, 0]])
    readings = Readings(x, counts, torch.zeros(0))
    read(readings, readings)
    x.zero_()
    assert readings.values == [[float(torch.tensor(v)) for v in (0.1, 3e-39, 1e38)], [2.0**53 - 1, 0.0], []]
    read(readings)
    assert readings.values[0][2] == float(torch.tensor(1e38))


@pytest.mark.parametrize("size", [7, 1 << 26])
def test_the_update_is_measured_in_pieces_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = optimizer("cpu")
    expected.step()
    made = optimizer("cpu")
    monkeypatch.setattr(adamw, "_CPU_STATS_ELEMENTS", size)
    made.step()
    assert made.last_stats["update_rms"]["adamw"] == pytest.approx(expected.last_stats["update_rms"]["adamw"], rel=1e-6)
    assert len(made.measure().values) == len(expected.measure().values)


def test_the_next_step_has_its_own_numbers() -> None:
    made = optimizer("cpu")
    made.step()
    first = made.last_stats["update_rms"]
    for p in made.param_groups[1]["params"]:
        p.grad = -torch.ones_like(p)  # against the first moment
    made.step()
    assert made.last_stats["update_rms"]["adamw"] < 0.9 * first["adamw"]
