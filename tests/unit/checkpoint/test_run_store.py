"""checkpoint/run_store.py and manifest.py: whole or absent, believed only when hash and signature hold."""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from earthshine.checkpoint import manifest as manifests
from earthshine.checkpoint import run_store
from earthshine.errors import CheckpointError, ConfigError, DiskFullError
from earthshine.model.config import ModelConfig
from earthshine.run_folder import MANIFEST

MODEL = ModelConfig(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=4,
)


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.embed.weight": torch.randn(8, 4, generator=generator),
        "optimizer.embed.weight.step": torch.tensor(float(step)),
        "rng.cpu": torch.randint(0, 255, (16,), generator=generator).to(torch.uint8),
    }


def save(run_dir: Path, step: int, keep: int = 0) -> Path:
    state = {"step": step, "number": 0.1 + 0.2, "list": [1, 2]}
    return run_store.save(
        run_dir, step=step, tensors=tensors(step), state=state, model=MODEL, job={"name": "x"}, keep=keep
    )


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    assert folder == tmp_path / "checkpoints" / "step-000005"
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.folder, checkpoint.step, checkpoint.model, checkpoint.job) == (folder, 5, MODEL, {"name": "x"})
    assert checkpoint.state == {"step": 5, "number": 0.30000000000000004, "list": [1, 2]}
    filled = {name: torch.zeros_like(tensor) for name, tensor in tensors(5).items()}
    run_store.read_into(checkpoint, filled)
    new = run_store.read_tensors(checkpoint)
    assert set(new) == set(filled)
    for name, tensor in tensors(5).items():
        assert torch.equal(filled[name], tensor) and torch.equal(new[name], tensor), name


