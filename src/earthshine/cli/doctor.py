"""`earthshine doctor`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from earthshine.cli.options import print_json
from earthshine.console import counted, human_bytes, log, table
from earthshine.errors import ConfigError

DESCRIPTION = "What this machine is and can do: versions, device, compute dtype and why, measured speed, disk."
EXAMPLES = (
    ("before the first run", "earthshine doctor"),
    ("is the disk for the runs fast and large enough?", "earthshine doctor --path /data/runs"),
    ("to attach to a bug report", "earthshine doctor --json > doctor.json"),
)


@dataclass(frozen=True)
class Options:
    path: Annotated[Path, "DIR"] = Path()
    """Folder whose disk is measured, by writing 64 MiB there and removing them."""

    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    measured = _measure(options.path)
    if options.json:
        print_json(measured)
        return
    env, compute, disk = measured["environment"], measured["compute"], measured["disk"]
    experts, attention = measured["experts"], measured["attention"]
    rows = [(name, version or "not installed") for name, version in env["versions"].items()]
    rows += [
        ("platform", env["platform"]),
        ("processor", f"{env['cpu']}, {counted(env['cores'], 'core')}, {counted(env['threads'], 'thread')} used"),
        ("features", " ".join(env["cpu_flags"]) or "unknown"),
        ("device", f"{env['device']} ({env['device_name']})"),
        ("memory", human_bytes(env["memory_bytes"])),
        ("compute dtype", f"{compute['dtype']}: {compute['reason']}"),
        ("expert matmuls", f"{experts['backend']}: {experts['reason']}"),
        ("attention", f"{attention['backend']}: {attention['reason']}"),
    ]
    free = human_bytes(disk["free_bytes"]) if math.isfinite(disk["free_bytes"]) else "not reported"
    rows += [(f"matmul in {name}", f"{flops / 1e9:,.1f} GFLOP/s") for name, flops in measured["gemm_flops"].items()]
    rows += [
        ("disk free", f"{free} at {disk['path']}"),
        ("disk write", f"{human_bytes(disk['write_bytes_per_second'])}/s, sequential, synced"),
    ]
    print(table(("what", "value"), rows))


def _measure(path: Path) -> dict[str, Any]:
    from earthshine import device as devices
    from earthshine.files import free_bytes, write_speed

    if not path.is_dir():
        raise ConfigError(f"path={path} is not a folder: name one, to measure the disk that it is on.")
    log("measuring for a few seconds...")
    device = devices.pick_device()
    choice = devices.choose_compute_dtype("auto", device)
    peaks = {n: devices.gemm_peak(device, devices.DTYPES[n]) for n in ("float32", "bfloat16", "float64")}
    return {
        "environment": devices.environment(),
        "compute": {"dtype": str(choice.dtype).removeprefix("torch."), "reason": choice.reason},
        "experts": _experts(choice.dtype, device),
        "attention": _attention(choice.dtype, device),
        "gemm_flops": peaks,
        "disk": {
            "path": str(path.absolute()),
            "free_bytes": free_bytes(path),
            "write_bytes_per_second": write_speed(path),
        },
    }


def _experts(dtype: Any, device: Any) -> dict[str, str]:
    import torch

    from earthshine.ops.grouped_experts import choose_backend

    rows, weights = (torch.empty(shape, dtype=dtype, device=device) for shape in ((16, 64), (2, 64, 64)))
    backend, reason = choose_backend(rows, weights, 0)
    return {"backend": backend, "reason": reason}


def _attention(dtype: Any, device: Any) -> dict[str, str]:
    """What a job with document masks uses for heads of 128, at 8,192 positions."""
    from earthshine.ops.attention import choose_backend

    backend, reason = choose_backend(device, dtype, (128, 128), 8192, 8192, documents=True)
    return {"backend": backend, "reason": reason}
