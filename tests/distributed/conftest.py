"""The worlds of processes that the tests of this folder share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # for the tests and, inherited, for the processes: `import harness`

import harness


@pytest.fixture(scope="module")
def worlds() -> Iterator[harness.Worlds]:
    """Processes for the tests of one file, and no longer: `worlds.run(4, task, *args)`."""
    with harness.Worlds() as worlds:
        yield worlds


@pytest.fixture(scope="module")
def one_process(worlds: harness.Worlds) -> Callable[..., dict[str, Tensor]]:
    """Parameters and state after `tasks.train` on one process, with the sizes of a layout; each made once.

    `one_process(layout, options, steps, ...)`.
    """
    import layouts  # here, so that a suite without these tests does not load what they need
    import tasks

    known: dict[str, dict[str, Tensor]] = {}

    def run(layout: str, *args: Any) -> dict[str, Tensor]:
        plain = layouts.plain(layout)
        key = repr((plain, args))
        if key not in known:
            known[key] = tasks.whole(worlds.run(1, tasks.train, plain, *args))
        return known[key]

    return run
