"""The offline conversion: what is written, what a kill leaves, and what bad input leaves (nothing)."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from earthshine.checkpoint.load import load_model
from earthshine.checkpoint.safetensors_store import Store
from earthshine.errors import ConfigError, DiskFullError, OutputExistsError, WeightsError
from earthshine.staging import staging_path
from earthshine.upcycle import convert
from earthshine.upcycle.config import UpcycleConfig
from earthshine.upcycle.convert import check_upcycled_files, upcycle
from earthshine.upcycle.plan import plan_upcycle

SMALL_SHARDS = UpcycleConfig(experts=4, max_shard_gib=40e3 / 2**30)
DOWN = "model.layers.2.mlp.down_proj.weight"


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def left_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("layers", [(), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_its_source_bit_for_bit(dense_dir, tmp_path, layers, dtype):
    source = dense_dir(dtype=dtype)
    plan = upcycle(source, tmp_path / "out", UpcycleConfig(experts=4, layers=layers))
    dense, moe = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    targets = {t.entry.hf: t for t in plan.targets}
    assert set(moe) == set(targets)
    for row in plan.ledger():
        for name in row["targets"]:
            assert moe[name].dtype == dtype
            if row["recipe"] == "copy":
                assert torch.equal(moe[name], dense[row["sources"][0]]), name
            elif row["recipe"] == "zeros":
                assert not moe[name].any()
            else:
                assert 0.5 < moe[name].float().std() / 0.02 < 1.5
            assert torch.equal(moe[name], targets[name].rule.read(plan.store)), "the stream and the rule disagree"


def test_what_else_is_written(dense_dir, tmp_path):
    source, out = dense_dir(tie_word_embeddings=True), tmp_path / "out"
    plan = upcycle(source, out)
    assert left_in(out) == [
        "config.json",
        "earthshine.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["eos_token_id"]) == ("mixtral", True, 2)
    assert "lm_head.weight" not in Store(out)
    manifest = json.loads((out / "earthshine.json").read_text())
    assert manifest["ledger"] == plan.ledger()
    assert manifest["options"]["experts"] == 8
    assert check_upcycled_files(out) == 4
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"tokenizer.json is missing or differs"):
        check_upcycled_files(out)


def test_a_tensor_larger_than_what_is_kept_is_the_same(dense_dir, tmp_path, monkeypatch):
    source = dense_dir()
    upcycle(source, tmp_path / "a", UpcycleConfig(experts=2))
    monkeypatch.setattr(convert, "KEEP_BYTES", 2000)
    monkeypatch.setattr("earthshine.checkpoint.safetensors_store.BLOCK_BYTES", 1000)
    upcycle(source, tmp_path / "b", UpcycleConfig(experts=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_each_source_is_read_once(dense_dir, tmp_path, monkeypatch):
    source, read, preadv = dense_dir(), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(preadv(fd, buffers, at)) or read[-1])
    plan = upcycle(source, tmp_path / "out")
    assert sum(read) == sum(info.num_bytes for _, info in plan.store.items())


KILLED_CHILD = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from earthshine.upcycle import convert
from earthshine.upcycle.config import UpcycleConfig
source, out, where, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
def die():
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
class Reader(convert.TargetReader):
    def rows(self, target):
        for block in super().rows(target):
            yield block
            if where == "block":
                die()
convert.TargetReader = Reader
convert.upcycle(source, out, UpcycleConfig(experts=4, max_shard_gib=40e3 / 2**30),
                after_shard=lambda path: die() if where == "shard" else None)
"""


def test_killed_twice_then_byte_identical(dense_dir, tmp_path):
    """Once right after a file was completed, once in the middle of one; the third run writes only what is missing."""
    source, out = dense_dir(), tmp_path / "out"
    upcycle(source, tmp_path / "whole", SMALL_SHARDS)
    finished = []
    for where, count in (("shard", 2), ("block", 25)):
        process = subprocess.run(
            [sys.executable, "-c", KILLED_CHILD, source, out, where, str(count)], stderr=subprocess.PIPE
        )
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
        assert not out.exists(), "half an output is visible"
        finished.append(len(list(staging_path(out).glob("*.safetensors"))))
    assert finished[0] == 2 < finished[1]
    written: list[Path] = []
    upcycle(source, out, SMALL_SHARDS, after_shard=written.append)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(written) == len(list(out.glob("*.safetensors"))) - finished[1]
    assert left_in(tmp_path) == ["dense", "out", "whole"]


def test_a_killed_conversion_is_not_continued_by_another_or_from_a_changed_source(dense_dir, tmp_path):
    source, out = dense_dir(), tmp_path / "out"

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(source, out, SMALL_SHARDS, after_shard=interrupt)
    with pytest.raises(ConfigError, match=r"options.seed: 0 -> 1"):
        upcycle(source, out, UpcycleConfig(experts=4, max_shard_gib=SMALL_SHARDS.max_shard_gib, seed=1))
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(ConfigError, match="source_files"):
        upcycle(source, out, SMALL_SHARDS)
    assert len(list(staging_path(out).glob("*.safetensors"))) == 1


