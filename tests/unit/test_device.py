"""Device: choices are measured, obeyed or refused with a reason."""

import json

import pytest
import torch

from earthshine import device as devices
from earthshine.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch):
    """Replace measurements by given ones: name of the type -> FLOP/s."""

    def use(float32: float, bfloat16: float) -> None:
        rates = {torch.float32: float32, torch.bfloat16: bfloat16}
        monkeypatch.setattr(devices, "gemm_peak", lambda device, dtype, size=1024: rates[dtype])
        monkeypatch.setattr(devices, "_bf16_speedup", lambda device: bfloat16 / float32)

    return use


def test_auto_takes_bf16_only_where_it_is_faster(measured):
    measured(float32=1e11, bfloat16=4e11)
    choice = devices.choose_compute_dtype("auto", CPU)
    assert (choice.dtype, choice.peak_flops) == (torch.bfloat16, 4e11)
    assert "bf16 is 4x as fast" in choice.reason
    measured(float32=1e11, bfloat16=2e9)
    choice = devices.choose_compute_dtype("auto", CPU)
    assert (choice.dtype, choice.peak_flops) == (torch.float32, 1e11)
    assert "bf16 is only 0.02x" in choice.reason


def test_the_choice_is_measured_and_leaves_the_threads_as_they_were():
    threads = torch.get_num_threads()
    assert 1e-4 < devices._bf16_speedup("cpu") < 1e4
    assert torch.get_num_threads() == threads


def test_a_tie_stays_in_float32(measured):
    measured(float32=1.0e11, bfloat16=1.2e11)
    assert devices.choose_compute_dtype("auto", CPU).dtype == torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_request_is_obeyed(measured, name):
    measured(float32=1e11, bfloat16=1e9)
    choice = devices.choose_compute_dtype(name, CPU)
    assert (choice.dtype, choice.reason) == (devices.DTYPES[name], "as requested")


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"compute_dtype='bfloat' .*Did you mean 'bfloat16'\?"):
        devices.choose_compute_dtype("bfloat", CPU)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_gemm_peak_is_a_rate_and_is_remembered(name):
    peak = devices.gemm_peak(CPU, devices.DTYPES[name], size=128)
    assert 1e6 < peak < 1e15
    assert devices.gemm_peak("cpu", devices.DTYPES[name], size=128) == peak


def test_gemm_peak_shrinks_the_product_of_a_slow_type(monkeypatch):
    """One product in an emulated type can take 50 times longer; the budget must hold all the same."""
    sizes = []

    def slow(device: torch.device, dtype: torch.dtype, size: int):
        sizes.append(size)
        return lambda: 1e-9 * size**3

    monkeypatch.setattr(devices, "_time_product", slow)
    assert devices._gemm_peak.__wrapped__("cpu", torch.float16, 4096, 1, "highest") == pytest.approx(2e9)
    assert sizes[-1] == 256


def test_pick_device():
    assert devices.pick_device("cpu") == CPU
    assert devices.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
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
