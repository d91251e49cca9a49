"""Which device, which compute dtype, how fast and how much memory: asked of, or measured on, this machine.

The only file that names a kind of accelerator. Imports torch, so no `config.py` imports it.
"""

import functools
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earthshine.errors import ConfigError, nearest

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# bf16 must beat fp32 by this factor to be chosen: its rounding has a price, and a choice close to a tie could differ
# from one start of a run to the next. Real cases are far from it: 2 to 16 where bf16 is native, 0.02 where emulated.
BF16_MIN_SPEEDUP = 1.3

_PROBE_SIZE = 256  # smallest matmul tried in the search for one that is large enough
_CPU_PEAK_SIZE, _PEAK_SIZE = 1024, 8192
_BUDGET_SECONDS = 0.2
_LONGEST_SECONDS = 0.3  # a single matmul on an accelerator may take
_LAUNCH_SECONDS = 5e-3  # more than any launch and wait: these take 6 to 100 us, on a busy host a millisecond
_FAST_SECONDS = 1e-3  # a device that takes less for a 1,024-square matmul is as fast as an accelerator
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "bf16",
)


@dataclass(frozen=True)
class ComputeChoice:
    """The dtype that matmuls run in, why, and the rate measured for it."""

    dtype: torch.dtype
    reason: str
    peak_flops: float  # FLOP/s of a square matmul in `dtype` on the device


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", ...); "auto" is the CUDA or ROCm GPU when there is one.

    Raises ConfigError for a name that is not a device's, and for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"device '{name}' is not a device name; use auto, cpu or cuda[:index].") from e
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{name}' is not available: {torch.cuda.device_count()} GPUs are visible; use cpu or auto."
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise ConfigError(f"device '{name}' is not supported; use auto, cpu or cuda[:index].")
    return device


_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_matmuls_repeatable(device: torch.device) -> bool:
    """Make cuBLAS give the same bits in each run, by an environment variable that it reads at its first matmul.

    False where that may be too late, because the device was in use already. Nothing to do on a CPU. Raises ConfigError
    when the variable has a value that torch.use_deterministic_algorithms would refuse at the first matmul.
    """
    if device.type != "cuda":
        return True
    late = _CUBLAS_WORKSPACE not in os.environ and torch.cuda.is_initialized()
    value = os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")
    if value not in (":4096:8", ":16:8"):
        raise ConfigError(
            f"{_CUBLAS_WORKSPACE}={value!r} in the environment lets matmuls differ from run to run; unset it, or set "
            f"it to :4096:8 (or :16:8, which takes less memory)."
        )
    return not late


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, or `x` itself if it is there already, without waiting for the device.

    Through pinned memory: a copy from pageable memory would wait for all work queued before it.
    """
    if x.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class Stopwatch:
    """Seconds spent inside `with stopwatch:`, by the device's own clock; waits for the device only when asked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host = device.type in ("cpu", "meta")
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def __enter__(self) -> "Stopwatch":
        if self._on_host:
            self._start = time.perf_counter()
        else:
            event = torch.Event(self._device, enable_timing=True)
            event.record()
            self._events.append((event, torch.Event(self._device, enable_timing=True)))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._on_host:
            self._seconds += time.perf_counter() - self._start
        else:
            self._events[-1][1].record()

    @property
    def seconds(self) -> float:
        """Total so far. On an accelerator this waits for the work that is timed."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1e3
        self._events.clear()
        return self._seconds


class Readings:
    """Numbers that a device computes; floats once they are asked for, which waits for the device.

    values: the elements of each tensor, flat, in float64.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._values: list[list[float]] | None = None

    @property
    def values(self) -> list[list[float]]:
        if self._values is None:
            read(self)
        assert self._values is not None
        return self._values


@torch.no_grad()
def read(*readings: Readings) -> None:
    """Fetch the values of all of these with one transfer, and so one wait, per device."""
    pending = list(dict.fromkeys(r for r in readings if r._values is None))
    by_device: dict[torch.device, list[Tensor]] = {}
    for r in pending:
        for tensor in r._tensors:
            by_device.setdefault(tensor.device, []).append(tensor.reshape(-1).to(torch.float64))
    moved = {device: iter(torch.cat(parts).to("cpu").tolist()) for device, parts in by_device.items()}
    for r in pending:
        r._values = [list(itertools.islice(moved[t.device], t.numel())) for t in r._tensors]
        r._tensors = ()


