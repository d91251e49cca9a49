"""The harness itself: failures must fail, and quickly."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from harness import WorkerError, Worlds


def total(value: int) -> float:
    x = torch.tensor(float(value + dist.get_rank()))
    dist.all_reduce(x)
    return float(x)


def alone() -> bool:
    return dist.is_initialized()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"only rank {rank} knows")
    dist.barrier()


def wait_for_a_rank_that_is_gone(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(rank: int) -> None:
    time.sleep(3600 if dist.get_rank() == rank else 0)


def test_a_task_runs_on_every_rank_and_one_process_has_no_group(worlds: Worlds) -> None:
    assert worlds.run(2, total, 10) == [21.0, 21.0]
    assert worlds.run(2, total, 20) == [41.0, 41.0]
    assert worlds.run(1, alone) == [False]


def test_failures_fail_with_their_reason_and_the_next_task_gets_new_processes() -> None:
    with Worlds() as worlds:
        with pytest.raises(WorkerError, match="only rank 1 knows"):
            worlds.run(2, raise_on, 1)
        with pytest.raises(WorkerError, match="exit code 7"):
            worlds.run(2, wait_for_a_rank_that_is_gone, 0)
        worlds.run(2, total, 0)  # so that only the sleep takes time
        with pytest.raises(WorkerError, match="in sleep_on"):
            worlds.run(2, sleep_on, 1, timeout=1.0)
        assert worlds.run(2, total, 0) == [1.0, 1.0]