def test_the_manifest_lists_every_other_file_with_its_hash(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    listed = set(json.loads((folder / "manifest.json").read_text())["files"])
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert listed == on_disk - {"manifest.json"} and len(listed) == 3


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-000003"])
def test_the_model_is_loaded_from_a_run_or_a_checkpoint_folder(where: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    config, state = run_store.load_model_state(tmp_path / where)
    assert config == MODEL and set(state) == {"embed.weight"}
    assert torch.equal(state["embed.weight"], tensors(3)["model.embed.weight"])


def test_the_newest_k_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000010", "step-000012"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1_000_000


def test_nothing_saved_is_none_or_an_error_where_a_model_is_asked_for(tmp_path: Path) -> None:
    assert run_store.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run_store.load_model_state(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # more than a final newline


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "tensors/__0_0.distcp", "tensors/.metadata"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    file: str, damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert "checkpoint step-000002 is damaged and is skipped" in capsys.readouterr().err


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint: .*step-000002.*step-000001"):
        run_store.latest(tmp_path)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    flip(save(tmp_path, 2) / "state.json")
    save(tmp_path, 2)
    assert run_store.latest(tmp_path) is not None
    assert names(tmp_path) == ["step-000002"]


@pytest.fixture
def other_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """From here on, another user or machine."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other"))
    manifests.signing_key()
    yield


def test_a_checkpoint_from_elsewhere_needs_trust(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save(tmp_path, 2)
    request.getfixturevalue("other_key")
    with pytest.raises(CheckpointError, match=r"not made by this user on this machine.*--trust"):
        run_store.latest(tmp_path)
    with pytest.raises(CheckpointError, match="--trust"):
        run_store.load_model_state(tmp_path)
    assert run_store.latest(tmp_path, trust=True) is not None
    assert set(run_store.load_model_state(tmp_path, trust=True)[1]) == {"embed.weight"}


def test_trust_does_not_excuse_damage(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    flip(save(tmp_path, 2) / "tensors" / ".metadata")
    request.getfixturevalue("other_key")
    with pytest.raises(CheckpointError, match="does not have the sha256"):
        run_store.latest(tmp_path, trust=True)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change a manifest and make its own digest hold again, as anyone can; only the signature cannot be made."""
    body = json.loads((folder / "manifest.json").read_text())
    signature = body.pop("signature")
    del body["sha256"]
    body |= changes
    body["sha256"] = manifests._digest(body)
    (folder / "manifest.json").write_text(json.dumps(body | {"signature": signature}))


def test_a_pickle_planted_with_fitting_hashes_is_not_run(tmp_path: Path) -> None:
    folder, target = save(tmp_path, 2), tmp_path / "boom"
    (folder / "tensors" / ".metadata").write_bytes(pickle.dumps(Bomb(target)))
    planted = manifests.sha256_file(folder / "tensors" / ".metadata")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    size = (folder / "tensors" / ".metadata").stat().st_size
    rewrite(folder, files=files | {"tensors/.metadata": {"bytes": size, "sha256": planted}})
    with pytest.raises(CheckpointError, match="its signature is not by it"):
        run_store.latest(tmp_path)
    assert not target.exists()


def test_the_empty_key_is_nobody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no key was made yet, nothing was made here: least of all what anyone can sign with no key."""
    folder = save(tmp_path, 2)
    rewrite(folder, key=manifests._key_id(b""))
    body = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(body | {"signature": manifests._sign(b"", body["sha256"])}))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "new"))
    with pytest.raises(CheckpointError, match="not made by this user on this machine"):
        run_store.latest(tmp_path)


@pytest.mark.parametrize("changes", [{"step": "2"}, {"files": {"a": {}}}, {"key": None}, {"job": []}], ids=str)
def test_a_manifest_of_other_types_is_damage(changes: dict[str, Any], tmp_path: Path) -> None:
    rewrite(save(tmp_path, 2), **changes)
    with pytest.raises(CheckpointError, match="is not a readable manifest: TypeError"):
        run_store.latest(tmp_path)


def test_a_renamed_checkpoint_is_not_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / "checkpoints" / "step-000099")
    save(tmp_path, 3)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 3


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = save(tmp_path, 2)
    request.getfixturevalue("other_key")
    (tmp_path / "secret").write_text("")
    rewrite(folder, files={"../../secret": {"bytes": 0, "sha256": manifests.sha256_file(tmp_path / "secret")}})
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        run_store.latest(tmp_path, trust=True)


def test_a_key_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"can be neither read nor made.*XDG_CONFIG_HOME"):
        manifests.signing_key()


def test_the_key_is_private_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    key = manifests.signing_key()
    assert manifests.signing_key() == key and len(key) == 32
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "earthshine").iterdir()] == [0o600]


def changed(what: str) -> dict[str, Tensor]:
    wanted = tensors(1)
    match what:
        case "missing":
            wanted["model.new"] = torch.zeros(1)
        case "unknown":
            del wanted["rng.cpu"]
        case "shape":
            wanted["model.embed.weight"] = torch.zeros(4, 8)
        case "dtype":
            wanted["model.embed.weight"] = torch.zeros(8, 4, dtype=torch.float64)
    return wanted


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "has no tensor model.new"),
        ("unknown", "has the unknown tensor rng.cpu"),
        ("shape", r"model.embed.weight was saved as torch.float32 \[8, 4\], this job has it as .*\[4, 8\]"),
        ("dtype", "this job has it as torch.float64"),
    ],
)
def test_tensors_of_another_state_are_refused(what: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=message):
        run_store.read_into(checkpoint, changed(what))


@pytest.mark.parametrize("what", ["missing", "unknown", "shape", "dtype"])
def test_tensors_that_are_optional_may_differ(what: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None
    differs = {"missing": "model.new", "unknown": "rng.cpu"}.get(what, "model.embed.weight")
    wanted = changed(what)
    before = {name: tensor.clone() for name, tensor in wanted.items()}
    assert run_store.read_into(checkpoint, wanted, optional=("optimizer.embed.weight.step", differs, "nowhere")) == {
        differs
    }
    for name, tensor in wanted.items():
        assert torch.equal(tensor, before[name] if name == differs else tensors(1)[name])


def test_too_little_room_is_reported_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1000, f_frsize=1, f_blocks=1))
    with pytest.raises(DiskFullError, match=r"step-000001 needs .*, but 1000 B are free there.*checkpoint.keep"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["tensors", "state"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_no_trace(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    free = iter([1 << 30, 0])  # enough when looked at first

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "tensors":  # torch says that its zip file ended early
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=next(free), f_frsize=1, f_blocks=1))
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", full)
    else:
        monkeypatch.setattr(run_store, "write_json", full)
    with pytest.raises(DiskFullError, match=r"step-000002.* (needs|could not be written)"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


def test_what_a_killed_save_left_is_not_a_checkpoint_and_goes_at_the_next(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name(".step-000002.tmp"))
    shutil.copytree(folder, folder.with_name(".step-000000.old"))
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_the_manifest_is_the_last_file_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    seen: list[list[str]] = []
    monkeypatch.setattr(
        manifests, "write_json", lambda path, _: seen.append(sorted(p.name for p in path.parent.iterdir())) or killed()
    )
    with pytest.raises(Killed):
        save(tmp_path, 1)
    assert seen == [["state.json", "tensors"]]
    assert run_store.latest(tmp_path) is None


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    rewrite(folder, format=99)
    with pytest.raises(CheckpointError, match=re.escape("has format 99; this version reads 1")):
        run_store.latest(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.write_text("[" * 200_000 + "]" * 200_000),
        lambda m: m.write_text('{"format":' * 500 + "1" + "}" * 500),
        lambda m: m.write_text('"a string"'),
        lambda m: m.write_bytes(b"\xff\xfe\x00"),
        lambda m: (m.unlink(), m.mkdir()),
        lambda m: m.write_text(m.read_text().replace('"signature": "', '"signature": "\\udc80')),
        lambda m: m.with_name("state.json").write_bytes(b""),
        lambda m: (m.with_name("state.json").unlink(), m.with_name("state.json").mkdir()),
        lambda m: m.rename(m.with_name("state.json")),
    ],
    ids=["deep", "deep objects", "no object", "no text", "a folder", "surrogate", "empty", "other kind", "moved"],
)
def test_no_damage_of_the_newest_hides_an_older_sound_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / MANIFEST)
    (tmp_path / "checkpoints" / "step-\u00b2").mkdir()  # a digit to str.isdigit, no number to int
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert "step-000002 is damaged and is skipped" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_damage_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No permission, or a failing disk: the older checkpoint is used."""
    save(tmp_path, 1)
    newest, real = save(tmp_path, 2), manifests.sha256_file

    def sha256_file(path: Path) -> str:
        if newest in path.parents:
            raise PermissionError(errno.EACCES, "permission denied", str(path))
        return real(path)

    monkeypatch.setattr(manifests, "sha256_file", sha256_file)
    checkpoint = run_store.latest(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1


def test_what_a_killed_save_left_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    """Before the old one was deleted, halfway through deleting it, and while the next was written."""
    for step in (1, 2, 3):
        newest = save(tmp_path, step)
    for name in (".step-000000.old", ".step-000004.tmp"):
        (tmp_path / "checkpoints" / name).mkdir()
    run_store.tidy(tmp_path, keep=0, newest=newest)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"], "0 keeps all"
    run_store.tidy(tmp_path, keep=2, newest=newest)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_no_sound_checkpoint_is_deleted_because_of_a_newer_damaged_one(tmp_path: Path) -> None:
    older = save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).unlink()
    run_store.tidy(tmp_path, keep=1, newest=older)
    assert names(tmp_path) == ["step-000001", "step-000002"]