def capability(device: torch.device) -> tuple[int, int]:
    """An NVIDIA GPU's compute capability; (0, 0) for others, AMD's included, whose numbers mean something else.

    A device that is not present (meta, fake tensors) stands for a current one, (9, 0).
    """
    if device.type not in ("cuda", "meta") or torch.version.hip:
        return (0, 0)
    present = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if present else (9, 0)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device is an accelerator with matrix units for bf16: NVIDIA's from Ampere on, and AMD's."""
    supported = device.type in ("cuda", "meta")  # not Apple's or Intel's, whose kernels differ
    return supported and (torch.version.hip is not None or capability(device) >= (8, 0))


def has_flash_attention(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's flash attention takes heads of this width, forward and backward; only in bf16 and fp16.

    Above 192, up to 256, its backward pass needs the shared memory of a data-center GPU: 8.0, 9.0, 10.x, or AMD's.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not has_native_bf16(device):
        return False
    datacenter = capability(device) in ((0, 0), (8, 0), (9, 0)) or capability(device)[0] == 10
    return width <= (256 if datacenter else 192)


def has_grouped_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch.nn.functional.grouped_mm` has a kernel here: bf16 on NVIDIA's Hopper and Blackwell (9.x, 10.x).

    Elsewhere it is a loop that copies the group sizes to the host in every call.
    """
    return device.type != "cpu" and dtype == torch.bfloat16 and capability(device)[0] in (9, 10)


