"""What makes a checkpoint folder trustworthy: its manifest, and the key that says who made it. Torch-free.

    RUN/checkpoints/step-000005/
        manifest.json    written last: step, model, job, the sha256 of each other file and of itself, a signature
        state.json       the numbers that are not tensors
        tensors/         torch.distributed.checkpoint

The digest and the hashes find damage. The signature is an HMAC by a key of this user on this machine, by which a folder
that came from elsewhere is recognized: the index of its tensors is a pickle, which can run code when it is read.
"""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earthshine.config import decode, encode, read_json
from earthshine.data.tokenization import Tokenization
from earthshine.errors import CheckpointError, ConfigError
from earthshine.files import expand_home, sha256_file, sync_folder, write_json
from earthshine.model.config import ModelConfig
from earthshine.run_folder import MANIFEST, checkpoint_folders

FORMAT = 1
_KEY_BYTES = 32


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and whose own digest holds; `trusted` says whether our key signed it.

    tokenization: how the run's texts became ids (`data.tokenization`); None in a checkpoint that is too old to have it.
    """

    folder: Path
    step: int
    model: ModelConfig
    job: dict[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    trusted: bool
    tokenization: Tokenization | None = None


def newest(path: Path) -> Manifest | None:
    """The newest manifest that can be read of those that `path` can mean; no other file is looked at."""
    for folder in checkpoint_folders(path):
        with contextlib.suppress(CheckpointError):
            return read(folder)
    return None


def write(
    folder: Path,
    *,
    step: int,
    model: dict[str, Any],
    job: dict[str, Any],
    tokenization: Tokenization | None = None,
) -> None:
    """Hash and fsync every file under `folder`, then write its signed manifest."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        sync_folder(inner)
    key = signing_key()
    body: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "model": model,
        "job": job,
        "files": files,
        "key": _key_id(key),
    }
    if tokenization is not None:
        body["tokenization"] = encode(tokenization)
    body["sha256"] = _digest(body)
    body["signature"] = _sign(key, body["sha256"])
    write_json(folder / MANIFEST, body)


def read(folder: Path) -> Manifest:
    """Read a manifest without looking at the files it names. Raises CheckpointError when it is damaged."""
    where = folder / MANIFEST
    try:
        body = read_json(where)
        signature, digest = body.pop("signature"), body.pop("sha256")
        if body["format"] != FORMAT:
            raise CheckpointError(f"{where} has format {body['format']!r}; this version reads {FORMAT}.")
        sound = hmac.compare_digest(digest.encode(), _digest(body).encode())
        _check_types(body, signature)
        signature = signature.encode()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{where} is not a readable manifest: {type(e).__name__}: {e}.") from e
    if not sound:
        raise CheckpointError(f"{where} does not have the sha256 written in it.")
    key = signing_key() if key_path().exists() else b""  # reading creates no key: without one, nothing was made here
    ours = bool(key) and body["key"] == _key_id(key)  # anybody can sign with the empty key
    if ours and not hmac.compare_digest(signature, _sign(key, digest).encode()):
        raise CheckpointError(f"{where} names this machine's key, but its signature is not by it.")
    try:
        model = decode(ModelConfig, body["model"])
        rule = decode(Tokenization, body["tokenization"]) if "tokenization" in body else None
    except ConfigError as e:
        raise CheckpointError(f"{where} holds a model this version cannot read: {e}") from e
    return Manifest(folder, body["step"], model, body["job"], body["files"], ours, rule)


def _check_types(body: Mapping[str, Any], signature: Any) -> None:
    """Raise TypeError or KeyError unless every field is there and of its type: anyone can write a digest."""
    kinds = {"step": int, "model": dict, "job": dict, "files": dict, "key": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(body[name], kind)]
    wrong += [name for name, f in body["files"].items() if not isinstance(f, dict) or {"bytes", "sha256"} - set(f)]
    if wrong or not isinstance(signature, str):
        raise TypeError(f"{', '.join(wrong) or 'signature'} of the wrong type")


def check_files(manifest: Manifest) -> None:
    """Raise CheckpointError unless every file of the manifest is there, readable, with its size and sha256."""
    for name, expected in manifest.files.items():
        try:
            _check_file(manifest, manifest.folder / name, expected)
        except (OSError, ValueError) as e:  # no permission, a failing disk, a name that no file can have
            raise CheckpointError(f"{manifest.folder / name} cannot be read: {e}.") from e


def _check_file(manifest: Manifest, path: Path, expected: Mapping[str, Any]) -> None:
    if not path.resolve().is_relative_to(manifest.folder.resolve()):
        raise CheckpointError(f"{manifest.folder / MANIFEST} names {path.name}, which is outside the checkpoint.")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; the manifest says {expected['bytes']}.")
    if sha256_file(path) != expected["sha256"]:
        raise CheckpointError(f"{path} does not have the sha256 that the manifest says.")


def require_trust(manifest: Manifest, trust: bool) -> None:
    """Raise CheckpointError unless our key signed the checkpoint or the user vouches for it."""
    if not (manifest.trusted or trust):
        raise CheckpointError(
            f"{manifest.folder} was not made by this user on this machine (its manifest is signed with another key), "
            f"and reading it can run code it contains. Pass --trust if you know where it comes from."
        )


def key_path() -> Path:
    """Where this user's signing key lies: in XDG_CONFIG_HOME, or ~/.config."""
    base = expand_home(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    if base.startswith("~"):  # a container's user may have none
        raise ConfigError(
            "there is no place for the key that signs checkpoints: this user has no home folder. Set XDG_CONFIG_HOME."
        )
    return Path(base) / "earthshine" / "checkpoint.key"


def signing_key() -> bytes:
    """This user's key, made at the first use. Raises ConfigError when it can be neither read nor made."""
    path = key_path()
    try:
        if not path.exists():
            _create_key(path)
        key = path.read_bytes()
    except OSError as e:
        raise ConfigError(
            f"the key that signs checkpoints, {path}, can be neither read nor made: {e}. "
            f"Set XDG_CONFIG_HOME to a folder that you can write to."
        ) from e
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path} has {len(key)} bytes instead of {_KEY_BYTES}: delete it, and use --trust once.")
    return key


def _create_key(path: Path) -> None:
    """Write a new key whole, unless another process does so first: a hard link never replaces."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(_KEY_BYTES))
        os.fsync(fd)
    finally:
        os.close(fd)
    try:
        os.link(temporary, path)
    except OSError as e:
        if e.errno != errno.EEXIST:
            raise
    finally:
        temporary.unlink()


def _key_id(key: bytes) -> str:
    """A name for a key that does not give it away."""
    return hashlib.sha256(b"earthshine key id" + key).hexdigest()[:16]


def _sign(key: bytes, digest: str) -> str:
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
