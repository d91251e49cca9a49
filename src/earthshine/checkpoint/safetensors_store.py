"""Read any slice of any tensor of a directory of safetensors files.

By `pread`, never by mapping: mapped pages count as the process's memory and a truncated file kills it
with SIGBUS. Headers are not trusted: every byte of the data section must belong to exactly one tensor.
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, data without holes).
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from earthshine.advice import instead_of_weights
from earthshine.config import parse_json, read_json
from earthshine.errors import WeightsError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BLOCK_BYTES = 32 << 20  # bytes in flight at a time: large enough for the disk, small beside one matrix
MAX_READ_BYTES = 1 << 30  # macOS refuses one read of 2 GiB
MIN_RUN_BYTES = 4096  # a strided read shorter than a page costs as much as the page


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor; `offset` is absolute within `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises WeightsError, naming the file, when it is truncated, when the header is not what the format says, or when
    tensors overlap, leave a hole, or do not fill the data section.
    """
    try:
        with path.open("rb") as f:
            file_bytes = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise WeightsError(
                    f"{path} is truncated or not a safetensors file: it has {file_bytes} bytes and claims a header of "
                    f"{header_bytes}. Fetch it again."
                )
            text = f.read(header_bytes)
    except OSError as e:
        fix = " Fetch it again." if isinstance(e, FileNotFoundError) else ""
        raise WeightsError(f"{path} cannot be read: {e.strerror}.{fix}") from e
    try:
        header = parse_json(text, distinct=True)
        header.pop("__metadata__", None)
        infos = [_header_entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(f"{path} has a corrupt safetensors header: {type(e).__name__} {e}. Fetch it again.") from e
    infos.sort(key=lambda t: (t.offset, t.num_bytes))
    end = 8 + header_bytes
    for info in infos:
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise WeightsError(f"{path}: tensor {info.name} {fault} (starts at byte {info.offset}, expected {end}).")
        end += info.num_bytes
    if end != file_bytes:
        fault = "truncated" if end > file_bytes else "followed by bytes that belong to no tensor"
        raise WeightsError(f"{path} is {fault}: its header describes {end} bytes, the file has {file_bytes}.")
    return {t.name: t for t in infos}


def _header_entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if not name.isprintable():
        raise WeightsError(f"{path}: a tensor is named {name!r}: control characters have no place in a name.")
    if entry["dtype"] not in DTYPES:
        raise WeightsError(f"{path}: tensor {name} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}.")
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has shape {shape} at bytes {start} to {stop}")
    info = TensorInfo(name, DTYPES[entry["dtype"]], shape, path.name, data_start + start)
    if stop - start != info.num_bytes:
        raise ValueError(f"tensor {name} of shape {shape} needs {info.num_bytes} bytes and has {stop - start}")
    return info


class Store:
    """All tensors of a directory holding `model.safetensors`, or an index and its shards.

    Only headers are read on construction. Raises WeightsError when there are no weights, a shard is missing or
    damaged, or index and shards disagree about a tensor.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.is_file():  # transformers' own precedence
            self._tensors = read_header(single)
        elif index.is_file():
            self._tensors = self._read_shards(index)
        else:
            raise WeightsError(
                f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{instead_of_weights(self.directory)}"
            )

    @staticmethod
    def _read_shards(index: Path) -> dict[str, TensorInfo]:
        try:
            weight_map = read_json(index, distinct=True)["weight_map"]
            files = sorted(set(weight_map.values()), key=str)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise WeightsError(f"{index} is not a readable index with a weight_map: {e}.") from e
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            if not isinstance(file, str) or Path(file).name != file:
                raise WeightsError(f"{index}: shard {file!r} must be a file name in the same directory.")
            for name, info in read_header(index.parent / file).items():
                if weight_map.get(name) != file:
                    index_says = f"says that {weight_map[name]} holds it" if name in weight_map else "does not list it"
                    raise WeightsError(
                        f"{index.parent / file} holds {name}, but {index.name} {index_says}: index and weight files "
                        f"are not of the same download. Fetch both again."
                    )
                tensors[name] = info
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            raise WeightsError(f"{index} promises {missing[0]} in {weight_map[missing[0]]}, which does not hold it.")
        return tensors

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and location of a tensor. Raises WeightsError when there is no such tensor."""
        if name not in self._tensors:
            raise WeightsError(f"{self.directory} has no tensor {name}.")
        return self._tensors[name]

    def items(self) -> list[tuple[str, TensorInfo]]:
        """Every tensor's name and header entry, sorted."""
        return sorted(self._tensors.items())

    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return [self.directory / f for f in sorted({t.file for t in self._tensors.values()})]

    def read(self, name: str, slices: Sequence[slice] | None = None) -> torch.Tensor:
        """A tensor, or a part of it: one slice of step 1 per leading dimension, the others whole. Reads only that part.

        Raises WeightsError when the file ends early (it changed since its header was read).
        """
        info = self.info(name)
        bounds = resolve_slices(info.shape, slices)
        shape = tuple(stop - start for start, stop in bounds)
        out = torch.empty(shape, dtype=info.dtype)
        if out.numel():
            path = self.directory / info.file
            fd = os.open(path, os.O_RDONLY)
            try:
                self._read_runs(fd, info, bounds, out)
            finally:
                os.close(fd)
        return out

    def _read_runs(self, fd: int, info: TensorInfo, bounds: list[tuple[int, int]], out: torch.Tensor) -> None:
        """Fill `out` by one pread per contiguous run of the wanted part; short runs are cut out of whole rows."""
        num_cut = len(bounds)  # the dimensions after these are read whole
        while num_cut > 0 and bounds[num_cut - 1] == (0, info.shape[num_cut - 1]):
            num_cut -= 1
        last = max(num_cut - 1, 0)  # the dimension whose range, with everything inside it, is contiguous
        inner = math.prod(info.shape[last + 1 :]) * info.dtype.itemsize
        start, stop = bounds[last] if bounds else (0, 1)
        run = (stop - start) * inner
        target = as_bytes(out)
        strides = [math.prod(info.shape[d + 1 :]) * info.dtype.itemsize for d in range(last)]
        rows = itertools.product(*(range(a, b) for a, b in bounds[:last]))
        if run >= MIN_RUN_BYTES or last == 0:
            for i, row in enumerate(rows):
                at = info.offset + sum(r * s for r, s in zip(row, strides, strict=True)) + start * inner
                self._pread(fd, info, target[i * run : (i + 1) * run], at)
            return
        (first, end), row_bytes = bounds[0], strides[0]
        step = max(1, BLOCK_BYTES // row_bytes)
        for r in range(first, end, step):
            n = min(step, end - r)
            block = torch.empty((n, *info.shape[1:]), dtype=info.dtype)
            self._pread(fd, info, as_bytes(block), info.offset + r * row_bytes)
            out[r - first : r - first + n] = block[(slice(None), *(slice(a, b) for a, b in bounds[1:]))]

    def _pread(self, fd: int, info: TensorInfo, target: memoryview, at: int) -> None:
        while target:
            count = os.preadv(fd, [target[:MAX_READ_BYTES]], at)
            if count == 0:
                raise WeightsError(f"{self.directory / info.file} ends inside tensor {info.name}: it was truncated.")
            target, at = target[count:], at + count

    def read_ahead(self, name: str) -> None:
        """Ask the system to fetch a tensor into its page cache; returns at once, and is only a hint."""
        info = self.info(name)
        fd = os.open(self.directory / info.file, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(fd, info.offset, info.num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def resolve_slices(shape: Sequence[int], slices: Sequence[slice] | None) -> list[tuple[int, int]]:
    """Start and stop per dimension. Steps other than 1 and more slices than dimensions are bugs of the caller."""
    given = list(slices or ())
    assert len(given) <= len(shape), f"{len(given)} slices for shape {tuple(shape)}"
    bounds = []
    for size, s in itertools.zip_longest(shape, given, fillvalue=slice(None)):
        assert isinstance(size, int)
        start, stop, step = s.indices(size)
        assert step == 1, "only contiguous slices are read"
        bounds.append((start, max(start, stop)))
    return bounds


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy of it."""
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


def check_finite(name: str, part: torch.Tensor) -> None:
    """Raises WeightsError, naming the tensor, when a part of it holds a NaN or an infinity."""
    if part.is_floating_point() and part.numel():
        low, high = torch.aminmax(part)  # one pass without a temporary; both are NaN when any element is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise WeightsError(f"tensor {name} holds a NaN or an infinity: the checkpoint it is in is damaged.")


def check_fits(name: str, part: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises WeightsError, naming the tensor, when a finite value would become an infinity in `dtype`.

    float16 ends at 65504, and bfloat16 a little below float32.
    """
    if not (part.numel() and part.is_floating_point()) or torch.finfo(dtype).max >= torch.finfo(part.dtype).max:
        return
    ends = torch.stack(torch.aminmax(part))  # rounding keeps the order, so that no other value goes farther
    if ends.isfinite().all() and not ends.to(dtype).isfinite().all():
        raise WeightsError(
            f"tensor {name} holds values that {dtype} cannot: from {float(ends[0]):.4g} to {float(ends[1]):.4g}, and "
            f"it ends at {torch.finfo(dtype).max:.4g}. Take a wider dtype."
        )


def row_blocks(shape: Sequence[int], itemsize: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[slice, ...]]:
    """Slices of the first dimension that cover a tensor in order, each of about `block_bytes` (at least one row)."""
    if not shape:
        yield ()
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    rows = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])),)