def poison(value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][5, 7] = value

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_leaves_nothing(dense_dir, tmp_path, value):
    with pytest.raises(WeightsError, match=f"{DOWN} holds"):
        upcycle(dense_dir(poison(value)), tmp_path / "out", SMALL_SHARDS)
    assert left_in(tmp_path) == ["dense"]


def test_a_truncated_source_leaves_nothing(dense_dir, tmp_path):
    source = dense_dir()
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(WeightsError, match="truncated"):
        upcycle(source, tmp_path / "out")
    assert left_in(tmp_path) == ["dense"]


def test_a_source_that_shrinks_under_way_leaves_nothing(dense_dir, tmp_path):
    source = dense_dir()
    path = source / "model.safetensors"
    with pytest.raises(WeightsError, match="truncated"):
        upcycle(source, tmp_path / "out", SMALL_SHARDS, after_shard=lambda _: os.truncate(path, 20_000))
    assert left_in(tmp_path) == ["dense"]


def test_an_untied_copy_of_a_tied_matrix_leaves_nothing(dense_dir, tmp_path):
    source = dense_dir(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}), tie_word_embeddings=True
    )
    with pytest.raises(WeightsError, match=r"lm_head.weight differs"):
        upcycle(source, tmp_path / "out")
    assert left_in(tmp_path) == ["dense"]


def test_an_existing_output_is_untouched(dense_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputExistsError, match="out exists"):
        upcycle(dense_dir(), tmp_path / "out")
    assert left_in(tmp_path / "out") == ["mine"]


def test_a_link_to_nowhere_is_an_output_that_exists_before_the_source_is_read(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="out exists"):
        upcycle(tmp_path / "no source", tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds 200 kB: a tmpfs where mounting is permitted, else writes that run out of space."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode == 0:  # only root may
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    left, write = 200_000, os.write

    def limited(fd: int, data: bytes | memoryview) -> int:
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return write(fd, data)

    monkeypatch.setattr(os, "write", limited)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=200_000, f_frsize=1, f_blocks=1))
    yield folder


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(dense_dir, small_disk):
    with pytest.raises(DiskFullError, match=r"needs .* free"):
        upcycle(dense_dir(), small_disk / "out", SMALL_SHARDS)
    assert left_in(small_disk) == []


def test_a_disk_that_fills_up_leaves_nothing(dense_dir, small_disk, monkeypatch):
    monkeypatch.setattr(convert, "_check_space", lambda plan, out_dir: None)
    with pytest.raises(DiskFullError, match=r"disk is full") as caught:
        upcycle(dense_dir(), small_disk / "out", SMALL_SHARDS)
    assert "safetensors" in str(caught.value)
    assert left_in(small_disk) == []


def test_space_that_a_killed_conversion_holds_is_counted(dense_dir, tmp_path, monkeypatch):
    source, out = dense_dir(), tmp_path / "out"
    plan = plan_upcycle(source, SMALL_SHARDS)
    staging_path(out).mkdir()
    (staging_path(out) / "part").write_bytes(bytes(50_000))
    free = plan.num_bytes + convert.SPARE_BYTES - 50_000
    for spare, fits in ((0, True), (-1, False)):
        stat = SimpleNamespace(f_bavail=free + spare, f_frsize=1, f_blocks=1)
        monkeypatch.setattr(os, "statvfs", lambda path, stat=stat: stat)
        if fits:
            convert._check_space(plan, out)
        else:
            with pytest.raises(DiskFullError):
                convert._check_space(plan, out)


def test_a_source_that_was_replaced_is_not_taken_for_the_one_that_was_begun(dense_dir, tmp_path):
    """Same size and time of modification, as `cp -p`, `rsync --times` and tar leave them."""
    source, out = dense_dir(), tmp_path / "out"

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(source, out, SMALL_SHARDS, after_shard=interrupt)
    weights = source / "model.safetensors"
    stat, raw = weights.stat(), bytearray(weights.read_bytes())
    raw[-1] ^= 1  # one bit of the last tensor
    weights.write_bytes(raw)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"other work \(source_files.model.safetensors"):
        upcycle(source, out, SMALL_SHARDS)


def test_a_source_that_changes_while_it_is_read_is_refused(dense_dir, tmp_path):
    source = dense_dir()

    def touch(path: Path) -> None:
        os.utime(source / "model.safetensors")

    with pytest.raises(WeightsError, match="was changed while it was converted"):
        upcycle(source, tmp_path / "out", SMALL_SHARDS, after_shard=touch)
    assert not (tmp_path / "out").exists()


def test_the_zero_shared_expert_gets_no_gradient(dense_dir, tmp_path):
    upcycle(dense_dir(), tmp_path / "out", UpcycleConfig(experts=4, layers=(1,)))
    model = load_model(tmp_path / "out")
    tokens_BS = torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0))
    model.losses(tokens_BS[:, :-1], tokens_BS[:, 1:]).nll.backward()
    for name, parameter in model.named_parameters():
        if "router" not in name:  # with equal experts its gradient is zero but for rounding
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) != ("shared" in name), name
