"""The proof of a checkpoint: its manifest, and files whose SHA-256 is checked before their bytes are parsed.

Whatever lies in a checkpoint folder may be damaged or made to do harm: sizes are capped, JSON is read
strictly, and only ordinary files are opened. Everything that is wrong is a CheckpointError that names the file.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ternlm.errors import CheckpointError
from ternlm.files import from_json, read_regular, regular_file, to_json

SCHEMA = 1
MANIFEST, MODEL, OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
PACKED = "model.packed.safetensors"
STATE, CONFIG = "trainer_state.json", "config.json"

LARGEST_JSON = 64 * 2**20
LARGEST_FILE = 256 * 2**30

_REQUIRED = (MODEL, OPTIMIZER, STATE, CONFIG)
_REQUIRED_OF_PACKED = (PACKED, STATE, CONFIG)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SINCE_SEALED = ("run_id", "rollbacks", "finite", "env")
_ANOTHER = "Use another checkpoint."


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Raises:
        CheckpointError: Something is missing, or differs in size or content.
    """
    return read_verified(path, only=())[0]


def read_verified(path: Path, only: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and the contents of the files in `only`: the very bytes that were hashed.

    Raises:
        CheckpointError: Something is missing, or differs in size or content.
    """
    if not path.is_dir():
        raise CheckpointError(f"checkpoint '{path}' does not exist. Check the path.")
    manifest = read_manifest(path)
    is_packed = PACKED in manifest["files"]
    if is_packed and OPTIMIZER in only:
        raise CheckpointError(
            f"'{path}' holds packed weights, from which training cannot go on. Use the run's own checkpoint."
        )
    for name in (*(_REQUIRED_OF_PACKED if is_packed else _REQUIRED), *only):
        if name not in manifest["files"]:
            raise CheckpointError(f"checkpoint '{path}' has no '{name}' in its {MANIFEST}. {_ANOTHER}")
    kept: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        content = _proved(path / name, expected["bytes"], expected["sha256"], keep=name in only)
        if content is not None:
            kept[name] = content
    return manifest, kept


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; the files it lists are not looked at.

    Raises:
        CheckpointError: It is missing, malformed, damaged, or of a newer format.
    """
    file = path / MANIFEST
    try:
        manifest = from_json(read_regular(file, LARGEST_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' has no {MANIFEST}, so it is no complete checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be used: {error.strerror}. {_ANOTHER}") from None
    except ValueError:
        raise CheckpointError(f"'{file}' is malformed: no strict JSON. {_ANOTHER}") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not _is_count(schema):
        raise CheckpointError(f"'{file}' is malformed: no object with a schema. {_ANOTHER}")
    if schema > SCHEMA:
        raise CheckpointError(f"'{file}' has format {schema}; this version reads up to {SCHEMA}. Upgrade ternlm.")
    if not _is_intact(manifest):
        raise CheckpointError(f"'{file}' differs from its own sha256: it is damaged or was edited. {_ANOTHER}")
    problem = _problem(manifest)
    if problem:
        raise CheckpointError(f"'{file}' is malformed: {problem}. {_ANOTHER}")
    return dict(manifest)


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its field ``sha256``, which holds this."""
    return hashlib.sha256(to_json({key: value for key, value in manifest.items() if key != "sha256"})).hexdigest()


def parse_object(path: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """A JSON object from the verified bytes of a file.

    Raises:
        CheckpointError: The bytes are not strict JSON, or not an object.
    """
    try:
        value = from_json(files[name])
    except ValueError:
        raise CheckpointError(f"'{path / name}' is not valid JSON. {_ANOTHER}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path / name}' does not hold an object. {_ANOTHER}")
    return value


def parse_tensors(path: Path, name: str, content: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file held in memory.

    Raises:
        CheckpointError: The bytes are not safetensors.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, TypeError, LookupError, OverflowError, RuntimeError, MemoryError) as error:
        reason = " ".join(ascii(str(error))[1:-1].split())[:200]
        raise CheckpointError(f"'{path / name}' is not a valid safetensors file: {reason}. {_ANOTHER}") from None


def _proved(file: Path, size: int, sha256: str, keep: bool) -> bytes | None:
    """Compare a file with its size and hash; its content where it is to be kept."""
    try:
        with regular_file(file) as stream:
            found = os.fstat(stream.fileno()).st_size
            if found != size:
                raise CheckpointError(
                    f"'{file}' has {found:,} bytes, its manifest promises {size:,}: it is truncated "
                    f"or was replaced. {_ANOTHER}"
                )
            content = stream.read(size) if keep else None
            digest = hashlib.file_digest(stream, "sha256") if content is None else hashlib.sha256(content)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint '{file.parent}' lacks its file '{file.name}'. {_ANOTHER}") from None
    except OSError as error:
        raise CheckpointError(f"'{file}' cannot be used: {error.strerror}. {_ANOTHER}") from None
    except MemoryError:
        raise CheckpointError(f"'{file}' with its {size:,} bytes does not fit into memory. {_ANOTHER}") from None
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"'{file}' differs from its manifest (sha256): it is damaged or was edited. {_ANOTHER}")
    return content


def _is_intact(manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest fits its own sha256; those that were written before there was one pass."""
    if "sha256" not in manifest and not any(name in manifest for name in _SINCE_SEALED):
        return True
    try:
        return manifest.get("sha256") == seal(manifest)
    except (ValueError, RecursionError):  # lone surrogates, deep nesting: nothing that `to_json` has written
        return False


def _problem(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the fields of a manifest, if anything."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "no list of files"
    for name, entry in files.items():
        if not _FILE_NAME.fullmatch(name):
            return f"{name[:80]!a} is no plain file name"
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")) or not _is_sha256(entry.get("sha256")):
            return f"the entry of '{name}' is not a size and a sha256"
        largest = LARGEST_JSON if name in (STATE, CONFIG) else LARGEST_FILE
        if entry["bytes"] > largest:
            return f"'{name}' is said to have more than {largest:,} bytes"
    if len({name.casefold() for name in files}) < len(files):
        return "two file names differ in case only"
    texts_or_none = all(isinstance(manifest.get(name), str | None) for name in ("run_id", "pinned"))
    if not texts_or_none or not _is_count(manifest.get("rollbacks", 0)) or not _is_count(manifest.get("step", 0)):
        return "run_id, pinned, rollbacks or step has the wrong type"
    if not isinstance(manifest.get("env", {}), dict):
        return "env is no object"
    return None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
