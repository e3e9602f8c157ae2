"""Checkpoints: old or new, never a mixture, and proved by SHA-256 before a weight is touched.

A checkpoint is a folder `step_NNNNNN` (completed optimizer steps) of safetensors and JSON files; no
pickle is written or read. It is written beside its final place, brought to the disk, and renamed,
so the name exists only when the content is complete. It holds what is needed to use it: weights,
optimizer state, position, settings, and tokenizer.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import ternlm
from ternlm.device import choose_dtype
from ternlm.errors import CheckpointError, Diverged, EnvironmentFault, SettingsError
from ternlm.files import replace_durably, synchronize_folder, to_json, write_durably
from ternlm.models import LanguageModel, QuantizationMode, build_model, model_settings
from ternlm.run_directory import find_run
from ternlm.tokenizers import Tokenizer, load_tokenizer

SCHEMA = 1
MANIFEST, MODEL, OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
STATE, CONFIG = "trainer_state.json", "config.json"

_NAME = re.compile(r"step_(\d{6}|[1-9]\d{6,})")


class Contents(NamedTuple):
    """What goes into a checkpoint.

    Attributes:
        model: Tensors by their names in files.
        optimizer: Optimizer tensors by name.
        state: Counters and scalars, JSON values only.
        config: Resolved settings, JSON values only.
        tokenizer: Saved beside the model.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: Tokenizer


class Loaded(NamedTuple):
    """A model ready to use, and what it was trained with."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    state: dict[str, Any]
    path: Path


def save(root: Path, step: int, contents: Contents, pinned: str | None = None) -> Path:
    """Write `step_NNNNNN` under `root` and return its path.

    Args:
        root: The run's checkpoints folder.
        step: Completed optimizer steps.
        contents: What to write.
        pinned: Why this checkpoint must never be pruned, or None.

    Raises:
        Diverged: A value is not finite.
        CheckpointError: What was written does not read back as it should.
        EnvironmentFault: The disk is full or the folder cannot be written.
    """
    for name, tensor in contents.model.items():
        if not bool(torch.isfinite(tensor).all()):
            raise Diverged(
                f"tensor '{name}' holds non-finite values at step {step}; it is not saved, earlier ones are good."
            )
    target = root / f"step_{step:06d}"
    temporary = root / f".tmp-{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_contents(temporary, step, contents, pinned)
        synchronize_folder(temporary)
        if target.exists():  # a damaged one, passed over on resume; it gives way only now
            _remove(target)
        temporary.rename(target)
        synchronize_folder(root)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(
            f"checkpoint '{target}' cannot be written: {error.strerror}. Earlier checkpoints are untouched; "
            "free disk space or choose another --runs-dir, then resume."
        ) from None
    verify(target)  # before anything older is pruned
    return target


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, and return the manifest.

    Raises:
        CheckpointError: Something is missing, or differs in size or content.
    """
    return _read_verified(path, only=())[0]


def newest_valid(root: Path, report: Callable[[str], None] | None = None) -> Path:
    """The checkpoint with the highest step that verifies.

    Args:
        root: A run's checkpoints folder.
        report: Called with one sentence for each newer checkpoint that does not verify.

    Raises:
        CheckpointError: None verifies.
    """
    candidates = sorted(steps(root), reverse=True)
    for step in candidates:
        path = root / f"step_{step:06d}"
        try:
            verify(path)
            return path
        except CheckpointError as error:
            if report is not None:
                report(f"{error} Trying the previous checkpoint.")
    found = f"{len(candidates)} damaged ones" if candidates else "none"
    raise CheckpointError(f"no usable checkpoint in '{root}' ({found}). Start a new run with 'ternlm train'.")


