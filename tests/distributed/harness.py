"""Worlds of processes that stay alive between tests, with gloo and a FileStore: no ports, no torchrun.

A task is a top-level function of a module in this folder, called on every rank as `task(*args)`; what it returns must
pickle. A world of one process has no process group at all. Processes are forked from a server that has imported
torch once, so a world costs tens of milliseconds. An exception on any rank ends the world (its peers may wait in a
collective for ever) and fails the test with the traceback; so does silence, with every rank's stack.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",  # what DTensor and FSDP2 import on first use
]
TIMEOUT_SECONDS = 900.0  # for a hang: a busy machine is slower than any task takes
_GRACE_SECONDS = 1.0  # that the other ranks have to finish or fail after the first failure
_STACK_SECONDS = 10.0  # that a silent rank has to write its stack


class WorkerError(AssertionError):
    """A task failed, died or hung on some rank; the message holds what is known of every rank."""


class World:
    """`size` processes with one gloo group, each waiting for tasks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = Path(tempfile.mkdtemp(prefix="earthshine-world-"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._processes, self._pipes = [], []
        with _one_thread():
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, size, str(self._folder), theirs), daemon=True, name=f"rank {rank}"
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)

    def run(self, task: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
        """What the task returned on each rank. WorkerError when a rank raised, died, or did not answer in time."""
        __tracebackhide__ = True
        name = task.__module__.rpartition(".")[2]
        folder = str(Path(task.__code__.co_filename).parent)
        message = pickle.dumps((folder, name, task.__name__, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {self._pipes[r]: r for r in range(self.size) if r not in answers}
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=left):
                rank = waiting[pipe]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=1)
                    answers[rank] = ("error", f"died with exit code {self._processes[rank].exitcode}")
                if answers[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if len(answers) == self.size and all(kind == "ok" for kind, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.size)]
        raise WorkerError(self._explain(task.__name__, args, answers, timeout))

    def _explain(self, task: str, args: Any, answers: dict[int, tuple[str, Any]], timeout: float) -> str:
        """Ends the world. Silent ranks are asked for their stacks first."""
        silent = [rank for rank in range(self.size) if rank not in answers]
        for rank in silent:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # type: ignore[arg-type]
        stacks = [self._folder / f"stack-{rank}" for rank in silent]
        until = time.monotonic() + _STACK_SECONDS
        while not all(stack.read_text() for stack in stacks) and time.monotonic() < until:
            time.sleep(0.05)
        lines = [f"{task}{args} on {self.size} processes, at most {timeout:g} s:"]
        told: dict[str, int] = {}
        for rank in range(self.size):
            kind, what = answers.get(rank, ("silent", (self._folder / f"stack-{rank}").read_text()))
            if kind != "ok":
                same = told.setdefault(what, rank)
                kind += f"\n{what}" if same == rank else f", as rank {same}"
            lines.append(f"--- rank {rank}: {kind}")
        self.close(kill=True)
        return "\n".join(lines)

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(p.is_alive() for p in self._processes)

    def close(self, kill: bool = False) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if kill:
                process.kill()
            else:
                with contextlib.suppress(BrokenPipeError, OSError):
                    pipe.send_bytes(b"")
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)


class Worlds:
    """One world per size, started when first needed and again after a failure."""

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def run(self, size: int, task: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
        """The task's results by rank, on `size` processes."""
        __tracebackhide__ = True
        if size not in self._worlds or not self._worlds[size].alive:
            self._worlds[size] = World(size)
        return self._worlds[size].run(task, *args, timeout=timeout)

    def __enter__(self) -> "Worlds":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for world in self._worlds.values():
            world.close()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """OMP_NUM_THREADS=1 for what is started inside: the processes share few cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    """A process's life: tasks until an empty message or a closed pipe."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipes
    with open(Path(folder) / f"stack-{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        torch.set_num_threads(1)
        warnings.simplefilter("error")
        # A tensor-parallel layer inside FSDP2 returns a view; nothing here changes one in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*are kept in 16 bits", category=UserWarning)  # Muon's own
        if size > 1:
            store = dist.FileStore(str(Path(folder) / "store"), size)  # type: ignore[no-untyped-call]
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, ConnectionResetError):
                break
            if not message:
                break
            pipe.send_bytes(pickle.dumps(_answer(message)))
        faulthandler.unregister(signal.SIGUSR1)
        if size > 1:
            dist.destroy_process_group()


def _answer(message: bytes) -> tuple[str, Any]:
    try:
        folder, module, name, args = pickle.loads(message)
        if sys.path[0] != folder:  # other folders of tests are on the path too, and may have a module of that name
            sys.path.insert(0, folder)
        return "ok", getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        return "error", traceback.format_exc()
