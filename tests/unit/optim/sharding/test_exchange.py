"""Process groups by their ranks, agreement about a plan, and what a message sends; on ranks without others."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_ranks import as_rank
from torch import Tensor

from earthshine.errors import ConfigError
from earthshine.optim.sharding import exchange
from earthshine.optim.sharding.exchange import Message, all_reduce_bytes, check_agreement, process_group, ring_bytes


def test_a_group_is_known_by_its_ranks_as_long_as_its_world_lives() -> None:
    with as_rank(0, 4):
        pair = dist.new_group([0, 2])
        assert process_group((0, 2)) is dist.group.WORLD
        exchange.register_group((0, 1), pair)  # not its ranks
        assert process_group((0, 1)) is dist.group.WORLD
        exchange.register_group((2, 0), pair)
        assert process_group((2, 0)) is pair
        exchange.create_group((2, 0), [], torch.device("cpu"))  # there is one
        assert process_group((2, 0)) is pair
        exchange.create_group((0, 3), [], torch.device("cpu"))
        assert dist.get_process_group_ranks(process_group((0, 3))) == [0, 3]
    with as_rank(0, 4):
        assert process_group((2, 0)) is dist.group.WORLD


def test_another_plan_on_another_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_rank(0, 2):
        check_agreement((0, 1), "plan", torch.device("cpu"))

        def other_rank(extremes: Tensor, **_: Any) -> None:
            extremes += torch.tensor([1, -1])

        monkeypatch.setattr(dist, "all_reduce", other_rank)
        with pytest.raises(ConfigError, match=r"the processes \[0, 1\] see different parameters or options"):
            check_agreement((0, 1), "plan", torch.device("cpu"))


def test_a_message_is_in_the_order_of_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 5, 2, 7 in this order of a mesh: torch's group has them ascending. What stays here is not counted."""
    calls: list[Any] = []

    class Done:
        def wait(self) -> None: ...

    def all_to_all(arrived: Tensor, buffer: Tensor, receives: list[int], sends: list[int], **_: Any) -> Done:
        calls.append((len(arrived), len(buffer), receives, sends))
        return Done()

    monkeypatch.setattr(dist, "all_to_all_single", all_to_all)
    message = Message((5, 2, 7), torch.zeros(9, dtype=torch.bfloat16), [2, 3, 4], [1, 0, 5], position=1)
    assert calls == [(6, 9, [0, 1, 5], [3, 2, 4])]
    assert message.wait().dtype == torch.bfloat16
    assert message.bytes_sent == (2 + 4) * 2


def test_bytes_of_a_ring() -> None:
    """Of 12 bytes per rank of 4, an all-gather passes each part on three times; an all-reduce is two such rounds."""
    assert (ring_bytes(4, 12), all_reduce_bytes(4, 48)) == (36, 72)
    assert (ring_bytes(1, 12), all_reduce_bytes(1, 48)) == (0, 0)
