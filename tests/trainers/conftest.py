"""Muon in other people's trainers. Their packages are no dependencies: a test is skipped where one is missing.

`make test-all` installs them (`pip install 'earthshine[trainers]'`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# For the tests and, inherited, for the processes: `import harness, tiny_training`.
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))

import harness


@pytest.fixture(scope="module")
def worlds() -> Iterator[harness.Worlds]:
    """Processes for the tests of one file, and no longer: `worlds.run(2, task, *args)`."""
    with harness.Worlds() as worlds:
        yield worlds