def steps(root: Path) -> list[int]:
    """Steps that have a checkpoint folder, in numeric order."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def resolve(reference: str, runs: Path) -> Path:
    """A checkpoint by folder path, or by run: ``RUN``, ``RUN@best``, ``RUN@last``, ``RUN@500``.

    A run is a path, a name, a unique prefix or ``latest``; without ``@`` its newest valid
    checkpoint is meant.

    Raises:
        CheckpointError: The reference leads to no checkpoint.
    """
    if (Path(reference) / MANIFEST).is_file() or _NAME.fullmatch(Path(reference).name):
        if not Path(reference).is_dir():
            raise CheckpointError(f"checkpoint '{reference}' does not exist. Check the path.")
        return Path(reference)
    run_name, _, which = reference.partition("@")
    try:
        run = find_run(run_name, runs)
    except EnvironmentFault as error:
        raise CheckpointError(f"'{reference}' is no checkpoint folder, and as a run: {error}") from None
    if which in ("", "last"):
        return newest_valid(run.checkpoints)
    if which in ("best", "final"):
        pointer = run.checkpoints / which
        name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"run '{run.id}' has no '{which}' checkpoint yet. Use {run_name}@last.")
        return run.checkpoints / name
    digits = which.removeprefix("step_")
    path = run.checkpoints / f"step_{int(digits):06d}" if digits.isdigit() else run.checkpoints / which
    if not path.is_dir() or path.parent != run.checkpoints:
        have = ", ".join(map(str, steps(run.checkpoints))) or "none"
        raise CheckpointError(f"run '{run.id}' has no checkpoint '{which}'. It has steps: {have}.")
    return path


def load(path: Path, device: torch.device | str = "cpu", mode: QuantizationMode | None = None) -> Loaded:
    """Verify a checkpoint and build its model, in evaluation mode.

    Args:
        path: A checkpoint folder.
        device: Where the model goes.
        mode: Rounding to use instead of the one it was trained with.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit its own settings.
    """
    _, files = _read_verified(path, only=(MODEL, CONFIG, STATE))
    config, state = _parse(path, CONFIG, files), _parse(path, STATE, files)
    try:
        settings = model_settings(config["model"])
        if settings.vocab_size is None:
            raise ValueError("model.vocab_size is not set")
        mode = mode or QuantizationMode.from_mapping(config["quantization"], "quantization")
        dtype = choose_dtype(config["training"]["precision"], torch.device(device))
    except (LookupError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise CheckpointError(f"'{path / CONFIG}' describes no model ({error}). Use another checkpoint.") from None
    with torch.device(device):
        model = build_model(settings, mode)
    model.compute_dtype = dtype
    load_tensors(model, parse_tensors(path, MODEL, files[MODEL]), path)
    tokenizer = load_tokenizer(path)
    expected = state.get("tokenizer_fingerprint")
    if tokenizer.fingerprint != expected:
        raise CheckpointError(
            f"the tokenizer in '{path}' (fingerprint {tokenizer.fingerprint[:12]}) is not the one the model was "
            f"trained with ({str(expected)[:12]}). Copy the original tokenizer files back."
        )
    return Loaded(model.eval(), tokenizer, config, state, path)


def read_training_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Verified model tensors, optimizer tensors and counters of a checkpoint.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    _, files = _read_verified(path, only=(MODEL, OPTIMIZER, STATE))
    model, optimizer = (parse_tensors(path, name, files[name]) for name in (MODEL, OPTIMIZER))
    return model, optimizer, _parse(path, STATE, files)


def load_tensors(model: LanguageModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a model, all or nothing.

    Raises:
        CheckpointError: Names or shapes differ from the model's.
    """
    wanted = model.tensors()
    for problem, names in (("lacks", wanted.keys() - tensors), ("has the unknown", tensors.keys() - wanted)):
        if names:
            example = min(names)
            raise CheckpointError(
                f"checkpoint '{path}' {problem} tensor '{example}' ({len(names)} in all); it was written for "
                f"another model than {model.settings.family}. Choose another checkpoint or drop the overrides."
            )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"tensor '{name}' in '{path}' has shape {tuple(tensors[name].shape)}, the model wants "
                f"{tuple(tensor.shape)}. Choose another checkpoint or drop the overrides."
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def prune(root: Path, keep_last: int, keep_every: int | None = None) -> list[int]:
    """Delete checkpoints that policy does not keep, and return their steps.

    Kept are the last `keep_last`, every `keep_every`-th step, the best, and all pinned ones.
    """
    best = root / "best"
    kept = best.read_text(errors="replace").strip() if best.is_file() else ""
    removed = []
    for step in steps(root)[: -max(keep_last, 1)]:
        path = root / f"step_{step:06d}"
        if path.name == kept or (keep_every and step % keep_every == 0) or _is_pinned(path):
            continue
        try:
            _remove(path)
        except OSError as error:
            raise EnvironmentFault(f"old checkpoint '{path}' cannot be removed: {error.strerror}.") from None
        removed.append(step)
    return removed


def point(root: Path, name: str, target: Path) -> None:
    """Write the one-line pointer `name` (best, last, final) to a checkpoint.

    Raises:
        EnvironmentFault: The disk is full or the folder cannot be written.
    """
    try:
        replace_durably(root / name, f"{target.name}\n".encode())
    except OSError as error:
        raise EnvironmentFault(
            f"pointer '{root / name}' cannot be written: {error.strerror}. Checkpoint '{target}' is complete; "
            "free disk space, then resume."
        ) from None


def remove_unfinished(root: Path) -> None:
    """Delete what a killed process left half-written or half-deleted."""
    for pattern in (".tmp-step_*", ".del-step_*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def parse_tensors(path: Path, name: str, content: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file held in memory.

    Raises:
        CheckpointError: The bytes are not safetensors.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"'{path / name}' is not a valid safetensors file: {error}.") from None


def _write_contents(folder: Path, step: int, contents: Contents, pinned: str | None) -> None:
    state = {**contents.state, "step": step, "tokenizer_fingerprint": contents.tokenizer.fingerprint}
    tensors = {MODEL: contents.model, OPTIMIZER: contents.optimizer}
    for name, values in tensors.items():
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in values.items()}
        write_durably(folder / name, safetensors.torch.save(on_cpu, metadata={"format": "pt"}))
    write_durably(folder / STATE, to_json(state))
    write_durably(folder / CONFIG, to_json(contents.config))
    contents.tokenizer.save(folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    manifest = {
        "schema": SCHEMA, "writer": f"ternlm {ternlm.__version__}", "step": step, "pinned": pinned,
        "files": files, "torch": torch.__version__,
    }  # fmt: skip
    write_durably(folder / MANIFEST, to_json(manifest))


def _read_verified(path: Path, only: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and the contents of the files in `only`: the very bytes that were hashed."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint '{path}' does not exist. Check the path.")
    manifest = _read_manifest(path)
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


def _read_manifest(path: Path) -> dict[str, Any]:
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


def _parse(path: Path, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        raise CheckpointError(f"'{path / name}' is not valid JSON. Use another checkpoint.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path / name}' does not hold an object. Use another checkpoint.")
    return value


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one never carries a valid name."""
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_pinned(path: Path) -> bool:
    try:
        return bool(_read_manifest(path).get("pinned"))
    except CheckpointError:
        return False
