"""Reading any slice, refusing damaged files. The safetensors library is the reference."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from earthshine.checkpoint import safetensors_store
from earthshine.checkpoint.safetensors_store import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Store,
    check_finite,
    read_header,
)
from earthshine.errors import WeightsError


def of_every_dtype() -> dict[str, Tensor]:
    values = torch.arange(24).reshape(4, 6)
    return {name: (values % 2 if name == "BOOL" else values).to(dtype) for name, dtype in DTYPES.items()}


def bits(x: Tensor) -> Tensor:
    """For comparing bit for bit, whatever the type."""
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def write_file(path: Path, header: Any, data: bytes = b"", header_bytes: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data)


def test_reads_what_the_library_wrote_in_every_dtype(tmp_path):
    tensors = of_every_dtype() | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    store = Store(tmp_path)
    assert store.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert store.info(name).shape == tuple(tensor.shape)
        assert torch.equal(bits(store.read(name)), bits(tensor)), name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_slice_is_the_slice_of_the_whole(tmp_path, monkeypatch, data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    slices = [slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape]
    slices = slices[: data.draw(st.integers(0, len(shape)))]
    whole = torch.randn(shape)
    save_file({"before": torch.ones(3), "x": whole}, tmp_path / SINGLE_FILE)
    # short runs: cut out of whole rows, in blocks of a few; long ones: a read each
    monkeypatch.setattr(safetensors_store, "MIN_RUN_BYTES", data.draw(st.sampled_from([0, 4096])))
    monkeypatch.setattr(safetensors_store, "BLOCK_BYTES", data.draw(st.sampled_from([1, 100])))
    assert torch.equal(Store(tmp_path).read("x", slices), whole[tuple(slices)])


def test_reads_only_the_bytes_asked_for(tmp_path, monkeypatch):
    save_file({"x": torch.randn(64, 4096)}, tmp_path / SINGLE_FILE)
    store, read = Store(tmp_path), []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(preadv(fd, buffers, at)) or read[-1])
    store.read("x", [slice(3, 5)])
    assert read == [2 * 4096 * 4]
    read.clear()
    store.read("x", [slice(3, 5), slice(0, 2048)])
    assert read == [2048 * 4] * 2


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "corrupt"),
        (b"[1, 2]", b"", "corrupt"),
        (b"\xff\xfe", b"", "corrupt"),
        (b"[" * 5000, b"", "corrupt"),
        ({"a": 3}, b"", "corrupt"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "data_offsets"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"x", "stands twice"),
        ({"a": ENTRY | {"dtype": "Q4"}}, bytes(8), "dtype 'Q4'"),
        ({"a": ENTRY | {"shape": [-2]}}, bytes(8), "shape"),
        ({"a": ENTRY | {"shape": [2.0]}}, bytes(8), "shape"),
        ({"a": ENTRY | {"shape": [3]}}, bytes(8), "needs 12 bytes and has 8"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8), "corrupt"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12), "tensor b overlaps"),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "overlaps"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, bytes(20), "tensor b leaves a hole"),
        ({"a": ENTRY}, bytes(7), "is truncated"),
        ({"a": ENTRY}, bytes(9), "belong to no tensor"),
    ],
)
def test_damaged_headers_are_named(tmp_path, header, data, message):
    path = tmp_path / SINGLE_FILE
    write_file(path, header, data)
    with pytest.raises(WeightsError, match=message) as caught:
        Store(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_truncated_files_are_named(tmp_path, keep):
    path = tmp_path / SINGLE_FILE
    save_file({"x": torch.randn(9)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="truncated"):
        read_header(path)


def test_a_header_larger_than_the_format_allows_is_not_read(tmp_path):
    write_file(tmp_path / SINGLE_FILE, b"{}", header_bytes=1 << 60)
    with pytest.raises(WeightsError, match="claims a header"):
        Store(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / SINGLE_FILE
    save_file({"x": torch.randn(9)}, path)
    store = Store(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(WeightsError, match="inside tensor x"):
        store.read("x")


def test_no_weights_and_no_such_tensor(tmp_path):
    with pytest.raises(WeightsError, match="no weights"):
        Store(tmp_path)
    save_file({"x": torch.randn(9)}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match="no tensor y"):
        Store(tmp_path).read("y")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "y": "b.safetensors"}, "b.safetensors"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, "promises y"),
        ({"y": "a.safetensors"}, "a.safetensors holds x, but .* does not list it"),
        ({"x": "../a.safetensors"}, "same directory"),
        ({"x": 3}, "index"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path, weight_map, message):
    save_file({"x": torch.randn(9)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=message):
        Store(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_anywhere_is_found(dtype, bad):
    x = torch.randn(1003).to(dtype)
    check_finite("w", x)
    for at in (0, 501, 1002):
        y = x.clone()
        y[at] = bad
        with pytest.raises(WeightsError, match="tensor w "):
            check_finite("w", y)


def test_a_stale_index(hf_dir, dense):
    directory = hf_dir(dense)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    (directory / INDEX_FILE).write_text('{"weight_map": {"model.embed_tokens.weight": "a.safetensors"}}')
    with pytest.raises(WeightsError, match=f"a.safetensors holds lm_head.weight, but {INDEX_FILE} does not list it"):
        Store(directory)
