"""Checkpoints of one run: written, found, pointed at, and pruned."""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

import ternlm
from ternlm.checkpoint.manifest import CONFIG, MANIFEST, MODEL, OPTIMIZER, SCHEMA, STATE, read_manifest, verify
from ternlm.errors import CheckpointError, Diverged, EnvironmentFault
from ternlm.files import replace_durably, synchronize_folder, to_json, write_durably
from ternlm.run_directory import find_run
from ternlm.tokenizers import Tokenizer

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


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that a half-deleted one never carries a valid name."""
    doomed = path.with_name(f".del-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_pinned(path: Path) -> bool:
    try:
        return bool(read_manifest(path).get("pinned"))
    except CheckpointError:
        return False
