"""The proof of a checkpoint: its manifest, and files whose SHA-256 is checked before their bytes are parsed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ternlm.errors import CheckpointError

SCHEMA = 1
MANIFEST, MODEL, OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
STATE, CONFIG = "trainer_state.json", "config.json"


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
    kept: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            is_usable = Path(name).name == name and not file.is_symlink() and file.is_file()
            content = file.read_bytes() if is_usable else None
        except OSError:
            content = None
        if content is None:
            raise CheckpointError(f"checkpoint '{path}' lacks its file '{name}'. Use another checkpoint.")
        if len(content) != expected["bytes"]:
            raise CheckpointError(
                f"'{file}' has {len(content):,} bytes, its manifest promises {expected['bytes']:,}: it is truncated "
                "or was replaced. Use another checkpoint."
            )
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            raise CheckpointError(
                f"'{file}' differs from its manifest (sha256): it is damaged or was edited. Use another checkpoint."
            )
        if name in only:
            kept[name] = content
    for name in only:
        if name not in kept:
            raise CheckpointError(f"checkpoint '{path}' has no '{name}' in its manifest. Use another checkpoint.")
    return manifest, kept


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; the files it lists are not looked at.

    Raises:
        CheckpointError: It is missing, malformed, or of a newer format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        schema = manifest["schema"]
        sizes = [entry["bytes"] for entry in manifest["files"].values()]
        hashes = [entry["sha256"] for entry in manifest["files"].values()]
        well_formed = all(isinstance(n, int) for n in sizes) and all(isinstance(h, str) for h in hashes)
        if not well_formed or not isinstance(schema, int):
            raise TypeError("wrong types")
    except OSError:
        raise CheckpointError(f"'{path}' has no {MANIFEST}, so it is no complete checkpoint.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{path / MANIFEST}' is malformed. Use another checkpoint.") from None
    if schema > SCHEMA:
        raise CheckpointError(
            f"checkpoint '{path}' has format {schema}; this version reads up to {SCHEMA}. Upgrade ternlm."
        )
    return dict(manifest)


def parse_object(path: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """A JSON object from the verified bytes of a file.

    Raises:
        CheckpointError: The bytes are not JSON, or not an object.
    """
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        raise CheckpointError(f"'{path / name}' is not valid JSON. Use another checkpoint.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path / name}' does not hold an object. Use another checkpoint.")
    return value


def parse_tensors(path: Path, name: str, content: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file held in memory.

    Raises:
        CheckpointError: The bytes are not safetensors.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"'{path / name}' is not a valid safetensors file: {error}.") from None