def _time_matmul(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], float]:
    """A function that times one (size x size) matmul, in seconds, after a warm-up.

    On an accelerator: the mean over about 20 ms of matmuls between two waits for the device, which would otherwise be
    most of what is timed.
    """
    generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=generator.device).to(device=device, dtype=dtype)
    b = a.T.contiguous()

    def mean(count: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        _synchronize(device)
        return (time.perf_counter() - start) / count

    mean(1)
    count = 1 if device.type == "cpu" else min(max(round(0.02 / mean(1)), 1), 100)
    return functools.partial(mean, count)


def _large_enough(device: torch.device, dtype: torch.dtype, limit: int) -> tuple[int, float]:
    """The smallest size, doubled from 256, whose matmul takes so long that its launch is negligible; and its seconds.

    A matmul of twice the size has 8 times the operations. If it takes less than 6 times as long, the launch is what is
    being timed.
    """
    size, seconds = _PROBE_SIZE, _time_matmul(device, dtype, _PROBE_SIZE)()
    while size < limit and seconds < _LAUNCH_SECONDS:
        twice = _time_matmul(device, dtype, 2 * size)()
        if twice >= 6 * seconds:
            break
        size, seconds = 2 * size, twice
    return size, seconds


def gemm_peak(device: torch.device | str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a square matmul, measured now in about 0.2 s; remembered for this process and thread count.

    On a CPU, which other processes use too, it is the best of several, and at least the best of a small one on one
    thread, which waits for no other and is seldom interrupted; on an accelerator it is the median.

    size: None for 1,024 on a CPU, and 8,192 on an accelerator or wherever 1,024 takes less than a millisecond. Halved
    until one matmul fits the budget.
    """
    return _gemm_peak(str(device), dtype, size, torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _gemm_peak(device_name: str, dtype: torch.dtype, size: int | None, threads: int, precision: str) -> float:
    del threads, precision  # part of the cache's key
    device = torch.device(device_name)
    probe_size, probe = _large_enough(device, dtype, min(size or _PEAK_SIZE, _PEAK_SIZE))
    if size is None:
        fast = device.type != "cpu" or probe * (_CPU_PEAK_SIZE / probe_size) ** 3 < _FAST_SECONDS
        size = _PEAK_SIZE if fast else _CPU_PEAK_SIZE
    longest = _BUDGET_SECONDS / 3 if device.type == "cpu" else _LONGEST_SECONDS
    while size > _PROBE_SIZE and probe * (size / probe_size) ** 3 > longest:
        size //= 2
    seconds = _timings(device, dtype, size, _BUDGET_SECONDS)  # frees its matrices before the peak of memory is reset
    _forget_peak_memory(device)
    if device.type != "cpu":
        return 2.0 * size**3 / statistics.median(seconds)
    with _one_thread():
        small = _timings(device, dtype, _PROBE_SIZE, _BUDGET_SECONDS / 4)
    return max(2.0 * size**3 / min(seconds), 2.0 * _PROBE_SIZE**3 / min(small))


def _timings(device: torch.device, dtype: torch.dtype, size: int, budget: float) -> list[float]:
    """Seconds of one matmul, as often as fits `budget` seconds, from 3 to 200 times."""
    time_matmul = _time_matmul(device, dtype, size)
    seconds: list[float] = []
    deadline = time.perf_counter() + budget
    while len(seconds) < 3 or (time.perf_counter() < deadline and len(seconds) < 200):
        seconds.append(time_matmul())
    return seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _bf16_speedup(device_name: str) -> float:
    """How many times faster a matmul is in bf16 than in fp32: the best of each, timed in turns for 0.2 s.

    On one thread: on a busy machine threads that wait for each other can make either dtype look 10 times slower.
    """
    device = torch.device(device_name)
    with _one_thread():
        size, _ = _large_enough(device, torch.float32, _PEAK_SIZE)
        fp32 = _time_matmul(device, torch.float32, size)
        bf16 = _time_matmul(device, torch.bfloat16, size)
        pairs = [(fp32(), bf16()) for _ in range(5)]
        deadline = time.perf_counter() + _BUDGET_SECONDS
        while time.perf_counter() < deadline and len(pairs) < 200:
            pairs.append((fp32(), bf16()))
    return min(p[0] for p in pairs) / min(p[1] for p in pairs)


def choose_compute_dtype(requested: str, device: torch.device | str) -> ComputeChoice:
    """Decide the compute dtype: "float32" and "bfloat16" as requested; "auto" is bf16 on an accelerator that has it in
    hardware, and elsewhere only where it is measured to be faster.

    Raises ConfigError for any other request.
    """
    choices = ("auto", "float32", "bfloat16")
    if requested not in choices:
        raise ConfigError(
            f"compute_dtype='{requested}' is not one of {', '.join(choices)}.{nearest(requested, choices)}"
        )
    device = torch.device(device)
    if requested != "auto":
        dtype, reason = DTYPES[requested], "as requested"
    elif has_native_bf16(device):
        dtype, reason = torch.bfloat16, "this accelerator has matrix units for bf16"
    else:
        speedup = _bf16_speedup(str(device))
        faster = speedup >= BF16_MIN_SPEEDUP
        dtype = torch.bfloat16 if faster else torch.float32
        verb = "is" if faster else "is only"
        threads = " on one thread" if device.type == "cpu" else ""
        reason = f"bf16 {verb} {speedup:.2g}x as fast as fp32 here, in square matmuls{threads}"
        if not faster:
            reason += f", below the {BF16_MIN_SPEEDUP}x required"
    return ComputeChoice(dtype, reason, gemm_peak(device, dtype))


def at_least_float32_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, norms, losses and states are kept in: float32, or the dtype itself where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def resolve_ns_dtype(requested: str, device: torch.device) -> torch.dtype:
    """The dtype of Newton-Schulz: "auto" is bf16 on an accelerator that has it in hardware, and elsewhere only where
    it is measured to be faster.
    """
    if requested != "auto":
        return DTYPES[requested]
    return torch.bfloat16 if has_native_bf16(device) else choose_compute_dtype("auto", device).dtype


def _forget_peak_memory(device: torch.device) -> None:
    """Memory that a measurement held must not count as part of a run's peak."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most memory held so far: of the process on a CPU (VmHWM); on an accelerator of the allocator, since the last
    measurement of a GEMM peak.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():  # some kernels (gVisor's) leave the line out
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


def total_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Memory of the machine, or the container's limit where that is lower; of an accelerator, its own."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


def _cpu() -> tuple[str, list[str]]:
    """The processor's name, and those of its flags that decide how fast matmuls are."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, []
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, [f for f in _CPU_FLAGS if f in flags]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where a run happens, ready for JSON (a run folder's env.json): versions, processor, threads, device, precision.

    device: the run's; `pick_device()` when None. A package that is not installed has the version None. Nothing is
    measured, and no package is imported.
    """
    packages = ("earthshine", "torch", "numpy", "safetensors", "tokenizers", "transformers")
    device = device or pick_device()
    cpu, flags = _cpu()
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_flags": flags,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "memory_bytes": total_memory_bytes(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
