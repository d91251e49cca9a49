"""Device: choices are measured, obeyed or refused with a reason."""

import itertools
import json
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from earthshine import device as devices
from earthshine.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def feed(monkeypatch):
    """Put timings in: a launch and wait of `latency` seconds, operations at these FLOP/s. Returns what was timed."""
    devices._gemm_peak.cache_clear()
    devices._bf16_speedup.cache_clear()

    def use(float32: float, bfloat16: float, latency: float = 0.0) -> list[tuple[torch.dtype, int]]:
        rates = {torch.float32: float32, torch.bfloat16: bfloat16}
        timed: list[tuple[torch.dtype, int]] = []

        def time_product(device: torch.device, dtype: torch.dtype, size: int):
            timed.append((dtype, size))
            return lambda: latency + 2 * size**3 / rates[dtype]

        monkeypatch.setattr(devices, "_time_matmul", time_product)
        return timed

    yield use
    devices._gemm_peak.cache_clear()
    devices._bf16_speedup.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that there is a GPU of a compute capability, "cuda"."""

    def use(*capability: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(devices, "_forget_peak_memory", lambda device: None)
        return torch.device("cuda")

    return use


@pytest.mark.parametrize("latency", [0.0, 6e-6, 20e-6, 100e-6, 1e-3])
@pytest.mark.parametrize(
    "float32, bfloat16", [(67e12, 990e12), (19.5e12, 312e12), (163e12, 1307e12), (82e12, 165e12)]
)  # H100, A100, MI300X, 4090
def test_launching_a_product_decides_nothing(feed, float32, bfloat16, latency):
    """Of a 256-square product on a GPU a launch and a wait are nearly all the time, in both types alike."""
    feed(float32, bfloat16, latency)
    choice = devices.choose_compute_dtype("auto", CPU)
    assert choice.dtype == torch.bfloat16
    flops = 2 * 8192**3
    assert choice.peak_flops == pytest.approx(flops / (latency + flops / bfloat16))


@pytest.mark.parametrize(
    "float32, bfloat16, dtype",
    [
        (9e10, 4.4e11, torch.bfloat16),  # AVX-512 with bf16
        (7.9e10, 1.3e9, torch.float32),  # emulated
        (1e11, 1.29e11, torch.float32),  # a tie stays in float32
        (1e11, 1.31e11, torch.bfloat16),
    ],
)
def test_a_cpu_is_asked_with_small_products(feed, float32, bfloat16, dtype):
    timed = feed(float32, bfloat16, latency=3e-6)
    choice = devices.choose_compute_dtype("auto", CPU)
    assert choice.dtype == dtype
    sizes = {t for t, size in timed if size == 256}, max(size for _, size in timed)
    assert sizes == ({torch.float32, torch.bfloat16}, 1024)
    flops = 2 * 1024**3
    rate = bfloat16 if dtype == torch.bfloat16 else float32
    assert choice.peak_flops == pytest.approx(flops / (3e-6 + flops / rate))
    words = "bf16 is " if dtype == torch.bfloat16 else "bf16 is only "
    assert choice.reason.startswith(words) and "on one thread" in choice.reason


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu"])
def test_other_makers_accelerators_are_not_taken_for_nvidias(kind):
    device = torch.device(kind)
    assert devices.capability(device) == (0, 0) and not devices.has_native_bf16(device)
    assert not devices.has_flash_attention(device, torch.bfloat16, 64)
    assert not devices.has_grouped_matmul(device, torch.bfloat16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_an_accelerator_with_bf16_units_computes_in_bf16_whatever_is_measured(feed, gpu, capability):
    feed(float32=1e12, bfloat16=1e12, latency=1e-3)
    choice = devices.choose_compute_dtype("auto", gpu(*capability))
    assert choice.dtype == torch.bfloat16 and "matrix units for bf16" in choice.reason


@pytest.mark.parametrize("rate, dtype", [(4e11, torch.float32), (6e13, torch.bfloat16)])
def test_an_accelerator_without_bf16_units_is_measured(feed, gpu, rate, dtype):
    feed(float32=14e12, bfloat16=rate, latency=20e-6)
    choice = devices.choose_compute_dtype("auto", gpu(7, 0))
    assert choice.dtype == dtype and "thread" not in choice.reason


def test_a_device_that_is_not_here_stands_for_a_current_one(gpu, monkeypatch):
    """Also on a machine with an older GPU: what is planned on meta tensors is no matter of this machine."""
    meta = torch.device("meta")
    assert devices.capability(meta) == devices.capability(torch.device("cuda")) == (9, 0)
    assert devices.capability(gpu(7, 5)) == (7, 5)
    assert devices.capability(meta) == (9, 0) and devices.capability(CPU) == (0, 0)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert devices.has_native_bf16(torch.device("cuda")) and not devices.has_native_bf16(CPU)
    assert devices.has_flash_attention(torch.device("cuda"), torch.bfloat16, 256)
    assert not devices.has_grouped_matmul(torch.device("cuda"), torch.bfloat16)


def test_an_accelerators_peak_is_of_8192_and_less_only_where_that_takes_too_long(feed, gpu):
    timed = feed(float32=14e12, bfloat16=990e12, latency=20e-6)
    assert devices.gemm_peak(gpu(9, 0), torch.bfloat16) == pytest.approx(990e12, rel=0.02)
    assert timed[-1] == (torch.bfloat16, 8192)
    devices.gemm_peak("cuda", torch.float32)
    assert timed[-1] == (torch.float32, 8192)  # 79 ms each
    feed(float32=5e11, bfloat16=1e12)
    devices._gemm_peak.cache_clear()
    assert devices.gemm_peak("cuda", torch.float32) == pytest.approx(5e11)


def test_products_on_an_accelerator_are_timed_in_batches(monkeypatch):
    """No device is here: "meta" stands for one. A wait after each product would be timed with it."""
    between: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                between[-1] += 1
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(devices, "_synchronize", lambda device: between.append(0))
    monkeypatch.setattr(devices.time, "perf_counter", iter(range(1000)).__next__)
    with Products():
        once = devices._time_matmul(torch.device("meta"), torch.bfloat16, 64)
        assert between[::2] == [1, 1]  # the cold one, and the one that says how many are a batch: here a second each
        monkeypatch.setattr(devices.time, "perf_counter", (n * 1e-4 for n in range(1000)).__next__)
        once = devices._time_matmul(torch.device("meta"), torch.bfloat16, 64)
        assert once() == pytest.approx(1e-4 / 100) and between[-2] == 100


def test_the_choice_is_measured_on_one_thread_and_leaves_the_threads_as_they_were(feed, monkeypatch):
    feed(float32=1e11, bfloat16=2.5e11)
    fed, seen = devices._time_matmul, []
    monkeypatch.setattr(devices, "_time_matmul", lambda *a: seen.append(torch.get_num_threads()) or fed(*a))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert devices._bf16_speedup("cpu") == pytest.approx(2.5)
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_request_is_obeyed(feed, name):
    feed(float32=1e11, bfloat16=1e9)
    choice = devices.choose_compute_dtype(name, CPU)
    assert (choice.dtype, choice.reason) == (devices.DTYPES[name], "as requested")


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"compute_dtype='bfloat' .*Did you mean 'bfloat16'\?"):
        devices.choose_compute_dtype("bfloat", CPU)


def test_sums_are_kept_in_float32_or_wider():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [devices.at_least_float32_dtype(d) for d in dtypes] == [torch.float32] * 3 + [torch.float64]


def test_newton_schulz_dtype_by_device(monkeypatch):
    for name in ("float32", "bfloat16"):
        choice = devices.ComputeChoice(dtype=devices.DTYPES[name], reason="test", peak_flops=1.0)
        monkeypatch.setattr(devices, "choose_compute_dtype", lambda requested, device, choice=choice: choice)
        assert devices.resolve_ns_dtype("auto", CPU) == devices.resolve_ns_dtype(name, CPU) == devices.DTYPES[name]
    assert devices.resolve_ns_dtype("auto", torch.device("meta")) == torch.bfloat16  # not a CPU


@pytest.mark.parametrize(("one_thread", "best"), [(1.0, 2 * 512**3 / 2e-4), (1e-5, 2 * 256**3 / 1e-5)])
def test_gemm_peak_of_a_cpu_is_the_best_rate_also_of_one_thread_and_is_remembered(monkeypatch, one_thread, best):
    """Two threads that wait for each other on a busy machine must not make a peak of a hundredth."""
    seconds = itertools.cycle([1e-3, 2e-4, 3e-4])  # one of three undisturbed
    threads = 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def set_num_threads(number):
        nonlocal threads
        threads = number

    def time_matmul(device, dtype, size):
        return (lambda: one_thread) if threads == 1 else (lambda: next(seconds))

    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(devices, "_time_matmul", time_matmul)
    monkeypatch.setattr(devices, "_BUDGET_SECONDS", 1e-2)
    monkeypatch.setattr(devices.time, "perf_counter", itertools.count().__next__)  # the budget is spent at once
    devices._gemm_peak.cache_clear()
    peak = devices.gemm_peak(CPU, torch.float64, size=512)
    assert (peak, threads) == (best, 2)
    monkeypatch.setattr(devices, "_time_matmul", lambda device, dtype, size: pytest.fail("measured again"))
    assert devices.gemm_peak("cpu", torch.float64, size=512) == peak
    devices._gemm_peak.cache_clear()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_one_product_is_timed_by_the_clock(monkeypatch, name):
    ticks = itertools.count()
    monkeypatch.setattr(devices.time, "perf_counter", lambda: 0.5 * next(ticks))
    once = devices._time_matmul(CPU, devices.DTYPES[name], 16)
    assert (once(), next(ticks)) == (0.5, 4)  # one cold and one timed, two looks at the clock each


def test_gemm_peak_shrinks_the_product_of_a_slow_type(monkeypatch):
    """One product in an emulated type can take 50 times longer; the budget must hold all the same."""
    sizes = []

    def slow(device: torch.device, dtype: torch.dtype, size: int):
        sizes.append(size)
        return lambda: 1e-9 * size**3

    monkeypatch.setattr(devices, "_time_matmul", slow)
    assert devices._gemm_peak.__wrapped__("cpu", torch.float16, 4096, 1, "highest") == pytest.approx(2e9)
    assert sizes[-1] == 256


@pytest.mark.parametrize(
    "set_to, initialized, in_time",
    [(None, False, True), (None, True, False), (":16:8", True, True), (":4096:8", False, True)],
)
def test_cublas_is_told_to_repeat_itself_before_its_first_product(monkeypatch, set_to, initialized, in_time):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", set_to or "")
    if set_to is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    assert devices.make_matmuls_repeatable(torch.device("cuda")) == in_time
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (set_to or ":4096:8")


def test_a_cublas_setting_that_does_not_repeat_is_refused_and_a_cpu_needs_none(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=':0:0' .* unset it"):
        devices.make_matmuls_repeatable(torch.device("cuda"))
    assert devices.make_matmuls_repeatable(CPU)


def test_pick_device():
    assert devices.pick_device("cpu") == CPU
    assert devices.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_a_device_that_this_machine_lacks_is_refused(name):
    with pytest.raises(ConfigError, match=f"device '{name}' is not"):
        devices.pick_device(name)


def test_memory_is_measured_in_bytes():
    held = torch.ones(4 << 20)  # 16 MiB, touched
    peak = devices.peak_memory_bytes()
    assert held.nbytes < peak < devices.total_memory_bytes()


def test_memory_where_the_kernel_does_not_tell_its_peak(monkeypatch):
    usual = devices.peak_memory_bytes()
    monkeypatch.setattr(devices.Path, "read_text", lambda _: "VmRSS:  1 kB\n")
    assert devices.peak_memory_bytes() > usual / 2


def test_environment_names_the_device_of_the_run():
    assert devices.environment(torch.device("meta"))["device"] == "meta"


def test_environment_is_json_and_names_every_version():
    env = json.loads(json.dumps(devices.environment()))
    assert env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert env["device"] in ("cpu", "cuda")
    assert {"earthshine", "python", "numpy", "transformers"} <= set(env["versions"])


def test_a_package_that_is_not_installed_has_no_version():
    assert devices._version("no-such-package-here") is None


def test_what_goes_to_an_accelerator_is_page_locked_and_not_waited_for(monkeypatch):
    """Elsewhere nothing is copied twice."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: calls.append("page-locked") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **options: calls.append((*args, options)) or x)
    x, cuda = torch.zeros(2), torch.device("cuda")
    devices.to_device(x, cuda)
    assert calls == ["page-locked", (cuda, {"non_blocking": True})]
    calls.clear()
    devices.to_device(x, torch.device("cpu"))
    assert calls == [(torch.device("cpu"), {"non_blocking": True})]
